"""test_config.py: the learning rate of a step. Presets, methods, the command line: test_attnrl.py.

python -m pytest tests/runtime/test_config.py
"""

import math

import pytest

from runtime.config import Config, learning_rate


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, [2, 2, 2, 2]),
        ("linear", 0, [2, 1.5, 1, 0.5]),
        ("cosine", 0, [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)]),
        ("constant", 2, [1, 2, 2, 2]),
        ("linear", 2, [1, 2, 2, 1]),
        ("cosine", 2, [1, 2, 2, 1]),
        ("constant", 4, [0.5, 1, 1.5, 2]),
        ("linear", 8, [0.25, 0.5, 0.75, 1]),  # a warm-up longer than the run
    ],
)
def test_learning_rate_by_hand(schedule, warmup, expected):
    assert [
        learning_rate(step, 4, 2.0, warmup, schedule) for step in (1, 2, 3, 4)
    ] == pytest.approx(expected)


def test_learning_rate_decays_to_zero_after_the_last_step():
    assert learning_rate(5, 4, 2.0, 0, "linear") == 0 and learning_rate(
        5, 4, 2.0, 0, "cosine"
    ) == pytest.approx(0)


def test_the_settings_of_a_run_reach_its_learning_rate():
    config = Config(lr=2.0, steps=4, lr_schedule="linear", warmup_steps=2)
    assert [config.learning_rate(step) for step in (1, 2, 3, 4)] == pytest.approx([1, 2, 2, 1])
