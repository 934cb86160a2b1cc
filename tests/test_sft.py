"""test_sft.py: the supervised warm-up, recipes/sft.py.

python -m pytest tests/test_sft.py
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures import bpe_tokenizer, lines, save_real_model, typed
from helpers import VOCABULARY, random_tokens, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from launch import run
from transformers import AutoModelForCausalLM

from recipes import sft
from recipes.word_problems import word_problems
from runtime.cli import UserError
from runtime.scoring import Sequence, TokenLogprobs


@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 3))
def test_every_example_comes_once_before_one_comes_again(count, size, seed):
    """However batches and rounds lie, and another seed gives another order."""
    args = SimpleNamespace(batch_size=size, seed=seed)
    steps = 3 * count
    drawn = [x for step in range(steps) for x in sft.batch_of(step, list(range(count)), args)]
    one, two = (
        sft.batch_of(0, list(range(50)), SimpleNamespace(batch_size=50, seed=s))
        for s in (seed, seed + 1)
    )
    assert one != two and list(range(50)) not in (one, two)
    assert len(drawn) == steps * size
    for first in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[first : first + count]) == list(range(count))


def test_the_loss_is_the_mean_over_solution_tokens_of_the_whole_batch():
    """Against plain cross-entropy, one sequence at a time, prompts not counted; and its gradient,
    whatever the passes. Lengths differ so much that the mean of means would be another number."""
    rng, model = random.Random(0), tiny_model("qwen2")
    batch = [
        Sequence(random_tokens(rng, p), random_tokens(rng, n))
        for p, n in ((3, 40), (9, 2), (5, 11))
    ]
    total, tokens = 0.0, 0
    for s in batch:
        ids = torch.tensor([s.prompt_ids + s.tokens])
        logits = model(ids).logits[0, len(s.prompt_ids) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(s.tokens), reduction="sum"
        )
        tokens += len(s.tokens)
    (total / tokens).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.norm() for g in expected]).norm()
    optimizer = SimpleNamespace(
        zero_grad=lambda: model.zero_grad(), step=lambda: None
    )  # what the optimizer would see
    loss = sft.update(TokenLogprobs(model), optimizer, batch)
    assert loss == pytest.approx(total.item() / tokens, rel=1e-5)
    for p, gradient in zip(model.parameters(), expected):  # clipped to length 1
        assert torch.allclose(p.grad, gradient / max(1.0, norm), atol=1e-5)


def write_problems(folder, count=12):
    rows = list(word_problems("3", count, 1))
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "p.jsonl"


def test_examples_end_in_the_end_token_and_faults_are_named(tmp_path):
    file, tokenizer = write_problems(tmp_path), bpe_tokenizer()
    first = sft.read_examples(str(file), tokenizer)[0]
    row = json.loads(file.read_text().splitlines()[0])
    assert first.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(first.tokens[:-1]) == row["solution"]
    assert "\\boxed{}." in tokenizer.decode(first.prompt_ids)
    for bad, fault in (
        ({"problem": "1?"}, 'line 2: the field "solution" must be a text'),
        ({"problem": " ", "solution": "1"}, 'line 2: the field "problem" must be a text'),
        ({"problem": "1?", "solution": "1 " * 5000}, "line 2: .* over 4096 tokens"),
        ([], "line 2: not an object"),
        ("{'problem':", "line 2: not JSON in UTF-8"),
    ):
        second = bad if isinstance(bad, str) else json.dumps(bad)
        file.write_text(json.dumps(row) + "\n" + second)
        with pytest.raises(UserError, match=fault):
            sft.read_examples(str(file), tokenizer)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed after the first state was written, and right before the second."""
    model, problems = save_real_model(tmp_path / "model"), write_problems(tmp_path)

    def train(out: str):
        options = typed("--steps 5 --batch_size 3 --lr 1e-3")
        where = ["--model", model, "--problems", problems, "--out", tmp_path / out]
        sft.main([*map(str, where), *options])

    monkeypatch.setattr(sft, "SAVE_EVERY", 2)
    train("whole")

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    save, saves = Path.replace, []
    monkeypatch.setattr(Path, "replace", lambda a, b: kill() if saves else saves.append(save(a, b)))
    with pytest.raises(Killed):
        train("killed")
    monkeypatch.setattr(Path, "replace", save)
    train("killed")
    whole, killed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("whole", "killed")
    )
    for a, b in zip(whole.parameters(), killed.parameters()):
        assert torch.equal(a, b)
    losses = [row["loss"] for row in lines(tmp_path / "whole" / "loss.jsonl")]
    assert losses == [row["loss"] for row in lines(tmp_path / "killed" / "loss.jsonl")]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert not (tmp_path / "killed" / "sft.pt").exists()


def test_one_command_teaches_a_model_and_refuses_a_full_folder(tmp_path):
    model, problems = save_real_model(tmp_path / "model"), write_problems(tmp_path)
    where = ["--model", model, "--problems", problems, "--out", tmp_path / "warm"]
    out, _ = run("recipes/sft.py", *where, *typed("--steps 8 --lr 3e-3 --dtype bf16"))
    rows = lines(tmp_path / "warm" / "loss.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "warm" / "loss.png").stat().st_size > 5_000 and "the model is in" in out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "warm").config.vocab_size > VOCABULARY
    _, error = run("recipes/sft.py", *where, code=2)
    assert "holds something else" in error
    _, error = run("recipes/sft.py", *where, "--lr", "7", code=2)
    assert "--lr" in error


def test_the_learning_rate_rises_and_falls_and_other_settings_are_refused(tmp_path, monkeypatch):
    """40 steps: two rise to 0.1, then it falls in a line, half way at step 22. Stopped after 25."""
    model, problems, rates = save_real_model(tmp_path / "m"), write_problems(tmp_path), []

    def update(_, optimizer, batch):
        if len(rates) == 25:
            raise KeyboardInterrupt
        rates.append(optimizer.param_groups[0]["lr"])
        return 1.0

    monkeypatch.setattr(sft, "update", update)
    where = ["--model", model, "--problems", problems, "--out", tmp_path / "o", "--steps", "40"]
    with pytest.raises(KeyboardInterrupt):
        sft.main([*map(str, where), "--lr", "0.1"])
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1]) and rates[21] == pytest.approx(0.05)
    with pytest.raises(UserError, match="begun with another --lr"):
        sft.main([*map(str, where), "--lr", "0.2"])
