"""fci.py: cut a response into steps and score every step by the attention that later steps pay to
it.

Forward Context Influence (FCI) is the compass of AttnRL (arXiv 2509.26628): a step that many later
steps look back to is a step where another decision leads to another solution, so that is where
`tree.py` branches. ONE forward pass over a batch of complete responses gives all that a step of
training needs to know of them: the log-probabilities of the tokens at the sampling temperature (the
"old" or behaviour log-probs of PPO), the entropies, and FCI.

Equations (AttnRL), each at the line that computes it:
    Eq. 4   A^{l,h}[j, k] = mean over queries q in step j, mean over keys s in step k of
            alpha^{l,h}[q, s]
    Eq. 5   y^{l,h}[k]    = sum over j >= k + Delta of A^{l,h}[j, k]
    Eq. 6   y[k]          = max over layers l and heads h of y^{l,h}[k];  y[0] = 0 (the authors'
                          code)

How attention is averaged without storing it: attention computes alpha @ V and never shows alpha.
Put the step indicator E in the place of V (E[s, k] = 1 if token s is in step k) and the same fused
kernel returns alpha @ E: for every query the attention mass on every step. No T x T matrix exists
for any head. transformers' attention registry hands our function the rotated queries and keys of
every layer of any decoder, so no model code is copied or patched.

Left out: attention variants whose probabilities the plain softmax does not give (soft-capping,
attention sinks) and models that rescale their logits; both are refused with a ValueError, because
scores for them would be silently wrong.

    python fci.py --model toy/model --problem "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"
    --plot fci.png
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist import in_step
from errors import UserError, first_line, stop_on_user_error

ATTENTION_NAME = "attnrl_fci"
HEAD_CHUNK = 1024  # positions whose logits exist at once: 1024 x 150k words x 4 bytes = 0.6 GB


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Separators:
    """Token ids that end a step, precomputed from the vocabulary; `think_end` is the id of
    "</think>", if it has one."""

    double: frozenset[int]
    single: frozenset[int]
    think_end: int | None = None


def separator_tokens(tokenizer) -> Separators:
    r"""Find every token whose text holds a blank line ("\n\n", also merges such as ".\n\n"), and
    those with one newline."""
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return Separators(
        double=frozenset(i for i, text in zip(ids, texts) if "\n\n" in text),
        single=frozenset(i for i, text in zip(ids, texts) if "\n" in text),
        think_end=tokenizer.get_vocab().get("</think>"),
    )


def split_steps(tokens: list[int], separators: Separators) -> list[int]:
    """Bounds [0, ..., len(tokens)]: step k is tokens[bounds[k]:bounds[k + 1]]; a separator belongs
    to the step it closes.

    Token based, so that bounds index the tokens that were sampled and never a re-tokenised text.
    Without blank lines single newlines separate; without those either the response is one step
    (which is never branched).
    >>> split_steps([5, 9, 5, 5, 9, 5], Separators(double=frozenset({9}), single=frozenset({8, 9})))
    [0, 2, 5, 6]
    """
    for ends in (separators.double, separators.single):
        cuts = [i + 1 for i, token in enumerate(tokens) if token in ends]
        if cuts:
            break
    return sorted({0, *cuts, len(tokens)})


def prl_steps(tokens: list[int], separators: Separators, ends: str, length: int = 256) -> list[int]:
    """Bounds of PRL's steps: `length` tokens each, or closed by a "newline" or a "blank" line,
    whichever `ends` says.

    >>> separators = Separators(double=frozenset({9}), single=frozenset({8, 9}))
    >>> prl_steps([5, 9, 5, 8, 5], separators, "blank")
    [0, 2, 5]
    """
    closing = {"newline": separators.single, "blank": separators.double}.get(ends)
    cuts = (
        range(length, len(tokens), length)
        if closing is None
        else (i + 1 for i, t in enumerate(tokens) if t in closing)
    )
    return sorted({0, *cuts, len(tokens)})


def without_answer(
    fci: list[float], tokens: list[int], bounds: list[int], separators: Separators
) -> tuple[list[float], int]:
    """(scores, number of leading steps that may be branch points): for reasoning models the step of
    the last "</think>" and those of the final answer after it score 0 and never are (as in the
    authors' code)."""
    count = len(bounds) - 1
    if separators.think_end in tokens:
        last = len(tokens) - 1 - tokens[::-1].index(separators.think_end)
        count = sum(end <= last for end in bounds[1:])
    return fci[:count] + [0.0] * len(fci[count:]), count


# --------------------------------------------------------------------------------------------------
# FCI inside the attention function
# --------------------------------------------------------------------------------------------------
def indicator_width(steps: int, depth: int) -> int:
    """Columns of E in one call of the attention kernel, which wants V as wide as Q and K (`depth`),
    and no wider than 256."""
    return max(depth, 8 * math.ceil(steps / math.ceil(steps / 256) / 8))


class StepAttention:
    """Collects FCI for one padded batch while its forward pass runs: one call of `add` per layer.

    prompt_lengths and bounds: one entry per row; width: padded length T. After the pass `fci[b, k]`
    is Eq. 6.
    """

    def __init__(
        self, prompt_lengths: list[int], bounds: list[list[int]], width: int, delta: int, device
    ):
        steps = max(len(row) for row in bounds) - 1
        # (B, T), built on the CPU; `steps` = in no step
        step_of = torch.full((len(bounds), width), steps)
        for b, (start, row) in enumerate(zip(prompt_lengths, bounds)):
            step_of[b, start : start + row[-1]] = torch.arange(len(row) - 1).repeat_interleave(
                torch.tensor(row).diff()
            )
        # E, (B, T, K), 0 or 1
        self.keys = torch.nn.functional.one_hot(step_of.to(device), steps + 1)[..., :steps].float()
        # (B, K) tokens per step; prompt and padding are in no step
        lengths = self.keys.sum(1).clamp(min=1)
        self.key_mean = 1 / lengths
        self.query_mean = (self.keys / lengths[:, None]).transpose(1, 2)  # (B, K, T)
        index = torch.arange(steps, device=device)
        # (J, K): step j is at least Delta after step k
        self.later = (index[:, None] >= index[None] + delta).float()
        self.fci = torch.zeros(len(bounds), steps, device=device)
        self.layers = 0  # that came by

    def add(self, module, query, key, attention_mask, **attention_kwargs) -> None:
        """query (B, H, T, D) and key (B, Hkv, T, D) of one layer, rotated as the model uses
        them."""
        self.layers += 1
        depth, kv_heads, steps = key.shape[-1], key.shape[1], self.keys.shape[-1]
        width = indicator_width(steps, depth)
        if width > depth:  # zeros change no logit; the scale is that of the model's own width
            query, key = (torch.nn.functional.pad(x, (0, width - depth)) for x in (query, key))
            attention_kwargs["scaling"] = attention_kwargs.get("scaling") or depth**-0.5
        for k in range(0, steps, width):
            columns = self.keys[..., k : k + width].to(query.dtype)
            block = columns.shape[-1]
            columns = torch.nn.functional.pad(columns, (0, width - block))[:, None].expand(
                -1, kv_heads, -1, -1
            )
            mass, _ = sdpa_attention_forward(
                module, query, key, columns, attention_mask, **attention_kwargs
            )
            mass = mass[..., :block].float()  # (B, T, H, block): alpha @ E
            step_attention = torch.einsum("bjt,bthk->bhjk", self.query_mean, mass)
            # AttnRL Eq. 4, (B, H, J, block)
            step_attention *= self.key_mean[:, None, None, k : k + block]
            # AttnRL Eq. 5, (B, H, block)
            influence = (step_attention * self.later[:, k : k + block]).sum(2)
            best = self.fci[:, k : k + block]
            # AttnRL Eq. 6: max over heads, and over layers so far
            torch.maximum(best, influence.amax(1), out=best)


# the registry passes no context, so the running collection is module state
_collector: StepAttention | None = None


def fci_attention(module, query, key, value, attention_mask, **kwargs):
    """Plain SDPA, which also feeds the running StepAttention. Registered as an attention
    implementation."""
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise ValueError(
            "FCI knows plain softmax attention only; this model uses attention sinks or"
            " soft-capping"
        )
    output = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if _collector is not None:
        _collector.add(module, query, key, attention_mask, **kwargs)
    return output


AttentionInterface.register(ATTENTION_NAME, fci_attention)
# Without a mask function under the same name transformers passes no mask: sliding windows would
# vanish silently.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def scoring_mode(model, collector: StepAttention | None = None):
    """Run the model in evaluation mode, without gradients and with our attention; it leaves as it
    came, errors included."""
    global _collector
    config, modes = model.config, [(module, module.training) for module in model.modules()]
    before = {"": config._attn_implementation}
    before |= {
        name: getattr(config, name)._attn_implementation
        for name in config.sub_configs
        if getattr(config, name)
    }
    try:
        model.eval()
        if collector is not None:
            model.set_attn_implementation(ATTENTION_NAME)
            if config._attn_implementation != ATTENTION_NAME:
                raise ValueError(
                    f"{type(model).__name__} does not use transformers' attention registry: no FCI"
                    " for it"
                )
        _collector = collector
        with torch.no_grad():
            yield
        if collector is not None and collector.layers == 0:
            raise ValueError(
                f"no attention layer of {type(model).__name__} passed through the registry: no FCI"
                " for it"
            )
    finally:
        _collector = None
        for module, mode in modes:
            module.training = mode
        # last: transformers may refuse, for models that have no settable attention
        if collector is not None:
            model.set_attn_implementation(before)


# --------------------------------------------------------------------------------------------------
# Log-probabilities and the scoring pass
# --------------------------------------------------------------------------------------------------
@dataclass
class Sequence:
    """What is scored or trained: tokens after a prompt. `bounds` asks for FCI (None: a
    continuation, no FCI)."""

    prompt_ids: list[int]
    tokens: list[int]
    bounds: list[int] | None = None


@dataclass
class Scores:
    """Per token of a Sequence, at the sampling temperature: log-probability and entropy (nats). Per
    step: FCI."""

    logprobs: list[float]
    entropies: list[float]
    fci: list[float] = field(default_factory=list)


def pad_right(sequences: list) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, predicts), both (B, T); predicts[b, t] is True where the NEXT token is one of the
    sequence's tokens.

    Padding (id 0) comes last, so in a causal model no real token sees it: no mask is needed, and no
    token id is special.
    """
    if not all(s.prompt_ids for s in sequences):
        raise ValueError(
            "a sequence needs at least one prompt token: nothing predicts its first token"
        )
    width = max(len(s.prompt_ids) + len(s.tokens) for s in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    predicts = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, s in enumerate(sequences):
        start, end = len(s.prompt_ids), len(s.prompt_ids) + len(s.tokens)
        ids[row, :end] = torch.tensor(s.prompt_ids + s.tokens)
        predicts[row, start - 1 : end - 1] = True
    return ids, predicts


def output_head(model):
    """The layer that turns hidden states into logits. Raises ValueError for models that rescale
    logits after it."""
    # of a model that also sees images, the part that writes
    config = model.config.get_text_config()
    for name in (
        "final_logit_softcapping",
        "logit_scale",
        "logits_scaling",
        "lm_head_multiplier",
        "output_multiplier",
    ):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"{type(model).__name__} rescales its logits ({name}), which attnrl does not"
                " reproduce"
            )
    return model.get_output_embeddings()


class TokenLogprobs(torch.nn.Module):
    """A causal model and what is wanted of its logits as ONE forward pass, which is what DDP and
    FSDP2 wrap (dist.py).

    The output head runs on the trained positions only and HEAD_CHUNK at a time (recomputed in the
    backward pass), so the logits of a long batch over a large vocabulary never exist at once.
    Divided by the temperature, as they were sampled: training on untempered log-probs would start
    with a ratio that is not 1.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, ids, predicts, temperature: float, with_entropy: bool):
        """ids, predicts (B, T) of `pad_right` -> log-probs and entropies (N,) of the predicted
        tokens."""
        ids, predicts = ids.to(self.device), predicts.to(self.device)
        # (B, T, d)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        targets = ids.roll(-1, dims=1)[predicts]  # (N,)
        head = output_head(self.model)

        def chunk_logprobs(states, wanted):
            logits = head(states).float() / temperature  # (n, V)
            normaliser = logits.logsumexp(-1)
            logprobs = logits.gather(-1, wanted[:, None])[:, 0] - normaliser
            # the update has no use for it: two more passes over (n, V), and again in the backward
            # pass
            if not with_entropy:
                return logprobs, None
            with torch.no_grad():
                return logprobs, normaliser - (logits - normaliser[:, None]).exp().mul(logits).sum(
                    -1
                )

        parts = [
            (
                checkpoint(chunk_logprobs, states, wanted, use_reentrant=False)
                if torch.is_grad_enabled()
                else chunk_logprobs(states, wanted)
            )
            for states, wanted in zip(hidden[predicts].split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
        ]
        return torch.cat([p[0] for p in parts]), (
            torch.cat([p[1] for p in parts]) if with_entropy else None
        )


def token_logprobs(model, sequences: list, temperature: float, with_entropy: bool = True) -> tuple:
    """Log-probability and entropy of every token of the sequences, flat: two (N,) tensors in the
    order of the sequences (None for the entropies without `with_entropy`). model: a causal model,
    or its TokenLogprobs as dist.py wrapped it.

    No sequences at all (this rank has run out of work, the others have not): one pass over a single
    token, (1,).
    """
    forward = TokenLogprobs(model) if hasattr(model, "base_model") else model
    return forward(*pad_right(sequences or [Sequence([0], [0])]), temperature, with_entropy)


def token_batches(sequences: list, token_budget: int) -> list[list[int]]:
    """Indices grouped by similar length: rows x longest stays within the budget (one row always
    fits), at most 5 % of it padding. (Passes filled to the budget would be a fifth padding for a
    rank of 8, which has few rows of a mini-batch.)"""
    lengths = [len(s.prompt_ids) + len(s.tokens) for s in sequences]
    batches: list[list[int]] = []
    filled = 0  # tokens in the last one
    # ascending: the newest row is the longest
    for i in sorted(range(len(sequences)), key=lambda i: lengths[i]):
        padded = (len(batches[-1]) + 1) * lengths[i] if batches else math.inf
        if padded > token_budget or filled + lengths[i] < 0.95 * padded:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += lengths[i]
    return batches


def score(
    model,
    sequences: list[Sequence],
    temperature: float = 1.0,
    delta: int = 4,
    token_budget: int = 16384,
) -> list[Scores]:
    """The scoring pass: one Scores per sequence, in order; FCI for those that have bounds.

    model: a causal model, or its TokenLogprobs. Sequences of any lengths; they are batched by
    length with at most `token_budget` padded tokens a forward pass. The result does not depend on
    the batch (up to float rounding). With several ranks every rank must call it. Raises ValueError
    on an empty prompt or wrong bounds.
    """
    forward = TokenLogprobs(model) if hasattr(model, "base_model") else model
    for s in sequences:
        if s.bounds is not None and (
            s.bounds[:1] != [0]
            or s.bounds[-1] != len(s.tokens)
            or any(a >= b for a, b in zip(s.bounds, s.bounds[1:]))
        ):
            raise ValueError(
                f"bounds must rise strictly from 0 to the {len(s.tokens)} response tokens, got"
                f" {s.bounds}"
            )
    results = [Scores([], []) for _ in sequences]
    for batch in in_step(token_batches(sequences, token_budget)):
        rows = [sequences[i] for i in batch]
        collector = None
        if any(s.bounds and len(s.bounds) > 1 for s in rows):
            width = max(len(s.prompt_ids) + len(s.tokens) for s in rows)
            collector = StepAttention(
                [len(s.prompt_ids) for s in rows],
                [s.bounds or [0] for s in rows],
                width,
                delta,
                forward.device,
            )
        with scoring_mode(forward.model, collector):
            logprobs, entropies = token_logprobs(forward, rows, temperature)
        lengths = [len(s.tokens) for s in rows] or [1]
        for row, (i, lp, entropy) in enumerate(
            zip(batch, logprobs.split(lengths), entropies.split(lengths))
        ):
            results[i] = Scores(lp.tolist(), entropy.tolist())
            steps = len(sequences[i].bounds or [0]) - 1
            # the first step scores 0 and is never a branch point
            if collector is not None and steps:
                results[i].fci = [0.0, *collector.fci[row, 1:steps].tolist()]
    return results


def fci_scores(
    model, prompt_ids: list[int], response_ids: list[int], bounds: list[int], delta: int = 4
) -> list[float]:
    """FCI of one response, one float per step (AttnRL Eq. 4-6); the first step and the last `delta`
    steps score 0.

    bounds = [0, ..., len(response_ids)]; step k is response_ids[bounds[k]:bounds[k + 1]]. Raises
    ValueError for bounds that do not rise from 0 to the response's length and for an empty prompt.
    """
    return score(
        model, [Sequence(list(prompt_ids), list(response_ids), list(bounds))], delta=delta
    )[0].fci


def check_model(model, path: str) -> None:
    """Raises UserError for a model whose log-probs or FCI would be wrong or are not finite, before
    anything is sampled."""
    try:
        found = torch.tensor(
            score(model, [Sequence([0], [0, 0, 0], [0, 1, 2, 3])], delta=1)[0].logprobs
        )
        with scoring_mode(model):
            logits = model(torch.zeros(1, 4, dtype=torch.long, device=model.device)).logits[0, :3]
    except Exception as error:  # ours, and what a model that is built in another way says
        raise UserError(f"--model {path}: {first_line(error)}") from error
    if not found.isfinite().all():
        raise UserError(
            f"--model {path}: its log-probs are not finite, its weights are damaged (a checkpoint:"
            " remove it)"
        )
    if not torch.allclose(logits.float().log_softmax(-1)[:, 0].cpu(), found, atol=1e-3):
        raise UserError(
            f"--model {path}: rescales its hidden states or logits, which attnrl does not reproduce"
        )


# the command needs the files that come after this one, so it is in view.py
if __name__ == "__main__":
    import sys

    import view

    with stop_on_user_error("fci.py"):
        view.show_fci(sys.argv[1:])
