"""baselines.py: the methods that AttnRL is compared with. Their advantages, steps and losses.

    GRPO   A = (R - mean) / (std + 1e-6) over the responses of a problem, unbiased std (the AttnRL
           paper writes it, without the 1e-6, in the text before its Eq. 1)
    PRL    A(t in step k) = A_GRPO - (1 / eta) * sum over u >= last token of step k of
           log [pi_old(u) / pi_ref(u)]    (arXiv 2601.10201)
    FRPO   PRL with steps of one token and eta = 100 (the second version of that paper)
    DATPO  A(block) = r + V(its end) - V(its start), with r only for the last block of a leaf; every
           block is trained once; 1 - z (z: share of right initial responses) scales the number
           of forking points, and of branches per point    (arXiv 2609.08650)

TreeRL needs nothing here: it is the tree of tree.py with another branching rule. To add a method,
write a function from (prompt, responses) to training sequences, like those below. Left out of
DATPO: its bonus for diverse siblings.

    python attnrl.py --method grpo
    python -m pytest tests/test_baselines.py
"""

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch

from fci import Separators, cut_at_newlines
from runtime.metrics import leaf_ends
from tree import Node, Response, TrainingSequence, build_tree


def flattening(config) -> Callable[..., list[TrainingSequence]]:
    """The function (prompt, responses) -> training sequences of a method whose advantage is not
    AttnRL's. config: runtime.config.Config."""
    scale = config.scale_rewards
    choices: dict[str, Callable] = {
        "grpo": partial(grpo_sequences, scale=scale),
        "prl": partial(prl_sequences, eta=config.prl_eta, scale=scale),
        "datpo": datpo_sequences,
    }
    return choices[config.advantage]


# -------- Advantages -----------------------------------------------------------------------------
def grpo_sequences(
    prompt_ids: list[int], responses: list[Response], scale: str = "std"
) -> list[TrainingSequence]:
    """GRPO: no tree, one advantage per response. Equal rewards (or a single response) give exactly
    zero. scale: "none" does not divide by the standard deviation (Dr.GRPO, arXiv 2503.20783)."""
    rewards = [r.reward for r in responses]
    if any(not math.isfinite(r) for r in rewards):
        raise ValueError(f"a reward must be a finite number, got {rewards}")
    mean = statistics.mean(rewards)  # exact: equal rewards differ from their mean by 0
    std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    divisor = std + 1e-6 if scale == "std" else 1.0
    sequences = []
    for r in responses:
        advantage = (r.reward - mean) / divisor  # GRPO
        advantages = [advantage] * len(r.tokens)
        sequences.append(TrainingSequence(prompt_ids, r.tokens, advantages, r.logprobs, r.weights))
    return sequences


def prl_sequences(
    prompt_ids: list[int], responses: list[Response], eta: float = 200.0, scale: str = "std"
) -> list[TrainingSequence]:
    """PRL: the entropy-regularised objective adds a term to GRPO's advantage: how far the policy
    has moved from the initial one (sum of log-ratios, nats), from the step's last token on. It is
    the same for all tokens of a step, and not zero for equal rewards. Steps are the responses'
    `bounds`."""
    sequences = grpo_sequences(prompt_ids, responses, scale)
    for response, sequence in zip(responses, sequences):
        ahead, rest = 0.0, []  # for every token, the sum from it to the end
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
    """DATPO: (forking points per response, continuations per point) of a problem with this rate of
    right initial responses; none if all are right.

    >>> datpo_sizes(0.0, 2, 2), datpo_sizes(0.5, 2, 2), datpo_sizes(1.0, 2, 2)
    ((2, 2), (1, 1), (0, 0))
    """
    return math.ceil(points * (1 - rate)), math.ceil(branches * (1 - rate))  # DATPO


def datpo_sequences(prompt_ids: list[int], responses: list[Response]) -> list[TrainingSequence]:
    """DATPO: a block is a node of the tree, and V the mean reward of the leaves below it. A block's
    advantage is V(its node) - V(its parent), for the last block of a leaf r - V(its parent). Every
    block is trained once: in later leaves its tokens have weight 0, so they are not in the loss."""
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
    """Give new responses what PRL needs: log-probs under the initial policy, and PRL's steps.
    run: attnrl.Run; sequences: the responses after their prompts."""
    config = run.config
    for r, own in zip(responses, run.score(run.reference, sequences)):
        r.ref_logprobs = own.logprobs
        r.bounds = prl_steps(r.tokens, run.separators, config.prl_steps, config.prl_length)


def prl_steps(tokens: list[int], separators: Separators, ends: str, length: int = 256) -> list[int]:
    r"""Bounds of PRL's steps. They end after `length` tokens each, at a newline or at a blank line:
    `ends` is "length", "newline" or "blank".

    >>> tokens, table = [0, 1, 0, 1, 1, 0], Separators({0: b"Add", 1: b"\n"})
    >>> prl_steps(tokens, table, "newline"), prl_steps(tokens, table, "blank")
    ([0, 2, 5, 6], [0, 5, 6])
    """
    if ends == "length":
        return [*range(0, len(tokens), length), len(tokens)]
    return cut_at_newlines(tokens, separators, {"newline": 1, "blank": 2}[ends])


# -------- Losses (learner.ppo_loss is AttnRL's) --------------------------------------------------
def gspo_loss(
    logp, old_logp, advantage, lengths: list[int], *, clip_low=0.2, clip_high=0.28, dual_clip=3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO (arXiv 2507.18071): one ratio per sequence, exp(its mean of logp - old_logp).
    It is clipped, and used for all tokens with their own advantages. Shapes as in ppo_loss.
    dual_clip: not used.

    Two tokens with the ratios e^0.2 and 1 both get e^0.1 = 1.105:
    >>> old, one = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> gspo_loss(torch.tensor([0.2, 0.0]), old, one, [2])[0]
    tensor([-1.1052, -1.1052])
    """
    parts = (logp - old_logp).split(lengths) if lengths else [logp - old_logp]
    ratio = torch.cat([part.mean().expand(len(part)) for part in parts]).clamp(-20, 20).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = -torch.minimum(ratio * advantage, bounded)
    return loss, bounded < ratio * advantage


def cispo_loss(
    logp, old_logp, advantage, lengths=None, *, clip_low=0.2, clip_high=0.28, dual_clip=3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585): -sg(clip(r)) A logp. The clip bounds a token's weight,
    and no token loses its gradient; `clipped`: True where the bound acts. dual_clip: not used."""
    ratio = torch.exp((logp - old_logp).detach().clamp(-20, 20))
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -bounded * advantage * logp, bounded != ratio


LOSSES = {"gspo": gspo_loss, "cispo": cispo_loss}  # --loss, but for ppo


def mask_cut_off(sequences: list[TrainingSequence], responses: list[Response]) -> None:
    """DAPO's overlong filtering (arXiv 2503.14476): responses that were cut off at the length limit
    are left out of the loss. Their rewards still count in the advantages of the others."""
    for sequence, end in zip(sequences, leaf_ends(responses), strict=True):
        if not end.finished:
            sequence.weights = [0.0] * len(sequence.tokens)
