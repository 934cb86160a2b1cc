"""attnrl.py: train a reasoning model with AttnRL. Methods, presets, one training step, the loop.

    python attnrl.py                                    # the toy: a real run on a laptop CPU
    python attnrl.py --method treerl                    # a baseline, or an ablation: see METHODS
    python attnrl.py --preset paper --model DIR --dry_run        # memory and tokens of that run

`step` is one training step. These files implement its parts:

    runtime/rollout.py   ONE generation call: continuations of batch m, initial responses of m + 1
    runtime/scoring.py   a forward pass over each: behaviour log-probs, entropies; FCI by fci.py
    runtime/grading.py   right or wrong?
    sampler.py           which problems of batch m + 1 are expanded, how many trees; batch sizes
    tree.py              branch points of batch m + 1; values and advantages of batch m
    learner.py           the PPO update on batch m

One-step off-policy: the initial responses of batch m + 1 are sampled before the update on batch m,
so they are one update older than their continuations. Each token keeps the log-prob of the policy
that sampled it. With --one_step_off_policy false a second call samples them, after the update.

Not in this file: building the parts (runtime/setup.py), settings (runtime/config.py), the files of
a run (runtime/runlog.py, runtime/checkpoint.py), displays (runtime/monitor.py, tools/view.py).
"""

import runtime  # isort: split

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import sampler
import tree
from eval import held_out_accuracy
from fci import split_steps, without_answer
from learner import Learner, ppo_loss
from runtime import checkpoint, dist
from runtime.cli import stop_on_user_error
from runtime.config import Config, parse_settings
from runtime.data import Problem
from runtime.metrics import TrainStats, step_metrics
from runtime.monitor import Display, stop_on_signals
from runtime.rollout import Completion, Request, probe_requests, request_seed
from runtime.runlog import RunFolder, check_folder
from runtime.scoring import Sequence
from runtime.setup import Parts, build
from runtime.stream import ProblemStream

# -------- Methods and presets: the first of each is the default ----------------------------------
SYNCHRONOUS = dict(one_step_off_policy=False)
NO_ADS = dict(ads_filter="none", ads_expansion=False, ads_batch=False, ads_drop=False)
PRL = NO_ADS | SYNCHRONOUS | dict(advantage="prl", kl_coef=0.0)
METHODS: dict[str, dict] = {  # each is AttnRL with a few settings changed
    "attnrl": {},
    "atb_ads_nofilter": dict(ads_filter="none"),
    "atb_ads_noexpand": dict(ads_expansion=False),
    "atb_drop_easy": dict(ads_filter="easy"),
    "atb": NO_ADS | SYNCHRONOUS,
    "treerl_off": NO_ADS | dict(branch="entropy"),
    "treerl": NO_ADS | SYNCHRONOUS | dict(branch="entropy"),
    "grpo": NO_ADS | SYNCHRONOUS | dict(advantage="grpo"),
    "prl": PRL,
    "frpo": PRL | dict(prl_steps="length", prl_length=1, prl_eta=100.0),
    "datpo": NO_ADS | SYNCHRONOUS | dict(branch="step_entropy", advantage="datpo"),
}

TOY_MODEL = str(Path(__file__).parent / "toy" / "model")
TOY_DATA = dict(model=TOY_MODEL, problems="toy:8:4000:1", test_problems="toy:8:100:2")
TOY_RUN = dict(steps=20, batch_size=24, eval_every=4, eval_temperature=1.0)
# The tiny policy knows the task but slips: 50 times the paper's learning rate. Responses have 9
# steps: with Delta = 1, 7 of them can have an FCI above 0; with the paper's 4, only 4.
TOY_METHOD = dict(max_response=110, delta=1, lr=5e-5, kl_coef=0.0, mini_batch=256)
# For models up to about 1B, on one GPU or a CPU; answers of 5 to 15 steps (why: docs/methods.md)
SMALL_DATA = dict(model="", problems="", test_problems="", max_prompt=512)  # you give them
SMALL_RUN = dict(steps=100, batch_size=16, eval_samples=4, token_budget=8192, rollout_tokens=32768)
SMALL_METHOD = dict(max_response=1024, delta=1, lr=5e-6, mini_batch=96)
PAPER_RUN = dict(eval_samples=32, eval_every=20, save_every=10)
PAPER_MACHINE = dict(engine="vllm", dtype="bf16", activation_checkpointing=True, gpus=8)
PRESETS: dict[str, dict] = {  # the same for all methods
    "toy": TOY_DATA | TOY_RUN | TOY_METHOD | dict(token_budget=8192, prl_steps="blank"),
    "small": SMALL_DATA | SMALL_RUN | SMALL_METHOD,
    "paper": PAPER_RUN | PAPER_MACHINE | dict(min_branch_gap=512, token_budget=32768),
}


def parse_config(argv: list[str]) -> Config:
    """Settings of the preset, then the method, then the given options. Raises UserError."""
    return parse_settings(argv, PRESETS, METHODS)


# -------- What a step works on -------------------------------------------------------------------
@dataclass
class Group:
    """One problem with its responses, which carry their branch points and continuations."""

    index: int  # position in the whole batch, of which each rank has every world-th group
    number: int  # position of the problem in the problem set
    problem: Problem
    responses: list[tree.Response] = field(default_factory=list)
    branches: int = 0  # continuations per branch point; 0: config.continuations
    filtered: bool = False  # an easy problem that the filter kept from expansion
    easy_mean: float = 0.0  # the mean FCI that the filter compared it with

    def trees(self) -> int:
        """How many of its responses are expanded."""
        return sum(bool(r.branch_points) for r in self.responses)


@dataclass
class Batch:
    """This rank's share of the problems of one training step."""

    step: int  # the training step it is for
    groups: list[Group]


@dataclass
class Rollout(Request):
    """A generation request, and the problem and response that it belongs to."""

    group: Group
    parent: Any = None  # the tree.Response that it continues; None: an initial response
    at: int = 0  # how many of the parent's tokens it keeps


@dataclass
class Run(Parts):
    """The state of a run: the parts from runtime/setup.py, and what changes between steps."""

    learner: Learner  # the optimizer, and the frozen reference of the KL term
    stream: ProblemStream  # the order of problems
    easy_filter: sampler.EasyFilter  # the running mean of Eq. 8
    adaptive_batch: sampler.AdaptiveBatch  # the number of problems a step, Eq. 10


@dataclass
class StepResult:
    """What `step` returns."""

    groups: list[Group]  # of all ranks
    sequences: list[tree.TrainingSequence]  # one per leaf that is trained
    stats: TrainStats
    upcoming: Batch | None  # the next step's batch, half-finished


def setup(config: Config, display: Display) -> Run:
    """Build a run from its settings. Raises UserError."""
    parts = build(config, display)
    low, high, dual = config.clip_low, config.clip_high, config.dual_clip
    loss: Callable = ppo_loss if config.loss == "ppo" else baselines.LOSSES[config.loss]
    loss = partial(loss, clip_low=low, clip_high=high, dual_clip=dual)
    settings = config.learner_settings() | dict(loss=loss, packing=parts.packing)
    reference = parts.frozen_reference if config.kl_coef else None
    sizes = config.target_sequences, *config.batch_bounds(), config.batch_lam
    run = Run(
        **vars(parts),
        learner=Learner(parts.trained_policy, reference, **settings),
        stream=ProblemStream(len(parts.problems), config.seed),
        easy_filter=sampler.EasyFilter(),
        adaptive_batch=sampler.AdaptiveBatch(config.batch_size, *sizes),
    )
    run.sync_engine()
    return run


# -------- One training step ----------------------------------------------------------------------
def step(run: Run, number: int, batch: Batch | None) -> StepResult:
    """Training step `number`: sample, grow trees, update the policy.

    batch: its problems, with the initial responses and branch points from the step before. None:
    there are none yet (at the first step, and always in synchronous training).
    """
    config = run.config
    run.monitor.start_step()
    if batch is None:
        batch = new_batch(run, number)
        sample(run, None, batch)
    # one-step off-policy: this batch's call also samples the next batch's initial responses
    ahead = config.one_step_off_policy and number < config.steps
    upcoming = new_batch(run, number + 1) if ahead else None  # its size was fixed a step ago
    sample(run, batch, upcoming)
    # from here on every rank holds all groups, so all ranks compute the same trees and metrics
    with run.monitor.phase("exchange"):
        groups = dist.everyone(batch.groups)
    sequences = [s for group in groups for s in leaves(config, group)]  # one per leaf
    if config.ads_drop:  # if all advantages are 0, there is no policy gradient
        sequences = tree.drop_zero(sequences)
    stats = update_policy(run, number, sequences)
    if config.ads_batch:  # Eq. 10: the size of a later batch
        run.adaptive_batch.update(sampled=len(groups), kept=len(sequences))
    return StepResult(groups, sequences, stats, upcoming)


def new_batch(run: Run, number: int) -> Batch:
    """The next problems of the stream; of these, every world-th is this rank's."""
    taken = run.stream.take(run.adaptive_batch.problems())
    return Batch(number, dist.mine([Group(j, i, run.problems[i]) for j, i in enumerate(taken)]))


def sample(run: Run, batch: Batch | None, upcoming: Batch | None) -> None:
    """ONE generation call: continuations for `batch`, initial responses for `upcoming`; then score
    and grade both, and plan `upcoming`."""
    rollouts = continuation_rollouts(run.config, batch) if batch else []
    rollouts += initial_rollouts(run.config, upcoming) if upcoming else []
    with run.monitor.phase("generate"):
        completions = run.engine.generate(rollouts) if rollouts else []
    run.monitor.generated_tokens += sum(len(c.tokens) for c in completions)
    run.probes = probe_requests(rollouts, completions) or run.probes  # for the check after a sync
    sampled = list(zip(rollouts, completions))
    if batch:
        add_continuations(run, [(r, c) for r, c in sampled if r.parent])
    if upcoming:
        add_responses(run, [(r, c) for r, c in sampled if not r.parent])
        plan(run, upcoming)


def request(config: Config, batch: Batch, group: Group, *place: int, parent=None, at=0) -> Rollout:
    """One request. The length limit holds for prefix + continuation. The seed depends only on the
    rollout's place in the run, so its tokens do not depend on what else is sampled."""
    prompt = group.problem.prompt_ids + (parent.tokens[:at] if parent else [])
    seed = request_seed(config.seed, batch.step, group.index, *place)
    length = config.max_response - at
    return Rollout(prompt, length, config.temperature, seed, group, parent, at)


def initial_rollouts(config: Config, batch: Batch) -> list[Rollout]:
    """G per problem (without a tree: as many as a tree has leaves)."""
    numbers = range(config.samples_per_problem())
    return [request(config, batch, group, i) for group in batch.groups for i in numbers]


def continuation_rollouts(config: Config, batch: Batch) -> list[Rollout]:
    """T continuations per branch point."""
    return [
        request(config, batch, group, i, at, t, parent=response, at=at)
        for group in batch.groups
        for i, response in enumerate(group.responses)
        for at in response.branch_points
        for t in range(group.branches or config.continuations)
    ]


def add_responses(run: Run, sampled: list[tuple[Rollout, Completion]]) -> None:
    """Scoring pass 1: initial responses get behaviour log-probs, entropies, FCI and rewards."""
    branching = run.config.branches()
    responses, sequences = [], []
    for rollout, c in sampled:
        bounds = split_steps(c.tokens, run.separators)
        response = tree.Response(c.tokens, c.logprobs, bounds=bounds, finished=c.finished)
        rollout.group.responses.append(response)
        responses.append(response)
        scored = bounds if branching else None
        logged = rollout.group.index < run.config.log_samples
        sequences.append(Sequence(rollout.prompt_ids, c.tokens, scored, logged))
    scores = run.score(run.scorer, sequences, only_logprobs=not branching)
    grades = run.grade([(c.tokens, rollout.group.problem) for rollout, c in sampled])
    for r, own, grade in zip(responses, scores, grades):
        (r.reward, r.boxed), r.entropies, r.attention = grade, own.entropies, own.attention
        r.fci, r.branchable = without_answer(own.fci, r.tokens, r.bounds, run.separators)
        r.logprobs, r.weights = run.old_logprobs(engine=r.logprobs, learner=own.logprobs)
    if run.config.advantage == "prl":
        baselines.add_prl_inputs(run, responses, sequences)


def add_continuations(run: Run, sampled: list[tuple[Rollout, Completion]]) -> None:
    """Scoring pass 2: log-probs of the new suffixes only; the grade is for prefix + suffix."""
    sequences = [Sequence(r.prompt_ids, c.tokens) for r, c in sampled]
    scores = run.score(run.scorer, sequences, only_logprobs=True)
    whole = [(r.parent.tokens[: r.at] + c.tokens, r.group.problem) for r, c in sampled]
    for (rollout, c), own, grade in zip(sampled, scores, run.grade(whole)):
        old, weights = run.old_logprobs(engine=c.logprobs, learner=own.logprobs)
        logged = rollout.group.index < run.config.log_samples
        entropies = own.entropies if logged else []
        new = tree.Continuation(rollout.at, c.tokens, old, grade[0], weights, entropies)
        new.finished, new.boxed = c.finished, grade[1]
        rollout.parent.continuations.append(new)


def plan(run: Run, batch: Batch) -> None:
    """Adaptive sampling and attention-based tree branching: which responses to expand and where."""
    config = run.config
    if not config.branches():
        return
    rates = [sampler.solve_rate([r.reward for r in group.responses]) for group in batch.groups]
    fcis = [sampler.problem_fci([r.fci for r in group.responses]) for group in batch.groups]
    # the filter's mean is over all ranks
    keep = dist.mine(run.easy_filter.keep(dist.everyone(rates), dist.everyone(fcis)))
    for group, rate, kept in zip(batch.groups, rates, keep):
        group.easy_mean = run.easy_filter.mean
        if config.ads_filter == "fci":
            group.filtered = not kept  # Eq. 8
        elif config.ads_filter == "easy":
            group.filtered = rate == 1  # an ablation of the paper
        if not group.filtered:
            rng = random.Random(request_seed(config.seed, batch.step, group.index))
            choose_expansions(config, group, rate, rng)


def choose_expansions(config: Config, group: Group, rate: float, rng: random.Random) -> None:
    """Which responses of a problem are expanded (Eq. 9), and from which tokens (Eq. 7)."""
    G, N = config.group_size, config.branch_points
    count = sampler.tree_count(rate, G) if config.ads_expansion else G
    if config.advantage == "datpo":
        N, group.branches = baselines.datpo_sizes(rate, N, config.continuations)
    for i in sampler.choose_trees([r.reward for r in group.responses], count, rng):
        response = group.responses[i]
        response.branch_points = tree.choose_branch_points(
            response, config.branch, N, rng, config.rho, config.min_branch_gap, config.delta
        )


def leaves(config: Config, group: Group) -> list[tree.TrainingSequence]:
    """One training sequence per leaf of the problem's tree, with its advantages."""
    own = config.advantage == "tree"
    flatten = tree.tree_sequences if own else baselines.flattening(config)
    sequences = flatten(group.problem.prompt_ids, group.responses)
    if config.mask_cut_off:
        baselines.mask_cut_off(sequences, group.responses)
    return sequences


def update_policy(run: Run, number: int, sequences: list[tree.TrainingSequence]) -> TrainStats:
    """PPO on one batch; then the engine gets the new weights."""
    config = run.config
    with run.monitor.phase("train"):
        run.engine.sleep()
        seed, lr = request_seed(config.seed, number), config.learning_rate(number)
        stats = run.learner.train(sequences, config.mini_batch, seed, lr)
    run.sync_engine()
    return stats


# -------- The loop -------------------------------------------------------------------------------
def train(config: Config, stop=lambda: False) -> Path:
    """Start a run, or resume it; returns its folder.

    stop() is called after every step. If it is True on any rank, the run saves and ends.
    """
    check_folder(config)
    display = Display(config.steps, config.log_level, config.quiet)
    run = setup(config, display)
    # if a batch was half-finished when the run stopped, its part is not sampled again
    done, best, groups = checkpoint.restore(run.checkpoint, run, Group)
    batch = None if groups is None else Batch(done + 1, groups)
    folder = RunFolder(config, display.say)  # only now: a refused run changes nothing
    started = time.perf_counter() - folder.forget_after(done if run.checkpoint else -1)
    if not run.checkpoint:
        tested = held_out_accuracy(run)
        best = tested["test_accuracy"], 0
        folder.write_start(tested, run)
        checkpoint.save(folder.path, 0, run, None, best, config.keep)
    for number in range(done + 1, config.steps + 1):
        result = step(run, number, batch)
        batch, record = result.upcoming, step_metrics(run, number, result)
        if number == config.steps or (config.eval_every and number % config.eval_every == 0):
            record |= held_out_accuracy(run)
            best = max(best, (record["test_accuracy"], number))
        record["seconds/total"] = round(time.perf_counter() - started, 3)
        folder.write_step(record, result, display, run.tokenizer, partial(leaves, config))
        leaving = any(dist.everyone([stop()]))
        due = config.save_every and number % config.save_every == 0
        if leaving or due or "test_accuracy" in record:
            checkpoint.save(folder.path, number, run, batch, best, config.keep)
        if leaving:
            display.stopped(number, folder.path)
            break
    folder.close(display)
    dist.stop(run.engine.close)
    return folder.path


def main(argv: list[str]) -> None:
    config = parse_config(argv)
    if config.dry_run:
        from tools.plan import print_plan  # here: training does not need it

        return print_plan(config, argv)
    folder = train(config, stop_on_signals())
    from tools.view import print_run

    return print_run(folder)


if __name__ == "__main__":
    with stop_on_user_error("attnrl.py"):
        main(sys.argv[1:])
