"""show_fci.py: the FCI of one response, step by step, and where AttnRL would branch.

python -m tools.show_fci --model toy/model --problem "a=4;b=a-2;?b" --delta 1 --plot fci.png
python -m tools.show_fci --model DIR --problem "..." --response FILE.txt
"""

import runtime  # isort: split

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, shorten

from matplotlib.figure import Figure

from fci import separator_tokens, split_steps, without_answer
from runtime.cli import Parser, UserError, plain, reason, stop_on_user_error
from runtime.data import Problem, encode_question
from runtime.grading import grade, last_box
from runtime.models import check_context, check_model, load_model
from runtime.rewards import response_texts
from runtime.rollout import Completion, Request, TransformersEngine
from runtime.scoring import Sequence, score
from tools.view import BLUE, ORANGE
from toy.programs import toy_solution
from tree import Response, choose_branch_points


@dataclass
class ScoredSteps:
    """The steps of one response: their texts, their FCI, and the branch points among them."""

    texts: list[str]
    fci: list[float]
    chosen: list[int]
    title: str = ""  # the problem, and what became of it


def score_steps(model, tokenizer, prompt: list[int], tokens: list[int], args) -> ScoredSteps:
    """Cut a response into steps, score them, choose branch points. args: delta, rho, seed."""
    separators = separator_tokens(tokenizer)
    bounds = split_steps(tokens, separators)
    scored = score(model, [Sequence(prompt, tokens, bounds)], delta=args.delta)[0]
    fci, branchable = without_answer(scored.fci, tokens, bounds, separators)
    response = Response(tokens, scored.logprobs, 0.0, scored.entropies, bounds, fci, branchable)
    points = choose_branch_points(response, "fci", 2, random.Random(args.seed), args.rho)
    spans = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
    texts = [tokenizer.decode(span, skip_special_tokens=True).strip() for span in spans]
    return ScoredSteps(texts, fci, [k for k in range(len(texts)) if bounds[k] in points])


def plot_scores(path: str, steps: ScoredSteps) -> None:
    """The FCI curve of one response with its branch points. Raises UserError."""
    fci, chosen = steps.fci, steps.chosen
    figure = Figure(figsize=(max(6, min(16, 0.5 * len(fci))), 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(len(fci)), fci, "o-", color=BLUE, label="FCI")
    heights = [fci[k] for k in chosen]
    axis.plot(chosen, heights, "D", ms=11, mfc="none", mew=2, color=ORANGE, label="branch points")
    axis.set(xlabel="step", ylabel="FCI (attention mass from later steps)")
    # text of a problem is no formula of matplotlib's
    axis.set_title(steps.title or "Forward Context Influence", fontsize=10, parse_math=False)
    if len(fci) <= 40:  # longer responses: step numbers only
        labels = [f"{k}: {text[:18]}" for k, text in enumerate(steps.texts)]
        axis.set_xticks(
            range(len(fci)), labels, rotation=60, ha="right", fontsize=8, parse_math=False
        )
    axis.legend()
    axis.grid(alpha=0.3)
    try:
        # without a format matplotlib makes FILE.png of FILE
        figure.savefig(path, dpi=120, format=Path(path).suffix[1:] or "png")
    except (OSError, ValueError) as error:  # no such folder, no such format
        raise UserError(f"--plot {path}: cannot be written ({reason(error)})") from error


def outcome(problem: str, response: str, finished: bool, answer: str | None) -> str:
    """Was the answer right? Programs of the toy carry their own; others need `answer`."""
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
    steps = score_steps(model, tokenizer, prompt, tokens, args)
    became = outcome(args.problem, response_texts(tokenizer, [tokens])[0], finished, args.answer)
    steps.title = "\n".join([fill(shorten(plain(args.problem), 160), 80), plain(became)])
    for k, (text, y) in enumerate(zip(steps.texts, steps.fci)):
        mark = "<- branch" if k in steps.chosen else ""
        print(f"step {k:>3}   FCI {y:.4f}  {mark:9}  {plain(' '.join(text.split()))[:90]}")
    print(plain(became))
    if len(steps.fci) <= args.delta + 1:
        print(
            f"{len(steps.fci)} steps with Delta = {args.delta}: all scores are 0 by definition;"
            " try a smaller --delta"
        )
    if args.plot:
        plot_scores(args.plot, steps)
        print(f"curve: {args.plot}")


if __name__ == "__main__":
    with stop_on_user_error("tools.show_fci"):
        main(sys.argv[1:])
