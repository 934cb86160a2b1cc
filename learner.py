"""learner.py: the off-policy update. Clipped PPO on tokens, a small KL to the reference, AdamW.

Behaviour log-probs are per token and may come from different policies (a continuation's prefix is
one update older than its suffix). PPO's ratio compares with the policy that really sampled each
token. The only other off-policy correction is --tis_cap (below).

Equations (AttnRL Eq. 1 is the objective; Clip-Higher of DAPO, dual clip, k3 of Schulman):

    ratio   r = exp(logp - old_logp)
    loss    -min(r A, clip(r, 1 - 0.2, 1 + 0.28) A); for A < 0 never more than -3 A (dual clip)
    kl      exp(ref - logp) - (ref - logp) - 1, at most 10 per token, weight 0.001

The mean is over ALL response tokens of the mini-batch. So the gradient does not depend on how the
mini-batch is packed into rows, cut into micro-batches and split over ranks, and the weight of a
response is proportional to its length.

Each token's loss has a weight: 1, or the weight of truncated importance sampling (--tis_cap). A
token of weight 0 is not trained, and not counted in the mean.

Left out: entropy bonus, value function, several epochs over a batch (the paper uses none of them).

    python -m pytest tests/test_learner.py
"""

import math
from collections.abc import Callable

import torch

from runtime.dist import deal, everyone, in_step, mini_batches, rank, send_gradients, whole, world
from runtime.metrics import TrainStats
from runtime.packing import alone
from runtime.scoring import token_batches, token_logprobs, width
from tree import TrainingSequence


def ppo_loss(
    logp, old_logp, advantage, lengths=None, *, clip_low=0.2, clip_high=0.28, dual_clip=3.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token (loss, clipped), all (N,). `clipped` is True where a clip removed the gradient.
    lengths: the number of tokens of each sequence, for other losses (baselines.py).

    r = e^0.5 = 1.65 is clipped to 1.28:
    >>> ppo_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]))[0]
    tensor([-1.2800])
    """
    # the clamp only keeps exp from overflowing to inf
    ratio = torch.exp((logp - old_logp).clamp(-20, 20))
    plain = ratio * advantage
    # Clip-Higher: more room upwards than downwards
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = -torch.minimum(plain, bounded)  # AttnRL Eq. 1, of one token
    clipped = bounded < plain
    # dual clip: bounds the loss of a token with A < 0 that became far MORE likely
    ceiling = -dual_clip * advantage
    exploded = (advantage < 0) & (loss > ceiling)
    return torch.where(exploded, ceiling, loss), clipped | exploded


def k3_kl(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference): never negative, low variance (Schulman's k3).
    At most 10 (the authors' code): one token at e^15 would dominate the clipped gradient."""
    difference = (ref_logp - logp).clamp(-20, 20)
    return (difference.exp() - difference - 1).clamp(max=10)  # KL, k3


class Learner:
    """Policy, frozen reference (None: no KL term) and optimizer.

    policy and reference are causal models, or what dist.spread made of their TokenLogprobs. loss:
    (logp, old_logp, advantage), all (N,), and lengths -> (loss, clipped), both (N,). temperature:
    the sampling temperature, so that log-probs are the same. packing: which sequences share a row
    (runtime/packing.py). The policy is updated in evaluation mode: with dropout, its log-probs
    would differ from those of sampling.
    """

    def __init__(
        self,
        policy,
        reference=None,
        *,
        loss: Callable = ppo_loss,
        lr: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        kl_coef: float = 0.001,
        token_budget: int = 16384,
        packing: Callable = alone,
    ):
        self.policy, self.reference, self.loss = policy.eval(), reference, loss
        self.temperature, self.kl_coef, self.max_grad_norm = temperature, kl_coef, max_grad_norm
        self.token_budget, self.packing = token_budget, packing
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=weight_decay)

    def train(
        self, sequences: list[TrainingSequence], mini_batch: int, seed: int, lr: float | None = None
    ) -> TrainStats:
        """One epoch: an optimizer step per mini-batch of about `mini_batch` sequences. lr: the
        learning rate of this training step (None: unchanged).

        With several ranks, every rank passes the same sequences and works on its share of each
        mini-batch.
        """
        total = TrainStats()
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        for part in mini_batches(sequences, mini_batch, seed):
            self.update(part, total)
        return TrainStats.mean(everyone([total]))

    def update(self, sequences: list[TrainingSequence], total: TrainStats) -> None:
        """One optimizer step on one mini-batch; adds this rank's token sums to `total`.

        A gradient that is not finite is not used: one bad batch would spoil the weights and AdamW's
        moments for ever.
        """
        seen = TrainStats()  # not `total`: a skipped update must not put NaN into the step's log
        self.optimizer.zero_grad()
        self.add_gradients(sequences, seen)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        grad_norm = whole(norm).item()
        total.updates += 1
        # the same number on every rank, so all of them step or none does
        if math.isfinite(grad_norm):
            self.optimizer.step()
            seen.grad_norm, seen.tokens = grad_norm, sum(s.trained for s in sequences)
            total.add(seen)
        else:
            total.skipped_updates += 1
        self.optimizer.zero_grad()

    def add_gradients(self, sequences: list[TrainingSequence], seen: TrainStats) -> None:
        """Add the gradient of the token mean over a whole mini-batch. Each rank computes its share,
        a few rows at a time."""
        # the GLOBAL normaliser, known before the first micro-batch
        tokens = max(1, sum(s.trained for s in sequences))
        rows = [[sequences[i] for i in row] for row in self.packing(sequences)]
        share = [rows[i] for i in deal([width(row) for row in rows], world())[rank()]]
        batches = in_step(token_batches(share, self.token_budget))
        for number, batch in enumerate(batches, 1):
            send_gradients(self.policy, number == len(batches))  # sent only with the last batch
            loss = self.micro_batch_loss([share[i] for i in batch], seen)
            # DDP and FSDP2 average over ranks; we need the sum
            (loss * world() / tokens).backward()

    def micro_batch_loss(self, rows: list[list], seen: TrainStats) -> torch.Tensor:
        """SUM of the token losses of a few rows (a scalar with gradient); adds to `seen`.

        With no rows (to keep in step with other ranks) the forward passes still run, and the loss
        is 0.
        """
        logp, _ = token_logprobs(self.policy, rows, self.temperature, with_entropy=False)
        leaves = [s for row in rows for s in row]
        # (N,)
        old_logp = torch.tensor([lp for s in leaves for lp in s.logprobs], device=logp.device)
        advantage = torch.tensor([a for s in leaves for a in s.advantages], device=logp.device)
        weight = torch.tensor([w for s in leaves for w in s.weights], device=logp.device)
        trained, logp = weight != 0, logp[: len(old_logp)]
        losses, clipped = self.loss(logp, old_logp, advantage, [len(s.tokens) for s in leaves])
        policy_loss = loss = (weight * losses).sum()
        if self.reference is not None:
            with torch.no_grad():
                ref_logp, _ = token_logprobs(self.reference, rows, self.temperature, False)
            kl = k3_kl(logp, ref_logp[: len(logp)])[trained].sum()
            loss = policy_loss + self.kl_coef * kl
            seen.kl += kl.item()
        seen.loss += loss.item()
        seen.policy_loss += policy_loss.item()
        seen.clip_fraction += clipped[trained].sum().item()
        ratio = (logp.detach() - old_logp)[trained].exp()
        seen.ratio += ratio.sum().item()
        seen.ratio_squared += ratio.square().sum().item()
        return loss
