"""test_forks.py: what a forking rule gets for its tokens, by hand; the experiment on the toy.

python -m pytest tests/test_forks.py
"""

import importlib.util
import json
import math

import pytest
from fixtures import ROOT, TOY_MODEL, lines

from runtime.cli import UserError
from tree import BRANCH_RULES


@pytest.fixture(scope="module")
def forks():
    spec = importlib.util.spec_from_file_location("forks", ROOT / "experiments" / "forks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Two responses of ten tokens and three steps: right, wrong. Continuations from token 4 of r1 are
# right and wrong, from token 8 both right; from token 4 of r2 both wrong, from 8 right and wrong.
POOL = {
    "0,4": [[6, 1.0], [5, 0.0]],
    "0,8": [[2, 1.0], [2, 1.0]],
    "1,4": [[6, 0.0], [6, 0.0]],
    "1,8": [[3, 1.0], [2, 0.0]],
}


def record(points: dict, number: int = 0, rewards=(1.0, 0.0)) -> dict:
    responses = [[10, reward, 3] for reward in rewards]
    return {"number": number, "responses": responses, "points": points, "pool": POOL}


def bought(*places: str) -> list:
    return [(*map(int, place.split(",")), POOL[place]) for place in places]


def test_measures_by_hand(forks):
    """r1 forked at both tokens. At 8: children 1, 1, 1, variance 0. At 4: the chain's V is 1, its
    siblings 1 and 0: variance 2/9. Of six leaves below r1 one is wrong: they disagree. Kept: 4 of
    10, 4 of 9, 8 of 10 twice."""
    found = forks.measures(record({}), bought("0,4", "0,8"))
    assert found["solved"] == 1 and math.isnan(found["rescued"]) and found["disagree"] == 1
    assert found["variance"] == pytest.approx((0 + 2 / 9) / 2)
    assert found["per 1,000"] == pytest.approx(2 / 9) and found["forks"] == 2
    assert found["kept"] == pytest.approx((0.4 + 4 / 9 + 0.8 + 0.8) / 4)
    # r2 at 8: 0, 1, 0: 2/9; at 4: the chain's V is 1/3, siblings 0, 0: mean 1/9, variance 2/81
    found = forks.measures(record({}), bought("1,4", "1,8"))
    assert found["variance"] == pytest.approx((2 / 9 + 2 / 81) / 2)


def test_a_problem_is_rescued_by_a_right_continuation_only(forks):
    wrong = record({}, rewards=(0.0, 0.0))
    assert forks.measures(wrong, bought("1,4"))["rescued"] == 0
    assert forks.measures(wrong, bought("1,8"))["rescued"] == 1
    nothing = forks.measures(wrong, [])
    assert nothing["solved"] == 0 and math.isnan(nothing["variance"])


def test_equal_tokens_the_last_fork_counts_by_the_share_that_can_be_paid(forks):
    """Early forks cost 11 and 12 tokens, late ones 4 and 5. The budget is what the late rule needs,
    9: it pays both. The early one pays 9 of the first fork's tokens."""
    points = {"late": [[8], [8]], "early": [[4], [4]]}
    one = record(points)
    costs = {rule: forks.cost(forks.forks_of(one, rule)) for rule in points}
    assert costs == {"late": 9, "early": 23}
    late = forks.at_budget(one, "late", 9)
    assert late["forks"] == 2 and late["per 1,000"] == pytest.approx(2 / 9 * 1000 / 9)
    first = forks.forks_of(one, "early")[0]
    early = forks.at_budget(one, "early", 9)
    share = 9 / forks.cost([first])
    assert early["forks"] == pytest.approx(share)
    assert early["per 1,000"] == pytest.approx(
        share * forks.measures(one, [first])["per 1,000"] * 1000 / 9
    )


def test_all_rules_buy_from_the_responses_in_one_order(forks):
    points = {"late": [[8], [8]], "early": [[4], [4]]}
    for number in range(20):
        one = record(points, number)
        order = [[i for i, _, _ in forks.forks_of(one, rule)] for rule in points]
        assert order[0] == order[1] and sorted(order[0]) == [0, 1]


def test_a_problem_without_anything_to_fork_is_left_out(forks):
    nothing = record({"fci": [[], []]})
    with pytest.raises(UserError, match="nothing to fork"):
        forks.compare([nothing], ["fci"])
    values, rates = forks.compare([nothing, record({"fci": [[8], [8]]})], ["fci"])
    assert values.shape == (1, 1, len(forks.MEASURES)) and rates.tolist() == [0.5]


SMALL = ["--problems", "toy:6:10:5", "--group", "2", "--max_response", "60", "--name", "small"]


def test_the_experiment_on_the_toy(forks, tmp_path, capsys):
    """Every step has its T continuations, every rule's points are in the pool; a killed run goes on
    with the same samples; other settings are refused; the report is the same again."""
    options = [*SMALL, "--folder", str(tmp_path)]
    forks.main(options)
    text = capsys.readouterr().out
    path = tmp_path / "small.jsonl"
    head, *records = lines(path)
    assert len(records) == 10 and head["settings"]["points"] == 2
    for one in records:
        assert set(one["points"]) == set(BRANCH_RULES) and len(one["responses"]) == 2
        for points in one["points"].values():
            for i, places in enumerate(points):
                assert all(len(one["pool"][f"{i},{at}"]) == 2 for at in places)
    assert all(f"| {rule} " in text for rule in BRANCH_RULES) and "earliest - fci" in text
    assert (tmp_path / "small.png").stat().st_size > 10_000
    whole = path.read_text()
    path.write_text("".join(line + "\n" for line in whole.splitlines()[:9]) + '{"number": 8, "pr')
    forks.main(options)
    assert path.read_text() == whole and capsys.readouterr().out == text
    forks.main(["--report", *options])
    assert capsys.readouterr().out == text
    with pytest.raises(UserError, match="small.jsonl: was made with another --seed"):
        forks.main([*options, "--seed", "1"])
    assert path.read_text() == whole


def test_bad_input_is_one_line(forks, tmp_path):
    (tmp_path / "small.jsonl").write_text("no json\n")
    options = [*SMALL, "--folder", str(tmp_path)]
    for more, said in (
        ([], "small.jsonl: cannot be read"),
        (["--group", "0"], "--group 0: must be at least 1"),
        (["--temperature", "0"], "--temperature"),
        (["--model", "nowhere"], "--model nowhere: cannot be loaded"),
        (["--report", "--name", "none"], "none.jsonl: nothing there yet"),
    ):
        with pytest.raises(UserError, match=said):
            forks.main([*options, "--model", str(TOY_MODEL), *more])
    assert json.loads(json.dumps((tmp_path / "small.jsonl").read_text())) == "no json\n"
