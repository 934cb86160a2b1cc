"""test_disruption.py: experiments/disruption.py, by hand, and as a command on the toy.

How a step is hidden is tested against naive attention in test_what_fci_finds.py.

    python -m pytest tests/test_disruption.py
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures import ROOT, TOY_MODEL, lines, typed

from fci import fci_scores, separator_tokens, split_steps
from runtime.cli import UserError
from runtime.data import encode_prompt
from runtime.models import load_model
from tree import Response

sys.path.insert(0, str(ROOT / "experiments"))
import disruption  # noqa: E402


def test_every_step_but_the_first_and_the_answer_is_hidden_once():
    """A prompt of 2 tokens and a response of four steps that end at 3, 5, 9, 10: steps 1 and 2 are
    hidden, each in 2 pairs that share their random numbers and differ in nothing but the cut."""
    args = SimpleNamespace(seed=0, continuations=2, max_response=12, temperature=0.7)
    r = Response(list(range(20, 30)), [0.0] * 10, bounds=[0, 3, 5, 9, 10], branchable=4)
    requests = disruption.requests_of(args, 7, [90, 91], r)
    assert [q.cut for q in requests] == [(0, 0), (5, 7)] * 2 + [(0, 0), (7, 11)] * 2
    assert [len(q.prompt_ids) for q in requests] == [7] * 4 + [11] * 4
    assert [q.max_tokens for q in requests] == [7] * 4 + [3] * 4
    assert all(q.prompt_ids == ([90, 91] + r.tokens)[: len(q.prompt_ids)] for q in requests)
    seeds = [q.seed for q in requests]
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 4


def test_the_first_right_response_with_a_step_to_hide_is_taken():
    wrong = Response([1], [0.0], 0.0, branchable=5)
    short = Response([2], [0.0], 1.0, branchable=2)  # its first step and its answer
    right = Response([3], [0.0], 1.0, branchable=3)
    assert disruption.first_right([wrong, short, right, right]) is right
    assert disruption.first_right([wrong, short]) is None


def row(number: int, fci: list[float], hits: list[tuple[int, int]]) -> dict:
    return {
        "number": number,
        "fci": fci,
        "entropy": [-x for x in fci],
        "right without, with": hits,
        "boxed without, with": [(4, 2)] * len(fci),
    }


def test_classes_of_responses_of_unequal_length_by_hand():
    """Of 4 samples right without and with: a response of 2 steps (4, 0), (4, 4), one of 3 steps
    (4, 2), (2, 2), (4, 3). FCI falls, so the first is the top and the last the most uncertain.
    Drops: top 1 and 1/2; the rest 0, and (0 + 1/4) / 2."""
    rows = [row(0, [0.9, 0.1], [(4, 0), (4, 4)])]
    rows += [row(1, [0.9, 0.2, 0.1], [(4, 2), (2, 2), (4, 3)]), {"number": 2, "right": 0}]
    found = disruption.compare(rows, samples=4)
    drops = {name: by["drop"][0] for name, by in found["classes"].items()}
    assert drops == pytest.approx(
        {"top 20 % FCI": 0.75, "the rest": 0.0625, "top 20 % entropy": 0.125}
    )
    assert found["classes"]["the rest"]["in format, with"][0] == 0.5
    assert {k: x["n"] for k, x in found["by step"]["the rest"].items()} == {"1": 0, "2": 2, "3": 1}
    with pytest.raises(UserError, match="nothing to hide"):
        disruption.compare(rows[2:], samples=4)


def test_a_killed_experiment_goes_on_and_reports(tmp_path, capsys):
    """Half a line at the end is a kill's; the same command ends with the same records."""
    options = typed("--problems toy:6:4:5 --group 2 --continuations 2 --name t --folder")

    def said(*words) -> str:
        disruption.main([*map(str, words)])
        return capsys.readouterr().out

    out = said(*options, tmp_path / "a")
    records = lines(tmp_path / "a" / "t.jsonl")
    assert "4 problems" in out and len(records) == 1 + 4 and "top 20 % FCI" in out
    (tmp_path / "b").mkdir()
    text = (tmp_path / "a" / "t.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "t.jsonl").write_text("".join(text[:3]) + text[3][:20])
    said(*options, tmp_path / "b")
    assert lines(tmp_path / "b" / "t.jsonl") == records
    assert said("--report", "--name", "t", "--folder", tmp_path / "a") == out
    found = json.loads((tmp_path / "a" / "t.json").read_text(), parse_constant=pytest.fail)
    assert found["problems"] == 4 and (tmp_path / "a" / "t.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="another --seed"):
        said(*options, tmp_path / "a", "--seed", 3)
    with pytest.raises(UserError, match="nothing there yet"):
        said("--report", "--name", "none", "--folder", tmp_path)


def test_a_record_is_of_the_steps_that_were_hidden(tmp_path):
    """FCI of the record is that of these steps, computed anew; hiding a step of the toy costs."""
    options = typed("--problems toy:6:6:5 --group 2 --continuations 4 --name t --folder")
    disruption.main([*options, str(tmp_path)])
    model, tokenizer, _ = load_model(str(TOY_MODEL), "cpu")
    _, *records = lines(tmp_path / "t.jsonl")
    rows = [one for one in records if "fci" in one]
    for one in rows:
        tokens = tokenizer(one["response"], add_special_tokens=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
        bounds = split_steps(tokens, separator_tokens(tokenizer))
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": one["problem"]}])
        fci = fci_scores(model, prompt, tokens, bounds, 1)
        assert one["fci"] == pytest.approx(fci[1 : 1 + len(one["fci"])], abs=2e-5)
        assert len(one["right without, with"]) == len(one["fci"]) == len(bounds) - 3
    assert len(rows) >= 3
    without, hidden = np.concatenate([one["right without, with"] for one in rows]).sum(0)
    assert without > 2 * hidden
