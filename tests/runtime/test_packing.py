"""test_packing.py: rows of leaves by hand, and the same numbers as leaves computed one by one.

python -m pytest tests/runtime/test_packing.py
"""

import random
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, eager_twin, random_tokens, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import Learner, TrainStats
from runtime.dist import mini_batches
from runtime.models import packing_obstacle
from runtime.packing import alone, lay_out, pack, place, row_cost, tree_attention
from runtime.scoring import Sequence, score, token_batches, token_logprobs, width
from tree import TrainingSequence

WIDE = 10**6  # a hidden size next to which attention costs nothing: rows as long as allowed
MODELS = {kind: tiny_model(kind) for kind in ("qwen2", "qwen3", "llama")}
together = partial(pack, longest=64, hidden=WIDE)


def one_row(sequences) -> list[list[int]]:
    """All in one row, in the order they come: right for any order, only not the shortest."""
    return [list(range(len(sequences)))]


# --------------------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------------------
A, B, C, D, E = 1, 2, 3, 4, 5
DRAWN = [Sequence([A], [B, C]), Sequence([A], [B, D]), Sequence([A], [E])]  # of the docstring


def test_the_row_that_the_docstring_draws():
    ids, ends, paths = place(DRAWN)
    assert (ids, ends) == ([A, B, C, D, E], [5, 4, 3, 4, 5])
    assert paths == [[0, 1, 2], [0, 1, 3], [0, 4]]
    attention = tree_attention(torch.tensor([ends]))
    assert attention["position_ids"].tolist() == [[0, 1, 2, 2, 1]]
    assert attention["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_a_pass_of_the_drawn_row_and_a_shorter_one():
    ids, ends, parents, nodes, leaves = lay_out([DRAWN, [Sequence([D, E], [A])]])
    assert ids.tolist() == [[A, B, C, D, E], [D, E, A, 0, 0]]
    assert ends.tolist() == [[5, 4, 3, 4, 5], [3, 3, 3, 4, 5]]  # padding sees itself alone
    assert nodes.tolist() == [1, 2, 3, 4, 7] and parents.tolist() == [0, 1, 1, 0, 6]
    # b c, b d, e, a: b is computed once and gathered twice
    assert ids.flatten()[nodes[leaves]].tolist() == [B, C, B, D, E, A]


@pytest.mark.parametrize(
    "sequences, ids, ends",
    [
        # a leaf twice; one that begins another, in both orders; nothing in common
        ([([A], [B]), ([A], [B])], [A, B], [2, 2]),
        ([([A], [B]), ([A], [B, C])], [A, B, C], [3, 3, 3]),
        ([([A], [B, C]), ([A], [B])], [A, B, C], [3, 3, 3]),
        ([([A], [B]), ([C], [B])], [A, B, C, B], [2, 2, 4, 4]),
        # continuations: one's prompt holds what is a token of the other
        ([([A], [B, C]), ([A, B], [D])], [A, B, C, D], [4, 4, 3, 4]),
    ],
)
def test_odd_rows_by_hand(sequences, ids, ends):
    assert place([Sequence(*s) for s in sequences])[:2] == (ids, ends)


def test_plain_rows_need_no_mask():
    plain = lay_out([[s] for s in DRAWN])
    assert plain[1] is None and tree_attention(None) == {}


# --------------------------------------------------------------------------------------------------
# Any trie
# --------------------------------------------------------------------------------------------------
# few different tokens: much is shared
few = st.integers(1, 2)
leaf = st.builds(Sequence, st.lists(few, min_size=1, max_size=3), st.lists(few, max_size=7))


def whole(s) -> list[int]:
    return s.prompt_ids + s.tokens


@settings(max_examples=200, deadline=None)
@given(st.lists(leaf, min_size=1, max_size=10), st.integers(0, 5))
def test_every_leaf_gets_its_tokens_at_their_positions_and_sees_exactly_its_own_path(leaves, seed):
    random.Random(seed).shuffle(leaves)
    ids, ends, paths = place(leaves)
    attention = tree_attention(torch.tensor([ends]))
    mask, positions = attention["attention_mask"][0, 0], attention["position_ids"][0]
    for one, path in zip(leaves, paths):
        assert [ids[i] for i in path] == whole(one)
        assert positions[path].tolist() == list(range(len(path)))
        for depth, i in enumerate(path):  # brute force: a token sees its ancestors and itself
            assert mask[i].nonzero().flatten().tolist() == path[: depth + 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(leaf, min_size=1, max_size=10), st.sampled_from([8, 20, 64]))
def test_rows_hold_each_token_of_their_trie_once_and_every_leaf_once(leaves, longest):
    rows = pack(leaves, longest, WIDE)
    assert sorted(i for row in rows for i in row) == list(range(len(leaves)))
    for row in rows:
        row = [leaves[i] for i in row]
        trie = {tuple(whole(s)[:n]) for s in row for n in range(1, len(whole(s)) + 1)}
        assert width(row) == len(trie) and (len(row) == 1 or len(trie) <= longest)


@settings(max_examples=100, deadline=None)
@given(st.lists(leaf, min_size=1, max_size=7), st.integers(1, 30), st.integers(4, 40))
def test_no_other_cut_of_the_order_costs_less(leaves, hidden, longest):
    def cost(row) -> float:
        tokens = width([leaves[i] for i in row])
        return row_cost(tokens, hidden, len(row) > 1)

    def every_cut(order):
        for cuts in range(1 << (len(order) - 1)):
            at = [0, *(i + 1 for i in range(len(order) - 1) if cuts >> i & 1), len(order)]
            yield [order[a:b] for a, b in pairwise(at)]

    rows = pack(leaves, longest, hidden)
    order = [i for row in rows for i in row]
    assert [whole(leaves[i]) for i in order] == sorted(map(whole, leaves))
    allowed = [
        cut
        for cut in every_cut(order)
        if all(len(row) == 1 or width([leaves[i] for i in row]) <= longest for row in cut)
    ]
    assert sum(map(cost, rows)) == pytest.approx(min(sum(map(cost, cut)) for cut in allowed))


def family(prompt: int, shared: int, own: int, leaves: int = 5) -> list[Sequence]:
    """Leaves with a common prompt and beginning."""
    rng = random.Random(3)
    start, first = random_tokens(rng, prompt), random_tokens(rng, shared)
    return [Sequence(start, first + random_tokens(rng, own)) for _ in range(leaves)]


def test_a_row_is_packed_where_saved_tokens_outweigh_the_denser_mask():
    together = [len(row) for row in pack(family(30, 30, 40), 512, hidden=128)]
    assert together == [5]  # 260 tokens for 500
    # long responses that part at once: a row of their own each, though the prompt would be saved
    assert pack(family(5, 0, 200), 2048, hidden=128) == pack(family(5, 0, 200), 5, hidden=128)
    assert {len(row) for row in pack(family(5, 0, 200), 2048, hidden=128)} == {1}
    # the same leaves in a model where attention costs little
    assert {len(row) for row in pack(family(5, 0, 200), 2048, hidden=WIDE)} == {5}


def test_packed_rows_and_plain_ones_never_meet_in_a_pass():
    rows = [DRAWN, [Sequence([A], [B, C, D, E])], DRAWN, [Sequence([A], [B, C, D])]]
    batches = token_batches(rows, 1000)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3]
    assert [{len(rows[i]) > 1 for i in batch} for batch in batches if set(batch) & {0, 2}] == [
        {True}
    ]


# --------------------------------------------------------------------------------------------------
# The same numbers
# --------------------------------------------------------------------------------------------------
def grown(rng, trees: int = 3, branches: int = 3) -> list[Sequence]:
    """The leaves of a few trees over two prompts."""
    found = []
    for prompt in (random_tokens(rng, 4), random_tokens(rng, 6)):
        for _ in range(trees):
            response = random_tokens(rng, rng.randint(6, 14))
            found.append(Sequence(prompt, response))
            for _ in range(branches):
                at = rng.randrange(1, len(response))
                found.append(
                    Sequence(prompt, response[:at] + random_tokens(rng, rng.randint(1, 9)))
                )
    rng.shuffle(found)
    return found


def taught(rng, sequences) -> list[TrainingSequence]:
    """With advantages, behaviour log-probs and weights that differ between leaves which share the
    token."""
    return [
        TrainingSequence(
            s.prompt_ids,
            s.tokens,
            [rng.uniform(-2, 2) for _ in s.tokens],
            [rng.uniform(-5, -2) for _ in s.tokens],
            [rng.uniform(0.3, 2) for _ in s.tokens],
        )
        for s in sequences
    ]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("packing", [together, one_row, partial(pack, longest=24, hidden=32)])
def test_log_probs_and_entropies_are_those_of_the_plain_path(kind, packing):
    leaves = grown(random.Random(1))
    plain = score(MODELS[kind], leaves, 0.7, token_budget=100)
    got = score(MODELS[kind], leaves, 0.7, token_budget=100, packing=packing)
    assert max(map(len, packing(leaves))) > 1
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        np.testing.assert_allclose(one.entropies, other.entropies, atol=1e-5)


def test_continuations_share_the_prefixes_in_their_prompts():
    """Scored are the new tokens only; the prompts hold problem and prefix."""
    rng, seen = random.Random(2), []
    start = random_tokens(rng, 20)
    cuts = [12, 12, 15, 15]
    rows = [Sequence(start[:at], random_tokens(rng, 5)) for at in cuts]
    model = tiny_model("qwen2")
    plain = score(model, rows)
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    got = score(model, rows, packing=together)
    assert seen == [15 + 4 * 5] and sum(map(width, [[s] for s in rows])) == 54 + 4 * 5
    for one, other in zip(got, plain):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_responses_with_steps_keep_rows_of_their_own():
    """FCI sees one response a row; a packing function is not even asked."""
    rng = random.Random(4)
    steps = [Sequence([A, B], random_tokens(rng, 12), [0, 3, 6, 9, 12]) for _ in range(3)]
    got = score(MODELS["qwen2"], steps, delta=1, packing=None)
    assert got == score(MODELS["qwen2"], steps, delta=1)


def gradient(model, sequences, reference=None, **options) -> tuple[torch.Tensor, TrainStats]:
    learner = Learner(model, reference, max_grad_norm=1e9, kl_coef=0.1, **options)
    kept = []
    learner.optimizer.step = lambda: kept.extend(p.grad.flatten() for p in model.parameters())
    stats = TrainStats()
    learner.update(sequences, stats)
    return torch.cat(kept), stats


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_eq1_the_gradient_is_that_of_the_plain_path_whatever_the_rows_and_passes(kind, budget):
    rng = random.Random(5)
    sequences = taught(rng, grown(rng))
    reference = tiny_model(kind, seed=1)
    expected, plain = gradient(MODELS[kind], sequences, reference)
    assert expected.abs().max() > 1e-2 and 0.1 < plain.clip_fraction / plain.tokens < 0.9
    for packing in (together, one_row, partial(pack, longest=30, hidden=32), alone):
        got, stats = gradient(
            MODELS[kind], sequences, reference, packing=packing, token_budget=budget
        )
        assert (got - expected).abs().max() < 1e-6 * max(1, expected.abs().max())
        for name in ("loss", "policy_loss", "kl", "clip_fraction", "ratio"):
            assert getattr(stats, name) == pytest.approx(getattr(plain, name), rel=1e-4, abs=1e-4)


def test_a_rank_without_rows_makes_a_pass_of_one_token():
    logp, entropy = token_logprobs(MODELS["qwen2"], [], 1.0)
    assert logp.shape == entropy.shape == (1,)


# --------------------------------------------------------------------------------------------------
# Where it would not be exact
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MODELS)
def test_plain_decoders_have_no_obstacle(kind):
    assert packing_obstacle(MODELS[kind]) == ""


@pytest.mark.parametrize("kind", ["qwen2_window", "mistral"])
def test_sliding_windows_are_an_obstacle(kind):
    assert "see the whole sequence" in packing_obstacle(tiny_model(kind))


def test_another_attention_is_an_obstacle():
    assert "eager" in packing_obstacle(eager_twin(MODELS["qwen2"]))


def test_a_model_that_takes_no_positions_shows_in_a_trial():
    """Its log-probs would silently be others: found by comparing a few."""
    model = tiny_model("qwen2")
    plain = model.base_model.forward
    model.base_model.forward = lambda position_ids=None, **rest: plain(**rest)
    assert "off" in packing_obstacle(model)
    model.base_model.forward = lambda input_ids, use_cache: plain(input_ids=input_ids)
    assert packing_obstacle(model).startswith("it refuses them: ")


# --------------------------------------------------------------------------------------------------
# Mini-batches
# --------------------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60), st.integers(0, 5))
def test_mini_batches_are_cut_between_problems_and_nearly_equal(counts, size, seed):
    leaves = [Sequence([p], [i]) for p, count in enumerate(counts) for i in range(count)]
    random.Random(seed).shuffle(leaves)
    parts = mini_batches(leaves, size, seed)
    assert sorted(map(whole, sum(parts, []))) == sorted(map(whole, leaves))
    problems = [{s.prompt_ids[0] for s in part} for part in parts]
    assert sum(map(len, problems)) == len(counts)  # no problem is in two parts
    even = len(leaves) / max(1, -(-len(leaves) // size))
    for part, found in zip(parts, problems):
        largest = max(counts[p] for p in found)
        assert len(found) == 1 if largest > size else len(part) <= even + largest
    again = mini_batches(leaves, size, seed)
    assert parts == again


def test_mini_batches_shuffle_problems_by_the_seed():
    leaves = [Sequence([p], [i]) for p in range(12) for i in range(5)]
    orders = {
        tuple(s.prompt_ids[0] for part in mini_batches(leaves, 10, seed) for s in part)
        for seed in range(5)
    }
    assert len(orders) == 5
    assert [len(part) for part in mini_batches(leaves, 10, 0)] == [10] * 6


def test_equal_problems_make_equal_mini_batches():
    leaves = [Sequence([p], [i]) for p in range(VOCABULARY) for i in range(6)]
    assert {len(part) for part in mini_batches(leaves, 60, 0)} == {60}
