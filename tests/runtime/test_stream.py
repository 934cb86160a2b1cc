"""test_stream.py: the order of problems is a permutation each epoch, and two counters restore it.

python -m pytest tests/runtime/test_stream.py
"""

import random

import pytest
from fixtures import saved_and_restored
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.stream import ProblemStream

quick = settings(max_examples=150, deadline=None)


@quick
@given(st.integers(1, 12), st.integers(0, 3), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_stream_every_epoch_is_a_permutation_however_it_is_taken(size, seed, counts):
    stream = ProblemStream(size, seed)
    taken = []
    # batches that wrap in their middle, and batches larger than the set, included
    for count in counts:
        part = stream.take(count)
        assert len(part) == count
        taken += part
    assert taken == ProblemStream(size, seed).take(sum(counts))
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


@quick
@given(
    st.integers(1, 12),
    st.integers(0, 3),
    st.lists(st.integers(0, 30), max_size=5),
    st.integers(0, 60),
)
def test_stream_restored_at_any_point_continues_identically(size, seed, before, after):
    stream = ProblemStream(size, seed)
    for count in before:
        stream.take(count)
    assert saved_and_restored(stream).take(after) == stream.take(after)


def test_stream_epochs_and_seeds_differ():
    stream = ProblemStream(20, seed=1)
    epochs = [tuple(stream.take(20)) for _ in range(5)]
    assert len(set(epochs)) == 5
    assert len({tuple(ProblemStream(20, seed).take(20)) for seed in range(5)}) == 5
    assert tuple(range(20)) not in epochs  # shuffled, the first epoch too


def test_stream_does_not_touch_the_global_generator():
    random.seed(5)
    state = random.getstate()
    first = ProblemStream(9).take(9)
    assert random.getstate() == state
    random.seed(6)
    assert ProblemStream(9).take(9) == first


def test_stream_wraps_in_the_middle_of_a_batch():
    stream = ProblemStream(5)
    stream.take(3)
    wrapped = stream.take(4)
    assert (stream.epoch, stream.position) == (1, 2)
    assert wrapped[2:] == ProblemStream(5, epoch=1).take(2)


@pytest.mark.parametrize("size", [0, -1])
def test_stream_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match="empty"):
        ProblemStream(size)


@pytest.mark.parametrize("position", [-1, 5, 6])  # 6 made take() loop for ever
def test_stream_restored_on_a_smaller_problem_set_is_refused(position):
    with pytest.raises(ValueError, match="position"):
        ProblemStream(5, position=position)
