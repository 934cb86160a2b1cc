"""test_config.py: the learning rate of a step; whose settings are taken; bf16 and where weights
lie. Methods and the command line: test_attnrl.py.

python -m pytest tests/runtime/test_config.py
"""

import math
from collections import Counter

import pytest
import torch
from fixtures import TOY_MODEL, typed
from toy_runs import set_up, tiny

import attnrl
from attnrl import PRESETS, parse_config
from runtime.cli import UserError
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


OWN = "--model my/model --problems train.jsonl"


@pytest.mark.parametrize(
    "command, said",
    [
        ("--model my/model", "--model my/model: name the settings.*--preset small.*--preset toy"),
        ("--problems a.jsonl", "--problems a.jsonl: name the settings"),
        ("--problems=a.jsonl --steps 2", "--problems a.jsonl: name the settings"),
        ("--test_problems b.csv", "--test_problems b.csv: name the settings"),
        ("--test-problems b.csv", "--test_problems b.csv: name the settings"),
        (f"{OWN} --method grpo", "--model my/model: name the settings"),
        (
            f"{OWN} --preset small",
            "--problems train.jsonl: name the test problems.*--test_fraction",
        ),
        (f"{OWN} --preset toy", "--problems train.jsonl: name the test problems"),
        (f"{OWN} --preset paper --dry_run", "--problems train.jsonl: name the test problems"),
        ("--preset small --problems a --test_fraction 0.1", "--model: --preset small has none"),
        ("--preset small --model my/model", "--problems: --preset small has none"),
    ],
)
def test_the_toys_settings_are_not_taken_for_a_model_or_problems_of_ones_own(command, said):
    with pytest.raises(UserError, match=said) as stop:
        parse_config(typed(command))
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--problems toy:8-10:400:1",
        f"--model {TOY_MODEL}",
        "--model toy/model/../model --test_problems toy:6:5:2",
        f"{OWN} --preset small --test_problems test.jsonl",
        f"{OWN} --preset small --test_fraction 0.1",
        f"{OWN} --preset toy --test_fraction=0.1",
        "--preset paper --dry_run",
    ],
)
def test_settings_that_were_named_or_are_the_toys_are_taken(command):
    config = parse_config(typed(command))
    for name, value in PRESETS[config.preset].items():
        # gpus are those that --dry_run plans for
        assert f"--{name}" in command or name == "gpus" or getattr(config, name) == value


def test_the_small_preset_by_hand():
    config = parse_config(typed(f"{OWN} --preset small --test_fraction 0.1"))
    assert (config.max_response, config.eval_max_response, config.delta) == (1024, 1024, 1)
    assert (config.batch_size, config.leaves_per_problem(), config.target_sequences) == (
        16,
        30,
        480,
    )
    assert (config.lr, config.kl_coef, config.mini_batch, config.steps) == (5e-6, 0.001, 96, 100)
    assert (config.eval_samples, config.eval_temperature, config.dtype) == (4, 0.6, "fp32")


def test_bf16_means_fsdp_on_gpus_and_autocast_on_a_cpu():
    on_cpu = ["--device", "cpu", "--dtype", "bf16"]
    assert parse_config(on_cpu).parallel == "ddp"
    assert parse_config([*on_cpu, "--parallel", "fsdp"]).parallel == "fsdp"
    assert parse_config([*on_cpu, "--dry_run"]).parallel == "fsdp"  # planned are GPUs
    assert parse_config(["--device", "cpu"]).dtype == "fp32"


def test_a_step_in_bf16_on_a_cpu_keeps_fp32_weights_and_samples_with_their_bf16_copy(tmp_path):
    run = set_up(*tiny(tmp_path), "--dtype", "bf16", "--device", "cpu")
    seen = []
    layer = run.policy.model.layers[0].self_attn.q_proj
    copied = run.engine.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    before = layer.weight.detach().clone()
    result = attnrl.step(run, 1, None)
    assert set(seen) == {torch.bfloat16}  # of the policy's products
    assert layer.weight.dtype == torch.float32 and not torch.equal(layer.weight, before)
    assert torch.equal(copied.weight, layer.weight.bfloat16())  # after the update
    assert 0 < run.monitor.sync_gap < 0.02
    assert 0 < run.monitor.record(Counter(), 0.05)["logprob_gap/mean"] < 0.02
    assert abs(result.stats.ratio - 1) < 0.05 and result.stats.updates > 0
