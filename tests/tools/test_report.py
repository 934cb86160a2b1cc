"""Result files and what is computed from them: avg@k, pass@k, bootstrap intervals, the comparison
of two files; broken files."""

import itertools
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import report
from errors import UserError, stop_on_user_error
from report import Results, Sample

SETTINGS = {"model": "m", "k": 2, "questions": 3}


def results(rewards: list[list[float]], name: str = "set", **settings) -> Results:
    """A result file in memory: question q has the rewards of row q. Response i has 10 q + i
    tokens."""
    k = len(rewards[0])
    samples = [
        Sample(
            f"p.jsonl, line {q + 1}",
            f"question {q}",
            ["7"],
            i,
            i,
            float(r),
            10 * q + i,
            True,
            True,
            "",
            "text",
        )
        for q, row in enumerate(rewards)
        for i, r in enumerate(row)
    ]
    return Results(Path(f"{name}.jsonl"), {"k": k, "questions": len(rewards)} | settings, samples)


def write(path: Path, rewards: list[list[float]], **settings) -> Path:
    given = results(rewards, **settings)
    path.write_bytes(
        report.header(given.settings)
        + b"".join(json.dumps(asdict(s)).encode() + b"\n" for s in given.samples)
    )
    return path


# --- statistics
# --------------------------------------------------------------------------------------------------
def test_avg_at_k_by_hand():
    assert report.avg_at_k([1.0, 0.0, 0.0, 1.0]) == 0.5


def test_pass_at_k_by_hand_and_by_counting_subsets():
    assert report.pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert report.pass_at_k(4, 3, 2) == 1.0  # only one wrong sample: no pair without a right one
    for n, c in ((6, 0), (6, 2), (5, 5)):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert report.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            report.pass_at_k(n, c, k)


def test_the_k_of_pass_at_k():
    assert [report.powers(n) for n in (1, 2, 3, 4, 6)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
    ]
    assert report.powers(32) == [1, 2, 4, 8, 16, 32]


def every_resample(values: tuple[float, ...]) -> list[float]:
    """The means of all Q^Q ways to draw Q questions from Q."""
    return [sum(draw) / len(draw) for draw in itertools.product(values, repeat=len(values))]


@pytest.mark.parametrize(
    "values", [(0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.25, 0.5, 1.0), (0.0, 0.0, 0.25, 0.75, 1.0)]
)
def test_bootstrap_equals_the_enumeration_of_all_resamples(values):
    exact = every_resample(values)
    drawn = report.bootstrap(np.array(values)[:, None])[:, 0]
    assert drawn.shape == (10_000,)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (low, high) == pytest.approx(np.quantile(exact, [0.025, 0.975], method="inverted_cdf"))
    share = Counter(np.round(drawn, 9))
    # every mean as often as it should come, to 5 standard errors
    for mean, count in Counter(np.round(exact, 9)).items():
        p = count / len(exact)
        assert abs(share[mean] / 10_000 - p) < 5 * (p * (1 - p) / 10_000) ** 0.5, mean


def test_bootstrap_draws_questions_and_not_samples():
    """30 questions that are always or never right: more samples of each change nothing about the
    interval."""
    rows = [[1] * 15 + [0] * 15, [1] * 15 + [0] * 15]
    few, many = (results([[r] * k for r in rows[0]]) for k in (1, 64))
    (mean, means), (mean64, means64) = report.measure(few)["avg@k"], report.measure(many)["avg@k"]
    assert mean == mean64 == 0.5 and np.array_equal(means, means64)
    # the standard error of 30 coins: 9 points
    assert means.std() == pytest.approx((0.25 / 30) ** 0.5, rel=0.03)


def test_the_same_numbers_every_time_in_any_company():
    a, b = results([[1, 0], [0, 0], [1, 1]], "a"), results([[1], [0]], "b")
    row = report.table([a]).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")] == [
        cell.strip()
        for line in report.table([b, a]).splitlines()[:4]
        if "| a " in line
        for cell in line.split("|")
    ]


# --- tables
# --------------------------------------------------------------------------------------------------
def test_table_of_two_files_by_hand(tmp_path):
    """Set a: 2 questions, k = 4, with 1 and 3 right of 4; set b: 1 question, k = 2, none right, one
    response without a box, both cut off, one whose grading timed out. Of 2 questions, 2 drawn: the
    interval reaches from the worse to the better."""
    a, b = results([[1, 0, 0, 0], [1, 1, 1, 0]], "a"), results([[0, 0]], "b", questions=5)
    for s in b.samples:
        s.tokens, s.finished = 100, False
    b.samples[0].boxed, b.samples[1].error = False, "timeout"
    assert report.table([a, b]) == "\n".join(
        [
            "| set       | questions | k | avg@k             | tokens | cut off | no box |",
            "|-----------|-----------|---|-------------------|--------|---------|--------|",
            # tokens 0 1 2 3 10 11 12 13
            "| a         | 2         | 4 | 50.0 [25.0, 75.0] | 6      | 0.0     | 0.0    |",
            "| b         | 1         | 2 | 0.0 [0.0, 0.0]    | 100    | 100.0   | 50.0   |",
            "| mean of 2 |           |   | 25.0 [12.5, 37.5] | 53     | 50.0    | 25.0   |",
            "",
            "| set       | pass@1            | pass@2             | pass@4               |",
            "|-----------|-------------------|--------------------|----------------------|",
            # pass@2: 1 - 3/6 and 1 - 0
            "| a         | 50.0 [25.0, 75.0] | 75.0 [50.0, 100.0] | 100.0 [100.0, 100.0] |",
            "| b         | 0.0 [0.0, 0.0]    | 0.0 [0.0, 0.0]     | -                    |",
            "| mean of 2 | 25.0 [12.5, 37.5] | 37.5 [25.0, 50.0]  | -                    |",
            "",
            "b: only 1 of 5 questions so far",
            "",
            "b: grading: 1 x timeout (counted as wrong)",
        ]
    )


def test_the_mean_over_sets_draws_the_sets_independently():
    """Two sets of 30 coins: the standard error of their mean is smaller by the square root of 2."""
    one, two = (results([[1]] * 15 + [[0]] * 15, name) for name in "ab")
    for s in two.samples:
        s.problem += " of the other set"
    means = [report.measure(f)["avg@k"][1] for f in (one, two)]
    assert sum(means).std() / 2 == pytest.approx((0.25 / 30 / 2) ** 0.5, rel=0.03)


def test_files_of_one_name_are_told_apart():
    a, b = results([[1]], "x/aime24"), results([[1]], "y/aime24")
    assert (
        "| x/aime24 " in report.table([a, b])
        and "| y/aime24 " in report.table([a, b])
        and "x/" not in report.table([a])
    )


def test_questions_of_a_file_that_is_not_complete():
    part = results([[1, 1], [0, 0], [1, 1]])
    del part.samples[-1]  # the third question has one of its two samples
    assert len(part.questions()) == 2 and "| 50.0 [0.0, 100.0] |" in report.table([part])
    del part.samples[1:]
    with pytest.raises(UserError, match="no question has its 2 samples yet"):
        report.table([part])


def test_a_question_that_occurs_twice_is_refused():
    twice = results([[1, 1], [0, 0]])
    for s in twice.samples:
        s.problem = "the same"
    with pytest.raises(UserError, match="set.jsonl: a question occurs twice in it"):
        report.table([twice])


# --- comparison
# --------------------------------------------------------------------------------------------------
def test_comparison_by_hand():
    """Differences 1, 1/2, 0, -1/2. That of the means is 1/4; its interval is that of all 256
    resamples of the differences."""
    a = results([[0, 0], [1, 0], [1, 1], [1, 0]], "a", model="old")
    b = results([[1, 1], [1, 1], [1, 1], [0, 0]], "b", model="new")
    low, high = 100 * np.quantile(
        every_resample((1.0, 0.5, 0.0, -0.5)), [0.025, 0.975], method="inverted_cdf"
    )
    assert (low, high) == (-25, 75)
    text = report.compare(a, b)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[:5]]
    assert (
        cells[0] == ["", "k", "avg@k", "of 4 questions"]
        and cells[2][0] == "A: a.jsonl"
        and cells[3][0] == "B: b.jsonl"
    )
    assert cells[2][1:] == ["2", "50.0 [12.5, 87.5]", "1 better"]
    assert cells[3][2].startswith("75.0 [") and cells[3][3] == "2 better"
    assert cells[4] == ["B - A", "", "25.0 [-25.0, 75.0]", "1 equal"]
    assert text.endswith("settings, A's -> B's: model 'old' -> 'new'")


def test_comparison_is_paired():
    """B is right in one more of 10 samples on each of 30 questions, easy or hard: the difference
    has no noise at all."""
    a = results([[1] * (q % 9) + [0] * (10 - q % 9) for q in range(30)], "a")
    b = results([[1] * (q % 9 + 1) + [0] * (9 - q % 9) for q in range(30)], "b")
    assert "| 10.0 [10.0, 10.0] | 0 equal" in report.compare(
        a, b
    ) and "| 30 better" in report.compare(a, b)


def test_comparison_does_not_mind_the_order_and_another_k():
    a, b = results([[0], [1]], "a"), results([[0, 0], [1, 1]], "b")
    b.samples = b.samples[2:] + b.samples[:2]
    assert all(
        words in report.compare(a, b) for words in ("| 0.0 [0.0, 0.0] ", "2 equal", "k 1 -> 2")
    )


def test_comparison_of_other_questions_names_the_common_ones():
    a, b = results([[1]] * 3, "a"), results([[1]] * 4, "b")
    with pytest.raises(
        UserError,
        match=r"a.jsonl and b.jsonl: not the same questions \(3 and 4, 3 in common: p.jsonl, line 1; "
        r"p.jsonl, line 2; p.jsonl, line 3\)",
    ):
        report.compare(a, b)
    for s in b.samples:
        s.answers = ["8"]  # graded against another answer: another question
    with pytest.raises(UserError, match=r"\(3 and 4, 0 in common\)"):
        report.compare(a, b)


# --- files
# --------------------------------------------------------------------------------------------------
def test_read_results_gives_back_what_was_written(tmp_path):
    path = write(tmp_path / "r.jsonl", [[1, 0], [0, 0.25]])
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"source": "half a li')
    read = report.read_results(path)
    assert read.samples == results([[1, 0], [0, 0.25]]).samples and (read.size, read.half) == (
        size,
        21,
    )


def line(**changes) -> bytes:
    return json.dumps(asdict(results([[1, 0]]).samples[0]) | changes).encode()


@pytest.mark.parametrize(
    "number, content, words",
    [
        (1, b"", "line 1: "),
        (1, b"[]", "line 1: not a JSON object"),
        (1, b"{}", "line 1: no settings with a number 'k'"),
        (1, b'{"problem": "1+1", "answer": "2"}', "line 1: no settings"),
        (1, b'{"settings": {"k": 0, "questions": 1}}', "line 1: no settings"),
        (1, b'{"settings": {"k": true, "questions": 1}}', "line 1: no settings"),
        (1, b'{"settings": {"k": 2}}', "line 1: |'questions'"),
        (2, b"", "line 2: "),
        (2, b"7", "line 2: not a JSON object"),
        (3, b"\xff", "line 3: "),
        (3, b"[" * 10**6, "line 3: "),
        (3, b'{"source": ', "line 3: "),
        (2, line(reward="1"), "line 2: the field 'reward' is no finite number"),
        (2, line(reward=float("nan")), "line 2: the field 'reward'"),
        (2, line(tokens=None), "line 2: the field 'tokens' is no int"),
        (2, line(finished=1), "line 2: the field 'finished' is no bool"),
        (2, line(problem=7), "line 2: the field 'problem' is no str"),
        (3, line(), r"line 3: sample 0, where sample 1 must stand (k = 2)"),
        (3, line(sample=1, problem="x"), "line 3: another problem"),
        (4, line(sample=2), "line 4: sample 2, where sample 0 must stand (k = 2)"),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_a_broken_line_is_named(number, content, words, tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [[1, 0], [0, 0]])
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = content
    path.write_bytes(b"\n".join(lines))
    for command in ([str(path)], ["--compare", str(path), str(path)]):
        with pytest.raises(SystemExit) as stop, stop_on_user_error("report.py"):
            report.main(command)
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and len(error.splitlines()) == 1
            and error.startswith(f"report.py: {path}, ")
        ), error
        assert all(word in error for word in words.split("|")), error


def test_the_command_prints_tables_and_comparisons(tmp_path, capsys):
    a, b = (
        write(tmp_path / "a.jsonl", [[1, 0], [0, 0]]),
        write(tmp_path / "b.jsonl", [[1, 1], [0, 0]]),
    )
    report.main([str(a), str(b), str(a)])  # given twice, shown once
    assert (
        capsys.readouterr().out
        == report.table([report.read_results(a), report.read_results(b)]) + "\n"
    )
    report.main(["--compare", str(a), str(b)])
    assert "| B - A " in capsys.readouterr().out


# --- writing and going on
# ---------------------------------------------------------------------------------------------
def test_append_and_resume(tmp_path):
    samples = results([[1, 0], [0, 1], [1, 1]]).samples
    expected = [(s.problem, s.sample) for s in samples]
    path = tmp_path / "r.jsonl"
    first = report.resume(path, SETTINGS, expected)
    assert not path.exists() and first.samples == []
    report.append(first, samples[:3])
    path.write_bytes(path.read_bytes() + b'{"half')
    again = report.resume(path, SETTINGS, expected)
    assert again.samples == samples[:3] and again.half == 6
    report.append(again, samples[3:])
    assert (
        report.read_results(path).samples == samples
        and again.samples == samples
        and b"half" not in path.read_bytes()
    )
    with pytest.raises(UserError, match="r.jsonl: another process is writing there"):
        report.append(first, samples[3:])
    assert report.read_results(path).samples == samples


@pytest.mark.parametrize("left", [0, 1, 20, None])
def test_a_file_that_has_but_a_part_of_its_settings_is_started_again(left, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(report.header(SETTINGS)[:left])
    report.append(report.resume(path, SETTINGS, []), [])
    assert path.read_bytes() == report.header(SETTINGS)


def test_resume_refuses_other_settings_other_files_and_lines_that_are_lacking(tmp_path):
    path = write(tmp_path / "r.jsonl", [[1, 0], [0, 0], [1, 1]], model="m")
    before = path.read_bytes()
    expected = [(f"question {q}", i) for q in range(3) for i in range(2)]
    with pytest.raises(
        UserError, match=r"other settings \(k 2 -> 1; model 'm' -> 'n'; seed None -> 3\); use those"
    ):
        report.resume(path, SETTINGS | {"model": "n", "k": 1, "seed": 3}, expected)
    settings = report.read_results(path).settings
    with pytest.raises(UserError, match="r.jsonl, line 4: not the problem whose turn it is"):
        report.resume(path, settings, expected[:2] + expected[4:])
    with pytest.raises(UserError, match="r.jsonl, line 6: not the problem"):
        report.resume(path, settings, expected[:4])
    assert path.read_bytes() == before
    other = tmp_path / "other.jsonl"  # somebody's text, without an end of line
    other.write_bytes(b'{"problem": "1+1", "answer": "2"}')
    with pytest.raises(UserError, match="other.jsonl, line 1: no settings"):
        report.resume(other, settings, expected)


def test_a_full_disk_is_one_line():
    with pytest.raises(
        UserError,
        match=r"/dev/full: cannot be written \(No space left on device\); the same command .* goes on",
    ):
        report.append(Results(Path("/dev/full"), SETTINGS), [])
