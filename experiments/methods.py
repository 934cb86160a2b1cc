"""methods.py: the paper's table on the toy. Methods x seeds at EQUAL generated tokens, with
intervals and figures.

    python experiments/methods.py --quick            # 3 methods x 3 seeds on one setting: at most
                                                     20 minutes on 2 cores
    python experiments/methods.py                    # 9 methods x 5 seeds on two settings: about 2
                                                     hours; goes on where it was
    python experiments/methods.py --report           # tables and figures of what is there, without
                                                     running anything

Why equal tokens: a step of GRPO samples twice as much as a step of AttnRL, so "after 30 steps"
compares nothing. Every run goes on until an evaluation lies beyond the budget of generated tokens
T; its accuracy AT T is read off the straight line between the evaluations before and after T. The
same is done for wall-clock (training without evaluations), at the time in which the fastest run of
the setting got to its end, and for optimizer steps: methods differ in how many training sequences a
generated token yields, and at a constant learning rate more optimizer steps get farther.
Evaluations ask every run the same questions with the same seeds.

Intervals: 95 %, Student's t over seeds. Differences are paired by seed (the seed fixes the order of
the problems), so what the problems have in common cancels out: mean and interval of d_s = accuracy
of the method - accuracy of AttnRL at seed s.

Files: results/SETTING/METHOD-SEED.json (settings and the metrics of every step), tables.md,
figures/*.png, and the runs themselves in runs/experiments/, which --resume auto goes on with after
a kill. The two settings were frozen before the methods were compared; experiments/README.md lists
all that were tried.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from errors import Parser, UserError, stop_on_user_error  # noqa: E402
from view import BLUE, GREEN, PINK, read_metrics  # noqa: E402

# What all runs of a setting share; the method is the only difference. Toy steps are a line each,
# hence --prl_steps.
SHARED = [
    "--lr",
    "2e-5",
    "--eval_every",
    "3",
    "--eval_samples",
    "4",
    "--prl_steps",
    "blank",
    "--steps",
    "100000",
    "--keep",
    "1",
    "--log_samples",
    "0",
]
SETTINGS = {
    "toy8": [
        "--problems",
        "toy:8:4000:1",
        "--test_problems",
        "toy:8:200:2",
        "--max_response",
        "110",
    ],
    "toy8-10": [
        "--problems",
        "toy:8-10:4000:1",
        "--test_problems",
        "toy:8-10:200:2",
        "--max_response",
        "140",
    ],
}
METHODS = [
    "grpo",
    "prl",
    "treerl",
    "treerl_off",
    "atb",
    "atb_drop_easy",
    "atb_ads_nofilter",
    "atb_ads_noexpand",
    "attnrl",
]
ORDER = ("grpo", "treerl", "atb", "attnrl")  # as the paper finds them, worst first
# Okabe and Ito
DRAWN = {"grpo": "#E69F00", "prl": PINK, "treerl": GREEN, "atb": "#56B4E9", "attnrl": BLUE}
KEPT = [
    "step",
    "generated_tokens",
    "test_accuracy",
    "initial/reward",
    "initial/solve_all",
    "initial/solve_none",
    "initial/valid",
    "problems",
    "filtered_ratio",
    "trees",
    "sequences",
    "valid_token_ratio",
    "response_length",
    "entropy",
    "fci",
    "train/updates",
    "train/grad_norm",
    "train/clip_fraction",
    "seconds/generate",
    "seconds/step",
    "seconds/total",
]
# Student's t, two-sided 95 %, by seeds - 1
T975 = [0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------
def train_until(options: list[str], run: Path, tokens: float) -> None:
    """One run, in this process: stopped after the first evaluation beyond `tokens`; it goes on
    where it was killed."""
    from attnrl import parse_config, train

    def enough() -> bool:
        newest = read_metrics(run)[-1]
        return "test_accuracy" in newest and newest["generated_tokens"] >= tokens

    train(parse_config([*options, "--out", str(run), "--resume", "auto"]), stop=enough)


running: list[subprocess.Popen] = []  # an interrupt ends them


def is_there(setting: str, method: str, seed: int, tokens: float, folder: Path) -> bool:
    result = folder / "results" / setting / f"{method}-{seed}.json"
    return result.exists() and json.loads(result.read_text())["tokens"] >= tokens


def run_one(setting: str, method: str, seed: int, tokens: float, folder: Path) -> Path:
    """A run in a process of its own, on one thread; its JSON is written when it is complete, and
    then it is not run again."""
    result = folder / "results" / setting / f"{method}-{seed}.json"
    if is_there(setting, method, seed, tokens, folder):
        return result
    run = HERE.parent / "runs" / "experiments" / folder.name / f"{setting}-{method}-{seed}"
    options = ["--method", method, "--seed", str(seed), *SHARED, *SETTINGS[setting]]
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("a") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        process = subprocess.Popen(
            [sys.executable, __file__, "--one", json.dumps([options, str(run), tokens])],
            cwd=HERE.parent,
            stdout=log,
            stderr=log,
            env=one_thread,
        )
        running.append(process)  # running[-1] may be the other thread's by now
        code = process.wait()
    if code:
        raise UserError(
            f"{setting}, {method}, seed {seed}: exit code {code}; see {run.with_suffix('.log')}"
        )
    records = [{key: round(m[key], 5) for key in KEPT if key in m} for m in read_metrics(run)]
    result.parent.mkdir(parents=True, exist_ok=True)
    fresh = result.with_suffix(".new")
    fresh.write_text(
        json.dumps(
            {
                "setting": setting,
                "method": method,
                "seed": seed,
                "tokens": tokens,
                "options": options,
                "records": records,
            }
        )
        + "\n"
    )
    fresh.replace(result)
    shutil.rmtree(run)  # models: what is needed is in the JSON
    return result


def run_all(wanted: list[tuple[str, str, int]], tokens: float, folder: Path, jobs: int) -> None:
    """Those that are not there yet, `jobs` at a time. Ctrl-C, SIGTERM and a run that fails end the
    others."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted, started = (
        [what for what in wanted if not is_there(*what, tokens, folder)],
        time.monotonic(),
    )
    print(
        f"{len(wanted)} runs to do; logs:"
        f" {HERE.parent / 'runs' / 'experiments' / folder.name}/*.log",
        flush=True,
    )
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(run_one, *what, tokens, folder) for what in wanted]
            for i, future in enumerate(futures, 1):
                path, minutes = future.result(), (time.monotonic() - started) / 60
                print(
                    f"{i}/{len(wanted)} after {minutes:.1f} minutes, about"
                    f" {minutes * (len(wanted) / i - 1):.0f} left: {path}",
                    flush=True,
                )
        except BaseException:  # also a run that failed: what it says must not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


# --------------------------------------------------------------------------------------------------
# Reading off
# --------------------------------------------------------------------------------------------------
def along(records: list[dict], axis: str) -> list[float]:
    """Of each record, what there was up to it: training steps ("step"), generated tokens
    ("tokens"), optimizer steps ("updates"), or seconds of training steps ("seconds": without
    evaluations, saving and loading)."""
    if axis in ("step", "tokens"):
        return [m["step" if axis == "step" else "generated_tokens"] for m in records]
    return np.cumsum(
        [m.get({"seconds": "seconds/step", "updates": "train/updates"}[axis], 0) for m in records]
    ).tolist()


def accuracy_at(records: list[dict], at: float, axis: str) -> float:
    """Test accuracy in % where `axis` (see `along`) is `at`, on the line between the evaluations
    around it."""
    where = along(records, axis)
    points = [(x, 100 * m["test_accuracy"]) for x, m in zip(where, records) if "test_accuracy" in m]
    return float(np.interp(at, *zip(*points)))


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (NaN for a single value)."""
    if len(values) < 2:
        return values[0], math.nan
    return fmean(values), T975[min(len(values) - 1, 10)] * stdev(values) / math.sqrt(len(values))


def load(folder: Path, setting: str) -> dict[str, dict[int, dict]]:
    """{method: {seed: result}}, methods in the table's order."""
    found: dict[str, dict[int, dict]] = {}
    for method in METHODS:
        for path in sorted((folder / "results" / setting).glob(f"{method}-[0-9]*.json")):
            result = json.loads(path.read_text())
            found.setdefault(method, {})[result["seed"]] = result
    return found


def table(runs: dict[str, dict[int, dict]]) -> str:
    """One row per method: accuracy at equal tokens, seconds and optimizer steps, and the paired
    differences to AttnRL."""
    everything = [r for seeds in runs.values() for r in seeds.values()]
    tokens = min(r["tokens"] for r in everything)
    seconds, updates = (
        min(along(r["records"], axis)[-1] for r in everything) for axis in ("seconds", "updates")
    )
    columns = (
        "method",
        "seeds",
        "at the start",
        "at T",
        "- attnrl",
        "at equal time",
        "- attnrl",
        "at equal optimizer steps",
        "- attnrl",
        "training steps to T",
        "optimizer steps to T",
        "seconds to T",
    )
    lines = [
        (
            f"T = {tokens / 1e6:.2f} M generated tokens; equal time: {seconds:.0f} s of training;"
            f" equal optimizer steps: {updates:.0f}."
        ),
        (
            'Test accuracy in %, mean and 95 % interval over seeds; "- attnrl": the difference,'
            " paired by seed."
        ),
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]

    def cell(values):
        mean, half = mean_and_interval(values)
        return f"{mean:.1f}" + (f" ± {half:.1f}" if half == half else "")

    places = (("tokens", tokens), ("seconds", seconds), ("updates", updates))
    found = {
        method: [
            {seed: accuracy_at(r["records"], at, axis) for seed, r in seeds.items()}
            for axis, at in places
        ]
        # method -> at equal tokens, seconds, updates -> {seed: accuracy}
        for method, seeds in runs.items()
    }

    def difference(one: str, other: str, place: int) -> str:
        pairs = [
            (found[one][place][s], found[other][place][s])
            for s in found[one][place]
            if s in found[other][place]
        ]
        return cell([x - y for x, y in pairs]) if pairs else ""

    for method, seeds in runs.items():
        columns = []
        for place, own in enumerate(found[method]):
            compared = method != "attnrl" and "attnrl" in runs
            columns += [
                cell(list(own.values())),
                difference(method, "attnrl", place) if compared else "",
            ]
        rows = [r["records"] for r in seeds.values()]
        until = [
            fmean(np.interp(tokens, along(row, "tokens"), along(row, axis)) for row in rows)
            for axis in ("step", "updates", "seconds")
        ]
        start = fmean(100 * row[0]["test_accuracy"] for row in rows)
        lines.append(
            f"| {method} | {len(seeds)} | {start:.1f} | {' | '.join(columns)} | "
            + " | ".join(f"{x:.0f}" for x in until)
            + " |"
        )
    lines += [
        "",
        "The paper's order, step by step (differences paired by seed):",
        "",
        "| | at T | at equal time | at equal optimizer steps |",
        "|---|---|---|---|",
    ]
    for worse, better in zip(ORDER, ORDER[1:]):
        if worse in runs and better in runs:
            lines.append(
                f"| {better} - {worse} |"
                f" {' | '.join(difference(better, worse, place) for place in range(3))} |"
            )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------
FIGURES = {  # file: [(key, title, scale)], over training steps
    "fig6_outcomes": [
        ("initial/solve_all", "all initial responses right, %", 100),
        ("initial/solve_none", "all wrong, %", 100),
        ("initial/valid", "mixed: these can teach, %", 100),
    ],
    "fig7_sampling": [
        ("valid_token_ratio", "trained tokens / tokens of all leaves, %", 100),
        ("filtered_ratio", "problems that the filter kept from expansion, %", 100),
        ("problems", "prompt batch size", 1),
    ],
    "fig8_training": [
        ("entropy", "entropy, nats a token", 1),
        ("initial/reward", "reward of initial responses", 1),
        ("test_accuracy", "test accuracy, %", 100),
        ("response_length", "response length, tokens", 1),
    ],
}


def draw(axis, runs: dict, key: str, title: str, scale: float, over: str) -> None:
    """Mean over seeds with a 95 % band, on a common grid of steps, tokens or seconds."""
    for method, colour in DRAWN.items():
        lines = []
        for result in runs.get(method, {}).values():
            records = result["records"]
            lines.append(
                [(x, scale * m[key]) for x, m in zip(along(records, over), records) if key in m]
            )
        if lines := [line for line in lines if line]:
            grid = np.linspace(
                max(line[0][0] for line in lines), min(line[-1][0] for line in lines), 60
            )
            values = np.array([np.interp(grid, *zip(*line)) for line in lines])
            spread = [mean_and_interval(list(column)) for column in values.T]
            axis.plot(
                grid, [mean for mean, _ in spread], color=colour, label=f"{method} ({len(lines)})"
            )
            axis.fill_between(
                grid,
                [m - h for m, h in spread],
                [m + h for m, h in spread],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    names = {
        "step": "training step",
        "tokens": "generated tokens",
        "seconds": "seconds of training",
        "updates": "optimizer steps",
    }
    axis.set(title=title, xlabel=names[over])
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)


def draw_figures(runs: dict, setting: str, folder: Path) -> None:
    panels = {
        f"accuracy_{setting}": [
            ("test_accuracy", "test accuracy (avg@4), %", 100, over)
            for over in ("tokens", "seconds", "updates")
        ]
    }
    panels |= {
        f"{name}_{setting}": [(*what, "step") for what in whats] for name, whats in FIGURES.items()
    }
    (folder / "figures").mkdir(exist_ok=True)
    for name, whats in panels.items():
        figure = Figure(figsize=(4.2 * len(whats), 3.8), layout="constrained")
        axes = figure.subplots(1, len(whats))
        for axis, what in zip(axes, whats):
            draw(axis, runs, *what)
        figure.legend(
            *axes[-1].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(DRAWN),
            frameon=False,
        )
        figure.suptitle(
            f"{setting}: mean over seeds (their number in brackets), band: 95 % interval",
            fontsize=10,
        )
        figure.savefig(folder / "figures" / f"{name}.png", dpi=110)


def report(folder: Path) -> str:
    """tables.md and the figures, of whatever results there are."""
    parts = []
    for setting in SETTINGS:
        if runs := load(folder, setting):
            parts.append(f"### {setting}\n\n{table(runs)}\n")
            draw_figures(runs, setting, folder)
    if not parts:
        raise UserError(f"{folder / 'results'}: no results in it yet")
    text = "\n".join(parts)
    (folder / "tables.md").write_text(text)
    return text


def main(argv: list[str]) -> None:
    parser = Parser(
        "experiments/methods.py",
        "methods x seeds at equal generated tokens",
        "python experiments/methods.py --quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="grpo, treerl, attnrl x 3 seeds on toy8"
    )
    parser.add_argument("--report", action="store_true", help="tables and figures of what is there")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        metavar="NAME",
        help=f"default: {', '.join(SETTINGS)}",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        help=f"default: {', '.join(METHODS)}",
    )
    parser.add_argument("--seeds", type=int, help="how many: 0, 1, ...; default 5, with --quick 3")
    parser.add_argument(
        "--tokens", type=float, default=0.4, help="budget of generated tokens, millions"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument(
        "--folder",
        type=Path,
        help=(
            "of results, tables and figures; default experiments/full, with --quick"
            " experiments/quick"
        ),
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        options, run, tokens = json.loads(args.one)
        return train_until(options, Path(run), tokens)
    settings = args.settings or (["toy8"] if args.quick else list(SETTINGS))
    methods = args.methods or (["grpo", "treerl", "attnrl"] if args.quick else METHODS)
    seeds = (3 if args.quick else 5) if args.seeds is None else args.seeds
    folder = args.folder or HERE / ("quick" if args.quick else "full")
    for name, value in (("seeds", seeds), ("tokens", args.tokens), ("jobs", args.jobs)):
        if not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be a number above 0")
    if not args.report:
        try:
            (folder / "results").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--folder {folder}: cannot be written ({error.strerror})") from error
        # seeds first: a table that is cut short has all methods
        run_all(
            [(s, m, seed) for seed in range(seeds) for s in settings for m in methods],
            1e6 * args.tokens,
            folder,
            args.jobs,
        )
    print(f"{report(folder)}\nwritten: {folder / 'tables.md'}, {folder / 'figures'}/*.png")


if __name__ == "__main__":
    with stop_on_user_error("experiments/methods.py"):
        main(sys.argv[1:])
