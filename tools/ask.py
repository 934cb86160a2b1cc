"""ask.py: one answer of a model, printed while it is sampled. `python eval.py --ask` calls it.

python eval.py --model DIR --ask "What is 2 + 3?"
python -m tools.ask --model DIR "What is 2 + 3?"
"""

import runtime  # isort: split

import sys

import torch
from transformers import TextStreamer

from runtime.cli import UserError, plain, stop_on_user_error
from runtime.data import Problem, encode_question
from runtime.models import check_context
from runtime.rollout import Request, TransformersEngine


class Printer(TextStreamer):
    """Prints text as it is sampled; waits for the rest of a word or character."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        print(plain(text), end="\n" if stream_end else "", flush=True)


def ask(model, tokenizer, eos_ids: list[int], args) -> None:
    """Print one answer while it is sampled. Raises UserError for options that are not for one."""
    given = [name for name in ("k", "out", "suite") if getattr(args, name)]
    given += ["engine"] * (args.engine == "vllm")
    if given:
        raise UserError(f"--{given[0]}: is for --problems, not for --ask")
    printer = Printer(tokenizer, skip_special_tokens=True)
    prompt = encode_question(tokenizer, args.ask + args.prompt_suffix, "--ask")
    limit = check_context(model, [Problem(args.ask, [], "--ask", prompt)], args.max_response)
    TransformersEngine(model, eos_ids).generate(
        [Request(prompt, limit, args.temperature, args.seed)],
        on_token=lambda _, token: printer.put(torch.tensor([token])),
    )
    printer.end()


if __name__ == "__main__":
    with stop_on_user_error("tools.ask"):
        from eval import main

        *options, question = sys.argv[1:] or ["--help"]
        main([*options, *(["--ask", question] if question != "--help" else ["--help"])])
