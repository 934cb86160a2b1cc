"""scoring.py: log-probabilities, entropies and FCI of many sequences, batched by length.

The scoring pass computes what a training step needs of its samples: the log-probs of their tokens
at the sampling temperature (PPO's old, or behaviour, log-probs), the entropies, and, for initial
responses, FCI from the same forward pass (fci.py). The update computes its log-probs here, too, so
that both sides of PPO's ratio come from the same code.

`engine_gap`, at the end, checks an engine with a separate copy of the weights: after each weight
sync, it scores a few tokens that the engine samples.

    python -m pytest tests/runtime/test_scoring.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch.utils.checkpoint import checkpoint

from fci import StepAttention, check_bounds, scoring_mode, step_scores
from runtime.cli import UserError
from runtime.dist import everyone, in_step
from runtime.packing import alone, common, lay_out, tree_attention

HEAD_CHUNK = 1024  # positions whose logits exist at once: 1024 x 150k tokens x 4 bytes = 0.6 GB
LOGGED_STEPS = 64  # a picture of more steps does not fit on a screen, and needs megabytes
# Settings of models that multiply or squash their logits, which we do not reproduce
RESCALING = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


@dataclass
class Sequence:
    """Tokens after a prompt, to be scored or trained. `bounds` asks for FCI (None: no FCI);
    `logged` also asks for the attention between steps, which the explorer shows."""

    prompt_ids: list[int]
    tokens: list[int]
    bounds: list[int] | None = None
    logged: bool = False


@dataclass
class Scores:
    """Per token of a Sequence, at the sampling temperature: log-prob and entropy (nats). Per step:
    FCI. attention: `LoggedAttention.of`."""

    logprobs: list[float]
    entropies: list[float]
    fci: list[float] = field(default_factory=list)
    attention: dict | None = None


# --------------------------------------------------------------------------------------------------
# One forward pass
# --------------------------------------------------------------------------------------------------
def output_head(model):
    """The layer that turns hidden states into logits. Raises ValueError for models that rescale
    logits after it."""
    config = model.config.get_text_config()  # of a model that also reads images, the text part
    for name in RESCALING:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__} rescales its logits ({name}), which attnrl does not"
                " reproduce"
            )
    return model.get_output_embeddings()


class TokenLogprobs(torch.nn.Module):
    """A causal model, from ids to log-probs and entropies, as ONE forward pass, so that DDP and
    FSDP2 can wrap it (runtime/dist.py).

    The output head runs only on the predicting positions, HEAD_CHUNK at a time (recomputed in the
    backward pass), so the logits of a long batch over a large vocabulary never exist at once. They
    are divided by the sampling temperature: with untempered log-probs, PPO's ratio would not start
    at 1.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.device = model, model.device
        self.autocast = False  # True: matrix products in bf16 with fp32 weights (bf16 on a CPU)

    def forward(self, ids, ends, parents, nodes, temperature: float, with_entropy: bool):
        """A pass over rows of packing.lay_out: ids (R, T), ends (R, T) or None, parents, nodes (M,)
        -> log-probs and entropies (M,) of the nodes (entropies: None unless asked for)."""
        ids, parents, nodes = (x.to(self.device) for x in (ids, parents, nodes))
        attention = tree_attention(ends if ends is None else ends.to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model.base_model(input_ids=ids, use_cache=False, **attention)
            states = output.last_hidden_state.flatten(0, 1)[parents]  # (R, T, d) -> (M, d)
            return self.chunked(states, ids.flatten()[nodes], temperature, with_entropy)

    def chunked(self, states, targets, temperature: float, with_entropy: bool):
        """states (N, d), targets (N,) -> log-probs and entropies (N,), HEAD_CHUNK at a time."""
        head = output_head(self.model)

        def chunk(states, wanted):
            logits = head(states).float() / temperature  # (n, V)
            normaliser = logits.logsumexp(-1)
            logprobs = logits.gather(-1, wanted[:, None])[:, 0] - normaliser
            if not with_entropy:  # saves two passes over (n, V), and two in the backward pass
                return logprobs, None
            with torch.no_grad():
                probabilities = (logits - normaliser[:, None]).exp()
                return logprobs, normaliser - probabilities.mul(logits).sum(-1)

        parts = []
        for piece in zip(states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
            if torch.is_grad_enabled():
                parts.append(checkpoint(chunk, *piece, use_reentrant=False))
            else:
                parts.append(chunk(*piece))
        logprobs = torch.cat([logprobs for logprobs, _ in parts])
        return logprobs, torch.cat([e for _, e in parts]) if with_entropy else None


def token_logprobs(model, rows: list[list], temperature: float, with_entropy: bool = True) -> tuple:
    """Log-probability and entropy of every token of the sequences, flat: two (N,) tensors in the
    order of the rows and of the sequences in them (None for the entropies without `with_entropy`).

    model: a causal model, or its TokenLogprobs as wrapped by runtime/dist.py. A row of several
    sequences is packed. With no rows (this rank has no work left, but others have): one pass over a
    single token, (1,).
    """
    forward = TokenLogprobs(model) if hasattr(model, "base_model") else model
    *layout, leaves = lay_out(rows or [[Sequence([0], [0])]])
    found = forward(*layout, temperature, with_entropy)
    # a row has shared tokens only once: every leaf gathers the values of its tokens
    return tuple(x if x is None else x[leaves.to(x.device)] for x in found)


# --------------------------------------------------------------------------------------------------
# The scoring pass
# --------------------------------------------------------------------------------------------------
def width(row: list) -> int:
    """The number of tokens in a row of sequences: of each sequence, those that it does not share
    with the one before, as `packing.place` lays them out."""
    whole = [s.prompt_ids + s.tokens for s in row]
    return sum(map(len, whole)) - sum(map(common, whole, whole[1:]))


def token_batches(rows: list[list], token_budget: int) -> list[list[int]]:
    """Indices of rows of sequences, grouped by similar width: rows x widest stays within the budget
    (one row always fits), with at most 5 % padding. Packed rows, which need a mask, and other rows
    are never mixed.

    If passes were filled up to the budget, a fifth would be padding for one rank of 8, which has
    few rows of a mini-batch.
    """
    widths = list(map(width, rows))
    batches: list[list[int]] = []
    filled = 0  # tokens in the last one
    # ascending: the newest row is the widest of its kind
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i]) > 1, widths[i])):
        padded = (len(batches[-1]) + 1) * widths[i] if batches else math.inf
        mixed = batches and (len(rows[batches[-1][0]]) > 1) != (len(rows[i]) > 1)
        if mixed or padded > token_budget or filled + widths[i] < 0.95 * padded:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += widths[i]
    return batches


class LoggedAttention(StepAttention):
    """FCI of all rows, and for some rows what the explorer draws: the attention between steps.

    The attention of step j on step k differs between layers and heads. Kept are the largest
    (`most`), and for each step k that of the layer and head that decide Eq. 6 (`deciding`): its sum
    over the steps j >= k + Delta is the FCI of step k. Both are (R, J, K) for R logged rows.
    """

    def __init__(self, rows: list[int], *batch):
        super().__init__(*batch)
        device, count = self.keys.device, min(self.keys.shape[-1], LOGGED_STEPS)
        self.rows = torch.tensor(rows, device=device)
        self.most = torch.zeros(len(rows), count, count, device=device)
        self.deciding = torch.zeros_like(self.most)
        self.best = torch.zeros(len(rows), count, device=device)  # Eq. 6 so far
        self.decided_by = torch.full((len(rows), count, 2), -1, device=device)  # layer, head

    def collect(self, step_attention, columns: slice) -> None:
        super().collect(step_attention, columns)
        if columns.start:  # all steps of a logged row are in the first block
            return
        count = self.best.shape[-1]
        seen = step_attention[self.rows, :, :count, :count]  # (R, H, J, K)
        self.most = torch.maximum(self.most, seen.amax(1))
        influence, head = (seen * self.later[:count, :count]).sum(2).max(1)  # Eq. 5; both (R, K)
        better = influence > self.best
        index = head[:, None, None].expand(-1, 1, count, -1)
        self.deciding = torch.where(better[:, None], seen.gather(1, index)[:, 0], self.deciding)
        layer = torch.full_like(head, self.layers - 1)
        self.decided_by[better] = torch.stack([layer, head], -1)[better]
        self.best = torch.maximum(self.best, influence)

    def of(self, row: int, steps: int) -> dict | None:
        """{"most", "deciding": rows j of the columns k <= j; "heads": [layer, head] of each step,
        null if no later step counts}; None for a row that is not logged. Numbers have two
        significant digits, not two decimals: attention on a step of 100 tokens is far below
        0.01."""
        found = (self.rows == row).nonzero()
        if not len(found):
            return None
        i = int(found)
        pictures = {
            name: [[float(f"{x:.2g}") for x in values[j, : j + 1].tolist()] for j in range(steps)]
            for name, values in (("most", self.most[i]), ("deciding", self.deciding[i]))
        }
        heads = self.decided_by[i, :steps].tolist()
        return pictures | {"heads": [pair if pair[0] >= 0 else None for pair in heads]}


def collector_of(rows: list[Sequence], delta: int, device) -> StepAttention | None:
    """The collector of FCI for a pass over these rows; None if no row has steps."""
    if not any(s.bounds and len(s.bounds) > 1 for s in rows):
        return None
    batch = (
        [len(s.prompt_ids) for s in rows],
        [s.bounds or [0] for s in rows],
        max(len(s.prompt_ids) + len(s.tokens) for s in rows),
        delta,
        device,
    )
    logged = [
        i for i, s in enumerate(rows) if s.logged and 1 < len(s.bounds or ()) <= LOGGED_STEPS + 1
    ]
    return LoggedAttention(logged, *batch) if logged else StepAttention(*batch)


def score(
    model,
    sequences: list[Sequence],
    temperature: float = 1.0,
    delta: int = 4,
    token_budget: int = 16384,
    packing: Callable = alone,
) -> list[Scores]:
    """The scoring pass: one Scores per sequence, in order; FCI for those that have bounds.

    model: a causal model, or its TokenLogprobs. Sequences may have any length; they are batched by
    length, with at most `token_budget` padded tokens per forward pass. The result does not depend
    on the batch (up to float rounding). packing: sequences to rows (runtime/packing.py), only used
    if no sequence has bounds. With several ranks every rank must call it. Raises ValueError for an
    empty prompt or wrong bounds.
    """
    forward = TokenLogprobs(model) if hasattr(model, "base_model") else model
    for s in sequences:
        if s.bounds is not None:
            check_bounds(s.bounds, len(s.tokens))
    if any(s.bounds is not None for s in sequences):
        packing = alone  # FCI needs one response per row
    results = [Scores([], []) for _ in sequences]
    numbers = packing(sequences)
    rows = [[sequences[i] for i in row] for row in numbers]
    for batch in in_step(token_batches(rows, token_budget)):
        own = [i for r in batch for i in numbers[r]]
        collector = collector_of([sequences[i] for i in own], delta, forward.device)
        with scoring_mode(forward.model, collector):
            logprobs, entropies = token_logprobs(forward, [rows[r] for r in batch], temperature)
        lengths = [len(sequences[i].tokens) for i in own] or [1]
        pieces = zip(own, logprobs.split(lengths), entropies.split(lengths))
        for number, (i, own_logprobs, own_entropies) in enumerate(pieces):
            results[i] = Scores(own_logprobs.tolist(), own_entropies.tolist())
            if collector is not None:
                bounds = sequences[i].bounds or [0]
                results[i].fci = step_scores(collector, number, bounds)
                if isinstance(collector, LoggedAttention):
                    results[i].attention = collector.of(number, len(bounds) - 1)
    return results


def tis_weights(learner: list[float], engine: list[float], cap: float) -> list[float]:
    """Truncated importance sampling (Yao et al. 2025): w = min(exp(learner - engine), cap) for each
    token, from its log-probs in engine and learner, both with the weights that sampled it.

    The engine uses other kernels or another precision than the learner, so it samples from a
    slightly different policy. Two tokens: one with equal log-probs; one that is far less likely in
    the engine, so its weight is truncated:
    >>> tis_weights([-1.0, -1.0], [-1.0, -9.0], cap=2.0)
    [1.0, 2.0]
    """
    return [min(math.exp(min(old - sampled, 20.0)), cap) for old, sampled in zip(learner, engine)]


# --------------------------------------------------------------------------------------------------
# Does the engine sample with the policy's weights?
# --------------------------------------------------------------------------------------------------
def engine_gap(engine, policy, requests: list, tolerance: float) -> float:
    """Check that the engine samples with the policy's weights: mean |log-prob difference| over a
    few tokens that it samples now. Above the tolerance, raises a UserError with both log-probs.
    Every rank must call it (`policy` may be sharded).

    requests: with prefixes that the engine has seen with its OLD weights, so that a stale prefix
    cache is found, too.
    """
    completions = engine.generate(requests) if requests else []
    scores = score(
        policy,
        [Sequence(r.prompt_ids, c.tokens) for r, c in zip(requests, completions)],
        requests[0].temperature if requests else 1.0,
    )
    sampled = [lp for c in completions for lp in c.logprobs]
    learnt = [lp for s in scores for lp in s.logprobs]
    gap = fmean(abs(a - b) for a, b in zip(sampled, learnt)) if sampled else 0.0
    means = (fmean(sampled), fmean(learnt)) if sampled else (0.0, 0.0)
    # all ranks stop or none, so that no rank waits for one that has ended
    ranks = everyone([(gap, *means, len(sampled))])
    if bad := [found for found in ranks if not found[0] <= tolerance]:  # also NaN
        gap, engine_mean, learner_mean, tokens = bad[0]
        raise UserError(
            f"engine and learner disagree after the weight sync: over {tokens} tokens the engine's"
            f" mean log-prob is {engine_mean:.4f}, the learner's {learner_mean:.4f}, mean"
            f" |difference| {gap:.4g}, above --sync_tolerance {tolerance:g}. Likely causes: weights"
            " that did not arrive (a tied output head, a new version of vLLM), KV of the old"
            " weights in the prefix cache, another dtype or temperature, weights that are not"
            " finite"
        )
    return max(found[0] for found in ranks)
