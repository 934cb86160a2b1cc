"""test_checkpoint.py: a run that was stopped, killed or out of disk space ends as if nothing had
happened. Real runs, real signals, real full disks.

    python -m pytest tests/runtime/test_checkpoint.py -m "not full"

Without the last option also 50 x kill -9, FSDP, other numbers of ranks.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fixtures import ROOT, TOY_MODEL, lines, typed
from launch import Launched, one_node, run, steps_done
from toy_runs import (
    RUN,
    SEED,
    assert_same,
    config_of,
    cut,
    identical,
    metrics,
    resume,
    same_checkpoint,
    same_run,
    state_of,
    together,
    train,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnrl
from attnrl import parse_config
from runtime import checkpoint
from runtime.cli import UserError, stop_on_user_error
from runtime.monitor import Display
from runtime.stream import ProblemStream
from toy.programs import toy_set

MODES = {"off-policy": [], "synchronous": ["--one_step_off_policy", "false"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(config_of(tmp_path_factory.mktemp("whole") / "run"))


# --------------------------------------------------------------------------------------------------
# N + N = 2 N
# --------------------------------------------------------------------------------------------------
def test_the_run_has_all_that_a_checkpoint_must_carry(whole):
    steps = metrics(whole)[1:]
    assert len({m["problems"] for m in steps}) > 1, "the batch size did not adapt"
    assert all(m["train/updates"] >= 2 for m in steps) and steps[-1]["train/kl"] > 0
    assert any(m["filtered_ratio"] > 0 for m in steps), (
        "the filter did nothing: choose another seed"
    )
    assert state_of(whole / "last")["stream"][0] == 1, "no second epoch"
    assert state_of(whole / "step-000002")["groups"] and state_of(whole / "last")["groups"] is None


@pytest.mark.parametrize(
    "mode, step",
    [
        *(pytest.param("off-policy", step, marks=pytest.mark.full) for step in (1, 2, 3)),
        ("synchronous", 1),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(mode, step, whole, tmp_path):
    options = MODES[mode]
    if options:
        options = [*options, "--steps", 2]
        whole = train(config_of(tmp_path / "whole", *options))
    identical(resume(cut(whole, step, tmp_path / "run"), *options), whole)


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        typed("--method grpo --grpo_samples 6 --ads_batch true"),  # RUN's --batch_lam needs it
        typed("--method prl --grpo_samples 6 --ads_batch true"),
        ["--behaviour", "engine"],
        ["--tis_cap", 2],
        ["--branch", "entropy", "--lr_schedule", "cosine", "--warmup_steps", 2],
        ["--parallel", "fsdp"],
    ],
)
def test_other_methods_resume_bit_for_bit(options, tmp_path):
    try:
        whole = train(config_of(tmp_path / "whole", *options))
        identical(resume(cut(whole, 2, tmp_path / "run"), *options), whole)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_stopping_after_every_step_changes_nothing(whole, tmp_path):
    """Also without any checkpoint yet: --resume auto is how a run is started."""
    for step in (1, 2, 3, 4):
        resume(tmp_path / "run", stop=lambda: True)
        assert (tmp_path / "run" / "last").readlink() == Path(f"step-{step:06}")
    identical(tmp_path / "run", whole)
    totals = [m["seconds/total"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert totals[0] == 0 and all(a < b for a, b in zip(totals, totals[1:])), (
        "the clock of a resumed run starts anew"
    )


def other_logprobs(state):
    for group in state["groups"]:
        for response in group["responses"]:
            response["logprobs"] = [x - 0.01 for x in response["logprobs"]]


CHANGES = {
    "moments": lambda state: [
        m.mul_(0.5) for name, m in state["moments"].items() if name.endswith("exp_avg")
    ],
    "AdamW's count of steps": lambda state: [
        m.fill_(1) for name, m in state["moments"].items() if name.endswith("/step")
    ],
    "behaviour log-probs": other_logprobs,
    "branch points": lambda state: [
        response["branch_points"].clear() for response in state["groups"][0]["responses"]
    ],
    "groups": lambda state: state["groups"].pop(),
    "filter": lambda state: state.update(easy_filter={"count": 1, "total": 9.0}),
    "batch size": lambda state: state.update(batch_size=state["batch_size"] - 1),
    "stream": lambda state: state.update(stream=[0, 0]),
    "tokens": lambda state: state.update(generated_tokens=0),
    "best": lambda state: state.update(best=[2.0, 1]),
}


@pytest.mark.parametrize(
    "name",
    [
        (
            name
            if name in ("moments", "behaviour log-probs", "branch points")
            else pytest.param(name, marks=pytest.mark.full)
        )
        for name in CHANGES
    ],
)
def test_nothing_in_a_checkpoint_is_for_nothing(name, whole, tmp_path):
    """Every part of training.pt, the in-flight half of the pipeline above all, matters: the tests
    above could fail."""
    run = cut(whole, 2, tmp_path / "run")
    state = state_of(run / "last")
    CHANGES[name](state)
    torch.save(state, run / "step-000002" / "training.pt")
    resume(run, stop=lambda: True)
    with pytest.raises(AssertionError):
        same_checkpoint(run / "step-000003", whole / "step-000003")


def test_sampling_the_in_flight_half_anew_is_another_run(whole, tmp_path, monkeypatch):
    """What a checkpoint without it would come to: responses of the resumed policy, which is one
    update newer."""
    real = checkpoint.restore

    def anew(path, run, group_type):
        step, best, saved = real(path, run, group_type)
        filter_ = dict(vars(run.easy_filter))
        groups = [attnrl.Group(g.index, g.number, g.problem) for g in saved]
        attnrl.sample(run, None, attnrl.Batch(step + 1, groups))
        vars(run.easy_filter).update(filter_)
        run.monitor.generated_tokens = state_of(path)["generated_tokens"]
        return step, best, groups

    run = cut(whole, 2, tmp_path / "run")
    monkeypatch.setattr(checkpoint, "restore", anew)
    resume(run, stop=lambda: True)
    got, expected = (
        (folder / "step-000003" / "model.safetensors").read_bytes() for folder in (run, whole)
    )
    assert got != expected


def test_a_checkpoint_of_version_1_goes_on(whole, tmp_path):
    """There branch points stood on the group, only their number of responses that were cut off, and
    the default reward was called eval:grade."""
    run = cut(whole, 2, tmp_path / "run")
    folder = run / "step-000002"
    state, settings = state_of(folder), json.loads((folder / "run.json").read_text())
    for group in state["groups"]:
        points = [response.pop("branch_points") for response in group["responses"]]
        group["branch_points"] = {i: at for i, at in enumerate(points) if at}
        group["cut"] = sum(not response.pop("finished") for response in group["responses"])
    assert any(group["branch_points"] for group in state["groups"])
    settings["config"]["reward"] = "eval:grade"
    torch.save(state, folder / "training.pt")
    (folder / "run.json").write_text(json.dumps(settings))
    assert checkpoint.setting_of(folder, "reward") == "boxed"  # eval.py asks
    resume(run, stop=lambda: True)
    same_checkpoint(run / "step-000003", whole / "step-000003")


# --------------------------------------------------------------------------------------------------
# Several ranks
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, step",
    [
        pytest.param(["--steps", 3], 2, marks=pytest.mark.full),
        *(
            pytest.param(["--parallel", parallel, *mode], step, marks=pytest.mark.full)
            for parallel in ("ddp", "fsdp")
            for mode, step in ((MODES["off-policy"], 1), (MODES["synchronous"], 3))
        ),
    ],
)
def test_two_ranks_resume_bit_for_bit(options, step, tmp_path):
    whole = together(tmp_path / "whole", *options)
    identical(together(cut(whole, step, tmp_path / "run"), *options, "--resume", "auto"), whole)


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_ranks(parallel, whole, tmp_path):
    """Equal up to the rounding of sums in another order. First 1 -> 2 -> 1, then a run of 2 that is
    continued by 1."""
    options = ["--parallel", parallel, "--resume_changed", "true"]
    run = cut(whole, 1, tmp_path / "grows")
    together(run, *options, "--resume", "auto")
    same_run(run, whole)
    run = cut(together(tmp_path / "two", *options), 2, tmp_path / "shrinks")
    same_run(resume(run, "--resume_changed", "true"), whole)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------
def types_in(value) -> set:
    if isinstance(value, dict):
        return {dict}.union(*(types_in(x) for x in (*value, *value.values())))
    return {list}.union(*map(types_in, value)) if isinstance(value, list) else {type(value)}


def test_a_checkpoint_is_a_model_and_plain_data(whole):
    assert len(checkpoint.checkpoints(whole)) == 5
    for folder in checkpoint.checkpoints(whole):
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert (
            not loading["missing_keys"]
            and not loading["unexpected_keys"]
            and {p.dtype for p in model.parameters()} == {torch.float32}
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (
            tokenizer("(3+4)")["input_ids"]
            == AutoTokenizer.from_pretrained(TOY_MODEL)("(3+4)")["input_ids"]
        )
    allowed = {dict, list, str, int, float, bool, type(None), torch.Tensor}
    for folder in checkpoint.checkpoints(whole):
        assert types_in(state_of(folder)) <= allowed, types_in(state_of(folder)) - allowed
        json.loads((folder / "run.json").read_text())
    assert not list(whole.glob(".*")), "left-overs of a run that ended well"


def test_links_lead_to_whole_folders_and_only_as_many_checkpoints_are_kept(whole, tmp_path):
    run = resume(cut(whole, 2, tmp_path / "run"), "--keep", 1)
    tested = {m["step"]: m["test_accuracy"] for m in metrics(run) if "test_accuracy" in m}
    best = max(step for step in tested if tested[step] == max(tested.values()))
    assert [folder.name for folder in checkpoint.checkpoints(run)] == [
        f"step-{step:06}" for step in sorted({best, 4})
    ]
    assert (run / "last").readlink() == Path("step-000004") and (run / "best").readlink() == Path(
        f"step-{best:06}"
    )
    assert not list(run.glob(".*")), "half a checkpoint of the killed run"
    shutil.move(run, tmp_path / "moved")  # relative links
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "last").num_parameters() > 0


def test_the_best_checkpoint_outlives_the_newest_and_a_removed_one_is_found_anew(whole, tmp_path):
    run = cut(whole, 2, tmp_path / "run")
    for state, path in ((state_of(path), path) for path in checkpoint.checkpoints(run)):
        torch.save(state | {"best": [2.0, 1]}, path / "training.pt")
    resume(run, "--keep", 1)  # no later step can be better than 2.0
    assert [folder.name for folder in checkpoint.checkpoints(run)] == ["step-000001", "step-000004"]
    assert (run / "best").readlink() == Path("step-000001")
    shutil.rmtree(run / "step-000001")  # what a person does
    resume(run, "--steps", 5, "--resume_changed", "true", "--eval_every", 1)
    assert (run / "best").readlink() == Path("step-000005") and (
        run / "best" / "config.json"
    ).exists()


def test_what_is_no_checkpoint_is_not_taken_for_one(whole, tmp_path):
    run = cut(whole, 2, tmp_path / "run")
    for name in (".step-000009.new", "steps", "step-new", "step-000009.bak"):
        (run / name).mkdir()
    assert [folder.name for folder in checkpoint.checkpoints(run)] == [
        "step-000000",
        "step-000001",
        "step-000002",
    ]


FILE_EVENTS = ("open", "os.", "shutil.", "pathlib.")


def test_death_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(whole, tmp_path):
    """A forked copy of this process saves and leaves, without cleaning up, at its n-th file
    operation, for every n."""
    run = cut(whole, 2, tmp_path / "run")
    going_on = attnrl.setup(config_of(run, "--resume", "auto"), Display(4))
    checkpoint.restore(going_on.checkpoint, going_on, attnrl.Group)
    saved = state_of(run / "step-000002")
    names = {path.name for path in (run / "step-000002").iterdir()}
    newest = []
    for n in range(1, 10000):
        child = os.fork()
        if child == 0:
            left = [n]

            def count(event, _):
                if event.startswith(FILE_EVENTS):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)

            sys.addaudithook(count)
            try:
                checkpoint.save(run, 3, going_on, None, (0.5, 1), keep=1)
            except BaseException:
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), f"saving failed with exit code {code} before operation {n}"
        for folder in (checkpoint.checkpoints(run)[-1], run / "last", run / "best"):
            assert {path.name for path in folder.iterdir()} == names, (
                f"{folder.name} is not whole after death at operation {n}"
            )
        newest.append(checkpoint.checkpoints(run)[-1].name)
        if (run / "last").readlink() == Path("step-000002"):
            assert_same(state_of(run / "last"), saved)
        else:
            assert_same(state_of(run / "step-000003")["moments"], saved["moments"])
        if code == 0:
            break
        # back to the moment before, so that the next one has the same way
        if newest[-1] == "step-000003":
            shutil.rmtree(run)
            cut(whole, 2, run)
            checkpoint.link_and_drop(run, 2, 1, keep=9)
    print(
        f"{n - 1} file operations, {newest.count('step-000003')} of them after the new one was"
        " there"
    )
    assert (
        code == 0
        and n > 30
        and newest.count("step-000002") > 20
        and newest.count("step-000003") > 5
    )
    assert [folder.name for folder in checkpoint.checkpoints(run)] == [
        "step-000001",
        "step-000003",
    ] and not list(run.glob(".*"))


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(1_000_000, id="model", marks=pytest.mark.full),
        pytest.param(3_000_000, id="training.pt"),
    ],
)
def test_a_file_that_cannot_be_written_ends_the_run_and_the_old_checkpoint_stays(
    limit, whole, tmp_path
):
    """A limit on the size of files: writing fails in the middle of one, for real."""
    run = cut(whole, 2, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            UserError, match="run/step-000003: cannot be written .*; older checkpoints are complete"
        ):
            resume(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [folder.name for folder in checkpoint.checkpoints(run)] == [
        "step-000000",
        "step-000001",
        "step-000002",
    ]
    for name in ("last", "step-000001", "step-000002"):
        same_checkpoint(run / name, whole / ("step-000002" if name == "last" else name))
    identical(resume(run), whole)


FULL_DISK = """
mount -t tmpfs -o size={size}k none {disk} || exit 99
{python} attnrl.py {run} --out {disk}/run --resume auto > {log}/out1 2> {log}/err1
echo $? > {log}/code1
ls -A {disk}/run > {log}/left; readlink {disk}/run/last > {log}/last; cp -a {disk}/run {log}/full
mount -o remount,size=1g {disk} || exit 99
{python} attnrl.py {run} --out {disk}/run --resume auto > {log}/out2 2> {log}/err2
echo $? > {log}/code2
cp -a {disk}/run {log}/run
"""


@pytest.mark.full
@pytest.mark.parametrize("size", [3_000, 9_000, 12_000, 16_500, 19_000, 20_000])
def test_a_full_disk_ends_the_run_and_with_space_it_goes_on(size, whole, tmp_path):
    """A tiny tmpfs of the test's own: ENOSPC, somewhere in a save or in the logs."""
    (tmp_path / "disk").mkdir()
    script = FULL_DISK.format(
        size=size,
        disk=tmp_path / "disk",
        python=sys.executable,
        log=tmp_path,
        run=" ".join(map(str, (*RUN, *SEED))),
    )
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # as here: the same rounding
    if done.returncode == 99:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr}")
    code1, code2, error = (
        (tmp_path / name).read_text().strip() for name in ("code1", "code2", "err1")
    )
    print(
        f"{size} KiB: exit code {code1}, last: {(tmp_path / 'last').read_text().strip()},"
        f" {error.splitlines()[-1]}"
    )
    assert (
        code1 == "2"
        and re.search("cannot be (written|made a folder) ", error.splitlines()[-1])
        and "Traceback" not in error
    ), error
    for folder in checkpoint.checkpoints(tmp_path / "full"):
        same_checkpoint(folder, whole / folder.name)
    assert code2 == "0", (tmp_path / "err2").read_text()
    identical(tmp_path / "run", whole)


# --------------------------------------------------------------------------------------------------
# Signals, kill -9
# --------------------------------------------------------------------------------------------------
def alone(*arguments) -> Launched:
    """attnrl.py in the background, without torchrun but with the same handles: a shell drops "-m
    torch.distributed.run"."""
    return Launched(
        *arguments, prefix=["sh", "-c", 'python=$1; shift 3; exec "$python" attnrl.py "$@"', "sh"]
    )


def check_newest(folder: Path) -> int:
    """The newest checkpoint's step; it must load, and be where `last` leads."""
    newest = checkpoint.checkpoints(folder)[-1]
    assert (folder / "last").exists() and set(state_of(newest)) >= {"moments", "groups"}
    assert AutoModelForCausalLM.from_pretrained(newest).num_parameters() > 0
    return int(newest.name.removeprefix("step-"))


LONG = [*RUN, *SEED, "--steps", 10000, "--eval_every", 0, "--keep", 2]


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGTERM, signal.SIGINT], marks=pytest.mark.full),
    ],
)
def test_the_first_signal_stops_after_the_step_and_the_second_at_once(numbers, tmp_path):
    folder = tmp_path / "run"
    for number in numbers:
        before = steps_done(folder)
        with alone(*LONG, "--save_every", 0, "--out", folder, "--resume", "auto") as run:
            run.wait_until(lambda: steps_done(folder) > before, "a step")
            run.process.send_signal(number)
            code, step = run.wait(60), steps_done(folder)
            assert code == 0, f"exit code {code} after signal {number}, expected 0:\n{run.stderr()}"
            assert (
                "stopping after this step (once more: at once)" in run.stderr()
                and "Traceback" not in run.stderr()
            )
            assert (
                f"stopped after step {step}, on request; the same command with --out"
                f" {folder} --resume auto goes on" in run.stdout()
            )
            assert check_newest(folder) == step > before
            assert (f"resumed from {folder}/step-{before:06}" in run.stdout()) == (before > 0), (
                run.stdout()
            )
    leaves_at_once(folder, signal.SIGINT)


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    """The second one says so and leaves; the first goes on. When that was killed the folder is
    free."""
    folder = tmp_path / "run"
    command = [*LONG, "--save_every", 1, "--out", folder, "--resume", "auto"]
    with alone(*command) as first:
        first.wait_until(lambda: steps_done(folder) > 0, "a step")
        _, error = run("attnrl.py", *command, code=2)
        assert f"--out {folder}: another process is training there" in error
        before = steps_done(folder)
        first.wait_until(lambda: steps_done(folder) > before, "another step")
        first.process.kill()
        first.wait(30)
    with alone(*command) as first:
        first.wait_until(lambda: "resumed from" in first.stdout(), "the next run")


@pytest.mark.full
def test_sigterm_twice_leaves_at_once(tmp_path):
    train(config_of(tmp_path / "run", "--steps", 1))
    leaves_at_once(tmp_path / "run", signal.SIGTERM)


def leaves_at_once(folder: Path, number: int) -> None:
    """Two signals during a step that would take long."""
    step = check_newest(folder)
    long = ["--batch_size", 64, "--batch_range", 64, "--steps", 10000, "--resume_changed", "true"]
    with alone(*LONG, *long, "--out", folder, "--resume", "auto") as run:
        run.wait_until(lambda: "resumed from" in run.stdout(), "the first step")
        run.process.send_signal(number)
        run.wait_until(
            lambda: "stopping after this step" in run.stderr(), "the answer to the first signal"
        )
        sent = time.monotonic()
        run.process.send_signal(number)
        code = run.wait(30)
        assert time.monotonic() - sent < 2
        assert code == 128 + number, f"exit code {code}, expected {128 + number}:\n{run.stderr()}"
        assert check_newest(folder) >= step


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_the_run_with_a_whole_checkpoint(number, tmp_path):
    """Slurm and kubectl send SIGTERM, a terminal sends SIGINT to the process group. torchrun passes
    it on, waits 30 seconds, and then kills: the step must end by then."""
    folder = tmp_path / "run"
    with Launched(
        *one_node(2), "attnrl.py", *LONG, "--save_every", 0, "--out", folder, prefix=["setsid"]
    ) as run:
        run.wait_until(lambda: steps_done(folder) >= 1, "a step")
        os.killpg(run.process.pid, number)
        code = run.wait(90)
        print(f"{number.name} to torchrun: exit code {code}, at step {steps_done(folder)}")
        assert "stopping after this step" in run.stderr()
        assert check_newest(folder) == steps_done(folder), run.stdout() + run.stderr()
        assert f"stopped after step {steps_done(folder)}, on request" in run.stdout()


KILLS = 50
OFTEN = [*RUN, *SEED, "--steps", 30, "--batch_size", 2, "--eval_every", 10, "--keep", 2]


@pytest.mark.full
def test_fifty_kills_at_random_moments_change_nothing(tmp_path, record_property):
    """Each part of a run is killed soon after its first step is logged (it is saved then), during
    that step, or while it starts. Runs follow one another until there were as many kills; each must
    end as the undisturbed one."""
    expected = train(
        parse_config([str(option) for option in (*OFTEN, "--out", tmp_path / "whole")])
    )
    seed = 20250707
    print(f"seed {seed}")
    rng, kills, runs, during, started = random.Random(seed), 0, 0, 0, time.monotonic()
    while kills < KILLS:
        folder, runs, code = tmp_path / f"run-{runs}", runs + 1, None
        while code != 0:
            saved = check_newest(folder) if checkpoint.checkpoints(folder) else 0
            moment = rng.choice(["start", "going on", *["step"] * 4])
            with alone(*OFTEN, "--out", folder, "--resume", "auto") as run:
                if kills == KILLS:
                    run.wait(600)
                else:

                    def reached():
                        going = f"step-{saved:06}" in run.stdout() if saved else folder.exists()
                        return (
                            moment == "start"
                            or going
                            and (moment == "going on" or steps_done(folder) > saved)
                        )

                    while run.process.poll() is None and not reached():
                        time.sleep(0.005)
                    time.sleep(rng.uniform(0, 6 if moment == "start" else 0.6))
                    run.process.kill()
                code = run.process.wait()
            assert code in (
                0,
                -signal.SIGKILL,
            ), f"run {runs}, after {kills} kills: exit code {code}\n{run.stderr()}"
            if code:
                kills, during = kills + 1, during + bool(list(folder.glob(".*.new")))
                print(
                    f"kill {kills} of run {runs} ({moment}): saved {saved}, logged"
                    f" {steps_done(folder)}, left {[path.name for path in folder.glob('.*')]}",
                    flush=True,
                )
        identical(folder, expected)
    text = (
        f"{kills} kills in {time.monotonic() - started:.0f} s, {runs} runs, {during} kills during a"
        " save"
    )
    record_property("kills", text)
    print(text)
    assert not list(folder.glob(".step*")), "half a checkpoint is still there"


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------
def refused(capsys, folder, *options, given=("--resume", "auto")) -> str:
    """The one line with which attnrl.py, exit code 2, refuses to go on. The folder is left as it
    was."""

    def content():
        return (
            {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
            if folder.exists()
            else None
        )

    before = content()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, stop_on_user_error("attnrl.py"):
        train(config_of(folder, *given, *options))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error
    after = content()
    assert after == before, (
        "a refused run touched"
        f" {[str(path) for path in (before or {}) if after.get(path) != before[path]]}"
    )
    return error


@pytest.fixture
def halfway(whole, tmp_path):
    return cut(whole, 2, tmp_path / "run")


def test_every_setting_that_changed_is_named_and_nothing_else(halfway, capsys):
    error = refused(
        capsys,
        halfway,
        "--lr",
        1e-4,
        "--seed",
        4,
        "--batch_size",
        5,
        "--clip_high",
        0.3,
        "--keep",
        3,
    )
    assert (
        f"{halfway}/step-000002 was written with other settings (" in error
        and "--resume_changed true" in error
    )
    inside = error[error.index("(") + 1 : error.rindex(")")].split("; ")
    assert inside == [
        "--seed 3 is now 4",
        "--batch_size 4 is now 5",
        "--target_sequences 60 is now 75",
        "--lr 5e-05 is now 0.0001",
        "--clip_high 0.28 is now 0.3",
    ], inside


def test_settings_that_change_no_number_are_free(whole, halfway, tmp_path):
    moved = halfway.rename(tmp_path / "moved")
    resume(
        moved,
        "--save_every",
        3,
        "--keep",
        1,
        "--log_samples",
        1,
        "--grading_workers",
        1,
        "--gpu_gib",
        40,
        "--gpus",
        3,
    )
    same_checkpoint(moved / "last", whole / "last")
    assert [folder.name for folder in checkpoint.checkpoints(moved)][-1] == "step-000004"
    assert len(checkpoint.checkpoints(moved)) <= 2  # the newest, and the best


def test_other_settings_are_taken_on_request(whole, halfway, capsys):
    resume(halfway, "--lr", 1e-4, "--resume_changed", "true", stop=lambda: True)
    records = metrics(halfway)
    assert records[:3] == metrics(whole)[:3] and records[3]["train/lr"] == 1e-4
    assert state_of(halfway / "last")["stream"] == state_of(whole / "step-000003")["stream"]


@pytest.mark.parametrize(
    "change",
    [
        ["--max_response", 20],
        ["--one_step_off_policy", "false"],
        *(
            pytest.param(change, marks=pytest.mark.full)
            for change in (
                ["--tis_cap", 2],
                ["--temperature", 0.7],
                ["--advantage", "grpo"],
                ["--advantage", "prl"],
            )
        ),
    ],
    ids=str,
)
def test_what_no_longer_fits_the_half_finished_batch_samples_its_problems_anew(change, halfway):
    resume(halfway, *change, "--resume_changed", "true", stop=lambda: True)
    after = state_of(halfway / "last")["groups"] or []
    assert not after if "--one_step_off_policy" in change else after
    taken = [
        problem["number"]
        for step in lines(halfway / "batches.jsonl")
        for problem in step["problems"]
    ]
    taken += [group["problem"] for group in after]
    assert taken == ProblemStream(16, seed=3).take(len(taken)), "a problem was lost, or came twice"
    if "--max_response" in change:
        assert all(
            len(response["tokens"]) <= 20 for group in after for response in group["responses"]
        )


def test_another_problem_file_or_initial_model_of_the_same_name_is_noticed(tmp_path, capsys):
    problems, model = tmp_path / "problems.jsonl", tmp_path / "model"
    rows = [{"problem": f"({i}+4)", "answer": str(i + 4)} for i in range(1, 6)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(TOY_MODEL, model)
    options = ["--problems", problems, "--prompt_suffix", "", "--model", model, "--steps", 2]
    train(config_of(tmp_path / "run", *options), stop=lambda: True)
    rows[0]["answer"] = "6"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "other settings (the problems file is another one)" in refused(
        capsys, tmp_path / "run", *options
    )
    rows[0]["answer"] = "5"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(tmp_path / "run" / "last" / "model.safetensors", model)
    assert "other settings (the model file is another one)" in refused(
        capsys, tmp_path / "run", *options
    )


@pytest.mark.parametrize(
    "name, damage",
    [
        ("run.json", b"{}"),
        ("run.json", b'{"config": {'),
        ("run.json", b"[]"),
        ("run.json", b"\xff\xfe"),
        ("run.json", None),
        ("training.pt", 1000),
        ("training.pt", -100),
        ("training.pt", b""),
        ("training.pt", b"no zip"),
        ("training.pt", None),
        ("model.safetensors", 1000),
        ("model.safetensors", -100),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(name, damage, halfway, capsys):
    file = halfway / "step-000002" / name
    content = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(content[:damage] if isinstance(damage, int) else damage)
    error = refused(capsys, halfway)
    assert str(file.parent) in error and (
        name not in ("run.json", "training.pt") or str(file) in error
    ), error
    print(error)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_does_not_run(
    halfway, capsys, monkeypatch, tmp_path
):
    torch.save({"moments": Evil()}, halfway / "step-000002" / "training.pt")
    monkeypatch.chdir(tmp_path)
    assert "training.pt: cannot be read" in refused(capsys, halfway)
    assert not (tmp_path / "executed").exists()


def test_an_older_checkpoint_is_used_when_the_newest_is_removed(whole, halfway):
    """What the messages about damage advise."""
    shutil.rmtree(halfway / "step-000002")  # `last` now leads nowhere
    resume(halfway, stop=lambda: True)
    same_checkpoint(halfway / "last", whole / "step-000002")


def test_resuming_needs_a_name_and_a_folder_of_a_run(whole, capsys, tmp_path):
    with pytest.raises(UserError, match="--resume auto: name the run's folder with --out"):
        parse_config(["--resume", "auto"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    assert "is not empty" in refused(capsys, tmp_path / "notes")
    assert (tmp_path / "notes" / "todo.txt").read_text() == "mine"
    # without --resume a run is never written over
    assert "is not empty" in refused(capsys, whole, given=())


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    resume(run)
    identical(run, whole)


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    resume(run, "--steps", 5, "--resume_changed", "true")
    assert [m["step"] for m in metrics(run)] == [0, 1, 2, 3, 4, 5] and metrics(run)[:5] == metrics(
        whole
    )


def test_with_other_problems_the_stream_and_the_in_flight_half_start_anew(halfway):
    """Fewer problems than the old stream's position; the old responses belong to other problems."""
    resume(halfway, "--problems", "toy:8:5:3", "--resume_changed", "true", stop=lambda: True)
    assert {s["problem"] for s in lines(halfway / "samples.jsonl") if s["step"] == 3} <= {
        text for text, _ in toy_set("toy:8:5:3")
    }


def test_resume_auto_without_a_checkpoint_says_that_the_run_starts_anew(tmp_path, capsys):
    folder = tmp_path / "misspelt"
    train(config_of(folder, "--resume", "auto", "--steps", 1), stop=lambda: True)
    said = capsys.readouterr().out
    assert f"--resume auto: no checkpoint in {folder} yet: the run starts at step 0" in said
    train(config_of(folder, "--resume", "auto", "--steps", 1))
    again = capsys.readouterr().out
    assert "starts at step 0" not in again and "resumed from" in again
