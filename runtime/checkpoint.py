"""checkpoint.py: save and restore the whole state of a run, so that a run that was stopped and
resumed ends as if it had never been stopped.

    python attnrl.py ... --out runs/mine --resume auto        # the newest checkpoint in runs/mine,
                                                              or a fresh start

A checkpoint is a subfolder of the run, `step-000040/`, written after training step 40. Two links,
`last` and `best`, point to the newest one and to the one with the best test accuracy:

    config.json, model.safetensors, tokenizer ...   the policy in fp32:
                                                    AutoModelForCausalLM.from_pretrained, vLLM,
                                                    eval.py
    training.pt    AdamW's moments, counters, sampler state, and the IN-FLIGHT half of the pipeline:
                   the initial responses of step 41 with their log-probs, FCI, grades and branch
                   points. Without these a resumed run would sample them again from a newer policy,
                   and its results would differ.
    run.json       the run's settings, and fingerprints of its problems and of the initial model
                   (the reference)

Random numbers need no state: the seed of every rollout, shuffle and tree depends only on its place
in the run. The reference is the initial model, read again.

Safety: a checkpoint is written under another name, flushed to the disk and then renamed, so a
folder called step-N is always complete. Older ones are removed only after that. Reading a
checkpoint cannot run code: weights are safetensors, training.pt is read with weights_only=True, the
rest is JSON.

The content does not depend on the number of ranks (whole tensors, all groups), so a run can be
resumed with another number of ranks; only the rounding differs then.

    python -m pytest tests/runtime/test_checkpoint.py
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch

from runtime.cli import UserError, first_line
from runtime.dist import everyone, full_weights, mine, rank, shard_like, whole
from tree import Response

# Settings that may change when a run is resumed: where it runs and what is shown and kept, not what
# it computes.
FREE = {
    "out",
    "resume",
    "resume_changed",
    "dry_run",
    "gpus",
    "gpu_gib",
    "device",
    "grading_workers",
    "save_every",
    "keep",
    "log_samples",
    "engine_memory",
    "packing",
    "sync_tolerance",
    "track",
    "log_level",
    "quiet",
}
# Values for settings that runs of version 1 do not have
DEFAULTS = {"grade_units": "loose", "test_fraction": 0.0, "problem_column": "", "answer_column": ""}
DEFAULTS |= {"ads_drop": True, "loss": "ppo", "mask_cut_off": False, "scale_rewards": "std"}
REWARDS = {"eval:grade": "boxed"}  # and their names of rewards
# What training.pt must hold
STATE = {
    "moments",
    "groups",
    "best",
    "generated_tokens",
    "easy_filter",
    "batch_size",
    "stream",
}
# If one of these changes, the in-flight half no longer fits: its problems are sampled again.
HALF_DEPENDS_ON = {
    "advantage",
    "max_response",
    "one_step_off_policy",
    "prompt_suffix",
    "temperature",
    "tis_cap",
}


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------
def flush(path: Path) -> None:
    """Write to the disk, not only to the system's memory: even after a power cut every name in a
    folder must have its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


HELD: dict[tuple[int, int], TextIO] = {}  # this process's runs


def hold(folder: Path) -> None:
    """Locks a run's folder until `release` or the end of this process: two that write to it would
    mix their steps. Raises UserError if another process has it."""
    try:
        file = (folder / "config.json").open(encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        HELD[inode(file)] = file
    except BlockingIOError as error:
        if inode(file) not in HELD:  # not this process itself
            raise UserError(
                f"--out {folder}: another process is training there; wait for it or stop it, or"
                " give another folder"
            ) from error
    except OSError as error:
        if error.filename:  # else a file system without locks
            raise UserError(f"--out {folder}: cannot be read ({error.strerror})") from error


def release(folder: Path) -> None:
    with (folder / "config.json").open(encoding="utf-8") as file:
        if inode(file) in HELD:
            HELD.pop(inode(file)).close()


def inode(file: TextIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def folder_of(step: int) -> str:
    return f"step-{step:06}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def publish(target: Path, write) -> None:
    """`write(folder)` fills a new folder. It is renamed to `target` only when all of it is on the
    disk."""
    fresh = target.with_name(f".{target.name}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
        fresh.mkdir()
        write(fresh)
        for path in [*fresh.rglob("*"), fresh]:
            flush(path)
        fresh.rename(target)
        flush(target.parent)
    except Exception as error:  # for a full disk safetensors, torch and json raise different types
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(
            f"{target}: cannot be written ({first_line(error)}); older checkpoints are complete,"
            " and the same command with --resume auto resumes from them"
        ) from error


def point(folder: Path, link: str, step: int) -> None:
    """Let the symbolic link point to the checkpoint of this step. At every moment it points to a
    complete checkpoint."""
    fresh = folder / f".{link}.new"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder_of(step))
    fresh.replace(folder / link)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, the oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def model_hash(model: str) -> str:
    """A hash of the weights in a model directory, to see whether they have changed."""
    weights = hashlib.sha256()
    # a hub name has no such files; the settings compare it
    for file in sorted(
        file for file in Path(model).glob("*") if file.suffix in (".safetensors", ".bin")
    ):
        with file.open("rb") as content:
            weights.update(hashlib.file_digest(content, "sha256").digest())
    return weights.hexdigest()


# --------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------
def collect(run, upcoming, best: tuple[float, int]) -> dict:
    """The state as plain data and whole tensors. Every rank must call it: moments may be sharded,
    and each rank has its own groups."""
    moments = {}
    for name, parameter in run.policy.named_parameters():
        for key, value in run.learner.optimizer.state.get(parameter, {}).items():
            value = whole(value)  # one at a time, and only rank 0 keeps it
            if rank() == 0:
                moments[f"{name}/{key}"] = value.cpu()
    groups = None
    if upcoming:
        groups = everyone([asdict(g) | {"problem": g.number} for g in upcoming.groups])
    return {
        "moments": moments,
        "groups": groups,
        "best": list(best),
        "generated_tokens": sum(everyone([run.monitor.generated_tokens])),
        "easy_filter": asdict(run.easy_filter),
        "batch_size": run.adaptive_batch.size,
        "stream": [run.stream.epoch, run.stream.position],
    }


def save(folder: Path, step: int, run, upcoming, best: tuple[float, int], keep: int) -> None:
    """Write step-N, then drop all but the newest `keep` and the best. Every rank must call it; rank
    0 writes.

    upcoming: the half-finished next batch, or None; best: (test accuracy, its step), which is this
    step or an earlier one.
    """
    state = collect(run, upcoming, best)
    weights = {name: value.cpu() for name, value in full_weights(run.policy) if rank() == 0}
    if rank():
        return
    if damaged := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise UserError(
            f"step {step}: {damaged[0]} and {len(damaged) - 1} more tensors of the policy are not"
            " finite; this step is not saved, older checkpoints are complete"
        )

    def write(fresh: Path):
        run.policy.save_pretrained(fresh, state_dict=weights)
        run.tokenizer.save_pretrained(fresh)
        torch.save(state, fresh / "training.pt")
        settings = {"step": step, "config": asdict(run.config), **run.fingerprint}
        (fresh / "run.json").write_text(json.dumps(settings))

    publish(folder / folder_of(step), write)
    link_and_drop(folder, step, best[1], keep)


def link_and_drop(folder: Path, step: int, best: int, keep: int) -> None:
    """Set `last` and `best`. Then remove checkpoints that neither these links nor --keep need, and
    half-written ones of a killed run."""
    point(folder, "last", step)
    point(folder, "best", best)
    for old in checkpoints(folder)[:-keep]:
        if old.name != folder_of(best):
            shutil.rmtree(old)
    for half in folder.glob(".step-*.new"):
        shutil.rmtree(half)


# --------------------------------------------------------------------------------------------------
# Resuming
# --------------------------------------------------------------------------------------------------
def find(config) -> Path | None:
    """The checkpoint to resume from, the same one on every rank; None: a fresh start."""
    try:
        found = checkpoints(Path(config.out)) if config.resume == "auto" else []
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be read ({error.strerror})") from error
    return everyone([found[-1] if found else None])[0]


def setting_of(path: Path, name: str) -> str | None:
    """A setting of the run that wrote a checkpoint. None if the folder is not a checkpoint, is one
    of version 1 without this setting, or is damaged (then `check_unchanged` raises)."""
    try:
        saved = json.loads((path / "run.json").read_text(encoding="utf-8"))
        found = saved["config"].get(name)
        return REWARDS.get(found, found) if isinstance(found, str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_unchanged(path: Path, run) -> set[str]:
    """Names of the settings that differ from the checkpoint's; "the problems file" is one of them
    if that file has changed. Without --resume_changed, raises a UserError that lists them."""
    try:
        saved = json.loads((path / "run.json").read_text(encoding="utf-8"))
        old, new = saved["config"], asdict(run.config)
        old = DEFAULTS | {"date": new["date"]} | old
        old["reward"] = REWARDS.get(old["reward"], old["reward"])
        changed = {
            name: f"--{name} {old.get(name)} is now {new[name]}"
            for name in new
            if name not in FREE and old.get(name) != new[name]
        }
        changed |= {
            f"the {name} file": f"the {name} file is another one"
            for name, value in run.fingerprint.items()
            if saved[name] != value
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / 'run.json'}: cannot be read ({first_line(error)}); remove {path} to go on"
            " from an older checkpoint"
        ) from error
    if changed and not run.config.resume_changed:
        raise UserError(
            f"--resume auto: {path} was written with other settings"
            f" ({'; '.join(changed.values())}); use those, or resume with the new ones by"
            " --resume_changed true"
        )
    return set(changed)


def restore(path: Path | None, run, group_type):
    """Give the run, whose policy has been read from `path`, the rest of its state; returns (step,
    best, groups): this rank's groups of the half-finished batch, or None; group_type: attnrl.Group.

    The links of the run are set again: it may have been killed before they were set. Without a
    path: the state of a fresh start.
    """
    if path is None:
        return 0, (0.0, 0), None
    changed = check_unchanged(path, run)
    state = read_state(path)
    restore_stream(state, run.stream, changed)
    restore_moments(state["moments"], run)
    step = step_of(path)
    run.easy_filter = type(run.easy_filter)(**state["easy_filter"])
    if run.config.ads_batch:
        adaptive = run.adaptive_batch  # another --batch_size gives other bounds
        adaptive.size = min(adaptive.high, max(adaptive.low, state["batch_size"]))
    # the monitor sums them over ranks
    run.monitor.generated_tokens = state["generated_tokens"] if rank() == 0 else 0
    best = tuple(state["best"])
    # if somebody removed it, the next evaluation becomes the best one
    if not (path.parent / folder_of(best[1])).exists():
        best = (0.0, step)
    if rank() == 0:
        link_and_drop(path.parent, step, best[1], run.config.keep)
    run.monitor.display.resumed(step, path)
    if state["groups"] is None:
        return step, best, None
    groups = []
    for plain in mine(state["groups"]):
        problem = run.problems[plain["number"]]
        groups.append(group_type(**restored_group(plain, run.eos_ids) | {"problem": problem}))
    return step, best, groups


def read_state(path: Path) -> dict:
    """The content of training.pt. Raises UserError."""
    try:
        state = torch.load(path / "training.pt", weights_only=True, map_location="cpu", mmap=True)
        if lacking := STATE - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except Exception as error:  # a dozen types for a broken file
        raise UserError(
            f"{path / 'training.pt'}: cannot be read ({first_line(error)}); remove {path} to go on"
            " from an older checkpoint"
        ) from error
    return state


def restore_stream(state: dict, stream, changed: set[str]) -> None:
    """Set the position in the problem stream; drop a half-finished batch that no longer fits."""
    epoch, position = state["stream"]
    # the numbers now mean other problems, and the old position may be past the new end
    if "the problems file" in changed:
        state["groups"], epoch, position = None, 0, 0
    elif changed & HALF_DEPENDS_ON and state["groups"]:  # the stream gives these problems again
        epoch, position = divmod(epoch * stream.size + position - len(state["groups"]), stream.size)
        state["groups"] = None
    stream.epoch, stream.position = epoch, position


def restore_moments(moments: dict, run) -> None:
    """Restore AdamW's moments, sharded like their parameters."""
    for name, parameter in run.policy.named_parameters():
        own = {}
        for key, value in moments.items():
            if key.startswith(f"{name}/"):
                own[key.removeprefix(f"{name}/")] = shard_like(value.clone(), parameter)
        if own:
            run.learner.optimizer.state[parameter] = own


def restored_group(group: dict, eos_ids: list[int]) -> dict:
    """A group of training.pt with Response objects. In checkpoints of version 1 the group has the
    branch points, and only the last token shows whether a response was cut off."""
    points, old = group.pop("branch_points", {}), group.pop("cut", None) is not None
    responses = [Response(**response) for response in group["responses"]]
    for i, response in enumerate(responses):
        if old:
            response.branch_points = points.get(i, [])
            response.finished = response.tokens[-1] in eos_ids
    return group | {"responses": responses}
