r"""tree.py: where to branch, the tree of responses, values, advantages, training sequences.

Pure Python and numpy, no model: everything here can be checked by hand.

A problem's tree: a virtual root, whose children are the G initial responses. A branch point cuts a
response's chain of tokens in two: what stands before it becomes an inner node, whose children are
the rest of the response and every continuation that was sampled from there. Each leaf is one
complete response and becomes one training sequence.

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
            the printed Quantile(y, rho) as the (1 - rho) quantile, as the words around it say

Left out: trees deeper than initial responses plus one round of continuations (the paper's).

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
    """An initial response with what the scoring pass and the grader said of it."""

    tokens: list[int]
    logprobs: list[float]  # behaviour log-probs, one update older than those of continuations
    reward: float = 0.0
    entropies: list[float] = field(default_factory=list)  # nats, per token
    bounds: list[int] = field(default_factory=list)  # step k is tokens[bounds[k]:bounds[k + 1]]
    fci: list[float] = field(default_factory=list)  # per step
    branchable: int = 0  # so many first steps may be branch points: none behind "</think>"
    continuations: list[Continuation] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # truncated importance; empty: all 1
    ref_logprobs: list[float] = field(default_factory=list)  # PRL only: of the initial policy
    finished: bool = True  # False: cut off at the length limit
    boxed: bool = True  # is there an answer to grade?
    branch_points: list[int] = field(default_factory=list)  # token positions; empty: not expanded
    attention: dict | None = None  # for the explorer, of problems that are logged


@dataclass
class TrainingSequence:
    """One leaf: prompt and response tokens, with advantage and behaviour log-prob for every
    response token."""

    prompt_ids: list[int]
    tokens: list[int]
    advantages: list[float]
    logprobs: list[float]
    # of the tokens' losses; empty: all 1; 0: not trained, left out of the mean
    weights: list[float] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """The number of its tokens that are."""
        return sum(w != 0 for w in self.weights)

    def __post_init__(self):
        self.weights = self.weights or [1.0] * len(self.tokens)
        lengths = {len(x) for x in (self.tokens, self.advantages, self.logprobs, self.weights)}
        if len(lengths) > 1:
            raise ValueError("a sequence needs one entry per response token in all of its lists")


# -------- Branch points --------------------------------------------------------------------------
def fci_threshold(fci: list[float], rho: float) -> float:
    """The score that makes a step a candidate: the (1 - rho) quantile of all steps' scores, zeros
    included."""
    threshold = float(np.quantile(fci, 1 - rho)) if fci else 0.0
    # most steps score 0 (short responses): then any step with a score counts (the authors' code)
    return threshold if threshold > 0 else min((y for y in fci if y > 0), default=math.inf)


def fci_branch_steps(
    fci: list[float], starts: list[int], n: int, rho: float = 0.2, min_gap: int = 0
) -> list[int]:
    """AttnRL Eq. 7: the earliest n steps of high FCI, as step indices in rising order.

    fci and starts (first token of each step) hold the branchable steps and all later ones, the
    latter with score 0. min_gap: tokens between branch points, and before the first.
    >>> fci_branch_steps([0, .1, .5, .2, .9, .8, 0, 0, 0, 0], starts=list(range(0, 100, 10)), n=2)
    [4, 5]
    """
    threshold, last = fci_threshold(fci, rho), 0
    chosen: list[int] = []
    # "earliest": in order of position, not of score, because early steps decide
    for k, y in enumerate(fci):
        # AttnRL Eq. 7
        if len(chosen) < n and k > 0 and y >= threshold and starts[k] - last >= min_gap:
            chosen.append(k)
            last = starts[k]
    return chosen


def usable(response: Response) -> range:
    """Steps that may be branch points: not the first, which has nothing before it to keep."""
    return range(1, response.branchable)


def by_fci(response: Response, n: int, rng, rho: float, min_gap: int, delta: int) -> list[int]:
    """AttnRL: Eq. 7, filled up with the earliest other steps (the authors' code)."""
    starts, allowed = response.bounds[:-1], usable(response)
    y = [score if k in allowed else 0.0 for k, score in enumerate(response.fci)]
    steps = fci_branch_steps(y, starts, n, rho, min_gap)
    steps += [k for k in allowed if k not in steps][: n - len(steps)]
    return [starts[k] for k in steps]


def by_fci_mean(response: Response, n: int, rng, rho: float, min_gap: int, delta: int) -> list[int]:
    """The same with Eq. 5 as a mean: a sum has fewer terms the later its step, and so falls."""
    later = range(len(response.fci) - delta, -delta, -1)  # steps that Eq. 5 sums over, for each k
    mean = [y / max(1, terms) for y, terms in zip(response.fci, later)]
    return by_fci(replace(response, fci=mean), n, rng, rho, min_gap, delta)


def by_step_entropy(response: Response, n: int, *_) -> list[int]:
    """DATPO (arXiv 2609.08650): the n steps of highest mean entropy over their tokens."""
    cuts, h = response.bounds, response.entropies
    mean = {k: sum(h[cuts[k] : cuts[k + 1]]) / (cuts[k + 1] - cuts[k]) for k in usable(response)}
    return [cuts[k] for k in sorted(mean, key=mean.__getitem__, reverse=True)[:n]]


def by_entropy(response: Response, n: int, *_) -> list[int]:
    """The authors' TreeRL: the n tokens of highest entropy, without the first and the last one."""
    inner = range(1, len(response.tokens) - 1)
    return sorted(inner, key=lambda t: (-response.entropies[t], t))[:n]


def equally_spaced(response: Response, n: int, *_) -> list[int]:
    """n steps that cut the response's into n + 1 parts of nearly equal numbers."""
    steps = {i * response.branchable // (n + 1) for i in range(1, n + 1)}
    return [response.bounds[k] for k in steps if k in usable(response)]


def earliest(response: Response, n: int, *_) -> list[int]:
    """The first n steps after the very first: what FCI may come down to."""
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
    """Up to n distinct token positions `at`, 0 < at < len(tokens), in rising order; fewer where
    there are fewer choices. Only rules by FCI know rho, min_gap and delta; "entropy" may branch in
    the answer after "</think>". The papers ask for neither."""
    return sorted(BRANCH_RULES[rule](response, n, rng, rho, min_gap, delta))


# -------- Tree, values, advantages ---------------------------------------------------------------
@dataclass
class Node:
    """A span of tokens shared by all leaves below it. Values are exact fractions: equal rewards
    give exactly zero."""

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
    """What is left of `end` from token `start` on, with its reward."""
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
    # from the end: what follows a cut is a child of what precedes
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
    """One sequence per leaf. A continuation's shared prefix keeps the behaviour log-probs of the
    response it came from.

    Responses that were not expanded are leaves like any other and are trained (the authors' code
    skips them).
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


def leaf_ends(responses: list[Response]) -> list[Response | Continuation]:
    """The endings of the leaves, in the order of `tree_sequences`: of each response its own, then
    those of its continuations, the latest branch point first."""
    ends: list[Response | Continuation] = []
    for r in responses:
        ends += [r, *sorted(r.continuations, key=lambda c: -c.at)]
    return ends


def drop_zero(sequences: list[TrainingSequence]) -> list[TrainingSequence]:
    """Without sequences whose advantages are all zero: their policy loss has no gradient and would
    only dilute the token mean."""
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
