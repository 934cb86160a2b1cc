"""bench/scale.py: the cost of a step as it grows, measured on the toy; and the cost on 8 GPUs,
computed.

    python bench/scale.py                # problems, response length, ranks: measured
    python bench/scale.py --model        # only the computed table of bench/scale.md (1.5B and 7B)

The steps are AttnRL's without adaptive sampling, so that the work is constant: G = 6, N = 2, T = 2,
lr 0. For the lengths, the policy has no end token, so every response is as long as allowed, and the
reward is random, so nearly all leaves are trained. For the ranks, every process has one thread. The
table shows each measured step beside a straight line: the first row's seconds times problems, or
times tokens, or divided by ranks. There are two reasons for a difference: attention grows with the
square of the length, and a part of each step takes the same time at any size.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import ROOT, command, positive, record
from pipeline import Side

from runtime import dist
from runtime.cli import stop_on_user_error
from tools import plan

WORK = dict(ads_filter="none", ads_expansion=False, ads_batch=False, lr=0)
SHOWN = ("generate", "score", "train", "exchange", "sync")


def median_steps(steps: int, sizes: list[dict], endless: bool = False) -> list[dict]:
    """Seconds of a step by phase, of every size (its settings), in the order of Side.seen; the
    sizes take turns, so that load on the machine hits all alike. The first step is not counted."""
    sides = [Side("attnrl", endless, **WORK, **settings) for settings in sizes]
    for _ in range(steps + 1):
        for side in sides:
            side.step()
    return [side.medians() for side in sides]


def rows_with_line(
    name: str, sizes: list[int], found: list[dict], down: bool = False
) -> list[dict]:
    """Adds the straight line through the first row (`down`: divided instead of multiplied)."""
    rows = []
    for size, step in zip(sizes, found):
        times = sizes[0] / size if down else size / sizes[0]
        line = found[0]["step"] * times
        rows.append(
            {
                name: size,
                "step, s": step["step"],
                "straight line, s": line,
                "step / line": step["step"] / line,
            }
            | {f"{phase}, s": step[phase] for phase in SHOWN}
            | {"tokens": int(step["tokens"])}
        )
    return rows


def by_problems(steps: int, sizes: list[int]) -> None:
    found = median_steps(steps, [dict(batch_size=size) for size in sizes])
    record("scale/problems", rows_with_line("problems", sizes, found), [])


def coin(response: str, answers: list[str]) -> float:
    return float(zlib.crc32(response.encode()) % 2)


def by_length(steps: int, sizes: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(ROOT / "toy/model", f"{folder}/model"))
        config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 4096}
        (model / "config.json").write_text(json.dumps(config))
        same = dict(batch_size=4, model=model, reward="scale:coin", rollout_tokens=10**6)
        settings = [same | dict(max_response=size) for size in sizes]
        found = median_steps(steps, settings, endless=True)
    record("scale/length", rows_with_line("response", sizes, found), [])


def by_ranks(steps: int, sizes: list[int]) -> None:
    found = []
    for size in sizes:
        ranks = ["-m", "torch.distributed.run", "--nproc_per_node", str(size)]
        command = [sys.executable, *ranks, __file__, "--child", "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found.append(json.loads(done.stdout.split("RESULT")[1]))
    record("scale/ranks", rows_with_line("ranks", sizes, found, down=True), [])


# --------------------------------------------------------------------------------------------------
# Eight GPUs, computed: every number here is explained in bench/scale.md
# --------------------------------------------------------------------------------------------------
# H100 SXM, dense bf16 FLOP/s and bytes/s, as its maker states them
PEAK, BANDWIDTH = 989e12, 3.35e12
TRAIN_SHARE, SCORE_SHARE, DECODE_SHARE = 0.4, 0.5, 0.6  # of these that is reached: assumptions
DECODE_FLOOR = 0.006  # seconds of one decoding step whatever it computes: assumption
FCI_COST = 1.19  # a scoring pass with FCI against one without: bench/fci.py, T = 8192, 200 steps
PROMPT, GPUS = 150, 8


def seconds(shape: plan.Shape, config, mean: int, gpus: int = GPUS) -> dict[str, float]:
    """Seconds of one step's phases on each of `gpus` for responses of `mean` tokens; AttnRL's work
    without ADS."""
    responses = config.batch_size * config.group_size / gpus
    continued = responses * config.branch_points * config.continuations
    suffix = 0.6 * mean  # a branch point lies at 40 % of its response on average: assumption
    whole = PROMPT + mean
    at_once = min(responses + continued, plan.vllm_tokens(config, shape, 80) / (PROMPT + mean / 2))

    def forward(tokens: float, width: float) -> float:
        """FLOP: the weights, and the causal half of attention."""
        attention = 2 * shape.layers * shape.heads * shape.head_dim * width
        return tokens * (2 * shape.parameters + attention)

    def decode(tokens: float) -> float:
        """Weights are read once a decoding step, each row's keys and values for every token."""
        # the longest response needs that many steps, alone or not
        count = max(tokens / at_once, config.max_response)
        weights = 2 * shape.parameters / (BANDWIDTH * DECODE_SHARE)
        cache = (PROMPT + mean / 2) * plan.kv_per_token(shape, 2) / (BANDWIDTH * DECODE_SHARE)
        return count * (DECODE_FLOOR + weights) + tokens * cache

    sampled = [responses * mean, continued * suffix]
    prefixes = responses * PROMPT + continued / config.continuations * (whole - suffix)
    prefill = forward(prefixes, mean) / (PEAK * SCORE_SHARE)
    one_pass = forward(whole, whole) / PEAK  # over one leaf, at the peak
    # forward, backward (two), and forward again
    passes = 4 if config.activation_checkpointing else 3
    reference = 1 if config.kl_coef else 0
    trained = passes / TRAIN_SHARE + reference / SCORE_SHARE
    return {
        "one call": decode(sum(sampled)) + prefill,
        "two calls": sum(map(decode, sampled)) + prefill,
        "score": (responses * FCI_COST + continued) * one_pass / SCORE_SHARE,
        "train": (responses + continued) * one_pass * trained,
        "tokens": gpus * sum(sampled),
    }


def model_table() -> str:
    """Markdown: one row a model and length."""
    from transformers import Qwen2Config

    columns = (
        "model",
        "responses, mean (longest)",
        "generate s",
        "the same in two calls",
        "score s",
        "train s",
        "step s",
        "M tokens",
        "GPU hours of 500 steps",
        "GiB per GPU",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, sizes in plan.QWEN2.items():
        tied = name == "1.5B"
        shape = plan.count(Qwen2Config(num_hidden_layers=28, tie_word_embeddings=tied, **sizes))
        for mean, longest in ((1000, 4096), (3000, 8192), (8000, 16384)):
            cells = model_cells(shape, mean, longest)
            lines.append(f"| {name} | {mean:,} ({longest:,}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_cells(shape: plan.Shape, mean: int, longest: int) -> list[str]:
    from attnrl import PRESETS, Config

    config = Config(**PRESETS["paper"] | dict(parallel="fsdp", max_response=longest))
    s = seconds(shape, config, mean)
    step = s["one call"] + s["score"] + s["train"]
    return [
        *(f"{s[key]:.0f}" for key in ("one call", "two calls", "score", "train")),
        f"{step:.0f}",
        f"{s['tokens'] / 1e6:.1f}",
        f"{500 * GPUS * step / 3600:,.0f}",
        f"{plan.peak(config, shape, GPUS, 80)[0]:.0f}",
    ]


def recipe_table() -> str:
    """Markdown: hours of 100 steps of --preset small with vLLM, responses of 400 tokens."""
    from transformers import Qwen2Config

    from attnrl import PRESETS, Config

    half = dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14)
    half |= dict(num_key_value_heads=2, vocab_size=151_936)
    models = {
        "Qwen2.5-0.5B-Instruct": dict(num_hidden_layers=24, tie_word_embeddings=True, **half),
        "Qwen2.5-1.5B-Instruct": dict(
            num_hidden_layers=28, tie_word_embeddings=True, **plan.QWEN2["1.5B"]
        ),
        "DeepSeek-R1-Distill-Qwen-1.5B": dict(
            num_hidden_layers=28, tie_word_embeddings=False, **plan.QWEN2["1.5B"]
        ),
    }
    config = Config(**PRESETS["small"] | dict(engine="vllm", dtype="bf16"))
    lines = ["| model | M tokens a step | one GPU: hours | eight: hours |", "|---|---|---|---|"]
    for name, sizes in models.items():
        shape = plan.count(Qwen2Config(**sizes))
        found = [seconds(shape, config, 400, gpus) for gpus in (1, GPUS)]
        hours = [(s["one call"] + s["score"] + s["train"]) / 36 for s in found]  # 100 steps
        tokens = f"{found[0]['tokens'] / 1e6:.2f}"
        lines.append(f"| {name} | {tokens} | {' | '.join(f'{h:.1f}' for h in hours)} |")
    return "\n".join(lines)


def main() -> None:
    parser = command(__doc__, "--problems 4 8 --steps 2")
    parser.add_argument(
        "--steps", type=positive, default=3, help="measured steps; the median counts"
    )
    parser.add_argument("--problems", type=positive, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--model", action="store_true", help="only the computed tables")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        print(f"{model_table()}\n\n{recipe_table()}")
    elif args.child:
        torch.set_num_threads(1)
        (found,) = median_steps(args.steps, [dict(batch_size=24)])
        if dist.rank() == 0:
            print("RESULT", json.dumps(found), "RESULT")
        dist.stop(lambda: None)
    else:
        torch.set_num_threads(args.threads)
        by_problems(args.steps, args.problems)
        by_length(args.steps, args.lengths)
        by_ranks(args.steps, args.ranks)


if __name__ == "__main__":
    with stop_on_user_error("bench/scale.py"):
        main()
