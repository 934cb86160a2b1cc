"""runlog.py: what a run measures, writes and shows. Nothing here changes what is trained.

A run's folder:
    config.json     the resolved configuration and the versions that ran it
    metrics.jsonl   one line per step; every key is explained in the README
    batches.jsonl   one line per step: every problem's difficulty, FCI, whether it was filtered,
                    trees, leaves
    samples.jsonl   a few problems of every step, whole trees: tokens, log-probs, entropies, FCI,
                    branch points, advantages
    curves.png      drawn by view.py at every evaluation; explorer.html at the end, or by python
                    view.py runs/NAME
    step-N/         checkpoints, see checkpoint.py; the links last and best lead to the newest and
                    the best

    python -m pytest tests/test_attnrl.py
"""

import importlib
import json
import math
import os
import signal
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from checkpoint import flush
from dist import rank
from errors import UserError, first_line
from sampler import is_correct, problem_fci, solve_rate

FAULTS = ("timeout", "died", "error")  # of grading: such a response counts as wrong


def mean(values) -> float:
    """Mean of any iterable, 0 when it is empty."""
    values = list(values)
    return statistics.fmean(values) if values else 0.0


def outcome_ratios(name: str, groups: list[list[float]]) -> dict[str, float]:
    """Reward and shares of problems whose responses are all right, all wrong, or mixed (valid: they
    can teach)."""
    solved = [[is_correct(r) for r in rewards] for rewards in groups if rewards]
    return {
        f"{name}/reward": mean(r for rewards in groups for r in rewards),
        f"{name}/solve_all": mean(all(row) for row in solved),
        f"{name}/solve_none": mean(not any(row) for row in solved),
        f"{name}/valid": mean(any(row) and not all(row) for row in solved),
    }


def batch_metrics(batch, sequences) -> dict[str, float]:
    """Both samplings of one batch, and what is left of them for training."""
    responses = [r for group in batch.groups for r in group.responses]
    leaves = len(responses) + sum(len(r.continuations) for r in responses)
    trained = sum(len(s.tokens) for s in sequences)
    sampled = sum(
        len(r.tokens) + sum(c.at + len(c.tokens) for c in r.continuations) for r in responses
    )
    return {
        **outcome_ratios(
            "initial", [[r.reward for r in group.responses] for group in batch.groups]
        ),
        **outcome_ratios(
            "mc",
            [
                [c.reward for r in group.responses for c in r.continuations]
                for group in batch.groups
            ],
        ),
        "problems": len(batch.groups),
        "filtered_ratio": mean(group.filtered for group in batch.groups),
        "trees": mean(len(group.branch_points) for group in batch.groups if not group.filtered),
        "leaves": leaves,
        "sequences": len(sequences),
        "valid_tokens": trained,
        "valid_token_ratio": trained / max(1, sampled),
        "response_length": mean(len(r.tokens) for r in responses),
        "steps_per_response": mean(len(r.bounds) - 1 for r in responses),
        "cut_off": sum(group.cut for group in batch.groups) / max(1, len(responses)),
        "entropy": mean(e for r in responses for e in r.entropies),
        "fci": mean(y for r in responses for y in r.fci),
    }


@dataclass
class Gap:
    """|engine's log-prob - learner's log-prob| over a step's tokens. Sums, not a list: a step may
    sample 15 M tokens."""

    total: float = 0.0
    tokens: int = 0
    largest: float = 0.0

    @classmethod
    def sum(cls, gaps) -> "Gap":
        return cls(
            sum(g.total for g in gaps), sum(g.tokens for g in gaps), max(g.largest for g in gaps)
        )

    def add(self, engine: list[float], learner: list[float]) -> None:
        gaps = [abs(a - b) for a, b in zip(engine, learner)]
        self.total += sum(gaps)
        self.tokens += len(gaps)
        self.largest = max(self.largest, *gaps, 0.0)


def open_tensorboard(folder: Path, config, first_step: int):
    """(write, close): write a step's metrics as TensorBoard events. What was logged from
    `first_step` on is void."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def track(record: dict) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, record["step"])
        writer.flush()

    return track, writer.close


def open_wandb(folder: Path, config, first_step: int):
    """The same for Weights & Biases, in project "attnrl", a run of its own each time it starts;
    where it sends what is up to its own settings (WANDB_MODE=offline)."""
    import wandb

    run = wandb.init(project="attnrl", name=folder.name, dir=str(folder), config=asdict(config))
    return lambda record: run.log(record, step=record["step"]), run.finish


# module, its use
TRACKERS = {
    "tensorboard": ("torch.utils.tensorboard", open_tensorboard),
    "wandb": ("wandb", open_wandb),
}


def token_texts(tokenizer, tokens: list[int]) -> list[str]:
    """The text of every token; joined they are the text of all. A character of several tokens
    stands at the last of them."""
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


def check_folder(config) -> None:
    """Raises UserError for an --out or --track that cannot be, before anything is loaded. Touches
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


class RunFolder:
    """A fresh folder; an existing run is never written over. Raises UserError if it cannot be made.
    Only rank 0 writes; of the other ranks `path` is None."""

    def __init__(self, config, say=lambda text: None):
        self.path, self.config, self.tracker = None, config, None
        if rank():
            return
        self.path = Path(
            config.out or f"runs/{config.preset}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            going_on = config.resume == "auto" and (self.path / "config.json").exists()
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            # "x": the first of two gets it
            with (self.path / "config.json").open("w" if going_on else "x") as file:
                file.write(
                    json.dumps(
                        asdict(config) | {"out": str(self.path), "versions": versions}, indent=2
                    )
                    + "\n"
                )
        except OSError as error:
            raise UserError(
                f"--out {self.path}: cannot be made a folder ({error.strerror})"
            ) from error
        if not going_on:
            say(f"run folder: {self.path}")  # at once: a run that is killed has no last line

    def append(self, name: str, record: dict) -> None:
        """One JSON line, on the disk before the next step begins."""
        if rank():
            return
        if name == "metrics.jsonl" and self.config.track in TRACKERS:
            self.tracker = self.tracker or TRACKERS[self.config.track][1](
                self.path, self.config, record["step"]
            )
            self.tracker[0](record)
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            flush(self.path / name)
        # the disk is full, say; half a line is dropped when the run goes on
        except OSError as error:
            raise UserError(
                f"{self.path / name}: cannot be written ({error.strerror}); mend that, then the"
                f" same command with --out {self.path} --resume auto goes on from the newest"
                " checkpoint"
            ) from error

    def close(self) -> None:
        """A tracker may have something left to send, and with several ranks the way out is a short
        one (errors.leave)."""
        if self.tracker:
            self.tracker[1]()

    def write_batch(self, step: int, groups: list, trainer) -> None:
        """Every problem of a step: its difficulty, whether and how often it was expanded, what came
        of it; and a few with their whole trees."""
        self.append(
            "batches.jsonl",
            {
                "step": step,
                "easy_mean": groups[0].easy_mean,
                "problems": [
                    {
                        "number": g.number,
                        "rate": solve_rate([r.reward for r in g.responses]),
                        "fci": problem_fci([r.fci for r in g.responses]),
                        "filtered": g.filtered,
                        "trees": len(g.branch_points),
                        "leaves": len(rewards),
                        "reward": mean(rewards),
                    }
                    for g in groups
                    for rewards in [[e.reward for r in g.responses for e in (r, *r.continuations)]]
                ],
            },
        )
        for group in groups[: trainer.config.log_samples] if rank() == 0 else ():
            self.write_sample(step, group, trainer.leaves(group), trainer.tokenizer)

    def write_sample(self, step: int, group, leaves: list, tokenizer) -> None:
        """A problem with its whole tree. leaves: its training sequences, in tree.py's order."""
        left = iter(leaves)

        # of a response or a continuation; a run of equal advantages is [tokens, advantage]
        def what(end):
            runs = [(len(list(equal)), value) for value, equal in groupby(next(left).advantages)]
            return {
                "tokens": token_texts(tokenizer, end.tokens),
                "logprobs": [round(x, 4) for x in end.logprobs],
                "entropies": [round(x, 4) for x in end.entropies],
                "reward": end.reward,
                "advantages": runs,
            }

        responses = []
        for i, r in enumerate(group.responses):
            own = what(r)
            # the order of the leaves (tree.response_chain)
            latest_first = sorted(r.continuations, key=lambda c: -c.at)
            endings = sorted(({"at": c.at, **what(c)} for c in latest_first), key=lambda c: c["at"])
            responses.append(
                own
                | {
                    "bounds": r.bounds,
                    "fci": r.fci,
                    "branch_points": group.branch_points.get(i, []),
                    "continuations": endings,
                }
            )
        self.append(
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
        """Drop what a run logged after the checkpoint that it goes on from (and half a line, where
        it was killed). Returns the seconds that it had taken until then."""
        spent = 0.0
        for name in ("metrics.jsonl", "batches.jsonl", "samples.jsonl") if rank() == 0 else ():
            path, kept = self.path / name, []
            try:
                for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                    try:
                        kept += [line] if json.loads(line)["step"] <= step else []
                    except (ValueError, KeyError, TypeError):
                        break
                if path.exists():
                    fresh = path.with_name(f".{name}.new")
                    fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                    flush(fresh)
                    fresh.replace(path)
                if kept and name == "metrics.jsonl":
                    spent = float(json.loads(kept[-1]).get("seconds/total", 0.0))
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be cut back to step {step} ({error.strerror})"
                ) from error
        return spent

    def draw(self, say, how) -> None:
        """how: view.draw_curves or view.write_explorer. A drawing that fails, whatever the reason,
        must not end a run."""
        if rank() == 0:
            try:
                how(self.path)
            except Exception as error:
                say(f"no drawing: {first_line(error)}", "warning")


def stop_on_signals():
    """A function that says whether Ctrl-C or SIGTERM has asked the run to stop after this step. The
    second one leaves at once: what is on the disk is whole at every moment."""
    asked = []

    def ask(number, _):
        if asked:
            os._exit(128 + number)
        asked.append(number)
        # print is not safe inside a signal handler
        os.write(2, b"\nstopping after this step (once more: at once)\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return lambda: bool(asked)


LEVELS = ("debug", "info", "warning")


class Display:
    """The terminal: a bar with the current phase and the time left, one line per step; plain lines
    when piped. Only rank 0 has one. Lines below `level` are not shown; quiet: no bar, and warnings
    only."""

    def __init__(self, steps: int, level: str = "info", quiet: bool = False):
        self.steps, self.quiet, self.done = steps, quiet, 0  # done: by the run that is resumed
        self.level = "warning" if quiet else level
        self.tested = ""  # the newest test accuracy stays in sight
        # made at the first phase: until then errors have the terminal to themselves
        self.bar: tqdm | None = None

    def phase(self, name: str) -> None:
        if rank():
            return
        if self.bar is None:
            self.bar = tqdm(
                total=self.steps,
                initial=self.done,
                unit="step",
                disable=self.quiet or None,
                dynamic_ncols=True,
                leave=False,
            )
        self.bar.set_description_str(name)

    def say(self, text: str, level: str = "info") -> None:
        if rank() == 0 and LEVELS.index(level) >= LEVELS.index(self.level):
            tqdm.write(text)

    def step(self, m: dict) -> None:
        test = ""
        if "test_accuracy" in m:
            test = f"   test {100 * m['test_accuracy']:5.1f} %"
            self.tested = f", test {100 * m['test_accuracy']:.1f} %"
        self.say(
            f"step {m['step']:>4}   reward {m['initial/reward']:.3f}   {m['problems']:>3} problems,"
            f" {m['sequences']:>4} sequences trained   {m['generated_tokens'] / 1e6:6.2f} M tokens "
            f"  {m['seconds/step']:5.1f} s{test}"
        )
        split = [
            f"{key.removeprefix('seconds/')} {m[key]:.2f} s"
            for key in m
            if key.startswith("seconds/")
        ]
        self.say(f"            {', '.join(split)}", "debug")
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(f"reward {m['initial/reward']:.2f}{self.tested}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# --------------------------------------------------------------------------------------------------
# Failures with a name
# --------------------------------------------------------------------------------------------------
@contextmanager
def say_out_of_memory(phase: str):
    """Out of memory, on a GPU or a CPU, is one line that names what to lower; every other error
    passes."""
    try:
        yield
    # CUDA's own type is a RuntimeError; the CPU allocator's is nothing else
    except (RuntimeError, MemoryError) as error:
        if not isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        engine = "--rollout_tokens (vLLM on a GPU: --engine_memory)"
        lower = {
            "generate": engine,
            "evaluate": engine,
            "sync": engine,
            "score": "--token_budget",
            "train": "--token_budget, or --activation_checkpointing true, or --cpu_offload true",
        }.get(phase, "--batch_size")
        raise UserError(
            f"out of memory in phase '{phase}': lower {lower}; --resume auto --resume_changed true"
            f" goes on from the newest checkpoint ({first_line(error)})"
        ) from error


def uniform_fci(prompt_length: int, bounds: list[int], delta: int = 4) -> list[float]:
    """The FCI of attention that has collapsed: every query spread evenly over all tokens up to
    itself.

    It falls with k (early steps have more later ones), which is why collapse cannot be seen from
    FCI alone.
    """
    rows = [
        sum(1 / (prompt_length + q + 1) for q in range(a, b)) / (b - a)
        for a, b in zip(bounds, bounds[1:])
    ]
    return [0.0 if k == 0 else math.fsum(rows[k + delta :]) for k in range(len(rows))]


def fci_spread(scores: list[list[float]], uniform: list[list[float]]) -> float | None:
    """How much FCI tells of the steps: the median over responses of the relative spread (std /
    mean) of their scores, both as they are and in units of `uniform` (`uniform_fci`), whichever is
    smaller. None: too few steps to say.

    Near 0: all steps score alike, or exactly as under attention that looks everywhere alike.
    """

    def spread(values: list[float]) -> float:
        return statistics.pstdev(values) / statistics.fmean(values)

    rows = [[(y, u) for y, u in zip(ys, us) if y > 0] for ys, us in zip(scores, uniform)]
    found = [
        min(spread([y for y, _ in row]), spread([y / u for y, u in row]))
        for row in rows
        if len(row) >= 3
    ]
    return statistics.median(found) if found else None


def notices(
    problems: int, expanded: int | None, kept: int, spread: float | None, inert: bool = False
) -> list[str]:
    """What a person should know about this batch: one line each, none if all is well.

    expanded: problems with a branch point (None: the method has none); kept: training sequences;
    spread: `fci_spread`; inert: no step of any response has a positive FCI.
    """
    found = []
    if inert:
        found.append(
            "FCI is inert: every step scores 0, for no response has more than Delta + 1 steps;"
            " lower --delta"
        )
    if spread is not None and spread < 0.05:
        found.append(
            f"attention collapse: FCI is nearly uniform (relative spread {spread:.3f}); "
            "branch points are arbitrary"
        )
    if expanded == 0:
        found.append(
            f"none of {problems} problems is branched (all filtered, or no response has two steps):"
            " no continuations"
        )
    if kept == 0:
        found.append(
            f"empty batch: all leaves of all {problems} problems agree, nothing to train on; "
            "the batch size is held (problems too easy or too hard for this policy)"
        )
    return found


def batch_notices(config, batch, sequences) -> list[str]:
    """The notices of a finished batch."""
    scored = [
        (g.problem, r)
        for g in batch.groups
        for r in g.responses
        if r.fci and config.branch == "fci"
    ]
    spread = fci_spread(
        [r.fci for _, r in scored],
        [uniform_fci(len(p.prompt_ids), r.bounds, config.delta) for p, r in scored],
    )
    inert = bool(scored) and not any(y for _, r in scored for y in r.fci)
    expanded = (
        sum(bool(g.branch_points) for g in batch.groups) if config.advantage == "tree" else None
    )
    return notices(len(batch.groups), expanded, len(sequences), spread, inert)
