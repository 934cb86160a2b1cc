"""sampler.py: adaptive sampling (ADS): which problems to expand, how many trees, how many problems.

Monte Carlo continuations are wasted on problems that the policy always or never solves: their
leaves all have the same reward, and nothing is learnt. ADS first looks at the G initial responses.
The difficulty z of a problem is the fraction of them that are right.

Equations (AttnRL):

    Eq. 8    filter: a problem with z = 1 is expanded only if its mean FCI is not below the average
             of all z = 1 problems so far ("so far": the authors' code). With low attention between
             steps, solving it is routine; with high attention, it may still go wrong.
    Eq. 9    trees = Round(exp(-z) * G): hard problems get more trees
    Eq. 10   B_m = Round(lam * B_{m-1} + (1 - lam) * (B' / B'') * B_{m-1}): B' training sequences
             are wanted, B'' were kept

If a batch is empty or FCI collapses, the run says so (runtime/metrics.py). Left out: filters on
difficulties other than z = 1 (they were worse in the paper's ablation).

    python -m pytest tests/test_sampler.py
"""

import math
import random
import statistics
from dataclasses import dataclass


def round_half_up(x: float) -> int:
    """Round as in the paper's formulas, with halves up. Python's round() rounds halves to the even
    neighbour: 0.5 to 0, 2.5 to 2."""
    return math.floor(x + 0.5)


# -------- Which problems, how many trees, which responses ----------------------------------------
def is_correct(reward: float) -> bool:
    """The default reward is 0 or 1. If your reward has values in between, 0.5 and more counts as
    correct."""
    return reward >= 0.5


def solve_rate(rewards: list[float]) -> float:
    """z, the difficulty: fraction of the initial responses that are correct."""
    return sum(map(is_correct, rewards)) / len(rewards)


def problem_fci(scores: list[list[float]]) -> float:
    """A problem's mean FCI: the mean over responses of their mean over steps, zeros included."""
    return statistics.fmean(statistics.fmean(y) if y else 0.0 for y in scores)


@dataclass
class EasyFilter:
    """The running mean of the FCI of all z = 1 problems so far: `count` problems, with the sum
    `total`."""

    count: int = 0
    total: float = 0.0

    def keep(self, rates: list[float], fcis: list[float]) -> list[bool]:
        """AttnRL Eq. 8 for one batch: which problems may be expanded. Problems with z < 1 are never
        filtered here.

        The mean includes the current batch (the authors' code), so the very first easy problem is
        kept.
        """
        # one NaN in the mean would filter all later easy problems
        easy = [y for z, y in zip(rates, fcis) if z == 1 and math.isfinite(y)]
        self.count += len(easy)
        self.total += math.fsum(easy)
        # isclose: by rounding, the mean of n equal values may be slightly above them
        # AttnRL Eq. 8
        return [z < 1 or y >= self.mean or math.isclose(y, self.mean) for z, y in zip(rates, fcis)]

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


def tree_count(rate: float, group_size: int) -> int:
    """How many of the G initial responses are expanded. The authors' code rounds up; the paper
    rounds.
    >>> [tree_count(z, 6) for z in (0, 0.5, 1)]
    [6, 4, 2]
    """
    return round_half_up(math.exp(-rate) * group_size)  # AttnRL Eq. 9


def choose_trees(rewards: list[float], count: int, rng: random.Random) -> list[int]:
    """Which responses are expanded: first those with the rarer outcome (at z = 0.5 the wrong ones),
    then random others.

    If all outcomes are the same (z = 0 or 1), the choice is random. Indices are in rising order.
    """
    right = [i for i, r in enumerate(rewards) if is_correct(r)]
    wrong = [i for i, r in enumerate(rewards) if not is_correct(r)]
    rng.shuffle(right)
    rng.shuffle(wrong)
    first, then = (wrong, right) if len(wrong) <= len(right) else (right, wrong)
    return sorted((first + then)[:count])


# -------- How many problems per step -------------------------------------------------------------
@dataclass
class AdaptiveBatch:
    """The number of problems B sampled per step. It is adapted so that about `target` (B') training
    sequences are kept."""

    size: float
    target: int
    low: int
    high: int
    lam: float = 0.9

    def problems(self) -> int:
        """`size`, rounded. `size` itself is not rounded: with lambda = 0.9, deviations under about
        5 problems would then never change it."""
        return round_half_up(self.size)

    def update(self, sampled: int, kept: int) -> float:
        """After a batch of `sampled` problems, of which `kept` (B'') training sequences were left:
        returns the new size, within bounds.

        In the one-step off-policy pipeline the size of batch m+1 is fixed before batch m is
        trained, so the newest known pair is one step older than `size`. THEN, (B' / B'') * sampled
        problems would have met the target; the size moves a tenth of the way towards that number.
        If nothing was kept, the size does not change.
        """
        if kept > 0:
            # AttnRL Eq. 10
            wanted = self.lam * self.size + (1 - self.lam) * self.target / kept * sampled
            self.size = min(self.high, max(self.low, wanted))
        return self.size
