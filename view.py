"""view.py: look at runs. The explorer of a run, its curves, and a table of several runs.

    python view.py runs/NAME                      # runs/NAME/explorer.html and curves.png, from
                                                  what the run has logged
    python view.py runs/NAME --steps 10 20 30     # these training steps in the explorer, instead of
                                                  as many as fit
    python view.py runs/A runs/B runs/C           # the same for each, and one table
    python view.py --plots runs/A runs/B          # the runs side by side: runs/compare.png and .svg

The explorer is one HTML file without a network: the trees of the logged problems step by step, with
FCI, branch points and why they were chosen, values, advantages, and every token's log-prob and
entropy. The page itself is view.html.

Also here: what `python fci.py` prints and draws, the FCI of one response; and `python eval.py
--ask`, an answer as it comes.
"""

import json
import math
import random
import re
import sys
from pathlib import Path
from statistics import fmean

# not pyplot: files, no windows, also on a machine without a screen
from matplotlib.figure import Figure

from data import Problem, encode_question
from errors import Parser, UserError, first_line, plain, reason, stop_on_user_error
from tree import fci_threshold

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#E69F00", "#000000", GREY)
PHASES = {
    "generate": BLUE,
    "score": ORANGE,
    "grade": PINK,
    "exchange": GREY,
    "train": GREEN,
    "sync": "#56B4E9",
}


def read_metrics(run: Path) -> list[dict]:
    """The run's metrics, one dict a step; step 0 is the evaluation before training. Raises
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
                f"{path}, line {number}: not a step's metrics ({first_line(error)}); a run that was"
                " killed: remove half a last line"
            ) from error
        if wrong:
            raise UserError(f"{path}, line {number}: no number in the field {wrong[0]}")
    return records


def draw_curves(run: Path) -> Path:
    """Four panels over training steps: accuracy, what sampling yields, the update, where the time
    goes."""
    records = read_metrics(run)
    steps = [m for m in records if m["step"] > 0]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)

    def plot(axis, key, label, colour, style="-", scale=1.0):
        rows = [m for m in records if key in m]
        axis.plot(
            [m["step"] for m in rows],
            [scale * m[key] for m in rows],
            style,
            color=colour,
            label=label,
        )

    accuracy, sampling, update, seconds = axes.flat
    plot(accuracy, "test_accuracy", "test accuracy (avg@k)", BLUE, "o-", 100)
    plot(accuracy, "initial/reward", "reward of initial responses", ORANGE, "--", 100)
    if any(m.get("mc/reward") for m in steps):  # else there were none: a method without a tree
        plot(accuracy, "mc/reward", "reward of continuations", GREEN, ":", 100)
    accuracy.set(title="Accuracy", ylabel="%")
    plot(sampling, "initial/valid", "problems with mixed initial responses", BLUE, scale=100)
    plot(sampling, "initial/solve_all", "all right", GREEN, "--", 100)
    plot(sampling, "initial/solve_none", "all wrong", ORANGE, ":", 100)
    plot(sampling, "filtered_ratio", "filtered", PINK, "-.", 100)
    plot(sampling, "valid_token_ratio", "trained tokens / tokens of all leaves", GREY, scale=100)
    sampling.set(title="Sampling", ylabel="%", ylim=(-3, 103))
    plot(update, "entropy", "entropy (nats)", BLUE)
    plot(update, "train/grad_norm", "gradient norm", ORANGE, "--")
    plot(update, "train/clip_fraction", "share of clipped tokens", GREEN, ":")
    if any(m.get("train/kl") for m in steps):  # 0 throughout: no reference model was kept
        plot(update, "train/kl", "KL to the initial policy (nats)", PINK, "-.")
    update.set(title="Update", ylim=(0, None))
    seconds.stackplot(
        [m["step"] for m in steps],
        [[m.get(f"seconds/{name}", 0) for m in steps] for name in PHASES],
        labels=list(PHASES),
        colors=list(PHASES.values()),
        alpha=0.8,
    )
    seconds.set(title="Time per step", ylabel="seconds")
    for axis in axes.flat:
        axis.set_xlabel("training step")
        axis.xaxis.get_major_locator().set_params(integer=True)
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


def draw_comparison(runs: list[Path], path: Path) -> list[Path]:
    """Runs side by side, as PNG and SVG: accuracy against tokens and against time, what sampling
    yields, where the time goes. Lines differ in colour and dashes, so that they can also be told
    apart in print. Time is that of training, without evaluations. Raises UserError."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    panels = [
        ("test_accuracy", "test accuracy by tokens, %", "tokens"),
        ("test_accuracy", "test accuracy by time, %", "minutes"),
        ("initial/valid", "problems with mixed initial responses, %", "step"),
        ("filtered_ratio", "problems that the filter kept from expansion, %", "step"),
        ("valid_token_ratio", "trained tokens / tokens of all leaves, %", "step"),
    ]
    labels = {
        "tokens": "generated tokens, millions",
        "minutes": "minutes of training",
        "step": "training step",
    }
    split = axes.flat[5]
    for n, run in enumerate(runs):
        records, spent = read_metrics(run), 0.0
        for m in records:
            spent += m.get("seconds/step", 0.0) / 60
            m |= {"tokens": m["generated_tokens"] / 1e6, "minutes": spent}
        for axis, (key, title, over) in zip(axes.flat, panels):
            rows = [m for m in records if key in m]
            axis.plot(
                [m[over] for m in rows],
                [100 * m[key] for m in rows],
                color=PALETTE[n % len(PALETTE)],
                label=run.resolve().name,
                linestyle=("-", "--", "-.", ":")[n % 4],
                ms=4,
                marker="o" if key == "test_accuracy" else None,
            )
            axis.set(title=title, xlabel=labels[over])
            if over == "step":
                axis.xaxis.get_major_locator().set_params(integer=True)
        low, steps = 0.0, [m for m in records if "seconds/step" in m]
        for phase, colour in PHASES.items():
            seconds = fmean(m.get(f"seconds/{phase}", 0.0) for m in steps) if steps else 0.0
            split.bar(
                n, seconds, bottom=low, color=colour, label=phase if n == 0 else None, width=0.6
            )
            low += seconds
    split.set(title="seconds a training step, by phase (mean)", ylabel="seconds")
    split.set_xticks(
        range(len(runs)), [run.resolve().name for run in runs], rotation=30 if len(runs) > 3 else 0
    )
    split.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    for axis in axes.flat[:5]:
        axis.grid(alpha=0.3)
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


def table(runs: list[Path]) -> str:
    """Test accuracy (avg@k, in %) before training, at its best and at the end, with the means over
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


# --------------------------------------------------------------------------------------------------
# The explorer
# --------------------------------------------------------------------------------------------------
PAGE_BYTES = 2_500_000  # of trees in one page, so that it opens at once and can be sent to somebody


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
                        f"{path}, line {number}: not a step's record; a run that was killed: remove"
                        " half a last line"
                    )
                found.setdefault(int(step[1]), []).append((number, offset, len(line)))
                offset += len(line)
    except FileNotFoundError:
        raise UserError(
            f"{path}: not there; an explorer needs a run of this version of attnrl"
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
                    f"{path}, line {number}: not a step's record ({first_line(error)}); a run that"
                    " was killed: remove half a last line"
                ) from error
    return records


def write_explorer(run: Path, wanted: list[int] | None = None) -> Path:
    """runs/NAME/explorer.html. Steps: those that are asked for; else as many as fit into
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
        # what Eq. 7 compared its scores with
        threshold = fci_threshold(response["fci"], config["rho"])
        response["threshold"] = threshold if math.isfinite(threshold) else None
    data = {
        "name": run.resolve().name,
        "config": config,
        "metrics": metrics,
        "total_steps": len(every),
        "steps": shown,
    }
    # no text of a run can end the script element
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    path = run / "explorer.html"
    try:
        path.write_text(page.replace("DATA</", text + "</", 1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


# --------------------------------------------------------------------------------------------------
# `python fci.py`: the scores of one response
# --------------------------------------------------------------------------------------------------
def plot_scores(path: str, fci: list[float], chosen: list[int], labels: list[str]) -> None:
    """The FCI curve of one response with its branch points."""
    figure = Figure(figsize=(max(6, min(16, 0.5 * len(fci))), 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(len(fci)), fci, "o-", color=BLUE, label="FCI")
    axis.plot(
        chosen,
        [fci[k] for k in chosen],
        "D",
        ms=11,
        mfc="none",
        mew=2,
        color=ORANGE,
        label="branch points",
    )
    axis.set(
        xlabel="step",
        ylabel="FCI (attention mass from later steps)",
        title="Forward Context Influence",
    )
    if len(labels) <= 40:  # longer responses: step numbers only
        axis.set_xticks(
            range(len(labels)),
            [f"{k}: {text[:18]}" for k, text in enumerate(labels)],
            rotation=60,
            ha="right",
            fontsize=8,
            parse_math=False,
        )
    axis.legend()
    axis.grid(alpha=0.3)
    try:
        # else matplotlib makes FILE.png of FILE
        figure.savefig(path, dpi=120, format=Path(path).suffix[1:] or "png")
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise UserError(f"--plot {path}: cannot be written ({reason(error)})") from error


def show_fci(argv: list[str]) -> None:
    """Score one response (sampled here, unless --response names a file) and mark where AttnRL would
    branch."""
    from eval import check_context, load_model  # here, so that drawing curves needs no model code
    from fci import Sequence, check_model, score, separator_tokens, split_steps, without_answer
    from rollout import Request, TransformersEngine
    from tree import Response, choose_branch_points

    parser = Parser(
        "fci.py",
        show_fci.__doc__ or "",
        "python fci.py --model toy/model --problem 'a=4;b=a-2;?b' --delta 1 --plot fci.png",
    )
    parser.add_argument("--model", default="toy/model", help="model directory")
    parser.add_argument("--problem", required=True, help="the problem's text")
    parser.add_argument("--response", help="file with the response; without it one is sampled")
    parser.add_argument("--plot", metavar="FILE", help="draw the curve, e.g. fci.png")
    parser.add_argument(
        "--delta", type=int, default=4, help="attention counts from this many steps later on"
    )
    parser.add_argument(
        "--rho", type=float, default=0.2, help="branch points are among the top rho of FCI"
    )
    parser.add_argument("--max_response", type=int, default=1024, help="tokens, when sampling")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.delta < 1 or not 0 <= args.rho <= 1 or args.max_response < 1 or args.seed < 0:
        raise UserError(
            "--delta and --max_response must be at least 1, --rho between 0 and 1, --seed not"
            " negative"
        )
    model, tokenizer, eos_ids = load_model(args.model, "auto")
    check_model(model, args.model)
    prompt = encode_question(tokenizer, args.problem, "--problem")
    if args.response:
        try:
            text = open(args.response, encoding="utf-8").read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--response {args.response}: cannot be read as UTF-8 text ({reason(error)})"
            ) from error
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        check_context(
            model,
            [Problem(args.problem, [], "--problem", prompt)],
            len(tokens),
            option=f"response {args.response}:",
        )
    else:
        limit = check_context(
            model, [Problem(args.problem, [], "--problem", prompt)], None, at_most=args.max_response
        )
        tokens = (
            TransformersEngine(model, eos_ids)
            .generate([Request(prompt, limit, 1.0, args.seed)])[0]
            .tokens
        )
    if not tokens:
        raise UserError("the response is empty: there is nothing to score")
    separators = separator_tokens(tokenizer)
    bounds = split_steps(tokens, separators)
    scored = score(model, [Sequence(prompt, tokens, bounds)], delta=args.delta)[0]
    fci, branchable = without_answer(scored.fci, tokens, bounds, separators)
    response = Response(tokens, scored.logprobs, 0.0, scored.entropies, bounds, fci, branchable)
    points = choose_branch_points(response, "fci", 2, random.Random(args.seed), args.rho)
    labels = [
        tokenizer.decode(tokens[a:b], skip_special_tokens=True).strip()
        for a, b in zip(bounds, bounds[1:])
    ]
    for k, (label, y) in enumerate(zip(labels, fci)):
        mark = "<- branch" if bounds[k] in points else ""
        print(f"step {k:>3}   FCI {y:.4f}  {mark:9}  {plain(' '.join(label.split()))[:90]}")
    if len(labels) <= args.delta + 1:
        print(
            f"{len(labels)} steps with Delta = {args.delta}: all scores are 0 by definition; try a"
            " smaller --delta"
        )
    if args.plot:
        plot_scores(args.plot, fci, [k for k in range(len(labels)) if bounds[k] in points], labels)
        print(f"curve: {args.plot}")


# --------------------------------------------------------------------------------------------------
# `python eval.py --ask`: one answer
# --------------------------------------------------------------------------------------------------
def ask(model, tokenizer, eos_ids: list[int], args) -> None:
    """Print one answer while it is sampled. Raises UserError for options that are not for one
    answer."""
    if given := [name for name in ("k", "out", "suite") if getattr(args, name)] + ["engine"] * (
        args.engine == "vllm"
    ):
        raise UserError(f"--{given[0]}: is for --problems, not for --ask")
    import torch
    from transformers import TextStreamer

    from eval import check_context
    from rollout import Request, TransformersEngine

    class Streamer(TextStreamer):  # waits for the rest of a word or character
        def on_finalized_text(self, text: str, stream_end: bool = False):
            print(plain(text), end="\n" if stream_end else "", flush=True)

    streamer = Streamer(tokenizer, skip_special_tokens=True)
    prompt = encode_question(tokenizer, args.ask + args.prompt_suffix, "--ask")
    limit = check_context(model, [Problem(args.ask, [], "--ask", prompt)], args.max_response)
    engine = TransformersEngine(model, eos_ids)
    engine.generate(
        [Request(prompt, limit, args.temperature, args.seed)],
        on_token=lambda _, token: streamer.put(torch.tensor([token])),
    )
    streamer.end()


def main(argv: list[str]) -> None:
    parser = Parser(
        "view.py", "The explorer, the curves and a table of runs.", "python view.py runs/A runs/B"
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
    args.runs = list(dict.fromkeys(args.runs))  # given twice, a run would count twice in the means
    print(table(args.runs))
    if args.plots:
        return print(
            *draw_comparison(args.runs, args.runs[0].resolve().parent / "compare"), sep="\n"
        )
    for run in args.runs:
        print(draw_curves(run))
        print(write_explorer(run, args.steps))


if __name__ == "__main__":
    with stop_on_user_error("view.py"):
        main(sys.argv[1:])
