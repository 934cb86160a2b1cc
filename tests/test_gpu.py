"""test_gpu.py: smoke tests on an NVIDIA GPU, skipped where there is none. Not yet run on one.

The CPU is the second opinion. Whole runs are subprocesses, so that each has a fresh CUDA context
and its own peak memory.

    python -m pytest -s tests/test_gpu.py        # -s shows peak memory and log-prob gaps
"""

import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import ROOT, TOY_MODEL, typed
from helpers import KINDS, random_bounds, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnrl import parse_config, train
from runtime.data import load_problems
from runtime.dist import cast, full_weights
from runtime.rollout import Request, TransformersEngine, probe_requests, request_seed
from runtime.scoring import Sequence, engine_gap, score
from runtime.vllm_engine import VLLMEngine

DEVICE = "cuda"
GIB = 2**30
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="needs vLLM: pip install -r requirements-gpu.txt",
)


# --------------------------------------------------------------------------------------------------
# The same numbers as on the CPU
# --------------------------------------------------------------------------------------------------
def sequences(seed: int) -> list[Sequence]:
    rng = random.Random(seed)
    return [
        Sequence(
            random_tokens(rng, 7),
            random_tokens(rng, length),
            random_bounds(rng, length, steps) if steps else None,
        )
        for length, steps in ((60, 12), (33, 9), (20, 0), (10, 1), (45, 3))
    ]


def assert_close(got, wanted, tolerance: float) -> None:
    for one, other in zip(got, wanted):
        for name in ("logprobs", "entropies", "fci"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), rtol=0, atol=tolerance, err_msg=name
            )


@pytest.mark.parametrize("kind", KINDS)
def test_fci_and_logprobs_equal_the_cpus(kind):
    model = tiny_model(kind)
    wanted = score(model, sequences(1), 0.8, delta=2)
    assert_close(score(copy.deepcopy(model).to(DEVICE), sequences(1), 0.8, delta=2), wanted, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_near_the_cpus_numbers(kind):
    """bf16 has 8 bits: the bound only tells rounding from a wrong mask or a swapped head (which are
    off by 1 and more)."""
    model = tiny_model(kind).to(torch.bfloat16).float()  # the same rounded weights on both sides
    wanted = score(model, sequences(2), delta=2)
    got = score(cast(copy.deepcopy(model), "bf16").to(DEVICE), sequences(2), delta=2)
    for name, bound in (("logprobs", 0.05), ("entropies", 0.05), ("fci", 0.01)):
        gaps = [
            abs(a - b)
            for one, other in zip(got, wanted)
            for a, b in zip(getattr(one, name), getattr(other, name))
        ]
        print(f"{kind} bf16 {name}: mean gap {np.mean(gaps):.4f}, largest {max(gaps):.3f}")
        assert np.mean(gaps) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_transformers_engine_samples_what_it_scores(kind):
    model = tiny_model(kind)
    rng = random.Random(3)
    requests = [
        Request(random_tokens(rng, 1 + 3 * (i // 3)), 30, (1.0, 0.6)[i % 2], request_seed(3, i))
        for i in range(24)
    ]
    engine = TransformersEngine(copy.deepcopy(model).to(DEVICE), [5, 11], token_budget=600)
    completions = engine.generate(requests)
    for r, c in zip(requests, completions):
        learnt = score(engine.model, [Sequence(r.prompt_ids, c.tokens)], r.temperature)[0].logprobs
        np.testing.assert_allclose(c.logprobs, learnt, rtol=0, atol=1e-4)
    greedy = [Request(r.prompt_ids, 10, 0, 0) for r in requests[::3]]
    wanted = TransformersEngine(model, [5, 11]).generate(greedy)
    assert [c.tokens for c in engine.generate(greedy)] == [c.tokens for c in wanted]


# --------------------------------------------------------------------------------------------------
# Whole runs of the toy
# --------------------------------------------------------------------------------------------------
SMALL = [
    "--device",
    DEVICE,
    *typed("--preset toy --steps 2 --batch_size 4 --test_problems toy:8:10:2 --eval_samples 2"),
]


def child(call: str, *arguments, ranks: int = 0) -> str:
    """Run test_gpu.`call`(*arguments) in a process of its own, or in one per rank; what it
    prints."""
    code = ["-c", f"import test_gpu; test_gpu.{call}(*{[str(a) for a in arguments]!r})"]
    if ranks:
        code = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "--no-python",
            sys.executable,
            *code,
        ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, *code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_and_report(*argv) -> None:
    """In the child: a run; then its peak memory, beside its other files."""
    folder = train(parse_config(list(argv)))
    if folder:  # rank 0
        (folder / "peak").write_text(str(torch.cuda.max_memory_allocated()))


def toy_run(folder: Path, *options, ranks: int = 0) -> tuple[list[dict], float]:
    """(metrics, peak GiB) of a small run; it learnt something, finitely, and both models were
    written."""
    child("run_and_report", *SMALL, *options, "--out", folder, ranks=ranks)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peak = int((folder / "peak").read_text()) / GIB
    print(
        f"{' '.join(options) or 'fp32'}: peak {peak:.2f} GiB, log-prob gap"
        f" {records[1]['logprob_gap/mean']:.2g} mean, {records[1]['logprob_gap/max']:.2g} largest,"
        f" {records[1]['logprob_gap/sync']:.2g} after the sync"
    )
    assert [m["step"] for m in records] == [0, 1, 2]
    for m in records[1:]:
        assert (
            m["train/updates"] >= 1 and m["train/skipped_updates"] == 0 and m["train/grad_norm"] > 0
        )
    first, last = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (TOY_MODEL, folder / "last")
    )
    assert all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    return records, peak


@pytest.mark.parametrize(
    "options",
    [[], ["--parallel", "fsdp"], ["--kl_coef", "0.01"]],
    ids=lambda o: " ".join(o) or "plain",
)
def test_two_steps_in_fp32(tmp_path, options):
    records, peak = toy_run(tmp_path / "run", *options)
    assert records[1]["logprob_gap/mean"] < 1e-4 and records[1]["train/ratio"] == pytest.approx(
        1, abs=1e-3
    )
    assert peak < 4  # 0.6 M parameters and 8192 tokens a pass: far below 1 GiB is expected


def test_two_steps_in_bf16_with_checkpointing_and_offload(tmp_path):
    """FSDP2 with a group of one. Checkpointing must show in the peak; the toy's weights are too
    small for offloading to."""
    peaks = {}
    for name, options in {
        "plain": [],
        "checkpointing": ["--activation_checkpointing"],
        "both": ["--activation_checkpointing", "--cpu_offload"],
    }.items():
        records, peaks[name] = toy_run(tmp_path / name, "--dtype", "bf16", *options)
        assert records[1]["logprob_gap/mean"] < 0.05 and records[2]["logprob_gap/sync"] < 0.05
        assert peaks[name] < 4
    assert peaks["checkpointing"] <= 1.05 * peaks["plain"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"]], ids=["ddp", "fsdp"])
def test_two_steps_on_two_gpus(tmp_path, options):
    one, _ = toy_run(tmp_path / "one", *options)
    two, _ = toy_run(tmp_path / "two", *options, ranks=2)
    assert two[1]["problems"] == one[1]["problems"]
    # rounding may change a few tokens
    assert two[1]["initial/reward"] == pytest.approx(one[1]["initial/reward"], abs=0.2)


# --------------------------------------------------------------------------------------------------
# vLLM
# --------------------------------------------------------------------------------------------------
def vllm_sleeps_and_wakes() -> None:
    """In the child: two rounds of sleep, update, sync, generate; after each the engine has the
    policy's new weights."""
    tokenizer = AutoTokenizer.from_pretrained(TOY_MODEL)
    problems = load_problems("toy:8:8:7", tokenizer, max_prompt=100)
    # before the policy
    engine = VLLMEngine(str(TOY_MODEL), [tokenizer.eos_token_id], 160, "bf16", DEVICE, memory=0.3)
    policy = cast(AutoModelForCausalLM.from_pretrained(TOY_MODEL), "bf16").to(DEVICE)
    engine.sync_weights(full_weights(policy))
    requests = [Request(p.prompt_ids, 60, 1.0, request_seed(0, i)) for i, p in enumerate(problems)]
    for update in range(3):
        completions = engine.generate(requests)
        gap = engine_gap(engine, policy, probe_requests(requests, completions), tolerance=0.5)
        before = torch.cuda.mem_get_info()[0]
        engine.sleep()
        freed = torch.cuda.mem_get_info()[0] - before
        print(f"round {update}: gap {gap:.2g}, sleep gave back {freed / GIB:.1f} GiB")
        assert freed > GIB or DEVICE == "cpu"
        # every token takes another's place: old weights would be off by 10 nats and more
        with torch.no_grad():
            embedding = policy.get_input_embeddings().weight
            embedding.copy_(embedding.roll(1, 0))
        engine.sync_weights(full_weights(policy))
    engine.close()


@needs_vllm
def test_vllm_sleeps_during_updates_and_wakes_with_the_new_weights():
    print(child("vllm_sleeps_and_wakes"))


@needs_vllm
def test_two_steps_with_vllm(tmp_path):
    """The paper preset's machine settings on the toy: vLLM, bf16, FSDP2, checkpointing."""
    records, _ = toy_run(
        tmp_path / "run", "--engine", "vllm", "--dtype", "bf16", "--activation_checkpointing"
    )
    assert records[1]["logprob_gap/mean"] < 0.05 and records[2]["logprob_gap/sync"] < 0.05
