"""bench/update.py: the update's padding, speed and memory. Shared prefixes: bench/packing.py.

    python bench/update.py

1. Padding: share of padding in the tokens of the passes: with `token_batches` of
   runtime/scoring.py (rows of similar length, at most 5 % padding per pass); with passes of sorted
   rows filled up to the budget; and in the original order, 8 sequences per pass. Lengths: the
   leaves of a toy step; and 192 responses of log-normal length, mean about 2,900 tokens and at most
   8,192, as reasoning models have.
2. Speed: one optimizer step on 192 leaves of the toy, `Learner.update` against a plain loop: 8
   sequences per pass in the original order, all logits, log_softmax, gather. Trained tokens per
   second, and the largest difference between the two gradients.
3. Memory: forward and backward pass over one sequence of T tokens, vocabulary 151,936 (Qwen's), one
   narrow layer, so that the logits need most of the memory: `TokenLogprobs` (1,024 positions at a
   time) against all logits at once.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import command, extra_bytes, gain, in_new_process, interleave, positive, record, share
from pipeline import Side

from attnrl import Run
from learner import Learner, ppo_loss
from runtime.cli import stop_on_user_error
from runtime.scoring import Sequence, token_batches, token_logprobs


def toy_leaves() -> tuple[Run, list]:
    """One training step's sequences, sampled for real by a policy that stays as it is (lr 0)."""
    side = Side("attnrl", lr=0)
    return side.run, side.step().sequences


def filled(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices sorted by length, in passes filled up to the budget of padded tokens."""
    batches, rest = [], sorted(range(len(lengths)), key=lambda i: lengths[i])
    while rest:
        batches.append([rest.pop(0)])
        while rest and (len(batches[-1]) + 1) * lengths[rest[0]] <= budget:
            batches[-1].append(rest.pop(0))
    return batches


def waste(lengths: list[int], batches: list[list[int]]) -> float:
    """Share of padding in these passes, %."""
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return 100 * (1 - sum(lengths) / padded)


def padding(leaves: list) -> None:
    rng, rows, ratios = random.Random(0), [], []
    long = [min(8192, int(rng.lognormvariate(7.7, 0.8))) + 100 for _ in range(192)]
    for name, lengths, budget in (
        ("a toy step's leaves", [len(s.prompt_ids) + len(s.tokens) for s in leaves], 8192),
        ("192 long responses", long, 32768),
        ("24 of them, a rank's share of 8", long[:24], 32768),
    ):
        ours = token_batches([[Sequence([0], [0] * (n - 1))] for n in lengths], budget)
        plain = [list(range(i, min(i + 8, len(lengths)))) for i in range(0, len(lengths), 8)]
        full = filled(lengths, budget)
        rows.append(
            {
                "sequences": name,
                "token_batches, % padding": waste(lengths, ours),
                "passes": len(ours),
                "filled to the budget, %": waste(lengths, full),
                "their passes": len(full),
                "8 a pass, %": waste(lengths, plain),
            }
        )
        what = f"update, padding of {name}: 8 a pass"
        ratios.append(share(what, waste(lengths, ours), waste(lengths, plain), 5))
    record("update/padding", rows, ratios)


def plain_loss(model, rows: list, total: int) -> torch.Tensor:
    width = max(len(s.prompt_ids) + len(s.tokens) for s in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    old, advantage, mask = torch.zeros(3, len(rows), width - 1)
    for i, s in enumerate(rows):
        a, b = len(s.prompt_ids), len(s.prompt_ids) + len(s.tokens)
        ids[i, :b] = torch.tensor(s.prompt_ids + s.tokens)
        for row, values in ((old, s.logprobs), (advantage, s.advantages), (mask, s.weights)):
            row[i, a - 1 : b - 1] = torch.tensor(values)
    logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (ppo_loss(logp, old, advantage)[0] * mask).sum() / total


def speed(run: Run, leaves: list, repeats: int) -> None:
    model, leaves = run.policy, leaves[:192]
    total, gradients = sum(len(s.tokens) for s in leaves), {}
    steady = dict(lr=0.0, weight_decay=0.0, max_grad_norm=1e9, kl_coef=0.0)
    learner = Learner(model, **steady, token_budget=run.config.token_budget)

    def keep(name: str) -> None:
        gradients[name] = [p.grad.clone() for p in model.parameters()]

    learner.optimizer.step = lambda: keep("ours")  # weights stay

    def ours() -> int:
        learner.train(leaves, 192, seed=0)
        return total

    def plain() -> int:
        model.zero_grad()
        for i in range(0, len(leaves), 8):
            plain_loss(model, leaves[i : i + 8], total).backward()
        keep("plain")
        return total

    cases = {"ours": ours, "plain": plain}
    one, other = (1 / seconds for seconds in interleave(cases, repeats).values())
    gap = max((a - b).abs().max().item() for a, b in zip(gradients["ours"], gradients["plain"]))
    name = "192 leaves of the toy"
    counted = {"Learner, tokens/s": one, "plain loop, tokens/s": other}
    rows = [{"sequences": name} | counted | {"largest difference of gradients": gap}]
    ratio = gain(f"update, {name}: plain loop", one, other, "tokens/s", more=True)
    record("update/speed", rows, [ratio])


def memory(lengths: list[int]) -> None:
    rows, ratios = [], []
    for length in lengths:
        ours, plain = (
            in_new_process(__file__, "--child", case, "--lengths", length)
            for case in ("ours", "plain")
        )
        rows.append(
            {
                "T": length,
                "1,024 positions at a time, MiB": ours,
                "all logits, MiB": plain,
                "one copy of the logits, MiB": length * 151936 * 4 / 2**20,
            }
        )
        if plain:
            what = f"update, T = {length}, 151,936 words: all logits, memory"
            ratios.append(gain(what, ours, plain, "MiB"))
    record("update/memory", rows, ratios)


def many_words_model():
    """Qwen's vocabulary over one narrow layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def child(case: str, length: int) -> float:
    """Extra MiB at the peak of one forward and backward pass."""
    model = many_words_model()
    ids = torch.randint(0, 1000, (length,)).tolist()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def ours(ids: list[int]) -> torch.Tensor:
        row = Sequence(ids[:1], ids[1:])
        return token_logprobs(model, [[row]], 1.0, with_entropy=False)[0]

    def plain(ids: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])

    logprobs = {"ours": ours, "plain": plain}[case]
    logprobs(ids[:8]).sum().backward()  # libraries and thread pools are not what is measured
    return extra_bytes(lambda: logprobs(ids).sum().backward()) / 2**20


def main() -> None:
    parser = command(__doc__, "--lengths 1024 2048")
    parser.add_argument(
        "--repeats", type=positive, default=7, help="timed rounds; the median counts"
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=[1024, 2048, 4096, 8192],
        help="T of the memory table",
    )
    parser.add_argument("--child", choices=("ours", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(child(args.child, args.lengths[0]))
    else:
        run, leaves = toy_leaves()
        padding(leaves)
        speed(run, leaves, args.repeats)
        memory(args.lengths)


if __name__ == "__main__":
    with stop_on_user_error("bench/update.py"):
        main()
