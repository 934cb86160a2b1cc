"""Answers: read from worked solutions, compared as the reward compares them, checked for hope."""

import json
import time
from decimal import Decimal

import pytest
from fixtures import bpe_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import golds
from runtime.cli import UserError
from runtime.data import load_problems
from runtime.golds import (
    agree,
    final_answer,
    final_answers,
    is_prose,
    is_simple,
    only_by_letters,
    parse_answers,
    readable,
)

FOREVER = float("inf")


@pytest.fixture(scope="module", autouse=True)
def end_of_workers():
    yield
    golds.GRADER.close()


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Two and five are <<2+5=7>>7 apples.\n#### 7", "7"),
        ("#### 1,234 ", "1,234"),
        ("#### 3\nNo, wait.\n#### -4\n", "-4"),
        ("####", ""),
        (r"So \boxed{3}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7}", "7"),
        (r"\boxed{7", r"\boxed{7"),
        ("7", "7"),
        ("### 7", "### 7"),
    ],
)
def test_the_end_of_a_worked_solution_is_its_answer(text, answer):
    assert final_answer(text) == answer
    assert final_answers(parse_answers(text)) == [answer] * bool(answer)
    assert final_answers(parse_answers([text, 8])) == [answer] * bool(answer) + ["8"]


def test_a_reward_of_ones_own_gets_worked_answers_as_they_stand(tmp_path):
    """And of two solutions of one problem nobody can say that they are the same."""
    path, said = tmp_path / "p.jsonl", []
    whole = {"1?": r"3 + 4 = 7, so \boxed{7}.", "2?": "3 + 5 = 8\n#### 8", "3?": "9"}
    rows = [{"problem": problem, "answer": answer} for problem, answer in whole.items()]
    path.write_text("\n".join(map(json.dumps, rows)))

    def answers(**how) -> list[list[str]]:
        how |= dict(max_prompt=99, drop=True, say=said.append)
        return [p.answers for p in load_problems(str(path), bpe_tokenizer(), **how)]

    assert answers() == [["7"], ["8"], ["9"]]
    assert answers(graded=False) == [[answer] for answer in whole.values()]
    path.write_text("\n".join(map(json.dumps, [*rows, {"problem": "1?", "answer": "7"}])))
    assert answers() == [["7"], ["8"], ["9"]]
    assert answers(graded=False) == [["3 + 5 = 8\n#### 8"], ["9"]]


def test_decimals_of_tables_are_numbers():
    assert parse_answers([Decimal("7.50"), 0.5, 7]) == ["7.50", "0.5", "7"]
    for value in (
        "nan",
        " NaN",
        "-inf",
        Decimal("NaN"),
        Decimal("Infinity"),
        float("nan"),
        True,
        None,
        {"a": 1},
        b"7",
    ):
        with pytest.raises(ValueError):
            parse_answers(value)


SAME = [("7", "7.0"), ("7", "$7$"), ("07", "7"), (r"\frac12", "0.5"), ("1,000", "1000")]
SAME += [(r"x^2+2x+1", "(x+1)^2"), (r"\dfrac{1}{3}", r"\frac13")]
OTHER = [("7", "8"), ("7", "-7"), (r"\frac12", "0.51"), ("x^2", "x^3"), ("yes", "no"), ("?", "!")]


def test_answers_agree_where_the_grader_takes_each_for_the_other():
    for one, other in SAME:
        assert agree([one], [other], FOREVER) and agree([other], [one], FOREVER), (one, other)
    for one, other in OTHER:
        assert not agree([one], [other], FOREVER) and agree([one], [one], FOREVER), (one, other)
    assert agree(["1", "-1.0"], ["-1", "1"], FOREVER)
    assert not agree(["7", "8"], ["7"], FOREVER) and not agree(["7"], ["7", "8"], FOREVER)
    assert not agree(["7"], ["7.0"], 0) and agree(["7"], ["7"], 0)  # no time: the letters decide


def test_numbers_of_one_problem_in_several_types_do_not_conflict(tmp_path):
    path, said = tmp_path / "p.jsonl", []
    path.write_text("\n".join(json.dumps({"problem": "6+1?", "answer": a}) for a in (7, 7.0, "7")))
    problems = load_problems(str(path), bpe_tokenizer(), max_prompt=99, drop=True, say=said.append)
    assert [p.answers for p in problems] == [["7"]]
    assert said == [f"{path}: left out 2 duplicate"]


FINE = [
    "7",
    "-1,234.5",
    r"\$7",
    r"50\%",
    "1/2",
    r"-\frac{3}{4}",
    "(C)",
    "B",
    r"\text{even}",
    "Yes.",
]
FINE += ["Évelyn", "x = 5", r"3\sqrt{2}", "(1, 2)", r"\{1, 2\}", r"(-\infty, 3]", "12 cm", "$x^2$"]
FINE += [r"2\pi r", "7 apples", r"x \in [0, 1)", r"\begin{pmatrix}1\\2\end{pmatrix}", "43_5"]
FINE += [r"\sin x \cos x", "17.", r"7 \text{ hours}."]
LOST = ["?", "...", "-", "x^2+", "()", "see the figure", "The answer is 7, since 3 and 4 make 7"]
LOST += [r"\text{no real roots}", "https://a.b/c", "7" * 1001, "½"]


def test_golds_without_hope_are_told_from_those_that_computer_algebra_reads():
    assert only_by_letters(FINE + LOST + LOST, FOREVER) == (LOST, 0)


def test_the_cheap_rules_never_call_fine_what_computer_algebra_cannot_read():
    """The check is only worth its name if what skips the workers would have passed them."""
    formulas = [gold for gold in FINE if is_simple(gold) and not gold.isalpha()]
    formulas += [
        "2x+1",
        "a^2b - 3",
        r"-\frac{\sqrt{3}}{2}",
        r"\left(3,\frac{\pi}{2}\right)",
        "x=3y",
    ]
    assert len(formulas) > 9 and all(map(is_simple, formulas))
    assert all(readable([f.strip("$%\\.") for f in formulas], FOREVER))


@settings(max_examples=300, deadline=2000)
@given(st.text("0123456789abx+-*/^=(){}[],. $\\%fracsqtpi", max_size=200))
def test_the_cheap_rules_take_any_text_and_little_time(gold):
    started = time.perf_counter()
    assert is_simple(gold) in (True, False) and is_prose(gold) in (True, False)
    assert time.perf_counter() - started < 1


HOSTILE = ["9^{9^{9^{9}}}+?", r"\int_0^{x^x}" * 30 + "?", "(" * 900, r"\frac{1}{" * 90, "x^" * 400]
HOSTILE += [r"\binom{9^9}{9^8}!!", "10^{99999999}!", "\0\ud800?", r"\sum_{n=1}^{10^{99}} n!"]


def test_hostile_golds_take_no_longer_than_told_and_never_stop_the_load(tmp_path):
    started = time.monotonic()
    lost, unknown = only_by_letters([*HOSTILE, "?", "7"], 3.0)
    # what is running at the deadline may take its 3 seconds, its kill 4, a worker's start some more
    assert time.monotonic() - started < 30
    assert set(lost) <= {*HOSTILE, "?"} and 0 <= unknown <= len(HOSTILE) + 1
    assert readable(["?", "x+y", "?"], FOREVER) == [False, True, False]  # workers are well again
    assert readable(["x+y"], -1) == [None]


def test_golds_without_hope_are_reported_with_number_file_and_row(tmp_path):
    path, said = tmp_path / "p.jsonl", []
    rows = [
        {"problem": f"{i}?", "answer": gold} for i, gold in enumerate(["7", "?", "(A)", "x^2+"])
    ]
    rows += [{"problem": f"{i}?", "answer": ["7", "..."]} for i in range(4, 9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    problems = load_problems(str(path), bpe_tokenizer(), max_prompt=99, say=said.append)
    assert len(problems) == 9  # a warning: the letters may be meant
    assert said[0].startswith(f"{path}: 7 of 14 answers right only letter by letter")
    kind = "right only letter by letter"
    assert said[1:4] == [
        f"{kind}: {path}, line 2: the answer '?'",
        f"{kind}: {path}, line 4: the answer 'x^2+'",
        f"{kind}: {path}, line 5: the answer '...'",
    ]
    assert len(said) == 7 and said[6] == f"{kind}: ... and 2 more in {path}"
    said.clear()
    load_problems(str(path), bpe_tokenizer(), max_prompt=99, say=said.append, graded=False)
    assert said == []


def test_a_bad_file_is_refused_before_its_answers_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(golds, "readable", None)  # a call would raise
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a", "answer": "?"}\n{"problem": "b"}')
    with pytest.raises(UserError, match="1 malformed"):
        load_problems(str(path), bpe_tokenizer(), max_prompt=99, say=lambda line: None)
