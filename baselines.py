"""baselines.py: what is not AttnRL. The advantages and steps of the methods it is compared with.

    GRPO   A = (R - mean) / (std + 1e-6) over the responses of a problem, unbiased std (the AttnRL
           paper writes it, without the 1e-6, in the text before its Eq. 1)
    PRL    A(t in step k) = A_GRPO - (1 / eta) * sum over u >= last token of step k of
           log [pi_old(u) / pi_ref(u)]    (arXiv 2601.10201)

TreeRL needs nothing here: it is the tree of tree.py with another branching rule. A method of your
own is a function from (prompt, responses) to training sequences, as these two are.

    python attnrl.py --method grpo
    python -m pytest tests/test_baselines.py
"""

import math
import statistics

from fci import Separators, cut_at_newlines
from tree import Response, TrainingSequence


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
