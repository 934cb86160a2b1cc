"""test_grading.py: verdicts on hostile and on real answers, and a pool that survives what sympy
does to it.

Nothing here is a mock: the hangs are sympy's own, and the deaths are signals sent to live workers.
"""

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
from pathlib import Path

import pytest
from fixtures import REAL_DATA, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import grading
from runtime.grading import Grader, Verdict, _clean, _decide, _key, _number, grade, last_box

needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no evaluation data in {REAL_DATA}")

# minutes inside one multiplication: only a kill ends it
HANG = (r"\boxed{99999999!}", [r"\sqrt{2}"])
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
    """The pids of both workers, after making sure that both run: with two items at once neither can
    serve both."""
    for _ in range(20):
        if len(idle_pids(grader)) == 2:
            return idle_pids(grader)
        assert all(verdict.correct for verdict in grader.grade_many([EASY] * 4))
    raise AssertionError("the second worker never started")


# --- the box
# --------------------------------------------------------------------------------------------------


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
        (r"\boxed{\boxed{5}}", "5"),
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
    for form in (
        f"{numerator}/{denominator}",
        fraction,
        "$" + fraction.replace("frac", "dfrac") + "$.",
    ):
        assert _number(form) is not None and _number(form) * denominator == numerator
        assert _decide(form, f"{numerator}/{denominator}") is True
        assert _decide(form, f"{numerator + 1}/{denominator}") is False


# --- verdicts
# --------------------------------------------------------------------------------------------------

VERDICTS = [  # answer, gold, verdict
    # rule 3: one string
    (r"\dfrac12", r"\frac{1}{2}", True),
    (r"\left( 3, \frac\pi2 \right)", r"(3,\frac{\pi}{2})", True), ("p-q", "p - q", True),
    (r"\$32,348", r"\$32,\!348", True), ("(C)", r"\text{(C)}", True), ("yes", r"\text{Yes}", True),
    ("5_{8}", "5_8", True),
    (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    ("x = 5", "5", True), ("5", "x=5", True), (r"n=1 \text{ or } n=3", "1,3", True),
    (r"[-2,7]", r"x \in [-2,7]", True), ("", "0", False), (" ", "", False), ("", "", False),
    # rule 4: numbers
    ("1/2", "0.5", True), ("8.7e8", r"8.7 \times 10^{8}", True), (r"10^{-3}", "0.001", True),
    ("025", "25", True), ("+2", "2", True), ("−3", "-3", True), ("1{,}234", "1234", True),
    ("1 234", "1234", True), ("1 2", "12", False), ("0.333", r"\frac{1}{3}", False),
    ("4e-7", "1e-7", False), ("1e9999", "1e9998", False), (r"5\text{ dollars}", "5", True),
    ("62.5", "62.5%", True), ("5 cm", "5", True),
    (r"864 \text{ in}^2", r"864 \mbox{ inches}^2", True),
    (r"15000\text{ kcal m}^{-2}\text{yr}^{-1}", "15000", True), ("90°", "90", True),
    # rule 5: only its own kind
    ("205=204", "204", False), ("2=204", "204", False), ("x+y=204", "204", False),
    ("5 apples and 6 pears", "5", False), (r"5\text{ or six}", "5", False), ("5x", "5", False),
    ("3 pi", "3", False), (r"3\mathrm{i}", "3", False), (r"\pm 5", "5", False), ("5,5", "5", False),
    ("10:30", "1/3", False), (r"\sum_{n=1}^{10} n", "55", False), ("3 4", "12", False),
    ("2516_7", "2516_8", False), (r"\text{not even}", r"\text{even}", False),
    (r"1=\sqrt{2}", r"\sqrt{2}", False), ("LRAC", "SRAC=LRAC", False), ("x=5", "y=5", False),
    # rule 6: math-verify
    ("2(n-1)", "2n-2", True), (r"\sqrt{16}", "4", True), (r"1\frac{1}{2}", "3/2", True),
    ("-2, 1", "1,-2", True), ("(2,1)", "(1,2)", False), (r"\sqrt{6}", r"\sqrt{2}\sqrt{3}", True),
    (r"-2\le x\le 7", r"x\in[-2,7]", True), (r"\frac12 m", r"\frac{m}{2}", True),
    (r"\frac12", r"\frac{1}{2}c", False), (r"2^{-99}\pi", r"2^{-98}\pi", False),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False), ("2^{2015}-1", "2^{2015}+1", False),
]  # fmt: skip


def test_rules(grader):
    verdicts = grader.grade_many([(box(answer), [gold]) for answer, gold, _ in VERDICTS])
    wrong = [
        (*row, verdict)
        for row, verdict in zip(VERDICTS, verdicts)
        if verdict != Verdict(row[2], True)
    ]
    assert not wrong, wrong


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
    cases = [
        json.loads(line) for line in (REAL_DATA / "verifier_cases.jsonl").read_text().splitlines()
    ]
    assert len(cases) == 103
    with Grader(workers=2, timeout=2) as grader:  # a second less than usual, for nine of them hang

        def timed(case):  # one call a case, from two threads, so that each has a time of its own
            start = time.monotonic()
            return (
                grader.grade_many([(case["response"], [case["gold"]])])[0],
                time.monotonic() - start,
            )

        warmed(grader)
        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(timed, cases))
    wrong = [
        f"{case['note']}: {case['response'][-100:]!r} for {case['gold']!r} gave {verdict}"
        for case, (verdict, _) in zip(cases, results)
        if case["expect"] != "no_crash" and verdict.correct != (case["expect"] == "correct")
    ]
    assert len(wrong) <= 2, "\n".join(wrong)
    assert max(seconds for _, seconds in results) < 10
    assert not any(verdict.correct for verdict, _ in results if verdict.error)


def gold_lists(name: str) -> list[list[str]]:
    table = pytest.importorskip("pyarrow.parquet").read_table(REAL_DATA / f"{name}.parquet")
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
    for golds, others in zip(rows, rows[1:] + rows[:1]):
        values = {_number(gold) for gold in golds}
        other = _number(others[0])
        if None not in values and other is not None and other not in values:
            assert not grade(box(others[0]), golds), (others, golds)
            compared += 1
    assert compared >= len(rows) / 5


@needs_data
def test_rewritten_golds_verify_with_math_verify(grader):
    """0 + gold is a string that equals no gold, so only sympy can accept it; the next row's gold it
    must reject."""
    golds = [gold for gold, *_ in gold_lists("math500") if re.search(r"sqrt|\\pi|\^[0-9]", gold)]
    # values, so 0 can be added
    golds = [gold for gold in golds if not re.search(r"[,=]|pm|begin|text|mbox", gold)]
    rows = [(box("0+" + gold), [gold], True) for gold in golds]
    rows += [
        (box(b), [a], False) for a, b in zip(golds, golds[1:]) if _key(_clean(a)) != _key(_clean(b))
    ]
    assert len(golds) > 30
    verdicts = grader.grade_many([row[:2] for row in rows])
    wrong = [
        (row, verdict) for row, verdict in zip(rows, verdicts) if verdict != Verdict(row[2], True)
    ]
    assert not wrong, wrong


# --- the pool
# --------------------------------------------------------------------------------------------------


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
        # the rest: starting new workers, busy machine
        assert time.monotonic() - start < 2 + grading.KILL_GRACE + 10
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
        # longer than a start: three failed starts in a row are an error
        pause = 1.2 * (time.monotonic() - start)

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


# --- how it is called
# ------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, threading
from runtime.grading import Grader, grade, _GRADER
print("started")  # a second time, if a worker ran this script again
question = (r"\\boxed{2(n-1)}", ["2n-2"])
assert grade(*question)
results = []
thread = threading.Thread(target=lambda: results.append(grade(*question)))
thread.start(); thread.join()
assert results == [True]
forked = Grader()  # its workers are never closed
assert forked.grade_many([question] * 4)[3].correct
child = os.fork()  # parent and child must not share a worker
answers = [grade(r"\\boxed{%d(n-1)}" % i, ["2n-2"]) for i in range(1, 6)]
assert answers == [False, True, False, False, False], answers
if child == 0:
    sys.exit(0)  # runs atexit, which must leave the parent's workers alone
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
    text = "from eval import grade\nprint(grade(r'\\boxed{2(n-1)}', ['2n-2']))"
    script = run_script(tmp_path, text, tmp_path / "broken")
    out, err = script.communicate(timeout=60)
    assert (
        script.returncode == 1
        and out == ""
        and "workers do not start" in err
        and "this is broken" in err
    )


def test_importing_stays_light():
    """A worker is this file as a script: an import of torch at its top would cost every worker
    seconds and memory."""
    code = (
        "import sys, runtime.grading; heavy = ('torch', 'transformers', 'sympy', 'numpy');"
        " print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"
