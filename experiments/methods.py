"""methods.py: the paper's table on the toy. Methods x seeds at EQUAL generated tokens, with
intervals and figures.

    python experiments/methods.py --quick     # 3 methods x 3 seeds on one setting: 10 to 20 minutes
    python experiments/methods.py             # 7 methods x 5 seeds on two settings, 6 ablations on
                                              # one: about 3 hours
    python experiments/methods.py --report    # tables and figures again, without running anything

Why equal tokens: a step of GRPO samples twice as much as a step of AttnRL, so a comparison "after
30 steps" means nothing. Every run continues until an evaluation is beyond the budget of generated
tokens T; its accuracy AT T is interpolated linearly between the evaluations before and after T. The
same is done for wall-clock (training without evaluations), at the time in which the fastest run of
the setting reached its end, and for optimizer steps: methods get different numbers of training
sequences from a generated token, and at a constant learning rate more optimizer steps change the
policy more. Evaluations ask every run the same questions with the same seeds.

Intervals: 95 %, Student's t over seeds. Differences are paired by seed (the seed fixes the order of
the problems), so the common effect of the problems cancels: mean and interval of d_s = accuracy of
the method - accuracy of AttnRL at seed s.

Files: results/SETTING/METHOD-SEED.json (settings and the metrics of every step), tables.md,
figures/*.png, and the run folders in runs/experiments/, from which --resume auto continues after a
kill. The two settings were frozen before the methods were compared; experiments/README.md lists all
settings that were tried.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import numpy as np
from matplotlib.figure import Figure

from runtime.cli import Parser, UserError, stop_on_user_error
from tools.view import BLUE, GREEN, PINK, read_metrics

HERE = Path(__file__).resolve().parent

# Common options of all runs, besides the toy preset; in a setting only the method differs.
SHARED = "--lr 2e-5 --eval_every 3 --eval_samples 4 --steps 100000 --keep 1 --log_samples 0"
SETTINGS = {
    "toy8": "--problems toy:8:4000:1 --test_problems toy:8:200:2 --max_response 110",
    "toy8-10": "--problems toy:8-10:4000:1 --test_problems toy:8-10:200:2 --max_response 140",
}
BOTH = ["grpo", "prl", "treerl", "treerl_off", "datpo", "atb", "attnrl"]  # on both settings
ABLATIONS = ["atb_drop_easy", "atb_ads_nofilter", "atb_ads_noexpand"]  # on the last setting
RULES = ["atb_step_entropy", "atb_fixed", "atb_earliest"]  # there, too: atb with another --branch
METHODS = [*BOTH, *ABLATIONS, *RULES]
ORDER = ("grpo", "treerl", "atb", "attnrl")  # in the paper's order, worst first
# Okabe and Ito
DRAWN = {"grpo": "#E69F00", "prl": PINK, "treerl": GREEN, "atb": "#56B4E9", "attnrl": BLUE}
DRAWN |= {"datpo": "#000000"}
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
    "train/ess",
    "initial/spread",
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
    """One run, in this process. It stops after the first evaluation beyond `tokens`; a killed run
    is resumed."""
    from attnrl import parse_config, train

    def enough() -> bool:
        newest = read_metrics(run)[-1]
        return "test_accuracy" in newest and newest["generated_tokens"] >= tokens

    train(parse_config([*options, "--out", str(run), "--resume", "auto"]), stop=enough)


running: list[subprocess.Popen] = []  # ended by an interrupt


def is_there(setting: str, method: str, seed: int, tokens: float, folder: Path) -> bool:
    result = folder / "results" / setting / f"{method}-{seed}.json"
    return result.exists() and json.loads(result.read_text())["tokens"] >= tokens


def run_one(setting: str, method: str, seed: int, tokens: float, folder: Path) -> Path:
    """A run in a separate process, on one thread. Its JSON is written when it is complete; after
    that it is not run again."""
    result = folder / "results" / setting / f"{method}-{seed}.json"
    if is_there(setting, method, seed, tokens, folder):
        return result
    run = HERE.parent / "runs" / "experiments" / folder.name / f"{setting}-{method}-{seed}"
    options = [*SHARED.split(), *SETTINGS[setting].split()]
    if method in RULES:
        method, _, rule = method.partition("_")
        options = ["--branch", rule, *options]
    options = ["--method", method, "--seed", str(seed), *options]
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    if code := train_in_new_process(options, run, tokens, log):
        raise UserError(f"{setting}, {method}, seed {seed}: exit code {code}; see {log}")
    records = [{key: round(m[key], 5) for key in KEPT if key in m} for m in read_metrics(run)]
    found = dict(setting=setting, method=method, seed=seed, tokens=tokens, options=options)
    result.parent.mkdir(parents=True, exist_ok=True)
    fresh = result.with_suffix(".new")
    fresh.write_text(json.dumps(found | {"records": records}) + "\n")
    fresh.replace(result)
    shutil.rmtree(run)  # it is mostly models; the JSON has the rest
    return result


def train_in_new_process(options: list[str], run: Path, tokens: float, log: Path) -> int:
    """Train and return the exit code; the output is appended to `log`."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, "--one", json.dumps([options, str(run), tokens])]
    with log.open("a") as file:
        process = subprocess.Popen(words, cwd=HERE.parent, stdout=file, stderr=file, env=one_thread)
        running.append(process)  # running[-1] may belong to another thread
        return process.wait()


def run_all(wanted: list[tuple[str, str, int]], tokens: float, folder: Path, jobs: int) -> None:
    """Do all runs that are missing, `jobs` at a time. Ctrl-C, SIGTERM or a failed run ends the
    others."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = [what for what in wanted if not is_there(*what, tokens, folder)]
    logs, started = HERE.parent / "runs" / "experiments" / folder.name, time.monotonic()
    print(f"{len(wanted)} runs to do; logs: {logs}/*.log", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(run_one, *what, tokens, folder) for what in wanted]
            for i, future in enumerate(futures, 1):
                path, minutes = future.result(), (time.monotonic() - started) / 60
                left = minutes * (len(wanted) / i - 1)
                print(
                    f"{i}/{len(wanted)} after {minutes:.1f} minutes, about {left:.0f} left: {path}",
                    flush=True,
                )
        except BaseException:  # also a failed run: its message must not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


# --------------------------------------------------------------------------------------------------
# Comparing at equal places
# --------------------------------------------------------------------------------------------------
def along(records: list[dict], axis: str) -> list[float]:
    """For each record, the total up to it: training steps ("step"), generated tokens ("tokens"),
    optimizer steps ("updates"), or seconds of training steps ("seconds": without evaluations,
    saving and loading)."""
    so_far = {"step": "step", "tokens": "generated_tokens"}
    if axis in so_far:
        return [m[so_far[axis]] for m in records]
    of_a_step = {"seconds": "seconds/step", "updates": "train/updates"}[axis]
    return np.cumsum([m.get(of_a_step, 0) for m in records]).tolist()


def accuracy_at(records: list[dict], at: float, axis: str) -> float:
    """Test accuracy in % at the place `at` of `axis` (see `along`), interpolated between the
    evaluations around it."""
    where = along(records, axis)
    points = [(x, 100 * m["test_accuracy"]) for x, m in zip(where, records) if "test_accuracy" in m]
    return float(np.interp(at, *zip(*points)))


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (NaN for a single value)."""
    if len(values) < 2:
        return values[0], math.nan
    return fmean(values), T975[min(len(values) - 1, 10)] * stdev(values) / math.sqrt(len(values))


def load(folder: Path, setting: str) -> dict[str, dict[int, dict]]:
    """{method: {seed: result}}, with the methods in the order of the table."""
    found: dict[str, dict[int, dict]] = {}
    for method in METHODS:
        for path in sorted((folder / "results" / setting).glob(f"{method}-[0-9]*.json")):
            result = json.loads(path.read_text())
            found.setdefault(method, {})[result["seed"]] = result
    return found


class Comparison:
    """The runs of one setting, compared at the same places: at T tokens, at equal time, at equal
    optimizer steps."""

    def __init__(self, runs: dict[str, dict[int, dict]]):
        results = [r for seeds in runs.values() for r in seeds.values()]
        ends = {
            axis: min(along(r["records"], axis)[-1] for r in results)
            for axis in ("seconds", "updates")
        }
        self.runs = runs
        self.places = {"tokens": min(r["tokens"] for r in results)} | ends
        # method -> axis -> {seed: accuracy}
        self.found = {method: self.accuracies(seeds) for method, seeds in runs.items()}

    def accuracies(self, seeds: dict[int, dict]) -> dict[str, dict[int, float]]:
        return {
            axis: {seed: accuracy_at(r["records"], at, axis) for seed, r in seeds.items()}
            for axis, at in self.places.items()
        }

    def difference(self, one: str, other: str, axis: str) -> str:
        """Mean and interval of one method's accuracy minus the other's, paired by seed; "" without
        a common seed."""
        mine, others = self.found[one][axis], self.found[other][axis]
        pairs = [(mine[seed], others[seed]) for seed in mine if seed in others]
        return cell([x - y for x, y in pairs]) if pairs else ""

    def row(self, method: str) -> list[str]:
        records = [r["records"] for r in self.runs[method].values()]
        start = fmean(100 * row[0]["test_accuracy"] for row in records)
        cells = [method, str(len(records)), f"{start:.1f}"]
        compared = method != "attnrl" and "attnrl" in self.runs
        for axis, own in self.found[method].items():
            cells.append(cell(list(own.values())))
            cells.append(self.difference(method, "attnrl", axis) if compared else "")
        for axis in ("step", "updates", "seconds"):
            cells.append(f"{self.until(records, axis):.0f}")
        return cells

    def until(self, runs: list[list[dict]], axis: str) -> float:
        """Mean training steps, optimizer steps or seconds to T tokens."""
        tokens = self.places["tokens"]
        return fmean(np.interp(tokens, along(r, "tokens"), along(r, axis)) for r in runs)


def cell(values: list[float]) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:.1f}" if math.isnan(half) else f"{mean:.1f} ± {half:.1f}"


COLUMNS = (
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


def table(runs: dict[str, dict[int, dict]]) -> str:
    """One row per method: accuracy at equal tokens, seconds and optimizer steps, and the paired
    differences to AttnRL."""
    comparison = Comparison(runs)
    places = comparison.places
    lines = [
        f"T = {places['tokens'] / 1e6:.2f} M generated tokens; equal time:"
        f" {places['seconds']:.0f} s of training; equal optimizer steps: {places['updates']:.0f}.",
        'Test accuracy in %, mean and 95 % interval over seeds; "- attnrl": the difference,'
        " paired by seed.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [f"| {' | '.join(comparison.row(method))} |" for method in runs]
    lines += [
        "",
        "The paper's order, step by step (differences paired by seed):",
        "",
        "| | at T | at equal time | at equal optimizer steps |",
        "|---|---|---|---|",
    ]
    for worse, better in zip(ORDER, ORDER[1:]):
        if worse in runs and better in runs:
            cells = [comparison.difference(better, worse, axis) for axis in places]
            lines.append(f"| {better} - {worse} | {' | '.join(cells)} |")
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
        ("valid_token_ratio", "valid tokens / tokens of all leaves, %", 100),
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


AXES = {
    "step": "training step",
    "tokens": "generated tokens",
    "seconds": "seconds of training",
    "updates": "optimizer steps",
}


def curves(results: list[dict], key: str, scale: float, over: str) -> list[list[tuple]]:
    """The (place, value) points of each run that has the metric."""
    lines = []
    for result in results:
        records = result["records"]
        places = along(records, over)
        lines.append([(x, scale * m[key]) for x, m in zip(places, records) if key in m])
    return [line for line in lines if line]


def draw(axis, runs: dict, key: str, title: str, scale: float, over: str) -> None:
    """Mean over seeds with a 95 % band, on a common grid of steps, tokens or seconds."""
    for method, colour in DRAWN.items():
        lines = curves(list(runs.get(method, {}).values()), key, scale, over)
        if not lines:
            continue
        first, last = max(line[0][0] for line in lines), min(line[-1][0] for line in lines)
        grid = np.linspace(first, last, 60)
        values = np.array([np.interp(grid, *zip(*line)) for line in lines])
        mean, half = np.array([mean_and_interval(list(column)) for column in values.T]).T
        axis.plot(grid, mean, color=colour, label=f"{method} ({len(lines)})")
        axis.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel=AXES[over])
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)


def draw_figures(runs: dict, setting: str, folder: Path) -> None:
    accuracy = ("test_accuracy", "test accuracy (avg@4), %", 100)
    panels = {
        f"accuracy_{setting}": [(*accuracy, over) for over in ("tokens", "seconds", "updates")]
    }
    panels |= {
        f"{name}_{setting}": [(*what, "step") for what in whats] for name, whats in FIGURES.items()
    }
    (folder / "figures").mkdir(exist_ok=True)
    title = f"{setting}: mean over seeds (their number in brackets), band: 95 % interval"
    for name, whats in panels.items():
        figure = Figure(figsize=(4.2 * len(whats), 3.8), layout="constrained")
        axes = figure.subplots(1, len(whats))
        for axis, what in zip(axes, whats):
            draw(axis, runs, *what)
        shown = axes[-1].get_legend_handles_labels()
        place = dict(loc="outside lower center", ncols=len(DRAWN), frameon=False)
        figure.legend(*shown, **place)
        figure.suptitle(title, fontsize=10)
        figure.savefig(folder / "figures" / f"{name}.png", dpi=110)


def report(folder: Path) -> str:
    """Write tables.md and the figures of all existing results."""
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


def parse(argv: list[str]):
    parser = Parser(
        "experiments/methods.py",
        "methods x seeds at equal generated tokens",
        "python experiments/methods.py --quick",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="grpo, treerl, attnrl x 3 seeds on toy8")
    add("--report", action="store_true", help="only tables and figures of the existing results")
    for name, choices in (("settings", SETTINGS), ("methods", METHODS)):
        text = f"default: {', '.join(choices)}"
        add(f"--{name}", nargs="+", choices=choices, metavar="NAME", help=text)
    add("--seeds", type=int, help="how many: 0, 1, ...; default 5, with --quick 3")
    add("--tokens", type=float, default=0.4, help="budget of generated tokens, millions")
    add("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    text = (
        "of results, tables and figures; default experiments/full, with --quick experiments/quick"
    )
    add("--folder", type=Path, help=text)
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.settings = args.settings or (["toy8"] if args.quick else list(SETTINGS))
    args.named = bool(args.methods)
    args.methods = args.methods or (["grpo", "treerl", "attnrl"] if args.quick else METHODS)
    if args.seeds is None:
        args.seeds = 3 if args.quick else 5
    args.folder = args.folder or HERE / ("quick" if args.quick else "full")
    for name in ("seeds", "tokens", "jobs"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be a number above 0")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder = args.folder
    if args.one:
        options, run, tokens = json.loads(args.one)
        train_until(options, Path(run), tokens)
        return
    if not args.report:
        try:
            (folder / "results").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--folder {folder}: cannot be written ({error.strerror})") from error
        # all methods of one seed first: then an interrupted table has all methods
        wanted = [
            (s, m, seed)
            for seed in range(args.seeds)
            for s in args.settings
            for m in args.methods
            if m in BOTH or s == list(SETTINGS)[-1] or args.named
        ]
        run_all(wanted, 1e6 * args.tokens, folder, args.jobs)
    print(f"{report(folder)}\nwritten: {folder / 'tables.md'}, {folder / 'figures'}/*.png")


if __name__ == "__main__":
    with stop_on_user_error("experiments/methods.py"):
        main(sys.argv[1:])
