"""The toy's checkpoint: padding it for vLLM changes nothing of what it computes, at first and in
training."""

import copy

import torch
from fixtures import TOY_MODEL
from helpers import randomise
from transformers import Qwen2Config, Qwen2ForCausalLM

from toy.build import build_tokenizer, main, widen


def small_model():
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return randomise(Qwen2ForCausalLM(config).eval(), seed=0)


def test_widened_model_computes_the_same_logits():
    model = small_model()
    wide = widen(model)
    ids = torch.randint(0, 48, (3, 120), generator=torch.Generator().manual_seed(0))
    assert wide.config.hidden_size == 128 and wide.model.layers[0].self_attn.head_dim == 32
    with torch.no_grad():
        narrow_logits, wide_logits = model(ids).logits, wide(ids).logits
    assert narrow_logits.std() > 0.5 and (narrow_logits - wide_logits).abs().max() < 1e-3
    assert model.config.hidden_size == 96, "the model it came from is untouched"


def test_what_was_padded_stays_zero_in_training():
    wide = widen(small_model())
    new = {name: value == 0 for name, value in copy.deepcopy(wide.state_dict()).items()}
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2)
    ids = torch.randint(0, 48, (3, 60), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        wide(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(mask.sum() for mask in new.values()) > 10_000
    assert all((value[new[name]] == 0).all() for name, value in wide.state_dict().items())


def test_the_command_names_what_it_wrote_and_shows_no_bar(tmp_path, capfd):
    no_training = ["--steps", "0", "--hub_steps", "0", "--slip_steps", "0"]
    main([*no_training, "--out", str(tmp_path / "model")])
    out, error = capfd.readouterr()
    assert out.splitlines()[-1] == f"model: {tmp_path}/model" and not error
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 128


def test_committed_checkpoint_is_padded_and_of_the_stated_size():
    model = Qwen2ForCausalLM.from_pretrained(TOY_MODEL)
    assert model.config.hidden_size == 128 and sum(p.numel() for p in model.parameters()) == 598_144
    embedding = model.get_input_embeddings().weight
    assert (embedding[:, 96:] == 0).all() and embedding[:, :96].abs().min() > 0
    assert len(build_tokenizer()) == embedding.shape[0]
