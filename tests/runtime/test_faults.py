"""test_faults.py: what happens when something breaks in the middle of a training run. Every fault
is a real one.

    fault                                                 what happens
    a grader is killed, hangs, is out of memory, raises   its item is wrong and counted, the run
                                                          goes on
    out of memory in a step                               exit code 2, one line; resumed: as if
                                                          nothing had happened
    weights or moments become NaN, the lr is absurd       exit code 2, one line; no checkpoint holds
                                                          a NaN; resumed: the same
    --reward gives no finite number, or raises            exit code 2, one line that names function
                                                          and value
    --reward is 0 for everything, 20 steps long           nothing is trained, the run says so and
                                                          goes on; it resumes
    metrics.jsonl or samples.jsonl cannot be written      exit code 2, one line; resumed later:
                                                          as if nothing had happened
    curves.png cannot be written                          the run says so and goes on
    a rank is killed                                      the run ends; resumed: as if nothing had
                                                          happened

"As if nothing had happened": metrics, samples and checkpoints are those of an undisturbed run, bit
for bit. Signals, kill -9 and full disks: test_checkpoint.py. Lost ranks and nodes: test_dist.py.
The graders alone: test_grading.py.

    python -m pytest tests/runtime/test_faults.py -m "not full"

Without the last option also a deaf grader, a lost rank.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fixtures import ROOT, TOY_MODEL, lines, same_file, typed
from launch import Launched, one_node, steps_done
from safetensors.torch import load_file
from toy_runs import (
    RUN,
    SEED,
    assert_same,
    cut,
    identical,
    metrics,
    same_checkpoint,
    together,
    train,
)

import attnrl
from attnrl import parse_config
from runtime import checkpoint
from runtime.cli import stop_on_user_error
from toy.programs import toy_set

needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="looks into and limits other processes: Linux only"
)


# Short problems, two at a time; what a checkpoint must carry is the concern of test_checkpoint.py.
SMALL = [
    *typed(
        "--preset toy --problems toy:4:16:1 --test_problems toy:4:2:2 --steps 3 --batch_size 2"
        " --group_size 2 --eval_every 3 --eval_samples 1 --save_every 1 --keep 9"
    ),
    *SEED,
]


def config_of(folder: Path, *options):
    return parse_config([str(option) for option in (*SMALL, *options, "--out", folder)])


def resume(folder: Path, *options, stop=lambda: False) -> Path:
    """Go on in this process, or start."""
    return train(config_of(folder, "--resume", "auto", *options), stop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = resume(tmp_path_factory.mktemp("whole") / "run")
    assert all(m["train/updates"] for m in metrics(run)[1:]), (
        "a step without an update: choose another seed"
    )
    return run


def stopped(capsys, folder: Path, *options, stop=lambda: False) -> str:
    """The one line with which this run (fresh, or of a checkpoint in `folder`) ends, exit code
    2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left, stop_on_user_error("attnrl.py"):
        resume(folder, *options, stop=stop)
    error = capsys.readouterr().err
    print(error)
    assert left.value.code == 2 and len(error.strip().splitlines()) == 1, (
        f"exit code {left.value.code}\n{error}"
    )
    return error


def once(action):
    """A stop() for `train` that asks for nothing: it acts when it is asked first, after the first
    step and before its save."""
    left = [action]
    return lambda: bool(left and left.pop()())  # the actions return None


def newest(run: Path, step: int, whole: Path) -> None:
    """The newest checkpoint is that of `step`; it and the older ones are those of the undisturbed
    run."""
    assert checkpoint.checkpoints(run)[-1].name == f"step-{step:06}"
    for folder in checkpoint.checkpoints(run):
        same_checkpoint(folder, whole / folder.name)


# --------------------------------------------------------------------------------------------------
# Graders. Every gold of these runs is such as \sqrt{49}, which only a worker knows to be 7: all
# answers go through workers. The fault strikes at the one wrong response of one problem, so that
# nothing but what is counted may change.
# --------------------------------------------------------------------------------------------------
HANG = r"(a+b+c+d+e+f)^{40}"  # minutes of sympy
PROGRAMS = "toy:8:16:1"
GRADED = [
    *typed(
        "--advantage grpo --grpo_samples 3 --one_step_off_policy false --steps 2"
        " --batch_size 3 --log_samples 99 --grading_workers 1"
    ),
    "--prompt_suffix",
    "",
]


def graded_run(folder: Path, other: tuple[str, list[str]] = ("", [])) -> Path:
    """A run in `folder`; `other` is a problem and the golds that it has instead of its own."""
    folder.mkdir()
    with (folder / "problems.jsonl").open("w") as file:
        for problem, answer in toy_set(PROGRAMS):
            golds = other[1] if problem == other[0] else [rf"\sqrt{{{int(answer) ** 2}}}"]
            file.write(json.dumps({"problem": problem, "answer": golds}) + "\n")
    return train(config_of(folder / "run", *GRADED, "--problems", folder / "problems.jsonl"))


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return graded_run(tmp_path_factory.mktemp("graded") / "whole")


def busy_worker() -> int:
    """Waits for a grading worker of this process that has computed for 0.3 s on one question:
    others take milliseconds. Its process id."""
    since: dict[int, tuple[int, float]] = {}  # bytes read so far, and CPU seconds by then
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            try:
                parent, *_, user, system = (
                    (folder / "stat").read_text().rpartition(")")[2].split()[1:13]
                )
                if (
                    int(parent) != os.getpid()
                    or b"--grading-worker" not in (folder / "cmdline").read_bytes()
                ):
                    continue
                if resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] != 0:  # it is still starting
                    continue
                read = int((folder / "io").read_text().split()[1])
            except OSError:  # it has just ended
                continue
            seconds = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
            if since.setdefault(pid, (read, seconds))[0] != read:
                since[pid] = read, seconds
            if seconds - since[pid][1] > 0.3:
                return pid
        time.sleep(0.02)
    raise AssertionError("no worker was busy within 60 s")


def no_more_memory(pid: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_AS, (1, resource.prlimit(pid, resource.RLIMIT_AS)[1]))


@needs_proc
@pytest.mark.parametrize(
    "gold, strike, counted",
    [
        pytest.param(HANG, lambda pid: os.kill(pid, signal.SIGKILL), "died", id="killed"),
        pytest.param(HANG, no_more_memory, "died", id="out-of-memory"),
        pytest.param(HANG, None, "timeout", id="hung"),
        pytest.param(
            HANG,
            lambda pid: os.kill(pid, signal.SIGSTOP),
            "timeout",
            id="deaf",
            marks=pytest.mark.full,
        ),
        pytest.param(r"\frac{1}{0}", None, "error", id="raised"),
    ],
)
def test_a_grader_that_is_lost_costs_its_own_item_and_is_counted(
    gold, strike, counted, graded, tmp_path
):
    sample = next(
        s for s in lines(graded / "samples.jsonl") if sum(r["reward"] for r in s["responses"]) == 2
    )
    answer = dict(toy_set(PROGRAMS))[sample["problem"]]
    if strike:
        striker = threading.Thread(target=lambda: strike(busy_worker()), daemon=True)
        striker.start()
    run = graded_run(tmp_path / "disturbed", (sample["problem"], [answer, gold]))
    for got, expected in zip(metrics(run), metrics(graded), strict=True):
        for name in ("timeout", "died", "error") if got["step"] else ():
            assert expected.pop(f"grading/{name}") == 0
            count = got.pop(f"grading/{name}")
            assert count == (name == counted and got["step"] == sample["step"]), (
                f"step {got['step']}: {name} {count}"
            )
        assert_same(got, expected, where=f"step {got['step']}")
    same_file(run / "last" / "model.safetensors", graded / "last" / "model.safetensors")


# --------------------------------------------------------------------------------------------------
# Memory, numbers
# --------------------------------------------------------------------------------------------------
LIMITED = """
import resource, sys
import attnrl
from runtime import cli, monitor

steps, show = [], monitor.Display.phase

def phase(self, name):
    # after the first step, when this phase begins: this process may have no byte more than it has
    show(self, name)
    if steps and name == sys.argv[1]:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

monitor.Display.phase = phase
with cli.stop_on_user_error("attnrl.py"):
    attnrl.train(attnrl.parse_config(sys.argv[2:]), lambda: steps.append(1))
"""


@needs_proc
@pytest.mark.parametrize("phase", ["train", pytest.param("generate", marks=pytest.mark.full)])
def test_out_of_memory_in_a_step(phase, whole, tmp_path):
    """The fixed threshold makes malloc return the memory of tensors: what a step needs, it must
    then ask for."""
    run = cut(whole, 1, tmp_path / "run")
    options = [*SMALL, "--save_every", 0, "--out", run, "--resume", "auto"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, [phase, *options])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
        },
    )
    print(phase, done.stdout, done.stderr)
    assert (
        "resumed from" in done.stdout
        and "step    2" in done.stdout
        and "step    3" not in done.stdout
    ), done.stdout
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"out of memory in phase '{phase}'" in done.stderr, done.stderr
    newest(run, 1, whole)
    identical(resume(run), whole)


def nan_in_weights(run) -> None:
    run.policy.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")


def nan_in_moments(run) -> None:
    run.learner.optimizer.state[run.policy.model.norm.weight]["exp_avg"][7] = float("nan")


@pytest.mark.parametrize(
    "damage, save_every, words",
    [
        pytest.param(
            nan_in_weights,
            1,
            "step 2: model.layers.0.mlp.up_proj.weight and 0 more tensors of the policy are not"
            " finite",
            id="weights-saved",
        ),
        pytest.param(
            nan_in_weights, 0, "the log-probs of sampled tokens are not finite", id="weights-used"
        ),
        pytest.param(
            nan_in_moments,
            0,
            "step 3: model.norm.weight and 0 more tensors of the policy are not finite",
            id="moments",
        ),
    ],
)
def test_nan_in_the_policy_stops_the_run_and_is_in_no_checkpoint(
    damage, save_every, words, whole, tmp_path, capsys, monkeypatch
):
    made, real = [], attnrl.setup
    # the same, within reach
    monkeypatch.setattr(attnrl, "setup", lambda *args: made.append(real(*args)) or made[-1])
    run = cut(whole, 1, tmp_path / "run")
    assert words in stopped(
        capsys, run, "--save_every", save_every, stop=once(lambda: damage(made[0]))
    )
    newest(run, 1, whole)
    identical(resume(run), whole)


def test_a_learning_rate_that_destroys_the_policy(whole, tmp_path, capsys):
    """1e20: after one update the weights are finite and useless, and so is the checkpoint of that
    step."""
    run = cut(whole, 1, tmp_path / "run")
    words = (
        "the log-probs of sampled tokens are not finite: the policy's weights are damaged; remove"
        " the newest checkpoint"
    )
    assert words in stopped(capsys, run, "--lr", 1e20, "--resume_changed", "true")
    for folder in checkpoint.checkpoints(run):
        assert all(
            tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values()
        ), folder
    # nobody goes on from it unawares
    assert "weights are damaged" in stopped(capsys, run, "--resume_changed", "true")
    shutil.rmtree(run / "step-000002")
    newest(run, 1, whole)
    identical(resume(run), whole)


# --------------------------------------------------------------------------------------------------
# Reward functions
# --------------------------------------------------------------------------------------------------
def reward_module(folder: Path, body: str, monkeypatch) -> str:
    """A module on sys.path; its function answers 0.5 to the first 10 calls, for an evaluation and
    half a batch; then BODY."""
    (folder / "my_rewards.py").write_text(
        "calls = []\n\ndef mine(response, answers):\n    calls.append(1)\n"
        f"    if len(calls) < 10:\n        return 0.5\n    {body}\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return "my_rewards:mine"


@pytest.mark.parametrize(
    "body, words",
    [
        ("return float('inf')", "returned inf; it must return a finite number"),
        ("return -float('inf')", "returned -inf; it must return a finite number"),
        ("return float('nan')", "returned nan; it must return a finite number"),
        ("return None", "returned None; it must return a finite number"),
        ("return '1'", "returned '1'; it must return a finite number"),
        ("return [1.0]", "returned [1.0]; it must return a finite number"),
        (
            "import torch; return torch.tensor(1.0)",
            "returned tensor(1.); it must return a finite number",
        ),
        ("return 10 ** 400", "returned 1000"),
        ("raise ValueError('an error\\nof two lines')", "an error"),
        ("return mine(response)", "missing 1 required positional argument: 'answers'"),
    ],
)
def test_a_reward_that_is_no_finite_number_is_named(body, words, tmp_path, capsys, monkeypatch):
    error = stopped(
        capsys, tmp_path / "run", "--reward", reward_module(tmp_path, body, monkeypatch)
    )
    assert "--reward my_rewards:mine: " in error and words in error


def test_twenty_steps_without_any_reward_train_nothing_and_go_on(tmp_path, capsys, monkeypatch):
    (tmp_path / "no_rewards.py").write_text("def none(response, answers):\n    return 0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = typed(
        "--reward no_rewards:none --steps 20 --kl_coef 0 --save_every 0 --eval_every 10"
    )
    steps = []
    run = resume(tmp_path / "run", *options, stop=lambda: steps.append(1) or len(steps) == 10)
    assert checkpoint.checkpoints(run)[-1].name == "step-000010"
    assert "stopped after step 10, on request" in capsys.readouterr().out
    resume(run, *options)
    said = capsys.readouterr().out
    assert (
        said.count(
            "empty batch: all leaves of all 2 problems agree, nothing to train on; the batch size"
            " is held"
        )
        == 10
    ), said
    records = metrics(run)[1:]
    assert [m["step"] for m in records] == list(range(1, 21))
    for m in records:
        names = (
            "problems",
            "sequences",
            "initial/reward",
            "mc/reward",
            "train/updates",
            "train/tokens",
            "train/skipped_updates",
        )
        assert [m[name] for name in names] == [2, 0, 0, 0, 0, 0, 0], m
        assert m["leaves"] > 4, "nothing was branched"
    initial, trained = (
        load_file(folder / "model.safetensors") for folder in (TOY_MODEL, run / "last")
    )
    assert initial.keys() == trained.keys() and all(
        torch.equal(initial[name], trained[name]) for name in initial
    )


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------
@pytest.fixture
def file_limit():
    """Sets how large a file may become, for this test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_cannot_grow_ends_the_run(name, whole, tmp_path, capsys, file_limit):
    """There is room for 50 bytes of the next line, and no more."""
    run = cut(whole, 1, tmp_path / "run")
    error = stopped(
        capsys,
        run,
        "--save_every",
        0,
        stop=once(lambda: file_limit((run / name).stat().st_size + 50)),
    )
    assert f"{run / name}: cannot be written (File too large); correct that" in error
    assert not (run / name).read_text().endswith("\n"), "half a line was to be there"
    file_limit(resource.RLIM_INFINITY)
    newest(run, 1, whole)
    identical(resume(run), whole)


@pytest.mark.parametrize(
    "name, still_there",
    [
        ("metrics.jsonl", False),
        pytest.param("samples.jsonl", False, marks=pytest.mark.full),
        ("metrics.jsonl", True),
    ],
)
def test_a_log_that_is_replaced_by_a_folder_ends_the_run(
    name, still_there, whole, tmp_path, capsys
):
    run = cut(whole, 1, tmp_path / "run")

    def replace():
        (run / name).rename(tmp_path / name)
        (run / name).mkdir()

    error = stopped(capsys, run, "--save_every", 0, stop=once(replace))
    assert f"{run / name}: cannot be written (Is a directory); correct that" in error
    newest(run, 1, whole)
    if still_there:
        assert f"{run / name}: cannot be " in stopped(capsys, run)
    (run / name).rmdir()
    (tmp_path / name).rename(run / name)
    identical(resume(run), whole)


def test_curves_that_cannot_be_drawn_do_not_end_the_run(whole, tmp_path, capsys):
    run = cut(whole, 1, tmp_path / "run")
    (run / "curves.png").mkdir()
    attnrl.train(config_of(run, "--resume", "auto"))
    assert f"{run / 'curves.png'}: cannot be written (Is a directory)" in capsys.readouterr().out
    identical(run, whole)


# --------------------------------------------------------------------------------------------------
# Ranks
# --------------------------------------------------------------------------------------------------
@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_that_lost_a_rank_ends_as_if_it_had_not(victim, tmp_path):
    steps = ["--steps", 6]
    with Launched(*one_node(2), "attnrl.py", *RUN, *SEED, *steps, "--out", tmp_path / "run") as run:
        run.wait_until(lambda: steps_done(tmp_path / "run") >= 3, "step 3")
        os.kill(run.rank(victim), signal.SIGKILL)
        assert run.wait(60) != 0
    assert 2 <= int(checkpoint.checkpoints(tmp_path / "run")[-1].name.removeprefix("step-")) < 6
    identical(
        together(tmp_path / "run", *steps, "--resume", "auto"), together(tmp_path / "whole", *steps)
    )
