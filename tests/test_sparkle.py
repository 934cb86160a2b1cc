"""test_sparkle.py: the first slip and accuracy after a part of the solution, by hand; the
experiment on the toy.

python -m pytest tests/test_sparkle.py
"""

import importlib.util
import json
import math

import numpy as np
import pytest
from fixtures import ROOT, TOY_MODEL, bpe_tokenizer, toy_tokenizer

from runtime.cli import UserError
from runtime.data import Problem
from toy.programs import toy_set, toy_solution


@pytest.fixture(scope="module")
def sparkle():
    spec = importlib.util.spec_from_file_location("sparkle", ROOT / "experiments" / "sparkle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROGRAM = "a=6;b=a+6;c=b-2;d=4;e=c+a;?e"
RIGHT = ["a=6", "b=6+6=2", "c=2-2=0", "d=4", "e=0+6=6", r"\boxed{6}"]


def response(**changed: str) -> str:
    """The right one with some steps replaced; "" leaves a step out."""
    steps = [changed.get(step[0] if step[0] != "\\" else "box", step) for step in RIGHT]
    return "\n\n".join(step for step in steps if step)


@pytest.mark.parametrize(
    "what, text, step",
    [
        ("nothing wrong", response(), 0),
        ("white space at the end", response() + "\n\n", 0),
        ("a wrong digit", response(b="b=6+6=3"), 2),
        ("the follow-up agrees with the slip", response(b="b=6+6=3", c="c=3-2=1"), 2),
        ("two slips: the first counts", response(c="c=2-2=5", e="e=5+6=9"), 3),
        ("a wrong operand", response(c="c=3-2=1"), 3),
        ("a constant miscopied", response(d="d=5"), 4),
        ("a missing step", response(c=""), 3),
        ("a step for another variable", response(c="x=2-2=0"), 3),
        ("two steps change places", "\n\n".join([*RIGHT[:2], RIGHT[3], RIGHT[2], *RIGHT[4:]]), 3),
        ("another way of writing it", response(b="b=2"), 2),
        ("no box", response(box=""), 6),
        ("another box", response(box=r"\boxed{4}"), 6),
        ("an extra step before the box", response(box="f=1\n\n\\boxed{6}"), 6),
        ("text behind the box", response(box="\\boxed{6}\n\nindeed"), 6),
        ("cut off in a step", "a=6\n\nb=6+", 2),
        ("cut off at the end of a step", "a=6\n\nb=6+6=2\n\n", 3),
        ("nothing at all", "", 1),
    ],
)
def test_the_first_slip_by_hand(sparkle, what, text, step):
    assert toy_solution(PROGRAM) == "\n\n".join(RIGHT)
    assert sparkle.first_slip(text, PROGRAM) == step, what


@pytest.mark.parametrize("tokenizer", [toy_tokenizer(), bpe_tokenizer()], ids=["toy", "bpe"])
def test_a_solution_is_cut_at_its_steps(sparkle, tokenizer, monkeypatch):
    problem = Problem(PROGRAM, ["6"], "here")
    one = sparkle.with_solution(problem, tokenizer, "toy")
    parts = [tokenizer.decode(one.tokens[a:b]) for a, b in zip(one.bounds, one.bounds[1:])]
    assert parts == [f"{step}\n\n" for step in RIGHT[:-1]] + RIGHT[-1:]
    monkeypatch.setattr(sparkle, "split_steps", lambda tokens, _: [0, len(tokens)])
    with pytest.raises(UserError, match="--models toy: its tokenizer cannot write 'a=6'"):
        sparkle.with_solution(problem, tokenizer, "toy")


def test_shares_by_hand(sparkle):
    """Four responses each: of five variables, and of four, which have no step 5."""
    long = {"right": [2, 2, 3, 4, 4, 4], "slips": [2, 6, 0, 0]}
    short = {"right": [1, 4, 4, 4, 0], "slips": [1, 1, 5, 0]}
    accuracy, slip = sparkle.shares([long, short], 5)
    nan = math.nan
    np.testing.assert_array_equal(accuracy[0], [0.5, 0.5, 0.75, 1, 1, 1])
    np.testing.assert_array_equal(accuracy[1], [0.25, 1, 1, 1, 0, nan])
    np.testing.assert_array_equal(slip[0], [0, 0.25, 0, 0, 0, 0.25, 0.5])
    np.testing.assert_array_equal(slip[1], [0.5, 0, 0, 0, nan, 0.25, 0.25])
    means = sparkle.intervals(slip)[0]
    np.testing.assert_allclose(means, [0.25, 0.125, 0, 0, 0, 0.25, 0.375])


def test_intervals_are_those_of_a_bootstrap_over_problems(sparkle):
    """Where all agree there is no width; of n values 0 and 1 the width is about that of a binomial;
    and a difference that is the same for every problem has none, however they differ."""
    values = np.array([[1.0, 0.3 + i % 2, i % 2] for i in range(100)])
    middle, low, high = sparkle.intervals(values)
    np.testing.assert_allclose(middle, [1, 0.8, 0.5])
    assert low[0] == high[0] == 1
    assert high[2] - low[2] == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)
    gap = sparkle.intervals(values[:, 1:2] - values[:, 2:])
    np.testing.assert_allclose(gap, np.full((3, 1), 0.3))


SMALL = ["--problems", "toy:6:30:6", "--count", "4", "--samples", "2", "--name", "small"]


def test_the_experiment_on_the_toy(sparkle, tmp_path, capsys):
    """Two names of one model: the same responses, so differences are exactly 0; with all steps
    given nearly all are right; the counts are those of the record; other settings are refused."""
    models = ["--models", f"one={TOY_MODEL}", f"two={TOY_MODEL}"]
    options = [*SMALL, *models, "--folder", str(tmp_path)]
    sparkle.main(options)
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "small.json").read_text())
    assert found["settings"]["samples"] == 2 and list(found["records"]) == ["one", "two"]
    one, two = found["records"].values()
    programs = [program for program, _ in toy_set("toy:6:30:6")][:4]
    assert one == two and [r["problem"] for r in one] == programs
    assert all(len(r["right"]) == 7 and len(r["slips"]) == 2 for r in one)
    assert all(r["slips"].count(0) <= r["right"][0] for r in one)  # without a slip: right
    assert sum(r["right"][6] for r in one) >= 7
    average = 100 * np.mean([r["right"][0] for r in one]) / 2
    assert f"| one       | {average:.1f} [" in text
    assert text.count("| two - one | +0.0 [+0.0, +0.0] ") == 2
    assert (tmp_path / "small.md").read_text() == text
    assert (tmp_path / "small.png").stat().st_size > 10_000
    sparkle.main(["--report", *options])
    assert capsys.readouterr().out == text
    with pytest.raises(UserError, match="small.json: was made with another --seed"):
        sparkle.main([*options, "--seed", "1"])


def test_what_is_given_is_kept_and_the_rest_is_sampled(sparkle, monkeypatch, tmp_path):
    """Requests begin with the prompt and the first k steps, and leave room for the rest only."""
    asked = []

    class Engine:
        def __init__(self, *_):
            pass

        def generate(self, requests):
            asked.extend(requests)
            tokens = toy_tokenizer()(r"\boxed{6}")["input_ids"]
            return [type("Completion", (), {"tokens": tokens}) for _ in requests]

    monkeypatch.setattr(sparkle, "TransformersEngine", Engine)
    monkeypatch.setattr(sparkle, "load_problems", lambda *_, **__: [problem])
    prompt = toy_tokenizer()(PROGRAM)["input_ids"]
    problem = Problem(PROGRAM, ["6"], "here", prompt)
    args = sparkle.parse(["--samples", "1", "--folder", str(tmp_path)])
    (record,) = sparkle.run_model(args, "toy", str(TOY_MODEL))
    assert record["right"] == [1] * 6 and record["slips"] == [1]
    solution = toy_tokenizer()(toy_solution(PROGRAM))["input_ids"]
    for k, request in enumerate(asked):
        given = toy_tokenizer()("".join(f"{step}\n\n" for step in RIGHT[:k]))["input_ids"]
        assert request.prompt_ids == prompt + given and given == solution[: len(given)]
        assert len(given) + request.max_tokens == args.max_response
    assert len({request.seed for request in asked}) == len(asked) == 6


def test_bad_input_is_one_line(sparkle, tmp_path):
    (tmp_path / "small.json").write_text("no json\n")
    fresh = ["--name", "fresh"]
    for more, said in (
        ([], "small.json: cannot be read"),
        (["--samples", "0"], "--samples 0: must be at least 1"),
        (["--temperature", "nan"], "--temperature nan: must be above 0"),
        (["--problems", "math.jsonl"], "--problems math.jsonl: only the toy's programs"),
        (["--problems", "toy:99:1:1", *fresh], "toy:99:1:1: write toy:VARIABLES"),
        (["--models", "nowhere"], "--models nowhere: write NAME=DIR"),
        (["--models", "a=x", "a=y"], "--models a=y: x is called a, too"),
        (["--models", "a=nowhere", *fresh], "--model nowhere: cannot be loaded"),
        (["--max_response", "40", *fresh], "--max_response 40: the solution of toy:6"),
        (["--report", "--name", "none"], "none.json: nothing there yet"),
        (["--folder", f"{tmp_path}/small.json", *fresh], "small.json"),
    ):
        with pytest.raises(UserError, match=said) as error:
            sparkle.main([*SMALL, "--folder", str(tmp_path), *more])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "fresh.json").exists()
