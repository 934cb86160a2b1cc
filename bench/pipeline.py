"""bench/pipeline.py: what sampling in one call buys. TreeRL one-step off-policy against TreeRL with
two calls a step.

    python bench/pipeline.py

Both have the same problems, the same number of responses and continuations, the same updates
(adaptive sampling is off); their steps are interleaved in one process. Seconds are medians of a
step, in all and by phase; "other" is what no phase accounts for; "idle" is the share of the two
cores' time that the process did not use (grading runs in processes of its own). The calls of the
engine are counted: one a step and one to warm up, against two a step. The paper's figure on its 8
GPUs: -8 %.

Two sizes. With 24 problems a step's hundreds of rows keep two cores busy, and twice as many rows
cost twice as much: nothing is left to save. With 2 problems a decoding step costs the same whatever
its few rows, as it does on a GPU that reads all weights for every step: there the second call's
steps are what is saved.
"""

import statistics
import time

import torch
from measure import command, gain, positive, record

from attnrl import Trainer, parse_config
from errors import stop_on_user_error
from runlog import Display

PHASES = ("generate", "score", "grade", "exchange", "train", "sync")


class Side:
    """One of the two, a training step at a time; the lines of attnrl.train without log, evaluation
    and checkpoint."""

    def __init__(self, method: str, options: list[str], endless: bool = False):
        self.trainer = Trainer(parse_config(["--method", method, *options]), Display(1, quiet=True))
        self.number, self.calls, self.seen = 0, 0, []
        if endless:  # every response is as long as allowed
            self.trainer.engine.eos_ids = []
        generate = self.trainer.engine.generate

        def counted(requests):
            self.calls += 1
            return generate(requests)

        self.trainer.engine.generate = counted
        self.upcoming = None
        if self.trainer.config.one_step_off_policy:
            self.upcoming = self.trainer.new_batch(1)
            self.trainer.sample(None, self.upcoming)
        self.warm_up_calls = self.calls

    def medians(self) -> dict[str, float]:
        """Of all that was seen, without the first step (unless there is no other)."""
        return {
            key: statistics.median(s[key] for s in self.seen[1:] or self.seen)
            for key in self.seen[0]
        }

    def step(self) -> None:
        trainer, before = self.trainer, self.trainer.generated_tokens
        self.number += 1
        trainer.start_step()
        started, used = time.perf_counter(), time.process_time()
        if trainer.config.one_step_off_policy:
            batch, self.upcoming = self.upcoming, trainer.new_batch(self.number + 1)
            trainer.sample(batch, self.upcoming)
        else:
            batch = trainer.new_batch(self.number)
            trainer.sample(None, batch)
            trainer.sample(batch, None)
        trainer.exchange(batch)
        trainer.update(self.number, trainer.sequences(batch))
        spent, phases = time.perf_counter() - started, dict(trainer.seconds)
        self.seen.append(
            {"step": spent}
            | {name: phases.get(name, 0.0) for name in PHASES}
            | {
                "other": spent - sum(phases.values()),
                "tokens": trainer.generated_tokens - before,
                "idle %": (
                    100 * (1 - (time.process_time() - used) / spent / torch.get_num_threads())
                ),
            }
        )


def compare(batch_size: int, steps: int) -> None:
    # --lr 0: lengths and accuracy stay the same
    options = ["--batch_size", str(batch_size), "--test_problems", "toy:8:4:2", "--lr", "0"]
    sides = {"one call": Side("treerl_off", options), "two calls": Side("treerl", options)}
    for i in range(steps):
        for side in list(sides.values())[:: 1 if i % 2 else -1]:
            side.step()
    calls = [(side.warm_up_calls, side.calls - side.warm_up_calls) for side in sides.values()]
    assert calls == [(1, steps), (0, 2 * steps)], calls
    one, two = rows = [
        {f"seconds of a step, {batch_size} problems": name}
        | side.medians()
        | {"calls": f"{side.calls} in {steps} steps"}
        for name, side in sides.items()
    ]
    what = f"pipeline, {batch_size} problems, one generation call a step: two"
    record(
        f"pipeline/{batch_size}",
        rows,
        [
            gain(f"{what}, generation", one["generate"], two["generate"], "s"),
            # 1 / 0.92
            gain(f"{what}, whole step", one["step"], two["step"], "s", 1.087),
        ],
    )


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
