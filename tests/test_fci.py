r"""test_fci.py: FCI (AttnRL Eq. 4-6), log-probabilities and entropies, steps.

The second opinion on FCI is `fci_by_definition`: plain loops in float64 over attention matrices
that transformers itself returns (eager attention, `output_attentions=True`, one unpadded sequence
at a time). It shares no code with fci.py.

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
    random_bounds,
    random_tokens,
    randomise,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode

import fci
from errors import UserError
from fci import (
    ATTENTION_NAME,
    Separators,
    Sequence,
    StepAttention,
    check_model,
    fci_scores,
    prl_steps,
    score,
    separator_tokens,
    split_steps,
    token_logprobs,
    without_answer,
)

CLOSE = dict(rtol=0, atol=1e-5)
MODELS = {kind: tiny_model(kind) for kind in KINDS}


def eager_twin(model):
    """The same weights with transformers' own eager attention, which never heard of fci.py."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


EAGER = {kind: eager_twin(model) for kind, model in MODELS.items()}


@torch.no_grad()
def eager_attention(model, sequence: Sequence) -> np.ndarray:
    """alpha[l, h, q, s] in float64."""
    output = model(torch.tensor([sequence.prompt_ids + sequence.tokens]), output_attentions=True)
    return torch.cat(output.attentions).double().numpy()


def fci_by_definition(alpha: np.ndarray, sequence: Sequence, delta: int) -> list[float]:
    """AttnRL Eq. 4-6, read aloud."""
    spans = [
        [len(sequence.prompt_ids) + t for t in range(a, b)]
        for a, b in zip(sequence.bounds, sequence.bounds[1:])
    ]
    scores = []
    for k, keys in enumerate(spans):
        best = 0.0
        for layer in alpha:
            for head in layer:
                y = 0.0
                for queries in spans[k + delta :]:  # j >= k + Delta
                    # Eq. 4, summed by Eq. 5
                    y += np.mean([np.mean([head[q, s] for s in keys]) for q in queries])
                best = max(best, y)  # Eq. 6
        scores.append(best if k > 0 else 0.0)
    return scores


def random_sequence(rng, longest: int = 60) -> Sequence:
    """1 to 6 prompt tokens and at least 12 response tokens, cut anywhere."""
    tokens = random_tokens(rng, rng.randint(12, longest))
    bounds = random_bounds(rng, len(tokens), rng.randint(1, len(tokens)))
    return Sequence(random_tokens(rng, rng.randint(1, 6)), tokens, bounds)


# --------------------------------------------------------------------------------------------------
# FCI
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [1, 4])
def test_eq4_eq5_eq6_equal_eager_attention(kind, delta):
    """Batches of different lengths and segmentations, windows, up to 40 steps (head dimension 8:
    five blocks)."""
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
    """Every step twice as long (each token's attention uniform) must not double the score: Eq. 4
    averages."""
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
# Log-probabilities and entropies
# --------------------------------------------------------------------------------------------------
def plain_logprobs(
    model, sequence: Sequence, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook way: all logits of one unpadded sequence; log-probs of its tokens and
    entropies."""
    logits = model(torch.tensor([sequence.prompt_ids + sequence.tokens])).logits[0]
    start = len(sequence.prompt_ids)
    logp = torch.log_softmax(logits[start - 1 : start - 1 + len(sequence.tokens)] / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[range(len(sequence.tokens)), sequence.tokens], entropy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_entropies_are_those_of_the_tempered_model(kind, temperature):
    rng = random.Random(2)
    sequences = [random_sequence(rng) for _ in range(7)] + [Sequence([3], random_tokens(rng, 40))]
    with torch.no_grad():
        wanted = [plain_logprobs(EAGER[kind], s, temperature) for s in sequences]
    for budget in (10**6, 150, 1):
        for got, (logp, entropy) in zip(
            score(MODELS[kind], sequences, temperature, token_budget=budget), wanted
        ):
            np.testing.assert_allclose(got.logprobs, logp, **CLOSE)
            np.testing.assert_allclose(got.entropies, entropy, **CLOSE)


def test_scores_do_not_depend_on_the_batch():
    rng = random.Random(3)
    sequences = [random_sequence(rng) for _ in range(6)]
    alone = [score(MODELS["qwen3"], [s])[0] for s in sequences]
    order = [4, 0, 5, 2, 1, 3]
    together = score(MODELS["qwen3"], [sequences[i] for i in order])
    for i, got in zip(order, together):
        for name in ("logprobs", "entropies", "fci"):
            np.testing.assert_allclose(getattr(got, name), getattr(alone[i], name), **CLOSE)


@pytest.mark.parametrize("budget", [40, 100, 300])
def test_batches_stay_within_the_token_budget(budget):
    """rows x longest row <= token_budget in every forward pass, unless one row alone needs more;
    none is lost."""
    rng, shapes = random.Random(9), []
    sequences = [random_sequence(rng) for _ in range(20)]
    model = tiny_model("qwen2", num_hidden_layers=1)
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scores = score(model, sequences, token_budget=budget)
    assert [len(got.logprobs) for got in scores] == [len(s.tokens) for s in sequences]
    assert sum(rows for rows, _ in shapes) == len(sequences)
    assert all(rows * width <= budget or rows == 1 for rows, width in shapes)
    assert budget == 40 or max(rows for rows, _ in shapes) > 1


@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=60), budget=st.integers(100, 40000)
)
@settings(max_examples=60, deadline=None)
def test_a_pass_is_within_the_budget_and_at_most_a_twentieth_padding(lengths, budget):
    batches = fci.token_batches([Sequence([0], [0] * (n - 1)) for n in lengths], budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded, real = len(batch) * max(lengths[i] for i in batch), sum(lengths[i] for i in batch)
        assert real >= 0.95 * padded and (padded <= budget or len(batch) == 1)


@pytest.mark.parametrize("chunk", [1, 7])
def test_long_batches_go_through_the_head_in_chunks(chunk, monkeypatch):
    """More positions than HEAD_CHUNK: equal numbers, and never more logits at once."""
    rng = random.Random(4)
    # one pass
    sequences = [
        Sequence([1], tokens, [0, 5, 30]) for tokens in (random_tokens(rng, 30) for _ in range(4))
    ]
    model, widths = tiny_model("qwen2"), []
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: widths.append(output.shape[0])
    )
    whole = score(model, sequences)
    assert widths == [sum(len(s.tokens) for s in sequences)]
    widths.clear()
    monkeypatch.setattr(fci, "HEAD_CHUNK", chunk)
    for got, want in zip(score(model, sequences), whole):
        np.testing.assert_allclose(got.logprobs, want.logprobs, **CLOSE)
        np.testing.assert_allclose(got.entropies, want.entropies, **CLOSE)
    assert max(widths) == chunk


@pytest.mark.parametrize("chunk", [5, 1024])
def test_gradient_equals_plain_autograd(chunk, monkeypatch):
    """Checkpointed chunks must not change the gradient; entropies carry none."""
    monkeypatch.setattr(fci, "HEAD_CHUNK", chunk)
    rng = random.Random(5)
    sequences = [random_sequence(rng) for _ in range(3)]
    weights = torch.tensor([rng.gauss(0, 1) for s in sequences for _ in s.tokens])
    ours, plain = tiny_model("qwen3"), tiny_model("qwen3")
    calls = []
    ours.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))
    logp, entropy = token_logprobs(ours, sequences, 0.6)
    assert not entropy.requires_grad
    forward_calls = len(calls)
    (logp * weights).mean().backward()
    # logits were not kept for the backward pass but computed again
    assert len(calls) == 2 * forward_calls
    (torch.cat([plain_logprobs(plain, s, 0.6)[0] for s in sequences]) * weights).mean().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert b.grad.abs().max() > 1e-5, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


# --------------------------------------------------------------------------------------------------
# The model leaves as it came; memory
# --------------------------------------------------------------------------------------------------
class Boom(Exception):
    """Raised by a hook in the middle of a forward pass."""


def fingerprint(model):
    return (
        model.config._attn_implementation,
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.is_grad_enabled(),
    )


def same(a, b) -> bool:
    """Fingerprints hold tensors, for which == is no truth value."""
    return (
        a[:3] == b[:3]
        and a[4] == b[4]
        and all(
            (x is None) == (y is None) and (x is None or torch.equal(x, y))
            for x, y in zip(a[3], b[3])
        )
    )


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
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
GEMMA = dict(SMALL, head_dim=8, final_logit_softcapping=None, attn_logit_softcapping=None)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            transformers.Gemma2Config(**{**GEMMA, "final_logit_softcapping": 30.0}),
            "rescales its logits",
        ),
        (transformers.CohereConfig(**SMALL, logit_scale=0.0625), "rescales its logits"),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), "rescales its logits"),
        (transformers.FalconH1Config(**SMALL, lm_head_multiplier=0.5), "rescales its logits"),
        (transformers.Gemma2Config(**{**GEMMA, "attn_logit_softcapping": 50.0}), "soft-capping"),
        (
            transformers.GptOssConfig(
                **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1
            ),
            "attention sinks",
        ),
        (
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
            "attention registry",
        ),
        (
            transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
            "no attention layer",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_models_that_would_get_wrong_scores_are_refused(config, words):
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.train()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        score(model, [Sequence([1, 2], [3, 4, 5, 6], [0, 1, 2, 3, 4])], delta=1)
    assert same(fingerprint(model), before)


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused_whatever_its_config_calls_it():
    class Scaled(transformers.Qwen2ForCausalLM):
        factor = 1.0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.factor
            return output

    model = randomise(Scaled(transformers.Qwen2Config(**SMALL)), 0)
    check_model(model, "m")
    model.factor = 0.5
    with pytest.raises(UserError, match="--model m: rescales its hidden states or logits"):
        check_model(model, "m")


def test_gemma2_without_caps_is_scored():
    """The refusals look at the values, not at the family: without its caps Gemma 2 is a plain model
    (and sliding)."""
    model = randomise(
        transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**GEMMA, sliding_window=WINDOW)
        ).eval(),
        0,
    )
    sequence = random_sequence(random.Random(8))
    got = score(model, [sequence], delta=1)[0]
    want = fci_by_definition(eager_attention(eager_twin(model), sequence), sequence, 1)
    np.testing.assert_allclose(got.fci, want, **CLOSE)


@pytest.mark.parametrize(
    "bounds", [[], [0], [1, 3], [0, 2], [0, 4], [0, 2, 2, 3], [0, 2, 1, 3], [0, -1, 3], [0, 3, 3]]
)
def test_wrong_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds"):
        fci_scores(MODELS["qwen2"], [1], [2, 3, 4], bounds)


def test_empty_prompt_is_refused():
    for bounds in (None, [0, 1, 2]):
        with pytest.raises(ValueError, match="prompt"):
            score(MODELS["qwen2"], [Sequence([1], [2]), Sequence([], [2, 3], bounds)])


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------
BLANK, LINE, THINK = 9, 8, 7
SEPARATORS = Separators(double=frozenset({BLANK}), single=frozenset({LINE, BLANK}), think_end=THINK)


@pytest.mark.parametrize(
    "ends, bounds", [("blank", [0, 2, 6]), ("newline", [0, 2, 3, 6]), ("length", [0, 4, 6])]
)
def test_prl_steps(ends, bounds):
    """Of 6 tokens the second is a blank line, the third and the last a single newline."""
    tokens = [5, 9, 8, 5, 5, 8]
    assert (
        prl_steps(
            tokens, Separators(double=frozenset({9}), single=frozenset({8, 9})), ends, length=4
        )
        == bounds
    )
    assert prl_steps([5], SEPARATORS, ends) == [0, 1]


@pytest.mark.parametrize(
    "tokens, bounds",
    [
        ([1, BLANK, 2, 3, BLANK, 4], [0, 2, 5, 6]),
        ([1, BLANK, 2, LINE, 3], [0, 2, 5]),  # with blank lines, single newlines do not cut
        ([1, LINE, 2, LINE, 3], [0, 2, 4, 5]),  # none: single newlines do
        ([1, 2, 3], [0, 3]),  # neither: one step
        ([1, BLANK, BLANK, 2], [0, 2, 3, 4]),  # after EVERY separator token
        ([1, BLANK], [0, 2]),  # at the end: no empty last step
        ([BLANK, 1], [0, 1, 2]),
        ([BLANK], [0, 1]),
        ([LINE, LINE], [0, 1, 2]),
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
    ends = {BLANK} if BLANK in tokens else {LINE}
    for position, step in enumerate(steps):
        assert not ends & set(step[:-1])  # a separator only closes a step
        assert step[-1] in ends or position == len(steps) - 1
    usable = branchable_steps(tokens, bounds, SEPARATORS)
    assert 0 <= usable <= len(steps)
    # usable: no "</think>" in or before it, unless there is none at all after
    for position, step in enumerate(steps):
        assert (position < usable) == (
            THINK not in tokens or THINK in sum(steps[position + 1 :], [])
        )


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
    without = Separators(SEPARATORS.double, SEPARATORS.single)  # a tokenizer that has no "</think>"
    bounds = split_steps(tokens, without)
    assert branchable_steps(tokens, bounds, without) == len(bounds) - 1


def train_bpe(with_think: bool = True):
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
    if with_think:
        tokenizer.add_tokens(["</think>"])
    return tokenizer


def test_separator_tokens_of_a_bpe_tokenizer():
    tokenizer = train_bpe()
    separators = separator_tokens(tokenizer)
    texts = {i: tokenizer.decode([i]) for i in tokenizer.get_vocab().values()}
    merges = {texts[i] for i in separators.double}
    assert {".\n\n", ":\n\n", "\n\n"} <= merges  # the tokenizer has such tokens, and all are found
    assert {".\n", "\n"} <= {texts[i] for i in separators.single - separators.double}
    assert separators.double < separators.single
    assert all(
        ("\n\n" in text) == (i in separators.double) and ("\n" in text) == (i in separators.single)
        for i, text in texts.items()
    )
    assert separators.think_end == tokenizer.convert_tokens_to_ids("</think>")
    assert separator_tokens(train_bpe(with_think=False)).think_end is None

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
    assert separators.double == {blank} <= separators.single and separators.think_end is None
    tokens = tokenizer("a=3\n\nb=7\n\n\\{7}")["input_ids"]
    bounds = split_steps(tokens, separators)
    assert [tokenizer.decode(tokens[a:b]) for a, b in zip(bounds, bounds[1:])] == [
        "a=3\n\n",
        "b=7\n\n",
        "\\{7}",
    ]
