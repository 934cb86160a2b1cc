"""test_dist.py: several ranks compute what one computes, and a run that loses a rank ends. Real
torchrun, gloo, no mocks.

What ranks compute is in dist_worker.py; here one torchrun computes all cases of that kind, and each
test reads its own.

    python -m pytest tests/runtime/test_dist.py -m "not full"

Without the last option also nodes, 3 ranks, other methods, more faults.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import dist_worker
import pytest
import torch
from fixtures import lines, typed
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import Launched, one_node, steps_done, torchrun
from toy_runs import assert_same, metrics, same_run, train
from transformers import AutoModelForCausalLM

from attnrl import parse_config
from runtime import dist
from sampler import EasyFilter, problem_fci, solve_rate
from toy.programs import toy_set

LIMIT = 60  # seconds within which a run must end that lost a rank


def on_ranks(ranks: int, cases: dict, folder: Path) -> dict[str, list]:
    """{name: [result of rank 0, of rank 1, ...]} of cases {name: (function of dist_worker,
    options)}."""
    torchrun(ranks, "tests/dist_worker.py", folder / "results", json.dumps(cases))
    return torch.load(folder / "results", weights_only=False)


@contextmanager
def group_of_one():
    """FSDP2 on a single device, in this process."""
    dist.start("cpu", alone=True)
    try:
        yield
    finally:
        dist.stop()


def test_comparisons_notice_a_difference():
    """The helper that all tests here trust."""
    one = {"a": [1, 2.0, "x"], "b": torch.tensor([1.0, 2.0])}
    assert_same(one, {"a": [1, 2.0, "x"], "b": torch.tensor([1.0, 2.0])})
    assert_same({"b": torch.tensor([1.0, 2.00001])}, {"b": torch.tensor([1.0, 2.0])}, tol=1e-4)
    for other in (
        {"a": [1, 2.001, "x"], "b": one["b"]},
        {"a": [2, 2.0, "x"], "b": one["b"]},
        {"a": [1, 2.0], "b": one["b"]},
        {"a": [1, 2.0, "y"], "b": one["b"]},
        {"a": one["a"], "b": torch.tensor([1.0, 2.001])},
        {"a": one["a"], "b": torch.tensor([1.0, math.nan])},
        {"a": one["a"]},
        {"a": [1, math.nan, "x"], "b": one["b"]},
    ):
        with pytest.raises(AssertionError):
            assert_same(other, one, tol=1e-4)


# --------------------------------------------------------------------------------------------------
# Without a group; dealing out
# --------------------------------------------------------------------------------------------------
def test_without_a_group_this_is_rank_0_of_1_and_nothing_is_exchanged():
    assert (dist.rank(), dist.world()) == (0, 1)
    items = [3, 1, 2]
    assert (
        dist.mine(items) == items
        and dist.everyone(items) == items
        and dist.in_step([[0], [1]]) == [[0], [1]]
    )
    assert dist.start("cpu") == "cpu" and dist.world() == 1  # no torchrun: no group
    dist.stop()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_deal_is_a_fair_partition_and_the_same_on_every_rank(costs, hands):
    dealt = dist.deal(costs, hands)
    assert len(dealt) == hands and sorted(i for hand in dealt for i in hand) == list(
        range(len(costs))
    ), (dealt, costs)
    loads = [sum(costs[i] for i in hand) for hand in dealt]
    # dearest first to the poorest: when the richest got its last item it was the poorest, so it is
    # ahead by that item at most
    assert max(loads) - min(loads) <= max(costs, default=0), (
        f"loads {loads}, largest cost {max(costs, default=0)}"
    )
    assert dealt == dist.deal(list(costs), hands)


# --------------------------------------------------------------------------------------------------
# Two ranks: work, gradients, scores. Lengths are such that `deal` gives rank 0 the longest sequence
# and few others.
# --------------------------------------------------------------------------------------------------
LENGTHS = [60, 12, 9, 9, 7, 5, 3]
MODELS = ("qwen2", "qwen2_tied", "qwen3")
SPREADS = {
    "ddp": {},
    "ddp+checkpointing": dict(activation_checkpointing=True),
    "fsdp": dict(parallel="fsdp"),
    "fsdp+checkpointing": dict(parallel="fsdp", activation_checkpointing=True),
    "fsdp+offload": dict(parallel="fsdp", cpu_offload=True),
}
BOTH = ("ddp", "fsdp")
# name: options of dist_worker.update; each with one process and with DDP and FSDP2 on two ranks
UPDATES = {
    "one sequence": dict(lengths=[20]),  # fewer than ranks
    # the norm must be that of the whole gradient, not of a shard
    "clipped": dict(lengths=LENGTHS, max_grad_norm=0.01),
    "three updates": dict(lengths=LENGTHS, mini_batch=3, adam_lr=1e-3, model="qwen3"),
    "nan": dict(lengths=LENGTHS, poison=math.nan),
    "inf": dict(lengths=LENGTHS, poison=math.inf),
    "nan in one of three": dict(lengths=LENGTHS, mini_batch=3, poison=math.nan, model="qwen3"),
}
# rows of at most 40 tokens; sequences have prefixes in common
PACKED = dict(lengths=[60, 12, 9, 20, 18, 7, 15, 5, 11, 3], longest=40, token_budget=45)
# sign 1: a loss that does not nearly cancel
BF16 = dict(lengths=LENGTHS, sign=1, parallel="fsdp", dtype="bf16")
CASES = {
    "group": ("group", dict(longest=7)),
    **{
        f"{model} {spread}": ("update", dict(lengths=LENGTHS, model=model, **options))
        for model in MODELS
        for spread, options in SPREADS.items()
    },
    **{
        f"{name} {spread}": ("update", options | SPREADS[spread])
        for name, options in UPDATES.items()
        for spread in BOTH
    },
    **{
        f"packed {spread}": ("update", PACKED | options)
        for spread, options in SPREADS.items()
        if spread != "fsdp+offload"
    },
    "packed one family ddp": ("update", PACKED | dict(lengths=[9, 12, 11])),
    "packed bf16": ("update", BF16 | PACKED),
    "bf16 autocast": ("update", BF16 | dict(parallel="ddp")),
    "bf16": ("update", BF16),
    "bf16+checkpointing": ("update", BF16 | dict(activation_checkpointing=True)),
    "bf16 adam": ("update", BF16 | dict(adam_lr=1e-3)),
    "gap in step": ("gap", dict(stale=-1)),
    "gap of rank 1": ("gap", dict(stale=1)),
    **{
        f"scores {at} {spread}": (
            "scores",
            dict(model="qwen2_tied", lengths=[40, 12, 9], at=at, parallel=spread),
        )
        for at in (0, 1, None)
        for spread in BOTH
    },
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both ranks of one torchrun got, for all cases."""
    return on_ranks(2, CASES, tmp_path_factory.mktemp("two"))


def check_group(results: list[dict], ranks: int) -> None:
    lists = [list(range(n)) for n in range(8)]
    for rank, result in enumerate(results):
        assert result["place"] == (rank, ranks)
        assert result["round_trips"] == lists, f"rank {rank}: {result['round_trips']} and {lists}"
        assert result["mine"] == [x[rank::ranks] for x in lists]
        own = [[i] for i in range(2 * rank)]
        assert result["in_step"] == own + [[]] * (2 * (ranks - 1) - len(own)), result["in_step"]


def test_two_ranks_share_out_and_get_back_lists_of_any_length_and_stay_in_step(two):
    check_group(two["group"], 2)


@pytest.mark.full
def test_three_ranks_share_out_and_get_back_lists_of_any_length_and_stay_in_step(tmp_path):
    check_group(on_ranks(3, {"group": CASES["group"]}, tmp_path)["group"], 3)


def same_update(got: dict, expected: dict, tol: float = 1e-5) -> None:
    assert_same(got["stats"], expected["stats"], tol=tol, rel=1e-6)
    assert_same(got["change"], expected["change"], tol=tol)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_have_the_loss_and_gradient_of_one_process(two, model, spread):
    plain = dist_worker.update(LENGTHS, model)
    ranks = two[f"{model} {spread}"]
    # the case is a hard one: the ranks have different numbers of sequences and of micro-batches,
    # every term is there
    assert (
        ranks[0]["sequences"] != ranks[1]["sequences"]
        and ranks[0]["batches"] != ranks[1]["batches"]
    ), [r["batches"] for r in ranks]
    stats = plain["stats"]
    assert (
        stats["tokens"] == sum(LENGTHS) and stats["kl"] > 0.1 and 0.1 < stats["clip_fraction"] < 0.9
    ), stats
    # 100 times the tolerance, in every tensor
    assert all(change.abs().max() > 1e-3 for change in plain["change"].values())
    for rank in ranks:
        same_update(rank, plain)


@pytest.mark.parametrize("spread", SPREADS)
def test_a_group_of_one_has_the_loss_and_gradient_of_a_plain_process(spread):
    plain = dist_worker.update(LENGTHS)
    with group_of_one():
        same_update(dist_worker.update(LENGTHS, **SPREADS[spread]), plain)
    assert dist.world() == 1


def test_what_the_switches_say_really_happens(two):
    """Equal gradients alone do not prove that anything was spread out, or computed twice."""
    whole = two["qwen2 ddp"][0]["held"]
    for spread, parts in (("ddp", 1), ("fsdp", 2), ("fsdp+offload", 2)):
        held = [rank["held"] for rank in two[f"qwen2 {spread}"]]
        assert sum(held) == 2 * whole / parts and max(held) <= 0.6 * 2 * whole / parts, (
            f"{spread}: {held} of {whole} weights"
        )
    # forward passes of a layer inside: those of the ranks in step; with checkpointing twice
    for parallel in BOTH:
        batches = max(rank["batches"][0] for rank in two[f"qwen2 {parallel}"])
        for rank, again in zip(two[f"qwen2 {parallel}"], two[f"qwen2 {parallel}+checkpointing"]):
            assert (len(rank["passes"]), len(again["passes"])) == (batches, 2 * batches)


@pytest.mark.parametrize("spread", BOTH)
def test_a_rank_without_any_sequence_keeps_in_step(two, spread):
    ranks = two[f"one sequence {spread}"]
    assert sorted(rank["sequences"] for rank in ranks) == [[0], [1]]
    for rank in ranks:
        same_update(rank, dist_worker.update(**UPDATES["one sequence"]))


@pytest.mark.parametrize("spread", BOTH)
def test_the_gradient_is_clipped_by_its_norm_over_all_ranks(two, spread):
    plain = dist_worker.update(**UPDATES["clipped"])
    for rank in two[f"clipped {spread}"]:
        same_update(rank, plain, tol=1e-6)
        norm = torch.cat([change.flatten() for change in rank["change"].values()]).norm().item()
        assert norm == pytest.approx(0.01, rel=1e-3), (
            f"the weights moved by {norm}, the clip is 0.01"
        )


@pytest.mark.parametrize("spread", BOTH)
def test_weights_agree_after_three_adamw_updates(two, spread):
    """A looser tolerance: AdamW divides each entry's gradient by its own size, so where that is
    about as large as the rounding error it takes a full step of lr in a random direction. (Without
    biases, whose gradient is almost nothing else for keys.) Weights move by up to 3 lr."""
    plain = dist_worker.update(**UPDATES["three updates"])
    assert (
        plain["stats"]["updates"] == 3
        and max(change.max() for change in plain["change"].values()) > 0.002
    )
    for rank in two[f"three updates {spread}"]:
        assert len(rank["batches"]) == 3
        assert_same(rank["stats"], plain["stats"], rel=1e-4)
        assert_same(rank["change"], plain["change"], tol=5e-5)


@pytest.mark.parametrize("spread", BOTH)
@pytest.mark.parametrize("poison", ("nan", "inf"))
def test_a_bad_number_on_one_rank_skips_the_update_on_all(two, poison, spread):
    ranks = two[f"{poison} {spread}"]
    assert Counter(rank["poisoned"] for rank in ranks) == {True: 1, False: 1}
    for rank in ranks:
        assert (
            rank["stats"]["updates"],
            rank["stats"]["skipped_updates"],
            rank["stats"]["tokens"],
        ) == (1, 1, 0), rank["stats"]
        assert all(change.eq(0).all() for change in rank["change"].values()), (
            "weights moved in an update that was skipped"
        )


@pytest.mark.parametrize("spread", BOTH)
def test_updates_after_a_skipped_one_are_those_of_one_process(two, spread):
    plain = dist_worker.update(**UPDATES["nan in one of three"])
    assert (plain["stats"]["updates"], plain["stats"]["skipped_updates"]) == (3, 1)
    for rank in two[f"nan in one of three {spread}"]:
        # later gradients are taken at weights that have moved far
        same_update(rank, plain, tol=1e-4)


@pytest.mark.parametrize("spread", [s for s in SPREADS if s != "fsdp+offload"])
def test_two_ranks_with_packed_rows_have_the_gradient_of_one_process_without(two, spread):
    """The same sequences, whole, one row each. Both ranks have packed rows and others."""
    plain = dist_worker.update(PACKED["lengths"], shared=True)
    ranks = two[f"packed {spread}"]
    rows = [(rank["packed"][0], rank["sequences"][0]) for rank in ranks]
    assert all(packed for packed, _ in rows) and sum(n for _, n in rows) == 10, rows
    for rank in ranks:
        same_update(rank, plain)


def test_packed_rows_in_bf16_have_about_the_gradient_of_fp32_without(two):
    plain = dist_worker.update(PACKED["lengths"], sign=1, shared=True)
    gradient = torch.cat([change.flatten() for change in plain["change"].values()])
    for rank in two["packed bf16"]:
        assert sum(rank["packed"]) and set(rank["passes"]) == {torch.bfloat16}
        moved = torch.cat([change.flatten() for change in rank["change"].values()])
        assert torch.cosine_similarity(moved, gradient, dim=0) > 0.99


def test_a_rank_without_any_packed_row_keeps_in_step(two):
    ranks = two["packed one family ddp"]
    assert sorted(rank["sequences"] for rank in ranks) == [[1], [2]] or sorted(
        rank["sequences"] for rank in ranks
    ) == [[0], [3]]
    for rank in ranks:
        same_update(rank, dist_worker.update([9, 12, 11], shared=True))


def test_bf16_computes_in_bf16_and_keeps_weights_gradients_and_moments_in_fp32(two):
    plain = dist_worker.update(LENGTHS, sign=1)
    with group_of_one():
        alone = dist_worker.update(**BF16)
    gradient = torch.cat([change.flatten() for change in plain["change"].values()])
    for name, result in [
        ("1 rank", alone),
        *(("2 ranks", rank) for rank in two["bf16"] + two["bf16+checkpointing"]),
        ("autocast", dist_worker.update(**BF16 | dict(parallel="ddp"))),
        *(("2 ranks, autocast", rank) for rank in two["bf16 autocast"]),
    ]:
        assert set(result["passes"]) == {torch.bfloat16} and result["kept"] == {torch.float32}, (
            name,
            result["passes"],
        )
        for key in ("loss", "policy_loss", "grad_norm"):
            got, expected = result["stats"][key], plain["stats"][key]
            assert abs(got - expected) < 0.02 * abs(expected), (
                f"{name}: {key} {got} in bf16, {expected} in fp32"
            )
        moved = torch.cat([change.flatten() for change in result["change"].values()])
        # the weights really moved, and the right way
        assert torch.cosine_similarity(moved, gradient, dim=0) > 0.99
        assert (moved - gradient).abs().max() > 0, "bf16 gave exactly the gradient of fp32"
    for rank in two["bf16 adam"]:
        assert rank["kept"] == {torch.float32}  # moments included
        step = torch.cat([change.flatten() for change in rank["change"].values()]).abs()
        # AdamW's first step is lr for every entry with a gradient. It would be lost on bf16
        # weights, of which the next neighbour of 0.3 is 0.002 away.
        assert 0.9e-3 < step.median() < 1.1e-3, f"median step {step.median()}, learning rate 0.001"


@pytest.mark.parametrize("spread", BOTH)
@pytest.mark.parametrize("at", (0, 1, None))
def test_scores_do_not_depend_on_who_has_the_sequences(two, at, spread):
    """at: the rank that has all three sequences, against none on the other; None: two and one."""
    plain = dist_worker.scores("qwen2_tied", [40, 12, 9], at=0)
    ranks = two[f"scores {at} {spread}"]
    assert [len(rank) for rank in ranks] == {0: [3, 0], 1: [0, 3], None: [2, 1]}[at]
    got = [ranks[0][0], ranks[1][0], ranks[0][1]] if at is None else ranks[at]
    assert_same(got, plain, tol=1e-5)
    assert all(
        len(s["fci"]) == 6 and max(s["fci"]) > 0.01 and min(s["entropies"]) > 0.1 for s in plain
    )


def test_an_engine_that_missed_a_sync_stops_all_ranks_and_not_only_its_own(two):
    """A rank that left alone would leave the others waiting for it."""
    assert two["gap in step"] == ["0.00000"] * 2
    first, second = two["gap of rank 1"]
    assert first == second and first.startswith(
        "engine and learner disagree after the weight sync: over 8 tokens"
    ), first


def test_cast_rounds_weights_and_not_rotary_frequencies():
    """They are no parameters and not in the state dict: an engine's copy that rounds them keeps
    another position encoding."""
    model = dist_worker.model_of("qwen2")
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert any(name.endswith("inv_freq") for name in before)
    dist.cast(model, "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(
        value.dtype == torch.float32 and value.equal(before[name])
        for name, value in model.named_buffers()
    )
    assert not all(value.bfloat16().float().equal(value) for value in before.values()), (
        "rounding would not show in this model"
    )


# --------------------------------------------------------------------------------------------------
# Whole runs on the toy
# --------------------------------------------------------------------------------------------------
# An odd number of problems; all samples logged; several updates a step; a batch size that follows
# Eq. 10 at once; a seed for which it matters to the filter that all ranks' problems are in its mean
# (asserted below)
RUN = typed(
    "--preset toy --steps 3 --batch_size 5 --group_size 3 --eval_every 0 --eval_samples 1"
    " --test_problems toy:8:3:2 --problems toy:8:200:1 --kl_coef 0.001 --seed 6"
    " --log_samples 100 --batch_lam 0.2 --mini_batch 20"
)


def alone(folder: Path, *options) -> Path:
    """A run in this process."""
    return train(parse_config([str(option) for option in (*RUN, *options, "--out", folder)]))


def together(folder: Path, *options, ranks: int = 2) -> Path:
    torchrun(ranks, "attnrl.py", *RUN, *options, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = alone(tmp_path_factory.mktemp("alone") / "run")
    steps = metrics(folder)[1:]
    # what the ranks must agree about really happens in this run
    assert len({m["problems"] for m in steps}) > 1, "the batch size did not adapt"
    assert all(m["train/updates"] >= 2 for m in steps) and steps[-1]["train/kl"] > 0
    assert filters_alone_would_differ(folder), "choose another seed"
    return folder


def filters_alone_would_differ(folder: Path) -> bool:
    """Whether two ranks whose filters knew their own problems only would expand others than this
    run did."""
    for rank in (0, 1):
        easy = EasyFilter()
        for step in (1, 2, 3):
            own = [s for s in lines(folder / "samples.jsonl") if s["step"] == step][rank::2]
            rates = [solve_rate([r["reward"] for r in s["responses"]]) for s in own]
            fcis = [problem_fci([r["fci"] for r in s["responses"]]) for s in own]
            if easy.keep(rates, fcis) != [not s["filtered"] for s in own]:
                return True
    return False


@pytest.mark.full
def test_a_run_on_two_ranks_is_the_run_of_one_process(one_process, tmp_path):
    same_run(together(tmp_path / "run"), one_process)


def test_a_run_on_two_ranks_with_fsdp_is_the_run_of_one_process(one_process, tmp_path):
    same_run(
        together(tmp_path / "run", "--parallel", "fsdp", "--activation_checkpointing", "true"),
        one_process,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "parallel, options",
    [
        ("ddp", ["--one_step_off_policy", "false", "--branch", "entropy"]),
        ("fsdp", ["--one_step_off_policy", "false"]),
        ("fsdp", ["--branch", "entropy"]),
        ("ddp", ["--advantage", "grpo", "--grpo_samples", 8]),
    ],
)
def test_other_methods_on_two_ranks_are_those_of_one_process(tmp_path, parallel, options):
    options = ["--steps", 2, *options]
    same_run(
        together(tmp_path / "two", *options, "--parallel", parallel),
        alone(tmp_path / "one", *options),
    )


@pytest.mark.full
def test_a_rank_without_any_problem_takes_part(tmp_path):
    """2 problems to train and 2 to test on 3 ranks: the last has nothing to sample, score or
    grade."""
    options = typed("--steps 2 --batch_size 2 --batch_range 1 --test_problems toy:8:2:2")
    expected = alone(tmp_path / "one", *options)
    same_run(together(tmp_path / "ddp", *options, ranks=3), expected)
    same_run(together(tmp_path / "fsdp", *options, "--parallel", "fsdp", ranks=3), expected)


# --------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------
def endless(tmp_path: Path, *options) -> list:
    """A run that does not end by itself, saves after every step, and has grading workers (for the
    golds that are no numbers)."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(
            json.dumps({"problem": text, "answer": [answer, r"x+\frac{y}{2}"]}) + "\n"
            for text, answer in toy_set("toy:8:50:1")
        )
    )
    return [
        "attnrl.py",
        *RUN,
        "--steps",
        10000,
        "--problems",
        problems,
        "--prompt_suffix",
        "",
        *typed("--save_every 1 --batch_size 2 --log_samples 1"),
        *options,
        "--out",
        tmp_path / "run",
    ]


def ended(run: Launched, since: float) -> float:
    """Wait for the end of a torchrun that lost a rank; the seconds it took. All of its processes
    must be gone."""
    code = run.wait(LIMIT)
    seconds = time.monotonic() - since
    assert code != 0, f"exit code {code} after a rank died"
    end = time.monotonic() + 5  # grading workers end with their input
    while run.processes() and time.monotonic() < end:
        time.sleep(0.1)
    left = run.processes()
    assert not left, f"processes {left} survive, expected none"
    return seconds


def check_folder(folder: Path) -> None:
    """What was written before the fault is whole."""
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    records = [json.loads(line) for line in text.splitlines()]
    assert [m["step"] for m in records] == list(range(len(records)))
    assert AutoModelForCausalLM.from_pretrained(folder / "last").num_parameters() > 0


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_killing_a_rank_ends_the_run_and_leaves_whole_files(tmp_path, parallel, record_property):
    with Launched(*one_node(2), *endless(tmp_path, "--parallel", parallel)) as run:
        run.wait_until(lambda: steps_done(tmp_path / "run") >= 1, "step 1")
        assert run.processes("--grading-worker"), "no grading workers: their end is not tested"
        started = time.monotonic()
        os.kill(run.rank(1), signal.SIGKILL)
        seconds = ended(run, started)
        record_property("seconds", seconds)
        print(f"kill -9 of rank 1, {parallel}: torchrun ended after {seconds:.1f} s")
        check_folder(tmp_path / "run")


FAILING_REWARD = """
import os, sys
from eval import grade
calls = 0

def bug(*_):
    raise RuntimeError("a bug that only this rank has")

def reward(response, answers):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 20 and os.path.exists(r"SAVED"):
        BREAK
    return grade(response, answers)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    "parallel, breaks, says",
    [
        *(
            (
                parallel,
                'sys.modules["__main__"].plan = bug',
                "RuntimeError: a bug that only this rank has",
            )
            for parallel in BOTH
        ),
        (
            "ddp",
            'return float("nan")',
            "attnrl.py: --reward breaking:reward: returned nan; it must return a finite number",
        ),
        (
            "ddp",
            'raise ValueError("x")',
            "attnrl.py: --reward breaking:reward: raised ValueError in ",
        ),
    ],
    ids=["bug-ddp", "bug-fsdp", "bad input-ddp", "broken reward-ddp"],
)
def test_an_error_on_one_rank_is_shown_and_ends_the_run(
    tmp_path, parallel, breaks, says, record_property
):
    """A bug, with its traceback, or bad input that only this rank has met, with its one line."""
    saved = tmp_path / "run" / "last"  # not before there is something on the disk
    (tmp_path / "breaking.py").write_text(
        FAILING_REWARD.replace("BREAK", breaks).replace("SAVED", str(saved))
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Launched(
        *one_node(2),
        *endless(tmp_path, "--parallel", parallel, "--reward", "breaking:reward"),
        env={"PYTHONPATH": path},
    ) as run:
        run.wait_until(lambda: says in run.stderr(), f"the message {says!r}")
        seconds = ended(run, time.monotonic())
        record_property("seconds", seconds)
        print(f"error on rank 1, {parallel}: torchrun ended {seconds:.1f} s after its message")
        assert run.stderr().count(says) == 1 and (r'breaking.py", line' in run.stderr()) == (
            "bug" in breaks
        ), run.stderr()
        check_folder(tmp_path / "run")


@pytest.mark.full
def test_bad_input_is_one_clear_line_once(tmp_path):
    """All ranks find it; one says it. Then torchrun adds its own report."""
    with Launched(
        *one_node(2), "attnrl.py", *RUN, "--problems", "nowhere.jsonl", "--out", tmp_path / "run"
    ) as run:
        ended(run, time.monotonic())
        message = "attnrl.py: nowhere.jsonl: no such problem file"
        assert run.stderr().count(message) == 1, (
            f"{run.stderr().count(message)} times, expected once:\n{run.stderr()}"
        )
        # torchrun's own
        assert run.stderr().count("Traceback") <= 1 and 'attnrl.py", line' not in run.stderr(), (
            run.stderr()
        )
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Two nodes: a torchrun on each
# --------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node(endpoint: str, *more) -> list:
    return [
        *typed("--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d"),
        "--rdzv_endpoint",
        endpoint,
        "--rdzv_id",
        "x",
        *more,
    ]


def both_end_well(*nodes: Launched) -> None:
    for run in nodes:
        code = run.wait(180)
        assert code == 0, f"exit code {code}, expected 0\n{run.stdout()}\n{run.stderr()}"


@pytest.mark.full
def test_a_run_on_two_nodes_is_the_run_of_one_process(one_process, tmp_path):
    """Both on this machine, over the loopback device."""
    command = [
        *node(f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"),
        "attnrl.py",
        *RUN,
        "--out",
        tmp_path / "run",
    ]
    with Launched(*command) as first, Launched(*command) as second:
        both_end_well(first, second)
    same_run(tmp_path / "run", one_process)


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_the_worker_of_one_node_ends_both(tmp_path, victim, record_property):
    """The node that loses its worker is the one that holds the rendezvous, or the other one."""
    command = [*node(f"127.0.0.1:{free_port()}", "--local_addr", "127.0.0.1"), *endless(tmp_path)]
    with Launched(*command) as first:
        time.sleep(1)  # torchrun sorts nodes by address and process id: the first is node 0
        with Launched(*command) as second:
            nodes = first, second
            first.wait_until(lambda: steps_done(tmp_path / "run") >= 1, "step 1")
            started = time.monotonic()
            os.kill(nodes[victim].rank(victim), signal.SIGKILL)
            for name, run in (("own", nodes[victim]), ("other", nodes[1 - victim])):
                seconds = ended(run, started)
                record_property(f"seconds of its {name} node", seconds)
                print(
                    f"kill -9 of the worker of node {victim}: torchrun of its {name} node ended"
                    f" after {seconds:.1f} s"
                )
    check_folder(tmp_path / "run")


@contextmanager
def two_machines(folder: Path, names: bool):
    """Two network namespaces joined by a cable; the command prefixes that run something on each.
    names: each has a host name that the other one resolves, as on a cluster; else both still think
    that they are this machine, at 127.0.0.1."""
    made = [f"attnrl-{uuid.uuid4().hex[:6]}" for _ in range(2)]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")

    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("no network namespaces here: ip and unshare are not installed")
    try:
        for name in made:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable0",
            "netns",
            made[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable0",
            "netns",
            made[1],
        )
        for i, name in enumerate(made, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable0")
            for device in ("cable0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node-1\n10.77.0.2 node-2\n")
        own = [
            "unshare",
            "--mount",
            "--uts",
            "sh",
            "-c",
            f'hostname $0 && mount --bind {hosts} /etc/hosts && exec "$@"',
        ]
        yield [
            ["ip", "netns", "exec", name, *([*own, f"node-{i}"] if names else [])]
            for i, name in enumerate(made, 1)
        ]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.full
def test_a_run_on_two_machines_with_the_readmes_command_is_the_run_of_one_process(
    one_process, tmp_path
):
    with two_machines(tmp_path, names=True) as prefixes:
        command = [*node("node-1:29500"), "attnrl.py", *RUN, "--out", tmp_path / "run"]
        with (
            Launched(*command, prefix=prefixes[0]) as first,
            Launched(*command, prefix=prefixes[1]) as second,
        ):
            both_end_well(first, second)
    same_run(tmp_path / "run", one_process)


@pytest.mark.full
def test_machines_whose_names_do_not_resolve_need_addresses_and_an_interface(tmp_path):
    """What to add to the command where a host name leads nowhere or to 127.0.0.1 (containers)."""
    with two_machines(tmp_path, names=False) as prefixes:
        nodes = []
        for i, prefix in enumerate(prefixes, 1):
            where = ["--local_addr", f"10.77.0.{i}", "--rdzv_conf", f"is_host={int(i == 1)}"]
            command = [
                *node("10.77.0.1:29500", *where),
                "tests/dist_worker.py",
                tmp_path / "results",
                json.dumps({"group": CASES["group"]}),
            ]
            nodes.append(Launched(*command, prefix=prefix, env={"GLOO_SOCKET_IFNAME": "cable0"}))
        with nodes[0], nodes[1]:
            both_end_well(*nodes)
    check_group(torch.load(tmp_path / "results", weights_only=False)["group"], 2)
