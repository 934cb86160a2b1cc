"""bench/busy.py: a toy step alone, beside a busy process, and in two runs at once; with threads
that wait as ours do, that sleep at once, or that wait by OpenMP's default.

    python bench/busy.py                       # about half an hour on 2 cores
    python bench/busy.py --steps 1 --rounds 1 --batch_size 2

PyTorch's threads wait for each other at the end of every operation. In OpenMP, waiting threads
spin. This saves microseconds if each thread has a core; if threads share a core, a waiting thread
takes it from a working one. "ours" is the setting of runtime/__init__.py, made before torch is
imported: spin briefly, then sleep. "passive" is OMP_WAIT_POLICY=passive alone: sleep at once.
"without" imports torch first and leaves all variables unset.

Each run is a separate process: it makes a first step, waits for the other runs, and then makes the
steps that count, the same ones in every run (lr 0, one seed). The busy process is an endless loop.
Cases take turns; seconds are medians over all steps that count. Run this on an idle machine: the
ratios "alone" need one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import ROOT, command, cost, gain, positive, record

from runtime.cli import UserError, stop_on_user_error

OURS, PASSIVE, WITHOUT = POLICIES = "ours", "passive", "without"
# torch first: OpenMP reads the variable when it is loaded, so what runtime sets comes too late
TORCH_FIRST = "import sys, torch; sys.path.insert(0, 'bench'); import busy; busy.main()"
ENDLESS = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
while True: pass
"""
ALONE, BUSY, TWO = "alone", "beside one busy process", "two runs at once"
CASES = {ALONE: 1, BUSY: 1, TWO: 2}  # and how many runs


def run_steps(steps: int, batch_size: int) -> None:
    """One run: says "ready" after its first step, waits for a word, prints the seconds of the
    others."""
    from pipeline import Side

    side = Side("attnrl", batch_size=batch_size, lr=0)
    side.step()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever asked is gone
    for _ in range(steps):
        side.step()
    print(json.dumps([seen["step"] for seen in side.seen[1:]]))


def words_of(policy: str, options: list[str]) -> list[str]:
    """The command line of this script, which asks for what ours do, or one that does not."""
    script = ["-c", TORCH_FIRST] if policy == WITHOUT else [__file__]
    return [sys.executable, *script, *options]


def environment_of(policy: str) -> dict[str, str]:
    free = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP"))}
    # whoever sets the policy keeps it, so runtime adds nothing
    return free | ({"OMP_WAIT_POLICY": "passive"} if policy == PASSIVE else {})


def start_run(policy: str, args) -> subprocess.Popen:
    size = ["--steps", args.steps, "--batch_size", args.batch_size, "--threads", args.threads]
    return subprocess.Popen(
        words_of(policy, ["--child", *map(str, size)]),
        cwd=ROOT,
        env=environment_of(policy),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def busy_process():
    """One more process that never waits; it also ends when this one dies."""
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure(case: str, policy: str, args) -> list[float]:
    """Seconds of all steps that count, of all runs of a case."""
    runs = [start_run(policy, args) for _ in range(CASES[case])]
    try:
        for run in runs:
            if run.stdout.readline() != "ready\n":
                raise UserError(f"a run ended with exit code {run.wait()} before its first step")
        with busy_process() if case == BUSY else nullcontext():
            for run in runs:
                run.stdin.write("go\n")
                run.stdin.flush()
            return [second for run in runs for second in json.loads(run.communicate()[0])]
    finally:
        for run in runs:
            run.kill()


def compare(args) -> None:
    wanted = [(case, policy) for case in CASES for policy in POLICIES]
    seen: dict[tuple[str, str], list[float]] = {what: [] for what in wanted}
    for number in range(args.rounds):
        for case, policy in wanted[:: -1 if number % 2 else 1]:
            seconds = measure(case, policy, args)
            seen[case, policy] += seconds
            print(f"{case}, {policy}:", *(f"{s:.2f}" for s in seconds), flush=True)
    step = {what: statistics.median(seconds) for what, seconds in seen.items()}
    record("busy", *summary(step, args.batch_size))


def summary(step: dict[tuple[str, str], float], batch_size: int) -> tuple[list[dict], list[dict]]:
    """Rows and ratios from the seconds of a step by (case, policy)."""
    rows = [
        {f"a step of {batch_size} problems": case}
        | {f"{policy}, s": step[case, policy] for policy in POLICIES}
        | {f"{p}, times alone": step[case, p] / step[ALONE, p] for p in POLICIES}
        for case in CASES
    ]
    alone, busy, two = (step[case, OURS] for case in CASES)
    ratios = [
        cost("step beside one busy process: alone", busy, alone, "s", 3),
        cost("step of two runs at once: alone", two, alone, "s", 2.5),
        gain("step beside one busy process: without", busy, step[BUSY, WITHOUT], "s"),
        gain("step of two runs at once: without", two, step[TWO, WITHOUT], "s"),
        cost("step beside one busy process: passive", busy, step[BUSY, PASSIVE], "s"),
        gain("step alone: passive", alone, step[ALONE, PASSIVE], "s"),
        cost("step alone: without", alone, step[ALONE, WITHOUT], "s"),
    ]
    return rows, ratios


def main() -> None:
    parser = command(__doc__, "--steps 1 --rounds 1 --batch_size 2")
    parser.add_argument("--steps", type=positive, default=4, help="that count, of each run")
    parser.add_argument("--rounds", type=positive, default=3, help="of all cases")
    parser.add_argument("--batch_size", type=positive, default=8, help="problems a step")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        run_steps(args.steps, args.batch_size)
    else:
        compare(args)


if __name__ == "__main__":
    with stop_on_user_error("bench/busy.py"):
        main()
