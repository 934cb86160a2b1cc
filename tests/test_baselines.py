"""test_baselines.py: the advantages and steps of what is not AttnRL, by hand.

python -m pytest tests/test_baselines.py
"""

import copy
import math
from fractions import Fraction

import pytest
from forests import PROMPT, forests, quick, response
from hypothesis import given
from hypothesis import strategies as st

from baselines import (
    datpo_sequences,
    datpo_sizes,
    grpo_sequences,
    prl_sequences,
    prl_steps,
)
from fci import Separators
from tree import Continuation, Response, drop_zero, tree_sequences


# --------------------------------------------------------------------------------------------------
# GRPO
# --------------------------------------------------------------------------------------------------
def test_grpo_advantage_by_hand():
    """Rewards 1 0 0 1 1: mean 0.6, unbiased variance (3 * 0.16 + 2 * 0.36) / 4 = 0.3."""
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    sequences = grpo_sequences(PROMPT, [response([i, i + 1], r) for i, r in enumerate(rewards)])
    std = math.sqrt(0.3)
    for s, reward in zip(sequences, rewards):
        assert s.advantages == pytest.approx([(reward - 0.6) / (std + 1e-6)] * 2, rel=1e-12)
    assert [s.tokens for s in sequences] == [[i, i + 1] for i in range(5)]
    assert [s.logprobs for s in sequences] == [[-i / 100, -(i + 1) / 100] for i in range(5)]


def test_grpo_epsilon_is_added_to_the_std():
    """Rewards 0 and 2e-6: std = sqrt 2 * 1e-6 is of the size of the 1e-6, so the place of the
    epsilon shows."""
    sequences = grpo_sequences(PROMPT, [response([1], 0.0), response([2], 2e-6)])
    assert sequences[1].advantages == pytest.approx([1e-6 / (math.sqrt(2) * 1e-6 + 1e-6)], rel=1e-9)


def test_grpo_one_response_has_no_advantage():
    assert grpo_sequences(PROMPT, [response([1, 2], 1.0)])[0].advantages == [0.0, 0.0]


@quick
@given(st.data())
def test_grpo_equal_rewards_give_exactly_zero(data):
    # any: 0.1 + 0.1 + 0.1 is not 0.3 in floats
    reward = data.draw(st.floats(allow_nan=False, allow_infinity=False))
    forest = data.draw(forests(st.just(reward)))
    assert all(a == 0 for s in grpo_sequences(PROMPT, forest) for a in s.advantages)
    assert drop_zero(grpo_sequences(PROMPT, forest)) == []


@quick
@given(forests())
def test_grpo_does_not_modify_its_input(forest):
    before = copy.deepcopy(forest)
    grpo_sequences(PROMPT, forest)
    assert forest == before


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_grpo_refuses_rewards_that_are_not_finite(reward):
    with pytest.raises(ValueError, match="finite"):
        grpo_sequences(PROMPT, [response([1], 0.0), response([2], reward)])


# --------------------------------------------------------------------------------------------------
# DATPO
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rate, sizes",
    [(0, (2, 2)), (1 / 6, (2, 2)), (1 / 2, (1, 1)), (2 / 3, (1, 1)), (5 / 6, (1, 1)), (1, (0, 0))],
)
def test_datpo_points_and_branches_fall_with_the_solve_rate(rate, sizes):
    """ceil(2 (1 - V(root))) of both: 2, 1.67, 1, 0.67, 0.33, 0."""
    assert datpo_sizes(rate, 2, 2) == sizes


def test_datpo_block_advantages_by_hand():
    """r1 = 4 tokens, right, cut after 2; continuations right and wrong; r2 wrong. V(root) = 2/4, V
    at the cut 2/3. The block before the cut: 2/3 - 1/2; the endings: r - 2/3; r2: 0 - 1/2. The
    block before the cut is trained with r1 only."""
    r1 = Response([1, 2, 3, 4], [-0.1, -0.2, -0.3, -0.4], 1.0)
    r1.continuations = [Continuation(2, [5, 6], [-0.5, -0.6], 1.0)]
    r1.continuations += [Continuation(2, [7], [-0.7], 0.0)]
    first, right, wrong, second = datpo_sequences(PROMPT, [r1, Response([8], [-0.8], 0.0)])
    block, up, down = 2 / 3 - 1 / 2, 1 - 2 / 3, -2 / 3
    assert first.advantages == pytest.approx([block, block, up, up])
    assert right.advantages == pytest.approx([block, block, up, up])
    assert wrong.advantages == pytest.approx([block, block, down])
    assert second.advantages == pytest.approx([-1 / 2])
    assert [s.weights for s in (first, right, wrong, second)] == [
        [1, 1, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 1],
        [1],
    ]
    assert right.tokens == [1, 2, 5, 6] and right.logprobs == [-0.1, -0.2, -0.5, -0.6]
    assert all(s.prompt_ids == PROMPT for s in (first, right, wrong, second))


@quick
@given(forests())
def test_datpo_trains_every_sampled_token_once_and_its_blocks_add_up(responses):
    """The leaves are tree.py's, in its order. Along a path block advantages add up to the leaf's
    reward minus V(root)."""
    for r in responses:
        r.weights = []
        for c in r.continuations:
            c.weights = []
    got, leaves = datpo_sequences(PROMPT, responses), tree_sequences(PROMPT, responses)
    assert [(s.tokens, s.logprobs) for s in got] == [(s.tokens, s.logprobs) for s in leaves]
    sampled = sum(len(r.tokens) + sum(len(c.tokens) for c in r.continuations) for r in responses)
    assert sum(sum(s.weights) for s in got) == sampled
    ends = [
        (end, [0, *sorted({c.at for c in r.continuations if c.at <= at})])
        for r in responses
        for at, end in [
            (len(r.tokens), r),
            *((c.at, c) for c in sorted(r.continuations, key=lambda c: -c.at)),
        ]
    ]
    root = sum(Fraction(end.reward) for end, _ in ends) / len(ends)
    for s, (end, blocks) in zip(got, ends, strict=True):
        if end.tokens:  # else its own block shows nowhere
            total = math.fsum(s.advantages[start] for start in blocks)
            assert total == pytest.approx(float(Fraction(end.reward) - root), rel=1e-6, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# PRL
# --------------------------------------------------------------------------------------------------
def prl_response(old: list[float], ref: list[float], bounds: list[int], reward: float) -> Response:
    return Response(list(range(len(old))), old, reward, bounds=bounds, ref_logprobs=ref)


def test_prl_by_hand():
    """5 tokens in steps [0, 2) [2, 4) [4, 5), log-ratios 0.1, -0.2, 0.3, 0.4, -0.5, eta = 10. From
    the last token of each step on: tokens 1-4 add up to 0, tokens 3-4 to -0.1, token 4 to -0.5.
    GRPO: rewards 1 and 0, std 1 / sqrt 2."""
    ref = [-1.0, -2.0, -0.5, -3.0, -0.25]
    old = [r + d for r, d in zip(ref, (0.1, -0.2, 0.3, 0.4, -0.5))]
    right = prl_response(old, ref, [0, 2, 4, 5], 1.0)
    wrong = prl_response([-1.0], [-1.0], [0, 1], 0.0)
    one, other = prl_sequences(PROMPT, [right, wrong], eta=10.0)
    grpo = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert one.advantages == pytest.approx(
        [grpo, grpo, grpo + 0.01, grpo + 0.01, grpo + 0.05], abs=1e-12
    )
    assert other.advantages == [-grpo] and one.logprobs == old and one.tokens == right.tokens


def test_prl_equal_rewards_leave_a_signal():
    """By GRPO's advantage alone the group would be dropped."""
    group = [
        prl_response([-1.0, -1.0], [-1.5, -1.0], [0, 1, 2], 1.0),
        prl_response([-2.0], [-2.0], [0, 1], 1.0),
    ]
    first, second = prl_sequences(PROMPT, group, eta=200.0)
    assert first.advantages == pytest.approx([-0.5 / 200, 0.0]) and second.advantages == [0.0]
    assert drop_zero([first, second]) == [first] and drop_zero(grpo_sequences(PROMPT, group)) == []


@quick
@given(
    st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.booleans()), min_size=1, max_size=30),
    st.floats(0.5, 500),
)
def test_prl_equals_the_formula_token_by_token(tokens, eta):
    """An independent computation: for every token find its step, and add up from the step's last
    token."""
    old, ref, ends = zip(*tokens)
    bounds = sorted({0, len(tokens), *(i + 1 for i, end in enumerate(ends) if end)})
    got = prl_sequences(PROMPT, [prl_response(list(old), list(ref), bounds, 1.0)], eta)[
        0
    ].advantages
    for t, advantage in enumerate(got):
        last = min(b for b in bounds if b > t) - 1
        assert advantage == pytest.approx(
            -math.fsum(o - r for o, r in zip(old[last:], ref[last:])) / eta, abs=1e-9
        )


@pytest.mark.parametrize(
    "ends, bounds",
    [
        ("blank", [[0, 3, 6], [0, 5, 6]]),
        ("newline", [[0, 3, 6], [0, 2, 5, 6]]),
        ("length", [[0, 4, 6], [0, 4, 6]]),
    ],
)
def test_prl_steps(ends, bounds):
    """9 ends with a blank line, 8 is a single newline; one behind a blank line belongs to it."""
    separators = Separators({5: b"x", 8: b"\n", 9: b".\n\n"})
    for tokens, expected in zip([[5, 9, 8, 5, 5, 8], [5, 8, 5, 9, 8, 5]], bounds):
        assert prl_steps(tokens, separators, ends, length=4) == expected
    assert prl_steps([], separators, ends) == [0]
    assert prl_steps([5], separators, ends) == [0, 1]
