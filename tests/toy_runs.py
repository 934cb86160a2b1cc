"""toy_runs.py: small runs of the toy that several tests look at, what they wrote, and comparisons
that say both numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from fixtures import lines, metrics_of, same_file, typed
from launch import torchrun
from transformers import AutoModelForCausalLM

import attnrl
import tree
from attnrl import Config, parse_config
from runtime import checkpoint
from runtime.cli import UserError
from runtime.monitor import Display
from runtime.runlog import RunFolder

TINY = typed(
    "--preset toy --steps 2 --batch_size 4 --problems toy:6:50:1 --test_problems toy:6:5:2"
    " --eval_samples 2 --eval_every 1 --mini_batch 64"
)
# Small, and all that a checkpoint must carry is at work (test_checkpoint.py asserts it): the KL to
# a reference, a batch size that follows Eq. 10, the filter of Eq. 8, several updates a step, a
# stream of 16 problems that begins a second epoch.
RUN = typed(
    "--preset toy --steps 4 --batch_size 4 --group_size 3 --eval_every 2 --eval_samples 1"
    " --test_problems toy:8:4:2 --problems toy:8:16:1 --mini_batch 15 --kl_coef 0.001"
    " --batch_lam 0.2 --save_every 1 --keep 9"
)
SEED = ["--seed", "3"]  # one of those with which the filter acts


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------
def train(config: Config, stop=lambda: False) -> Path:
    """attnrl.train without its pictures: at this size drawing takes as long as training. Who looks
    at pictures calls attnrl.train (test_attnrl.py, test_faults.py, test_view.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda *_: None)
        return attnrl.train(config, stop)


def tiny(folder: Path, *options, name: str = "run") -> list[str]:
    """The command line of a run of two steps."""
    return [*TINY, "--out", str(folder / name), *map(str, options)]


def train_tiny(folder: Path, *options, name: str = "run") -> Path:
    return train(parse_config(tiny(folder, *options, name=name)))


def set_up(*options) -> attnrl.Run:
    """A run whose steps the test makes itself."""
    return attnrl.setup(parse_config(list(map(str, options))), Display(1))


def config_of(folder: Path, *options):
    return parse_config([str(option) for option in (*RUN, *SEED, *options, "--out", folder)])


def resume(folder: Path, *options, stop=lambda: False) -> Path:
    """Go on in this process."""
    return train(config_of(folder, "--resume", "auto", *options), stop)


def together(folder: Path, *options, ranks: int = 2) -> Path:
    """The same on several ranks."""
    torchrun(ranks, "attnrl.py", *RUN, *SEED, *options, "--out", folder)
    return folder


def trained_sequences(run: attnrl.Run, groups: list) -> list[tree.TrainingSequence]:
    """What a step would train on of these groups."""
    sequences = [s for group in groups for s in attnrl.leaves(run.config, group)]
    return tree.drop_zero(sequences) if run.config.ads_drop else sequences


def step_without_sync(run: attnrl.Run, monkeypatch) -> UserError:
    """One step of the training loop whose weight sync is forgotten; what its check says."""
    with monkeypatch.context() as patch:
        patch.setattr(run.engine, "sync_weights", lambda weights: None)
        with pytest.raises(
            UserError, match="engine and learner disagree after the weight sync"
        ) as stop:
            attnrl.step(run, 1, None)
    return stop.value


def cut(run: Path, step: int, to: Path) -> Path:
    """The run as a kill at a bad moment leaves it: the newest checkpoint is of `step`, but the
    links are those of the one before; the logs are further, and end with half a line. Also half a
    checkpoint lies around."""
    shutil.copytree(run, to, symlinks=True)
    for folder in checkpoint.checkpoints(to):
        if folder.name > f"step-{step:06}":
            shutil.rmtree(folder)
    for link, leads in (
        ("last", step - 1),
        ("best", state_of(to / f"step-{step - 1:06}")["best"][1]),
    ):
        (to / link).unlink()
        (to / link).symlink_to(f"step-{leads:06}")
    half = to / f".step-{step + 1:06}.new"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "batches.jsonl", "samples.jsonl"):
        with (to / name).open("a") as file:
            file.write((to / name).read_text().splitlines()[-1][:100])
    return to


# --------------------------------------------------------------------------------------------------
# What a run has written
# --------------------------------------------------------------------------------------------------
def metrics(folder: Path) -> list[dict]:
    """All but the times."""
    return [
        {key: value for key, value in m.items() if "seconds/" not in key}
        for m in metrics_of(folder)
    ]


def state_of(folder: Path) -> dict:
    return torch.load(folder / "training.pt", weights_only=True)


# --------------------------------------------------------------------------------------------------
# Comparisons
# --------------------------------------------------------------------------------------------------
def assert_same(got, expected, *, rel: float = 0.0, tol: float = 0.0, where: str = "") -> None:
    """Nested lists and dicts are equal, floats within tol + rel * |expected|. Of a tensor the worst
    entry is shown."""
    if isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape and got.dtype == expected.dtype, (
            f"{where}: {got.shape} and {expected.shape}"
        )
        worst = (got - expected).abs().flatten().argmax()
        got, expected = (tensor.flatten()[worst].item() for tensor in (got, expected))
        assert_same(got, expected, rel=rel, tol=tol, where=f"{where}[{worst}]")
    elif isinstance(expected, dict):
        assert list(got) == list(expected), f"{where}: keys {list(got)} and {list(expected)}"
        for key in expected:
            assert_same(got[key], expected[key], rel=rel, tol=tol, where=f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{where}: {len(got)} and {len(expected)} entries"
        for i, (a, b) in enumerate(zip(got, expected)):
            assert_same(a, b, rel=rel, tol=tol, where=f"{where}[{i}]")
    elif isinstance(expected, float):
        apart = abs(got - expected)
        assert apart <= tol + rel * abs(expected), (
            f"{where}: {got!r} and {expected!r}, {apart:.3g} apart"
        )
    else:
        assert got == expected, f"{where}: {got!r} and {expected!r}"


def same_checkpoint(got: Path, expected: Path) -> None:
    same_file(got / "model.safetensors", expected / "model.safetensors")
    assert_same(state_of(got), state_of(expected), where=got.name)


def identical(got: Path, expected: Path) -> None:
    """Every number and every byte but the times."""
    assert_same(metrics(got), metrics(expected), where="metrics")
    for name in ("batches.jsonl", "samples.jsonl"):
        assert_same(lines(got / name), lines(expected / name), where=name)
    names = [[folder.name for folder in checkpoint.checkpoints(run)] for run in (got, expected)]
    assert names[0] == names[1], f"checkpoints {names[0]} and {names[1]}"
    for name in names[0]:
        same_checkpoint(got / name, expected / name)
    for link in ("last", "best"):
        assert (got / link).readlink() == (expected / link).readlink()


def same_run(got: Path, expected: Path) -> None:
    """Texts, rewards and whole numbers exactly; other numbers to 1e-4 of their size (1e-5 near 0,
    as of the log-prob gap between engine and learner, which is rounding and nothing else)."""
    samples = [lines(folder / "samples.jsonl") for folder in (got, expected)]
    for response in (r for records in samples for record in records for r in record["responses"]):
        response.pop("attention", None)  # two digits for a picture: rounding may fall either way
    assert_same(*samples, rel=1e-4, tol=2e-4)  # log-probs are rounded
    assert_same(metrics(got), metrics(expected), rel=1e-4, tol=1e-5)
    models = [
        AutoModelForCausalLM.from_pretrained(folder / "last").state_dict()
        for folder in (got, expected)
    ]
    # As in test_weights_agree_after_three_adamw_updates single weights may be off by a step or two,
    # of 5e-5 each; not many
    assert_same(*models, tol=1e-4, where="last")
    rms = (
        torch.cat([(models[0][name] - models[1][name]).flatten() for name in models[0]])
        .square()
        .mean()
        .sqrt()
    )
    assert rms < 5e-7, f"root mean square difference of weights {rms}, allowed 5e-7"
