"""test_forks.py: what a forking rule gets for its tokens, by hand; the experiment on the toy.

python -m pytest tests/test_forks.py
"""

import importlib.util
import json
import math
import shutil

import pytest
from fixtures import ROOT, TOY_MODEL, lines
from safetensors.torch import load_file, save_file

from runtime.cli import UserError
from runtime.rollout import TransformersEngine
from toy.programs import toy_set
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


def test_the_budget_is_what_the_cheapest_rule_needs(forks):
    """23 and 9 tokens: 9 pay both late forks, and less than two early ones."""
    points = {"fci": [[4], [4]], "late": [[8], [8]]}
    values, _ = forks.compare([record(points)], ["fci", "late"])
    n = forks.MEASURES.index("forks")
    assert values[0, 1, n] == 2 and values[0, 0, n] < 1
    row = forks.table(values, ["fci", "late"], "x").splitlines()[-1]
    assert row.startswith("| late - fci |") and row.split(" | ")[1 + n].startswith("+")


def test_solved_and_disagree_by_a_continuation(forks):
    wrong = record({}, rewards=(0.0, 0.0))
    assert forks.measures(wrong, bought("1,8"))["solved"] == 1
    assert forks.measures(wrong, bought("1,4"))["disagree"] == 0
    assert forks.measures(record({}), bought("0,4", "1,4"))["disagree"] == 0.5


def test_difficulty_is_that_of_the_initial_responses(forks, tmp_path):
    points = {rule: [[8], [8]] for rule in BRANCH_RULES}
    rewards = [(0.0, 0.0)] + 2 * [(1.0, 0.0)] + 3 * [(1.0, 1.0)]
    records = [record(points, n, rewards=pair) for n, pair in enumerate(rewards)]
    text = forks.report(records, {}, tmp_path, "x")
    for kind, count in (("no initial response is right", 1), ("some are", 2), ("all are", 3)):
        assert f"**{kind}**: {count} problems" in text


class Asked(TransformersEngine):
    """The real engine, which remembers the requests."""

    requests: list = []

    def generate(self, requests, *more):
        self.requests.extend(requests)
        return super().generate(requests, *more)


def test_every_step_has_its_own_samples_and_the_options_reach_them(forks, tmp_path, monkeypatch):
    monkeypatch.setattr(forks, "TransformersEngine", Asked)
    Asked.requests.clear()
    options = [*SMALL, "--folder", str(tmp_path), "--temperature", "0.7", "--count", "3"]
    forks.main(options)
    assert len({q.seed for q in Asked.requests}) == len(Asked.requests)
    assert {q.temperature for q in Asked.requests} == {0.7}
    _, *records = lines(tmp_path / "small.jsonl")
    assert len(records) == 3
    for one in records:
        for i, (_, _, steps) in enumerate(one["responses"]):
            assert sum(place.startswith(f"{i},") for place in one["pool"]) >= steps - 1


def test_another_model_or_problem_file_of_the_same_name_is_refused(forks, tmp_path):
    for run in "ab":
        shutil.copytree(TOY_MODEL, tmp_path / run / "best")
        problems = toy_set(f"toy:6:2:{ord(run)}")
        rows = [json.dumps({"problem": text, "answer": answer}) for text, answer in problems]
        (tmp_path / run / "test.jsonl").write_text("\n".join(rows))
    weights = tmp_path / "b" / "best" / "model.safetensors"
    save_file({k: 1.01 * v for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    options = [*SMALL, "--prompt_suffix", "", "--folder", str(tmp_path)]

    def command(model: str, problems: str) -> None:
        where = ["--model", tmp_path / model / "best", "--problems", tmp_path / problems]
        forks.main([*options, *map(str, where)])

    command("a", "a/test.jsonl")
    with pytest.raises(UserError, match="another --model .its weights differ"):
        command("b", "a/test.jsonl")
    with pytest.raises(UserError, match="other --problems"):
        command("a", "b/test.jsonl")
    command("a", "a/test.jsonl")


@pytest.mark.parametrize("left", ["", '{"settings": {"mod'])
def test_killed_before_its_first_line_it_starts_again(left, forks, tmp_path):
    (tmp_path / "small.jsonl").write_text(left)
    forks.main([*SMALL, "--count", "2", "--folder", str(tmp_path)])
    assert len(lines(tmp_path / "small.jsonl")) == 3


def test_a_folder_that_is_read_only_loses_no_record(forks, tmp_path):
    """A new file takes the place of the old one only when it is whole."""
    options = [*SMALL, "--count", "2", "--folder", str(tmp_path)]
    forks.main(options)
    whole = (tmp_path / "small.jsonl").read_text()
    (tmp_path / "small.new").mkdir()  # nobody can write a file of this name
    with pytest.raises(UserError, match="cannot be written"):
        forks.main(options)
    assert (tmp_path / "small.jsonl").read_text() == whole


def test_results_older_than_a_rule_can_be_reported(forks, tmp_path, monkeypatch, capsys):
    options = [*SMALL, "--count", "3", "--folder", str(tmp_path)]
    forks.main(options)
    monkeypatch.setitem(forks.BRANCH_RULES, "new", forks.BRANCH_RULES["fci"])
    forks.main(["--report", *options])
    said = capsys.readouterr().out
    assert "| new " not in said and "| earliest - fci |" in said
