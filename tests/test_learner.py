"""test_learner.py: the update rule by hand, and gradients against a second implementation with
plain loops.

`plain_gradient` shares no code with learner.py or runtime/scoring.py: one sequence at a time
without padding, full logits, a Python loop over tokens, the clip rules as if-else.
`learner_gradient` is what really moves the weights: one `update` with SGD of learning rate 1 in the
optimizer's place, weights before minus weights after.

    python -m pytest tests/test_learner.py
"""

import copy
import math
import random
from functools import partial

import pytest
import torch
from helpers import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import Learner, k3_kl, ppo_loss
from runtime.metrics import TrainStats
from runtime.scoring import Sequence, score, token_logprobs
from tree import TrainingSequence

EOS = 0  # also the id of padding: EOS must be trained all the same


def sequences_of(lengths, seed=0):
    """Random prompts and responses of these lengths, each ending in EOS, with advantages of both
    signs."""
    rng = random.Random(seed)
    made = []
    for length in lengths:
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 6))]
        tokens = [rng.randrange(1, VOCABULARY) for _ in range(length - 1)] + [EOS]
        made.append(
            TrainingSequence(prompt, tokens, [rng.uniform(-2, 2) for _ in tokens], [0.0] * length)
        )
    return made


def on_policy(policy, sequences, temperature=1.0):
    """The same sequences with the behaviour log-probs that the scoring pass gives them."""
    scores = score(policy, [Sequence(s.prompt_ids, s.tokens) for s in sequences], temperature)
    return [
        TrainingSequence(s.prompt_ids, s.tokens, s.advantages, sc.logprobs)
        for s, sc in zip(sequences, scores)
    ]


def off_policy(policy, sequences, seed=0):
    """Behaviour log-probs that put the ratios between exp(-1.5) and exp(1.5) = 4.5: every region of
    the loss occurs."""
    rng = random.Random(seed)
    return [
        TrainingSequence(
            s.prompt_ids, s.tokens, s.advantages, [lp + rng.uniform(-1.5, 1.5) for lp in s.logprobs]
        )
        for s in on_policy(policy, sequences)
    ]


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def learner_gradient(policy, sequences, reference=None, **options):
    policy = copy.deepcopy(policy)
    learner = Learner(policy, reference, max_grad_norm=math.inf, **options)
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before, stats = weights(policy), TrainStats()
    learner.update(sequences, stats)
    return before - weights(policy), stats


def plain_logprobs(model, s, temperature):
    logits = model(input_ids=torch.tensor([s.prompt_ids + s.tokens])).logits[0] / temperature
    table = logits.log_softmax(-1)
    return [table[len(s.prompt_ids) + i - 1, token] for i, token in enumerate(s.tokens)]


def plain_gradient(policy, sequences, reference=None, kl_coef=0.001, temperature=1.0):
    """Gradient, loss, and the regions of the loss that occurred."""
    policy = copy.deepcopy(policy)
    total, count, regions = 0.0, 0, set()
    for s in sequences:
        with torch.no_grad():
            ref = plain_logprobs(reference, s, temperature) if reference else None
        for i, logp in enumerate(plain_logprobs(policy, s, temperature)):
            a, ratio = s.advantages[i], torch.exp(logp - s.logprobs[i])
            if a > 0:
                region, loss = ("high", -1.28 * a) if ratio > 1.28 else ("free+", -ratio * a)
            elif ratio < 0.8:
                region, loss = "low", -0.8 * a
            elif ratio > 3.0:
                region, loss = "dual", -3.0 * a
            else:
                region, loss = "free-", -ratio * a
            if reference:
                gap = ref[i] - logp
                loss = loss + kl_coef * (torch.exp(gap) - gap - 1).clamp(max=10)
            total, count = total + loss, count + 1
            regions.add(region)
    loss = total / count
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), loss.item(), regions


# --------------------------------------------------------------------------------------------------
# The loss by hand
# --------------------------------------------------------------------------------------------------
def ppo_at(ratio, advantage, **options):
    """(loss, clipped, d loss / d logp) of one token."""
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero, a = torch.tensor([0.0, advantage], dtype=torch.float64).split(1)
    loss, clipped = ppo_loss(logp, zero, a, **options)
    loss.sum().backward()
    return loss.item(), clipped.item(), logp.grad.item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, clipped",
    [
        # A > 0, below the range: the token has become LESS likely, nothing holds it back
        (0.50, 2.0, -1.00, False),
        (0.90, 2.0, -1.80, False),
        (1.00, 2.0, -2.00, False),
        (1.25, 2.0, -2.50, False),  # above 1.2: Clip-Higher leaves room up to 1.28
        (1.50, 2.0, -2.56, True),  # 1.28 * 2
        (9.00, 2.0, -2.56, True),  # no dual clip for A > 0
        (0.50, -2.0, 1.60, True),  # A < 0, below the range: 0.8 * 2, pushed down far enough
        (0.79, -2.0, 1.60, True),
        (0.81, -2.0, 1.62, False),
        (1.00, -2.0, 2.00, False),
        # above the range the min is the plain term: the token must still come down
        (1.50, -2.0, 3.00, False),
        (2.90, -2.0, 5.80, False),
        (3.10, -2.0, 6.00, True),  # dual clip: 3 * 2
        (50.0, -2.0, 6.00, True),
        (0.10, 0.0, 0.0, False),  # A = 0: no gradient, but no clip took it
        (9.00, 0.0, 0.0, False),
    ],
)
def test_eq1_ppo_loss_by_hand(ratio, advantage, loss, clipped):
    got, flag, gradient = ppo_at(ratio, advantage)
    assert got == pytest.approx(loss, abs=1e-12)
    assert flag is clipped
    # d(-r A) / d logp = -r A
    assert gradient == (0.0 if clipped else pytest.approx(-ratio * advantage))


def test_ppo_clip_settings_are_used():
    assert ppo_at(1.15, 1.0, clip_high=0.1)[:2] == (pytest.approx(-1.1), True)
    assert ppo_at(0.85, -1.0, clip_low=0.1)[:2] == (pytest.approx(0.9), True)
    assert ppo_at(2.5, -1.0, dual_clip=2.0)[:2] == (pytest.approx(2.0), True)


@settings(max_examples=200, deadline=None)
@given(st.floats(-3, 3), st.floats(-5, 5))
def test_ppo_clipped_is_exactly_where_the_gradient_is_zero(log_ratio, advantage):
    if (
        abs(advantage) < 1e-6
        or min(abs(log_ratio - math.log(edge)) for edge in (0.8, 1.28, 3.0)) < 1e-9
    ):
        return  # no gradient to take away; on an edge both are right
    loss, clipped, gradient = ppo_at(math.exp(log_ratio), advantage)
    assert clipped is (gradient == 0.0)
    assert loss >= -1.28 * abs(advantage) - 1e-9 and loss <= 3 * abs(advantage) + 1e-9


def test_ppo_stays_finite_for_absurd_ratios():
    logp = torch.tensor([500.0, 500.0, -500.0, -500.0], requires_grad=True)
    loss, clipped = ppo_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    loss.sum().backward()
    assert torch.allclose(loss, torch.tensor([-1.28, 3.0, 0.0, 0.8]), atol=1e-6)
    assert clipped.tolist() == [True, True, False, True] and torch.equal(logp.grad, torch.zeros(4))


def test_k3_kl_by_hand():
    """d = ref - logp: e^d - d - 1. Its gradient in logp is 1 - e^d: it pulls logp towards ref from
    both sides."""
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64)
    kl = k3_kl(logp, ref)
    assert kl.tolist() == pytest.approx([0.0, math.exp(0.5) - 1.5, math.exp(-1.0)])  # e^-1 + 1 - 1
    kl.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 1 - math.exp(0.5), 1 - math.exp(-1.0)])


def test_k3_kl_is_an_unbiased_estimate_of_the_kl():
    """Weighted with the policy's own probabilities it is sum p log(p / ref), exactly."""
    p, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    assert (p * k3_kl(p.log(), ref.log())).sum().item() == pytest.approx(
        (p * (p / ref).log()).sum().item(), rel=1e-5
    )
    kl = k3_kl(torch.linspace(-30, 30, 101), torch.zeros(101))
    assert (kl >= 0).all() and kl.max() == 10


def test_k3_kl_is_at_most_10_and_has_no_gradient_there():
    """d = 2.5: e^2.5 - 3.5 = 8.68; d = 3: 16.1 is clamped."""
    logp = torch.tensor([-2.5, -3.0, -15.0], requires_grad=True)
    kl = k3_kl(logp, torch.zeros(3))
    assert kl.tolist() == pytest.approx([math.exp(2.5) - 3.5, 10.0, 10.0])
    kl.sum().backward()
    assert logp.grad.tolist() == pytest.approx([1 - math.exp(2.5), 0.0, 0.0])


def test_k3_kl_has_a_finite_gradient_where_exp_overflows():
    logp = torch.tensor([-200.0], requires_grad=True)
    k3_kl(logp, torch.zeros(1)).sum().backward()
    assert logp.grad.item() == 0


def test_tokens_of_weight_0_leave_the_mean_the_kl_and_the_counts():
    """A mini-batch with masked tokens has the gradient and the numbers of the one without them."""
    policy, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    first, masked = off_policy(policy, sequences_of([4, 6]))
    masked.weights = [0.0] * 6
    alone, one = learner_gradient(policy, [first], reference, kl_coef=0.1)
    both, two = learner_gradient(policy, [first, masked], reference, kl_coef=0.1)
    assert torch.allclose(alone, both, atol=1e-6) and one.tokens == two.tokens == 4
    for name, value in vars(one).items():
        assert vars(two)[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    nothing, stats = learner_gradient(policy, [masked], reference, kl_coef=0.1)
    assert not nothing.any() and (stats.tokens, stats.loss, stats.grad_norm) == (0, 0.0, 0.0)


# --------------------------------------------------------------------------------------------------
# Learning rate
# --------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_the_size_of_the_next_step():
    policy = tiny_model("qwen2")
    learner = Learner(policy, lr=1.0)
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = weights(policy)
    learner.train(on_policy(policy, sequences_of([3, 4])), mini_batch=2, seed=0, lr=0.0)
    assert torch.equal(weights(policy), before)
    learner.train(on_policy(policy, sequences_of([3, 4])), mini_batch=2, seed=0, lr=1.0)
    assert not torch.equal(weights(policy), before)


# --------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------
LENGTHS = [1, 2, 3, 30, 5, 17, 9]


@pytest.mark.parametrize("with_reference", [False, True])
# one row each ... all rows in one micro-batch
@pytest.mark.parametrize("token_budget", [1, 25, 70, 10_000])
def test_gradient_is_the_global_token_mean_whatever_the_micro_batch(with_reference, token_budget):
    policy, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=1) if with_reference else None
    sequences = off_policy(policy, sequences_of(LENGTHS))
    expected, loss, regions = plain_gradient(policy, sequences, reference, kl_coef=0.1)
    # else this test would prove less than it says
    assert regions == {"high", "free+", "low", "dual", "free-"}
    got, stats = learner_gradient(
        policy, sequences, reference, kl_coef=0.1, token_budget=token_budget
    )
    assert expected.norm() > 0.1
    assert (got - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert stats.loss / sum(LENGTHS) == pytest.approx(loss, abs=1e-5)
    assert stats.grad_norm == pytest.approx(expected.norm().item(), rel=1e-4)


def test_stats_by_hand():
    """Two tokens with a set ratio: 1.5 with A = 1 (clipped at 1.28), 0.9 with A = -1. Means over
    both tokens."""
    policy = tiny_model("qwen2")
    (s,) = on_policy(policy, [TrainingSequence([3, 4], [5, EOS], [1.0, -1.0], [0.0, 0.0])])
    (ref,) = on_policy(tiny_model("qwen2", seed=1), [s])
    kl = k3_kl(torch.tensor(s.logprobs), torch.tensor(ref.logprobs)).mean().item()
    s.logprobs = [s.logprobs[0] - math.log(1.5), s.logprobs[1] - math.log(0.9)]
    stats = Learner(policy, tiny_model("qwen2", seed=1), kl_coef=0.5).train(
        [s], mini_batch=8, seed=0
    )
    assert stats.policy_loss == pytest.approx((-1.28 + 0.9) / 2, abs=1e-5)
    assert stats.kl == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert stats.loss == pytest.approx(stats.policy_loss + 0.5 * kl, abs=1e-5)
    assert stats.clip_fraction == 0.5 and stats.ratio == pytest.approx((1.5 + 0.9) / 2, abs=1e-5)
    assert (stats.tokens, stats.updates, stats.skipped_updates) == (2, 1, 0)
    assert stats.ratio_squared == pytest.approx((1.5**2 + 0.9**2) / 2, abs=1e-5)


def test_clip_settings_reach_the_loss():
    """Clips 0.05, 0.1, 2 on ratio 1.5 with A = 1: -1.1; ratio 0.9 with A = -1: 0.95; ratio 2.5 with
    A = -1: 2."""
    policy = tiny_model("qwen2")
    (s,) = on_policy(policy, [TrainingSequence([3, 4], [5, 6, EOS], [1.0, -1.0, -1.0], [0.0] * 3)])
    s.logprobs = [lp - math.log(ratio) for lp, ratio in zip(s.logprobs, (1.5, 0.9, 2.5))]
    loss = partial(ppo_loss, clip_low=0.05, clip_high=0.1, dual_clip=2.0)
    stats = Learner(policy, loss=loss).train([s], mini_batch=1, seed=0)
    assert (
        stats.policy_loss == pytest.approx((-1.1 + 0.95 + 2) / 3, abs=1e-5)
        and stats.clip_fraction == 1
    )


def test_stats_are_means_over_the_tokens_of_all_mini_batches():
    """Mini-batches of one sequence, 9 tokens with A = 1 and 1 token with A = -1: loss -(9 - 1) /
    10, not -(1 - 1) / 2. The learning rate is 0, so that every mini-batch is on-policy."""
    policy = tiny_model("qwen2")
    long, short = on_policy(policy, sequences_of([9, 1]))
    long.advantages, short.advantages = [1.0] * 9, [-1.0]
    stats = Learner(policy, lr=0.0).train([long, short], mini_batch=1, seed=0)
    assert stats.policy_loss == pytest.approx(-0.8, abs=1e-5) and (stats.updates, stats.tokens) == (
        2,
        10,
    )


def test_first_update_has_ratio_one_and_loss_minus_mean_advantage_but_a_gradient():
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of(LENGTHS))
    advantages = [a for s in sequences for a in s.advantages]
    gradient, stats = learner_gradient(policy, sequences)
    count = sum(LENGTHS)
    assert stats.ratio / count == pytest.approx(1.0, abs=1e-5)
    assert stats.policy_loss / count == pytest.approx(-sum(advantages) / count, abs=1e-5)
    assert stats.clip_fraction == 0 and gradient.norm() > 0.01


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_of_sampling_makes_the_ratio_one(temperature):
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of(LENGTHS), temperature)
    gradient, stats = learner_gradient(policy, sequences, temperature=temperature)
    assert stats.ratio / sum(LENGTHS) == pytest.approx(1.0, abs=1e-5)
    expected, _, _ = plain_gradient(policy, sequences, temperature=temperature)
    assert (gradient - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    # the common bug must show, or this test proves nothing
    _, untempered = learner_gradient(policy, sequences)
    assert abs(untempered.ratio / sum(LENGTHS) - 1) > 0.01


def test_temperature_is_that_of_the_reference_too():
    """Policy = reference: the KL is 0 at any temperature, but only if both use the same one."""
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of([4, 9]), 0.6)
    _, stats = learner_gradient(policy, sequences, reference=tiny_model("qwen2"), temperature=0.6)
    assert stats.kl / 13 == pytest.approx(0.0, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# End-of-sequence and padding
# --------------------------------------------------------------------------------------------------
def test_eos_is_trained_although_it_is_the_padding_id():
    """Only the EOS of the short sequence has an advantage; a longer row pads it with the same id.
    Its log-prob must rise, and the gradient must be that of the one EOS token, not of the padding
    behind it."""
    policy = tiny_model("qwen2")
    short, long = on_policy(policy, sequences_of([4, 12]))
    assert short.tokens[-1] == EOS
    short.advantages, long.advantages = [0.0, 0.0, 0.0, 1.0], [0.0] * 12
    gradient, _ = learner_gradient(policy, [short, long])
    expected, _, _ = plain_gradient(policy, [short, long])
    assert expected.norm() > 1e-3 and (gradient - expected).abs().max() < 1e-6
    learner = Learner(policy, lr=1e-3)
    for _ in range(5):
        learner.train([short, long], mini_batch=2, seed=0)
    assert on_policy(policy, [short])[0].logprobs[-1] > short.logprobs[-1] + 0.01


# --------------------------------------------------------------------------------------------------
# Optimizer steps
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("max_grad_norm, binds", [(0.01, True), (1e6, False)])
def test_gradient_norm_is_clipped_and_logged_before_clipping(max_grad_norm, binds):
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of([5, 9]))
    raw = plain_gradient(policy, sequences)[0]
    learner = Learner(policy, max_grad_norm=max_grad_norm)
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = weights(policy)
    stats = learner.train(sequences, mini_batch=2, seed=0)
    step = before - weights(policy)
    assert step.norm().item() == pytest.approx(
        max_grad_norm if binds else raw.norm().item(), rel=1e-3
    )
    assert torch.cosine_similarity(step, raw, dim=0) > 0.999
    assert stats.grad_norm == pytest.approx(raw.norm().item(), rel=1e-4)


def test_gradients_left_by_someone_else_do_not_leak_into_the_update():
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of([5, 9]))
    expected, _ = learner_gradient(policy, sequences)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    before = weights(policy)
    learner = Learner(policy, max_grad_norm=math.inf)
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    learner.update(sequences, TrainStats())
    assert torch.equal(before - weights(policy), expected)


def adam_state(learner):
    names = ("exp_avg", "exp_avg_sq", "step")
    return [state[name].clone() for state in learner.optimizer.state.values() for name in names]


# 1e30: every gradient is finite, but not their norm
@pytest.mark.parametrize("poison", [math.inf, math.nan, 1e30])
def test_a_gradient_that_is_not_finite_is_skipped_and_training_goes_on(poison):
    """Three mini-batches of one sequence, the poisoned one in the middle: the weights and AdamW's
    moments end bit for bit as after the two good ones alone."""
    policy = tiny_model("qwen2")
    good1, bad, good2 = on_policy(policy, sequences_of([4, 5, 6]))
    bad.advantages[2] = poison
    twin = copy.deepcopy(policy)
    learner, clean = Learner(policy, lr=1e-3), Learner(twin, lr=1e-3)
    stats = TrainStats()
    learner.update([good1], stats)
    state, before = adam_state(learner), weights(policy)
    learner.update([bad], stats)
    assert stats.skipped_updates == 1 and torch.equal(weights(policy), before)
    assert all(torch.equal(a, b) for a, b in zip(adam_state(learner), state, strict=True))
    learner.update([good2], stats)
    clean.update([good1], TrainStats())
    clean.update([good2], TrainStats())
    assert (stats.updates, stats.skipped_updates) == (3, 1)
    assert torch.equal(weights(policy), weights(twin)) and not torch.equal(weights(policy), before)
    assert all(
        torch.equal(a, b) for a, b in zip(adam_state(learner), adam_state(clean), strict=True)
    )
    assert all(p.grad is None for p in policy.parameters())


def test_skipped_updates_are_counted_by_train_and_left_out_of_the_mean_grad_norm():
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of([4, 5, 6]))
    norms = [plain_gradient(policy, [s])[0].norm().item() for s in (sequences[0], sequences[2])]
    sequences[1].advantages[0] = math.inf
    stats = Learner(policy, lr=0.0).train(sequences, mini_batch=1, seed=0)
    assert (stats.updates, stats.skipped_updates) == (3, 1)
    assert stats.grad_norm == pytest.approx(sum(norms) / 2, rel=1e-4)


def test_weight_decay_and_learning_rate_reach_adamw():
    """One AdamW step from zero moments: w <- w (1 - lr wd) - lr g / (|g| + eps): a weight without
    gradient decays."""
    policy = tiny_model("qwen2")
    sequences = on_policy(policy, sequences_of([4]))
    before = policy.get_input_embeddings().weight.detach().clone()
    Learner(policy, lr=1e-2, weight_decay=0.5).train(sequences, mini_batch=1, seed=0)
    after = policy.get_input_embeddings().weight.detach()
    used = sorted(set(sequences[0].prompt_ids + sequences[0].tokens[:-1]))
    unused = [i for i in range(VOCABULARY) if i not in used]
    assert torch.allclose(after[unused], before[unused] * (1 - 1e-2 * 0.5), atol=1e-7)
    assert torch.allclose(
        (after[used] - before[used] * (1 - 1e-2 * 0.5)).abs().max(), torch.tensor(1e-2), rtol=1e-2
    )


def test_dropout_plays_no_role_in_the_update():
    """Behaviour log-probs come from evaluation mode: with dropout in the update the first ratio
    would not be 1."""
    policy = tiny_model("qwen2", attention_dropout=0.5)
    sequences = on_policy(policy, sequences_of([7, 3]))
    stats = Learner(policy.train(), lr=0.0).train(sequences, mini_batch=9, seed=0)
    assert stats.ratio == pytest.approx(1, abs=1e-5)


def test_no_sequences_no_update():
    policy = tiny_model("qwen2")
    before = weights(policy)
    assert Learner(policy).train([], mini_batch=4, seed=0) == TrainStats()
    assert torch.equal(weights(policy), before)


def test_train_is_reproducible_and_depends_on_the_seed():
    def trained(seed):
        policy = tiny_model("qwen2")
        Learner(policy, lr=1e-3).train(
            off_policy(policy, sequences_of(LENGTHS)), mini_batch=2, seed=seed
        )
        return weights(policy)

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_tiny_policy_raises_the_good_sequence_and_lowers_the_bad_one():
    policy = tiny_model("qwen2")
    good, bad = sequences_of([6, 6])
    bad.prompt_ids = good.prompt_ids
    good.advantages, bad.advantages = [1.0] * 6, [-1.0] * 6
    start = on_policy(policy, [good, bad])
    learner = Learner(policy, lr=3e-3)
    for step in range(10):
        learner.train(on_policy(policy, [good, bad]), mini_batch=2, seed=step)
    end = on_policy(policy, [good, bad])
    assert sum(end[0].logprobs) > sum(start[0].logprobs) + 1
    assert sum(end[1].logprobs) < sum(start[1].logprobs) - 1


def test_reference_is_unchanged_without_gradients_and_pulls_the_policy_back():
    policy, reference = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    before = weights(reference)
    sequences = on_policy(policy, sequences_of([6, 9]))
    for s in sequences:
        s.advantages = [0.0] * len(s.tokens)  # only the KL term moves the policy
    learner = Learner(policy, reference, lr=1e-3, kl_coef=1.0)
    kl = [learner.train(sequences, mini_batch=2, seed=0).kl for _ in range(10)]
    assert torch.equal(weights(reference), before) and all(
        p.grad is None for p in reference.parameters()
    )
    assert kl[-1] < 0.9 * kl[0]


def test_token_logprobs_equal_full_logits():
    policy = tiny_model("qwen2")
    sequences = sequences_of(LENGTHS)
    got, _ = token_logprobs(policy, [[s] for s in sequences], 0.8)
    expected = torch.stack([lp for s in sequences for lp in plain_logprobs(policy, s, 0.8)])
    assert torch.allclose(got, expected, atol=1e-5) and len(got) == sum(LENGTHS)
