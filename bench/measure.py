"""bench/measure.py: the common code of all timings here, and the table of all ratios.

    make bench                      # every script of the Makefile's list, then the table
    python bench/measure.py         # only the table, from results.json

Both sides of a ratio come from one run and take turns, so that other load on the machine affects
both equally; the median counts. A fresh process measures every peak of memory. results.json has the
machine, the versions, both sides of every ratio and the tables they come from, one entry per script
and part.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
import transformers

from runtime.cli import Parser, UserError, stop_on_user_error

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results.json"


def options(**settings) -> list[str]:
    """Settings of a run as its command line has them."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def interleave(cases: dict[str, Callable[[], float | None]], repeats: int) -> dict[str, float]:
    """Median seconds of each case; of a case that returns a number (tokens, say) seconds per unit.
    The first round warms up and is not counted; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name in list(cases)[:: 1 if repeat % 2 else -1]:
            synchronise()
            started = time.perf_counter()
            units = cases[name]()
            synchronise()
            if repeat:
                seconds[name].append((time.perf_counter() - started) / (units or 1))
    return {name: statistics.median(times) for name, times in seconds.items()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def extra_bytes(run: Callable[[], object]) -> int:
    """Peak memory during run(), less what was there before: of the GPU if there is one, else
    resident bytes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak (VmHWM) starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def peak_mib() -> float:
    """Of this process so far, libraries included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_new_process(script: str, *options) -> float | None:
    """The number that the script prints last; None where it died (out of memory)."""
    done = subprocess.run(
        [sys.executable, script, *map(str, options)], capture_output=True, text=True
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def machine() -> dict:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU's name, and how much of it PyTorch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{[*names, platform.machine()][0]}, {threads}"


def positive(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given} is no whole number above 0")
    return int(given)


def command(doc: str | None, example: str) -> Parser:
    """The command line of a script here, with what all of them have."""
    parser = Parser(
        f"bench/{Path(sys.argv[0]).name}",
        doc or "",
        f"python bench/{Path(sys.argv[0]).name} {example}".rstrip(),
    )
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch on a CPU")
    return parser


def gain(
    what: str, ours: float, other: float, unit: str, goal: float | None = None, more: bool = False
) -> dict:
    """A line of the table: how many times less of the unit (seconds, MiB) we need than the other
    side; with `more` (tokens per second) how many times more we get. The goal is the least that
    will do."""
    times = ours / other if more else other / ours
    return {
        "what": what,
        "ours": ours,
        "other": other,
        "unit": unit,
        "ratio": times,
        "is": "gain",
        "goal": goal and f">= {goal}",
        "reached": goal and ("yes" if times >= goal else "no"),
    }


def cost(what: str, ours: float, other: float, unit: str, goal: float | None = None) -> dict:
    """The same for something that has its price: how many times what the other side needs. The goal
    is the most."""
    return {
        "what": what,
        "ours": ours,
        "other": other,
        "unit": unit,
        "ratio": ours / other,
        "is": "cost",
        "goal": goal and f"<= {goal}",
        "reached": goal and ("yes" if ours / other <= goal else "no"),
    }


def share(what: str, ours: float, other: float, goal: float) -> dict:
    """The same for two shares, in %, of which ours should be below the goal."""
    return {
        "what": what,
        "ours": ours,
        "other": other,
        "unit": "%",
        "ratio": None,
        "is": "share",
        "goal": f"< {goal} %",
        "reached": "yes" if ours < goal else "no",
    }


def record(name: str, rows: list[dict], ratios: list[dict]) -> None:
    """Print the rows, and put them and the ratios into results.json under the name; other entries
    stay."""
    print(f"{name}: {machine()['device']}, torch {torch.__version__}")
    show(rows)
    print(f"-> {RESULTS.relative_to(ROOT)}\n", flush=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[name] = {"machine": machine(), "rows": rows, "ratios": ratios}
    fresh = RESULTS.with_suffix(".new")
    fresh.write_text(json.dumps(known, indent=1) + "\n")
    fresh.replace(RESULTS)


def text(value) -> str:
    """A number with three significant digits."""
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def show(rows: list[dict]) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    lines = [names] + [[text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        words = [
            word.rjust(width) if i else word.ljust(width)
            for i, (word, width) in enumerate(zip(line, widths))
        ]
        print("  ".join(words).rstrip())


def markdown() -> str:
    """The README's table: every ratio that has a goal."""
    lines = ["| against | ours | theirs | | goal | reached |", "|---|---|---|---|---|---|"]
    words = {"gain": "{} times better", "cost": "{} times the cost"}
    for part in json.loads(RESULTS.read_text()).values():
        for line in part["ratios"]:
            if line["goal"]:
                ours, theirs = (f"{text(line[side])} {line['unit']}" for side in ("ours", "other"))
                times = words.get(line["is"], "").format(text(line["ratio"]))
                cells = (line["what"], ours, theirs, times, line["goal"], line["reached"])
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser("bench/measure.py", __doc__ or "", "python bench/measure.py --markdown")
    parser.add_argument("--markdown", action="store_true", help="the README's table")
    args = parser.parse_args()
    if not RESULTS.exists():
        raise UserError(f"{RESULTS.name}: is not there; make bench writes it")
    if args.markdown:
        print(markdown())
    else:
        found = json.loads(RESULTS.read_text())
        show([line for part in found.values() for line in part["ratios"]])
        for kind in sorted({json.dumps(part["machine"]) for part in found.values()}):
            print("\n" + ", ".join(f"{name} {value}" for name, value in json.loads(kind).items()))


if __name__ == "__main__":
    with stop_on_user_error("bench/measure.py"):
        main()
