"""metrics.py: the metrics of a training step, and messages to the user about them.

Nothing here changes what is trained. Every key of metrics.jsonl is explained in docs/runs.md.

    python -m pytest tests/runtime/test_metrics.py
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from runtime.cli import plain
from runtime.data import is_toy
from sampler import is_correct
from tree import Continuation, Response

FAULTS = ("timeout", "died", "error")  # of grading: the response then counts as wrong


def mean(values) -> float:
    """Mean of any iterable, 0 when it is empty."""
    values = list(values)
    return statistics.fmean(values) if values else 0.0


def outcome_ratios(name: str, groups: list[list[float]]) -> dict[str, float]:
    """Reward, and shares of problems whose responses are all right, all wrong, or mixed ("valid":
    they give a learning signal). spread: mean of sqrt(z (1 - z)), with z the share of right
    responses: how much there is to learn (arXiv 2505.18917)."""
    solved = [[is_correct(r) for r in rewards] for rewards in groups if rewards]
    return {
        f"{name}/reward": mean(r for rewards in groups for r in rewards),
        f"{name}/solve_all": mean(all(row) for row in solved),
        f"{name}/solve_none": mean(not any(row) for row in solved),
        f"{name}/valid": mean(any(row) and not all(row) for row in solved),
        f"{name}/spread": mean(math.sqrt(mean(row) * (1 - mean(row))) for row in solved),
    }


def leaf_ends(responses: list[Response]) -> list[Response | Continuation]:
    """The end of each leaf, in the order of `tree.tree_sequences`: each response, followed by its
    continuations, those from the latest branch point first."""
    ends: list[Response | Continuation] = []
    for r in responses:
        ends += [r, *sorted(r.continuations, key=lambda c: -c.at)]
    return ends


def batch_metrics(groups: list, sequences: list) -> dict[str, float]:
    """Initial responses and continuations of one batch, and the part that is trained. groups: of
    all ranks."""
    responses = [r for group in groups for r in group.responses]
    continuations = [c for r in responses for c in r.continuations]
    valid = sum(len(s.tokens) for s in sequences if any(s.advantages))
    sampled = sum(len(r.tokens) for r in responses)
    sampled += sum(c.at + len(c.tokens) for c in continuations)
    initial = [[r.reward for r in group.responses] for group in groups]
    monte_carlo = [[c.reward for r in group.responses for c in r.continuations] for group in groups]
    return {
        **outcome_ratios("initial", initial),
        **outcome_ratios("mc", monte_carlo),
        "problems": len(groups),
        "filtered_ratio": mean(group.filtered for group in groups),
        "trees": mean(group.trees() for group in groups if not group.filtered),
        "leaves": len(responses) + len(continuations),
        "sequences": len(sequences),
        "valid_tokens": valid,
        "valid_token_ratio": valid / max(1, sampled),
        "response_length": mean(len(r.tokens) for r in responses),
        "steps_per_response": mean(len(r.bounds) - 1 for r in responses),
        "cut_off": mean(not r.finished for r in responses),
        "entropy": mean(e for r in responses for e in r.entropies),
        "fci": mean(y for r in responses for y in r.fci),
    }


def step_metrics(run, step: int, result) -> dict:
    """One line of metrics.jsonl, over all ranks; resets the counts. run: attnrl.Run, result:
    attnrl.StepResult. Every rank must call it."""
    counts, run.reward.counts = run.reward.counts, Counter()
    return {
        "step": step,
        **batch_metrics(result.groups, result.sequences),
        "wanted_problems": run.adaptive_batch.size,
        **result.stats.logged(),
        "train/lr": run.learner.optimizer.param_groups[0]["lr"],
        **run.monitor.record(counts, run.config.sync_tolerance),
    }


@dataclass
class TrainStats:
    """Statistics of `Learner.train`: first sums over tokens, then means over all trained tokens of
    all mini-batches and ranks (grad_norm: over updates)."""

    loss: float = 0.0
    policy_loss: float = 0.0
    kl: float = 0.0
    clip_fraction: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0
    grad_norm: float = 0.0  # before clipping
    tokens: int = 0  # of the updates that were made
    updates: int = 0
    skipped_updates: int = 0  # gradients that were not finite

    def add(self, other: "TrainStats") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def mean(cls, shares: list["TrainStats"]) -> "TrainStats":
        """Means, from the sums of all ranks. All ranks have the same token and update counts."""
        first = shares[0]
        found = cls(**vars(first))
        for name in ("loss", "policy_loss", "kl", "clip_fraction", "ratio", "ratio_squared"):
            total = sum(getattr(share, name) for share in shares)
            setattr(found, name, total / max(1, first.tokens))
        found.grad_norm /= max(1, first.updates - first.skipped_updates)
        return found

    def logged(self) -> dict[str, float]:
        """For metrics.jsonl. ess: effective sample size of the ratios, (sum r)^2 / (n sum r^2):
        1 where all are equal, 1 / n where one token outweighs all others."""
        values = {f"train/{name}": value for name, value in vars(self).items()}
        squared = values.pop("train/ratio_squared")
        return values | {"train/ess": self.ratio**2 / squared if squared else 0.0}


@dataclass
class Outcomes:
    """The outcomes of a number of responses. Each response is counted once."""

    right: int = 0
    ungraded: int = 0  # the grader failed: counted as wrong
    unboxed: int = 0  # no answer to grade
    unboxed_cut: int = 0  # the same, and cut off at the length limit
    wrong: int = 0  # an answer, but not a right one

    def add(self, reward: float, boxed: bool, finished: bool, error: str = "") -> None:
        if is_correct(reward):
            self.right += 1
        elif error:
            self.ungraded += 1
        elif boxed:
            self.wrong += 1
        elif finished:
            self.unboxed += 1
        else:
            self.unboxed_cut += 1

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @classmethod
    def sum(cls, shares) -> "Outcomes":
        columns = zip(*(vars(share).values() for share in shares))
        return cls(*map(sum, columns))

    def __str__(self) -> str:
        none = self.unboxed + self.unboxed_cut
        return (
            f"of {self.total} responses {self.right} right, {none} without an answer to grade"
            f" ({self.unboxed_cut} of them cut off), {self.wrong} wrong, {self.ungraded} could not"
            " be graded"
        )

    def advice(self, reward: str, length: str, suffix: str) -> list[str]:
        """Options to change, for each fault that at least a tenth of the responses have. reward:
        --reward; length: the option that limits a response; suffix: the end of every prompt."""
        found, tenth = [], max(1, self.total / 10)
        if self.unboxed >= tenth:
            asked = r"\boxed" in suffix
            told = "no box, although every prompt asks for one: warm the model up (recipes/sft.py)"
            looser = ", or grade the last number: --reward boxed_or_number"
            found.append(
                (told if asked else "no box: ask for one with --prompt_suffix")
                + (looser if reward in ("boxed", "eval:grade") else "")
            )
        if self.unboxed_cut >= tenth:
            found.append(f"cut off before an answer: raise --{length}")
        if self.ungraded >= tenth:
            found.append("could not be graded: see grading/* in metrics.jsonl")
        if not self.right and self.wrong >= tenth:
            found.append(
                "nothing is right: no response can teach. Take easier problems, another --reward,"
                " or warm the model up first (recipes/sft.py)"
            )
        return found


Example = tuple[str, list[str]] | None  # a response that is not right, and the right answers


def outcome_lines(
    outcomes: Outcomes, example: Example, reward: str, length: str, suffix: str = ""
) -> list[str]:
    """Explain the reward: counts, a shortened response that is not right, options to change."""
    lines = [str(outcomes)]
    if example:
        text, answers = example
        right = shortened(" or ".join(answers), 40)
        lines.append(f"one that is not right: {shortened(text)} (right: {right})")
    return lines + outcomes.advice(reward, length, suffix)


def prompt_end(config) -> str:
    """What every prompt of a run ends in: nothing on the toy."""
    return "" if is_toy(config.problems) else config.prompt_suffix


def shortened(text: str, width: int = 160) -> str:
    """The beginning and the end of a response, in one line."""
    text = plain(" ".join(text.split()))
    if len(text) <= width:
        return text
    return f"{text[: width // 2 - 3]} ... {text[-width // 2 + 2 :]}"


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


# --------------------------------------------------------------------------------------------------
# Notices about failures
# --------------------------------------------------------------------------------------------------
def uniform_fci(prompt_length: int, bounds: list[int], delta: int = 4) -> list[float]:
    """The FCI of collapsed attention: every query attends evenly to all tokens up to itself.

    It falls with k (early steps have more later steps), so collapse cannot be seen from FCI
    alone.
    """
    rows = [
        sum(1 / (prompt_length + q + 1) for q in range(a, b)) / (b - a)
        for a, b in zip(bounds, bounds[1:])
    ]
    return [0.0 if k == 0 else math.fsum(rows[k + delta :]) for k in range(len(rows))]


def fci_spread(scores: list[list[float]], uniform: list[list[float]]) -> float | None:
    """How much FCI distinguishes the steps: the median over responses of the relative spread (std /
    mean) of their scores, or of their scores divided by `uniform` (`uniform_fci`), whichever is
    smaller. None: too few steps.

    Near 0: all steps have the same score, or the score that uniform attention would give.
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
    problems: int,
    expanded: int | None,
    kept: int,
    spread: float | None,
    inert: bool = False,
    dropped: bool = True,
) -> list[str]:
    """What the user should know about this batch: one line for each notice, none if all is well.

    expanded: number of problems with a branch point (None: the method has none); kept: number of
    sequences with an advantage; spread: `fci_spread`; inert: no step of any response has a positive
    FCI; dropped: sequences without an advantage are not trained.
    """
    found = []
    if inert:
        found.append(
            "FCI is inert: every step scores 0, for no response has more than Delta + 1 steps;"
            " lower --delta, or, at 1, take problems with longer solutions"
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
            f"empty batch: all leaves of all {problems} problems agree, "
            + (
                "nothing to train on; the batch size is held"
                if dropped
                else "nothing to learn: what this update does comes from the KL term and AdamW"
            )
        )
    return found


def batch_notices(config, groups: list, sequences: list) -> list[str]:
    """The notices of a finished batch."""
    scored = [
        (g.problem, r)
        for g in groups
        for r in g.responses
        if r.fci and config.branch.startswith("fci")
    ]
    uniform = [uniform_fci(len(p.prompt_ids), r.bounds, config.delta) for p, r in scored]
    spread = fci_spread([r.fci for _, r in scored], uniform)
    inert = bool(scored) and not any(y for _, r in scored for y in r.fci)
    expanded = sum(g.trees() > 0 for g in groups) if config.branches() else None
    kept = sum(any(s.advantages) for s in sequences)
    return notices(len(groups), expanded, kept, spread, inert, config.ads_drop)


def empty_batch_lines(config, groups: list, text_of) -> list[str]:
    """Why does no leaf of the batch have an advantage? text_of(tokens): text of a response."""
    outcomes, example = Outcomes(), None
    for group, response in ((g, r) for g in groups for r in g.responses):
        outcomes.add(response.reward, response.boxed, response.finished)
        if not example and not is_correct(response.reward):
            example = text_of(response.tokens), group.problem.answers
    suffix = prompt_end(config)
    return outcome_lines(outcomes, example, config.reward, "max_response", suffix)
