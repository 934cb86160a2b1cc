"""test_logged_attention.py: the attention between steps that samples.jsonl keeps of logged
responses, against the attention of every layer and head, averaged here with two loops.

python -m pytest tests/runtime/test_logged_attention.py
"""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fci
from runtime import scoring
from runtime.scoring import LOGGED_STEPS, LoggedAttention, Sequence, score

PROMPT = [3, 4, 5]
DELTA = 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(vocab_size=60, **sizes, **heads)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():  # heads that differ: a random model looks everywhere alike
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return model


def sequence(steps: int, logged: bool = True, seed: int = 0) -> Sequence:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 4, (steps,), generator=generator)
    bounds = [0, *sizes.cumsum(0).tolist()]
    tokens = torch.randint(6, 60, (bounds[-1],), generator=generator).tolist()
    return Sequence(PROMPT, tokens, bounds, logged)


def by_loops(model, s: Sequence) -> torch.Tensor:
    """A[l, h, j, k] of the definition, from attention probabilities that the model gives itself."""
    ids = torch.tensor([s.prompt_ids + s.tokens])
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = model(ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    alpha = torch.cat(layers)[:, :, len(PROMPT) :, len(PROMPT) :]  # (L, H, T, T)
    spans = [slice(a, b) for a, b in zip(s.bounds, s.bounds[1:])]
    rows = [torch.stack([alpha[:, :, j, k].mean((2, 3)) for k in spans], -1) for j in spans]
    return torch.stack(rows, 2)


def test_the_pictures_are_those_of_the_definition(model):
    sequences = [sequence(9, seed=1), sequence(5, logged=False), sequence(6, seed=2)]
    for s, scores in zip(sequences, score(model, sequences, delta=DELTA)):
        if not s.logged:
            assert scores.attention is None
            continue
        A, count = by_loops(model, s), len(s.bounds) - 1
        later = torch.tensor([[j >= k + DELTA for k in range(count)] for j in range(count)])
        influence = (A * later).sum(2)  # (L, H, K)
        got = scores.attention
        for k in range(count):
            layer, head = divmod(int(influence[:, :, k].argmax()), influence.shape[1])
            counts = k + DELTA < count
            assert got["heads"][k] == ([layer, head] if counts else None)
            for j in range(k, count):
                assert got["most"][j][k] == pytest.approx(A[:, :, j, k].max().item(), rel=0.051)
                if counts:
                    own = A[layer, head, j, k].item()
                    assert got["deciding"][j][k] == pytest.approx(own, rel=0.051, abs=1e-6)
            if k:
                total = sum(got["deciding"][j][k] for j in range(k + DELTA, count))
                assert total == pytest.approx(scores.fci[k], rel=0.051, abs=1e-6)
        assert len({tuple(pair) for pair in got["heads"] if pair}) > 1, "one head decides all"


def test_scores_are_the_same_with_and_without_it(model):
    sequences = [sequence(n, seed=n) for n in (2, 7, 30, 66)]
    silent = [Sequence(s.prompt_ids, s.tokens, s.bounds) for s in sequences]
    with_it, without = (score(model, batch, delta=DELTA) for batch in (sequences, silent))
    assert [s.fci for s in with_it] == [s.fci for s in without]
    assert [s.logprobs for s in with_it] == [s.logprobs for s in without]
    assert [bool(s.attention) for s in with_it] == [True, True, True, False]
    assert not any(s.attention for s in without)


def test_a_long_response_beside_a_logged_one_takes_several_blocks(model):
    """300 steps are two calls of the kernel; the logged row is in the first."""
    short, long = sequence(60, seed=3), sequence(300, seed=4)
    together = score(model, [short, long], delta=DELTA, token_budget=10**6)
    alone = score(model, [short], delta=DELTA)[0].attention
    assert together[0].attention["heads"] == alone["heads"] and together[1].attention is None
    for name in ("most", "deciding"):
        for got, expected in zip(together[0].attention[name], alone[name]):
            assert got == pytest.approx(expected, rel=0.11)  # rounded to the other side


def test_nothing_is_collected_that_nobody_asked_for(model, monkeypatch):
    def collector(*rows):
        return type(scoring.collector_of(list(rows), DELTA, model.device))

    assert collector(sequence(5, logged=False)) is fci.StepAttention
    assert collector(sequence(LOGGED_STEPS + 1)) is fci.StepAttention
    assert collector(sequence(LOGGED_STEPS), sequence(5, logged=False)) is LoggedAttention
