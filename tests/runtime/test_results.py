"""test_results.py: result files and what is computed from them: avg@k, pass@k, bootstrap intervals,
the comparison of two files. Broken files: tests/tools/test_report.py.

    python -m pytest tests/runtime/test_results.py
"""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from result_files import results, write

from runtime.cli import UserError
from runtime.results import (
    Results,
    append_samples,
    avg_at_k,
    bootstrap,
    compare,
    header,
    measure,
    open_results,
    pass_at_k,
    powers,
    read_results,
    results_table,
)

SETTINGS = {"model": "m", "k": 2, "questions": 3}


# --- statistics
# --------------------------------------------------------------------------------------------------
def test_avg_at_k_by_hand():
    assert avg_at_k([1.0, 0.0, 0.0, 1.0]) == 0.5


def test_pass_at_k_by_hand_and_by_counting_subsets():
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert pass_at_k(4, 3, 2) == 1.0  # only one wrong sample: no pair without a right one
    for n, c in ((6, 0), (6, 2), (5, 5)):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)


def test_the_k_of_pass_at_k():
    assert [powers(n) for n in (1, 2, 3, 4, 6)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
    ]
    assert powers(32) == [1, 2, 4, 8, 16, 32]


def every_resample(values: tuple[float, ...]) -> list[float]:
    """The means of all Q^Q ways to draw Q questions from Q."""
    return [sum(draw) / len(draw) for draw in itertools.product(values, repeat=len(values))]


@pytest.mark.parametrize(
    "values", [(0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 0.25, 0.5, 1.0), (0.0, 0.0, 0.25, 0.75, 1.0)]
)
def test_bootstrap_equals_the_enumeration_of_all_resamples(values):
    exact = every_resample(values)
    drawn = bootstrap(np.array(values)[:, None])[:, 0]
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
    (mean, means), (mean64, means64) = measure(few)["avg@k"], measure(many)["avg@k"]
    assert mean == mean64 == 0.5 and np.array_equal(means, means64)
    # the standard error of 30 coins: 9 points
    assert means.std() == pytest.approx((0.25 / 30) ** 0.5, rel=0.03)


def test_the_same_numbers_every_time_in_any_company():
    a, b = results([[1, 0], [0, 0], [1, 1]], "a"), results([[1], [0]], "b")
    row = results_table([a]).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")] == [
        cell.strip()
        for line in results_table([b, a]).splitlines()[:4]
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
    assert results_table([a, b]) == "\n".join(
        [
            "| set       | questions | k | avg@k             | tokens | cut off | no box | wrong |"
            " not graded |",
            "|-----------|-----------|---|-------------------|--------|---------|--------|-------|"
            "------------|",
            # tokens 0 1 2 3 10 11 12 13
            "| a         | 2         | 4 | 50.0 [25.0, 75.0] | 6      | 0.0     | 0.0    | 50.0  |"
            " 0.0        |",
            "| b         | 1         | 2 | 0.0 [0.0, 0.0]    | 100    | 100.0   | 50.0   | 0.0   |"
            " 50.0       |",
            "| mean of 2 |           |   | 25.0 [12.5, 37.5] | 53     | 50.0    | 25.0   | 25.0  |"
            " 25.0       |",
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
    means = [measure(f)["avg@k"][1] for f in (one, two)]
    assert sum(means).std() / 2 == pytest.approx((0.25 / 30 / 2) ** 0.5, rel=0.03)


def test_files_of_one_name_are_told_apart():
    a, b = results([[1]], "x/aime24"), results([[1]], "y/aime24")
    assert (
        "| x/aime24 " in results_table([a, b])
        and "| y/aime24 " in results_table([a, b])
        and "x/" not in results_table([a])
    )


def test_questions_of_a_file_that_is_not_complete():
    part = results([[1, 1], [0, 0], [1, 1]])
    del part.samples[-1]  # the third question has one of its two samples
    assert len(part.questions()) == 2 and "| 50.0 [0.0, 100.0] |" in results_table([part])
    del part.samples[1:]
    with pytest.raises(UserError, match="no question has its 2 samples yet"):
        results_table([part])


def test_a_question_that_occurs_twice_is_refused():
    twice = results([[1, 1], [0, 0]])
    for s in twice.samples:
        s.problem = "the same"
    with pytest.raises(UserError, match="set.jsonl: a question occurs twice in it"):
        results_table([twice])


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
    text = compare(a, b)
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
    assert "| 10.0 [10.0, 10.0] | 0 equal" in compare(a, b) and "| 30 better" in compare(a, b)


def test_comparison_does_not_mind_the_order_and_another_k():
    a, b = results([[0], [1]], "a"), results([[0, 0], [1, 1]], "b")
    b.samples = b.samples[2:] + b.samples[:2]
    assert all(words in compare(a, b) for words in ("| 0.0 [0.0, 0.0] ", "2 equal", "k 1 -> 2"))


def test_comparison_of_other_questions_names_the_common_ones():
    a, b = results([[1]] * 3, "a"), results([[1]] * 4, "b")
    with pytest.raises(
        UserError,
        match=r"a.jsonl and b.jsonl: not the same questions \(3 and 4, 3 in common: p.jsonl,"
        r" line 1; p.jsonl, line 2; p.jsonl, line 3\)",
    ):
        compare(a, b)
    for s in b.samples:
        s.answers = ["8"]  # graded against another answer: another question
    with pytest.raises(UserError, match=r"\(3 and 4, 0 in common\)"):
        compare(a, b)


# --- files
# --------------------------------------------------------------------------------------------------
def test_read_results_gives_back_what_was_written(tmp_path):
    path = write(tmp_path / "r.jsonl", [[1, 0], [0, 0.25]])
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b'{"source": "half a li')
    read = read_results(path)
    assert read.samples == results([[1, 0], [0, 0.25]]).samples and (read.size, read.half) == (
        size,
        21,
    )


# --- writing and going on
# ---------------------------------------------------------------------------------------------
def test_append_and_resume(tmp_path):
    samples = results([[1, 0], [0, 1], [1, 1]]).samples
    expected = [(s.problem, s.sample) for s in samples]
    path = tmp_path / "r.jsonl"
    first = open_results(path, SETTINGS, expected)
    assert not path.exists() and first.samples == []
    append_samples(first, samples[:3])
    path.write_bytes(path.read_bytes() + b'{"half')
    again = open_results(path, SETTINGS, expected)
    assert again.samples == samples[:3] and again.half == 6
    append_samples(again, samples[3:])
    assert (
        read_results(path).samples == samples
        and again.samples == samples
        and b"half" not in path.read_bytes()
    )
    with pytest.raises(UserError, match="r.jsonl: another process is writing there"):
        append_samples(first, samples[3:])
    assert read_results(path).samples == samples


@pytest.mark.parametrize("left", [0, 1, 20, None])
def test_a_file_that_has_but_a_part_of_its_settings_is_started_again(left, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(header(SETTINGS)[:left])
    append_samples(open_results(path, SETTINGS, []), [])
    assert path.read_bytes() == header(SETTINGS)


def test_resume_refuses_other_settings_other_files_and_lines_that_are_lacking(tmp_path):
    path = write(tmp_path / "r.jsonl", [[1, 0], [0, 0], [1, 1]], model="m")
    before = path.read_bytes()
    expected = [(f"question {q}", i) for q in range(3) for i in range(2)]
    with pytest.raises(
        UserError, match=r"other settings \(k 2 -> 1; model 'm' -> 'n'; seed None -> 3\); use those"
    ):
        open_results(path, SETTINGS | {"model": "n", "k": 1, "seed": 3}, expected)
    settings = read_results(path).settings
    with pytest.raises(UserError, match="r.jsonl, line 4: not the expected problem"):
        open_results(path, settings, expected[:2] + expected[4:])
    with pytest.raises(UserError, match="r.jsonl, line 6: not the expected problem"):
        open_results(path, settings, expected[:4])
    assert path.read_bytes() == before
    other = tmp_path / "other.jsonl"  # somebody's text, without an end of line
    other.write_bytes(b'{"problem": "1+1", "answer": "2"}')
    with pytest.raises(UserError, match="other.jsonl, line 1: no settings"):
        open_results(other, settings, expected)


def test_a_full_disk_is_one_line():
    with pytest.raises(
        UserError,
        match=r"/dev/full: cannot be written \(No space left on device\); the same command .*"
        r" goes on",
    ):
        append_samples(Results(Path("/dev/full"), SETTINGS), [])
