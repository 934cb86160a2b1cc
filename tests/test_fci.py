r"""test_fci.py: FCI (AttnRL Eq. 4-6) and steps.

The second opinion on FCI is helpers.fci_by_definition: plain loops in float64 over attention
matrices that transformers itself returns (eager attention, `output_attentions=True`, one unpadded
sequence at a time). It shares no code with fci.py.

    python -m pytest tests/test_fci.py
"""

import copy
import random

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    KINDS,
    VOCABULARY,
    WINDOW,
    WINDOWED,
    eager_attention,
    eager_twin,
    fci_by_definition,
    fingerprint,
    random_bounds,
    random_sequence,
    random_tokens,
    same,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode

import fci
from fci import (
    ATTENTION_NAME,
    Separators,
    StepAttention,
    fci_scores,
    separator_tokens,
    split_steps,
    without_answer,
)
from runtime.scoring import Sequence, score

CLOSE = dict(rtol=0, atol=1e-5)
MODELS = {kind: tiny_model(kind) for kind in KINDS}


EAGER = {kind: eager_twin(model) for kind, model in MODELS.items()}


# --------------------------------------------------------------------------------------------------
# FCI
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [1, 4])
def test_eq4_eq5_eq6_equal_eager_attention(kind, delta):
    """Batches of different lengths and segmentations, windows, up to 40 steps."""
    rng = random.Random(f"{kind} {delta}")
    sequences = [random_sequence(rng) for _ in range(6)]
    tokens = random_tokens(rng, 50)
    sequences.append(Sequence([1], tokens, random_bounds(rng, 50, 40)))
    wanted = [fci_by_definition(eager_attention(EAGER[kind], s), s, delta) for s in sequences]
    assert max(map(max, wanted)) > 0.1  # not a comparison of zeros
    for budget in (10**6, 120, 1):  # one batch, a few, one sequence each
        for got, want in zip(
            score(MODELS[kind], sequences, delta=delta, token_budget=budget), wanted
        ):
            np.testing.assert_allclose(got.fci, want, **CLOSE)
    for sequence, want in zip(sequences, wanted):
        got = fci_scores(MODELS[kind], sequence.prompt_ids, sequence.tokens, sequence.bounds, delta)
        np.testing.assert_allclose(got, want, **CLOSE)


def test_eq4_eq5_eq6_of_300_steps_of_unequal_length():
    """More steps than one kernel call takes (256)."""
    rng = random.Random(5)
    sequence = Sequence([1], random_tokens(rng, 600), random_bounds(rng, 600, 300))
    want = fci_by_definition(eager_attention(EAGER["qwen2"], sequence), sequence, 4)
    got = fci_scores(MODELS["qwen2"], [1], sequence.tokens, sequence.bounds, 4)
    lengths = {b - a for a, b in zip(sequence.bounds, sequence.bounds[1:])}
    assert len(want) > 256 and len(lengths) > 2
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    delta=st.integers(1, 6),
    rows=st.integers(1, 4),
)
def test_eq4_eq5_eq6_on_random_batches(seed, kind, delta, rows):
    rng = random.Random(seed)
    sequences = [random_sequence(rng, 30) for _ in range(rows)]
    for sequence, got in zip(sequences, score(MODELS[kind], sequences, delta=delta)):
        want = fci_by_definition(eager_attention(EAGER[kind], sequence), sequence, delta)
        np.testing.assert_allclose(got.fci, want, **CLOSE)
        assert got.fci[0] == 0 and not any(got.fci[-delta:])
        if len(got.fci) <= delta + 1:
            assert not any(got.fci)
        # softmax is never 0; a window may end before the first later step
        elif kind not in WINDOWED:
            assert max(got.fci) > 0


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_are_seen(kind):
    """The premise of the tests above: windows really cut attention, and FCI without them is another
    FCI."""
    sequence = random_sequence(random.Random(1), 50)
    sequence.bounds = random_bounds(random.Random(1), len(sequence.tokens), 8)
    alpha = eager_attention(EAGER[kind], sequence)
    assert not alpha[0, :, -1, :-WINDOW].any() and alpha[0, :, -1, -WINDOW:].all()
    without = copy.deepcopy(MODELS[kind])
    without.config.sliding_window = 10**6
    with_window, free = (
        score(model, [sequence], delta=1)[0].fci for model in (MODELS[kind], without)
    )
    assert max(abs(a - b) for a, b in zip(with_window, free)) > 0.01


def test_eq4_eq5_eq6_by_hand_uniform_attention():
    """Zero queries: every token attends equally to itself and all before it, alpha[q, s] = 1 / (q +
    1).

    One prompt token (position 0), steps {1}, {2, 3}, {4}, {5}, Delta 1.
    y[1] = A[2, 1] + A[3, 1] = 1/5 + 1/6. y[2] = A[3, 2] = 1/6. The last step has none after it; the
    first scores 0.
    """
    model = tiny_model("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert fci_scores(model, [7], [1, 2, 3, 4, 5], [0, 1, 3, 4, 5], delta=1) == pytest.approx(
        [0, 11 / 30, 1 / 6, 0]
    )
    # Delta 2: y[1] = A[3, 1] = 1/6 only
    assert fci_scores(model, [7], [1, 2, 3, 4, 5], [0, 1, 3, 4, 5], delta=2) == pytest.approx(
        [0, 1 / 6, 0, 0]
    )
    # steps {1}, {2, 3}, {4, 5}: the mean over the two queries of the last step, (1/5 + 1/6) / 2
    assert fci_scores(model, [7], [1, 2, 3, 4, 5], [0, 1, 3, 5], delta=1) == pytest.approx(
        [0, 11 / 60, 0]
    )


def test_eq4_eq5_eq6_by_hand_chosen_queries_and_keys():
    """q and k are given to StepAttention.add, so every number can be followed. Delta 1, one token a
    step, no prompt but token 0: steps {1}, {2}, {3}. Scores q . k are logs, so that softmax gives
    simple fractions.

    Head 0: query 3 sees keys 0..3 with weights 1, 2, 4, 1: alpha[3] = 1/8, 2/8, 4/8, 1/8.
            query 2 sees keys 0..2 with weights 1, 2, 4:    alpha[2] = 1/7, 2/7, 4/7.
    Head 1: the same keys, reversed signs, so weights 1, 1/2, 1/4, 1:
            alpha[3] = 4/11, 2/11, 1/11, 4/11; alpha[2] = 4/7, 2/7, 1/7.
    Eq. 5:  head 0: y[0] = 2/7 + 2/8, y[1] = 4/8;   head 1: y[0] = 2/7 + 2/11, y[1] = 1/11.
    Eq. 6:  the maximum, 2/7 + 1/4 and 1/2. A second layer that attends only to the prompt changes
    nothing; a third one
            with weights 1, 16, 1, 1 raises y[0] to 16/18 + 16/19.
    """

    # (B, H, T, D) query and (B, 1, T, D) key: q = +-1 in dimension 0, k = log weight
    def layer(*weights):
        query = torch.zeros(1, 2, 4, 2)
        query[0, 0, :, 0], query[0, 1, :, 0] = 1, -1
        key = torch.zeros(1, 1, 4, 2)
        key[0, 0, :, 0] = torch.tensor(weights).log()
        return query, key

    module = torch.nn.Module()
    module.num_key_value_groups = 2
    steps = StepAttention([1], [[0, 1, 2, 3]], width=4, delta=1, device="cpu")
    steps.add(module, *layer(1.0, 2.0, 4.0, 1.0), None, scaling=1.0)
    assert steps.fci[0].tolist() == pytest.approx([2 / 7 + 1 / 4, 1 / 2, 0])
    query, key = layer(1e6, 1.0, 1.0, 1.0)
    query[0, 1] = query[0, 0]  # both heads attend to the prompt
    steps.add(module, query, key, None, scaling=1.0)
    assert steps.fci[0].tolist() == pytest.approx([2 / 7 + 1 / 4, 1 / 2, 0])
    steps.add(module, *layer(1.0, 16.0, 1.0, 1.0), None, scaling=1.0)
    assert steps.fci[0].tolist() == pytest.approx([16 / 18 + 16 / 19, 1 / 2, 0])
    assert steps.layers == 3


def test_long_steps_are_means_not_sums():
    """Every step twice as long (each token's attention uniform) must not double the score: the
    attention between two steps is a mean."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    bounds, start = [0, 30, 70, 100], 10
    alpha = [[1 / (q + 1) if s <= q else 0 for s in range(110)] for q in range(110)]
    want = np.mean(
        [alpha[q][s] for q in range(start + 70, start + 100) for s in range(start + 30, start + 70)]
    )
    assert fci_scores(model, [1] * start, [2] * 100, bounds, delta=1) == pytest.approx(
        [0, want, 0], abs=1e-6
    )


def test_short_responses():
    model = MODELS["qwen2"]
    assert fci_scores(model, [1], [], [0]) == []
    assert fci_scores(model, [1], [2], [0, 1]) == [0]
    # K = Delta + 1: inert
    assert fci_scores(model, [1], [2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5], delta=4) == [0] * 5
    only_step_one = fci_scores(model, [1], [2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6], delta=4)
    assert only_step_one[1] > 0 and sum(only_step_one) == only_step_one[1]
    empty, one, long = score(
        model,
        [
            Sequence([1, 2], [], [0]),
            Sequence([1], [3], [0, 1]),
            Sequence([1], [3, 4, 5], [0, 1, 2, 3]),
        ],
        delta=1,
    )
    assert (empty.logprobs, empty.entropies, empty.fci) == ([], [], [])
    assert len(one.logprobs) == 1 and one.fci == [0]
    assert len(long.fci) == 3 and long.fci[1] > 0
    assert score(model, []) == []
    assert score(model, [Sequence([1], [2, 3])])[0].fci == []  # no bounds: a continuation
    mixed = score(model, [Sequence([1], [2, 3]), Sequence([1], [3, 4, 5], [0, 1, 2, 3])], delta=1)
    assert mixed[0].fci == [] and mixed[1].fci == pytest.approx(long.fci, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# The model leaves as it came; memory
# --------------------------------------------------------------------------------------------------
class Boom(Exception):
    """Raised by a hook in the middle of a forward pass."""


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("bounds", [None, [0, 1, 2, 3, 4, 6]], ids=["no bounds", "bounds"])
def test_model_leaves_as_it_came_errors_included(implementation, bounds):
    # in training mode dropout would change every number
    model = tiny_model("llama", attention_dropout=0.5)
    expected = score(model, [Sequence([1, 2], [3, 4, 5, 6, 7, 8], bounds)], delta=1)[0]
    model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[1].eval()  # mixed modes
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    before = fingerprint(model)
    got = score(model, [Sequence([1, 2], [3, 4, 5, 6, 7, 8], bounds)], delta=1)[0]
    assert same(fingerprint(model), before)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, **CLOSE)
    np.testing.assert_allclose(got.fci, expected.fci, **CLOSE)

    with pytest.raises(IndexError):  # a token outside the vocabulary
        score(model, [Sequence([1, 2], [3, 4, 5, 6, 7, VOCABULARY], bounds)])
    assert same(fingerprint(model), before)

    def explode(*_):
        assert model.config._attn_implementation == (ATTENTION_NAME if bounds else implementation)
        raise Boom

    hook = model.model.layers[1].register_forward_hook(explode)
    with pytest.raises(Boom):
        score(model, [Sequence([1, 2], [3, 4, 5, 6, 7, 8], bounds)])
    hook.remove()
    assert same(fingerprint(model), before)
    assert fci._collector is None  # nothing listens any more
    again = score(model, [Sequence([1, 2], [3, 4, 5, 6, 7, 8], bounds)], delta=1)[0]
    np.testing.assert_allclose(again.fci, expected.fci, **CLOSE)


def test_switching_attention_leaves_the_models_own_numbers_alone():
    """Under our attention the model computes what it computed before, bit for bit the SDPA
    result."""
    model, ids = MODELS["qwen2_window"], torch.tensor([random_tokens(random.Random(6), 40)])
    with torch.no_grad():
        plain = model(ids).logits
        with fci.scoring_mode(model, StepAttention([1], [[0, 20, 39]], 40, 1, "cpu")):
            ours = model(ids).logits
        assert torch.equal(plain, ours) and torch.equal(plain, model(ids).logits)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned, views and expanded tensors by their
    storage."""

    numel, operator = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                numel = tensor.untyped_storage().nbytes() // tensor.element_size()
                if numel > self.numel:
                    self.numel, self.operator = numel, func
        return result


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_no_attention_matrix_is_ever_stored(kind):
    """H = 4, T = 1024: eager attention makes H x T x T = 4.2 million elements, scoring nothing near
    it.

    mistral: its one T x T window mask (1.0 million booleans, no head dimension) is transformers'
    and within the bound.
    """
    model, length, heads = tiny_model(kind, num_hidden_layers=1), 1024, 4
    tokens = random_tokens(random.Random(7), length - 1)
    sequence = Sequence([1], tokens, random_bounds(random.Random(7), length - 1, 20))
    with LargestTensor() as ours:
        score(model, [sequence])
    bound = length * length + 1 if kind == "mistral" else length * length // 2
    assert 0 < ours.numel < bound < heads * length * length, ours.operator
    with LargestTensor() as eager, torch.no_grad():  # the same instrument convicts eager attention
        eager_twin(model)(torch.tensor([[1, *tokens]]), output_attentions=True)
    assert eager.numel >= heads * length * length


# --------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds", [[], [0], [1, 3], [0, 2], [0, 4], [0, 2, 2, 3], [0, 2, 1, 3], [0, -1, 3], [0, 3, 3]]
)
def test_wrong_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds"):
        fci_scores(MODELS["qwen2"], [1], [2, 3, 4], bounds)


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------
BLANK, LINE, THINK, EOS = 9, 8, 7, 6
TEXTS = {
    **dict.fromkeys(range(1, 13), b"x"),
    BLANK: b".\n\n",
    LINE: b"\n",
    THINK: b"</think>",
    EOS: b"</s>",
}
SEPARATORS = Separators(TEXTS, frozenset({EOS}))


@pytest.mark.parametrize(
    "tokens, bounds",
    [
        ([1, BLANK, 2, 3, BLANK, 4], [0, 2, 5, 6]),
        ([1, BLANK, 2, LINE, 3], [0, 2, 5]),  # with blank lines, single newlines do not cut
        ([1, LINE, 2, LINE, 3], [0, 2, 4, 5]),  # none: single newlines do
        ([1, LINE, LINE, 2, LINE, 3], [0, 3, 6]),  # two single ones are a blank line
        ([1, 2, 3], [0, 3]),  # neither: one step
        ([1, BLANK, BLANK, 2], [0, 2, 3, 4]),  # ".\n\n" twice
        ([1, BLANK, LINE, LINE, 2], [0, 4, 5]),  # one run
        ([1, BLANK], [0, 2]),  # at the end: no empty last step
        ([1, BLANK, EOS], [0, 3]),
        ([BLANK, 1], [0, 1, 2]),
        ([LINE, LINE, 1], [0, 3]),  # white space alone is no step
        ([BLANK], [0, 1]),
        ([LINE, LINE], [0, 2]),
        ([1], [0, 1]),
        ([], [0]),
    ],
)
def test_split_steps(tokens, bounds):
    assert split_steps(tokens, SEPARATORS) == bounds


@given(st.lists(st.integers(1, 12), max_size=60))
def test_bounds_partition_the_response(tokens):
    bounds = split_steps(tokens, SEPARATORS)
    steps = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
    assert sum(steps, []) == tokens and all(steps)
    for step in steps[:-1]:
        assert step[-1] in (BLANK, LINE) and set(step) - {LINE, EOS}
    usable = branchable_steps(tokens, bounds, SEPARATORS)
    assert 0 <= usable <= len(steps)
    # usable: no "</think>" in or before it, unless there is none at all after
    for position in range(len(steps)):
        after = sum(steps[position + 1 :], [])
        assert (position < usable) == (THINK not in tokens or THINK in after)


def branchable_steps(tokens, bounds, separators):
    scores = [1.0] * (len(bounds) - 1)
    left, count = without_answer(scores, tokens, bounds, separators)
    assert left == scores[:count] + [0.0] * (len(scores) - count)
    return count


@pytest.mark.parametrize(
    "tokens, usable",
    [
        ([1, BLANK, 2, BLANK, 3], 3),  # no "</think>": all
        ([1, BLANK, 2, BLANK, THINK, BLANK, 3], 2),  # a step of its own
        ([1, BLANK, 2, THINK, BLANK, 3, BLANK, 4], 1),  # inside a step: that step is out as well
        ([1, THINK, BLANK, 2, BLANK, 3], 0),  # inside the first step
        ([1, BLANK, THINK, 2, BLANK, 3, BLANK, THINK, 4], 3),  # several: the last one counts
        ([1, BLANK, 2, BLANK, THINK], 2),  # the last token
        ([], 0),
    ],
)
def test_branchable_steps(tokens, usable):
    assert branchable_steps(tokens, split_steps(tokens, SEPARATORS), SEPARATORS) == usable
    without = Separators({**TEXTS, THINK: b"</thing>"})  # a tokenizer that has no "</think>"
    bounds = split_steps(tokens, without)
    assert branchable_steps(tokens, bounds, without) == len(bounds) - 1


def test_answers_after_the_thought_score_zero_everywhere():
    """FCI of the step with the last </think> (token 7) and of all later ones is 0, not only left
    out of branching."""
    separators = Separators({7: b"</think>", 9: b"\n\n", **dict.fromkeys(range(1, 5), b"x")})
    tokens, bounds = [1, 9, 2, 9, 7, 9, 3, 9, 4], [0, 2, 4, 6, 8, 9]
    assert without_answer([0.0, 0.5, 0.4, 0.3, 0.2], tokens, bounds, separators) == (
        [0.0, 0.5, 0.0, 0.0, 0.0],
        2,
    )
    assert without_answer([0.0, 0.5], [1, 9, 2], [0, 2, 3], separators) == ([0.0, 0.5], 2)


def train_bpe():
    """A byte-level BPE as Qwen's: its pattern lets punctuation take newlines along, so ".\n\n"
    becomes one token."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    text = [
        "First we add.\n\nThen we go on:\n\n\\[ x = 2 \\]\n\nSo x = 2.\nWell, é.\n\nDone!\n\n"
    ] * 30
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.add_tokens(["</think>"])
    return tokenizer


def test_separator_tokens_of_a_bpe_tokenizer():
    tokenizer = train_bpe()
    separators = separator_tokens(tokenizer)
    texts = {i: tokenizer.decode([i]) for i in tokenizer.get_vocab().values()}
    # the tokenizer has such tokens, and all are read
    assert {".\n\n", ":\n\n", "\n\n", ".\n", "\n"} <= set(texts.values())
    assert {i: text.decode(errors="replace") for i, text in separators.texts.items()} == texts
    assert separators.texts[tokenizer.convert_tokens_to_ids("</think>")] == b"</think>"

    text = "Then x = 2.\n\nSo we add:\n\n\\[ x \\]\n\n</think>Done.\nWell"
    tokens = tokenizer(text)["input_ids"]
    bounds = split_steps(tokens, separators)
    assert [tokenizer.decode(tokens[a:b]) for a, b in zip(bounds, bounds[1:])] == [
        "Then x = 2.\n\n",
        "So we add:\n\n",
        "\\[ x \\]\n\n",
        "</think>Done.\nWell",
    ]
    assert branchable_steps(tokens, bounds, separators) == 3


def test_separator_tokens_of_the_toy_tokenizer():
    from toy.build import build_tokenizer

    tokenizer = build_tokenizer()
    separators = separator_tokens(tokenizer)
    (blank,) = tokenizer("\n\n")["input_ids"]
    assert [i for i, text in separators.texts.items() if b"\n\n" in text] == [blank]
    assert separators.special == {tokenizer.eos_token_id}
    tokens = tokenizer("a=3\n\nb=7\n\n\\{7}")["input_ids"]
    bounds = split_steps(tokens, separators)
    assert [tokenizer.decode(tokens[a:b]) for a, b in zip(bounds, bounds[1:])] == [
        "a=3\n\n",
        "b=7\n\n",
        "\\{7}",
    ]
