"""test_baselines.py: the advantages and steps of what is not AttnRL, by hand.

python -m pytest tests/test_baselines.py
"""

import copy
import math
from fractions import Fraction

import pytest
import torch
from forests import PROMPT, forests, quick, response
from hypothesis import given
from hypothesis import strategies as st

from baselines import (
    cispo_loss,
    datpo_sequences,
    datpo_sizes,
    grpo_sequences,
    gspo_loss,
    mask_cut_off,
    prl_sequences,
    prl_steps,
)
from fci import Separators
from learner import ppo_loss
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


def test_dr_grpo_does_not_divide_by_the_standard_deviation():
    """Rewards 1 0 0: mean 1/3."""
    group = [response([i], r) for i, r in enumerate([1.0, 0.0, 0.0])]
    found = [s.advantages[0] for s in grpo_sequences(PROMPT, group, scale="none")]
    assert found == pytest.approx([2 / 3, -1 / 3, -1 / 3])


# --------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------
def test_gspo_has_one_ratio_a_sequence_by_hand():
    """Sequences of two and one tokens. Log-ratios 0.1 and 0.3: both tokens have e^0.2 = 1.2214;
    0.5: e^0.5 is clipped to 1.28. With A = -1 the lower clip binds: e^-0.5 -> 0.8."""
    logp = torch.tensor([0.1, 0.3, 0.5], requires_grad=True)
    loss, clipped = gspo_loss(logp, torch.zeros(3), torch.ones(3), [2, 1])
    assert torch.allclose(loss, -torch.tensor([math.exp(0.2), math.exp(0.2), 1.28]))
    assert clipped.tolist() == [False, False, True]
    loss.sum().backward()  # d/dx of 2 e^((x + y) / 2) is e^((x + y) / 2)
    assert torch.allclose(logp.grad, -torch.tensor([math.exp(0.2), math.exp(0.2), 0.0]))
    loss, clipped = gspo_loss(torch.tensor([-0.5]), torch.zeros(1), -torch.ones(1), [1])
    assert loss.tolist() == pytest.approx([0.8]) and clipped.tolist() == [True]


def test_gspo_of_single_tokens_is_ppo_without_dual_clip():
    logp, old = torch.linspace(-1, 1, 21), torch.zeros(21)
    for sign in (1.0, -1.0):
        a = torch.full((21,), sign)
        got, wanted = gspo_loss(logp, old, a, [1] * 21), ppo_loss(logp, old, a, dual_clip=99.0)
        assert torch.allclose(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    empty = torch.zeros(0)
    assert gspo_loss(empty, empty, empty, [])[0].shape == (0,)


def test_cispo_bounds_a_tokens_weight_and_keeps_its_gradient():
    """Ratios e^0.5 -> 1.28, e^0.1, e^-0.5 -> 0.8; the gradient in logp is -weight x A."""
    logp = torch.tensor([0.5, 0.1, -0.5], requires_grad=True)
    loss, clipped = cispo_loss(logp, torch.zeros(3), torch.tensor([1.0, 1.0, -2.0]), [3])
    weights = torch.tensor([1.28, math.exp(0.1), 0.8])
    assert torch.allclose(loss, torch.tensor([-0.64, -0.1 * math.exp(0.1), -0.8]), atol=1e-6)
    loss.sum().backward()
    assert torch.allclose(logp.grad, -weights * torch.tensor([1.0, 1.0, -2.0]))
    assert clipped.tolist() == [True, False, True]


def test_cut_off_responses_leave_the_loss():
    """Of r1 the first continuation was cut off; r2 was, too."""
    r1 = response([1, 2, 3], 1.0, (1, [4], 0.0), (2, [5], 1.0))
    r2 = response([6], 0.0)
    r1.continuations[0].finished = r2.finished = False
    sequences = tree_sequences(PROMPT, [r1, r2])
    before = [s.advantages for s in sequences]
    mask_cut_off(sequences, [r1, r2])
    # in the order of the leaves: r1, from token 2, from token 1, r2
    assert [s.tokens for s in sequences] == [[1, 2, 3], [1, 2, 5], [1, 4], [6]]
    assert [s.weights for s in sequences] == [[1, 1, 1], [1, 1, 1], [0, 0], [0]]
    assert [s.trained for s in sequences] == [3, 3, 0, 0]
    assert [s.advantages for s in sequences] == before  # their rewards still count
    assert drop_zero(sequences) == sequences[:2]


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


def test_gspo_has_a_finite_gradient_where_exp_overflows():
    logp = torch.tensor([200.0], requires_grad=True)
    gspo_loss(logp, torch.zeros(1), torch.ones(1), [1])[0].sum().backward()
    assert logp.grad.item() == 0
