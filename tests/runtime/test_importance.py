"""test_importance.py: an engine that is not quite the learner. Whose log-probs PPO takes as the old
ones, truncated importance weights, and the check that an engine with weights of its own has the
policy's.

The mismatch is real and known: engines here are copies of the policy with slightly other weights,
so that every number can be computed a second time, by `plain_logprobs` (the model's logits, nothing
else) and by hand.

    python -m pytest tests/runtime/test_importance.py
"""

import copy
import math
import random
import re

import pytest
import torch
from fixtures import metrics_of, typed
from helpers import random_tokens, tiny_model
from toy_runs import set_up, step_without_sync, train

import attnrl
from attnrl import Config, parse_config
from baselines import grpo_sequences
from learner import Learner
from runtime import dist
from runtime.cli import UserError, stop_on_user_error
from runtime.metrics import TrainStats
from runtime.rollout import Completion, Request, TransformersEngine, probe_requests, request_seed
from runtime.scoring import engine_gap, tis_weights
from tree import TrainingSequence, tree_sequences

SMALL = typed(
    "--steps 1 --batch_size 2 --problems toy:6:20:1 --test_problems toy:6:4:2"
    " --eval_samples 1 --ads_filter none --ads_expansion false"
)  # every response is branched
CLOSE = dict(rel=0, abs=1e-4)
EOS = [5, 11]


@torch.no_grad()
def plain_logprobs(
    model, prompt: list[int], tokens: list[int], temperature: float = 1.0
) -> list[float]:
    """Log-probs of the tokens after the prompt, straight from the logits."""
    logits = (
        model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
        / temperature
    )
    return logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()


@torch.no_grad()
def disturbed(model, seed: int, size: float = 0.02):
    """A copy with slightly other weights: an engine with errors of its own, only larger."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.mul_(1 + size * torch.randn(parameter.shape, generator=generator))
    return other


# --------------------------------------------------------------------------------------------------
# The weights
# --------------------------------------------------------------------------------------------------
def test_tis_weights_by_hand():
    """w = min(exp(learner - engine), C)."""
    learner, engine = [-1.0, -1.0, -2.0, -0.5, -3.0], [-1.0, -1.5, -1.0, -2.5, -3.1]
    # the fourth would be exp(2) = 7.4
    wanted = [1.0, math.exp(0.5), math.exp(-1.0), 2.0, math.exp(0.1)]
    assert tis_weights(learner, engine, cap=2.0) == pytest.approx(wanted, rel=1e-12)
    assert tis_weights(learner, engine, cap=1.0) == pytest.approx(
        [1.0, 1.0, math.exp(-1.0), 1.0, 1.0]
    )
    assert tis_weights([], [], cap=2.0) == []


def test_tis_weights_of_tokens_that_one_side_holds_impossible():
    """No overflow: impossible for the engine is truncated, impossible for the learner weighs
    nothing, NaN stays visible."""
    assert tis_weights([-1.0, -1.0, -900.0], [-math.inf, -2000.0, -1.0], cap=3.0) == [3.0, 3.0, 0.0]
    assert tis_weights([-math.inf], [-1.0], cap=3.0) == [0.0]
    assert math.isnan(tis_weights([math.nan], [-1.0], cap=3.0)[0])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--tis_cap", "0.5"], "--tis_cap 0.5: must be 0 or at least 1"),
        (["--tis_cap", "2", "--behaviour", "engine"], "needs --behaviour learner"),
        (["--tis_cap", "-1"], "--tis_cap -1.0: must be at least 0"),
        (["--tis_cap", "nan"], "--tis_cap nan"),
        (["--tis_cap", "inf"], "--tis_cap inf"),
        (["--behaviour", "other"], "--behaviour"),
    ],
)
def test_contradictory_switches_are_one_line_and_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop, stop_on_user_error("attnrl.py"):
        attnrl.main([*SMALL, *args])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1, error


def test_both_switches_are_off_by_default():
    for preset in ("toy", "paper"):
        config = parse_config(["--preset", preset])
        assert (config.behaviour, config.tis_cap) == ("learner", 0.0)
    assert TrainingSequence([1], [2, 3], [0.5, 0.5], [-1.0, -1.0]).weights == [1.0, 1.0]
    for tis_cap in (1.0, 2.0):
        Config(tis_cap=tis_cap).check()
    Config(behaviour="engine").check()


# --------------------------------------------------------------------------------------------------
# From the engine to the training sequences
# --------------------------------------------------------------------------------------------------
class Sampled:
    """One batch as a step makes it, with all four models that had a part in it: policy and engine
    at the time of the initial responses, policy and engine one update later, when the continuations
    were sampled."""

    def __init__(self, tmp_path, *options):
        self.run = set_up(*SMALL, "--out", tmp_path / "run", *options)
        self.temperature = self.run.config.temperature
        self.policies, self.engines = [], []
        self.batch = attnrl.new_batch(self.run, 1)
        for batch, upcoming in ((None, self.batch), (self.batch, None)):
            self.engines.append(disturbed(self.run.policy, seed=len(self.engines)))
            self.policies.append(copy.deepcopy(self.run.policy))
            self.run.engine = TransformersEngine(self.engines[-1], self.run.engine.eos_ids)
            attnrl.sample(self.run, batch, upcoming)
            with torch.no_grad():
                for parameter in self.run.policy.parameters():  # "an update"
                    parameter.mul_(1.03)

    def __iter__(self):
        """(prompt, response) of the whole batch."""
        return (
            (group.problem.prompt_ids, r) for group in self.batch.groups for r in group.responses
        )

    def logprobs(self, models, prompt, response, continuation=None) -> list[float]:
        """What models[0] says of the initial response's tokens, or models[1] of a
        continuation's."""
        if continuation is None:
            return plain_logprobs(models[0], prompt, response.tokens, self.temperature)
        return plain_logprobs(
            models[1],
            prompt + response.tokens[: continuation.at],
            continuation.tokens,
            self.temperature,
        )

    def check(self, logprobs, weights) -> None:
        """Every response and continuation, and every training sequence made of them, has
        `logprobs(...)` and `weights(...)`: functions of what `self.logprobs` wants, or None for
        "all 1"."""
        for prompt, response in self:
            wanted = []  # (tokens, log-probs, weights) of each leaf
            own, own_weights = logprobs(prompt, response), weights(prompt, response)
            assert (
                response.logprobs == pytest.approx(own, **CLOSE)
                and len(response.continuations) == 4
            )
            wanted.append((response.tokens, own, own_weights))
            # the order of the leaves: the last branch point first
            for c in sorted(response.continuations, key=lambda c: -c.at):
                new, new_weights = logprobs(prompt, response, c), weights(prompt, response, c)
                assert c.logprobs == pytest.approx(new, **CLOSE)
                wanted.append(
                    (
                        response.tokens[: c.at] + c.tokens,
                        own[: c.at] + new,
                        own_weights[: c.at] + new_weights,
                    )
                )
            for flatten, leaves in ((tree_sequences, wanted), (grpo_sequences, wanted[:1])):
                made = flatten(prompt, [response])
                assert len(made) == len(leaves)
                for sequence, (tokens, lp, w) in zip(made, leaves):
                    assert sequence.tokens == tokens
                    assert sequence.logprobs == pytest.approx(
                        lp, **CLOSE
                    ) and sequence.weights == pytest.approx(w, **CLOSE)

    def ones(self, prompt, response, continuation=None) -> list[float]:
        return [1.0] * len((continuation or response).tokens)


@pytest.mark.parametrize("temperature", ["1", "0.6"])
@pytest.mark.parametrize("behaviour", ["learner", "engine"])
def test_old_logprobs_are_those_of_the_side_that_was_chosen(tmp_path, behaviour, temperature):
    sampled = Sampled(tmp_path, "--behaviour", behaviour, "--temperature", temperature)
    models = sampled.policies if behaviour == "learner" else sampled.engines
    sampled.check(lambda *of: sampled.logprobs(models, *of), sampled.ones)
    # the premise: all four models differ by far more than the tolerance above
    for prompt, response in sampled:
        of = [
            plain_logprobs(m, prompt, response.tokens)
            for m in (*sampled.policies, *sampled.engines)
        ]
        assert all(
            max(abs(a - b) for a, b in zip(of[i], of[j])) > 1e-3 for i in range(4) for j in range(i)
        )


@pytest.mark.parametrize("temperature, cap", [("1", 1.02), ("0.6", 1.3)])
def test_importance_weights_follow_their_tokens_into_the_training_sequences(
    tmp_path, temperature, cap
):
    """A continuation's prefix keeps the weights that its tokens got when the older policy's engine
    sampled them; the suffix has those of the newer. PPO's old log-probs stay the learner's."""
    sampled = Sampled(tmp_path, "--tis_cap", str(cap), "--temperature", temperature)

    def by_hand(*of):
        pairs = zip(sampled.logprobs(sampled.policies, *of), sampled.logprobs(sampled.engines, *of))
        return [min(math.exp(learner - engine), cap) for learner, engine in pairs]

    sampled.check(lambda *of: sampled.logprobs(sampled.policies, *of), by_hand)
    weights = [w for _, r in sampled for one in (r, *r.continuations) for w in one.weights]
    truncated = sum(w == cap for w in weights)
    assert 0 < truncated < len(weights) / 2 and min(weights) < 0.95 and max(weights) == cap


def test_the_gap_between_engine_and_learner_is_measured(tmp_path):
    """metrics' logprob_gap: mean and maximum over all sampled tokens, initial responses and
    continuations."""
    sampled = Sampled(tmp_path)
    gaps = [
        abs(a - b)
        for prompt, r in sampled
        for c in (None, *r.continuations)
        for a, b in zip(
            sampled.logprobs(sampled.engines, prompt, r, c),
            sampled.logprobs(sampled.policies, prompt, r, c),
        )
    ]
    gap = sampled.run.monitor.gap
    assert (gap.tokens, gap.total / gap.tokens, gap.largest) == (
        len(gaps),
        pytest.approx(sum(gaps) / len(gaps), abs=1e-6),
        pytest.approx(max(gaps), **CLOSE),
    )
    assert gap.largest > 0.1


def test_with_an_exact_engine_the_switches_change_next_to_nothing(tmp_path):
    """Whole runs: the weights are 1 and both sides' log-probs the same up to rounding, and so is
    what is learnt."""
    runs = [
        metrics_of(train(parse_config([*SMALL, "--out", str(tmp_path / str(i)), *options])))[-1]
        for i, options in enumerate(([], ["--tis_cap", "2"], ["--behaviour", "engine"]))
    ]
    same = [key for key in runs[0] if not key.startswith("seconds/")]
    assert runs[0]["train/updates"] == 1 and 0 < runs[0]["logprob_gap/max"] < 1e-4
    for other in runs[1:]:
        assert {key: other[key] for key in same} == pytest.approx(
            {key: runs[0][key] for key in same}, rel=1e-3, abs=1e-5
        )


def test_a_scoring_pass_that_gives_nothing_but_log_probs_is_left_out_with_the_engines(tmp_path):
    """GRPO wants neither FCI nor entropies: the same update without a pass. AttnRL keeps that over
    the initial responses."""

    def run(*options):
        # without a tree there is nothing to filter or expand
        usual = SMALL[:-4] if "grpo" in options else SMALL
        out = str(tmp_path / "-".join(options))
        return metrics_of(train(parse_config([*usual, "--out", out, *options])))[-1]

    scored, unscored = (
        run("--method", "grpo", "--behaviour", side) for side in ("learner", "engine")
    )
    assert (
        scored["seconds/score"] > 0 == unscored["seconds/score"]
        and scored["train/updates"] == unscored["train/updates"] > 0
    )
    for key in (
        "train/loss",
        "train/policy_loss",
        "train/ratio",
        "train/grad_norm",
        "train/tokens",
        "initial/reward",
    ):
        assert unscored[key] == pytest.approx(scored[key], rel=1e-3, abs=1e-5)
    tree = set_up(*SMALL, "--behaviour", "engine", "--out", tmp_path / "tree")
    batch = attnrl.new_batch(tree, 1)
    attnrl.sample(tree, None, batch)
    assert all(
        len(r.entropies) == len(r.tokens) and r.fci for g in batch.groups for r in g.responses
    )
    gaps = tree.monitor.gap.tokens
    attnrl.sample(tree, batch, None)
    ends = [c for g in batch.groups for r in g.responses for c in r.continuations]
    assert (
        tree.monitor.gap.tokens == gaps > 0
        and ends
        and all(len(c.logprobs) == len(c.tokens) for c in ends)
    )


# --------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------
MODEL = tiny_model("qwen2")


def weighted_sequences(seed: int, weights: bool = True) -> list[TrainingSequence]:
    """Old log-probs up to 2.5 away from the model's own, so that every kind of clip happens, and
    random weights."""
    rng, weigh = random.Random(seed), random.Random(seed + 1000)
    sequences = []
    for length in (5, 17, 30, 9):
        prompt, tokens = random_tokens(rng, 4), random_tokens(rng, length)
        old = [lp + rng.uniform(-2.5, 2.5) for lp in plain_logprobs(MODEL, prompt, tokens)]
        sequences.append(
            TrainingSequence(
                prompt,
                tokens,
                [rng.choice([-1.0, 0.5, 2.0]) for _ in tokens],
                old,
                [weigh.uniform(0, 2) for _ in tokens] if weights else [],
            )
        )
    return sequences


def loss_by_hand(model, sequences: list[TrainingSequence], weigh: bool = True):
    """sum over tokens of w * PPO loss, one token at a time, with graph; and how often each kind of
    clip happened."""
    total, kinds = 0.0, {"plain": 0, "above": 0, "below": 0, "dual": 0}
    for s in sequences:
        logits = model(torch.tensor([s.prompt_ids + s.tokens])).logits[
            0, len(s.prompt_ids) - 1 : -1
        ]
        logp = logits.log_softmax(-1)[range(len(s.tokens)), s.tokens]
        for lp, old, advantage, w in zip(logp, s.logprobs, s.advantages, s.weights):
            ratio, kind = torch.exp(lp - old), "plain"
            if advantage > 0 and ratio > 1.28:
                ratio, kind = 1.28, "above"
            elif advantage < 0 and ratio < 0.8:
                ratio, kind = 0.8, "below"
            elif advantage < 0 and ratio > 3:
                ratio, kind = 3.0, "dual"
            kinds[kind] += 1
            total = total - (w if weigh else 1.0) * ratio * advantage
    return total, kinds


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_loss_is_the_sum_of_weighted_token_losses_by_hand():
    """Value and gradient: the weight multiplies the token's PPO loss, and no gradient flows into
    the weight itself."""
    sequences = weighted_sequences(1)
    model = copy.deepcopy(MODEL)
    wanted, kinds = loss_by_hand(model, sequences)
    assert min(kinds.values()) >= 2, kinds
    wanted.backward()
    wanted_gradients = gradients(model)
    model.zero_grad()
    stats = TrainStats()
    loss = Learner(model, kl_coef=0.0).micro_batch_loss([[s] for s in sequences], stats)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert stats.policy_loss == stats.loss == pytest.approx(loss.item())
    torch.testing.assert_close(
        gradients(model),
        wanted_gradients,
        rtol=1e-3,
        atol=1e-5 * wanted_gradients.abs().max().item(),
    )
    unweighted, _ = loss_by_hand(model, sequences, weigh=False)
    # the weights are not idle here
    assert abs(unweighted.item() - wanted.item()) > 0.01 * abs(wanted.item())


def test_without_weights_the_loss_is_plain_ppo():
    sequences = weighted_sequences(2, weights=False)
    assert all(s.weights == [1.0] * len(s.tokens) for s in sequences)
    loss = Learner(copy.deepcopy(MODEL), kl_coef=0.0).micro_batch_loss(
        [[s] for s in sequences], TrainStats()
    )
    assert loss.item() == pytest.approx(
        loss_by_hand(MODEL, sequences, weigh=False)[0].item(), rel=1e-5
    )


def test_weights_leave_kl_ratio_and_clip_fraction_alone():
    """They weigh the policy loss only; the KL to the reference is the policy's own business."""
    seen = []
    for weights in (True, False):
        stats = TrainStats()
        learner = Learner(copy.deepcopy(MODEL), disturbed(MODEL, 3), kl_coef=0.1)
        learner.micro_batch_loss([[s] for s in weighted_sequences(1, weights)], stats)
        assert stats.loss == pytest.approx(stats.policy_loss + 0.1 * stats.kl, rel=1e-5)
        seen.append(stats)
    weighted, plain = seen
    assert (weighted.kl, weighted.ratio, weighted.clip_fraction) == (
        plain.kl,
        plain.ratio,
        plain.clip_fraction,
    )
    assert weighted.kl > 0 and weighted.policy_loss != plain.policy_loss


def test_the_mean_is_over_tokens_not_over_weights():
    """Weights of 0.5 halve the gradient of an update, exactly; they are not normalised away."""
    found = []
    for weight in (1.0, 0.5):
        sequences = [
            TrainingSequence(
                s.prompt_ids, s.tokens, s.advantages, s.logprobs, [weight] * len(s.tokens)
            )
            for s in weighted_sequences(3)
        ]
        learner = Learner(copy.deepcopy(MODEL), kl_coef=0.0, max_grad_norm=1e9, token_budget=40)
        learner.optimizer.step = lambda learner=learner: found.append(gradients(learner.policy))
        found.append(learner.train(sequences, mini_batch=99, seed=0).policy_loss)
    whole, whole_loss, half, half_loss = found
    assert torch.equal(half, whole / 2) and half_loss == pytest.approx(whole_loss / 2, rel=1e-6)


# --------------------------------------------------------------------------------------------------
# An engine with weights of its own (transformers here; vLLM in test_vllm.py)
# --------------------------------------------------------------------------------------------------
def requests(count: int = 6) -> list[Request]:
    return [
        Request(random_tokens(random.Random(i), 5 + i), 20, 0.6, request_seed(0, i))
        for i in range(count)
    ]


def gap_of(error: UserError) -> tuple[float, float, float]:
    numbers = re.search(
        r"engine's mean log-prob is (\S+), the learner's (\S+), mean \|difference\| (\S+), above",
        str(error),
    )
    return tuple(map(float, numbers.groups()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_copys_weights_are_synced_by_value(tied):
    policy = tiny_model("qwen2", tie_word_embeddings=tied)
    engine = TransformersEngine(disturbed(policy, 1), EOS)
    before = engine.generate(requests())
    engine.sync_weights(dist.full_weights(policy))
    for name, value in policy.state_dict().items():
        mine = engine.model.state_dict()[name]
        assert torch.equal(mine, value) and mine.data_ptr() != value.data_ptr()
    assert (
        engine.generate(requests())
        == TransformersEngine(policy, EOS).generate(requests())
        != before
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(
        engine.model.state_dict()["lm_head.weight"], policy.state_dict()["lm_head.weight"]
    )
    engine.sync_weights(dist.full_weights(policy))
    assert torch.equal(
        engine.model.state_dict()["lm_head.weight"], policy.state_dict()["lm_head.weight"]
    )


def test_a_copy_in_half_precision_gets_rounded_weights():
    policy = tiny_model("llama")
    engine = TransformersEngine(disturbed(policy, 1).to(torch.bfloat16), EOS)
    engine.sync_weights(dist.full_weights(policy))
    for name, value in policy.state_dict().items():
        mine = engine.model.state_dict()[name]
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, value.to(torch.bfloat16))


def test_an_engine_that_is_the_policy_needs_no_copying():
    policy = tiny_model("qwen2")
    engine = TransformersEngine(policy, EOS)
    before = {name: value.data_ptr() for name, value in policy.state_dict().items()}
    engine.sync_weights(dist.full_weights(policy))
    assert {name: value.data_ptr() for name, value in policy.state_dict().items()} == before
    assert engine_gap(engine, policy, requests(), 1e-3) < 1e-6


def test_a_forgotten_sync_of_a_copy_is_caught_and_both_sides_are_named():
    policy = tiny_model("qwen2")
    engine = TransformersEngine(copy.deepcopy(policy), EOS)
    assert engine_gap(engine, policy, requests(), 1e-3) < 1e-6
    learner = Learner(policy, lr=1e-4, kl_coef=0.0)
    learner.train(weighted_sequences(4), mini_batch=99, seed=0)
    with pytest.raises(UserError) as stop:
        engine_gap(engine, policy, requests(), 1e-3)
    completions = engine.generate(requests())
    engines = [
        lp
        for r, c in zip(requests(), completions)
        for lp in plain_logprobs(engine.model, r.prompt_ids, c.tokens, 0.6)
    ]
    learners = [
        lp
        for r, c in zip(requests(), completions)
        for lp in plain_logprobs(policy, r.prompt_ids, c.tokens, 0.6)
    ]
    gaps = [abs(a - b) for a, b in zip(engines, learners)]
    wanted = [sum(values) / len(engines) for values in (engines, learners, gaps)]
    assert gap_of(stop.value) == pytest.approx(wanted, abs=1e-4) and "\n" not in str(stop.value)
    engine.sync_weights(dist.full_weights(policy))
    assert engine_gap(engine, policy, requests(), 1e-3) < 1e-6


@pytest.mark.parametrize("side", ["engine", "policy"])
def test_weights_that_are_not_finite_are_caught(side):
    policy = tiny_model("qwen2")
    engine = TransformersEngine(copy.deepcopy(policy), EOS)
    broken = {"engine": engine.model, "policy": policy}[side]
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    with pytest.raises(UserError, match="weights that are not finite"):
        engine_gap(engine, policy, requests(), 1e-3)


def test_the_check_is_a_mean_over_tokens_and_has_a_tolerance():
    policy = tiny_model("qwen2")
    engine = TransformersEngine(disturbed(policy, 5, size=0.002), EOS)
    gap = engine_gap(engine, policy, requests(), tolerance=10)
    assert 1e-3 < gap < 1
    assert engine_gap(engine, policy, requests(), tolerance=gap) == gap
    with pytest.raises(UserError, match="--sync_tolerance"):
        engine_gap(engine, policy, requests(), tolerance=0.999 * gap)
    # a rank that has sampled nothing yet
    assert engine_gap(engine, policy, [], tolerance=0.0) == 0.0


def test_probes_continue_what_was_sampled_within_its_limits():
    rng = random.Random(6)
    made = [Request(random_tokens(rng, 1 + i), 1 + 7 * i, 0.7, i) for i in range(8)]
    completions = [
        Completion(random_tokens(rng, rng.randint(1, r.max_tokens)), [], True) for r in made
    ]
    probes = probe_requests(made, completions)
    assert len(probes) == 4 and probe_requests([], []) == []
    for r, c, probe in zip(made, completions, probes):
        assert (
            probe.prompt_ids == r.prompt_ids + c.tokens[: len(c.tokens) // 2]
            and probe.temperature == 0.7
        )
        assert 1 <= probe.max_tokens <= 16
        # fits the model's positions
        assert len(probe.prompt_ids) + probe.max_tokens <= len(r.prompt_ids) + r.max_tokens


def test_a_sharded_policys_engine_is_a_copy_and_a_forgotten_sync_stops_the_run(
    tmp_path, monkeypatch
):
    """FSDP2 on one rank: the training loop's own sync and check."""
    run = set_up(*SMALL, "--parallel", "fsdp", "--out", tmp_path / "run")
    try:
        assert run.engine.model is not run.policy and run.monitor.sync_gap < 1e-5
        said = step_without_sync(run, monkeypatch)
        print("a step of the toy without sync: mean gap", gap_of(said)[2])
        run.sync_engine()
        assert 0 < run.monitor.sync_gap < 1e-5
        assert all(
            torch.equal(run.engine.model.state_dict()[name], value)
            for name, value in dist.full_weights(run.policy)
        )
    finally:
        dist.stop()
