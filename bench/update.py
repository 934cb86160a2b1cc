"""bench/update.py: the update's padding, speed and memory, and what computing shared prefixes once
would save.

    python bench/update.py

1. Padding: share of the passes' tokens that is padding, with `fci.token_batches` (rows of similar
   length, at most 5 % padding a pass), with passes of sorted rows filled up to the budget, and in
   the order in which the sequences come, 8 a pass. Lengths: a toy step's leaves; and 192 responses
   of log-normal length, mean about 2,900 tokens and at most 8,192, which is what reasoning models
   look like.
2. Speed: one optimizer step on 192 of those leaves, `Learner.update` against a plain loop: 8
   sequences a pass in the order they come, all logits, log_softmax, gather. Trained tokens per
   second, and the largest difference between the two gradients.
3. Memory: forward and backward pass over one sequence of T tokens, vocabulary 151,936 (Qwen's), one
   narrow layer, so that the logits are what costs: `TokenLogprobs` (1,024 positions at a time)
   against all logits at once.
4. Shared prefixes: tokens of the leaves of one mini-batch, as learner.mini_batches deals them out,
   against tokens of its prefix trees (each shared prefix once): the most that packing trees into
   rows could save. It is counted, not built: mini-batches are drawn from all leaves of a step, so
   few leaves of a tree meet in one, and the mask of a packed tree takes the causal kernel away.
   Beside the toy's: 64 problems with the paper's 6 trees of 5 leaves, branched at a quarter and at
   half.
"""

import argparse
import random

import torch
from measure import command, extra_bytes, gain, in_new_process, interleave, positive, record, share

from attnrl import Trainer, parse_config
from errors import stop_on_user_error
from fci import Sequence, token_batches, token_logprobs
from learner import Learner, mini_batches, ppo_loss
from runlog import Display


def toy_leaves() -> tuple[Trainer, list]:
    """One training step's sequences, sampled for real."""
    trainer = Trainer(parse_config(["--test_problems", "toy:8:4:2"]), Display(1, quiet=True))
    batch = trainer.new_batch(1)
    trainer.sample(None, batch)
    trainer.sample(batch, None)
    return trainer, trainer.sequences(batch)


def padding(leaves: list) -> None:
    rng, rows, ratios = random.Random(0), [], []
    long = [min(8192, int(rng.lognormvariate(7.7, 0.8))) + 100 for _ in range(192)]
    for name, lengths, budget in (
        ("a toy step's leaves", [len(s.prompt_ids) + len(s.tokens) for s in leaves], 8192),
        ("192 long responses", long, 32768),
        ("24 of them, a rank's share of 8", long[:24], 32768),
    ):

        def waste(batches):
            padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
            return 100 * (1 - sum(lengths) / padded)

        ours = token_batches([Sequence([0], [0] * (n - 1)) for n in lengths], budget)
        plain = [list(range(i, min(i + 8, len(lengths)))) for i in range(0, len(lengths), 8)]
        # sorted, and filled up to the budget
        full, rest = [], sorted(range(len(lengths)), key=lambda i: lengths[i])
        while rest:
            full.append([rest.pop(0)])
            while rest and (len(full[-1]) + 1) * lengths[rest[0]] <= budget:
                full[-1].append(rest.pop(0))
        rows.append(
            {
                "sequences": name,
                "token_batches, % padding": waste(ours),
                "passes": len(ours),
                "filled to the budget, %": waste(full),
                "their passes": len(full),
                "8 a pass, %": waste(plain),
            }
        )
        ratios.append(share(f"update, padding of {name}: 8 a pass", waste(ours), waste(plain), 5))
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


def speed(trainer: Trainer, leaves: list, repeats: int) -> None:
    model, leaves = trainer.policy, leaves[:192]
    total, gradients = sum(len(s.tokens) for s in leaves), {}
    learner = Learner(
        model,
        lr=0.0,
        weight_decay=0.0,
        max_grad_norm=1e9,
        kl_coef=0.0,
        token_budget=trainer.config.token_budget,
    )
    # weights stay
    learner.optimizer.step = lambda: gradients.update(
        ours=[p.grad.clone() for p in model.parameters()]
    )

    def ours():
        learner.train(leaves, 192, seed=0)
        return total

    def plain():
        model.zero_grad()
        for i in range(0, len(leaves), 8):
            plain_loss(model, leaves[i : i + 8], total).backward()
        gradients["plain"] = [p.grad.clone() for p in model.parameters()]
        return total

    seconds = interleave({"ours": ours, "plain": plain}, repeats)
    gap = max((a - b).abs().max().item() for a, b in zip(gradients["ours"], gradients["plain"]))
    rows = [
        {
            "sequences": "192 leaves of the toy",
            "Learner, tokens/s": 1 / seconds["ours"],
            "plain loop, tokens/s": 1 / seconds["plain"],
            "largest difference of gradients": gap,
        }
    ]
    record(
        "update/speed",
        rows,
        [
            gain(
                "update, 192 leaves of the toy: plain loop",
                1 / seconds["ours"],
                1 / seconds["plain"],
                "tokens/s",
                more=True,
            )
        ],
    )


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
            ratios.append(
                gain(f"update, T = {length}, 151,936 words: all logits, memory", ours, plain, "MiB")
            )
    record("update/memory", rows, ratios)


def child(case: str, length: int) -> float:
    """Extra MiB at the peak of one forward and backward pass."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
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
    )
    ids = torch.randint(0, 1000, (length,)).tolist()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def run(ids: list[int]):
        if case == "ours":
            return (
                token_logprobs(model, [Sequence(ids[:1], ids[1:])], 1.0, with_entropy=False)[0]
                .sum()
                .backward()
            )
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).sum().backward()

    run(ids[:8])
    return extra_bytes(lambda: run(ids)) / 2**20


def prefixes(trainer: Trainer, leaves: list) -> None:
    def shares(name: str, rows: list[tuple], size: int) -> dict:
        batches = mini_batches(len(rows), size, seed=0)
        tree = sum(
            len({row[:t] for row in (rows[i] for i in batch) for t in range(1, len(row) + 1)})
            for batch in batches
        )
        return {
            "leaves": name,
            "number": len(rows),
            "mini-batches": len(batches),
            "tokens": sum(map(len, rows)),
            "with each prefix once": tree,
            "saved at most, %": 100 * (1 - tree / sum(map(len, rows))),
        }

    toy = [tuple(s.prompt_ids + s.tokens) for s in leaves]
    paper, new = [], iter(range(10**9))
    take = lambda n: tuple(next(new) for _ in range(n))  # noqa: E731  all tokens differ
    for _ in range(64):  # a token here is 40 of the paper's
        prompt = take(4)
        for _ in range(6):
            response = prompt + take(72)
            paper += [response] + [
                response[: 4 + at] + take(72 - at) for at in (18, 36) for _ in range(2)
            ]
    record(
        "update/prefixes",
        [
            shares("a toy step's", toy, trainer.config.mini_batch),
            shares("the same, one mini-batch", toy, 10**6),
            shares("the paper's shape", paper, 192),
            shares("the same, one mini-batch", paper, 10**6),
        ],
        [],
    )


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
        trainer, leaves = toy_leaves()
        padding(leaves)
        prefixes(trainer, leaves)
        speed(trainer, leaves, args.repeats)
        memory(args.lengths)


if __name__ == "__main__":
    with stop_on_user_error("bench/update.py"):
        main()
