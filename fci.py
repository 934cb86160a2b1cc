"""fci.py: cut a response into steps and score every step by the attention that later steps pay it.

Forward Context Influence (FCI) is the compass of AttnRL (arXiv 2509.26628): if many later steps
attend to a step, another decision there leads to another solution, so `tree.py` branches there. One
forward pass over a complete response gives the scores of all its steps.

Equations (AttnRL), each at the line that computes it:

    Eq. 4         alpha^{l,h}[q, s]: the softmax attention of query q on key s, in layer l, head h
    (unnumbered)  A^{l,h}[j, k] = mean over q in step j and over s in step k of alpha^{l,h}[q, s]
    Eq. 5         y^{l,h}[k] = sum over j >= k + Delta of A^{l,h}[j, k]
    Eq. 6         y[k] = max over layers l and heads h of y^{l,h}[k]

The first step scores 0 (the authors' code), and so do the last Delta steps (Eq. 5 has no terms).

How attention is averaged without storing it: a fused kernel computes alpha @ V and never returns
alpha. With the step indicator E in the place of V (E[s, k] = 1 if token s is in step k), the same
kernel returns alpha @ E: for every query, the attention mass on every step. No head stores a T x T
matrix. transformers' attention registry gives our function the rotated queries and keys of every
layer of any decoder, so no model code is copied or patched.

Left out: attention that is not a plain softmax (soft-capping, attention sinks). It is refused with
a ValueError, because the scores would be silently wrong.

    python -m tools.show_fci --model toy/model --delta 1 --problem "a=4;b=a-2;c=b+b;d=7;e=d+c;?e"
    python -m pytest tests/test_fci.py
"""

import math
import re
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION_NAME = "attnrl_fci"


# -------- Steps ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Separators:
    """The text of every token of a vocabulary. `texts`: bytes, because a token may be only a part
    of a character; `special`: the ids of special tokens (end of sequence, chat marks)."""

    texts: dict[int, bytes]
    special: frozenset[int] = frozenset()

    def read(self, tokens: list[int]) -> tuple[bytes, list[int]]:
        """(the joined text of the tokens, the offset in it at which each token ends)."""
        texts = [self.texts.get(t, b"") for t in tokens]  # padded vocabularies: ids without a text
        return b"".join(texts), list(accumulate(map(len, texts)))

    def blank(self, tokens: list[int]) -> bool:
        """True if there are only white space and special tokens, or no tokens at all."""
        text, _ = self.read([t for t in tokens if t not in self.special])
        return not text.decode(errors="replace").strip()


def separator_tokens(tokenizer) -> Separators:
    r"""Read the whole vocabulary once. "\n" is written "Ċ" by byte-level tokenizers (GPT-2, Qwen,
    Llama-3) and <0x0A> by those with byte fallback (Llama-2), where "▁" is a space."""
    vocabulary = tokenizer.get_vocab()
    newline = [i for piece, i in vocabulary.items() if "Ċ" in piece][:1]
    if "\n" in tokenizer.decode(newline):  # elsewhere "Ċ" is a Maltese letter
        chars = {ord(char): byte for byte, char in bytes_to_unicode().items()}
        texts = {i: p.translate(chars).encode("latin-1", "replace") for p, i in vocabulary.items()}
    else:
        texts = {i: p.replace("▁", " ").encode() for p, i in vocabulary.items()}
        for byte in range(256):
            if (i := vocabulary.get(f"<0x{byte:02X}>")) is not None:
                texts[i] = bytes([byte])
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return Separators(texts, frozenset(special))


def split_steps(tokens: list[int], separators: Separators) -> list[int]:
    r"""Bounds [0, ..., len(tokens)] of the steps of a response: step k is
    tokens[bounds[k]:bounds[k + 1]]. Steps end at blank lines, or at single newlines if there is no
    blank line. A response without newlines is one step, which AttnRL never branches.

    >>> table = Separators({0: b"Add", 1: b"\n", 2: b".\r\n\r\n", 3: b"</s>"}, frozenset({3}))
    >>> split_steps([0, 1, 1, 1, 0, 1, 0, 2, 0, 1, 1, 3], table)
    [0, 4, 8, 12]
    >>> split_steps([0, 1, 0, 3], table), split_steps([0, 0, 3], table)
    ([0, 2, 4], [0, 3])
    """
    blank_line = re.search(rb"\n\r?\n", separators.read(tokens)[0])
    return cut_at_newlines(tokens, separators, 2 if blank_line else 1)


def cut_at_newlines(tokens: list[int], separators: Separators, newlines: int) -> list[int]:
    r"""Bounds of steps that end at a run of at least `newlines` newlines ("\n" or "\r\n").

    A run may be part of one token or spread over several, so the search is in the joined text. The
    bounds still index the sampled tokens; no text is tokenised again. A step includes its
    separator: it ends with the token that contains the last newline of the run, whatever else that
    token contains. White space or special tokens alone are not a step: they belong to the next
    step, or at the end to the last one.
    """
    text, ends = separators.read(tokens)
    bounds, start = [0], 0  # start: of the piece that the next run ends
    for run in re.finditer(rb"(?:\r?\n){%d,}" % newlines, text):
        cut = bisect_left(ends, run.end()) + 1
        if not separators.blank(tokens[start:cut]):
            bounds.append(cut)
        start = cut
    if len(bounds) > 1 and separators.blank(tokens[start:]):
        bounds.pop()
    return [*bounds, len(tokens)] if tokens else [0]


def without_answer(
    fci: list[float], tokens: list[int], bounds: list[int], separators: Separators
) -> tuple[list[float], int]:
    """(scores, number of leading steps that may be branch points). In reasoning models the step
    with the last "</think>" (one token or several) and the steps after it, the final answer, score
    0 and are never branch points (as in the authors' code)."""
    count = len(bounds) - 1
    text, ends = separators.read(tokens)
    if (mark := text.rfind(b"</think>")) >= 0:
        token = bisect_right(ends, mark)  # the one with the "<"
        count = sum(end <= token for end in bounds[1:])
    return fci[:count] + [0.0] * len(fci[count:]), count


# -------- FCI inside the attention function ------------------------------------------------------
def indicator_width(steps: int, depth: int) -> int:
    """Columns of E in one call of the attention kernel, which needs V at least as wide as Q and K
    (`depth`), at most 256, and a multiple of 8: 300 steps take two calls of 152 columns."""
    return max(depth, 8 * math.ceil(steps / math.ceil(steps / 256) / 8))


class StepAttention:
    """Computes FCI for one padded batch during its forward pass: every layer calls `add` once.

    prompt_lengths and bounds: one entry per row; width: padded length T. After the pass
    `fci[b, k]` is Eq. 6.
    """

    def __init__(
        self, prompt_lengths: list[int], bounds: list[list[int]], width: int, delta: int, device
    ):
        steps = max(len(row) for row in bounds) - 1
        # (B, T), built on the CPU; tokens that are in no step have the number `steps`
        step_of = torch.full((len(bounds), width), steps)
        for b, (start, row) in enumerate(zip(prompt_lengths, bounds)):
            numbers, sizes = torch.arange(len(row) - 1), torch.tensor(row).diff()
            step_of[b, start : start + row[-1]] = numbers.repeat_interleave(sizes)
        indicator = torch.nn.functional.one_hot(step_of.to(device), steps + 1)
        self.keys = indicator[..., :steps].float()  # E, (B, T, K), 0 or 1
        lengths = self.keys.sum(1).clamp(min=1)  # (B, K); prompt and padding are in no step
        self.key_mean = 1 / lengths
        self.query_mean = (self.keys / lengths[:, None]).transpose(1, 2)  # (B, K, T)
        index = torch.arange(steps, device=device)
        self.later = (index[:, None] >= index[None] + delta).float()  # (J, K): j >= k + Delta
        self.fci = torch.zeros(len(bounds), steps, device=device)
        self.layers = 0  # how many have called `add`

    def add(self, module, query, key, attention_mask, **kwargs) -> None:
        """Add one layer: query (B, H, T, D), key (B, Hkv, T, D), rotated as the model uses them."""
        self.layers += 1
        depth, kv_heads, steps = key.shape[-1], key.shape[1], self.keys.shape[-1]
        width = indicator_width(steps, depth)
        if width > depth:  # zeros change no logit; the scale stays that of the unpadded width
            query, key = (torch.nn.functional.pad(x, (0, width - depth)) for x in (query, key))
            kwargs["scaling"] = kwargs.get("scaling") or depth**-0.5
        for k in range(0, steps, width):
            columns = self.keys[..., k : k + width].to(query.dtype)
            block = columns.shape[-1]
            columns = torch.nn.functional.pad(columns, (0, width - block))
            columns = columns[:, None].expand(-1, kv_heads, -1, -1)  # (B, Hkv, T, width)
            # AttnRL Eq. 4 is the kernel's softmax; with E in the place of V it gives alpha @ E
            mass, _ = sdpa_attention_forward(module, query, key, columns, attention_mask, **kwargs)
            mass = mass[..., :block].float()  # (B, T, H, block)
            # "aggregating" (unnumbered): the mean over the queries of step j and the keys of step k
            step_attention = torch.einsum("bjt,bthk->bhjk", self.query_mean, mass)
            step_attention *= self.key_mean[:, None, None, k : k + block]  # (B, H, J, block)
            self.collect(step_attention, slice(k, k + block))

    def collect(self, step_attention, columns: slice) -> None:
        """step_attention (B, H, J, block): one layer's attention on the steps in `columns`."""
        # AttnRL Eq. 5: the sum over steps at least Delta later, (B, H, block)
        influence = (step_attention * self.later[:, columns]).sum(2)
        best = self.fci[:, columns]
        # AttnRL Eq. 6: the max over heads, and over the layers so far
        torch.maximum(best, influence.amax(1), out=best)


# The registry passes no context to the attention function, so this is module state.
_collector: StepAttention | None = None


def fci_attention(module, query, key, value, attention_mask, **kwargs):
    """An attention implementation: plain SDPA that also feeds the active StepAttention."""
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise ValueError("FCI is for plain softmax attention: no attention sinks, no soft-capping")
    output = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if _collector is not None:
        _collector.add(module, query, key, attention_mask, **kwargs)
    return output


AttentionInterface.register(ATTENTION_NAME, fci_attention)
# Without a mask function under the same name transformers passes no mask, and sliding windows would
# be lost silently.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def scoring_mode(model, collector: StepAttention | None = None):
    """Evaluation mode, without gradients; with a collector, attention goes through `fci_attention`.

    At the end, and after an error, the model is put back as it was. Raises ValueError if no layer
    of the model calls `fci_attention`.
    """
    global _collector
    config, modes = model.config, [(module, module.training) for module in model.modules()]
    parts = {name: getattr(config, name) for name in config.sub_configs}
    before = {name: part._attn_implementation for name, part in parts.items() if part}
    before[""] = config._attn_implementation
    try:
        model.eval()
        if collector is not None:
            model.set_attn_implementation(ATTENTION_NAME)
        _collector = collector
        with torch.no_grad():
            yield
        if collector is not None and collector.layers == 0:
            name = type(model).__name__
            raise ValueError(f"no attention layer of {name} is in transformers' attention registry")
    finally:
        _collector = None
        for module, mode in modes:
            module.training = mode
        if collector is not None:  # last: transformers may refuse to set it, with an error
            model.set_attn_implementation(before)


def check_bounds(bounds: list[int], length: int) -> None:
    """Raises ValueError unless the bounds rise strictly from 0 to the response's length."""
    rising = all(a < b for a, b in zip(bounds, bounds[1:]))
    if bounds[:1] != [0] or bounds[-1] != length or not rising:
        raise ValueError(f"bounds must rise strictly from 0 to {length} tokens, got {bounds}")


def step_scores(collector: StepAttention, row: int, bounds: list[int]) -> list[float]:
    """FCI of one row of a collected batch; the first step scores 0 (the authors' code)."""
    return [0.0, *collector.fci[row, 1 : len(bounds) - 1].tolist()] if len(bounds) > 1 else []


def fci_scores(
    model, prompt_ids: list[int], response_ids: list[int], bounds: list[int], delta: int = 4
) -> list[float]:
    """FCI of one response, one float per step (AttnRL Eq. 4-6), by one forward pass.

    bounds = [0, ..., len(response_ids)]; step k is response_ids[bounds[k]:bounds[k + 1]]. The first
    step and the last `delta` steps score 0. Training scores many responses at once and takes their
    log-probs from the same pass (runtime/scoring.py); a test checks that both give the same FCI.
    Raises ValueError for invalid bounds and for an empty prompt.
    """
    prompt_ids, response_ids, bounds = list(prompt_ids), list(response_ids), list(bounds)
    if not prompt_ids:
        raise ValueError("a response needs at least one prompt token before it")
    check_bounds(bounds, len(response_ids))
    if len(bounds) < 2:
        return []
    ids = torch.tensor([prompt_ids + response_ids], device=model.device)  # (1, T)
    collector = StepAttention([len(prompt_ids)], [bounds], ids.shape[1], delta, ids.device)
    with scoring_mode(model, collector):
        model.base_model(input_ids=ids, use_cache=False)  # no output head: logits are not needed
    return step_scores(collector, 0, bounds)
