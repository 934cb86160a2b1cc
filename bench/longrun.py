"""bench/longrun.py: does a long run leak? Measures memory, open files and processes of many toy
steps, from outside.

    python bench/longrun.py                 # 300 steps, about half an hour on one core
    python bench/longrun.py --steps 30

Every step is logged, every tenth evaluated and saved, so that the whole loop is measured. The slope
is that of a least-squares line through the main process's memory (RSS) over the last two thirds of
the steps: before that, caches fill.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import numpy as np

from runtime.cli import Parser, UserError, stop_on_user_error

ROOT = Path(__file__).resolve().parent.parent


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return [pid, *(member for child in children for member in family(child))]


def resident(pid: int) -> float:
    """MiB of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def look(pid: int) -> tuple[float, float, int, int]:
    """MiB of the process, MiB of its children, its open files, number of processes."""
    members = family(pid)
    children = sum(map(resident, members[1:]))
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return resident(pid), children, files, len(members)


def watch(run: subprocess.Popen, log: Path) -> dict[int, tuple]:
    """step -> what was seen when its line in the log was new, until the run ends."""
    seen: dict[int, tuple] = {}
    while run.poll() is None:
        time.sleep(0.5)
        try:
            step = len(log.read_text().splitlines()) - 1 if log.exists() else -1
            if step > 0 and step not in seen:
                seen[step] = look(run.pid)
        except (FileNotFoundError, ProcessLookupError):
            pass  # a process ended while we looked
    return seen


def show(seen: dict[int, tuple], steps: int) -> None:
    print("| step | MiB | MiB of children | open files | processes |\n|---|---|---|---|---|")
    for step, (own, children, files, processes) in seen.items():
        if step in (min(seen), max(seen)) or step % max(1, steps // 10) == 0:
            print(f"| {step} | {own:.0f} | {children:.0f} | {files} | {processes} |")


def main(argv: list[str]) -> None:
    parser = Parser(
        "bench/longrun.py",
        "Memory, open files and processes of a long run on the toy.",
        "python bench/longrun.py --steps 30",
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    steps = parser.parse_args(argv).steps
    if steps < 3:
        raise UserError(f"--steps {steps}: must be at least 3, for a slope")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = ["--steps", str(steps), "--eval_every", "10", "--out", str(out)]
        command, started = [sys.executable, "attnrl.py", *settings], time.monotonic()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as run:
            seen = watch(run, out / "metrics.jsonl")
        if run.returncode:
            raise UserError(f"attnrl.py ended with exit code {run.returncode}")
        minutes = (time.monotonic() - started) / 60
        files = [path for path in Path(folder).rglob("*") if not path.is_symlink()]
        disk = sum(path.stat().st_size for path in files) / 2**20
    show(seen, steps)
    late = [step for step in seen if step > steps / 3]
    slope = np.polyfit(late, [seen[step][0] for step in late], 1)[0]
    print(
        f"\n{steps} steps in {minutes:.1f} minutes; memory over the last two thirds:"
        f" {100 * slope:+.2f} MiB per 100 steps; run folder {disk:.0f} MiB"
    )


if __name__ == "__main__":
    with stop_on_user_error("bench/longrun.py"):
        main(sys.argv[1:])
