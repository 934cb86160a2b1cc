"""test_scoring.py: log-probabilities and entropies of many sequences, batches, and FCI of the same
pass.

    python -m pytest tests/runtime/test_scoring.py
"""

import random

import numpy as np
import pytest
import torch
from helpers import KINDS, eager_twin, random_sequence, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from fci import fci_scores
from runtime import scoring
from runtime.scoring import Sequence, score, token_batches, token_logprobs

CLOSE = dict(rtol=0, atol=1e-5)
MODELS = {kind: tiny_model(kind) for kind in KINDS}
EAGER = {kind: eager_twin(model) for kind, model in MODELS.items()}


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
    batches = token_batches([[Sequence([0], [0] * (n - 1))] for n in lengths], budget)
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
    monkeypatch.setattr(scoring, "HEAD_CHUNK", chunk)
    for got, want in zip(score(model, sequences), whole):
        np.testing.assert_allclose(got.logprobs, want.logprobs, **CLOSE)
        np.testing.assert_allclose(got.entropies, want.entropies, **CLOSE)
    assert max(widths) == chunk


@pytest.mark.parametrize("chunk", [5, 1024])
def test_gradient_equals_plain_autograd(chunk, monkeypatch):
    """Checkpointed chunks must not change the gradient; entropies carry none."""
    monkeypatch.setattr(scoring, "HEAD_CHUNK", chunk)
    rng = random.Random(5)
    sequences = [random_sequence(rng) for _ in range(3)]
    weights = torch.tensor([rng.gauss(0, 1) for s in sequences for _ in s.tokens])
    ours, plain = tiny_model("qwen3"), tiny_model("qwen3")
    calls = []
    ours.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))
    logp, entropy = token_logprobs(ours, [[s] for s in sequences], 0.6)
    assert not entropy.requires_grad
    forward_calls = len(calls)
    (logp * weights).mean().backward()
    # logits were not kept for the backward pass but computed again
    assert len(calls) == 2 * forward_calls
    (torch.cat([plain_logprobs(plain, s, 0.6)[0] for s in sequences]) * weights).mean().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert b.grad.abs().max() > 1e-5, name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_empty_prompt_is_refused():
    for bounds in (None, [0, 1, 2]):
        with pytest.raises(ValueError, match="prompt"):
            score(MODELS["qwen2"], [Sequence([1], [2]), Sequence([], [2, 3], bounds)])


# --------------------------------------------------------------------------------------------------
# FCI
# --------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    delta=st.integers(1, 6),
    rows=st.integers(1, 4),
)
def test_fci_of_a_batch_is_that_of_fci_scores(seed, kind, delta, rows):
    """fci.fci_scores is a short forward pass of its own, one response at a time; the scoring pass
    takes padded batches and wants log-probs as well."""
    rng = random.Random(seed)
    sequences = [random_sequence(rng, 40) for _ in range(rows)]
    for s, scores in zip(sequences, score(MODELS[kind], sequences, 0.7, delta)):
        alone = fci_scores(MODELS[kind], s.prompt_ids, s.tokens, s.bounds, delta)
        assert len(scores.fci) == len(s.bounds) - 1
        np.testing.assert_allclose(scores.fci, alone, **CLOSE)
