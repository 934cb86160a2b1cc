"""baselines.py: what is not AttnRL. The advantages and steps of the methods it is compared with.

    GRPO   A = (R - mean) / (std + 1e-6) over the responses of a problem, unbiased std (the AttnRL
           paper writes it, without the 1e-6, in the text before its Eq. 1)
    PRL    A(t in step k) = A_GRPO - (1 / eta) * sum over u >= last token of step k of
           log [pi_old(u) / pi_ref(u)]    (arXiv 2601.10201)
    FRPO   PRL with steps of one token and eta = 100 (the second version of that paper)
    DATPO  A(block) = r + V(its end) - V(its start); r: of a leaf's last block only; every block is
           trained once; forking points and branches a point by 1 - V(root)    (arXiv 2609.08650)

TreeRL needs nothing here: it is the tree of tree.py with another branching rule. A method of your
own is a function from (prompt, responses) to training sequences, as these are. Left out of DATPO:
its bonus for diverse siblings.

    python attnrl.py --method grpo
    python -m pytest tests/test_baselines.py
"""

import math
import statistics

from fci import Separators, cut_at_newlines
from tree import Node, Response, TrainingSequence, build_tree


def grpo_sequences(prompt_ids: list[int], responses: list[Response]) -> list[TrainingSequence]:
    """GRPO: no tree, one advantage a response. Equal rewards (or a single response) give exactly
    zero."""
    rewards = [r.reward for r in responses]
    if any(not math.isfinite(r) for r in rewards):
        raise ValueError(f"a reward must be a finite number, got {rewards}")
    mean = statistics.mean(rewards)  # exact, so that equal rewards differ from their mean by 0
    std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    sequences = []
    for r in responses:
        advantage = (r.reward - mean) / (std + 1e-6)  # GRPO
        advantages = [advantage] * len(r.tokens)
        sequences.append(TrainingSequence(prompt_ids, r.tokens, advantages, r.logprobs, r.weights))
    return sequences


def prl_sequences(
    prompt_ids: list[int], responses: list[Response], eta: float = 200.0
) -> list[TrainingSequence]:
    """PRL: what the entropy-regularised objective adds to GRPO's advantage, the same for all
    tokens of a step, is how far the policy has left the initial one (log-ratios, nats) from the
    step's last token on. Equal rewards leave a signal here. Steps are the responses' `bounds`."""
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


def datpo_sizes(rate: float, points: int, branches: int) -> tuple[int, int]:
    """DATPO: (forking points a response, continuations a point) of a problem whose initial
    responses are right at this rate; none where all are right.

    >>> datpo_sizes(0.0, 2, 2), datpo_sizes(0.5, 2, 2), datpo_sizes(1.0, 2, 2)
    ((2, 2), (1, 1), (0, 0))
    """
    return math.ceil(points * (1 - rate)), math.ceil(branches * (1 - rate))  # DATPO


def datpo_sequences(prompt_ids: list[int], responses: list[Response]) -> list[TrainingSequence]:
    """DATPO: a block is a node of the tree, and V the mean of the leaves below it. A block's
    advantage is V(its node) - V(the parent), of a leaf's last block r - V(the parent). Every block
    is trained once: in later leaves its tokens have weight 0, which takes them out of the loss."""
    sequences: list[TrainingSequence] = []
    trained: set[int] = set()

    def walk(node: Node, parent: Node, path: list[tuple[Node, float]]) -> None:
        path = [*path, (node, float(node.value - parent.value))]  # DATPO
        for child in node.children:
            walk(child, node, path)
        if not node.children:
            once = [id(n) not in trained for n, _ in path for _ in n.tokens]
            weights = [w for n, _ in path for w in n.weights or [1.0] * len(n.tokens)]
            sequences.append(
                TrainingSequence(
                    prompt_ids,
                    [t for n, _ in path for t in n.tokens],
                    [gain for n, gain in path for _ in n.tokens],
                    [lp for n, _ in path for lp in n.logprobs],
                    [w * new for w, new in zip(weights, once)],
                )
            )
            trained.update(id(n) for n, _ in path)

    root = build_tree(responses)
    for child in root.children:
        walk(child, root, [])
    return sequences


def add_prl_inputs(run, responses: list[Response], sequences: list) -> None:
    """What PRL wants to know of new responses: the initial policy's log-probs, and its own steps.
    run: attnrl.Run; sequences: the responses after their prompts."""
    config = run.config
    for r, own in zip(responses, run.score(run.reference, sequences)):
        r.ref_logprobs = own.logprobs
        r.bounds = prl_steps(r.tokens, run.separators, config.prl_steps, config.prl_length)


def prl_steps(tokens: list[int], separators: Separators, ends: str, length: int = 256) -> list[int]:
    r"""Bounds of PRL's steps: `length` tokens each, or closed by a "newline" or a "blank" line,
    whichever `ends` says.

    >>> tokens, table = [0, 1, 0, 1, 1, 0], Separators({0: b"Add", 1: b"\n"})
    >>> prl_steps(tokens, table, "newline"), prl_steps(tokens, table, "blank")
    ([0, 2, 5, 6], [0, 5, 6])
    """
    if ends == "length":
        return [*range(0, len(tokens), length), len(tokens)]
    return cut_at_newlines(tokens, separators, {"newline": 1, "blank": 2}[ends])
