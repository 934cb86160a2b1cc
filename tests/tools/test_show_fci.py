"""test_show_fci.py: the FCI of one response, printed and drawn. Bad input: test_bad_input.py.

python -m pytest tests/tools/test_show_fci.py
"""

import numpy as np
import pytest
from fixtures import TOY_MODEL, save_real_model, typed
from launch import run
from matplotlib.figure import Figure

from fci import fci_scores, separator_tokens, split_steps
from runtime.cli import UserError
from runtime.data import encode_question
from runtime.models import load_model
from runtime.scoring import Sequence, score
from tools import show_fci
from tools.show_fci import ScoredSteps, boxes, draw, plot_scores, show, show_tree
from toy.programs import toy_solution
from tree import Continuation, Response, build_tree

PROGRAM = "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"


def test_fci_command_marks_branch_points_and_draws(tmp_path, capsys):
    plot = tmp_path / "fci.png"
    (tmp_path / "r.txt").write_text(toy_solution(PROGRAM))
    options = [*typed("--delta 1 --model"), TOY_MODEL, "--problem", PROGRAM, "--plot", plot]
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


# --------------------------------------------------------------------------------------------------
# In a notebook
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def toy():
    return load_model(str(TOY_MODEL), "cpu")[:2]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Random weights, a chat template, room for 4,096 tokens."""
    return load_model(str(save_real_model(tmp_path_factory.mktemp("chat") / "model")), "cpu")[:2]


def curve_of(figure: Figure) -> list[float]:
    return list(figure.axes[0].lines[0].get_ydata())


def map_of(figure: Figure) -> np.ndarray:
    [image] = [image for axis in figure.axes[:2] for image in axis.images]
    return image.get_array().filled(np.nan)


def labels_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[1].get_yticklabels()]


def test_a_picture_shows_the_scores_and_the_attention_that_a_pass_gives(toy):
    model, tokenizer = toy
    response = toy_solution(PROGRAM)
    figure = show(model, tokenizer, PROGRAM, response, delta=1)
    prompt = encode_question(tokenizer, PROGRAM, "problem")
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    bounds = split_steps(tokens, separator_tokens(tokenizer))
    assert curve_of(figure) == pytest.approx(fci_scores(model, prompt, tokens, bounds, 1), abs=1e-6)
    expected = score(model, [Sequence(prompt, tokens, bounds, True)], delta=1)[0].attention["most"]
    seen = map_of(figure)
    assert seen.shape == (9, 9)
    for j, row in enumerate(expected):
        assert seen[j, : j + 1].tolist() == row and np.isnan(seen[j, j + 1 :]).all()
    assert [label.split()[0] for label in labels_of(figure)][:3] == ["a=4", "b=4-2=2", "c=2+2=4"]
    assert [label.split()[-1] for label in labels_of(figure)] == list("012345678")
    # the branch points that the command marks, as diamonds, frames and coloured labels
    chosen = [int(k) for k in figure.axes[0].lines[1].get_xdata()]
    frames = [round(patch.get_x() + 0.5) for patch in figure.axes[1].patches]
    colours = [label.get_color() for label in figure.axes[1].get_yticklabels()]
    assert len(chosen) == 2 and frames == chosen
    assert [k for k, colour in enumerate(colours) if colour == show_fci.ORANGE] == chosen


def test_rho_and_the_staircase_of_delta(toy):
    """With rho 1 the earliest steps are chosen, with 0.2 the constant of step 3, too. The line:
    Eq. 5 sums the cells below it, those at least Delta steps later."""
    model, tokenizer = toy
    text = toy_solution(PROGRAM)

    def chosen(rho: float) -> list:
        figure = show(model, tokenizer, PROGRAM, text, delta=1, rho=rho)
        return list(figure.axes[0].lines[1].get_xdata())

    assert chosen(1.0) == [1, 2] and chosen(0.2) == [1, 3]
    for delta in (1, 3):
        line = show(model, tokenizer, PROGRAM, text, delta=delta).axes[1].lines[0]
        assert (line.get_xdata()[0], line.get_ydata()[0]) == (-0.5, delta - 0.5)


def test_tokens_and_their_text_give_the_same_picture(toy):
    model, tokenizer = toy
    tokens = tokenizer(toy_solution(PROGRAM), add_special_tokens=False)["input_ids"]
    pictures = [
        show(model, tokenizer, PROGRAM, r, delta=2) for r in (tokens, toy_solution(PROGRAM))
    ]
    assert curve_of(pictures[0]) == curve_of(pictures[1])
    assert np.array_equal(map_of(pictures[0]), map_of(pictures[1]), equal_nan=True)


def test_a_notebook_and_a_file_get_it_and_the_model_stays_as_it_was(toy, tmp_path):
    model, tokenizer = toy
    model.train()
    before = model.config._attn_implementation
    path = tmp_path / "fci.png"
    figure = show(model, tokenizer, PROGRAM, toy_solution(PROGRAM), delta=1, file=path)
    assert isinstance(figure, Figure) and figure._repr_png_()[:4] == b"\x89PNG"
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert model.training and model.config._attn_implementation == before
    model.eval()


@pytest.mark.parametrize("count", [1, 2, 5, 24, 25, 64, 65])
def test_responses_of_any_number_of_steps(chat, count):
    model, tokenizer = chat
    response = "Wait, let me check the answer once more, and again.\n\n" * count
    figure = show(model, tokenizer, "What is 2 + 3?", response, delta=4)
    assert len(curve_of(figure)) == count
    assert (f"steps: {count}, Delta = 4: all scores are 0" in title_of(figure)) == (count <= 5)
    if not 1 < count <= 64:
        assert len(figure.axes) == 1
        return
    labels = labels_of(figure)
    assert map_of(figure).shape == (count, count) and len(labels) == count
    assert all(label.startswith("Wait, let me check") and len(label) < 45 for label in labels)
    figure.draw_without_rendering()
    inside = figure.bbox.padded(1)
    boxes = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    for one, other in zip(boxes[1:], boxes):  # from top to bottom, and none on another
        assert one.y1 <= other.y0 + 1


def title_of(figure: Figure) -> str:
    return figure.get_suptitle() or figure.axes[0].get_title()


@pytest.mark.parametrize(
    ("problem", "response", "settings", "said"),
    [
        (PROGRAM, "", {}, "the response is empty"),
        (PROGRAM, [], {}, "the response is empty"),
        ("", "a=4\n\n", {}, "problem is empty"),
        (PROGRAM, "a=4\n\n" * 200, {}, "512 positions"),
        (PROGRAM, "a=4\n\n", {"delta": 0}, "delta 0"),
        (PROGRAM, "a=4\n\n", {"rho": 2}, "rho 2"),
        (PROGRAM, "a=4\n\n", {"file": "/nowhere/x.png"}, "file /nowhere/x.png: cannot be written"),
    ],
)
def test_bad_input_says_what_is_wrong(toy, problem, response, settings, said):
    with pytest.raises(UserError, match=said) as stop:
        show(*toy, problem, response, **settings)
    assert "\n" not in str(stop.value)


def test_marks_of_formulas_are_shown_as_they_are():
    texts = ["so $x_1", "cost $5 and $\\frac{1", "\x1b[31m red"]
    steps = ScoredSteps(texts, [0.0, 0.2, 0.0], [1], "a $ b", [[1.0], [0.5, 0.5], [0.2] * 3], 1)
    figure = draw(steps)
    figure.draw_without_rendering()
    assert labels_of(figure)[1] == "cost $5 and $\\frac{1  1"
    assert "\x1b" not in labels_of(figure)[2]


# --------------------------------------------------------------------------------------------------
# The tree
# --------------------------------------------------------------------------------------------------
def example() -> list[Response]:
    """The drawing of tree.py: V(root) = 2/4; the node that three leaves share has V = 2/3."""
    first = Response([1] * 8, [0.0] * 8, 1.0)
    for reward in (1.0, 0.0):
        first.continuations.append(Continuation(4, [2] * 3, [0.0] * 3, reward))
    return [first, Response([3] * 4, [0.0] * 4, 0.0)]


def test_a_tree_is_laid_out_leaf_by_leaf():
    placed = [(b.column, b.row, b.parent_row) for b in boxes(build_tree(example()))]
    # root, shared node, its three leaves, the other response
    assert placed == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 2, 0), (1, 3, 0)]


def test_a_tree_shows_v_and_a_of_every_node(toy, tmp_path):
    figure = show_tree(build_tree(example()), toy[1], file=tmp_path / "tree.svg")
    [axis] = figure.axes
    shown = [" ".join(text.get_text().split()[:4]) for text in axis.texts]
    assert shown == [
        "V 0.67 A +0.19",  # tree.py's 0.19245
        "V 1.00 A +0.83",
        "V 1.00 A +0.83",
        "V 0.00 A -1.17",
        "V 0.00 A -1.00",
    ]
    assert "4 leaves, V(root) = 0.50" in axis.get_title()
    blue, orange = axis.patches[0].get_facecolor()[:3], axis.patches[3].get_facecolor()[:3]
    assert blue[2] > blue[0] and orange[0] > orange[2]
    assert (tmp_path / "tree.svg").is_file()
    with pytest.raises(UserError, match="file /nowhere/t.png: cannot be written"):
        show_tree(build_tree(example()), toy[1], file="/nowhere/t.png")


def test_a_tree_without_branches_or_advantages(toy):
    figure = show_tree(build_tree([Response([1, 2], [0.0] * 2, 1.0)] * 2), toy[1])
    assert [text.get_text()[:15] for text in figure.axes[0].texts] == ["V 1.00  A +0.00"] * 2
    assert figure._repr_png_()[:4] == b"\x89PNG"
