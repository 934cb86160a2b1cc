r"""sft.py: supervised warm-up. RL only improves what a model can do at times; this teaches more.

    python recipes/sft.py --model DIR --problems train.jsonl --out warm   # again: resumes

The loss is the mean over all tokens of the solutions, including end tokens:

    L = - sum over solutions i, tokens t of log pi(y[i, t] | x[i], y[i, <t]) / number of such tokens

Rows have "problem" (with the same prompt as in attnrl.py and eval.py) and "solution". The learning
rate rises for a 20th of the steps, then falls to 0. --out gets the model, loss.jsonl and loss.png.
A killed run resumes from sft.pt, to the same weights. Left out: several ranks, validation.

    python -m pytest tests/test_sft.py
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from runtime.cli import Parser, UserError, first_line, stop_on_user_error
from runtime.data import PROMPT_SUFFIX, encode_question, usable_suffix
from runtime.files import read_rows
from runtime.models import load_model
from runtime.scoring import Sequence, TokenLogprobs, token_batches, token_logprobs

TOKENS, SAVE_EVERY = 4096, 20  # tokens of a pass (with padding) or an example; steps


def read_examples(source: str, tokenizer) -> list[Sequence]:
    """Prompts and solutions as tokens. Raises UserError."""
    suffix, examples = usable_suffix(tokenizer, PROMPT_SUFFIX), []
    for place, row in read_rows(source):
        where, fault = f"{source}, {place}", row if isinstance(row, ValueError) else "not an object"
        if not isinstance(row, dict):
            raise UserError(f"{where}: {fault}")
        for name in ("problem", "solution"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(f'{where}: the field "{name}" must be a text')
        prompt = encode_question(tokenizer, row["problem"] + suffix, where)
        solution = tokenizer(row["solution"], add_special_tokens=False).input_ids
        if not prompt or not solution or len(prompt) + len(solution) >= TOKENS:
            raise UserError(f"{where}: nothing that the model can write, or over {TOKENS} tokens")
        examples.append(Sequence(prompt, [*solution, tokenizer.eos_token_id]))
    if not examples:
        raise UserError(f"{source}: no row in it")
    return examples


def batch_of(step: int, examples: list, args) -> list:
    """The examples of a step (0, 1, ...). All are used once before any is used again."""
    drawn = [divmod(step * args.batch_size + i, len(examples)) for i in range(args.batch_size)]
    order = {e: random.Random(f"{args.seed}:{e}").sample(examples, len(examples)) for e, _ in drawn}
    return [order[epoch][place] for epoch, place in drawn]


def update(forward: TokenLogprobs, optimizer, batch: list[Sequence]) -> float:
    """One optimizer step; returns the loss before it, in nats per token."""
    tokens, loss = sum(len(s.tokens) for s in batch), 0.0
    optimizer.zero_grad()
    for rows in token_batches([[s] for s in batch], TOKENS):
        logprobs, _ = token_logprobs(forward, [[batch[i]] for i in rows], 1.0, with_entropy=False)
        (part := -logprobs.sum() / tokens).backward()
        loss += part.item()
    torch.nn.utils.clip_grad_norm_(forward.model.parameters(), 1.0)
    optimizer.step()
    return loss


def main(argv: list[str]) -> None:
    args = parse(argv)
    model, tokenizer, _ = load_model(args.model, "auto")
    examples = read_examples(args.problems, tokenizer)
    forward, out = TokenLogprobs(model.train()), Path(args.out)
    forward.autocast = args.dtype == "bf16"
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0)
    losses = resume(out, args, model, optimizer)
    rising, left = max(1, args.steps // 20), range(len(losses), args.steps)
    for step in tqdm(left, unit="step", mininterval=10):  # also in a log file
        falling = 1 - (step - rising) / max(1, args.steps - rising)
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / rising, falling)
        losses.append(update(forward, optimizer, batch_of(step, examples, args)))
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < args.steps:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"settings": vars(args), "losses": losses} | states, out / "sft.pt.new")
            (out / "sft.pt.new").replace(out / "sft.pt")  # after a kill: the old file or the new
    finish(out, model.eval(), tokenizer, losses)


def resume(out: Path, args, model, optimizer) -> list[float]:
    """The losses of the finished steps. Raises UserError for another run's folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "sft.pt").exists():
            if any(path.name != "sft.pt.new" for path in out.iterdir()):
                raise UserError(f"--out {out}: holds something else; give an empty folder")
            return []
        state = torch.load(out / "sft.pt", map_location=model.device)
        changed = [k for k, v in vars(args).items() if state["settings"][k] != v]
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"--out {out}: cannot be used ({first_line(error)})") from error
    if changed:
        raise UserError(f"--out {out}: was begun with another --{changed[0]}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["losses"]


def finish(out: Path, model, tokenizer, losses: list[float]) -> None:
    lines = (json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses, 1))
    (out / "loss.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    axis = Figure(figsize=(6, 4), layout="constrained").subplots()
    axis.plot(range(1, len(losses) + 1), losses, marker=".")
    axis.set(xlabel="step", ylabel="loss, nats per token", ylim=0)
    axis.figure.savefig(out / "loss.png", dpi=110)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "sft.pt").unlink(missing_ok=True)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the model is in {out}")


def parse(argv: list[str]):
    example = "python recipes/sft.py --model DIR --problems train.jsonl --out warm"
    parser = Parser("recipes/sft.py", "Supervised warm-up on problems and solutions.", example)
    add = parser.add_argument
    add("--model", required=True, help="directory or hub name")
    add("--problems", required=True, help='file of rows with "problem" and "solution"')
    add("--out", required=True, help="folder of the warmed-up model")
    add("--steps", type=int, default=140, help="optimizer steps")
    add("--batch_size", type=int, default=8, help="examples per step")
    add("--lr", type=float, default=3e-4, help="the highest learning rate")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products; weights are fp32")
    add("--seed", type=int, default=0, help="of the order of examples")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch_size) < 1 or not 0 < args.lr < 1:
        raise UserError("--steps, --batch_size or --lr: not above 0, or a rate not below 1")
    return args


if __name__ == "__main__":
    with stop_on_user_error("recipes/sft.py"):
        main(sys.argv[1:])
