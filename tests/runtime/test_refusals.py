"""models.py: what is no usable model is refused in one line that says what it is."""

import pytest
import torch
from fixtures import bpe_tokenizer, save_real_model
from helpers import tiny_model

from runtime.cli import UserError
from runtime.metrics import Gap
from runtime.models import load_model
from runtime.monitor import Display, Monitor
from runtime.rollout import Request, TransformersEngine
from runtime.scoring import Sequence, score

LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 12,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize("rotary", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rotary_embeddings_that_depend_on_the_length_are_refused(rotary, tmp_path):
    save_real_model(tmp_path / "model", rope_parameters=rotary)
    with pytest.raises(UserError, match=f"depend on the length .*{rotary['rope_type']}"):
        load_model(str(tmp_path / "model"), "cpu")


def test_rotary_embeddings_that_only_stretch_are_taken(tmp_path):
    save_real_model(tmp_path / "model", rope_parameters=YARN)
    assert load_model(str(tmp_path / "model"), "cpu")


def test_why_longrope_is_refused():
    """The engine sees the response grow past the switch, the scorer sees all of it at once."""
    model = tiny_model("qwen2", rope_parameters=LONGROPE)
    request = Request([1, 2, 3], 24, 1.0, 0)
    completion = TransformersEngine(model, eos_ids=[99]).generate([request])[0]
    scored = score(model, [Sequence([1, 2, 3], completion.tokens)])[0].logprobs
    gap = torch.tensor(completion.logprobs).sub(torch.tensor(scored)).abs()
    assert gap.mean() > 0.01


@pytest.mark.parametrize(
    "names, said",
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter.*merge"),
        (["model-q8.gguf"], "is a GGUF file"),
        (["__0_0.distcp", ".metadata"], "shards of a distributed checkpoint"),
        (["model_world_size_8_rank_0.pt"], "shards of a distributed checkpoint"),
        (["readme.txt"], "no config.json in it"),
    ],
)
def test_folders_that_hold_something_else_are_named(names, said, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=said) as error:
        load_model(str(tmp_path), "cpu")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_gguf_file_and_another_file_are_no_directories(tmp_path):
    for name, said in (("a.gguf", "is a GGUF file"), ("a.bin", "is a file, not a model directory")):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=said):
            load_model(str(tmp_path / name), "cpu")


def test_a_folder_of_models_names_one_of_them(tmp_path):
    save_real_model(tmp_path / "inner")
    with pytest.raises(UserError, match="did you mean .*inner"):
        load_model(str(tmp_path), "cpu")


# --------------------------------------------------------------------------------------------------
# The same fault, seen while running: engine and learner disagree
# --------------------------------------------------------------------------------------------------
def test_a_gap_stops_the_first_step_and_warns_later(capsys):
    monitor = Monitor(Display(2))
    with pytest.raises(UserError, match=r"difference\| 0.86, above --sync_tolerance 0.0001"):
        monitor.check_gap(0.86, 1e-4)
    monitor.check_gap(1e-6, 1e-4)
    monitor.check_gap(0.86, 1e-4)
    assert "0.86" in capsys.readouterr().out
    assert Gap().tokens == 0  # a step without tokens has no gap: monitor.record divides by 1


def test_a_tokenizer_with_a_chat_template_is_no_obstacle(tmp_path):
    save_real_model(tmp_path / "model")
    _, tokenizer, eos_ids = load_model(str(tmp_path / "model"), "cpu")
    assert tokenizer.chat_template == bpe_tokenizer().chat_template
    assert eos_ids == [tokenizer.eos_token_id]
