"""test_show_fci.py: the FCI of one response, printed and drawn. Bad input: test_bad_input.py.

python -m pytest tests/tools/test_show_fci.py
"""

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


def test_fci_py_says_what_to_type_now():
    text, error = run("fci.py", "--model", TOY_MODEL, code=2)
    assert text == "" and len(error.splitlines()) == 1 and "python -m tools.show_fci" in error
