"""test_rewards.py: the reward of a run, which a function of one's own may replace. What a run does
with a broken one: test_faults.py.

    python -m pytest tests/runtime/test_rewards.py
"""

import pytest

from runtime.cli import UserError
from runtime.rewards import Reward


def test_reward_can_be_replaced_and_is_checked(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def short(response, answers):\n    return 1 / (1 + len(response))\n"
        "def broken(response, answers):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert Reward("mine:short")([("", ["1"]), ("abc", ["1"])]) == [1.0, 0.25]
    with pytest.raises(UserError, match="returned nan"):
        Reward("mine:broken")([("", ["1"])])
    for wrong in ("nothing:here", "mine:nothing", "mine"):
        with pytest.raises(UserError, match="cannot be imported"):
            Reward(wrong)


def test_default_reward_counts_missing_boxes():
    reward = Reward()
    assert reward([(r"\boxed{4}", ["4"]), ("4", ["4"]), (r"\boxed{5}", ["4", "5"])]) == [
        1.0,
        0.0,
        1.0,
    ]
    assert reward.counts["unboxed"] == 1
