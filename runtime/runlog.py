"""runlog.py: the folder of a run, the files in it, and trackers.

    config.json     the resolved configuration and the versions that ran it
    metrics.jsonl   one line per step; every key is explained in docs/runs.md
    batches.jsonl   one line per step: every problem's difficulty, FCI, filter, trees, leaves
    samples.jsonl   a few problems of every step, whole trees: tokens, log-probs, entropies, FCI,
                    branch points, advantages
    curves.png      drawn at every evaluation; explorer.html at the end (tools/view.py)
    step-N/         checkpoints, see checkpoint.py; the links last and best point to two of them

Nothing here changes what is trained.

    python -m pytest tests/runtime/test_runlog.py
"""

import html
import importlib
import json
import math
import time
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import transformers

from fci import separator_tokens, split_steps
from runtime.checkpoint import flush, hold, release
from runtime.cli import UserError, first_line
from runtime.dist import rank
from runtime.metrics import Outcomes, batch_notices, empty_batch_lines, leaf_ends, mean
from runtime.rewards import response_texts
from sampler import problem_fci, solve_rate

LOGS = ("metrics.jsonl", "batches.jsonl", "samples.jsonl")


def open_tensorboard(folder: Path, config, first_step: int):
    """(write metrics, write text, close) of TensorBoard events. Earlier logs from `first_step` on
    are discarded."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def track(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record["step"])
        writer.flush()

    def tell(name: str, text: str, step: int) -> None:  # as a block of code: it is not markdown
        writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    return track, tell, writer.close


def open_wandb(folder: Path, config, first_step: int):
    """The same for Weights & Biases, in project "attnrl". Every start is a new wandb run; wandb's
    settings say where data is sent (WANDB_MODE=offline)."""
    import wandb

    run = wandb.init(project="attnrl", name=folder.name, dir=str(folder), config=asdict(config))

    def tell(name: str, text: str, step: int) -> None:
        run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    return lambda record: run.log(record, step=record["step"]), tell, run.finish


# name -> (module, function that opens it)
TRACKERS = {
    "tensorboard": ("torch.utils.tensorboard", open_tensorboard),
    "wandb": ("wandb", open_wandb),
}


def token_texts(tokenizer, tokens: list[int]) -> list[str]:
    """The text of every token; joined, they are the whole text. A character of several tokens
    belongs to the last of them."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    # tokens[start:done] are known: some tokenizers write a token differently at the beginning
    texts, start, done = [], 0, 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[start:end])
        if text.endswith("\ufffd") and end < min(len(tokens), done + 8):  # half a character
            texts.append("")
        else:
            texts.append(text[len(decode(tokens[start:done])) :])
            start, done = done, end
    return texts


def records_until(path: Path, step: int) -> list[str]:
    """The lines of a log up to this step, and up to the first line that is not a record."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            break
    return kept


def check_folder(config) -> None:
    """Raises UserError for an --out or --track that cannot work, before anything is loaded. Changes
    nothing."""
    if config.track in TRACKERS:
        try:
            importlib.import_module(TRACKERS[config.track][0])
        except ImportError as error:
            raise UserError(
                f"--track {config.track}: pip install {config.track} ({first_line(error)})"
            ) from error
    path = Path(config.out)
    try:
        if not config.out or not path.exists() or not any(path.iterdir()):
            return
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made a folder ({error.strerror})") from error
    if config.resume != "auto":
        raise UserError(
            f"--out {path}: is not empty; give another folder, remove it, or (if it is this run's)"
            " --resume auto"
        )
    if not (path / "config.json").exists():
        raise UserError(
            f"--out {path}: is not empty, and has no config.json of a run to go on with; give"
            " another folder"
        )
    if not rank():
        hold(path)


class RunFolder:
    """The folder of a run. An existing run is never overwritten. Raises UserError if the folder
    cannot be made. Only rank 0 writes; on the other ranks `path` is None."""

    def __init__(self, config, say=lambda text: None):
        self.path, self.config, self.tracker = None, config, None
        self.separators = None  # of the tokenizer, read when the first problem is logged
        if rank():
            return
        name = f"{config.preset}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = Path(config.out or f"runs/{name}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            going_on = config.resume == "auto" and (self.path / "config.json").exists()
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            settings = asdict(config) | {"out": str(self.path), "versions": versions}
            # "x": if two runs start at once, only the first gets the folder
            with (self.path / "config.json").open("w" if going_on else "x") as file:
                file.write(json.dumps(settings, indent=2) + "\n")
            hold(self.path)
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be made a folder ({error.strerror})"
            ) from error
        if not going_on:
            say(f"run folder: {self.path}")  # said now: a killed run prints nothing at its end

    def log(self, name: str, record: dict) -> None:
        """Write one JSON line; it is on the disk before the next step begins."""
        if rank():
            return
        if name == "metrics.jsonl":
            self.track(record)
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            flush(self.path / name)
        # e.g. the disk is full; a resumed run drops an incomplete line
        except OSError as error:
            raise UserError(
                f"{self.path / name}: cannot be written ({error.strerror}); correct that, then the"
                f" same command with --out {self.path} --resume auto goes on from the newest"
                " checkpoint"
            ) from error

    def track(self, record: dict) -> None:
        """Send the same metrics to TensorBoard or Weights & Biases, if --track asks for it."""
        if self.config.track in TRACKERS:
            if not self.tracker:
                _, start = TRACKERS[self.config.track]
                self.tracker = start(self.path, self.config, record["step"])
            self.tracker[0](record)

    def close(self, display) -> None:
        """Draw the explorer and close the tracker: it may still have data to send, and with several
        ranks the process ends at once (cli.leave)."""
        self.draw("explorer", display.say)
        if self.tracker:
            self.tracker[2]()
        if not rank():
            release(self.path)
        display.close()

    def write_start(self, tested: dict, run) -> None:
        """Write the evaluation before training: step 0."""
        run.monitor.display.say(
            f"before training   test {100 * tested['test_accuracy']:.1f} %"
            f" (avg@{self.config.eval_samples}, {len(run.test_problems)} problems)"
        )
        for line in run.monitor.explanation:
            run.monitor.display.say(f"                  {line}")
        if (count := len(run.test_problems)) < 30:  # 95 % of a difference of two shares, at most
            points = min(100, round(196 * math.sqrt(0.5 / count)))
            run.monitor.display.say(
                f"                  {count} problems: a change of less than {points} points may be"
                " chance"
            )
        record = {"step": 0, "generated_tokens": 0, **tested, "seconds/total": 0.0}
        self.log("metrics.jsonl", record)

    def write_step(self, record: dict, result, display, tokenizer, leaves) -> None:
        """Write one step to files and terminal. result: attnrl.StepResult; leaves(group): the
        training sequences of a group."""
        step, groups = record["step"], result.groups
        self.log("metrics.jsonl", record)
        self.write_batch(step, groups)
        for i, group in enumerate(groups[: self.config.log_samples]):
            self.write_sample(step, i, group, leaves(group), tokenizer)
        if "test_accuracy" in record:
            self.draw("curves", display.say)
        display.step(record)
        for notice in batch_notices(self.config, groups, result.sequences):
            display.say(f"step {step:>4}   {notice}", "warning")
        if not any(any(s.advantages) for s in result.sequences):
            for line in empty_batch_lines(
                self.config, groups, lambda tokens: response_texts(tokenizer, [tokens])[0]
            ):
                display.say(f"            {line}", "warning")

    def write_batch(self, step: int, groups: list) -> None:
        """Write every problem of a step: its difficulty, whether and how often it was expanded, and
        the outcomes."""
        problems = []
        for g in groups:
            ends = [end for r in g.responses for end in (r, *r.continuations)]
            rewards, outcomes = [end.reward for end in ends], Outcomes()
            for end in ends:
                outcomes.add(end.reward, end.boxed, end.finished)
            problems.append(
                {
                    "number": g.number,
                    "rate": solve_rate([r.reward for r in g.responses]),
                    "fci": problem_fci([r.fci for r in g.responses]),
                    "filtered": g.filtered,
                    "trees": g.trees(),
                    "leaves": len(rewards),
                    "reward": mean(rewards),
                    "outcomes": vars(outcomes),
                }
            )
        record = {"step": step, "easy_mean": groups[0].easy_mean, "problems": problems}
        self.log("batches.jsonl", record)

    def write_sample(self, step: int, index: int, group, leaves: list, tokenizer) -> None:
        """Write a problem with its whole tree. leaves: its training sequences, in tree.py order."""
        if rank():
            return
        if self.tracker:
            name = f"samples/{index + 1}"
            self.tracker[1](name, sampled_text(group, tokenizer), step)
        self.separators = self.separators or separator_tokens(tokenizer)
        of_end = {id(end): leaf for end, leaf in zip(leaf_ends(group.responses), leaves)}
        responses = []
        for r in group.responses:
            own = ending(r, of_end[id(r)], tokenizer)
            endings = [
                {"at": c.at, **ending(c, of_end[id(c)], tokenizer)}
                | {"bounds": new_bounds(r, c, self.separators)}
                for c in r.continuations
            ]
            own |= {"bounds": r.bounds, "fci": r.fci, "branch_points": r.branch_points}
            own |= {"attention": r.attention} if r.attention else {}
            own["continuations"] = sorted(endings, key=lambda c: c["at"])
            responses.append(own)
        self.log(
            "samples.jsonl",
            {
                "step": step,
                "number": group.number,
                "problem": group.problem.text,
                "answers": group.problem.answers,
                "filtered": group.filtered,
                "responses": responses,
            },
        )

    def forget_after(self, step: int) -> float:
        """Drop what was logged after the checkpoint that is resumed (and an incomplete line of a
        killed run). Returns the seconds that the run had taken until then."""
        spent = 0.0
        for name in LOGS if rank() == 0 else ():
            path = self.path / name
            if not path.exists():
                continue
            try:
                kept = records_until(path, step)
                fresh = path.with_name(f".{name}.new")
                fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                flush(fresh)
                fresh.replace(path)
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be cut back to step {step} ({error.strerror})"
                ) from error
            if kept and name == "metrics.jsonl":
                spent = float(json.loads(kept[-1]).get("seconds/total", 0.0))
        return spent

    def draw(self, what: str, say) -> None:
        """Draw "curves" or the "explorer". A drawing that fails, for any reason, must not end a
        run."""
        if rank() == 0:
            try:
                from tools.view import draw_curves, write_explorer

                how = draw_curves if what == "curves" else write_explorer
                how(self.path)
            except Exception as error:
                say(f"no drawing: {first_line(error)}", "warning")


def sampled_text(group, tokenizer) -> str:
    """A problem with its initial responses, as text for a tracker."""
    texts = response_texts(tokenizer, [r.tokens for r in group.responses])
    parts = [f"problem {group.number}, answer {' or '.join(group.problem.answers)}"]
    parts.append(group.problem.text)
    for i, (r, text) in enumerate(zip(group.responses, texts), 1):
        why = ("" if r.boxed else ", no box") + ("" if r.finished else ", cut off")
        parts.append(f"-- r{i}: reward {r.reward:g}{why}\n{text}")
    return "\n\n".join(parts)


def new_bounds(response, continuation, separators) -> list[int]:
    """The steps of a continuation, as tokens of the whole path: its beginning, and the cuts after
    it. The whole path decides whether steps end at blank lines or at single newlines."""
    at, tokens = continuation.at, response.tokens[: continuation.at] + continuation.tokens
    return [at, *(cut for cut in split_steps(tokens, separators) if cut > at)]


def ending(end, leaf, tokenizer) -> dict:
    """A response or a continuation, for samples.jsonl. leaf: its training sequence. Equal
    advantages in a row are stored as [number of tokens, advantage]."""
    return {
        "tokens": token_texts(tokenizer, end.tokens),
        "logprobs": [round(x, 4) for x in end.logprobs],
        "entropies": [round(x, 4) for x in end.entropies],
        "reward": end.reward,
        "boxed": end.boxed,
        "finished": end.finished,
        "advantages": [(len(list(run)), value) for value, run in groupby(leaf.advantages)],
    }
