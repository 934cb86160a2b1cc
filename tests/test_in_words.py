"""test_in_words.py: what_fci_finds.py on word problems, each number by hand or by a naive second
computation.

    python -m pytest tests/test_in_words.py
"""

import json
import random
import sys

import numpy as np
import pytest
from fixtures import ROOT, save_real_model
from helpers import eager_attention, eager_twin, fci_by_definition, random_sequence, tiny_model
from launch import run

sys.path.insert(0, str(ROOT / "experiments"))
import in_words  # noqa: E402

from fci import fci_scores  # noqa: E402
from recipes.word_problems import word_problems  # noqa: E402
from runtime.cli import UserError  # noqa: E402
from tree import BRANCH_RULES, Response  # noqa: E402


def problem(depends: list[list[int]], steps: list[str] | None = None) -> in_words.Worked:
    steps = steps or [f"{chr(65 + i)} is so." for i in range(len(depends))]
    return in_words.Worked("Why?", steps, depends, "here")


def test_influence_by_hand():
    """0 <- 1 <- 3, 0 <- 2, nobody needs 3; 4 needs 1 and 2, so 0 as well."""
    transitive, direct = problem([[], [0], [0], [1], [1, 2]]).influence()
    assert direct.tolist() == [2, 2, 1, 0, 0]
    assert transitive.tolist() == [4, 2, 1, 0, 0]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen2_window"])
def test_fci_by_layer_is_eq_5_and_eq_6_over_one_layer(kind):
    """Against loops over eager attention, layer by layer; by count: Eq. 5 over its terms."""
    rng, model = random.Random(3), tiny_model(kind)
    twin = eager_twin(model)
    for _ in range(3):
        s = random_sequence(rng)
        found, _ = in_words.fci_by_layer(model, s.prompt_ids, s.tokens, s.bounds)
        alpha = eager_attention(twin, s)
        steps = len(s.bounds) - 1
        for delta in in_words.DELTAS:
            terms = [max(1, steps - k - delta) for k in range(steps)]
            expected = np.array([fci_by_definition(layer[None], s, delta) for layer in alpha])
            by_sum, by_count = (found[f"{name}, Delta {delta}"] for name in ("FCI", "FCI by count"))
            assert np.allclose(by_sum[:, 1:], expected[:, 1:], atol=1e-5)
            assert np.allclose(by_count[:, 1:], expected[:, 1:] / terms[1:], atol=1e-5)


def test_more_steps_than_one_call_of_the_kernel_takes():
    """300 steps: the layers' scores are put together from two blocks of columns."""
    rng, model = random.Random(1), tiny_model("qwen2")
    tokens = [rng.randrange(40) for _ in range(300)]
    found, _ = in_words.fci_by_layer(model, [1, 2], tokens, list(range(301)))
    scores = fci_scores(model, [1, 2], tokens, list(range(301)), delta=4)
    assert found["FCI, Delta 4"].shape == (3, 300)
    assert np.allclose(found["FCI, Delta 4"].max(0)[1:], scores[1:], atol=1e-6)


def test_fci_by_count_orders_steps_as_the_rule_does():
    """tree.py's fci_mean, which gets Eq. 6 and divides, chooses the step that is first here."""
    y = [0.0, 0.9, 0.8, 0.7, 0.6, 0.0]
    bounds = [0, 2, 4, 6, 8, 10, 12]
    response = Response([1] * 12, [0.0] * 12, entropies=[0.0] * 12, bounds=bounds, fci=y)
    response.branchable = 6
    (point,) = BRANCH_RULES["fci_mean"](response, 1, random.Random(0), 0.01, 0, 1)
    by_count = [v / max(1, 6 - k - 1) for k, v in enumerate(y)]
    assert point == bounds[int(np.argmax(by_count))]


@pytest.mark.parametrize(
    "text, right",
    [
        ("A is 1.\n\nB is 2.\n\n\\boxed{2}", True),
        ("B is 2.\n\nA is 1.\n\n\\boxed{2}", False),
        ("A is 1.\n\nB is 2.", False),
        ("A is 1.\n\nB is 2.\n\nC is 3.\n\nbox", False),
        ("", False),
        ("\n\n\n\n", False),
    ],
)
def test_a_sampled_response_must_have_its_steps_in_order(text, right):
    assert in_words.lines_up(text, problem([[], [0]], ["A has 1.", "B has 2."])) == right


def test_files_are_read_and_faults_are_named(tmp_path):
    file = tmp_path / "p.jsonl"
    rows = list(word_problems("4-6", 3, 1))
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = in_words.read_worked(str(file))
    assert [(p.problem, p.steps, p.depends) for p in found] == [
        (r["problem"], r["steps"], r["depends"]) for r in rows
    ]
    good = rows[0]
    for change, fault in (
        ({"problem": " "}, 'line 2: the field "problem" must be a text'),
        ({"steps": ["a", "b"]}, 'line 2: the field "steps" must be a list of at least 3'),
        ({"steps": ["a\n\nb", *good["steps"][1:]]}, 'line 2: the field "steps" must be'),
        ({"depends": [[]]}, 'line 2: the field "depends" must have one list for each step'),
        ({"depends": [[0], *good["depends"][1:]]}, 'line 2: "depends" of step 0 must name'),
        ({"depends": [[], [True], *good["depends"][2:]]}, 'line 2: "depends" of step 1 must'),
        ({"depends": [[], [-1], *good["depends"][2:]]}, 'line 2: "depends" of step 1 must'),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps(good | change))
        with pytest.raises(UserError, match=fault):
            in_words.read_worked(str(file))
    file.write_text(json.dumps(good) + "\n{")
    with pytest.raises(UserError, match="p.jsonl, line 2: not JSON"):
        in_words.read_worked(str(file))
    file.write_text("\n")
    with pytest.raises(UserError, match="no problem in it"):
        in_words.read_worked(str(file))
    for source in ("words:10", "words:10:0:1", "words:10:x:1", "words:2:3:1", "aime24.parquet"):
        with pytest.raises(UserError, match="words:|write 10 or 5-10"):
            in_words.read_worked(source)


def test_one_command_studies_any_model(tmp_path):
    """A random model: its entropies say nothing, and its FCI is earliness. All rules are there,
    with every column, and every layer."""
    model = save_real_model(tmp_path / "model")
    name = f"test-{tmp_path.name}"
    options = ("--quick", "--problems", "words:4-6:12:1", "--name", name)
    out, _ = run("experiments/what_fci_finds.py", "--model", model, *options)
    folder = ROOT / "runs" / "what_fci_finds-quick"
    result, figure = (
        folder / kind / f"what_fci_finds-{name}.{end}"
        for kind, end in (("results", "json"), ("figures", "png"))
    )
    try:
        found = json.loads(result.read_text(), parse_constant=pytest.fail)
        assert figure.stat().st_size > 10_000
    finally:
        for file in (result, figure):
            file.unlink(missing_ok=True)
    assert "12 of 12 responses, of 12 problems" in out
    rules = found["rules"]
    assert len(rules) == 11 and rules["earliest"]["earliness"][0] == pytest.approx(1)
    assert rules["earliest"]["T without earliness"] is None  # the place alone says nothing
    assert rules["FCI, Delta 4"]["earliness"][0] > 0.7
    assert len({len(layers) for layers in found["layers"].values()}) == 1


def test_samples_that_do_not_line_up_are_said(tmp_path):
    model = save_real_model(tmp_path / "model")
    options = ("--quick", "--problems", "words:4:2:1", "--sampled", "1")
    _, error = run("experiments/what_fci_finds.py", "--model", model, *options, code=2)
    assert "none of 2 responses has a paragraph for each step" in error
