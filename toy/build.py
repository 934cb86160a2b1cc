"""Rebuild the toy checkpoint (toy/model): a 0.6M-parameter Qwen2 that can solve the toy but slips.

    python toy/build.py --out toy/model          # 25 to 60 minutes on 2 cores; seed 0

Three stages of supervised learning, loss on the response only:
1. a perfect teacher on varied programs of 2 to 9 variables, until nearly every one is solved;
2. the same on the toy's own programs, which have a constant hub in the middle;
3. a teacher that slips (programs.toy_solution): the policy then knows how to solve a program, but
   sometimes makes a mistake in any step. Reinforcement learning can improve this.
Left out: other parts of a real SFT (packing, evaluation during training, mixed precision).
"""

import copy
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from runtime.cli import Parser, UserError, first_line, stop_on_user_error
from toy.programs import LETTERS, toy_program, toy_solution


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per character, and one for the blank line that ends a step.

    A real Qwen2 tokenizer with a single merge, because AutoTokenizer uses this class and its
    splitting rules for every Qwen2 model, whatever the saved file says. "\u010a" is the newline of
    byte-level BPE.
    """
    vocabulary = ["\u010a", "<eos>", "\u010a\u010a", *"0123456789", *LETTERS, *"=;?+-*\\{}"]
    # pad = eos on purpose: no part of the project may tell padding from text by the token id
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[("\u010a", "\u010a")],
        unk_token="<eos>",
        eos_token="<eos>",
        pad_token="<eos>",
    )


@dataclass
class Stage:
    name: str
    steps: int
    lr: float
    variables: tuple[int, int]
    varied: bool  # not the toy's own programs: any hub, and no constant in the middle
    slip: float
    seed: int
    out: str


def make_program(n_vars: int, rng: random.Random, stage: Stage) -> str:
    if not stage.varied:
        return toy_program(n_vars, rng)
    hub = rng.randrange(1, max(2, n_vars - 3))
    return toy_program(n_vars, rng, hub, pull=0.4, constant=False)


def make_batch(tokenizer, rng: random.Random, stage: Stage, size: int = 64):
    """`size` programs with their solutions -> input ids and labels, both (B, T); -100 marks prompt
    and padding."""
    # one length per batch: no padding to speak of
    n_vars = max(rng.randint(*stage.variables), rng.randint(*stage.variables))
    rows, prompts = [], []
    for _ in range(size):
        program = make_program(n_vars, rng, stage)
        prompts.append(len(program))
        text = program + toy_solution(program, stage.slip, rng)
        rows.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows])
    labels = ids.clone()
    for i, row in enumerate(rows):
        labels[i, : prompts[i]] = -100
        labels[i, len(row) :] = -100
    return ids, labels


def train(model, tokenizer, stage: Stage):
    """AdamW with 5 % warm-up and cosine decay to a tenth; the model is saved every 1,000 steps and
    at the end."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    rng, started = random.Random(stage.seed), time.time()
    for step in range(1, stage.steps + 1):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min(step / (0.05 * stage.steps), decay)
        ids, labels = make_batch(tokenizer, rng, stage)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == stage.steps:
            spent = time.time() - started
            print(
                f"{stage.name} step {step}/{stage.steps} loss {loss.item():.4f} {spent:.0f} s, this"
                f" stage's rest about {spent / step * (stage.steps - step):.0f} s",
                flush=True,
            )
        if step % 1000 == 0 or step == stage.steps:
            model.save_pretrained(stage.out)
            tokenizer.save_pretrained(stage.out)


@torch.no_grad()
def widen(model, width: int = 128):
    """The same function, up to rounding, `width` wide instead of 96 and so with heads of 32 instead
    of 24 dimensions: all that is new is 0, and stays 0 in training.

    Rotary dimension i of D turns with theta^(-2 i / D) and is paired with i + D / 2: another theta
    keeps the old frequencies, and the second half of a head moves to the new middle. Where the
    model divides by the root of a size that is larger now, queries and norms make up for it.
    """
    config = copy.deepcopy(model.config)
    ratio, old = width / config.hidden_size, config.hidden_size // config.num_attention_heads
    config.hidden_size, new = width, width // config.num_attention_heads
    config.rope_parameters["rope_theta"] **= ratio
    config.rms_norm_eps /= ratio
    # where a head's dimensions go
    place = torch.cat([torch.arange(old // 2), new // 2 + torch.arange(old // 2)])

    def heads(rows):  # (heads * old, ...) -> (heads * new, ...)
        wide = rows.new_zeros(len(rows) // old, new, *rows.shape[1:])
        wide[:, place] = rows.unflatten(0, (-1, old))
        return wide.flatten(0, 1)

    def pad(value, like):  # zeros after the last entry of each dimension
        lacking = [b - a for a, b in zip(value.shape, like.shape)]
        return torch.nn.functional.pad(value, [n for extra in lacking[::-1] for n in (0, extra)])

    wide = Qwen2ForCausalLM(config)
    for (name, value), target in zip(model.state_dict().items(), wide.state_dict().values()):
        if any(f"{kind}_proj" in name for kind in "qkv"):
            value = heads(value) * (ratio**0.5 if "q_proj" in name else 1)
        elif "o_proj" in name:
            value = heads(value.T).T
        elif "norm" in name:
            value = value / ratio**0.5
        target.copy_(pad(value, target))
    wide.generation_config = model.generation_config
    return wide


@torch.no_grad()
def accuracy(model, tokenizer, n_vars: int, count: int, temperature: float, seed: int) -> float:
    """Share of `count` fresh programs whose sampled response ends in the right box."""
    rng = random.Random(seed)
    torch.manual_seed(seed)  # model.generate draws from the global generator
    programs = [toy_program(n_vars, rng) for _ in range(count)]
    ids = torch.tensor([tokenizer(p)["input_ids"] for p in programs])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9 * n_vars + 12,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    boxes = [toy_solution(program).split("\n\n")[-1] for program in programs]
    return sum(text.endswith(box) for text, box in zip(texts, boxes)) / count


def parse(argv: list[str]):
    parser = Parser("toy/build.py", __doc__ or "", "python toy/build.py --out runs/toy-model")
    add = parser.add_argument
    text = "model directory; stages 1 and 2: OUT-varied, OUT-hubs"
    add("--out", default="runs/toy-model", help=text)
    add("--seed", type=int, default=0, help="of weights and programs")
    add("--steps", type=int, default=5000, help="optimizer steps of stage 1")
    add("--hub_steps", type=int, default=600, help="optimizer steps of stage 2")
    add("--slip_steps", type=int, default=300, help="optimizer steps of stage 3")
    add("--slip", type=float, default=0.2, help="probability that a step of the teacher is wrong")
    text = "begin from this checkpoint instead of random weights (skip stage 1 with --steps 0)"
    add("--start", help=text)
    args = parser.parse_args(argv)
    steps = dict.fromkeys(("steps", "hub_steps", "slip_steps"), 10**9)
    for name, high in ({"seed": 2**32} | steps | {"slip": 1}).items():
        if not 0 <= getattr(args, name) <= high:
            raise UserError(f"--{name} {getattr(args, name)}: must be between 0 and {high}")
    return args


def first_model(start: str | None, tokenizer):
    """The model of an earlier stage, or random weights. Raises UserError."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    if not start:
        return Qwen2ForCausalLM(config)
    try:
        if not Path(start).is_dir():
            raise ValueError("no such directory")
        return Qwen2ForCausalLM.from_pretrained(start)
    except Exception as error:  # a dozen types for "no such model"
        raise UserError(f"--start {start}: cannot be loaded ({first_line(error)})") from error


def main(argv: list[str]) -> None:
    args = parse(argv)
    transformers_logging.disable_progress_bar()  # its bar for every saved file
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = first_model(args.start, tokenizer)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)  # now, not after 40 minutes
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made a folder ({error.strerror})") from error
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for stage in (
        Stage("varied", args.steps, 2e-3, (2, 9), True, 0.0, args.seed, args.out + "-varied"),
        Stage("hubs", args.hub_steps, 1e-3, (4, 9), False, 0.0, args.seed + 1, args.out + "-hubs"),
        Stage("slips", args.slip_steps, 3e-4, (7, 9), False, args.slip, args.seed + 2, args.out),
    ):
        if stage.steps:
            train(model, tokenizer, stage)
            right = {n: accuracy(model, tokenizer, n, 200, 1.0, 1) for n in (8, 9)}
            print(stage.name, right, f"in {stage.out}", flush=True)
    widen(model).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"model: {args.out}")


if __name__ == "__main__":
    with stop_on_user_error("toy/build.py"):
        main(sys.argv[1:])
