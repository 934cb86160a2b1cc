"""view.py: look at runs. The explorer of a run, its curves, and a table of several runs.

    python -m tools.view runs/NAME                    # its explorer.html and curves.png
    python -m tools.view runs/NAME --steps 10 20 30   # an explorer of these steps
    python -m tools.view runs/A runs/B runs/C         # the same for each, and one table
    python -m tools.view --plots runs/A runs/B        # side by side: runs/compare.png and .svg

The explorer is one HTML file that needs no network. It shows the trees of the logged problems step
by step, with FCI, branch points and why they were chosen, values, advantages, and every token's
log-prob and entropy. view.html is the template of the page.
"""

import runtime  # isort: split

import json
import math
import re
import sys
from itertools import accumulate
from pathlib import Path
from statistics import fmean

# not pyplot: it only writes files, so it needs no screen
from matplotlib.figure import Figure

from runtime.cli import Parser, UserError, first_line, reason, stop_on_user_error
from tree import fci_threshold

# Okabe and Ito's palette: colour-blind readers can tell these colours apart
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#E69F00", "#000000", GREY)
PERCENT = (-3, 103)  # of axes: 0 to 100 %, and room for a line at either end
SHORT_RUN = 12  # runs of at most so many steps get a mark per step
TOKEN_UNITS = ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"), (1, ""))
TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
PHASES = {  # of a step: colour, and what it is called in a picture
    "generate": (BLUE, "generate"),
    "score": (ORANGE, "score"),
    "grade": (PINK, "grade"),
    "exchange": (GREY, "exchange between ranks"),
    "train": (GREEN, "train"),
    "sync": ("#56B4E9", "new weights to the engine"),
}


def read_metrics(run: Path) -> list[dict]:
    """The run's metrics, one dict per step; step 0 is the evaluation before training. Raises
    UserError."""
    path, records = run / "metrics.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({reason(error)}); give the folder of a run"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            wrong = [
                key
                for key in ("step", "generated_tokens", "test_accuracy", "seconds/total")
                if not isinstance(
                    records[-1].get(key, 0 if key == "test_accuracy" else None), (int, float)
                )
            ]
        except (ValueError, RecursionError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: not a step's metrics ({first_line(error)}); if the run was"
                " killed, remove the incomplete last line"
            ) from error
        if wrong:
            raise UserError(f"{path}, line {number}: no number in the field {wrong[0]}")
    return records


def whole_steps(axis) -> None:
    """Training steps are whole numbers on the axis, even if there is only one step."""
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    low, high = axis.get_xlim()
    if high - low < 1:
        axis.set_xlim(round(low) - 0.5, round(low) + 0.5)


def draw_curves(run: Path) -> Path:
    """Four panels over training steps: accuracy, what sampling yields, the update, where the time
    goes."""
    records = read_metrics(run)
    steps = [m for m in records if m["step"] > 0]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    short = len(steps) <= SHORT_RUN

    def plot(axis, key, label, colour, style="-", scale=1.0):
        rows = [m for m in records if key in m]
        axis.plot(
            [m["step"] for m in rows],
            [scale * m[key] for m in rows],
            style,
            color=colour,
            label=label,
            marker="o" if short or key == "test_accuracy" else None,
            ms=4,
        )

    accuracy, sampling, update, seconds = axes.flat
    plot(accuracy, "test_accuracy", "test accuracy (avg@k)", BLUE, scale=100)
    plot(accuracy, "initial/reward", "reward of initial responses", ORANGE, "--", 100)
    if any(m.get("mc/reward") for m in steps):  # else the method has no tree
        plot(accuracy, "mc/reward", "reward of continuations", GREEN, ":", 100)
    accuracy.set(title="Accuracy", ylabel="%", ylim=PERCENT)
    plot(sampling, "initial/valid", "problems with mixed initial responses", BLUE, scale=100)
    plot(sampling, "initial/solve_all", "all right", GREEN, "--", 100)
    plot(sampling, "initial/solve_none", "all wrong", ORANGE, ":", 100)
    plot(sampling, "filtered_ratio", "filtered", PINK, "-.", 100)
    plot(sampling, "valid_token_ratio", "tokens with an advantage / of all leaves", GREY, scale=100)
    sampling.set(title="Sampling", ylabel="%", ylim=PERCENT)
    plot(update, "entropy", "entropy (nats)", BLUE)
    plot(update, "train/grad_norm", "gradient norm", ORANGE, "--")
    plot(update, "train/clip_fraction", "share of clipped tokens", GREEN, ":")
    if any(m.get("train/kl") for m in steps):  # 0 throughout: no reference model was kept
        plot(update, "train/kl", "KL to the initial policy (nats)", PINK, "-.")
    update.set(title="Update", ylim=(0, None))
    low = [0.0] * len(steps)
    for name, (colour, label) in PHASES.items():
        spent = [m.get(f"seconds/{name}", 0.0) for m in steps]
        numbers, high = [m["step"] for m in steps], [a + b for a, b in zip(low, spent)]
        if short:  # an area with one step would have no width
            seconds.bar(numbers, spent, 0.6, low, color=colour, label=label, alpha=0.8)
        else:
            seconds.fill_between(numbers, low, high, color=colour, label=label, alpha=0.8, lw=0)
        low = high
    seconds.set(title="Time per step", ylabel="seconds")
    for axis in axes.flat:
        axis.set_xlabel("training step")
        whole_steps(axis)
        axis.grid(alpha=0.3)
        # never over a line
        axis.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, frameon=False
        )
    figure.suptitle(run.resolve().name)
    try:
        figure.savefig(run / "curves.png", dpi=110)
    except OSError as error:
        raise UserError(f"{run / 'curves.png'}: cannot be written ({error.strerror})") from error
    return run / "curves.png"


def add_costs(runs: list[list[dict]]) -> dict[str, str]:
    """Add to every record "tokens" and "time": what the run has used so far, in units that suit the
    longest run. Returns the labels of the two axes."""
    seconds = [[0.0, *accumulate(m.get("seconds/step", 0.0) for m in run)][1:] for run in runs]
    most = max(m["generated_tokens"] for run in runs for m in run)
    longest = max(max(spent, default=0.0) for spent in seconds)
    size, tokens = next((x for x in TOKEN_UNITS if most >= x[0]), TOKEN_UNITS[-1])
    length, time = next((x for x in TIME_UNITS if longest >= 2 * x[0]), TIME_UNITS[-1])
    for run, spent in zip(runs, seconds):
        for m, until in zip(run, spent):
            m |= {"tokens": m["generated_tokens"] / size, "time": until / length}
    return {"tokens": f"generated tokens{tokens}", "time": f"{time} of training"}


def draw_comparison(runs: list[Path], path: Path) -> list[Path]:
    """Runs side by side, as PNG and SVG: accuracy against tokens and against time, what sampling
    yields, where the time goes. Lines differ in colour and dashes, so that they can also be told
    apart in print. Time is that of training, without evaluations. Raises UserError."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    panels = [
        ("test_accuracy", "test accuracy by tokens, %", "tokens"),
        ("test_accuracy", "test accuracy by time, %", "time"),
        ("initial/valid", "problems with mixed initial responses, %", "step"),
        ("filtered_ratio", "problems that the filter kept from expansion, %", "step"),
        ("valid_token_ratio", "valid tokens / tokens of all leaves, %", "step"),
    ]
    everything = [read_metrics(run) for run in runs]
    labels = {"step": "training step"} | add_costs(everything)
    split = axes.flat[5]
    for n, (run, records) in enumerate(zip(runs, everything)):
        for axis, (key, title, over) in zip(axes.flat, panels):
            rows = [m for m in records if key in m]
            axis.plot(
                [m[over] for m in rows],
                [100 * m[key] for m in rows],
                color=PALETTE[n % len(PALETTE)],
                label=run.resolve().name,
                linestyle=("-", "--", "-.", ":")[n % 4],
                ms=5 - n % 4 / 2,  # where lines overlap, the lower ones can still be seen
                marker="osD^"[n % 4] if key == "test_accuracy" or len(rows) <= SHORT_RUN else None,
            )
            axis.set(xlabel=labels[over], ylim=PERCENT)
            axis.set_title(title, fontsize=11)
            axis.locator_params(axis="x", nbins=6)
        low, steps = 0.0, [m for m in records if "seconds/step" in m]
        for phase, (colour, label) in PHASES.items():
            seconds = fmean(m.get(f"seconds/{phase}", 0.0) for m in steps) if steps else 0.0
            split.bar(
                n, seconds, bottom=low, color=colour, label=label if n == 0 else None, width=0.6
            )
            low += seconds
    split.set(ylabel="seconds")
    split.set_title("seconds a training step, by phase (mean)", fontsize=11)
    split.set_xticks(
        range(len(runs)), [run.resolve().name for run in runs], rotation=30 if len(runs) > 3 else 0
    )
    split.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    for axis in axes.flat[:5]:
        axis.grid(alpha=0.3)
    for axis in axes.flat[2:5]:
        whole_steps(axis)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(runs)),
        frameon=False,
    )
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    try:
        for one in paths:
            figure.savefig(one, dpi=120)
    except OSError as error:
        raise UserError(f"{one}: cannot be written ({error.strerror})") from error
    return paths


def runs_table(runs: list[Path]) -> str:
    """Test accuracy (avg@k, in %) before training, at its best and at the end, and the means over
    the runs."""
    rows = []
    for run in runs:
        records = read_metrics(run)
        tested = [100 * m["test_accuracy"] for m in records if "test_accuracy" in m]
        if not tested:
            raise UserError(f"{run / 'metrics.jsonl'}: no test_accuracy in it")
        rows.append(
            [
                tested[0],
                max(tested),
                tested[-1],
                tested[-1] - tested[0],
                tested[-1] - max(tested),
                records[-1]["generated_tokens"] / 1e6,
                records[-1]["seconds/total"] / 60,
            ]
        )
    lines = [
        "| run | before | best | end | gain | end - best | M tokens | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if len(rows) > 1:
        rows.append([fmean(column) for column in zip(*rows)])
    for name, row in zip([*(run.resolve().name for run in runs), "mean"], rows):
        lines.append(
            f"| {name} | "
            + " | ".join(f"{value:.1f}" for value in row[:5])
            + f" | {row[5]:.2f} | {row[6]:.1f} |"
        )
    return "\n".join(lines)


def print_run(run: Path | None) -> None:
    """Print the end of a run. None: another rank has the folder."""
    if run:
        files = "(explorer.html, curves.png, metrics.jsonl, last/, best/)"
        print(f"\n{runs_table([run])}\n\nrun folder: {run} {files}")


# --------------------------------------------------------------------------------------------------
# The explorer
# --------------------------------------------------------------------------------------------------
PAGE_BYTES = 2_500_000  # of trees in one page, so that it opens fast and can be sent by mail


def find_steps(path: Path) -> dict[int, list[tuple[int, int, int]]]:
    """{step: (line number, offset, bytes) of its records} of batches.jsonl or samples.jsonl,
    without parsing them: a long run logs gigabytes. Raises UserError."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                step = re.match(rb'{"step": (\d{1,9}),', line)
                if not step:
                    raise UserError(
                        f"{path}, line {number}: not a step's record; if the run was killed, remove"
                        " the incomplete last line"
                    )
                found.setdefault(int(step[1]), []).append((number, offset, len(line)))
                offset += len(line)
    except FileNotFoundError:
        raise UserError(
            f"{path}: does not exist; an explorer needs a run of this version of attnrl"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return found


def read_steps(path: Path, places: list[tuple[int, int, int]]) -> list[dict]:
    """The records at these places. Raises UserError."""
    records = []
    with path.open("rb") as file:
        for number, offset, size in places:
            file.seek(offset)
            try:
                records.append(json.loads(file.read(size)))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not a step's record ({first_line(error)}); if the run"
                    " was killed, remove the incomplete last line"
                ) from error
    return records


def page_json(data: dict) -> str:
    """JSON that a browser can read. Python writes NaN and Infinity, which are not JSON, and a page
    with one of them would stay empty. They become null, which the page shows as a dash."""
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
        return json.dumps(finite, separators=(",", ":"))


def write_explorer(run: Path, wanted: list[int] | None = None) -> Path:
    """Write runs/NAME/explorer.html. wanted: the training steps to show; None: as many as fit into
    PAGE_BYTES, evenly spread."""
    metrics = {m["step"]: m for m in read_metrics(run)}
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        page = (Path(__file__).parent / "view.html").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{getattr(error, 'filename', None) or run / 'config.json'}: cannot be read"
            f" ({reason(error)})"
        ) from error
    batches = find_steps(run / "batches.jsonl")
    # --log_samples 0
    samples = find_steps(run / "samples.jsonl") if (run / "samples.jsonl").exists() else {}
    every = sorted(batches.keys() & metrics.keys())
    if not every:
        raise UserError(f"{run / 'batches.jsonl'}: no training step in it yet")
    if missing := sorted(set(wanted or []) - set(every)):
        raise UserError(
            f"--steps {missing[0]}: {run} has no such step (it has {every[0]} to {every[-1]})"
        )
    steps, sizes = (
        sorted(set(wanted or every)),
        {step: sum(size for *_, size in samples.get(step, [])) for step in every},
    )
    if not wanted and sum(sizes.values()) > PAGE_BYTES:
        count = max(1, len(every) * PAGE_BYTES // sum(sizes.values()))
        steps = sorted(
            {every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)}
        )
        # steps differ in size
        while len(steps) > 1 and sum(sizes[step] for step in steps) > PAGE_BYTES:
            steps.remove(max(steps, key=sizes.__getitem__))
    shown = [
        read_steps(run / "batches.jsonl", batches[step])[-1]
        | {"samples": read_steps(run / "samples.jsonl", samples.get(step, [])) if samples else []}
        for step in steps
    ]
    for response in (
        r for step in shown for sample in step["samples"] for r in sample["responses"]
    ):
        # Eq. 7 compares the scores with it
        threshold = fci_threshold(response["fci"], config["rho"])
        response["threshold"] = threshold if math.isfinite(threshold) else None
    data = {
        "name": run.resolve().name,
        "config": config,
        "metrics": metrics,
        "total_steps": len(every),
        "steps": shown,
    }
    # so that no text of a run can end the script element
    text = page_json(data).replace("<", "\\u003c")
    path = run / "explorer.html"
    try:
        path.write_text(page.replace("DATA</", text + "</", 1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def main(argv: list[str]) -> None:
    parser = Parser(
        "-m tools.view",
        "The explorer, the curves and a table of runs.",
        "python -m tools.view runs/A runs/B",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="runs/NAME")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        help="training steps in the explorer; default: as many as fit",
    )
    parser.add_argument(
        "--plots",
        action="store_true",
        help="compare the runs in one figure (PNG and SVG), beside the first one",
    )
    args = parser.parse_args(argv)
    if args.plots and args.steps:
        raise UserError("--steps: is for the explorer, not for --plots")
    # a run that is given twice must not count twice in the means
    args.runs = list(dict.fromkeys(args.runs))
    print(runs_table(args.runs))
    if args.plots:
        print(*draw_comparison(args.runs, args.runs[0].resolve().parent / "compare"), sep="\n")
    for run in args.runs if not args.plots else ():
        print(draw_curves(run))
        print(write_explorer(run, args.steps))


if __name__ == "__main__":
    with stop_on_user_error("tools.view"):
        main(sys.argv[1:])
