r"""tree.py: where to branch, the tree of responses, values, advantages, training sequences.

Pure Python and numpy, no model: everything here can be checked by hand.

The tree of a problem has a virtual root, whose children are the G initial responses. A branch point
cuts a response in two: the tokens before it become an inner node, whose children are the rest of
the response and all continuations sampled from this point. Each leaf is one complete response and
becomes one training sequence.

          root                  r1 = [0 ......... 8)    right
         /    \                 c1, c2 replace r1[4:)   right, wrong
    r1[0:4)    r2               r2                      wrong
    /  |  \                     V(root) = 2/4
  r1[4:) c1 c2                  node r1[0:4): V = 2/3, L = 3, A = (1/6 + 1/6) / sqrt(3) = 0.19245

Equations (AttnRL):

    Eq. 2   V(s) = mean reward of the L(s) leaves below s; V(root) is over all leaves
    Eq. 3   A(s) = [(V(s) - V(root)) + (V(s) - V(parent(s)))] / sqrt(L(s)), the same for every
            token of node s (from TreeRL)
    Eq. 7   branch at the EARLIEST N steps among those whose FCI is in the top rho ("ATB"); we read
            the printed Quantile(y, rho) as the (1 - rho) quantile, as the text around it says

Left out: trees with more than one round of continuations (the paper has one).

    python -m pytest tests/test_tree.py       # the example above, by hand, and the invariants
"""

import math
import random
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np


@dataclass
class Continuation:
    """A new ending of a response: `tokens` replace the response's tokens from index `at` on."""

    at: int
    tokens: list[int]
    logprobs: list[float]  # behaviour log-probs of `tokens` only
    reward: float = 0.0
    weights: list[float] = field(default_factory=list)  # of `tokens`, as in Response
    entropies: list[float] = field(default_factory=list)  # nats; only of problems that are logged
    finished: bool = True  # False: cut off at the length limit
    boxed: bool = True  # is there an answer to grade?


@dataclass
class Response:
    """An initial response, with the results of the scoring pass and of the grader."""

    tokens: list[int]
    logprobs: list[float]  # behaviour log-probs, one update older than those of continuations
    reward: float = 0.0
    entropies: list[float] = field(default_factory=list)  # nats, per token
    bounds: list[int] = field(default_factory=list)  # step k is tokens[bounds[k]:bounds[k + 1]]
    fci: list[float] = field(default_factory=list)  # per step
    branchable: int = 0  # number of leading steps that may be branch points: none after "</think>"
    continuations: list[Continuation] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # truncated importance weights; empty: all 1
    ref_logprobs: list[float] = field(default_factory=list)  # PRL only: of the initial policy
    finished: bool = True  # False: cut off at the length limit
    boxed: bool = True  # is there an answer to grade?
    branch_points: list[int] = field(default_factory=list)  # token positions; empty: not expanded
    attention: dict | None = None  # for the explorer; only of problems that are logged


@dataclass
class TrainingSequence:
    """One leaf: prompt and response tokens, with advantage and behaviour log-prob for every
    response token."""

    prompt_ids: list[int]
    tokens: list[int]
    advantages: list[float]
    logprobs: list[float]
    # the weight of each token's loss; empty: all 1; 0: not trained, not counted in the mean
    weights: list[float] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """The number of its tokens that are trained."""
        return sum(w != 0 for w in self.weights)

    def __post_init__(self):
        self.weights = self.weights or [1.0] * len(self.tokens)
        lengths = {len(x) for x in (self.tokens, self.advantages, self.logprobs, self.weights)}
        if len(lengths) > 1:
            raise ValueError("every list of a sequence needs one entry per response token")


# -------- Branch points --------------------------------------------------------------------------
def fci_threshold(fci: list[float], rho: float) -> float:
    """The score that makes a step a candidate: the (1 - rho) quantile of all steps' scores, zeros
    included."""
    threshold = float(np.quantile(fci, 1 - rho)) if fci else 0.0
    # if most steps score 0 (short responses), all steps above 0 are candidates (the authors' code)
    return threshold if threshold > 0 else min((y for y in fci if y > 0), default=math.inf)


def fci_branch_steps(
    fci: list[float], starts: list[int], n: int, rho: float = 0.2, min_gap: int = 0
) -> list[int]:
    """AttnRL Eq. 7: the earliest n steps of high FCI, as step indices in rising order.

    fci and starts (first token of each step) are of all steps; steps that may not be branch points
    score 0. min_gap: the least number of tokens between branch points, and before the first.
    >>> fci_branch_steps([0, .1, .5, .2, .9, .8, 0, 0, 0, 0], starts=list(range(0, 100, 10)), n=2)
    [4, 5]
    """
    threshold, last = fci_threshold(fci, rho), 0
    chosen: list[int] = []
    # "earliest": ordered by position, not by score, because early steps decide the solution
    for k, y in enumerate(fci):
        # AttnRL Eq. 7
        if len(chosen) < n and k > 0 and y >= threshold and starts[k] - last >= min_gap:
            chosen.append(k)
            last = starts[k]
    return chosen


def usable(response: Response) -> range:
    """Steps that may be branch points. The first may not: there is no prefix to keep."""
    return range(1, response.branchable)


def by_fci(response: Response, n: int, rng, rho: float, min_gap: int, delta: int) -> list[int]:
    """AttnRL: Eq. 7; if that gives fewer than n steps, the earliest others too (authors' code)."""
    starts, allowed = response.bounds[:-1], usable(response)
    y = [score if k in allowed else 0.0 for k, score in enumerate(response.fci)]
    steps = fci_branch_steps(y, starts, n, rho, min_gap)
    steps += [k for k in allowed if k not in steps][: n - len(steps)]
    return [starts[k] for k in steps]


def by_fci_mean(response: Response, n: int, rng, rho: float, min_gap: int, delta: int) -> list[int]:
    """The same with Eq. 5 as a mean: the sum has fewer terms for later steps, so it falls."""
    later = range(len(response.fci) - delta, -delta, -1)  # steps that Eq. 5 sums over, for each k
    mean = [y / max(1, terms) for y, terms in zip(response.fci, later)]
    return by_fci(replace(response, fci=mean), n, rng, rho, min_gap, delta)


def by_step_entropy(response: Response, n: int, *_) -> list[int]:
    """DATPO (arXiv 2609.08650): the n steps of highest mean entropy over their tokens."""
    cuts, h = response.bounds, response.entropies
    mean = {k: sum(h[cuts[k] : cuts[k + 1]]) / (cuts[k + 1] - cuts[k]) for k in usable(response)}
    return [cuts[k] for k in sorted(mean, key=mean.__getitem__, reverse=True)[:n]]


def by_entropy(response: Response, n: int, *_) -> list[int]:
    """The authors' TreeRL: the n tokens of highest entropy, except the first and the last token."""
    inner = range(1, len(response.tokens) - 1)
    return sorted(inner, key=lambda t: (-response.entropies[t], t))[:n]


def equally_spaced(response: Response, n: int, *_) -> list[int]:
    """n steps that cut the response into n + 1 parts with nearly equal numbers of steps."""
    steps = {i * response.branchable // (n + 1) for i in range(1, n + 1)}
    return [response.bounds[k] for k in steps if k in usable(response)]


def earliest(response: Response, n: int, *_) -> list[int]:
    """The n steps after the first one. A control: perhaps FCI only finds early steps."""
    return [response.bounds[k] for k in usable(response)[:n]]


def by_chance(response: Response, n: int, rng: random.Random, *_) -> list[int]:
    """The starts of n random steps."""
    steps = usable(response)
    return [response.bounds[k] for k in rng.sample(steps, min(n, len(steps)))]


# --branch: a rule takes (response, n, rng, rho, min_gap, delta), returns up to n token positions
BRANCH_RULES = {
    "fci": by_fci,
    "fci_mean": by_fci_mean,
    "step_entropy": by_step_entropy,
    "entropy": by_entropy,
    "fixed": equally_spaced,
    "earliest": earliest,
    "random": by_chance,
}


def choose_branch_points(
    response: Response, rule: str, n: int, rng: random.Random, rho=0.2, min_gap=0, delta=4
) -> list[int]:
    """Up to n distinct token positions `at`, 0 < at < len(tokens), in rising order; fewer if there
    are fewer candidates. Only the FCI rules use rho, min_gap and delta; only "entropy" may branch
    in the answer after "</think>". The papers set no limits for the other rules."""
    return sorted(BRANCH_RULES[rule](response, n, rng, rho, min_gap, delta))


# -------- Tree, values, advantages ---------------------------------------------------------------
@dataclass
class Node:
    """A span of tokens shared by all leaves below it. Values are exact fractions, so equal rewards
    give advantages of exactly zero."""

    tokens: list[int]
    logprobs: list[float]
    weights: list[float]
    children: list["Node"] = field(default_factory=list)
    value: Fraction = Fraction(0)  # V(s); for a leaf its reward
    leaves: int = 1  # L(s)
    advantage: float = 0.0  # A(s)


def span(end: Response | Continuation, start: int, stop: int | None = None) -> Node:
    return Node(end.tokens[start:stop], end.logprobs[start:stop], end.weights[start:stop])


def leaf(end: Response | Continuation, start: int = 0) -> Node:
    """A leaf: the tokens of `end` from `start` on, with its reward."""
    if not math.isfinite(end.reward):
        raise ValueError(f"a reward must be a finite number, got {end.reward}")
    node = span(end, start)
    node.value = Fraction(end.reward)
    return node


def response_chain(response: Response) -> Node:
    """The node of one initial response, cut at its branch points. Raises ValueError for a cut
    outside 0 < at < len."""
    cuts, length = sorted({c.at for c in response.continuations}), len(response.tokens)
    if cuts and not 0 < cuts[0] <= cuts[-1] < length:
        raise ValueError(f"a continuation starts inside its response: 0 < {cuts} < {length} fails")
    starts = [0, *cuts]
    node = leaf(response, starts[-1])
    # from the end: the tokens after a cut become a child of those before it
    for start, cut in reversed(list(zip(starts, cuts))):
        branches = [leaf(c) for c in response.continuations if c.at == cut]
        inner = span(response, start, cut)
        inner.children = [node, *branches]
        node = inner
    return node


def build_tree(responses: list[Response]) -> Node:
    """The tree of one problem with V, L and A on every node."""
    root = Node([], [], [], [response_chain(r) for r in responses])
    set_values(root)
    set_advantages(root, parent=root, root=root)
    return root


def set_values(node: Node) -> None:
    """V(s) and L(s), from the leaves up."""
    if node.children:
        for child in node.children:
            set_values(child)
        node.leaves = sum(child.leaves for child in node.children)
        total = sum((child.value * child.leaves for child in node.children), Fraction(0))
        node.value = total / node.leaves  # AttnRL Eq. 2


def set_advantages(node: Node, parent: Node, root: Node) -> None:
    """A(s), from the root down."""
    gain = (node.value - root.value) + (node.value - parent.value)  # global + local
    node.advantage = float(gain) / math.sqrt(node.leaves)  # AttnRL Eq. 3
    for child in node.children:
        set_advantages(child, node, root)


# -------- Flattening -----------------------------------------------------------------------------
def tree_sequences(prompt_ids: list[int], responses: list[Response]) -> list[TrainingSequence]:
    """One sequence per leaf. The prefix of a continuation keeps the behaviour log-probs of the
    response that it comes from.

    Responses that were not expanded are leaves too, and are trained (the authors' code skips them).
    """
    sequences = []

    def walk(node: Node, path: list[Node]) -> None:
        path = [*path, node]
        if node.children:
            for child in node.children:
                walk(child, path)
        else:
            sequences.append(
                TrainingSequence(
                    prompt_ids,
                    [t for s in path for t in s.tokens],
                    [s.advantage for s in path for _ in s.tokens],
                    [lp for s in path for lp in s.logprobs],
                    [w for s in path for w in s.weights],
                )
            )

    for child in build_tree(responses).children:
        walk(child, [])
    return sequences


def drop_zero(sequences: list[TrainingSequence]) -> list[TrainingSequence]:
    """Leave out sequences whose advantages are all zero: their policy loss has no gradient and
    would only dilute the token mean."""
    return [s for s in sequences if any(a * w for a, w in zip(s.advantages, s.weights))]


def step_advantages(responses: list[dict]) -> list[tuple[list[int], list[float]]]:
    """Eq. 2-3 for one problem given as plain data, for notebooks and checks: [{"tokens", "reward",
    "continuations": [{"at", "tokens", "reward"}, ...]}, ...] -> (tokens, per-token advantages) for
    every leaf. Raises ValueError unless 0 < at < len(tokens).
    >>> step_advantages([{"tokens": [1, 2], "reward": 1.0}, {"tokens": [3], "reward": 0.0}])
    [([1, 2], [1.0, 1.0]), ([3], [-1.0])]
    """
    grown = [Response(r["tokens"], [0.0] * len(r["tokens"]), r["reward"]) for r in responses]
    for response, r in zip(grown, responses):
        for c in r.get("continuations", []):
            new = Continuation(c["at"], c["tokens"], [0.0] * len(c["tokens"]), c["reward"])
            response.continuations.append(new)
    return [(s.tokens, s.advantages) for s in tree_sequences([], grown)]
