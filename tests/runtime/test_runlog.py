"""test_runlog.py: the texts of tokens in a run's log, and trackers. What a run writes:
test_attnrl.py; logs that cannot be written: test_faults.py.

    python -m pytest tests/runtime/test_runlog.py
"""

import sys

import pytest
from fixtures import bpe_tokenizer, lines, metrics_of, toy_tokenizer, typed
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import train_tiny

from runtime.cli import UserError
from runtime.runlog import token_texts


@pytest.mark.parametrize("tokenizer", [toy_tokenizer(), bpe_tokenizer()], ids=["toy", "bpe"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_the_texts_of_tokens_join_to_the_whole(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert len(texts := token_texts(tokenizer, ids)) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_stands_at_the_last_and_broken_ones_are_shown():
    tokenizer = bpe_tokenizer()
    ids = tokenizer("a中b")["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", "", "", "中", "b"]
    assert token_texts(tokenizer, ids[:3]) == ["a", "", "\ufffd"] and token_texts(
        tokenizer, ids[2:3] * 20
    )[-1].endswith("\ufffd")
    assert token_texts(tokenizer, []) == []


def test_tensorboard_gets_every_metric(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_tiny(tmp_path, "--track", "tensorboard")
    longer = typed("--track tensorboard --steps 3 --resume auto --resume_changed true")
    train_tiny(tmp_path, *longer)
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    records = metrics_of(run)
    assert len(records) == 4 and set(events.Tags()["scalars"]) == {
        key for m in records for key in m
    }
    for key in ("initial/reward", "train/grad_norm", "test_accuracy"):
        wanted = [(m["step"], pytest.approx(m[key], rel=1e-6)) for m in records if key in m]
        assert [(e.step, e.value) for e in events.Scalars(key)] == wanted


def test_tensorboard_gets_the_logged_problems_and_responses_as_text(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_tiny(tmp_path, "--track", "tensorboard", "--max_response", "30")
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = lines(run / "samples.jsonl")
    assert len(logged) == 4
    for number in (0, 1):
        name = f"samples/{number + 1}/text_summary"
        for event in events.Tensors(name):
            text = event.tensor_proto.string_val[0].decode()
            sample = [s for s in logged if s["step"] == event.step][number]
            assert f"problem {sample['number']}, answer {sample['answers'][0]}" in text
            assert sample["problem"] in text and text.count("-- r") == len(sample["responses"])
            cut = [r for r in sample["responses"] if not r["finished"]]
            assert text.count(", no box, cut off") == len(cut) > 0
            assert all(line.startswith("    ") for line in text.splitlines() if line.strip())


def test_a_tracker_that_is_not_installed_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with pytest.raises(UserError, match="--track wandb: pip install wandb"):
        train_tiny(tmp_path, "--track", "wandb")
    assert not (tmp_path / "run").exists()
