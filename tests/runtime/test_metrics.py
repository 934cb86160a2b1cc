"""test_metrics.py: what a step measures, and failures with a name.

python -m pytest tests/runtime/test_metrics.py
"""

import math

import pytest
import torch
from helpers import tiny_model

import attnrl
from fci import fci_scores
from runtime.data import Problem
from runtime.metrics import (
    TrainStats,
    batch_notices,
    empty_batch_lines,
    fci_spread,
    notices,
    outcome_ratios,
    uniform_fci,
)
from tree import Response


def test_fci_spread_by_hand():
    """1 2 3: mean 2, population std sqrt(2/3); zeros (first and last steps) do not count; too few
    scores: None."""
    flat = [3.0, 2.0, 1.0]  # in these units 1 2 3 spread even more
    assert fci_spread([[0, 1.0, 2.0, 3.0, 0, 0]], [[0, *flat, 0, 0]]) == pytest.approx(
        math.sqrt(2 / 3) / 2
    )
    assert fci_spread([[0, 0.5, 0.5, 0.5, 0]], [[0, *flat, 0]]) == 0  # all alike
    # as attention to everything alike
    assert fci_spread([[0, 0.6, 0.4, 0.2, 0]], [[0, *flat, 0]]) == pytest.approx(0)
    # the median of .41 0 0
    assert (
        fci_spread([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 1.0, 0]], [flat] * 4)
        == 0
    )
    assert (
        fci_spread([], []) is None
        and fci_spread([[0, 1.0, 2.0, 0], []], [[0, 1.0, 1.0, 0], []]) is None
    )


def test_collapse_is_named_for_a_model_that_attends_evenly_and_not_for_one_that_does_not():
    """The real thing: zero query weights make attention exactly uniform."""
    torch.manual_seed(0)
    bounds, prompt = [0, 4, 9, 15, 20, 27, 33, 40, 44, 50], [1] * 12
    spreads = []
    for collapsed in (True, False):
        model = tiny_model("llama")
        if collapsed:
            for layer in model.model.layers:
                torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        y = fci_scores(model, prompt, list(range(40)) + [3] * 10, bounds, delta=2)
        spreads.append(fci_spread([y], [uniform_fci(len(prompt), bounds, delta=2)]))
    assert spreads[0] < 1e-5 < 0.05 < spreads[1]
    assert (
        "attention collapse" in notices(9, 9, 9, spreads[0])[0]
        and notices(9, 9, 9, spreads[1]) == []
    )


def test_notices_none_if_all_is_well():
    assert notices(problems=64, expanded=50, kept=1900, spread=0.4) == []
    assert notices(problems=64, expanded=50, kept=1900, spread=None) == []
    assert notices(problems=64, expanded=1, kept=1, spread=0.05) == []


def test_notices_name_each_failure():
    (collapse,) = notices(64, 50, 1900, spread=0.049)
    assert collapse.startswith("attention collapse") and "0.049" in collapse
    (filtered,) = notices(64, 0, 300, spread=0.4)
    assert (
        filtered.startswith("none of 64 problems is branched (all filtered,") and "64" in filtered
    )
    (empty,) = notices(64, 50, 0, spread=0.4)
    assert empty.startswith("empty batch") and "64" in empty
    assert "nothing to train on" in empty
    (agreeing,) = notices(64, 50, 0, spread=0.4, dropped=False)
    assert agreeing.startswith("empty batch") and "nothing to learn" in agreeing
    assert len(notices(64, 0, 0, spread=0.0)) == 3


def test_outcomes_and_effective_sample_size_by_hand():
    """Spread: the means of 0, 0, 1/2 and the deviation sqrt(3)/4 of 1 0 0 0. Ess: 1.5^2 / 2.5."""
    rows = [[1, 1], [0, 0], [1, 0], [1, 0, 0, 0], []]
    wanted = {"reward": 0.4, "solve_all": 0.25, "solve_none": 0.25, "valid": 0.5}
    wanted["spread"] = (0.5 + 3**0.5 / 4) / 4
    assert outcome_ratios("x", rows) == pytest.approx({f"x/{k}": v for k, v in wanted.items()})
    assert TrainStats(ratio=1.5, ratio_squared=2.5).logged()["train/ess"] == pytest.approx(0.9)


def test_a_batch_of_even_attention_and_no_answer_is_named():
    bounds, prompt = [0, 4, 9, 15, 20, 27, 33, 40], [1] * 12
    fci = uniform_fci(12, bounds, 1)
    r = Response([1] * 40, [0.0] * 40, 0.0, bounds=bounds, fci=fci, boxed=False)
    group = attnrl.Group(0, 0, Problem("?", ["7"], "x", prompt), [r])
    config = attnrl.parse_config([])  # Delta 1
    assert any("attention collapse" in line for line in batch_notices(config, [group], []))
    said = empty_batch_lines(config, [group], lambda tokens: "well")
    assert "1 without an answer" in said[0] and said[1] == "one that is not right: well (right: 7)"
