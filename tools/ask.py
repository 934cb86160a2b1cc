"""ask.py: print one answer of a model while it is sampled. `python eval.py --ask` calls it.

python eval.py --model DIR --ask "What is 2 + 3?" --answer 5
python -m tools.ask --model DIR "What is 2 + 3?"
"""

import runtime  # isort: split

import sys

import torch
from transformers import TextStreamer

from runtime.cli import UserError, plain, stop_on_user_error
from runtime.data import Problem, encode_question, usable_suffix
from runtime.models import check_context
from runtime.rewards import Reward, response_texts
from runtime.rollout import Request, TransformersEngine

HELP = ("-h", "--help", "--help_all", "--help-all")  # these words are not questions


class Printer(TextStreamer):
    """Prints text as it is sampled. Waits until a word or character is complete."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        print(plain(text), end="\n" if stream_end else "", flush=True)


def ask(model, tokenizer, eos_ids: list[int], args) -> None:
    """Print one answer while it is sampled, then its grade. Raises UserError for options that do
    not fit one answer."""
    given = [name for name in ("k", "out", "suite") if getattr(args, name)]
    given += ["engine"] * (args.engine == "vllm")
    if given:
        raise UserError(f"--{given[0]}: is for --problems, not for --ask")
    printer = Printer(tokenizer, skip_special_tokens=True)
    notes: list[str] = []
    suffix = usable_suffix(tokenizer, args.prompt_suffix, notes.append)
    question = args.ask if args.ask.endswith(suffix) else args.ask + suffix
    prompt = encode_question(tokenizer, question, "--ask", args.date)
    limit = check_context(model, [Problem(args.ask, [], "--ask", prompt)], args.max_response)
    for note in notes:
        print(note, file=sys.stderr)
    [completion] = TransformersEngine(model, eos_ids).generate(
        [Request(prompt, limit, args.temperature, args.seed)],
        on_token=lambda _, token: printer.put(torch.tensor([token])),
    )
    printer.end()
    if not completion.finished:
        print(f"(cut off after {limit} tokens; --max_response)")
    if args.answer is not None:
        reward = Reward(args.reward, units=args.grade_units)
        [found] = reward([(response_texts(tokenizer, [completion.tokens])[0], [args.answer])])
        print(f"({grade_text(found, reward.boxed[0], reward.errors[0])})")


def grade_text(reward: float, boxed: bool, error: str) -> str:
    """The reward in words if it is 1 or 0, else as a number."""
    if error:
        return f"could not be graded: {error}"
    if reward not in (0, 1):
        return f"reward {reward:g}"
    return "right" if reward else "wrong" if boxed else "wrong: no answer to grade"


def main(argv: list[str]) -> None:
    """The question is the last word: python -m tools.ask --model DIR "What is 2 + 3?"."""
    from eval import main as evaluate

    *options, question = argv or ["--help"]
    evaluate([*options, *([question] if question in HELP else ["--ask", question])])


if __name__ == "__main__":
    with stop_on_user_error("tools.ask"):
        main(sys.argv[1:])
