"""test_config.py: the learning rate of a step; bf16 and where weights lie. Presets, methods, the
command line: test_attnrl.py.

python -m pytest tests/runtime/test_config.py
"""

import math
from collections import Counter

import pytest
import torch
from toy_runs import set_up, tiny

import attnrl
from attnrl import parse_config
from runtime.config import Config, learning_rate


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, [2, 2, 2, 2]),
        ("linear", 0, [2, 1.5, 1, 0.5]),
        ("cosine", 0, [2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)]),
        ("constant", 2, [1, 2, 2, 2]),
        ("linear", 2, [1, 2, 2, 1]),
        ("cosine", 2, [1, 2, 2, 1]),
        ("constant", 4, [0.5, 1, 1.5, 2]),
        ("linear", 8, [0.25, 0.5, 0.75, 1]),  # a warm-up longer than the run
    ],
)
def test_learning_rate_by_hand(schedule, warmup, expected):
    assert [
        learning_rate(step, 4, 2.0, warmup, schedule) for step in (1, 2, 3, 4)
    ] == pytest.approx(expected)


def test_learning_rate_decays_to_zero_after_the_last_step():
    assert learning_rate(5, 4, 2.0, 0, "linear") == 0 and learning_rate(
        5, 4, 2.0, 0, "cosine"
    ) == pytest.approx(0)


def test_the_settings_of_a_run_reach_its_learning_rate():
    config = Config(lr=2.0, steps=4, lr_schedule="linear", warmup_steps=2)
    assert [config.learning_rate(step) for step in (1, 2, 3, 4)] == pytest.approx([1, 2, 2, 1])


def test_bf16_means_fsdp_on_gpus_and_autocast_on_a_cpu():
    on_cpu = ["--device", "cpu", "--dtype", "bf16"]
    assert parse_config(on_cpu).parallel == "ddp"
    assert parse_config([*on_cpu, "--parallel", "fsdp"]).parallel == "fsdp"
    assert parse_config([*on_cpu, "--dry_run"]).parallel == "fsdp"  # planned are GPUs
    assert parse_config(["--device", "cpu"]).dtype == "fp32"


def test_a_step_in_bf16_on_a_cpu_keeps_fp32_weights_and_agrees_with_the_engine(tmp_path):
    run = set_up(*tiny(tmp_path), "--dtype", "bf16", "--device", "cpu")
    seen = []
    layer = run.policy.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    before = layer.weight.detach().clone()
    result = attnrl.step(run, 1, None)
    assert set(seen) == {torch.float32, torch.bfloat16}  # the engine samples, the learner scores
    assert layer.weight.dtype == torch.float32 and not torch.equal(layer.weight, before)
    assert 0 < run.monitor.record(Counter(), 0.05)["logprob_gap/mean"] < 0.02
    assert abs(result.stats.ratio - 1) < 0.05 and result.stats.updates > 0
