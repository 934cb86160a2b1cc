r"""tree.py: where to branch, the tree of responses, values, advantages, and the sequences that the
policy is trained on.

Pure Python and numpy, no model: everything here can be checked by hand.

A problem's tree: a virtual root, whose children are the G initial responses. A branch point cuts a
response's chain of tokens in two: what stands before it becomes an inner node, whose children are
the rest of the response and every continuation that was sampled from there. Each leaf is one
complete response and becomes one training sequence.

          root                    r1 = [0 ......... 8)   right      V(root) = 2/4
         /    \                    c1, c2 replace r1[4:]  right, wrong
    r1[0:4)    r2                 r2                     wrong
    /  |   \\                     the node r1[0:4): V = 2/3, L = 3, A = (1/6 + 1/6) / sqrt(3) =
                                  0.19245
  r1[4:) c1  c2

Equations:
    AttnRL Eq. 1   GRPO (baseline): A = (R - mean) / (std + 1e-6) over the responses of a problem,
                   unbiased std
    AttnRL Eq. 2   V(s) = mean reward of the L(s) leaves below s; V(root) over all leaves of the
                   problem
    AttnRL Eq. 3   A(s) = [(V(s) - V(root)) + (V(s) - V(parent(s)))] / sqrt(L(s)), for every token
                   of node s  (TreeRL)
    AttnRL Eq. 7   branch at the EARLIEST N steps among those with FCI >= the (1 - rho) quantile
                   ("ATB")
    PRL            A(t in step k) = A_GRPO - (1 / eta) * sum over u >= last token of step k of log
                   [pi_old(u) / pi_ref(u)]

Left out: trees deeper than initial responses plus one round of continuations (the paper's).

    python -m pytest tests/test_tree.py       # the example above, by hand, and the invariants
"""

import math
import random
import statistics
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np


@dataclass
class Continuation:
    """A new ending of a response: `tokens` replace the response's tokens from index `at` on."""

    at: int
    tokens: list[int]
    logprobs: list[float]  # behaviour log-probs of `tokens` only
    reward: float = 0.0
    # truncated importance weights of `tokens`; empty: all 1
    weights: list[float] = field(default_factory=list)
    # nats, of `tokens`; only of problems that are logged
    entropies: list[float] = field(default_factory=list)


@dataclass
class Response:
    """An initial response with what the scoring pass and the grader said of it."""

    tokens: list[int]
    # behaviour log-probs: of the policy that sampled it, one update older than its continuations
    logprobs: list[float]
    reward: float = 0.0
    entropies: list[float] = field(default_factory=list)  # nats, per token
    bounds: list[int] = field(default_factory=list)  # step k is tokens[bounds[k]:bounds[k + 1]]
    fci: list[float] = field(default_factory=list)  # per step
    # the first `branchable` steps may be branch points (not the answer after "</think>")
    branchable: int = 0
    continuations: list[Continuation] = field(default_factory=list)
    # truncated importance weights (learner.py); empty: all 1
    weights: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)  # PRL only: of the initial policy


@dataclass
class TrainingSequence:
    """One leaf: prompt and response tokens, with advantage and behaviour log-prob for every
    response token."""

    prompt_ids: list[int]
    tokens: list[int]
    advantages: list[float]
    logprobs: list[float]
    weights: list[float] = field(default_factory=list)  # of the tokens' losses; empty: all 1

    def __post_init__(self):
        self.weights = self.weights or [1.0] * len(self.tokens)
        if not len(self.tokens) == len(self.advantages) == len(self.logprobs) == len(self.weights):
            raise ValueError(
                "tokens, advantages, logprobs and weights must have one entry per response token"
            )


# --------------------------------------------------------------------------------------------------
# Branch points
# --------------------------------------------------------------------------------------------------
def fci_threshold(fci: list[float], rho: float) -> float:
    """The score that makes a step a candidate: the (1 - rho) quantile of all steps' scores, zeros
    included."""
    threshold = float(np.quantile(fci, 1 - rho)) if fci else 0.0
    # most steps score 0 (short responses): then any step with a score counts (the authors' code)
    if threshold <= 0:
        threshold = min((y for y in fci if y > 0), default=math.inf)
    return threshold


def fci_branch_steps(
    fci: list[float], starts: list[int], n: int, rho: float = 0.2, min_gap: int = 0
) -> list[int]:
    """AttnRL Eq. 7: the earliest n steps of high FCI, as step indices in rising order.

    fci and starts (first token of each step) hold the branchable steps and all later ones, the
    latter with score 0. min_gap: tokens asked between branch points and from the response's start
    (the authors' 512 for 8k responses).
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


def choose_branch_points(
    response: Response, method: str, n: int, rng: random.Random, rho: float = 0.2, min_gap: int = 0
) -> list[int]:
    """Up to n distinct token positions `at`, 0 < at < len(tokens), in rising order; fewer where
    there are fewer choices.

    fci: Eq. 7, filled up with the earliest other steps. random: n random steps. entropy: the n
    tokens of highest entropy, without the first (nothing to keep) and the last one (nothing to
    resample): the authors' TreeRL baseline. These two know no min_gap, and entropy may branch in
    the answer after "</think>": the papers ask for neither. Raises ValueError for another method.
    """
    if method == "entropy":
        inner = range(1, len(response.tokens) - 1)
        return sorted(sorted(inner, key=lambda t: (-response.entropies[t], t))[:n])
    starts = response.bounds[:-1]
    # never the first step, never the final answer of a reasoning model
    usable = range(1, response.branchable)
    if method == "fci":
        y = [score if k in usable else 0.0 for k, score in enumerate(response.fci)]
        steps = fci_branch_steps(y, starts, n, rho, min_gap)
        steps += [k for k in usable if k not in steps][: n - len(steps)]
    elif method == "random":
        steps = rng.sample(usable, min(n, len(usable)))
    else:
        raise ValueError(f"branch must be fci, entropy or random, not {method!r}")
    return sorted(starts[k] for k in steps)


# --------------------------------------------------------------------------------------------------
# Tree, values, advantages
# --------------------------------------------------------------------------------------------------
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


def leaf(end: Response | Continuation, start: int = 0) -> Node:
    """What is left of `end` from token `start` on, with its reward."""
    if not math.isfinite(end.reward):
        raise ValueError(f"a reward must be a finite number, got {end.reward}")
    return Node(
        end.tokens[start:], end.logprobs[start:], end.weights[start:], value=Fraction(end.reward)
    )


def response_chain(response: Response) -> Node:
    """The node of one initial response, cut at its branch points. Raises ValueError for a cut
    outside 0 < at < len."""
    for c in response.continuations:
        if not 0 < c.at < len(response.tokens):
            raise ValueError(
                f"a continuation must start inside its response: 0 < {c.at} <"
                f" {len(response.tokens)} fails"
            )
    cuts = sorted({c.at for c in response.continuations})
    starts = [0, *cuts]
    node = leaf(response, starts[-1])
    # from the end: what follows a cut is a child of what precedes
    for start, cut in reversed(list(zip(starts, cuts))):
        branches = [leaf(c) for c in response.continuations if c.at == cut]
        node = Node(
            response.tokens[start:cut],
            response.logprobs[start:cut],
            response.weights[start:cut],
            [node, *branches],
        )
    return node


def build_tree(responses: list[Response]) -> Node:
    """The tree of one problem with V, L and A on every node."""
    root = Node([], [], [], [response_chain(r) for r in responses])
    set_values(root)
    set_advantages(root, parent=root, root=root)
    return root


def set_values(node: Node) -> None:
    if node.children:
        for child in node.children:
            set_values(child)
        node.leaves = sum(child.leaves for child in node.children)
        # AttnRL Eq. 2
        node.value = (
            sum((child.value * child.leaves for child in node.children), Fraction(0)) / node.leaves
        )


def set_advantages(node: Node, parent: Node, root: Node) -> None:
    gain = (node.value - root.value) + (node.value - parent.value)  # global + local
    node.advantage = float(gain) / math.sqrt(node.leaves)  # AttnRL Eq. 3
    for child in node.children:
        set_advantages(child, node, root)


# --------------------------------------------------------------------------------------------------
# Flattening
# --------------------------------------------------------------------------------------------------
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


def grpo_sequences(prompt_ids: list[int], responses: list[Response]) -> list[TrainingSequence]:
    """The GRPO baseline: no tree, one advantage a response. Equal rewards (or a single response)
    give exactly zero."""
    rewards = [r.reward for r in responses]
    if any(not math.isfinite(r) for r in rewards):
        raise ValueError(f"a reward must be a finite number, got {rewards}")
    mean = statistics.mean(rewards)  # exact, so that equal rewards differ from their mean by 0
    std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    # AttnRL Eq. 1
    return [
        TrainingSequence(
            prompt_ids,
            r.tokens,
            [(r.reward - mean) / (std + 1e-6)] * len(r.tokens),
            r.logprobs,
            r.weights,
        )
        for r in responses
    ]


def prl_sequences(
    prompt_ids: list[int], responses: list[Response], eta: float = 200.0
) -> list[TrainingSequence]:
    """PRL (arXiv 2601.10201), another baseline without a tree: what the entropy-regularised
    objective adds to GRPO's advantage, the same for all tokens of a step, is how far the policy has
    left the initial one (log-ratios, nats) from the step's last token on. Equal rewards leave a
    signal here. Steps are the responses' `bounds`."""
    sequences = grpo_sequences(prompt_ids, responses)
    for response, sequence in zip(responses, sequences):
        ahead, rest = 0.0, []  # of every token: the sum from it to the end
        for old, ref in zip(reversed(response.logprobs), reversed(response.ref_logprobs)):
            ahead += old - ref
            rest.append(ahead)
        rest.reverse()
        sequence.advantages = [
            sequence.advantages[a] - rest[b - 1] / eta  # PRL
            for a, b in zip(response.bounds, response.bounds[1:])
            for _ in range(a, b)
        ]
    return sequences


def drop_zero(sequences: list[TrainingSequence]) -> list[TrainingSequence]:
    """Without sequences whose advantages are all zero: they have no gradient and would only dilute
    the token mean."""
    return [s for s in sequences if any(s.advantages)]


def step_advantages(responses: list[dict]) -> list[tuple[list[int], list[float]]]:
    """Eq. 2-3 for one problem given as plain data, for notebooks and checks.

    responses = [{"tokens", "reward", "continuations": [{"at", "tokens", "reward"}, ...]}, ...] ->
    (tokens, per-token advantages) for every leaf. Raises ValueError unless 0 < at < len(tokens) for
    every continuation.
    >>> step_advantages([{"tokens": [1, 2], "reward": 1.0}, {"tokens": [3], "reward": 0.0}])
    [([1, 2], [1.0, 1.0]), ([3], [-1.0])]
    """
    grown = [
        Response(
            r["tokens"],
            [0.0] * len(r["tokens"]),
            r["reward"],
            continuations=[
                Continuation(c["at"], c["tokens"], [0.0] * len(c["tokens"]), c["reward"])
                for c in r.get("continuations", [])
            ],
        )
        for r in responses
    ]
    return [(s.tokens, s.advantages) for s in tree_sequences([], grown)]
