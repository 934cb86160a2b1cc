"""show_fci.py: the FCI of one response, step by step, and where AttnRL would branch.

python -m tools.show_fci --model toy/model --problem "a=4;b=a-2;?b" --delta 1 --plot fci.png
python -m tools.show_fci --model DIR --problem "..." --response FILE.txt

In a notebook (docs/attnrl.ipynb), each a picture:

    show(model, tokenizer, problem, response, delta=1)     # FCI, and attention between steps
    show_tree(tree.build_tree(responses), tokenizer)       # V and A of every node
"""

import runtime  # isort: split

import io
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fci import separator_tokens, split_steps, without_answer
from runtime.cli import Parser, UserError, plain, reason, stop_on_user_error
from runtime.data import Problem, encode_question
from runtime.grading import grade, last_box
from runtime.models import check_context, check_model, load_model
from runtime.rewards import response_texts
from runtime.rollout import Completion, Request, TransformersEngine
from runtime.scoring import Sequence, score
from tools.view import BLUE, GREY, ORANGE
from toy.programs import toy_solution
from tree import Node, Response, choose_branch_points


# --------------------------------------------------------------------------------------------------
# One response
# --------------------------------------------------------------------------------------------------
@dataclass
class ScoredSteps:
    """The K steps of one response: their texts, their FCI, and the branch points among them."""

    texts: list[str]
    fci: list[float]
    chosen: list[int]
    title: str = ""  # the problem, and its outcome
    # row j: how much step j attends to each step k <= j (largest over layers and heads); None if
    # the response has one step, or more than scoring.LOGGED_STEPS
    attention: list[list[float]] | None = None
    delta: int = 0  # FCI of step k counts the rows j >= k + delta


class Picture(Figure):
    """A matplotlib figure that notebooks display even if pyplot was not imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def show(
    model,
    tokenizer,
    problem: str,
    response: str | list[int],
    *,
    delta: int = 4,
    rho: float = 0.2,
    file: str | Path | None = None,
) -> Picture:
    """A picture of one response of K steps. Above: the FCI of its steps, (K,), and where AttnRL
    would branch (Eq. 7). Below: A[j, k], (K, K), how much step j attends to step k (mean over their
    tokens, maximum over layers and heads); the cells below the black line are summed in Eq. 5.

    response: its text, or better its tokens, since the tokenizer may split the text into other
    tokens than were sampled. file: also write the picture there (.png, .svg, .pdf). If the response
    has one step, or more than 64, only the FCI is drawn. The model is put back as it was.

    Raises UserError for an empty problem or response, for one that is longer than the model's
    positions, for delta < 1 or rho outside 0 to 1, and for a file that cannot be written;
    ValueError for a model whose attention is not a plain softmax (fci.py).
    """
    if delta < 1 or not 0 <= rho <= 1:
        raise UserError(f"delta {delta}, rho {rho}: must be at least 1, and between 0 and 1")
    prompt = encode_question(tokenizer, problem, "problem")
    tokens = response
    if isinstance(tokens, str):
        tokens = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise UserError("the response is empty: there is nothing to score")
    check_context(model, [Problem(problem, [], "problem", prompt)], len(tokens), option="response")
    steps = score_steps(model, tokenizer, prompt, tokens, delta, rho)
    found = f"steps: {len(steps.fci)}, Delta = {delta}"
    if len(steps.fci) <= delta + 1:
        found += ": all scores are 0 by definition"
    steps.title = f"{title_of(problem)}\n{found}"
    figure = draw(steps)
    if file is not None:
        write(figure, file, "file")
    return figure


def score_steps(
    model, tokenizer, prompt: list[int], tokens: list[int], delta: int, rho: float, seed: int = 0
) -> ScoredSteps:
    """Cut a response into steps, score them, choose branch points."""
    separators = separator_tokens(tokenizer)
    bounds = split_steps(tokens, separators)
    scored = score(model, [Sequence(prompt, tokens, bounds, logged=True)], delta=delta)[0]
    fci, branchable = without_answer(scored.fci, tokens, bounds, separators)
    response = Response(tokens, scored.logprobs, 0.0, scored.entropies, bounds, fci, branchable)
    points = choose_branch_points(response, "fci", 2, random.Random(seed), rho)
    spans = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
    texts = [tokenizer.decode(span, skip_special_tokens=True).strip() for span in spans]
    return ScoredSteps(
        texts,
        fci,
        chosen=[k for k in range(len(texts)) if bounds[k] in points],
        attention=scored.attention["most"] if scored.attention and len(texts) > 1 else None,
        delta=delta,
    )


def title_of(problem: str) -> str:
    return fill(brief(problem, 155), 80)


def brief(text: str, width: int) -> str:
    """A text as a label: one line of at most `width` characters."""
    words = plain(" ".join(text.split()))
    return words if len(words) <= width else words[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def draw(steps: ScoredSteps) -> Picture:
    """The FCI of one response, and the attention between steps if it was kept."""
    if steps.attention is None:
        return draw_curve(steps)
    count = len(steps.fci)
    side = min(9.0, max(2.4, 0.28 * count))  # inches, of the square map
    figure = Picture(figsize=(side + 4.2, side + 2.9), layout="constrained")
    panels = figure.subplot_mosaic(
        [["fci", "."], ["map", "bar"]],
        width_ratios=(side, 0.15),
        height_ratios=(1.4, side),
    )
    above, below = panels["fci"], panels["map"]
    draw_fci(above, steps)
    above.set(ylabel="FCI", ylim=(0, 1.15 * max(steps.fci) or 1))
    above.tick_params(labelbottom=False)
    seen = np.full((count, count), np.nan)  # steps cannot look at later ones
    for j, row in enumerate(steps.attention):
        seen[j, : j + 1] = row
    # a square-root scale shows small values: the mean over a long step's tokens is far below 1
    image = below.imshow(seen, "Blues", norm=PowerNorm(0.5, vmin=0), aspect="auto")
    figure.colorbar(image, cax=panels["bar"])
    panels["bar"].set_ylabel("attention, largest over layers and heads", fontsize=8)
    panels["bar"].tick_params(labelsize=8)
    mark_counted(below, steps)
    every = range(0, count, 1 if count <= 24 else 4)
    for axis in (above, below):
        axis.set(xlim=(-0.5, count - 0.5), xticks=every)
    small = 8 if count <= 32 else 6.5
    labels = [f"{brief(text, 38)}  {k}" for k, text in enumerate(steps.texts)]
    below.set_yticks(range(count), labels, fontsize=small, parse_math=False)
    for k in steps.chosen:
        below.get_yticklabels()[k].set_color(ORANGE)
    below.set(xlabel="step that is looked at", ylabel="step that looks")
    figure.suptitle(steps.title or "Forward Context Influence", fontsize=9, parse_math=False)
    return figure


def draw_fci(axis, steps: ScoredSteps) -> None:
    """The curve, and diamonds around the branch points."""
    axis.plot(range(len(steps.fci)), steps.fci, "o-", color=BLUE, label="FCI")
    heights = [steps.fci[k] for k in steps.chosen]
    style = dict(ms=11, mfc="none", mew=2, color=ORANGE, clip_on=False)
    axis.plot(steps.chosen, heights, "D", label="branch points", **style)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def mark_counted(axis, steps: ScoredSteps) -> None:
    """Draw a staircase above the cells that Eq. 5 sums, and frames around the columns of branch
    points."""
    count = len(steps.fci)
    edges = [k - 0.5 for k in range(count - steps.delta + 1) for _ in range(2)]
    if steps.delta and len(edges) > 2:
        heights = [edge + steps.delta for edge in edges]
        axis.plot(edges[1:], heights[:-1], color="black", lw=1.5)
    for k in steps.chosen:
        frame = Rectangle((k - 0.5, k - 0.5), 1, count - k, fill=False, color=ORANGE, lw=1.5)
        axis.add_patch(frame)


def draw_curve(steps: ScoredSteps) -> Picture:
    """FCI alone, with the texts of the steps below it."""
    count = len(steps.fci)
    figure = Picture(figsize=(max(6, min(16, 0.5 * count)), 4), layout="constrained")
    axis = figure.subplots()
    draw_fci(axis, steps)
    axis.set(xlabel="step", ylabel="FCI (attention mass from later steps)")
    # matplotlib must not read the problem's text as a formula
    axis.set_title(steps.title or "Forward Context Influence", fontsize=10, parse_math=False)
    if count <= 40:  # longer responses: step numbers only
        labels = [f"{k}: {brief(text, 18)}" for k, text in enumerate(steps.texts)]
        axis.set_xticks(range(count), labels, rotation=60, ha="right", fontsize=8, parse_math=False)
    return figure


def plot_scores(path: str, steps: ScoredSteps) -> None:
    """Write the picture of one response to a file. Raises UserError."""
    write(draw(steps), path, "--plot")


def write(figure: Figure, path: str | Path, option: str) -> None:
    """Write a figure. Raises a UserError that names the option."""
    try:
        # without a format, matplotlib would write FILE.png for FILE
        figure.savefig(path, dpi=120, format=Path(path).suffix[1:] or "png")
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise UserError(f"{option} {path}: cannot be written ({reason(error)})") from error


# --------------------------------------------------------------------------------------------------
# The tree of one problem
# --------------------------------------------------------------------------------------------------
@dataclass
class Box:
    """A node's place in the picture. Column: its depth; row: that of its first leaf."""

    node: Node
    column: int
    row: int
    parent_row: int


def boxes(node: Node, column: int = 0, row: int = 0, parent_row: int = 0) -> list[Box]:
    """The boxes of a node and of all nodes below it, leaf by leaf. A response stays in one row,
    because its rest is always the first child; continuations are in the rows below."""
    found = [Box(node, column, row, parent_row)]
    for child in node.children:
        below = boxes(child, column + 1, row, found[0].row)
        found += below
        row = below[-1].row + 1
    return found


def show_tree(root: Node, tokenizer, *, file: str | Path | None = None) -> Picture:
    """A picture of one problem's tree (tree.build_tree): a box for each node, with V (Eq. 2), A
    (Eq. 3) and the beginning of its text. The update makes blue nodes more likely and orange ones
    less likely; the stronger the colour, the larger |A|.

    file: also write the picture there. Raises UserError if it cannot be written.
    """
    placed = boxes(root)
    most = max(abs(box.node.advantage) for box in placed) or 1.0
    columns, rows = max(b.column for b in placed), placed[-1].row + 1
    size = (min(30, max(6, 0.9 + 3.1 * columns)), min(40, 0.9 + 0.27 * rows))
    figure = Picture(figsize=size, layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(0.9, columns + 0.95), ylim=(rows - 0.4, -0.6))
    axis.axis("off")
    for box in placed:
        draw_box(axis, box, tokenizer, most)
    title = f"{root.leaves} leaves, V(root) = {float(root.value):.2f}"
    axis.set_title(f"{title}; blue: A > 0, orange: A < 0", fontsize=9)
    if file is not None:
        write(figure, file, "file")
    return figure


def draw_box(axis, box: Box, tokenizer, most: float) -> None:
    """Draw one node and the line to its parent. The root has no tokens and no box."""
    node, left = box.node, box.column
    if box.column == 0:
        return
    axis.plot([left - 0.07, left - 0.04, left - 0.04, left], [box.parent_row] * 2 + [box.row] * 2)
    axis.lines[-1].set(color=GREY, lw=1, zorder=0)
    colour = (BLUE if node.advantage >= 0 else ORANGE, 0.65 * abs(node.advantage) / most)
    axis.add_patch(Rectangle((left, box.row - 0.4), 0.93, 0.8, facecolor=colour, edgecolor=GREY))
    text = brief(tokenizer.decode(node.tokens, skip_special_tokens=True), 28)
    words = f"V {float(node.value):.2f}  A {node.advantage:+.2f}  {text}"
    style = dict(va="center", fontsize=7, family="monospace", parse_math=False)
    axis.text(left + 0.01, box.row, words, **style)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def outcome(problem: str, response: str, finished: bool, answer: str | None) -> str:
    """Was the answer right? The answers of toy programs are computed; others need `answer`."""
    if answer is None and re.fullmatch(r"([a-z]=[a-z0-9+*-]+;)+\?[a-z]", problem):
        answer = last_box(toy_solution(problem))
    found, cut = last_box(response), "" if finished else ", cut off"
    given = "no box" if found is None else f"answer {found}"
    if answer is None:
        return f"{given}{cut} (not graded: --answer gives the right one)"
    return f"{given}{cut}: {'right' if grade(response, [answer]) else f'wrong, it is {answer}'}"


def read_response(args, model, tokenizer, prompt: list[int]) -> list[int]:
    """The tokens of the file --response. Raises UserError."""
    try:
        text = Path(args.response).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--response {args.response}: cannot be read as UTF-8 text ({reason(error)})"
        ) from error
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    problem = Problem(args.problem, [], "--problem", prompt)
    if tokens:
        check_context(model, [problem], len(tokens), option=f"response {args.response}:")
    return tokens


def sample_response(args, model, eos_ids: list[int], prompt: list[int]) -> Completion:
    problem = Problem(args.problem, [], "--problem", prompt)
    limit = check_context(model, [problem], None, at_most=args.max_response)
    request = Request(prompt, limit, 1.0, args.seed)
    return TransformersEngine(model, eos_ids).generate([request])[0]


def parse(argv: list[str]):
    """The settings. Raises UserError."""
    parser = Parser(
        "-m tools.show_fci",
        "Score one response (sampled here, unless --response names a file) and mark where AttnRL"
        " would branch.",
        "python -m tools.show_fci --model toy/model --problem 'a=4;b=a-2;?b' --delta 1 --plot"
        " fci.png",
    )
    parser.add_argument("--model", default="toy/model", help="model directory")
    parser.add_argument("--problem", required=True, help="the problem's text")
    parser.add_argument("--response", help="file with the response; without it one is sampled")
    parser.add_argument("--answer", help="the right answer, to say whether the response has it")
    parser.add_argument("--plot", metavar="FILE", help="draw the curve and the step attention")
    parser.add_argument(
        "--delta",
        type=int,
        default=4,
        help="FCI counts attention from steps at least this many steps later",
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
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    model, tokenizer, eos_ids = load_model(args.model, "auto")
    check_model(model, args.model)
    prompt = encode_question(tokenizer, args.problem, "--problem")
    if args.response:
        tokens, finished = read_response(args, model, tokenizer, prompt), True
    else:
        completion = sample_response(args, model, eos_ids, prompt)
        tokens, finished = completion.tokens, completion.finished
    if not tokens:
        raise UserError("the response is empty: there is nothing to score")
    steps = score_steps(model, tokenizer, prompt, tokens, args.delta, args.rho, args.seed)
    became = outcome(args.problem, response_texts(tokenizer, [tokens])[0], finished, args.answer)
    steps.title = f"{title_of(args.problem)}\n{plain(became)}"
    for k, (text, y) in enumerate(zip(steps.texts, steps.fci)):
        mark = "<- branch" if k in steps.chosen else ""
        print(f"step {k:>3}   FCI {y:.4f}  {mark:9}  {plain(' '.join(text.split()))[:90]}")
    print(plain(became))
    if len(steps.fci) <= args.delta + 1:
        print(
            f"{len(steps.fci)} steps with Delta = {args.delta}: all scores are 0 by definition"
            + ("; try a smaller --delta" if args.delta > 1 else "")
        )
    if args.plot:
        plot_scores(args.plot, steps)
        print(f"picture: {args.plot}")


if __name__ == "__main__":
    with stop_on_user_error("tools.show_fci"):
        main(sys.argv[1:])
