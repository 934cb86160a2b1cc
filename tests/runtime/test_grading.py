"""grading.py: verdicts on real and hostile answers, and a pool that survives what sympy does.

Nothing here is a mock: the hangs are sympy's own, and the deaths are signals sent to live workers.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import grading
from runtime.grading import (
    DRESS,
    VETOES,
    Grader,
    Verdict,
    _clean,
    _decide,
    _key,
    _number,
    grade,
    last_box,
)

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = ROOT.parent / "shared" / "data"  # not part of the repository
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no evaluation data in {DATA}")

HANG = (
    r"\boxed{99999999!}",
    [r"\sqrt{2}"],
)  # minutes inside one multiplication: only a kill ends it
EASY = (r"\boxed{2(n-1)}", ["2n-2"])  # correct, but only math-verify can see it


def box(content: str) -> str:
    return "So the answer is \\boxed{" + content + "}."


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


def idle_pids(grader: Grader) -> list[int]:
    return [worker.pid for worker in grader._idle.queue if worker]


def warmed(grader: Grader) -> list[int]:
    """The pids of both workers, after making sure that both run: two items at once need both."""
    for _ in range(20):
        if len(idle_pids(grader)) == 2:
            return idle_pids(grader)
        assert all(verdict.correct for verdict in grader.grade_many([EASY] * 4))
    raise AssertionError("the second worker never started")


# --- the box ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, content",
    [
        ("", None),
        ("the answer is 5", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}} ", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),  # grade() takes the inner one off
        (r"\boxed{\boxed{1}, \boxed{2}}", r"\boxed{1}, \boxed{2}"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace needs no partner
        (r"\boxed{5} and then \boxed{6", "5"),  # cut off by the token limit
        (r"{ \boxed{5}", "5"),
        (r"<think>\boxed{5}</think> done", None),
        (r"<think>\boxed{5}</think> \boxed{6}", "6"),
        (r"</think>\boxed{5}</think> \boxed{6}", "6"),
        (r"x = 5 \\\boxed{5}", "5"),  # after a line break
        ("\\boxed{1\n2}", "1\n2"),
    ],
)
def test_last_box(response, content):
    assert last_box(response) == content


def test_box_finder_and_rules_are_linear_on_a_collapsed_policy():
    start = time.monotonic()
    for text in (
        r"\boxed{" * 20_000,
        "\\" * 200_000,
        "{" * 200_000 + "}" * 200_000,
        r"\boxed{}" * 20_000,
    ):
        last_box(text)
    for text in (
        "~" * 300,
        r"\, " * 100,
        "1 " * 150,
        r"\text{a}" * 40,
        "x=" * 150,
        "1e" + "9" * 200,
        "9" * 9000,
    ):
        for gold in ("5", r"\text{no}", "x+1", text + "1"):
            _decide(text, gold)
    assert time.monotonic() - start < 5


# What stands in a box is what comes out of it, whatever comes before.
plain = st.text(alphabet=st.characters(exclude_characters="{}\\<"), max_size=20)
balanced = st.recursive(
    plain, lambda inner: st.tuples(plain, inner, plain).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}")
)
pieces = [
    "\\",
    "\\frac",
    "\\boxed{",
    "\\text{",
    "\\times",
    "10^",
    "e9",
    "</think>",
    *"0123.,+-=/^_{}()[]|!:x%$ ~ei",
]
latex = st.lists(st.sampled_from(pieces)).map("".join)
anything = st.one_of(st.text(), latex)


@given(before=anything, content=balanced)
@settings(max_examples=300, deadline=None)
def test_last_box_returns_what_was_boxed(before, content):
    assert last_box(before + box(content)) == content


@given(response=anything, gold=anything)
@settings(max_examples=300, deadline=None)
def test_arbitrary_text_never_raises(response, gold):
    content = last_box(response)
    assert content is None or content + "}" in response
    for answer in (response, content or ""):
        decision = _decide(answer, gold)
        assert isinstance(decision, bool) or json.loads(json.dumps(decision)) == list(decision)


@given(text=anything)
@settings(max_examples=300, deadline=None)
def test_every_text_equals_itself_unless_empty(text):
    if len(text) <= grading.MAX_ANSWER:
        assert _decide(text, text) is (_key(_clean(text)) != "")


@given(numerator=st.integers(-(10**6), 10**6), denominator=st.integers(1, 999))
def test_numbers_are_exact(numerator, denominator):
    fraction = rf"\frac{{{numerator}}}{{{denominator}}}"
    dressed = "$" + fraction.replace("frac", "dfrac") + "$."
    for form in (f"{numerator}/{denominator}", fraction, dressed):
        assert _number(_clean(form)) == Fraction(numerator, denominator)
        assert _decide(form, f"{numerator}/{denominator}") is True
        assert _decide(form, f"{numerator + 1}/{denominator}") is False


# --- verdicts --------------------------------------------------------------------------------


def assert_verdicts(grader: Grader, rows: list[tuple[str, str, bool]]) -> None:
    """rows: (answer, gold, is it right)."""
    verdicts = grader.grade_many([(box(answer), [gold]) for answer, gold, _ in rows])
    pairs = zip(rows, verdicts, strict=True)
    wrong = [(*row, v) for row, v in pairs if v.correct != row[2] or not v.boxed]
    assert not wrong, wrong


def test_cases(grader):
    lines = (Path(__file__).parent / "grading_cases.txt").read_text().splitlines()
    rows = [(line[0], *line[2:].split(" ~ ")) for line in lines if line[0] in "+-"]
    assert len(rows) > 1000 and sum(sign == "-" for sign, *_ in rows) > 150
    assert_verdicts(grader, [(answer, gold, sign == "+") for sign, answer, gold in rows])


def test_nothing_equals_nothing(grader):
    rows = [("", "0"), (" ", ""), ("", ""), ("$ $", "$"), (r"\text{}", r"\text{}")]
    assert_verdicts(grader, [(*row, False) for row in rows])


def accepted(grader: Grader, examples: list[str]) -> list[bool]:
    pairs = [example.split(" ~ ") for example in examples]
    return [verdict.correct for verdict in grader.grade_many([(box(a), [g]) for a, g in pairs])]


def test_every_row_of_the_table_does_what_its_examples_say(grader):
    examples = [example for _, _, *examples in DRESS for example in examples]
    verdicts = zip(examples, accepted(grader, examples), strict=True)
    assert not [example for example, right in verdicts if not right]


@pytest.mark.parametrize("number", range(len(DRESS)))
def test_every_row_of_the_table_is_needed(grader, monkeypatch, number):
    pattern, _, *examples = DRESS[number]
    monkeypatch.setattr(grading, "_ROWS", grading._ROWS[:number] + grading._ROWS[number + 1 :])
    grading._cleaned.cache_clear()
    try:
        assert not all(accepted(grader, examples)), pattern
    finally:
        grading._cleaned.cache_clear()


@pytest.mark.parametrize("number", range(len(VETOES)))
def test_every_veto_is_needed(grader, monkeypatch, number):
    _, *examples = VETOES[number]
    assert not any(accepted(grader, examples))
    monkeypatch.setattr(grading, "VETOES", VETOES[:number] + VETOES[number + 1 :])
    assert all(accepted(grader, examples)), "math-verify refuses these by itself"


STRICT = [  # answer, gold, verdict: all are right when units are ignored
    (r"5 \text{ cm}", "5", False), (r"5 \text{ cm}", r"5 \text{ m}", False), (r"\$5", "5", False),
    ("5", r"5 \text{ cm}", False), (r"50\%", "50", False), ("90", r"90^\circ", False),
    (r"5\ \text{m}^2", r"5\ \text{m}", False), ("5", "5", True), (r"\$5", "5 dollars", True),
    (r"5 \text{ cm}", r"5\,\mathrm{cm}", True), (r"\text{5 cm}", r"5 cm", True),
    (r"5 \text{ meters per second}", r"5\ \mathrm{m/s}", True), ("90^\\circ", "90 degrees", True),
    (r"15 \text{ square inches}", r"15 \mbox{ in}^2", True), ("5 m/s", r"5\ \text{m s}^{-1}", True),
    (r"60 km/h", r"60 \text{ kilometers per hour}", True), (r"50\%", r"50 \text{ percent}", True),
    (r"9.8\ \mathrm{m/s^2}", r"9.8\,\text{m}/\text{s}^2", True),
    (r"5\ \frac{\text{m}}{\text{s}}", "5 m/s", True), (r"\frac{1}{2} \text{ kg}", "0.5 kg", True),
]  # fmt: skip


def test_units_are_a_switch(grader):
    assert_verdicts(grader, [(answer, gold, True) for answer, gold, _ in STRICT])
    with Grader(workers=1, units="strict") as strict:
        assert_verdicts(strict, STRICT)
    assert grade(box("5 cm"), ["5"]) and not grade(box("5 cm"), ["5"], units="strict")
    with pytest.raises(ValueError, match='it can be "loose" or "strict"'):
        Grader(units="si")


# --- properties of verdicts ------------------------------------------------------------------

slow = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
PAIRS = [
    ("12", "12", True), ("12", "13", False), (r"\frac{3}{4}", "0.75", True), ("-5", "5", False),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True), ("x^2-1", "(x-1)(x+1)", True),
    ("x^2-1", "(x-1)^2", False), ("(1,2)", "(2,1)", False), (r"\{1,2\}", r"\{2,1\}", True),
    (r"(1,2)", r"\{1,2\}", False), (r"(-\infty,3)", r"(-\infty,3]", False), ("52_8", "52_7", False),
    ("2,3", "3,2", True), ("2,3", "2,3,4", False), (r"2\pi", r"\pi+\pi", True),
]  # fmt: skip
DRESSES = [
    "{}", "${}$", r"\({}\)", r"\displaystyle {}", r"\boxed{{{}}}", r"\mathbf{{{}}}", "{}.", "{},",
    " {} ", r"{{\color{{red}} {}}}", r"\textcolor{{blue}}{{{}}}", r"\ {}\,", "**{}**",
    r"\underline{{{}}}",
    r"\quad {}", r"\text{{The answer is }} {}", r"\approx {}", "= {}", r"{{{}}}",
]  # fmt: skip
NAMES = ["x = {}", "f(2) = {}", r"\text{{Area}} = {}", "m+n = {}", "|z| = {}", "{} = x"]
UNITS = [r"{} \text{{ cm}}", r"{}\ \mathrm{{m/s^2}}", r"{} \text{{ apples}}", r"{}^\circ", "{} cm"]


@given(
    pair=st.sampled_from(PAIRS), dress=st.lists(st.sampled_from(DRESSES), max_size=3, unique=True)
)
@slow
def test_dress_never_changes_a_verdict(grader, pair, dress):
    answer, gold, right = pair
    for each in dress:
        answer = each.format(answer)
    assert_verdicts(grader, [(answer, gold, right)])


@given(number=st.integers(1, 999), other=st.integers(-999, 999), data=st.data())
@slow
def test_names_and_units_never_change_a_verdict(grader, number, other, data):
    # Not 0: "m+n = 0" may be an unsolved equation.
    answer = data.draw(st.sampled_from(["{}", *UNITS])).format(number)
    answer = data.draw(st.sampled_from(["{}", *NAMES])).format(answer)
    answer = data.draw(st.sampled_from(DRESSES)).format(answer)
    rows = [(answer, str(number), True), (answer, str(other), number == other)]
    assert_verdicts(grader, rows)


VALUES = [  # not "2,1": the point (1,2) is another, but the roots 2,1 may be boxed as (1,2)
    "7", "-7", "0.5", r"\frac12", r"\sqrt{2}", r"\frac{2}{\sqrt2}", r"2^{-1}", "x+1", "1+x",
    "(1,2)", r"\{1,2\}", r"\{2,1\}", "1,2", "[1,2]", r"1 \le x \le 2", "y=2x", "2x=y",
    r"\text{yes}",
    "Yes", r"5 \text{ cm}", "5", "x=5", "52_8", r"\infty", r"+\infty",
    r"2 \text{ million}", "2000000",
]  # fmt: skip


@given(a=st.sampled_from(VALUES), b=st.sampled_from(VALUES))
@slow
def test_a_verdict_is_symmetric(grader, a, b):
    there, back = grader.grade_many([(box(a), [b]), (box(b), [a])])
    assert there == back, (a, b)


PIECES = [
    *"0123457", "10", "12", "+", "-", "=", ",", "/", ":", ".", "x", "(", ")", " ", r"\times ", "^2",
    "_2", r"\pm ", " or ", r"\text{ and }", r"\approx ", r"\frac{1}{2}", r"\text{ cm}", r"\le ",
    r"\{", r"\}", r"\text{ million}", r"\ldots", "5 = ", r"\boxed{3}", r"\sqrt{4}", r"\pmod{4}",
    "i", r"\pi", "<",
]  # fmt: skip


@given(answer=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join))
@slow
def test_no_answer_is_right_for_two_numbers(grader, answer):
    golds = [*map(str, range(-3, 13)), "0.5", r"\frac{1}{4}", "100", "120", "2000000"]
    verdicts = grader.grade_many([(box(answer), [gold]) for gold in golds])
    right = [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict.correct]
    assert len(right) <= 1, (answer, right)


# --- data ------------------------------------------------------------------------------------


def test_any_of_several_golds_matches_and_a_string_is_one_gold():
    assert grade(box("5"), ["4", "5"]) and not grade(box("5"), ["4", "6"])
    assert grade(box("2(n-1)"), ["7", "n", "2n-2"])
    assert not grade(box("5"), []) and not grade(box("5"), [""]) and not grade("5", ["5"])
    assert grade(box("15"), "15") and not grade(box("1"), "15")
    assert Grader().grade_many([("5", ["5"]), (box("5"), ["5"])]) == [
        Verdict(False, False),
        Verdict(True, True),
    ]
    assert Grader().grade_many([]) == []


@needs_data
def test_hostile_cases():
    cases = [json.loads(line) for line in (DATA / "verifier_cases.jsonl").read_text().splitlines()]
    assert len(cases) == 103
    with Grader(workers=2, timeout=1) as grader:  # less than usual, for nine of them hang

        def timed(case):  # one call a case, from two threads, so that each has a time of its own
            start = time.monotonic()
            return grader.grade_many([(case["response"], [case["gold"]])])[
                0
            ], time.monotonic() - start

        warmed(grader)
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(timed, cases))
    wrong = [
        f"{case['note']}: {case['response'][-100:]!r} for {case['gold']!r} gave {verdict}"
        for case, (verdict, _) in zip(cases, results, strict=True)
        if case["expect"] != "no_crash" and verdict.correct != (case["expect"] == "correct")
    ]
    assert len(wrong) <= 2, "\n".join(wrong)
    assert max(seconds for _, seconds in results) < 10
    assert not any(verdict.correct for verdict, _ in results if verdict.error)


def gold_lists(name: str) -> list[list[str]]:
    table = pytest.importorskip("pyarrow.parquet").read_table(DATA / f"{name}.parquet")
    return [row["reward_model"]["ground_truth"] for row in table.to_pylist()]


@needs_data
@pytest.mark.parametrize("name", ["aime24", "math500", "minerva", "olympiad"])
def test_every_gold_verifies_in_many_spellings_and_not_against_its_neighbour(name):
    rows = gold_lists(name)
    for golds in rows:
        for gold in golds:
            bare = gold.strip()
            spellings = [
                gold,
                f" {bare} ",
                f"${bare}$",
                bare.rstrip(".$") + ".",
                r"\displaystyle " + bare,
                bare.replace(r"\frac", r"\dfrac"),
                re.sub(r"([+=])", r" \1\\, ", bare),
                re.sub(r"\\(left|right)(?![a-z])", "", bare),
            ]
            for spelling in spellings:  # _decide: by the strings alone, no worker is asked
                assert any(_decide(last_box(box(spelling)), other) is True for other in golds), (
                    spelling,
                    golds,
                )
    compared = 0
    for golds, others in zip(rows, rows[1:] + rows[:1], strict=True):
        values = {_number(gold) for gold in golds}
        other = _number(others[0])
        if None not in values and other is not None and other not in values:
            assert not grade(box(others[0]), golds), (others, golds)
            compared += 1
    assert compared >= len(rows) / 5


@needs_data
def test_every_gold_of_the_training_file_equals_itself_if_it_means_anything():
    golds = gold_lists("dapo_math_train")
    meaningless = [gold for gold in golds if _decide(gold, gold) is not True]
    assert len(golds) > 20_000 and meaningless == ["", ""]


@needs_data
def test_rewritten_golds_verify_with_math_verify(grader):
    """0 + gold is a string that equals no gold: only sympy can accept it. It must not take the next
    row's gold."""
    golds = [gold for gold, *_ in gold_lists("math500") if re.search(r"sqrt|\\pi|\^[0-9]", gold)]
    golds = [
        gold for gold in golds if not re.search(r"[,=]|pm|begin|text|mbox", gold)
    ]  # values, so 0 can be added
    rows = [(box("0+" + gold), [gold], True) for gold in golds]
    rows += [
        (box(b), [a], False)
        for a, b in itertools.pairwise(golds)
        if _key(_clean(a)) != _key(_clean(b))
    ]
    assert len(golds) > 30
    verdicts = grader.grade_many([row[:2] for row in rows])
    wrong = [
        (row, verdict)
        for row, verdict in zip(rows, verdicts, strict=True)
        if verdict != Verdict(row[2], True)
    ]
    assert not wrong, wrong


# --- the pool --------------------------------------------------------------------------------


def test_a_kill_and_a_deaf_hang_cost_one_item_each():
    with Grader(workers=2, timeout=2) as grader:
        first, second = warmed(grader)
        # Both workers are caught inside a hang. The stopped one cannot even die of its own alarm,
        # as one with blocked signals could not: only the SIGKILL from outside ends it.
        threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
        threading.Timer(0.5, os.kill, (second, signal.SIGSTOP)).start()
        start = time.monotonic()
        verdicts = grader.grade_many([HANG, HANG] + [EASY] * 20)
        assert sorted(verdict.error for verdict in verdicts[:2]) == ["died", "timeout"]
        assert verdicts[2:] == [Verdict(True, True)] * 20
        assert (
            time.monotonic() - start < 2 + grading.KILL_GRACE + 10
        )  # the rest: starting new workers, busy machine
        assert not {first, second} & set(idle_pids(grader))
        assert grader.grade_many([EASY] * 3) == [Verdict(True, True)] * 3


def test_a_hang_is_ended_by_the_alarm_inside_and_does_not_delay_the_others():
    with Grader(workers=2, timeout=2) as grader:
        warmed(grader)
        done = {}
        start = time.monotonic()
        hang = threading.Thread(
            target=lambda: done.update(hang=(grader.grade_many([HANG]), time.monotonic() - start))
        )
        hang.start()
        assert grader.grade_many([EASY] * 5) == [Verdict(True, True)] * 5
        assert "hang" not in done  # the five were through before the hang was over
        hang.join()
        verdicts, seconds = done["hang"]
        assert (
            verdicts == [Verdict(False, True, "timeout")] and 1.5 < seconds < 2 + grading.KILL_GRACE
        )


def test_death_while_idle_costs_nothing():
    with Grader(workers=2) as grader:
        for pid in warmed(grader):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        assert grader.grade_many([EASY] * 6) == [Verdict(True, True)] * 6


@pytest.mark.skipif(
    sys.platform != "linux", reason="limits of another process can be read and set on Linux only"
)
def test_memory_is_limited_and_running_out_of_it_is_survived():
    import resource

    with Grader(workers=2, timeout=2) as grader:
        for pid in warmed(grader):
            assert resource.prlimit(pid, resource.RLIMIT_AS) == (grading.MEMORY, grading.MEMORY)
        # Dense polynomials of degree 3e9 would need 24 GB.
        bomb = grader.grade_many(
            [(box(r"x^{3000000000}+x=1"), ["x^2=1"]), (box(r"(x+y+z+w+1)^{400}"), ["x^{2}"])]
        )
        assert not any(verdict.correct for verdict in bomb)
        assert grader.grade_many([EASY] * 4) == [Verdict(True, True)] * 4
        # A real MemoryError: leave the workers no byte more than they have.
        for pid in warmed(grader):
            resource.prlimit(pid, resource.RLIMIT_AS, (1, grading.MEMORY))
        growing = [(box("+".join(f"x^{{{i}}}" for i in range(40, 1, -1))), ["x^{77}+y"])] * 2
        assert grader.grade_many(growing) == [Verdict(False, True, "died")] * 2
        assert grader.grade_many([EASY] * 6)[-2:] == [Verdict(True, True)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="finds the busy workers in /proc")
def test_kills_at_any_moment_lose_no_item():
    with Grader(workers=2) as grader:
        start = time.monotonic()
        warmed(grader)
        pause = 1.2 * (
            time.monotonic() - start
        )  # longer than a start: three failed starts in a row are an error

        def kill_three():
            for _ in range(3):
                time.sleep(pause)
                for stat in Path("/proc").glob("[0-9]*/stat"):
                    with suppress(OSError):  # a process that has just ended
                        if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                            os.kill(int(stat.parent.name), signal.SIGKILL)
                            break

        killer = threading.Thread(target=kill_three)
        killer.start()
        verdicts, rounds = [], 0
        while killer.is_alive():
            verdicts += grader.grade_many([(box(f"{i}(n-1)"), [f"{i}n-{i}"]) for i in range(2, 52)])
            rounds += 1
        assert len(verdicts) == 50 * rounds
        assert all(
            verdict == Verdict(True, True) or verdict.error == "died" for verdict in verdicts
        )
        assert sum(verdict.error != "" for verdict in verdicts) <= 3
        assert grader.grade_many([EASY] * 4) == [Verdict(True, True)] * 4


# --- how it is called ------------------------------------------------------------------------

SCRIPT = """
import os, sys, threading
from runtime.grading import Grader, grade, _GRADER
print("started")                              # a second time, if a worker ran this script again
question = (r"\\boxed{2(n-1)}", ["2n-2"])
assert grade(*question)
results = []
thread = threading.Thread(target=lambda: results.append(grade(*question)))
thread.start(); thread.join()
assert results == [True]
forked = Grader()                                           # its workers are never closed
assert forked.grade_many([question] * 4)[3].correct
child = os.fork()                             # parent and child must not share a worker
answers = [grade(r"\\boxed{%d(n-1)}" % i, ["2n-2"]) for i in range(1, 6)]
assert answers == [False, True, False, False, False], answers
if child == 0:
    sys.exit(0)                               # runs atexit: the parent's workers must stay
assert os.waitpid(child, 0)[1] == 0
assert grade(*question)
print("pids", *(w.pid for g in (_GRADER, forked) for w in g._idle.queue if w), flush=True)
"""


def run_script(tmp_path: Path, text: str, *path: Path) -> subprocess.Popen:
    (tmp_path / "script.py").write_text(text)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=env, **pipes)


def assert_all_end(pids: list[int]) -> None:
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"left behind: {pids}")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a zombie that nobody has collected is dead enough
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_unguarded_script_threads_forks_and_no_process_left_behind(tmp_path):
    script = run_script(tmp_path, SCRIPT)
    out, err = script.communicate(timeout=60)
    assert script.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == "started" and lines[1].startswith("pids ") and len(lines) == 2
    pids = [int(pid) for pid in lines[1].split()[1:]]
    assert len(pids) >= 2
    assert_all_end(pids)


def test_workers_end_when_the_parent_is_killed(tmp_path):
    script = run_script(
        tmp_path, SCRIPT + "forked.grade_many([(r'\\boxed{99999999!}', [r'\\sqrt{2}'])])\n"
    )
    for line in script.stdout:
        if line.startswith("pids "):
            time.sleep(0.5)  # now one of them is in the hang
            script.kill()
            assert_all_end([int(pid) for pid in line.split()[1:]])
    script.communicate()


def test_a_broken_installation_is_an_error_and_not_a_wrong_answer(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "math_verify.py").write_text("raise ImportError('this is broken')")
    text = "from runtime.grading import grade\nprint(grade(r'\\boxed{2(n-1)}', ['2n-2']))"
    script = run_script(tmp_path, text, tmp_path / "broken")
    out, err = script.communicate(timeout=60)
    assert (
        script.returncode == 1
        and out == ""
        and "workers do not start" in err
        and "this is broken" in err
    )


def test_importing_stays_light():
    """A worker is this file as a script: an import of torch would cost every worker seconds."""
    heavy = ("torch", "transformers", "sympy", "numpy")
    code = f"import sys, runtime.grading; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"
