"""avg@k, pass@k, the replaceable reward, and the evaluation command on real files with a tiny model."""
import itertools
import json
import re
import subprocess
import sys

import pytest

import eval as evaluation
from errors import UserError
from fixtures import REAL_DATA, ROOT, TOY_MODEL, save_real_model
from toy.programs import toy_solution


def run(*args, cwd=ROOT, code=0):
    """Run a command of the project as a user does; returns its stdout and stderr."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_avg_at_k_by_hand():
    assert evaluation.avg_at_k([1.0, 0.0, 0.0, 1.0]) == 0.5


def test_pass_at_k_by_hand_and_by_counting_subsets():
    assert evaluation.pass_at_k(4, 1, 2) == 0.5  # 1 - C(3,2)/C(4,2) = 1 - 3/6
    assert evaluation.pass_at_k(4, 3, 2) == 1.0  # only one wrong sample: no pair without a right one
    for n, c in ((6, 0), (6, 2), (5, 5)):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            evaluation.pass_at_k(n, c, k)


def test_reward_can_be_replaced_and_is_checked(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def short(response, answers):\n    return 1 / (1 + len(response))\n"
                                      "def broken(response, answers):\n    return float('nan')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert evaluation.Reward("mine:short")([("", ["1"]), ("abc", ["1"])]) == [1.0, 0.25]
    with pytest.raises(UserError, match="returned nan"):
        evaluation.Reward("mine:broken")([("", ["1"])])
    for wrong in ("nothing:here", "mine:nothing", "mine"):
        with pytest.raises(UserError, match="cannot be imported"):
            evaluation.Reward(wrong)


def test_broken_weights_are_one_line(tmp_path):
    model = save_real_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        evaluation.load_model(str(model), "cpu")
    assert "\n" not in str(error.value)


def test_default_reward_counts_missing_boxes():
    reward = evaluation.Reward()
    assert reward([(r"\boxed{4}", ["4"]), ("4", ["4"]), (r"\boxed{5}", ["4", "5"])]) == [1.0, 0.0, 1.0]
    assert reward.counts["unboxed"] == 1


def test_evaluation_command_writes_one_line_per_problem(tmp_path):
    out = tmp_path / "results.jsonl"
    text, _ = run("eval.py", "--model", TOY_MODEL, "--problems", "toy:6:20:5", "--k", 4, "--temperature", 1.0, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 20 and all(len(row["rewards"]) == len(row["responses"]) == 4 for row in rows)
    average = 100 * sum(sum(row["rewards"]) for row in rows) / 80
    assert re.search(rf"avg@4 +{average:.1f} %", text) and "pass@2" in text and "pass@4" in text and "problems" in text
    for row in rows:  # the grade is what a look at the text says
        for response, reward in zip(row["responses"], row["rewards"]):
            assert (f"\\boxed{{{row['answers'][0]}}}" in response) == bool(reward)
    _, error = run("eval.py", "--model", TOY_MODEL, "--problems", "toy:6:20:5", "--out", out, code=2)
    assert "exists already" in error and len(out.read_text().splitlines()) == 20


def test_ask_streams_one_answer():
    program = "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"
    text, _ = run("eval.py", "--model", TOY_MODEL, "--ask", program, "--temperature", 0)
    assert text == toy_solution(program) + "\n"


@pytest.mark.parametrize("args, message", [
    (["--problems", "toy"], "--model"),
    (["--model", "nowhere", "--problems", "toy"], "--model nowhere: cannot be loaded"),
    (["--model", TOY_MODEL, "--problems", "nowhere.jsonl"], "nowhere.jsonl: no such problem file"),
    (["--model", TOY_MODEL, "--problems", "toy", "--k", "0"], "--k 0: must be a number, at least 1"),
    (["--model", TOY_MODEL, "--problems", "toy", "--temperature", "nan"], "--temperature nan"),
    (["--model", TOY_MODEL, "--problems", "toy", "--ask", "x"], "not allowed with"),
    (["--model", TOY_MODEL, "--problems", "toy", "--max_response", "100000"], "more than the model's"),
    (["--model", TOY_MODEL, "--ask", ""], "the problem is empty"),
    (["--model", TOY_MODEL, "--problems", "toy:8:5", "--out", "/dev/null/x"], "--out /dev/null/x: cannot be written"),
    (["--model", TOY_MODEL, "--problems", "toy", "--device", "cud"], "argument --device: invalid choice: 'cud'"),
    (["--model", TOY_MODEL, "--problems", "toy", "--reward", "math:pi"], "--reward math:pi: is not a function"),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        with evaluation.stop_on_user_error("eval.py"):
            evaluation.main([str(a) for a in args])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"real problem files are not at {REAL_DATA}")
def test_real_problems_with_a_tiny_model_that_gets_everything_wrong(tmp_path):
    model = save_real_model(tmp_path / "model")
    text, _ = run("eval.py", "--model", model, "--problems", REAL_DATA / "aime24.parquet", "--k", 2, "--max_response", 16,
                  "--out", tmp_path / "r.jsonl")
    assert re.search(r"avg@2 +0.0 %", text) and len((tmp_path / "r.jsonl").read_text().splitlines()) == 30
