"""test_models.py: models that load, and those that are refused because their log-probs or FCI would
be wrong. More of the latter: tests/test_bad_input.py.

    python -m pytest tests/runtime/test_models.py
"""

import random

import numpy as np
import pytest
import transformers
from fixtures import save_real_model
from helpers import (
    VOCABULARY,
    WINDOW,
    eager_attention,
    eager_twin,
    fci_by_definition,
    fingerprint,
    random_sequence,
    randomise,
    same,
)

from runtime.cli import UserError
from runtime.models import check_model, load_model
from runtime.scoring import Sequence, score

CLOSE = dict(rtol=0, atol=1e-5)
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


GEMMA = dict(SMALL, head_dim=8, final_logit_softcapping=None, attn_logit_softcapping=None)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            transformers.Gemma2Config(**{**GEMMA, "final_logit_softcapping": 30.0}),
            "rescales its logits",
        ),
        (transformers.CohereConfig(**SMALL, logit_scale=0.0625), "rescales its logits"),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), "rescales its logits"),
        (transformers.FalconH1Config(**SMALL, lm_head_multiplier=0.5), "rescales its logits"),
        (transformers.Gemma2Config(**{**GEMMA, "attn_logit_softcapping": 50.0}), "soft-capping"),
        (
            transformers.GptOssConfig(
                **SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1
            ),
            "attention sinks",
        ),
        (
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
            "attention registry",
        ),
        (
            transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
            "no attention layer",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_models_that_would_get_wrong_scores_are_refused(config, words):
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.train()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=words):
        score(model, [Sequence([1, 2], [3, 4, 5, 6], [0, 1, 2, 3, 4])], delta=1)
    assert same(fingerprint(model), before)


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused_whatever_its_config_calls_it():
    class Scaled(transformers.Qwen2ForCausalLM):
        factor = 1.0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * self.factor
            return output

    model = randomise(Scaled(transformers.Qwen2Config(**SMALL)), 0)
    check_model(model, "m")
    model.factor = 0.5
    with pytest.raises(UserError, match="--model m: rescales its hidden states or logits"):
        check_model(model, "m")


def test_gemma2_without_caps_is_scored():
    """The refusals look at the values, not at the family: without its caps Gemma 2 is a plain model
    (and sliding)."""
    model = randomise(
        transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**GEMMA, sliding_window=WINDOW)
        ).eval(),
        0,
    )
    sequence = random_sequence(random.Random(8))
    got = score(model, [sequence], delta=1)[0]
    want = fci_by_definition(eager_attention(eager_twin(model), sequence), sequence, 1)
    np.testing.assert_allclose(got.fci, want, **CLOSE)


def test_broken_weights_are_one_line(tmp_path):
    model = save_real_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_model(str(model), "cpu")
    assert "\n" not in str(error.value)
