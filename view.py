"""view.py: look at runs. Draws each run's curves.png from its metrics.jsonl and prints a table of all of them.

    python view.py runs/toy-20260101-120000 runs/toy-20260101-130000
"""
import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")  # a file, no window: also on a machine without a screen
import matplotlib.pyplot as plt  # noqa: E402

from data import UserError, stop_on_user_error  # noqa: E402

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"


def read_metrics(run: Path) -> list[dict]:
    """The run's metrics, one dict a step; step 0 is the evaluation before training. Raises UserError."""
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'metrics.jsonl'}: cannot be read ({error})") from error


def draw_curves(run: Path) -> Path:
    """Four panels over training steps: accuracy, what sampling yields, the update, where the time goes."""
    records = read_metrics(run)
    steps = [m for m in records if m["step"] > 0]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)

    def plot(axis, key, label, colour, style="-", scale=1.0, rows=None):
        rows = [m for m in (steps if rows is None else rows) if key in m]
        axis.plot([m["step"] for m in rows], [scale * m[key] for m in rows], style, color=colour, label=label)

    accuracy, sampling, update, seconds = axes.flat
    plot(accuracy, "test_accuracy", "test accuracy (avg@k)", BLUE, "o-", 100, records)
    plot(accuracy, "initial/reward", "reward of initial responses", ORANGE, "--", 100)
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
    if any(m["train/kl"] for m in steps):  # 0 throughout: no reference model was kept
        plot(update, "train/kl", "KL to the initial policy (nats)", PINK, "-.")
    update.set(title="Update", ylim=(0, None))
    names = ("generate", "score", "grade", "train")
    seconds.stackplot([m["step"] for m in steps], [[m[f"seconds/{name}"] for m in steps] for name in names],
                      labels=names, colors=(BLUE, ORANGE, PINK, GREEN), alpha=0.8)
    seconds.set(title="Time per step", ylabel="seconds")
    for axis in axes.flat:
        axis.set_xlabel("training step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, frameon=False)  # never over a line
    figure.suptitle(run.name)
    figure.savefig(run / "curves.png", dpi=110)
    plt.close(figure)
    return run / "curves.png"


def table(runs: list[Path]) -> str:
    """Test accuracy (avg@k, in %) before training, at its best and at the end, with the means over the runs."""
    rows = []
    for run in runs:
        records = read_metrics(run)
        tested = [100 * m["test_accuracy"] for m in records if "test_accuracy" in m]
        if not tested:
            raise UserError(f"{run / 'metrics.jsonl'}: no test_accuracy in it")
        rows.append([tested[0], max(tested), tested[-1], tested[-1] - tested[0], tested[-1] - max(tested),
                     records[-1]["generated_tokens"] / 1e6, records[-1]["seconds/total"] / 60])
    lines = ["| run | before | best | end | gain | end - best | M tokens | minutes |", "|---|---|---|---|---|---|---|---|"]
    if len(rows) > 1:
        rows.append([fmean(column) for column in zip(*rows)])
    for name, row in zip([*(run.name for run in runs), "mean"], rows):
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row[:5]) + f" | {row[5]:.2f} | {row[6]:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if not arguments or any(a.startswith("-") for a in arguments):
        raise UserError("usage: python view.py runs/NAME [runs/NAME ...]")
    runs = [Path(a) for a in arguments]
    print(table(runs))
    for run in runs:
        print(f"curves: {draw_curves(run)}")


if __name__ == "__main__":
    with stop_on_user_error("view.py"):
        main(sys.argv[1:])
