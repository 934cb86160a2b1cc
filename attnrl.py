r"""attnrl.py: train a reasoning model with AttnRL. The configuration, the training loop, the
command line.

    python attnrl.py                                       # the toy: a real run on a laptop CPU, a
                                                           few minutes
    python attnrl.py --method treerl                       # the same on TreeRL; also grpo, prl, and
                                                           ablations: see METHODS
    torchrun --nproc_per_node 8 attnrl.py --preset paper --model DIR --problems FILE.parquet
    --test_problems FILE.parquet python attnrl.py --preset paper --model DIR --dry_run  # memory,
    batch and tokens of that run, without a GPU

One training step, each part in the file of its name (`train` below is the loop):

    rollout.py   ONE generation call: continuations for batch m and the initial responses of batch
                 m+1
    fci.py       one scoring pass over each: behaviour log-probs, entropies, and FCI of the initial
                 responses
    eval.py      grade all of them
    sampler.py   which problems of batch m+1 are expanded, how many trees, how large batch m+2 is
    tree.py      branch points of batch m+1; values and advantages of batch m, flattened into
                 training sequences
    learner.py   the PPO update on batch m

One-step off-policy: the initial responses of batch m+1 are sampled before the update on batch m, so
they are one update older than their continuations; each token keeps the log-prob of the policy that
sampled it. With --one_step_off_policy false the initial responses get a call of their own, after
the update.

Several GPUs (dist.py): each rank samples, scores and grades every world-th problem; a finished
batch is exchanged, and from there on all ranks hold the same groups and compute the same trees and
metrics; updates are dealt out by token count.

A run's folder: config.json, metrics.jsonl (a line a step, keys explained in the README),
batches.jsonl, samples.jsonl, curves.png and explorer.html (view.py), step-N/ (checkpoints that
AutoModelForCausalLM.from_pretrained loads; checkpoint.py).
"""

import copy
import math
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import checkpoint
import dist
import eval as evaluation
import view
from data import Problem, load_problems
from errors import Parser, UserError, stop_on_user_error
from fci import (
    Scores,
    Sequence,
    TokenLogprobs,
    check_model,
    prl_steps,
    score,
    separator_tokens,
    split_steps,
    without_answer,
)
from learner import Learner, TrainStats, learning_rate, tis_weights
from rollout import Completion, Request, TransformersEngine, request_seed
from runlog import (
    FAULTS,
    Display,
    Gap,
    RunFolder,
    batch_metrics,
    batch_notices,
    check_folder,
    say_out_of_memory,
    stop_on_signals,
)
from sampler import (
    AdaptiveBatch,
    EasyFilter,
    ProblemStream,
    choose_trees,
    problem_fci,
    solve_rate,
    tree_count,
)
from tree import (
    Continuation,
    Response,
    TrainingSequence,
    choose_branch_points,
    drop_zero,
    grpo_sequences,
    prl_sequences,
    tree_sequences,
)
from vllm_engine import VLLMEngine, engine_gap, probe_requests


# --------------------------------------------------------------------------------------------------
# Configuration = command line
# --------------------------------------------------------------------------------------------------
def option(default, text: str, group: str = ""):
    """A setting; `group` begins a group of settings in --help."""
    return field(default=default, metadata={"help": text, "group": group})


@dataclass
class Config:
    """Every setting of a run. Training defaults are the paper's; a preset changes some, the command
    line has the last word.
    """

    preset: Literal["toy", "paper"] = option("toy", "settings to start from", "what is run")
    method: Literal[
        "attnrl",
        "atb_ads_nofilter",
        "atb_ads_noexpand",
        "atb_drop_easy",
        "atb",
        "treerl_off",
        "treerl",
        "grpo",
        "prl",
    ] = option(
        "attnrl", "what is run: AttnRL, a baseline, or AttnRL with one part changed (see METHODS)"
    )
    model: str = option(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "directory (or hub name) of the initial policy",
        "what is trained, on what",
    )
    problems: str = option(
        "deepscaler.json", "training problems: FILE.json, .jsonl, .parquet or toy:8:2000:1"
    )
    test_problems: str = option("aime24.parquet", "held-out problems")
    drop_bad_rows: bool = option(
        False, "leave out malformed, duplicate, conflicting ... rows instead of stopping"
    )
    prompt_suffix: str = option(
        " Let's think step by step and output the final answer within \\boxed{}.",
        "added to every problem of a file that does not end in it",
    )
    reward: str = option("eval:grade", "module:function(response, answers) -> number")
    seed: int = option(0, "fixes the order of problems, rollouts and mini-batches")
    steps: int = option(500, "training steps")
    eval_every: int = option(
        10, "steps between evaluations; 0: only at the start and the end", "evaluation"
    )
    eval_samples: int = option(8, "k of avg@k")
    eval_temperature: float = option(0.6, "sampling temperature of evaluations")
    eval_max_response: int = option(0, "tokens per response of evaluations; 0: max_response")
    out: str = option(
        "", "folder of the run; default runs/PRESET-SEED-DATE-TIME", "what is written and shown"
    )
    save_every: int = option(0, "steps between checkpoints; 0: at evaluations")
    keep: int = option(2, "checkpoints that are kept")
    resume: Literal["never", "auto"] = option(
        "never", "auto: go on from the newest checkpoint in --out, if there is one"
    )
    resume_changed: bool = option(False, "resume although settings have changed")
    log_samples: int = option(2, "problems per step written to samples.jsonl, for the explorer")
    track: Literal["none", "tensorboard", "wandb"] = option("none", "metrics also go there")
    log_level: Literal["debug", "info", "warning"] = option(
        "info", "debug: phases with their seconds; warning: notices only"
    )
    quiet: bool = option(False, "no progress bar, and --log_level warning")
    engine: Literal["transformers", "vllm"] = option("transformers", "rollout engine", "sampling")
    batch_size: int = option(64, "problems per step (the first step's, if --ads_batch)")
    group_size: int = option(6, "G: initial responses per problem")
    branch_points: int = option(2, "N: branch points per expanded response")
    continuations: int = option(2, "T: continuations per branch point")
    grpo_samples: int = option(
        0, "responses per problem without a tree; 0: as many as the tree has leaves"
    )
    max_prompt: int = option(1024, "tokens")
    max_response: int = option(8192, "tokens, a continuation's shared prefix included")
    temperature: float = option(1.0, "sampling temperature of training")
    one_step_off_policy: bool = option(
        True, "sample batch m+1 and the continuations of batch m in one call"
    )
    branch: Literal["fci", "entropy", "random"] = option(
        "fci", "how branch points are chosen", "branching"
    )
    delta: int = option(4, "FCI counts attention from steps at least this many steps later")
    rho: float = option(0.2, "branch points are among the top rho of FCI")
    min_branch_gap: int = option(0, "tokens between branch points")
    ads_filter: Literal["fci", "easy", "none"] = option(
        "fci", "not expanded: easy problems of low FCI (Eq. 8), all easy ones", "adaptive sampling"
    )
    ads_expansion: bool = option(True, "more trees for harder problems (Eq. 9); else all G")
    ads_batch: bool = option(True, "adapt the number of problems (Eq. 10)")
    target_sequences: int = option(0, "B' of Eq. 10; 0: all leaves, batch_size * G * (1 + N * T)")
    batch_lam: float = option(0.9, "lambda of Eq. 10: how slowly the batch size moves")
    batch_range: float = option(
        4.0, "the adaptive batch stays between batch_size / this and batch_size * this"
    )
    behaviour: Literal["learner", "engine"] = option(
        "learner", "whose log-probs of the sampled tokens are PPO's old ones", "update"
    )
    tis_cap: float = option(
        0.0, "truncated importance sampling for the engine's mismatch: cap of the weights; 0: off"
    )
    advantage: Literal["tree", "grpo", "prl"] = option(
        "tree", "tree: Eq. 2-3; grpo: Eq. 1, prl: process rewards; no branching"
    )
    prl_eta: float = option(
        200.0, "PRL: process rewards are log-ratios to the initial policy, divided by this"
    )
    prl_steps: Literal["length", "newline", "blank"] = option("length", "PRL: what ends a step")
    prl_length: int = option(256, "PRL: tokens of a step, with --prl_steps length")
    lr: float = option(1e-6, "peak learning rate of AdamW")
    lr_schedule: Literal["constant", "linear", "cosine"] = option("constant", "after the warm-up")
    warmup_steps: int = option(0, "training steps of linear warm-up")
    weight_decay: float = option(0.01, "of AdamW")
    max_grad_norm: float = option(1.0, "gradient norm clip")
    mini_batch: int = option(192, "training sequences per optimizer step")
    kl_coef: float = option(
        0.001, "weight of the KL to the initial policy; 0: none (then only PRL keeps that model)"
    )
    clip_low: float = option(0.2, "PPO clip below 1")
    clip_high: float = option(0.28, "PPO clip above 1")
    dual_clip: float = option(3.0, "bound on the loss of tokens with negative advantage")
    token_budget: int = option(16384, "padded tokens per forward and backward pass")
    rollout_tokens: int = option(65536, "tokens in the KV cache at once", "machine")
    grading_workers: int = option(2, "processes for answers that need a computer algebra system")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "cuda: LOCAL_RANK, of those in CUDA_VISIBLE_DEVICES"
    )
    dtype: Literal["fp32", "bf16"] = option(
        "fp32", "of forward passes; bf16 keeps fp32 master weights (FSDP2)"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = option(
        "auto", "whole weights on every GPU, or a part; auto: fsdp for bf16"
    )
    activation_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them"
    )
    cpu_offload: bool = option(False, "keep fsdp's weights, gradients and moments in host memory")
    engine_memory: float = option(0.4, "share of the GPU for vLLM (it sleeps during updates)")
    sync_tolerance: float = option(
        0.0, "largest mean log-prob gap of the check after each weight sync; 0: by dtype"
    )
    dry_run: bool = option(
        False, "print the plan of the run (ranks, memory, batch, tokens) and exit"
    )
    gpus: int = option(0, "GPUs that --dry_run plans for; 0: as torchrun says, or 1")
    gpu_gib: float = option(80.0, "memory of one GPU that --dry_run plans for, GiB")

    def samples_per_problem(self) -> int:
        return self.group_size if self.advantage == "tree" else self.grpo_samples

    def keeps_reference(self) -> bool:
        return bool(self.kl_coef) or self.advantage == "prl"

    def resolve(self) -> None:
        """Replace "0: derived from others" by the numbers, so that config.json holds what really
        ran."""
        leaves = self.group_size * (1 + self.branch_points * self.continuations)
        self.grpo_samples = self.grpo_samples or leaves
        self.target_sequences = self.target_sequences or self.batch_size * (
            leaves if self.advantage == "tree" else self.grpo_samples
        )
        self.device = evaluation.pick_device(self.device)  # type: ignore[assignment]
        self.eval_max_response = self.eval_max_response or self.max_response
        self.gpus = self.dry_run and self.gpus or int(os.environ.get("WORLD_SIZE", 1))
        if self.parallel == "auto":
            self.parallel = "fsdp" if self.dtype == "bf16" else "ddp"
        if not self.sync_tolerance:  # on a GPU vLLM's attention computes fp32 in TF32
            self.sync_tolerance = (
                0.05 if self.dtype == "bf16" else 1e-2 if self.device == "cuda" else 1e-4
            )

    def check(self) -> None:
        """Raises UserError for values that cannot work: one line that names the option."""
        at_least = {
            0: (
                "eval_every branch_points grpo_samples min_branch_gap target_sequences batch_lam lr"
                " warmup_steps kl_coef clip_low clip_high seed eval_temperature weight_decay rho"
                " log_samples eval_max_response save_every tis_cap engine_memory sync_tolerance"
                " gpus gpu_gib"
            ),
            1: (
                "steps eval_samples batch_size group_size continuations max_prompt max_response"
                " delta batch_range mini_batch token_budget dual_clip rollout_tokens"
                " grading_workers keep prl_length"
            ),
        }
        for low, names in at_least.items():
            for name in names.split():
                if not low <= getattr(self, name) < float("inf"):  # also catches NaN
                    raise UserError(
                        f"--{name} {getattr(self, name)}: must be a number, at least {low}"
                    )
        for name in ("temperature", "max_grad_norm", "prl_eta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        for name, high in (
            ("rho", 1),
            ("batch_lam", 1),
            ("engine_memory", 1),
            ("batch_range", 1000),
            ("batch_size", 10**5),
            ("group_size", 10**4),
            ("grpo_samples", 10**5),
            ("branch_points", 10**4),
            ("continuations", 10**4),
            ("eval_samples", 10**5),
            ("grading_workers", 1000),
        ):
            if getattr(self, name) > high:
                raise UserError(f"--{name} {getattr(self, name)}: must be at most {high}")
        if self.parallel == "ddp" and (self.dtype == "bf16" or self.cpu_offload):
            raise UserError(
                "--parallel ddp: keeps whole fp32 weights on the GPU; --dtype bf16 and"
                " --cpu_offload need fsdp"
            )
        if self.cpu_offload and self.parallel == "auto" and self.dtype == "fp32":
            raise UserError("--cpu_offload: needs --parallel fsdp")
        if self.resume == "auto" and not self.out:
            raise UserError("--resume auto: name the run's folder with --out")
        if 0 < self.tis_cap < 1 or self.tis_cap and self.behaviour == "engine":
            raise UserError(
                f"--tis_cap {self.tis_cap}: must be 0 or at least 1, and needs --behaviour learner:"
                " with the engine's log-probs PPO's own ratio makes up for the mismatch"
            )


PRESETS: dict[str, dict] = {
    # A tiny policy that knows but slips: 50 times the paper's learning rate, and a run takes
    # minutes on two cores. Responses have 9 steps: Delta = 1 leaves FCI 7 of them to choose from
    # (the paper's 4 would leave 4).
    "toy": dict(
        model=str(Path(__file__).parent / "toy" / "model"),
        problems="toy:8:4000:1",
        test_problems="toy:8:100:2",
        steps=20,
        batch_size=24,
        batch_range=1.5,
        eval_every=4,
        eval_temperature=1.0,
        max_response=110,
        delta=1,
        lr=5e-5,
        kl_coef=0.0,
        mini_batch=256,
        token_budget=8192,
        prl_steps="blank",
    ),
    "paper": dict(
        min_branch_gap=512,
        eval_samples=32,
        eval_max_response=32768,
        eval_every=20,
        save_every=10,
        engine="vllm",
        dtype="bf16",
        activation_checkpointing=True,
        token_budget=32768,
        gpus=8,
    ),
}

SYNCHRONOUS = dict(one_step_off_policy=False)
NO_ADS = dict(ads_filter="none", ads_expansion=False, ads_batch=False)
# each is AttnRL but for a few settings; a preset's settings are the same for all
METHODS: dict[str, dict] = {
    "attnrl": {},
    "atb_ads_nofilter": dict(ads_filter="none"),
    "atb_ads_noexpand": dict(ads_expansion=False),
    "atb_drop_easy": dict(ads_filter="easy"),
    "atb": NO_ADS | SYNCHRONOUS,
    "treerl_off": NO_ADS | dict(branch="entropy"),
    "treerl": NO_ADS | SYNCHRONOUS | dict(branch="entropy"),
    "grpo": NO_ADS | SYNCHRONOUS | dict(advantage="grpo"),
    "prl": NO_ADS | SYNCHRONOUS | dict(advantage="prl", kl_coef=0.0),
}


def parse_config(argv: list[str]) -> Config:
    """Preset and method first, then the options that were given. Raises UserError for a wrong
    one."""
    parser = Parser(
        "attnrl.py",
        "Train a reasoning model with AttnRL or a baseline.",
        "python attnrl.py --method treerl --steps 10 --out runs/mine",
        "[--preset toy|paper] [--method NAME] [--OPTION VALUE ...]",
    )
    parser.add_settings(Config)
    for name, table, chosen in (("--preset", PRESETS, "toy"), ("--method", METHODS, "attnrl")):
        for flag, value in zip(argv, argv[1:] + [""]):
            chosen = (
                value
                if flag == name
                else flag.removeprefix(f"{name}=")
                if flag.startswith(f"{name}=")
                else chosen
            )
        parser.set_defaults(**table.get(chosen, {}))
    config = Config(**vars(parser.parse_args(argv)))
    config.check()
    config.resolve()
    return config


# --------------------------------------------------------------------------------------------------
# A batch on its way through a step
# --------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """One problem with its responses; `branch_points[i]` lists where response i is branched
    (absent: not expanded)."""

    index: int  # in the whole batch, of which each rank has every world-th group
    number: int  # of the problem in its set
    problem: Problem
    responses: list[Response] = field(default_factory=list)
    branch_points: dict[int, list[int]] = field(default_factory=dict)
    filtered: bool = False  # an easy problem that the filter kept from expansion
    easy_mean: float = 0.0  # what the filter compared it with
    cut: int = 0  # initial responses that met the length limit


@dataclass
class Batch:
    step: int  # the training step it is for
    groups: list[Group]  # this rank's; all of them once the batch is finished (`Trainer.exchange`)


def initial_requests(config: Config, batch: Batch) -> list[Request]:
    """G requests per problem. A rollout's seed is its place in the run, so it does not depend on
    what else is sampled."""
    return [
        Request(
            group.problem.prompt_ids,
            config.max_response,
            config.temperature,
            request_seed(config.seed, batch.step, group.index, i),
        )
        for group in batch.groups
        for i in range(config.samples_per_problem())
    ]


def continuation_requests(
    config: Config, batch: Batch
) -> list[tuple[Group, Response, int, Request]]:
    """(group, response, branch position, request), T per branch point. Prefix + continuation keep
    the length limit."""
    return [
        (
            group,
            response,
            at,
            Request(
                group.problem.prompt_ids + response.tokens[:at],
                config.max_response - at,
                config.temperature,
                request_seed(config.seed, batch.step, group.index, i, at, t),
            ),
        )
        for group in batch.groups
        for i, points in group.branch_points.items()
        for response in [group.responses[i]]
        for at in points
        for t in range(config.continuations)
    ]


class Trainer:
    """The parts of a run and what a step does with them, in the order in which `train` calls
    them."""

    def __init__(self, config: Config, display: Display):
        self.config, self.display = config, display
        device = dist.start(config.device, alone=config.parallel == "fsdp")
        self.checkpoint = checkpoint.find(config)
        self.policy, self.tokenizer, eos_ids = evaluation.load_model(
            str(self.checkpoint or config.model), "cpu"
        )
        load: dict[str, Any] = dict(
            max_prompt=config.max_prompt,
            suffix=config.prompt_suffix,
            drop=config.drop_bad_rows,
            say=display.say,
        )
        self.test_problems = load_problems(config.test_problems, self.tokenizer, **load)
        self.problems = load_problems(
            config.problems, self.tokenizer, evaluation=self.test_problems, **load
        )
        evaluation.check_context(self.policy, self.problems, config.max_response)
        evaluation.check_context(
            self.policy, self.test_problems, config.eval_max_response, option="eval_max_response"
        )
        check_model(self.policy, str(self.checkpoint or config.model))
        self.separators = separator_tokens(self.tokenizer)
        # vLLM first: it checks the GPU's free memory. The policy itself can sample only where it is
        # whole.
        # the engine has weights of its own
        self.copied = config.engine == "vllm" or config.parallel == "fsdp"
        if config.engine == "vllm":
            lengths = [len(p.prompt_ids) + config.max_response for p in self.problems]
            lengths += [len(p.prompt_ids) + config.eval_max_response for p in self.test_problems]
            self.engine: Any = VLLMEngine(
                config.model,
                eos_ids,
                max(lengths),
                config.dtype,
                device,
                config.engine_memory,
                config.rollout_tokens,
            )
        else:
            model = (
                dist.cast(copy.deepcopy(self.policy), config.dtype).to(device)
                if self.copied
                else self.policy
            )
            self.engine = TransformersEngine(model, eos_ids, config.rollout_tokens)
        place: dict[str, Any] = dict(
            device=device,
            parallel=config.parallel,
            dtype=config.dtype,
            cpu_offload=config.cpu_offload,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.scorer = TokenLogprobs(self.policy)
        policy, reference = dist.spread(self.scorer, **place), None
        if config.keeps_reference():
            # read again, now that the policy is on the GPU: one copy in host memory at a time
            self.reference = TokenLogprobs(
                evaluation.load_model(config.model, "cpu")[0].requires_grad_(False).eval()
            )
            reference = dist.spread(self.reference, **place)
        self.learner = Learner(
            policy,
            reference if config.kl_coef else None,
            lr=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            temperature=config.temperature,
            kl_coef=config.kl_coef,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            token_budget=config.token_budget,
        )
        self.reward = evaluation.Reward(config.reward, config.grading_workers)
        # adaptive sampling
        self.stream = ProblemStream(len(self.problems), config.seed)
        self.easy_filter = EasyFilter()
        self.batch_size = AdaptiveBatch(
            config.batch_size,
            config.target_sequences,
            low=max(1, int(config.batch_size / config.batch_range)),
            high=int(config.batch_size * config.batch_range),
            lam=config.batch_lam,
        )
        self.generated_tokens, self.gap = 0, Gap()
        self.probes = [
            Request(p.prompt_ids, 16, config.temperature, config.seed)
            for p in self.test_problems[:4]
        ]
        # KV of the engine's first, random weights: a prefix cache that is not reset shows at once
        if self.copied:
            self.engine.generate(self.probes)
        self.sync()
        self.start_step()

    def start_step(self) -> None:
        """The step's clock starts anew (what is counted goes on: the warm-up call belongs to the
        first step)."""
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)  # by phase

    @contextmanager
    def phase(self, name: str):
        """Show what is going on, and add its wall-clock to this step's split."""
        self.display.phase(name)
        started = time.perf_counter()
        with say_out_of_memory(name):
            yield
        self.seconds[name] += time.perf_counter() - started

    def new_batch(self, step: int) -> Batch:
        """The next problems of the stream; of these, every world-th is this rank's."""
        taken = [
            Group(j, i, self.problems[i])
            for j, i in enumerate(self.stream.take(self.batch_size.size))
        ]
        return Batch(step, dist.mine(taken))

    def sample(self, batch: Batch | None, upcoming: Batch | None) -> None:
        """ONE generation call: continuations for `batch`, initial responses for `upcoming`; then
        score, grade, plan."""
        continued = continuation_requests(self.config, batch) if batch else []
        requests = [request for *_, request in continued] + (
            initial_requests(self.config, upcoming) if upcoming else []
        )
        with self.phase("generate"):
            completions = self.engine.generate(requests) if requests else []
        self.generated_tokens += sum(len(c.tokens) for c in completions)
        self.probes = probe_requests(requests, completions) or self.probes
        if batch:
            self.add_continuations(continued, completions[: len(continued)])
        if upcoming:
            self.add_responses(upcoming, completions[len(continued) :])
            self.plan(upcoming)

    def add_responses(self, batch: Batch, completions: list[Completion]) -> None:
        """Scoring pass 1: initial responses get behaviour log-probs, entropies, FCI and rewards."""
        config = self.config
        owners = [group for group in batch.groups for _ in range(config.samples_per_problem())]
        bounds = [
            (
                prl_steps(c.tokens, self.separators, config.prl_steps, config.prl_length)
                if config.advantage == "prl"
                else split_steps(c.tokens, self.separators)
            )
            for c in completions
        ]
        sequences = [
            Sequence(
                group.problem.prompt_ids, c.tokens, row if config.advantage == "tree" else None
            )
            for group, c, row in zip(owners, completions, bounds)
        ]
        scores = self.score(self.scorer, sequences, only_logprobs=config.advantage != "tree")
        initial: list[list[float]] = [[]] * len(scores)
        if config.advantage == "prl":
            initial = [s.logprobs for s in self.score(self.reference, sequences)]
        rewards = self.grade([(c.tokens, group.problem) for group, c in zip(owners, completions)])
        for group, c, row, s, ref_logprobs, reward in zip(
            owners, completions, bounds, scores, initial, rewards
        ):
            fci, branchable = without_answer(s.fci, c.tokens, row, self.separators)
            group.responses.append(
                Response(
                    c.tokens,
                    reward=reward,
                    entropies=s.entropies,
                    bounds=row,
                    fci=fci,
                    branchable=branchable,
                    ref_logprobs=ref_logprobs,
                    **self.behaviour(c, s),
                )
            )
            group.cut += not c.finished

    def add_continuations(
        self, continued: list[tuple[Group, Response, int, Request]], completions: list[Completion]
    ) -> None:
        """Scoring pass 2: log-probs of the new suffixes only; the grade is for prefix +
        continuation."""
        scores = self.score(
            self.scorer,
            [
                Sequence(request.prompt_ids, c.tokens)
                for (*_, request), c in zip(continued, completions)
            ],
            only_logprobs=True,
        )
        rewards = self.grade(
            [
                (response.tokens[:at] + c.tokens, group.problem)
                for (group, response, at, _), c in zip(continued, completions)
            ]
        )
        for (group, response, at, _), c, s, reward in zip(continued, completions, scores, rewards):
            entropies = s.entropies if group.index < self.config.log_samples else []
            response.continuations.append(
                Continuation(
                    at, c.tokens, reward=reward, entropies=entropies, **self.behaviour(c, s)
                )
            )

    def score(
        self, model: TokenLogprobs, sequences: list[Sequence], only_logprobs: bool = False
    ) -> list[Scores]:
        """A scoring pass; none (and empty Scores) where it would only give the policy's log-probs,
        and PPO takes the engine's."""
        config = self.config
        if only_logprobs and config.behaviour == "engine":
            return [Scores([], []) for _ in sequences]
        with self.phase("score"):
            return score(model, sequences, config.temperature, config.delta, config.token_budget)

    def behaviour(self, c: Completion, s: Scores) -> dict[str, Any]:
        """Behaviour log-probs of sampled tokens and, if asked for, their importance weights; logs
        how far engine and learner are apart."""
        self.gap.add(c.logprobs, s.logprobs)
        if not math.isfinite(sum(c.logprobs) + sum(s.logprobs)):
            raise UserError(
                "the log-probs of sampled tokens are not finite: the policy's weights are damaged;"
                " remove the newest checkpoint, and --resume auto --resume_changed true with a"
                " lower --lr"
            )
        return dict(
            logprobs=c.logprobs if self.config.behaviour == "engine" else s.logprobs,
            weights=(
                tis_weights(s.logprobs, c.logprobs, self.config.tis_cap)
                if self.config.tis_cap
                else []
            ),
        )

    def grade(self, items: list[tuple[list[int], Problem]]) -> list[float]:
        with self.phase("grade"):
            texts = self.tokenizer.batch_decode(
                [tokens for tokens, _ in items], skip_special_tokens=True
            )
            return self.reward(
                [(text, problem.answers) for text, (_, problem) in zip(texts, items)]
            )

    def plan(self, batch: Batch) -> None:
        """Adaptive sampling and attention-based tree branching (ATB): who is expanded, how often,
        and where."""
        config = self.config
        if config.advantage != "tree":
            return
        rewards = [[r.reward for r in group.responses] for group in batch.groups]
        rates = [solve_rate(row) for row in rewards]
        fcis = [problem_fci([r.fci for r in group.responses]) for group in batch.groups]
        # its mean is over all ranks
        keep = dist.mine(self.easy_filter.keep(dist.everyone(rates), dist.everyone(fcis)))
        for j, group in enumerate(batch.groups):
            group.easy_mean = self.easy_filter.mean
            if {"fci": not keep[j], "easy": rates[j] == 1, "none": False}[config.ads_filter]:
                group.filtered = True
                continue
            rng = random.Random(request_seed(config.seed, batch.step, group.index))
            count = (
                tree_count(rates[j], config.group_size)
                if config.ads_expansion
                else config.group_size
            )
            for i in choose_trees(rewards[j], count, rng):
                points = choose_branch_points(
                    group.responses[i],
                    config.branch,
                    config.branch_points,
                    rng,
                    config.rho,
                    config.min_branch_gap,
                )
                if points:  # a response of one step has none
                    group.branch_points[i] = points

    def exchange(self, batch: Batch) -> None:
        """A finished batch goes to every rank, as a whole."""
        with self.phase("exchange"):
            batch.groups = dist.everyone(batch.groups)

    def leaves(self, group: Group) -> list[TrainingSequence]:
        """One sequence per leaf of the problem's tree, with its advantages."""
        flatten = {
            "tree": tree_sequences,
            "grpo": grpo_sequences,
            "prl": partial(prl_sequences, eta=self.config.prl_eta),
        }
        return flatten[self.config.advantage](group.problem.prompt_ids, group.responses)  # type: ignore[operator]

    def sequences(self, batch: Batch) -> list[TrainingSequence]:
        """The training sequences of a batch: its leaves without those that teach nothing."""
        return [s for group in batch.groups for s in drop_zero(self.leaves(group))]

    def update(self, step: int, sequences: list[TrainingSequence]) -> TrainStats:
        """PPO on one batch; then the engine gets the new weights."""
        config = self.config
        self.learner.set_learning_rate(
            learning_rate(step, config.steps, config.lr, config.warmup_steps, config.lr_schedule)
        )
        with self.phase("train"):
            self.engine.sleep()
            stats = self.learner.train(
                sequences, config.mini_batch, seed=request_seed(config.seed, step)
            )
        with self.phase("sync"):
            self.sync()
        return stats

    def sync(self) -> None:
        """The policy's weights to the engine; where that is a copy, a few tokens prove that they
        arrived."""
        self.engine.sync_weights(dist.full_weights(self.policy))
        self.sync_gap = (
            engine_gap(self.engine, self.scorer, self.probes, self.config.sync_tolerance)
            if self.copied
            else 0.0
        )

    def evaluate(self) -> dict:
        """avg@k on the held-out problems, with the same seeds at every evaluation (paired, so less
        noise), and how many responses could not be graded."""
        config, counts = self.config, self.reward.counts
        with self.phase("evaluate"):
            self.reward.counts = Counter()
            solved = evaluation.evaluate(
                self.engine,
                self.tokenizer,
                dist.mine(self.test_problems),
                self.reward,
                config.eval_samples,
                config.eval_max_response,
                config.eval_temperature,
                config.seed,
            )
            faults = sum(dist.everyone([sum(self.reward.counts[name] for name in FAULTS)]))
            self.reward.counts = counts
            return {"test_accuracy": statistics.fmean(dist.everyone(solved)), "test_faults": faults}

    def metrics(self, batch: Batch, sequences: list[TrainingSequence], stats: TrainStats) -> dict:
        """One line of metrics.jsonl, over all ranks: sums and means; of seconds those of the
        slowest."""
        ranks = dist.everyone([(self.generated_tokens, self.gap, self.reward.counts, self.seconds)])
        tokens, gaps, counts, seconds = zip(*ranks)
        count: Counter = sum(counts, Counter())
        gap, self.gap, self.reward.counts = Gap.sum(gaps), Gap(), Counter()
        return {
            "step": batch.step,
            "generated_tokens": sum(tokens),
            **batch_metrics(batch, sequences),
            **{f"train/{name}": value for name, value in asdict(stats).items()},
            "train/lr": self.learner.optimizer.param_groups[0]["lr"],
            "logprob_gap/mean": gap.total / max(1, gap.tokens),
            "logprob_gap/max": gap.largest,
            "logprob_gap/sync": self.sync_gap,
            **{f"grading/{name}": count[name] for name in ("unboxed", *FAULTS)},
            **{
                f"seconds/{name}": round(max(s[name] for s in seconds), 3)
                for name in ("generate", "score", "grade", "exchange", "train", "sync")
            },
            "seconds/step": round(time.perf_counter() - self.started, 3),
        }


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------
def train(config: Config, stop=lambda: False) -> Path:
    """A whole run, or the rest of it; returns its folder. One page: sample, (score, grade, plan
    inside), grow, train, log, evaluate, save. stop() is asked after every step; True on any rank:
    save, and leave."""
    check_folder(config)
    display = Display(config.steps, config.log_level, config.quiet)
    trainer = Trainer(config, display)
    done, best, upcoming = checkpoint.restore(
        trainer.checkpoint,
        trainer,
        lambda step, groups: Batch(
            step,
            [Group(**group | {"problem": trainer.problems[group["number"]]}) for group in groups],
        ),
    )
    folder = RunFolder(config, display.say)  # after that: a run that is refused touches nothing
    display.done = done
    # as if it had never been interrupted
    started = time.perf_counter() - folder.forget_after(done if trainer.checkpoint else -1)
    if trainer.checkpoint:
        display.say(
            f"resumed from {trainer.checkpoint}"
            + (": all steps are done" if done >= config.steps else "")
        )
    else:
        tested = trainer.evaluate()
        best = tested["test_accuracy"], 0
        display.say(
            f"before training   test {100 * best[0]:.1f} % (avg@{config.eval_samples}, "
            f"{len(trainer.test_problems)} problems)"
        )
        folder.append(
            "metrics.jsonl", {"step": 0, "generated_tokens": 0, **tested, "seconds/total": 0.0}
        )
        checkpoint.save(folder.path, 0, trainer, None, best, config.keep)
    if config.one_step_off_policy and upcoming is None and done < config.steps:
        # warm-up: the pipeline starts with initial responses for the first batch
        upcoming = trainer.new_batch(done + 1)
        trainer.sample(None, upcoming)
    for step in range(done + 1, config.steps + 1):
        trainer.start_step()
        # 1. sample, score, grade, plan: in one call (one-step off-policy), or in two with the same
        # policy
        if config.one_step_off_policy:
            batch, upcoming = upcoming, trainer.new_batch(step + 1) if step < config.steps else None
            trainer.sample(batch, upcoming)
        else:
            batch = trainer.new_batch(step)
            trainer.sample(None, batch)
            trainer.sample(batch, None)
        # 2. exchange between ranks; trees -> training sequences -> update
        trainer.exchange(batch)
        sequences = trainer.sequences(batch)
        stats = trainer.update(step, sequences)
        if config.ads_batch:
            trainer.batch_size.update(sampled=len(batch.groups), kept=len(sequences))
        # 3. log, evaluate, save
        record = trainer.metrics(batch, sequences, stats)
        if step == config.steps or config.eval_every and step % config.eval_every == 0:
            record |= trainer.evaluate()
            best = max(best, (record["test_accuracy"], step))
        record["seconds/total"] = round(time.perf_counter() - started, 3)
        folder.append("metrics.jsonl", record)
        folder.write_batch(step, batch.groups, trainer)
        leaving = any(dist.everyone([stop()]))
        if (
            leaving
            or "test_accuracy" in record
            or config.save_every
            and step % config.save_every == 0
        ):
            checkpoint.save(folder.path, step, trainer, upcoming, best, config.keep)
        if "test_accuracy" in record:
            folder.draw(display.say, view.draw_curves)
        display.step(record)
        for notice in batch_notices(config, batch, sequences):
            display.say(f"step {step:>4}   {notice}", "warning")
        if leaving:
            display.say(
                f"stopped after step {step}, on request; the same command with --out"
                f" {folder.path} --resume auto goes on"
            )
            break
    folder.draw(display.say, view.write_explorer)
    folder.close()
    display.close()
    dist.stop(trainer.engine.close)
    return folder.path


def main(argv: list[str]) -> None:
    config = parse_config(argv)
    if config.dry_run:
        import plan

        text = plan.plan(config, config.gpus, config.gpu_gib, argv)
        return print(text) if int(os.environ.get("RANK", 0)) == 0 else None
    folder = train(config, stop_on_signals())
    if folder:  # rank 0 has it
        print(
            f"\n{view.table([folder])}\n\nrun folder: {folder} (explorer.html, curves.png,"
            " metrics.jsonl, last/, best/)"
        )


if __name__ == "__main__":
    with stop_on_user_error("attnrl.py"):
        main(sys.argv[1:])
