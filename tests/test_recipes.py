"""test_recipes.py: recipes/smollm2: its page and `make smollm2` are the same commands, and each is
one that its script takes.

    python -m pytest tests/test_recipes.py
"""

import json
import re
import subprocess
import sys

import pytest
from fixtures import ROOT, lines
from launch import run

import eval as evaluation
from attnrl import parse_config
from recipes import sft
from recipes.smollm2.gsm_symbolic import problem_of
from recipes.word_problems import bounds_of
from runtime.results import compare, read_results

PAGE = (ROOT / "recipes" / "smollm2" / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Of the page's block that is to be typed."""
    return [line.split(" #")[0].strip() for line in PAGE.split("```")[3].strip().splitlines()]


def test_make_runs_what_the_page_says():
    done = subprocess.run(
        ["make", "-n", "smollm2", "-o", ".venv/ready"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = re.sub(r"\\\n\s*", "", done.stdout)
    made = [line.split("|| ")[-1].strip() for line in said.splitlines() if "python" in line]
    typed = [line for line in commands() if line.startswith("python")]

    def words(line: str) -> list[str]:
        return sorted(line.replace(".venv/bin/", "").split())

    assert [words(line) for line in made] == [words(line) for line in typed]
    assert len(typed) == 10 and commands()[0].startswith("pip install gguf accelerate")


def test_the_training_command_is_one_that_attnrl_takes():
    [command] = [line for line in commands() if line.startswith("python attnrl.py")]
    config = parse_config(command.split()[2:])
    assert (config.dtype, config.steps, config.delta, config.kl_coef) == ("bf16", 24, 1, 0.0)


def test_the_other_commands_are_ones_that_their_scripts_take():
    taken = {"recipes/sft.py": sft.parse, "eval.py": evaluation.parse}
    for line in commands():
        _, script, *words = line.split()
        if script in taken:
            taken[script](words)
        if script == "recipes/word_problems.py":
            few, many = bounds_of(words[words.index("--people") + 1])
            assert 4 == few < many and int(words[words.index("--count") + 1]) >= 100


def test_a_directory_that_is_there_is_not_fetched_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    out, _ = run("recipes/smollm2/fetch.py", tmp_path)
    assert "there already" in out and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_gsm_symbolic_says_what_it_needs_or_writes_rows(tmp_path):
    file = tmp_path / "gsm.jsonl"
    words = [sys.executable, "recipes/smollm2/gsm_symbolic.py", str(file), "--count", "3"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        assert "pip install reasoning-gym" in done.stderr and not file.exists()
        pytest.skip("the package reasoning-gym is not here")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 3 and all(row["problem"] and row["solution"] for row in rows)
    assert all(str(row["answer"]) in row["solution"] for row in rows)


def test_the_pages_say_what_the_results_say():
    """Every percentage of the table of test problems, and the lines of the run in the README."""
    results = ROOT / "recipes" / "smollm2" / "results"
    files = (results / "before.jsonl", results / "after.jsonl")
    before, after, gap = compare(*map(read_results, files)).splitlines()[2:5]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[3:5]] for line in (before, after, gap)]
    for found, _ in cells:
        assert found in PAGE
    assert cells[2][0] == "17.5 [11.8, 23.5]" and cells[2][0] in readme
    assert [cell for _, cell in cells] == ["10 better", "47 better", "43 equal"]
    rows = lines(results / "attnrl" / "metrics.jsonl")
    tested = [f"{100 * m['test_accuracy']:.1f}" for m in rows if "test_accuracy" in m]
    assert f"{', '.join(tested[:-1])} and {tested[-1]} %" in PAGE
    shown = readme.split("## Your own model and data")[1].split("## ")[0]
    assert re.findall(r"test +([\d.]+) %", shown) == [tested[0], tested[-1]]
    assert f"{rows[-1]['seconds/step']:.1f} s" in shown and len(rows) == 1 + 24


def test_rows_of_gsm_symbolic_become_ours():
    row = {"question": "q", "answer": "288", "metadata": {"answer_cot": "6 * 48 = 288.\n#### 288"}}
    solution = "6 * 48 = 288.\n\n\\boxed{288}"
    assert problem_of(row) == {"problem": "q", "answer": "288", "solution": solution}
