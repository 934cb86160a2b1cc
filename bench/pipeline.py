"""bench/pipeline.py: the gain from sampling in one call: TreeRL one-step off-policy against TreeRL
with two calls per step.

    python bench/pipeline.py

Both have the same problems, the same number of responses and continuations, the same updates
(adaptive sampling is off); their steps take turns in one process. Seconds are medians of a step, in
total and by phase; "other" is time outside all phases; "idle" is the share of the two cores' time
that the process did not use (grading runs in other processes). The calls of the engine are counted:
one per step and one more in the first, against two per step. The paper's figure on its 8 GPUs:
-8 %.

Two sizes. With 24 problems, the hundreds of rows of a step keep two cores busy, and twice as many
rows cost twice as much: nothing can be saved. With 2 problems, a decoding step costs the same for
any number of its few rows, as on a GPU that reads all weights for every step: here one call saves
the decoding steps of the second call.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import command, gain, options, positive, record

import attnrl
from runtime.cli import stop_on_user_error
from runtime.monitor import Display

PHASES = ("generate", "score", "grade", "exchange", "train", "sync")


class Side:
    """A run whose training steps are made one at a time, and timed: no log, no evaluation, no
    checkpoint.

    endless: no end token, so every response is as long as allowed.
    """

    def __init__(self, method: str, endless: bool = False, **settings):
        given = options(method=method, steps=10**9, test_problems="toy:8:4:2", **settings)
        self.run = attnrl.setup(attnrl.parse_config(given), Display(1, quiet=True))
        self.number, self.batch = 0, None
        self.calls: list[list] = []  # the requests of each call of the engine
        self.seen: list[dict[str, float]] = []  # what each step took
        if endless:
            self.run.engine.eos_ids = []
        self.generate, self.run.engine.generate = self.run.engine.generate, self.recorded

    def recorded(self, requests):
        self.calls.append(requests)
        return self.generate(requests)

    def step(self) -> attnrl.StepResult:
        monitor, before = self.run.monitor, self.run.monitor.generated_tokens
        self.number += 1
        started, used = time.perf_counter(), time.process_time()
        result = attnrl.step(self.run, self.number, self.batch)
        spent, worked = time.perf_counter() - started, time.process_time() - used
        self.batch = result.upcoming
        by_phase = {name: monitor.seconds.get(name, 0.0) for name in PHASES}
        self.seen.append(
            {"step": spent}
            | by_phase
            | {
                "other": spent - sum(by_phase.values()),
                "tokens": monitor.generated_tokens - before,
                "idle %": 100 * (1 - worked / spent / torch.get_num_threads()),
            }
        )
        return result

    def medians(self) -> dict[str, float]:
        """Of all that was seen, without the first step (unless there is no other)."""
        counted = self.seen[1:] or self.seen
        return {key: statistics.median(seen[key] for seen in counted) for key in counted[0]}


def compare(batch_size: int, steps: int) -> None:
    # lr 0: lengths and accuracy stay the same
    methods = {"one call": "treerl_off", "two calls": "treerl"}
    sides = {name: Side(m, batch_size=batch_size, lr=0) for name, m in methods.items()}
    for i in range(steps):
        for side in list(sides.values())[:: 1 if i % 2 else -1]:
            side.step()
    calls = [len(side.calls) for side in sides.values()]
    assert calls == [1 + steps, 2 * steps], calls
    one, two = rows = [
        {f"seconds of a step, {batch_size} problems": name}
        | side.medians()
        | {"calls": f"{len(side.calls)} in {steps} steps"}
        for name, side in sides.items()
    ]
    what = f"pipeline, {batch_size} problems, one generation call a step: two"
    ratios = [
        gain(f"{what}, generation", one["generate"], two["generate"], "s"),
        gain(f"{what}, whole step", one["step"], two["step"], "s", 1.087),  # 1 / 0.92
    ]
    record(f"pipeline/{batch_size}", rows, ratios)


def main() -> None:
    parser = command(__doc__, "--batch_sizes 8")
    parser.add_argument(
        "--steps", type=positive, default=12, help="of each; the first is not counted"
    )
    parser.add_argument(
        "--batch_sizes", type=positive, nargs="+", default=[24, 2], help="problems a step"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.batch_sizes:
        compare(size, args.steps if size > 8 else 4 * args.steps)


if __name__ == "__main__":
    with stop_on_user_error("bench/pipeline.py"):
        main()
