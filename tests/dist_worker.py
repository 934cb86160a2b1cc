"""dist_worker.py: what runtime/test_dist.py computes on several ranks, and without a group in the
test's own process.

    torchrun --nproc_per_node 2 tests/dist_worker.py OUT '{"name": ["group", {"longest": 7}], ...}'

Every rank runs every case, a function of this file with its options; OUT gets {name: [result of
rank 0, of rank 1, ...]}.
"""

import json
import random
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
# the rest is imported where it is used: transformers takes seconds
from runtime import dist  # noqa: E402
from runtime.cli import leave  # noqa: E402


# --------------------------------------------------------------------------------------------------
# The same material in every process
# --------------------------------------------------------------------------------------------------
def model_of(name: str, seed: int = 0):
    """qwen2, qwen2_tied or qwen3, as small as in the other tests; random weights from the seed,
    equal on all ranks."""
    from helpers import tiny_model

    kind, _, tied = name.partition("_")
    return tiny_model(kind, seed, tie_word_embeddings=bool(tied))


def sequences_of(model, lengths: list[int], sign: int = 0, shared: bool = False):
    """Random sequences of these lengths. Behaviour log-probs are up to 0.7 off the policy's own, so
    that ratios go from 0.5 to 2 and some tokens are clipped; importance weights are random. sign:
    that of all advantages; 0: both. shared: two of three begin like the one before."""
    from helpers import random_tokens

    from runtime.scoring import Sequence, score
    from tree import TrainingSequence

    rng = random.Random(7)
    drawn = [
        Sequence(random_tokens(rng, rng.randint(1, 6)), random_tokens(rng, n)) for n in lengths
    ]
    for i, (before, s) in enumerate(zip(drawn, drawn[1:])):
        if shared and i % 3:
            half = min(len(before.tokens), len(s.tokens)) // 2
            s.prompt_ids, s.tokens[:half] = before.prompt_ids, before.tokens[:half]
    return [
        TrainingSequence(
            s.prompt_ids,
            s.tokens,
            [sign * rng.uniform(0.5, 2) if sign else rng.uniform(-2, 2) for _ in s.tokens],
            [lp + rng.uniform(-0.7, 0.7) for lp in own.logprobs],
            [rng.uniform(0.3, 2) for _ in s.tokens],
        )
        for s, own in zip(drawn, score(model, drawn))
    ]


def whole(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in dist.full_weights(model)}


# --------------------------------------------------------------------------------------------------
# Cases
# --------------------------------------------------------------------------------------------------
def group(longest: int) -> dict:
    """`mine`, `everyone(mine(x))` for all lengths, and `in_step` of ranks with 0, 2, 4, ...
    batches."""
    lists = [list(range(n)) for n in range(longest + 1)]
    return dict(
        place=(dist.rank(), dist.world()),
        mine=[dist.mine(x) for x in lists],
        round_trips=[dist.everyone(dist.mine(x)) for x in lists],
        in_step=dist.in_step([[i] for i in range(2 * dist.rank())]),
    )


def update(
    lengths: list[int],
    model: str = "qwen2",
    mini_batch: int = 100,
    token_budget: int = 30,
    sign: int = 0,
    poison: float | None = None,
    adam_lr: float = 0.0,
    max_grad_norm: float = 1e9,
    longest: int = 0,
    shared: bool = False,
    parallel: str = "ddp",
    **spread,
) -> dict:
    """One `Learner.train` on these sequences, with a reference of other weights. Returns the
    statistics, the change of every weight, and how the work was cut up.

    longest: the tokens of a packed row; 0: no packing. shared: as above, and with packed rows.

    SGD with learning rate 1 takes AdamW's place (unless adam_lr), so that the change of the weights
    is the gradient. poison: one advantage of the longest sequence.
    """
    from learner import Learner
    from runtime.packing import alone, pack
    from runtime.scoring import TokenLogprobs, token_batches, width

    policy = model_of(model)
    sequences = sequences_of(policy, lengths, sign, shared or longest > 0)
    if poison is not None:
        max(sequences, key=lambda s: len(s.tokens)).advantages[1] = poison
    # what every rank gets of every mini-batch, by the rule (dist.deal, scoring.token_batches);
    # asserted to be unequal
    packing = partial(pack, longest=longest, hidden=10**6) if longest else alone
    shares = []
    for part in dist.mini_batches(sequences, mini_batch, seed=0):
        rows = [[part[i] for i in row] for row in packing(part)]
        hand = dist.deal([width(row) for row in rows], dist.world())[dist.rank()]
        shares.append([rows[i] for i in hand])

    reference = model_of(model, seed=1).requires_grad_(False)
    placement = dict(device="cpu", parallel=parallel, **spread)
    learner = Learner(
        dist.spread(TokenLogprobs(policy), **placement),
        dist.spread(TokenLogprobs(reference), **placement),
        lr=adam_lr,
        kl_coef=0.1,
        token_budget=token_budget,
        max_grad_norm=max_grad_norm,
        packing=packing,
    )
    if not adam_lr:
        learner.optimizer = torch.optim.SGD(learner.policy.parameters(), lr=1.0)
    passes = []  # types of what a layer inside computes, one entry a forward pass
    policy.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda *call: passes.append(call[2].dtype)
    )
    before = whole(policy)
    stats = learner.train(sequences, mini_batch, seed=0)
    after = whole(policy)
    moments = {
        value.dtype
        for state in learner.optimizer.state.values()
        for value in state.values()
        if value is not None
    }
    return dict(
        stats=vars(stats),
        change={name: before[name] - after[name] for name in before},
        sequences=[sum(map(len, share)) for share in shares],
        packed=[sum(len(row) > 1 for row in share) for share in shares],
        passes=passes,
        batches=[len(token_batches(share, token_budget)) for share in shares],
        poisoned=any(
            not -9 < a < 9 for share in shares for row in share for s in row for a in s.advantages
        ),
        held=sum(getattr(p, "_local_tensor", p).numel() for p in learner.policy.parameters()),
        kept={p.dtype for p in learner.policy.parameters()} | moments,
    )


def scores(model: str, lengths: list[int], at: int | None = None, parallel: str = "ddp") -> list:
    """Scores of random sequences with steps, all computed by rank `at` (None: shared out); the
    others have none."""
    from helpers import random_bounds, random_tokens

    from runtime.scoring import Sequence, TokenLogprobs, score

    rng = random.Random(3)
    drawn = [
        Sequence(
            random_tokens(rng, rng.randint(1, 6)), random_tokens(rng, n), random_bounds(rng, n, 6)
        )
        for n in lengths
    ]
    forward = TokenLogprobs(model_of(model))
    dist.spread(forward, "cpu", parallel)
    share = dist.mine(drawn) if at is None else drawn if at == dist.rank() else []
    return [vars(s) for s in score(forward, share, temperature=0.8, delta=1, token_budget=20)]


def gap(stale: int) -> str:
    """The check after a weight sync, with an engine on rank `stale` that missed it: what each rank
    says."""
    import copy

    from runtime.cli import UserError
    from runtime.rollout import Request, TransformersEngine
    from runtime.scoring import engine_gap

    policy = model_of("qwen2")
    engine = TransformersEngine(
        model_of("qwen2", seed=1) if dist.rank() == stale else copy.deepcopy(policy), [5]
    )
    # a third rank has nothing to check
    requests = [Request([1, 2, 3], 8, 1.0, 0)] if dist.rank() != 2 else []
    try:
        return f"{engine_gap(engine, policy, requests, 1e-4):.5f}"
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    dist.start("cpu")
    results = {
        name: dist.everyone([globals()[function](**options)])
        for name, (function, options) in json.loads(sys.argv[2]).items()
    }
    if dist.rank() == 0:
        torch.save(results, sys.argv[1])
    dist.stop()
    leave(0)
