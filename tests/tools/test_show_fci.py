"""test_show_fci.py: the FCI of one response, printed and drawn. Bad input: test_bad_input.py.

python -m pytest tests/tools/test_show_fci.py
"""

import pytest
from fixtures import TOY_MODEL, typed
from launch import run

from tools import show_fci
from tools.show_fci import ScoredSteps, plot_scores
from toy.programs import toy_solution


def test_fci_command_marks_branch_points_and_draws(tmp_path, capsys):
    plot = tmp_path / "fci.png"
    problem = "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"
    (tmp_path / "r.txt").write_text(toy_solution(problem))
    options = [*typed("--delta 1 --model"), TOY_MODEL, "--problem", problem, "--plot", plot]
    sampled, _ = run("-m", "tools.show_fci", *options)  # as a person does
    assert plot.read_bytes()[:4] == b"\x89PNG"
    plot.unlink()
    show_fci.main([str(option) for option in (*options, "--response", tmp_path / "r.txt")])
    for text in (sampled, capsys.readouterr().out):
        lines = [line for line in text.splitlines() if line.startswith("step")]
        assert (
            len(lines) == 9
            and sum("<- branch" in line for line in lines) == 2
            and "FCI 0.0000" in lines[0]
        )
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_a_curve_has_the_name_that_was_asked_for(tmp_path):
    plot_scores(str(tmp_path / "curve"), ScoredSteps(["a", "b"], [0.0, 1.0], [1]))
    # matplotlib alone would write curve.png
    assert [path.name for path in tmp_path.iterdir()] == ["curve"]


@pytest.mark.parametrize(
    ("problem", "response", "finished", "answer", "words"),
    [
        ("a=4;b=a-2;?b", r"so \boxed{2}", True, None, "answer 2: right"),  # the toy knows
        ("a=4;b=a-2;?b", r"so \boxed{3}", True, None, "answer 3: wrong, it is 2"),
        ("2 + 3?", r"\boxed{5}", True, "5", "answer 5: right"),
        ("2 + 3?", r"\boxed{5}", True, None, "answer 5 (not graded: --answer gives the right one)"),
        ("2 + 3?", "well", False, "5", "no box, cut off: wrong, it is 5"),
    ],
)
def test_what_became_of_the_answer(problem, response, finished, answer, words):
    assert show_fci.outcome(problem, response, finished, answer) == words


def test_a_curve_says_the_problem_as_it_is(tmp_path):
    """A "$" is no formula of matplotlib's."""
    steps = ScoredSteps(["a", "b"], [0.0, 1.0], [1], "What is $\\frac{1}{2 of $3?\nanswer 5: right")
    plot_scores(str(tmp_path / "curve.svg"), steps)
    text = (tmp_path / "curve.svg").read_text()
    assert "of $3?" in text and "answer 5: right" in text
