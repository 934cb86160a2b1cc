"""test_tree.py: Eq. 2, 3 and 7 by hand, and the tree's invariants on random forests.

Eq. 2-3 and Eq. 7 are also compared with second implementations that stand in this file and share no
code with tree.py: `brute_force` has no tree and no recursion, only sets of leaves; `eq7_exact`
interpolates with exact fractions.

    python -m pytest tests/test_tree.py
"""

import copy
import math
import random
from fractions import Fraction

import pytest
from forests import PROMPT, forests, quick, response
from hypothesis import given
from hypothesis import strategies as st

from tree import (
    BRANCH_RULES,
    Continuation,
    Response,
    TrainingSequence,
    build_tree,
    choose_branch_points,
    drop_zero,
    fci_branch_steps,
    step_advantages,
    tree_sequences,
)


# --------------------------------------------------------------------------------------------------
# Eq. 2-3 by hand
# --------------------------------------------------------------------------------------------------
def test_eq2_eq3_advantages_by_hand():
    """The example of tree.py's docstring: r1 (right) is cut once, continuations right and wrong; r2
    is wrong."""
    r1 = response([10, 11, 12, 13], 1.0, (2, [20, 21], 1.0), (2, [30], 0.0))
    r2 = response([40, 41], 0.0)
    root = build_tree([r1, r2])
    inner = root.children[0]
    assert root.value == Fraction(2, 4) and root.leaves == 4
    assert inner.value == Fraction(2, 3) and inner.leaves == 3

    rest, right, wrong, other = tree_sequences(PROMPT, [r1, r2])
    prefix = [0.19245, 0.19245]  # (1/6 + 1/6) / sqrt 3, on the two tokens before the cut
    assert rest.tokens == [10, 11, 12, 13] and rest.advantages == pytest.approx(
        [*prefix, 0.8333, 0.8333], abs=5e-5
    )
    assert right.tokens == [10, 11, 20, 21] and right.advantages == pytest.approx(
        [*prefix, 0.8333, 0.8333], abs=5e-5
    )
    assert wrong.tokens == [10, 11, 30] and wrong.advantages == pytest.approx(
        [*prefix, -1.1667], abs=5e-5
    )
    # -1/2 against the root, its parent too
    assert other.tokens == [40, 41] and other.advantages == [-1.0, -1.0]


def test_eq2_eq3_two_branch_points_by_hand():
    """One response of 6 tokens (right), cut at 2 (continuations right, wrong) and 4 (wrong, wrong);
    a second is wrong.

        root: rewards 1 | 1 0 | 0 0 | 0           V = 2/6 = 1/3            L = 6
        n1 = tokens 0-1: leaves 1 1 0 0 0         V = 2/5                  L = 5, parent root
        n2 = tokens 2-3: leaves 1 0 0             V = 1/3                  L = 3, parent n1
        tail = tokens 4-5: V = 1, parent n2; the continuations at 4 have parent n2, those at 2 have
        parent n1
    """
    r1 = response(
        [10, 11, 12, 13, 14, 15],
        1.0,
        # order must not matter
        (4, [20, 21], 0.0),
        (2, [30], 1.0),
        (4, [40], 0.0),
        (2, [50, 51, 52], 0.0),
    )
    r2 = response([60], 0.0)
    a1 = (1 / 15 + 1 / 15) / math.sqrt(5)  # V - V(root) = 2/5 - 1/3 = 1/15, twice
    a2 = (0 - 1 / 15) / math.sqrt(3)  # V - V(root) = 0;  V - V(n1) = 1/3 - 2/5 = -1/15
    tail = 2 / 3 + 2 / 3  # 1 - 1/3 against root and against n2
    late_wrong = -1 / 3 - 1 / 3
    early_right = 2 / 3 + 3 / 5  # 1 - 1/3 against root, 1 - 2/5 against n1
    early_wrong = -1 / 3 - 2 / 5
    expected = {
        (10, 11, 12, 13, 14, 15): [a1, a1, a2, a2, tail, tail],
        (10, 11, 12, 13, 20, 21): [a1, a1, a2, a2, late_wrong, late_wrong],
        (10, 11, 12, 13, 40): [a1, a1, a2, a2, late_wrong],
        (10, 11, 30): [a1, a1, early_right],
        (10, 11, 50, 51, 52): [a1, a1, early_wrong, early_wrong, early_wrong],
        (60,): [-2 / 3],
    }
    sequences = tree_sequences(PROMPT, [r1, r2])
    assert len(sequences) == len(expected)
    for s in sequences:
        assert s.advantages == pytest.approx(expected[tuple(s.tokens)], rel=1e-12)


def test_eq3_local_term_is_against_the_parent_not_the_root():
    """A lone response: V(root) is the prefix's value, so the prefix gets exactly 0 and the leaves
    twice their gain."""
    sequences = tree_sequences(PROMPT, [response([1, 2], 1.0, (1, [3], 0.0))])
    assert [s.advantages for s in sequences] == [[0.0, 1.0], [0.0, -1.0]]


# --------------------------------------------------------------------------------------------------
# Random forests
# --------------------------------------------------------------------------------------------------


def leaves_of(forest):
    """(response index, cut or infinity for the response itself, tokens, log-probs, reward),
    straight from the data."""
    found = []
    for i, r in enumerate(forest):
        found.append((i, math.inf, r.tokens, r.logprobs, r.reward))
        for c in r.continuations:
            found.append(
                (i, c.at, r.tokens[: c.at] + c.tokens, r.logprobs[: c.at] + c.logprobs, c.reward)
            )
    return found


def brute_force(forest):
    """Eq. 2-3 without a tree. Two leaves of one response share a position iff it lies before both
    their cuts; those that share a position ARE its node, and its parent is the last different set
    before it, or all leaves (the root)."""
    leaves = leaves_of(forest)

    def value(indices):
        return sum(Fraction(leaves[i][4]) for i in indices) / len(indices)

    everyone = frozenset(range(len(leaves)))
    result = []
    for me, (i, cut, tokens, _, _) in enumerate(leaves):
        advantages, node, parent = [], None, everyone
        for position in range(len(tokens)):
            sharing = frozenset(
                m
                for m, (j, other, *_) in enumerate(leaves)
                if m == me or (j == i and position < min(cut, other))
            )
            if node is not None and sharing != node:
                parent = node
            node = sharing
            v = value(sharing)
            advantages.append(
                float((v - value(everyone)) + (v - value(parent))) / len(sharing) ** 0.5
            )
        result.append(advantages)
    return result


def inner_nodes(node):
    if node.children:
        yield node
        for child in node.children:
            yield from inner_nodes(child)


def by_tokens(sequences):
    return sorted((s.tokens, s.advantages, s.logprobs) for s in sequences)


@quick
@given(forests())
def test_eq2_eq3_equal_brute_force_over_leaf_sets(forest):
    expected = sorted(
        (leaf[2], a, leaf[3]) for leaf, a in zip(leaves_of(forest), brute_force(forest))
    )
    got = by_tokens(tree_sequences(PROMPT, forest))
    assert [tokens for tokens, _, _ in got] == [tokens for tokens, _, _ in expected]
    for (_, advantages, logprobs), (_, wanted, wanted_logprobs) in zip(got, expected):
        assert advantages == pytest.approx(wanted, rel=1e-12, abs=1e-300)
        assert logprobs == wanted_logprobs


@quick
@given(forests())
def test_eq2_children_deviate_from_their_parent_by_zero_in_sum(forest):
    root = build_tree(forest)
    for node in inner_nodes(root):
        # exact: fractions
        assert sum(child.leaves * (child.value - node.value) for child in node.children) == 0
        assert node.leaves == sum(child.leaves for child in node.children)
    rewards = [Fraction(leaf[4]) for leaf in leaves_of(forest)]
    assert sum(reward - root.value for reward in rewards) == 0
    assert root.leaves == len(rewards) == len(forest) + sum(len(r.continuations) for r in forest)


@quick
@given(forests())
def test_every_leaf_is_one_sequence_with_exactly_its_tokens_and_logprobs(forest):
    sequences = tree_sequences(PROMPT, forest)
    assert len(sequences) == len(forest) + sum(len(r.continuations) for r in forest)
    assert sorted((s.tokens, s.logprobs) for s in sequences) == sorted(
        (leaf[2], leaf[3]) for leaf in leaves_of(forest)
    )
    for s in sequences:
        assert s.prompt_ids == PROMPT
        assert len(s.tokens) == len(s.advantages) == len(s.logprobs)


@quick
@given(forests())
def test_shared_prefixes_have_identical_advantages_and_logprobs(forest):
    """Token ids are unique to one sampled token here, so an equal id is the same node wherever it
    stands."""
    seen = {}
    for s in tree_sequences(PROMPT, forest):
        for token, advantage, logprob in zip(s.tokens, s.advantages, s.logprobs):
            assert seen.setdefault(token, (advantage, logprob)) == (advantage, logprob)


@quick
@given(st.data())
def test_equal_rewards_give_exactly_zero(data):
    # any: 0.1 + 0.1 + 0.1 is not 0.3 in floats
    reward = data.draw(st.floats(allow_nan=False, allow_infinity=False))
    forest = data.draw(forests(st.just(reward)))
    assert all(a == 0 for s in tree_sequences(PROMPT, forest) for a in s.advantages)
    assert drop_zero(tree_sequences(PROMPT, forest)) == []


@quick
@given(forests(), st.randoms(use_true_random=False))
def test_permuting_responses_and_continuations_only_permutes_the_result(forest, rng):
    shuffled = copy.deepcopy(forest)
    rng.shuffle(shuffled)
    for r in shuffled:
        rng.shuffle(r.continuations)
    assert by_tokens(tree_sequences(PROMPT, shuffled)) == by_tokens(tree_sequences(PROMPT, forest))


@quick
@given(forests())
def test_input_is_not_modified(forest):
    before = copy.deepcopy(forest)
    tree_sequences(PROMPT, forest)
    assert forest == before


# --------------------------------------------------------------------------------------------------
# Sequences
# --------------------------------------------------------------------------------------------------
def test_behaviour_logprobs_prefix_from_the_response_suffix_from_the_continuation():
    """The continuation repeats the response's tokens, but the newer policy that sampled it gave
    other log-probs."""
    r = Response(
        [5, 6, 7],
        [-0.1, -0.2, -0.3],
        1.0,
        continuations=[Continuation(1, [6, 7], [-2.0, -3.0], 0.0)],
    )
    own, continued = tree_sequences(PROMPT, [r])
    assert own.logprobs == [-0.1, -0.2, -0.3]
    assert continued.logprobs == [-0.1, -2.0, -3.0]


def test_an_empty_continuation_is_a_leaf_that_ends_at_the_cut():
    own, empty = tree_sequences(PROMPT, [response([1, 2], 1.0, (1, [], 0.0))])
    assert (own.tokens, empty.tokens, empty.advantages) == ([1, 2], [1], [0.0])


def test_drop_zero_keeps_a_sequence_with_one_nonzero_token():
    zero = TrainingSequence([1], [2, 3], [0.0, -0.0], [0.0, 0.0])
    partly = TrainingSequence([1], [2, 3], [0.0, -0.5], [0.0, 0.0])
    assert drop_zero([zero, partly, zero]) == [partly]


# --------------------------------------------------------------------------------------------------
# The public function
# --------------------------------------------------------------------------------------------------
def plain_forest():
    return [
        {
            "tokens": [1, 2, 3],
            "reward": 1.0,
            "continuations": [{"at": 1, "tokens": [4], "reward": 0.0}],
        },
        {"tokens": [5], "reward": 0.0},
    ]


def test_step_advantages_by_hand():
    """V(root) = 1/3; prefix: V = 1/2, L = 2, A = (1/6 + 1/6) / sqrt 2; leaves 2/3 + 1/2, -1/3 -
    1/2; other -2/3."""
    responses = plain_forest()
    (own, a_own), (new, a_new), (other, a_other) = step_advantages(responses)
    prefix = (1 / 3) / math.sqrt(2)
    assert (own, new, other) == ([1, 2, 3], [1, 4], [5])
    assert a_own == pytest.approx([prefix, 7 / 6, 7 / 6])
    assert a_new == pytest.approx([prefix, -5 / 6])
    assert a_other == pytest.approx([-2 / 3])
    assert responses == plain_forest()  # not modified
    assert step_advantages([]) == []


@pytest.mark.parametrize("at", [-1, 0, 3, 4])
def test_step_advantages_refuses_a_cut_outside_the_response(at):
    responses = plain_forest()
    responses[0]["continuations"][0]["at"] = at
    with pytest.raises(ValueError, match="inside its response"):
        step_advantages(responses)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(reward):
    for place in ("response", "cut response", "continuation"):
        cut, uncut = responses = plain_forest()
        {"response": uncut, "cut response": cut, "continuation": cut["continuations"][0]}[place][
            "reward"
        ] = reward
        with pytest.raises(ValueError, match="finite"):
            step_advantages(responses)


# --------------------------------------------------------------------------------------------------
# Eq. 7: branch points
# --------------------------------------------------------------------------------------------------
def tens(fci):
    return list(range(0, 10 * len(fci), 10))


def test_eq7_quantile_is_over_all_steps_with_zeros_and_interpolates_linearly():
    """0.8 * (6 - 1) = index 4 of 0 0 0 0 .2 .3: the threshold is exactly .2, a candidate (>=) and
    the earlier one. Without the zeros (or without the first step) the threshold would be .28 (.22),
    and step 1 no candidate."""
    fci = [0, 0.2, 0.3, 0, 0, 0]
    assert fci_branch_steps(fci, tens(fci), n=1) == [1]
    # 0.8 * 9 = 7.2 of 0 0 0 0 0 .1 .2 .5 .8 .9: threshold .5 + .2 * .3 = .56, so .5 at step 2 is no
    # candidate
    fci = [0, 0.1, 0.5, 0.2, 0.9, 0.8, 0, 0, 0, 0]
    assert fci_branch_steps(fci, tens(fci), n=2) == [4, 5]
    # 0.7 * 9 = 6.3: threshold .2 + .3 * .3 = .29
    assert fci_branch_steps(fci, tens(fci), n=3, rho=0.3) == [2, 4, 5]


def test_eq7_takes_the_earliest_of_the_candidates_not_the_highest():
    # index 0.8 * 15 = 12: threshold .6, C = {2, 3, 4, 5}
    fci = [0, 0, 0.6, 0.7, 0.8, 0.9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert fci_branch_steps(fci, tens(fci), n=2) == [2, 3]
    assert fci_branch_steps(fci, tens(fci), n=1) == [2]
    assert fci_branch_steps(fci, tens(fci), n=9) == [2, 3, 4, 5]


def test_eq7_quantile_zero_means_the_smallest_positive_score():
    # 2 of 20 steps score: the 0.8 quantile is 0, and every positive score counts
    fci = [0, 0, 0, 0.4, 0.1] + [0] * 15
    assert fci_branch_steps(fci, tens(fci), n=3) == [3, 4]
    assert fci_branch_steps([0.0] * 6, tens([0] * 6), n=2) == []
    assert fci_branch_steps([], [], n=2) == []


def test_eq7_never_the_first_step():
    assert fci_branch_steps([0.9, 0.8, 0, 0, 0, 0], tens([0] * 6), n=2) == [1]


def test_eq7_min_gap_from_the_start_and_between_branch_points():
    fci = [
        0,
        0.9,
        0.9,
        0.9,
        0.9,
        0.9,
        0,
        0,
    ]  # all of 1..5 are candidates, starting at 10, 20, ... 50
    assert fci_branch_steps(fci, tens(fci), n=3, min_gap=10) == [1, 2, 3]
    # 10 is too near the start, 30 too near 20
    assert fci_branch_steps(fci, tens(fci), n=3, min_gap=11) == [2, 4]
    assert fci_branch_steps(fci, tens(fci), n=3, min_gap=51) == []


def stepped(fci, branchable=None, length=10):
    """A response with these scores, `length` tokens a step, so that step k starts at token k *
    length."""
    count = len(fci)
    return Response(
        [1] * (length * count),
        [0.0] * (length * count),
        bounds=[length * k for k in range(count + 1)],
        fci=fci,
        branchable=count if branchable is None else branchable,
    )


def choose(r, method="fci", n=2, rng=None, **options):
    return choose_branch_points(r, method, n, rng or random.Random(0), **options)


def test_eq7_fill_up_with_the_earliest_other_steps():
    # one candidate, step 3; step 1 fills up; rising order
    assert choose(stepped([0, 0, 0, 0.4, 0, 0])) == [10, 30]
    assert choose(stepped([0, 0.4, 0, 0, 0, 0])) == [10, 20]  # never the same twice
    assert choose(stepped([0.0] * 6)) == [10, 20]  # no candidate at all
    assert choose(stepped([0.0] * 6), n=0) == []


def test_eq7_short_responses_have_fewer_branch_points():
    assert choose(stepped([0.0])) == []  # one step: nothing before it to keep
    assert choose(stepped([])) == []
    assert choose(stepped([0.0, 0.0])) == [10]
    assert choose(stepped([0.0] * 3), n=9) == [10, 20]
    # as `score` leaves it: no fci for one step
    assert choose(Response([1], [0.0], bounds=[0, 1], branchable=1)) == []


def test_eq7_min_gap_binds_candidates_but_not_fill_ups():
    r = stepped([0, 0.9, 0.9, 0.9, 0.9, 0.9, 0, 0])
    # step 4 is chosen, then step 1 fills up although it is 10 tokens in
    assert choose(r, min_gap=40) == [10, 40]
    assert choose(r, min_gap=25) == [10, 30]
    assert choose(r, n=1, min_gap=25) == [30]


def test_eq7_steps_beyond_branchable_are_neither_candidates_nor_fill_ups_but_count_as_zeros():
    scores = [0, 0.1, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    # As zeros they leave 0 .1 .2 .3 0 0 0 0 0 0: index 7.2, threshold .1 + .2 * .1 = .12, C = {2,
    # 3}
    assert choose(stepped(scores, branchable=4)) == [20, 30]
    assert choose(stepped(scores, branchable=2)) == [10]
    assert choose(stepped(scores, branchable=1)) == choose(stepped(scores, branchable=0)) == []


def test_fci_mean_is_eq5_divided_by_its_number_of_terms():
    """Six steps, Delta = 1: steps 1 to 4 have 4, 3, 2, 1 later ones. Their sums fall, their means
    rise: 0.6, 0.7, 0.8, 1. The 80 % quantile of the means is 0.8, the 90 % quantile 0.9."""
    r = stepped([0.0, 2.4, 2.1, 1.6, 1.0, 0.0])
    assert choose(r, "fci", n=2, delta=1) == [10, 20]
    assert choose(r, "fci_mean", n=2, delta=1) == [30, 40]
    assert choose(r, "fci_mean", n=1, delta=1, rho=0.1) == [40]
    # Delta = 4: one term for step 1, so nothing changes there
    assert choose(stepped([0, 0.5, 0, 0, 0, 0]), "fci_mean", n=1, delta=4) == [10]
    assert r.fci == [0.0, 2.4, 2.1, 1.6, 1.0, 0.0]  # the response keeps its own


def test_step_entropy_is_the_mean_over_a_steps_tokens():
    """One very unsure token does not make an unsure step."""
    r = stepped([0.0] * 5)
    means = [9.0, 0.2, 0.5, 0.4, 0.5]
    r.entropies = [h for h in means for _ in range(10)]
    r.entropies[12] += 1.0  # step 1: 0.3
    assert choose(r, "step_entropy") == [20, 40]  # of equal ones the earlier; never the first step
    assert choose(r, "step_entropy", n=1) == [20]
    assert choose(r, "step_entropy", n=3) == [20, 30, 40]
    r.branchable = 4
    assert choose(r, "step_entropy") == [20, 30]


def test_fixed_cuts_into_equal_parts_and_earliest_takes_the_first():
    nine = stepped([0.0] * 9)
    assert choose(nine, "fixed") == [30, 60] and choose(nine, "fixed", n=1) == [40]
    assert choose(nine, "earliest") == [10, 20] and choose(nine, "earliest", n=1) == [10]
    short = stepped([0.0] * 2)
    assert choose(short, "fixed") == [10] == choose(short, "earliest")
    assert choose(stepped([0.0]), "fixed") == [] == choose(stepped([0.0]), "earliest")
    assert choose(stepped([0.0] * 9, branchable=4), "fixed") == [10, 20]
    assert choose(stepped([0.0] * 9, branchable=0), "fixed") == []


@quick
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 4), st.randoms(use_true_random=False))
def test_every_rule_gives_distinct_points_inside_the_response(steps, branchable, n, rng):
    """In rising order, at most n, at steps that may be branch points (but for token entropy)."""
    r = stepped([rng.random() for _ in range(steps)], branchable=min(steps, branchable))
    r.entropies = [rng.random() for _ in r.tokens]
    for rule in BRANCH_RULES:
        points = choose(r, rule, n=n, rng=rng, delta=1)
        assert points == sorted(set(points)) and len(points) <= n
        inner = range(1, len(r.tokens) - 1)
        allowed = inner if rule == "entropy" else r.bounds[1 : r.branchable]
        assert set(points) <= set(allowed)
        if rule != "fixed":  # which may round two points to one step
            assert len(points) == min(n, len(allowed))


def eq7_exact(y, starts, branchable, n, min_gap):
    """Eq. 7 for rho = 1/5 with exact fractions: sort, interpolate, walk; then fill up."""
    y = [Fraction(score) if 0 < k < branchable else Fraction(0) for k, score in enumerate(y)]
    position = Fraction(4, 5) * (len(y) - 1)
    low = math.floor(position)
    high = min(low + 1, len(y) - 1)
    threshold = sorted(y)[low] + (position - low) * (sorted(y)[high] - sorted(y)[low])
    positive = [score for score in y if score > 0]
    if threshold == 0 and positive:
        threshold = min(positive)
    picked, last = [], 0
    for k in range(1, branchable):
        if y[k] > 0 and y[k] >= threshold and starts[k] - last >= min_gap and len(picked) < n:
            picked.append(k)
            last = starts[k]
    for k in range(1, branchable):
        if len(picked) < n and k not in picked:
            picked.append(k)
    return sorted(starts[k] for k in picked)


@st.composite
def scored_responses(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=40))
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    # eighths: sums and products of few bits, so that floats and fractions agree, ties included
    scores = st.integers(0, 16).map(lambda i: i / 8) | st.just(0.0)
    fci = draw(st.lists(scores, min_size=len(lengths), max_size=len(lengths)))
    entropies = draw(
        st.lists(st.integers(0, 9).map(float), min_size=bounds[-1], max_size=bounds[-1])
    )
    return Response(
        list(range(bounds[-1])),
        [0.0] * bounds[-1],
        entropies=entropies,
        bounds=bounds,
        fci=fci,
        branchable=draw(st.integers(0, len(lengths))),
    )


@quick
@given(scored_responses(), st.integers(0, 5), st.integers(0, 20))
def test_eq7_equals_an_exact_second_implementation(r, n, gap):
    expected = eq7_exact(r.fci, r.bounds[:-1], r.branchable, n, gap)
    assert choose(r, n=n, min_gap=gap) == expected


@quick
@given(
    scored_responses(),
    st.sampled_from(["fci", "entropy", "random"]),
    st.integers(0, 6),
    st.integers(0, 9),
)
def test_branch_points_are_distinct_sorted_inside_and_on_usable_steps(r, method, n, gap):
    before = copy.deepcopy(r)
    at = choose(r, method, n, min_gap=gap)
    assert at == sorted(set(at)) and all(0 < a < len(r.tokens) for a in at)
    if method == "entropy":
        assert len(at) == min(n, max(0, len(r.tokens) - 2)) and len(r.tokens) - 1 not in at
    else:
        usable = r.bounds[1 : r.branchable] if r.branchable else []
        assert set(at) <= set(usable) and len(at) == min(n, len(usable))
    assert r == before


def test_entropy_baseline_takes_the_top_tokens_without_the_first_and_the_last():
    r = Response(
        [1] * 6, [0.0] * 6, entropies=[9.0, 0.2, 0.8, 0.1, 0.5, 9.0], bounds=[0, 6], branchable=1
    )
    assert choose(r, "entropy", 2) == [2, 4]
    assert choose(r, "entropy", 1) == [2]
    assert choose(r, "entropy", 9) == [1, 2, 3, 4]


def test_entropy_baseline_ties_go_to_the_earlier_token():
    r = Response(
        [1] * 6, [0.0] * 6, entropies=[0, 0.5, 0.7, 0.5, 0.7, 0.7], bounds=[0, 6], branchable=1
    )
    assert choose(r, "entropy", 1) == [2]
    assert choose(r, "entropy", 3) == [1, 2, 4]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_entropy_baseline_has_no_choice_in_two_tokens(length):
    assert (
        choose(Response([1] * length, [0.0] * length, entropies=[1.0] * length), "entropy", 2) == []
    )


def test_random_baseline_is_reproducible_and_reaches_every_usable_step():
    r = stepped([0.0] * 6, branchable=5)
    draws = [choose(r, "random", 2, random.Random(seed)) for seed in range(100)]
    assert draws == [choose(r, "random", 2, random.Random(seed)) for seed in range(100)]
    # not step 0, not step 5 beyond branchable
    assert {at for draw in draws for at in draw} == {10, 20, 30, 40}
    assert all(len(set(draw)) == 2 for draw in draws)


def test_only_the_random_baseline_consumes_random_numbers():
    """Otherwise a change of method would change every later draw of the same generator."""
    rng = random.Random(3)
    state = rng.getstate()
    r = stepped([0, 0.4, 0, 0, 0, 0])
    r.entropies = [0.0] * len(r.tokens)
    choose(r, "fci", rng=rng)
    choose(r, "entropy", rng=rng)
    assert rng.getstate() == state
