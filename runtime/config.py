"""config.py: every setting of a run, in three parts, and the flat command line.

    MethodSettings    the algorithm: to read the method you need only these
    RunSettings       model, problems, length, evaluation, output
    MachineSettings   engine, devices, precision, memory

`Config` is all three at once, so `config.delta` is `--delta`. Defaults of the method are the
paper's. A preset and a method change some (attnrl.py), and options on the command line override
both.

    python attnrl.py --help              # ten options to begin with; --preset NAME: its values
    python attnrl.py --help_all          # all of them
"""

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.cli import Parser, UserError
from runtime.data import PROMPT_SUFFIX, is_toy
from runtime.models import pick_device
from tree import BRANCH_RULES

INFINITE = float("inf")
# What --help shows: model, problems, grading, length, output
FIRST = ["preset", "method", "model", "problems", "test_fraction", "reward"]
FIRST += ["steps", "batch_size", "lr", "out"]


def option(default, text: str, group: str = ""):
    """A setting; `group` begins a group of settings in --help_all."""
    return field(default=default, metadata={"help": text, "group": group})


@dataclass
class RunSettings:
    """Model, problems, length of the run, evaluation, and output."""

    preset: str = option("toy", "settings to start from", "what is run")
    method: str = option(
        "attnrl", "AttnRL, a baseline, or AttnRL with one part changed (docs/methods.md)"
    )
    model: str = option(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "directory (or hub name) of the initial policy",
        "what is trained, on what",
    )
    problems: str = option(
        "deepscaler.json",
        "training problems: FILE.jsonl, .json, .csv, .parquet, hf:OWNER/NAME:SPLIT, toy:8:2000:1",
    )
    test_problems: str = option("aime24.parquet", "held-out problems")
    test_fraction: float = option(
        0.0, "use this share of --problems as test problems; 0: use --test_problems"
    )
    problem_column: str = option("", "column of the problem (a.b: inside a); default: usual names")
    answer_column: str = option("", "column of the answer; default: usual names")
    date: str = option("", "for chat templates that use one, as 2026-01-31; default: the start's")
    drop_bad_rows: bool = option(
        False, "leave out malformed, duplicate, conflicting ... rows instead of stopping"
    )
    prompt_suffix: str = option(
        PROMPT_SUFFIX,
        "added to every problem of a file that does not end in it",
    )
    reward: str = option(
        "boxed", "boxed, number, boxed_or_number, or module:function(response, answers) -> number"
    )
    grade_units: Literal["loose", "strict"] = option(
        "loose", "loose: units are ignored; strict: if one answer has a unit, both need the same"
    )
    seed: int = option(0, "fixes the order of problems, rollouts and mini-batches")
    steps: int = option(500, "training steps")
    max_prompt: int = option(1024, "tokens of the longest prompt")
    eval_every: int = option(
        10, "steps between evaluations; 0: only at the start and the end", "evaluation"
    )
    eval_samples: int = option(8, "k of avg@k")
    eval_temperature: float = option(0.6, "sampling temperature of evaluations")
    eval_max_response: int = option(0, "tokens per response of evaluations; 0: max_response")
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "learning rate after the warm-up", "optimizer"
    )
    warmup_steps: int = option(0, "training steps of linear warm-up")
    weight_decay: float = option(0.01, "of AdamW")
    max_grad_norm: float = option(1.0, "gradient norm clip")
    behaviour: Literal["learner", "engine"] = option(
        "learner", "whose log-probs of the sampled tokens are PPO's old log-probs"
    )
    tis_cap: float = option(
        0.0,
        "truncated importance sampling, if engine and learner differ: cap of the weights; 0: off",
    )
    out: str = option(
        "", "folder of the run; default runs/PRESET-SEED-DATE-TIME", "what is written and shown"
    )
    save_every: int = option(0, "steps between checkpoints; 0: only at evaluations")
    keep: int = option(2, "number of newest checkpoints that are kept")
    resume: Literal["never", "auto"] = option(
        "never", "auto: resume from the newest checkpoint in --out, if there is one"
    )
    resume_changed: bool = option(False, "resume even if settings have changed")
    log_samples: int = option(2, "problems per step written to samples.jsonl, for the explorer")
    track: Literal["none", "tensorboard", "wandb"] = option("none", "also send metrics there")
    log_level: Literal["debug", "info", "warning"] = option(
        "info", "debug: phases with their seconds; warning: notices only"
    )
    quiet: bool = option(False, "no progress bar, and --log_level warning")


@dataclass
class MethodSettings:
    """The algorithm. G, N, T, Delta, rho, lambda, B' are the paper's letters."""

    batch_size: int = option(64, "problems per step (the first step's, if --ads_batch)", "sampling")
    group_size: int = option(6, "G: initial responses per problem")
    branch_points: int = option(2, "N: branch points per expanded response")
    continuations: int = option(2, "T: continuations per branch point")
    max_response: int = option(8192, "tokens, including a continuation's shared prefix")
    temperature: float = option(1.0, "sampling temperature of training")
    one_step_off_policy: bool = option(
        True, "sample batch m+1 and the continuations of batch m in one call"
    )
    branch: str = option("fci", "how branch points are chosen", "branching")  # tree.BRANCH_RULES
    delta: int = option(4, "FCI counts attention from steps at least this many steps later")
    rho: float = option(0.2, "branch points are among the top rho of FCI")
    min_branch_gap: int = option(0, "least tokens between branch points, and before the first")
    ads_filter: Literal["fci", "easy", "none"] = option(
        "fci",
        "which easy problems are not expanded: those of low FCI (Eq. 8), all, or none",
        "adaptive sampling",
    )
    ads_expansion: bool = option(True, "more trees for harder problems (Eq. 9); else all G")
    ads_batch: bool = option(True, "adapt the number of problems (Eq. 10)")
    ads_drop: bool = option(True, "do not train leaves whose advantages are all zero")
    target_sequences: int = option(0, "B' of Eq. 10; 0: all leaves, batch_size * G * (1 + N * T)")
    batch_lam: float = option(0.9, "lambda of Eq. 10: how slowly the batch size moves")
    batch_range: float = option(
        4.0, "the adaptive batch stays between batch_size / this and batch_size * this"
    )
    advantage: Literal["tree", "datpo", "grpo", "prl"] = option(
        "tree",
        "tree: Eq. 2-3; datpo: blocks; no branching: grpo (one a response), prl (process rewards)",
        "update",
    )
    loss: Literal["ppo", "gspo", "cispo"] = option(
        "ppo", "ppo: Eq. 1; gspo: one ratio a sequence; cispo: clipped ratios as weights"
    )
    mask_cut_off: bool = option(False, "leave responses that were cut off out of the loss (DAPO)")
    lr: float = option(1e-6, "peak learning rate of AdamW")
    mini_batch: int = option(192, "training sequences per optimizer step")
    kl_coef: float = option(
        0.001, "weight of the KL to the initial policy; 0: none (then only PRL loads that model)"
    )
    clip_low: float = option(0.2, "PPO clip below 1")
    clip_high: float = option(0.28, "PPO clip above 1")
    dual_clip: float = option(3.0, "bound on the loss of tokens with negative advantage")
    grpo_samples: int = option(
        0,
        "responses per problem without a tree; 0: as many as a tree has leaves",
        "baselines only",
    )
    scale_rewards: Literal["std", "none"] = option(
        "std", "GRPO, PRL: divide by the group's standard deviation, or not (Dr.GRPO)"
    )
    prl_eta: float = option(
        200.0, "PRL: process rewards are log-ratios to the initial policy, divided by this"
    )
    prl_steps: Literal["length", "newline", "blank"] = option("length", "PRL: what ends a step")
    prl_length: int = option(256, "PRL: tokens of a step, with --prl_steps length")

    def branches(self) -> bool:
        """Does the method branch?"""
        return self.advantage in ("tree", "datpo")

    def samples_per_problem(self) -> int:
        return self.group_size if self.branches() else self.grpo_samples

    def leaves_per_problem(self) -> int:
        """The largest number: of a problem whose G responses are all expanded."""
        return self.group_size * (1 + self.branch_points * self.continuations)

    def batch_bounds(self) -> tuple[int, int]:
        """The smallest and largest number of problems of the adaptive batch."""
        low, high = self.batch_size / self.batch_range, self.batch_size * self.batch_range
        return max(1, int(low)), int(high)

    def keeps_reference(self) -> bool:
        return bool(self.kl_coef) or self.advantage == "prl"


@dataclass
class MachineSettings:
    """Where it runs, and how much memory it may take. They do not belong to the method: most change
    results only by rounding; another engine samples other responses from the same seed, and bf16
    rounds more."""

    engine: Literal["transformers", "vllm"] = option("transformers", "rollout engine", "machine")
    rollout_tokens: int = option(65536, "tokens in the KV cache at once")
    token_budget: int = option(16384, "padded tokens per forward and backward pass")
    packing: bool = option(
        True, "compute shared prefixes once, if that is faster and exact; false: every leaf whole"
    )
    grading_workers: int = option(2, "processes for answers that need a computer algebra system")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "cuda: GPU number LOCAL_RANK of those in CUDA_VISIBLE_DEVICES"
    )
    dtype: Literal["fp32", "bf16"] = option(
        "fp32", "of forward passes; bf16 keeps fp32 weights (FSDP2; on a CPU autocast)"
    )
    parallel: Literal["auto", "ddp", "fsdp"] = option(
        "auto", "ddp: whole weights on every GPU; fsdp: a part; auto: fsdp for bf16 on GPUs"
    )
    activation_checkpointing: bool = option(
        False, "recompute activations in the backward pass instead of keeping them"
    )
    cpu_offload: bool = option(False, "keep fsdp's weights, gradients and moments in host memory")
    engine_memory: float = option(0.4, "share of the GPU for vLLM (it sleeps during updates)")
    sync_tolerance: float = option(
        0.0, "largest mean log-prob gap that the checks of the engine allow; 0: by dtype"
    )
    dry_run: bool = option(
        False, "print the plan of the run (ranks, memory, batch, tokens) and exit"
    )
    gpus: int = option(0, "GPUs that --dry_run plans for; 0: as torchrun says, or 1")
    gpu_gib: float = option(80.0, "memory of one GPU that --dry_run plans for, GiB")


@dataclass
class Config(MachineSettings, MethodSettings, RunSettings):
    """All settings of a run."""

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.steps, self.lr, self.warmup_steps, self.lr_schedule)

    def learner_settings(self) -> dict:
        """The settings that learner.Learner takes unchanged."""
        names = "lr weight_decay max_grad_norm temperature kl_coef token_budget"
        return {name: getattr(self, name) for name in names.split()}

    def resolve(self) -> None:
        """Replace each "0: derived from others" by its number: config.json then has what ran."""
        leaves = self.leaves_per_problem()
        if self.reward == "eval:grade":  # its name in version 1
            self.reward = "boxed"
        self.grpo_samples = self.grpo_samples or leaves
        self.target_sequences = self.target_sequences or self.batch_size * (
            leaves if self.branches() else self.grpo_samples
        )
        self.device = pick_device(self.device)  # type: ignore[assignment]
        self.eval_max_response = self.eval_max_response or self.max_response
        self.gpus = (self.gpus if self.dry_run else 0) or int(os.environ.get("WORLD_SIZE", 1))
        if self.parallel == "auto":
            self.parallel = "fsdp" if self.dtype_needs_fsdp() else "ddp"
        if not self.sync_tolerance:  # on a GPU vLLM's attention computes fp32 in TF32
            fp32 = 1e-2 if self.device == "cuda" else 1e-4
            self.sync_tolerance = 0.05 if self.dtype == "bf16" else fp32

    def dtype_needs_fsdp(self) -> bool:
        """bf16 on a CPU is autocast over whole weights. A plan (--dry_run) is always for GPUs."""
        on_cpu = pick_device(self.device) == "cpu" and not self.dry_run
        return self.dtype == "bf16" and not on_cpu

    def check(self) -> None:
        """Raises UserError for values that cannot work, in one line that names the option."""
        self.check_ranges()
        if self.parallel == "ddp" and (self.cpu_offload or self.dtype_needs_fsdp()):
            raise UserError(
                "--parallel ddp: keeps whole fp32 weights on the GPU; --dtype bf16 and"
                " --cpu_offload need fsdp"
            )
        if self.cpu_offload and self.parallel == "auto" and not self.dtype_needs_fsdp():
            raise UserError("--cpu_offload: needs --parallel fsdp")
        if self.resume == "auto" and not self.out:
            raise UserError("--resume auto: name the run's folder with --out")
        if 0 < self.tis_cap < 1 or (self.tis_cap and self.behaviour == "engine"):
            raise UserError(
                f"--tis_cap {self.tis_cap}: must be 0 or at least 1, and needs --behaviour learner:"
                " with the engine's log-probs PPO's own ratio corrects the mismatch"
            )

    def check_ranges(self) -> None:
        """Raises UserError for the first number outside its range."""
        for low, names in AT_LEAST.items():
            for name in names.split():
                value = getattr(self, name)
                if not low <= value < INFINITE:  # also catches NaN
                    finite = "" if abs(value) < INFINITE else "a finite number, "
                    raise UserError(f"--{name} {value}: must be {finite}at least {low}")
        for name in ABOVE_ZERO:
            if not 0 < getattr(self, name) < INFINITE:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        for name, high in AT_MOST.items():
            if getattr(self, name) > high:
                raise UserError(f"--{name} {getattr(self, name)}: must be at most {high}")


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "constant"
) -> float:
    """Learning rate of training step 1..steps: linear warm-up over `warmup` steps, then constant,
    linear or cosine decay to 0 after the last step. It depends on the training step, not on the
    optimizer step: with the adaptive batch the number of optimizer steps is not known."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup - 1) / max(1, steps - warmup)
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return peak * decay[schedule]


AT_LEAST = {
    0: "eval_every test_fraction branch_points grpo_samples min_branch_gap target_sequences"
    " batch_lam lr warmup_steps kl_coef clip_low clip_high seed eval_temperature weight_decay rho"
    " log_samples eval_max_response save_every tis_cap engine_memory sync_tolerance gpus gpu_gib",
    1: "steps eval_samples batch_size group_size continuations max_prompt max_response delta"
    " batch_range mini_batch token_budget dual_clip rollout_tokens grading_workers keep prl_length",
}
ABOVE_ZERO = ("temperature", "max_grad_norm", "prl_eta")
AT_MOST = {
    "rho": 1,
    "test_fraction": 0.9,
    "batch_lam": 1,
    "engine_memory": 1,
    "batch_range": 1000,
    "batch_size": 10**5,
    "group_size": 10**4,
    "grpo_samples": 10**5,
    "branch_points": 10**4,
    "continuations": 10**4,
    "eval_samples": 10**5,
    "grading_workers": 1000,
}


def parse_settings(argv: list[str], presets: dict[str, dict], methods: dict[str, dict]) -> Config:
    """The settings of a command line: those of preset and method, overridden by the given options.
    Raises UserError for a wrong option."""
    parser = Parser(
        "attnrl.py",
        "Train a reasoning model with AttnRL or a baseline.",
        "python attnrl.py --method treerl --steps 10 --out runs/mine",
        "[--preset NAME] [--method NAME] [--OPTION VALUE ...]",
        FIRST,
    )
    parser.add_settings(Config, {"preset": presets, "method": methods, "branch": BRANCH_RULES})
    started = []
    for name, table in (("preset", presets), ("method", methods)):
        chosen = given(argv, name) or next(iter(table))
        # parsed first and alone: a --help before it would hide that it is wrong
        parser.parse_args([f"--{name}", chosen])
        parser.set_defaults(**table[chosen])
        started.append(f"--{name} {chosen}")
    another = next(f"--preset {name}" for name in presets if f"--preset {name}" not in started)
    parser.description = (
        f"{parser.description} The defaults below are those of {' '.join(started)}; to see"
        f" those of another one, name it, as in {another} --help."
    )
    config = Config(**vars(parser.parse_args(argv)))
    typed = {name for name in vars(config) if is_given(argv, name)}
    check_own(config, typed, presets)
    config.check()
    check_used(config, typed)
    config.resolve()
    return config


def check_own(config: Config, typed: set[str], presets: dict[str, dict]) -> None:
    """Raises UserError if a model or problems were given, but the other settings are still those
    for the toy (the first preset)."""
    toy = next(iter(presets.values()))
    own = [
        n for n in ("model", "problems", "test_problems") if n in typed and is_own(config, n, toy)
    ]
    if own and "preset" not in typed:
        raise UserError(
            f"--{own[0]} {getattr(config, own[0])}: name the settings, the defaults are the"
            " toy's: --preset small (models of up to about 1B on one GPU or a CPU), --preset paper,"
            " or --preset toy to keep them"
        )
    if "problems" in own and not typed & {"test_problems", "test_fraction"}:
        raise UserError(
            f"--problems {config.problems}: name the test problems, too: --test_problems FILE, or"
            " --test_fraction 0.05 to hold a part of these back"
        )
    for name in ("model", "problems"):
        if not getattr(config, name):
            raise UserError(f"--{name}: --preset {config.preset} has none; give yours")


def is_own(config: Config, name: str, toy: dict) -> bool:
    """Is a given model or problem set not the toy's?"""
    value = str(getattr(config, name))
    if name == "model":
        return os.path.realpath(value) != os.path.realpath(toy["model"])
    return not is_toy(value)


def is_given(argv: list[str], name: str) -> bool:
    """Does a command line have the option, in any spelling that the parser accepts?"""
    return any(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in argv)


def check_used(config: Config, typed: set[str]) -> None:
    """Raises UserError for a given option that the chosen method does not use."""
    unused: dict[str, str] = {}
    if config.branches():
        sampling = ("grpo_samples", "scale_rewards")
        unused |= dict.fromkeys(sampling, f"--advantage {config.advantage}")
    else:
        branching = ("branch", "delta", "rho", "min_branch_gap", "ads_filter", "ads_expansion")
        unused |= dict.fromkeys(branching, f"--advantage {config.advantage}")
    if not config.branch.startswith("fci"):
        unused |= dict.fromkeys(("rho", "min_branch_gap"), f"--branch {config.branch}")
    if not config.ads_batch:
        adaptive = ("target_sequences", "batch_lam", "batch_range")
        unused |= dict.fromkeys(adaptive, "--ads_batch false")
    if config.loss != "ppo":
        unused["dual_clip"] = f"--loss {config.loss}"
    if config.advantage != "prl":
        prl = ("prl_eta", "prl_steps", "prl_length")
        unused |= dict.fromkeys(prl, f"--advantage {config.advantage}")
    elif config.prl_steps != "length":
        unused["prl_length"] = f"--prl_steps {config.prl_steps}"
    for name in vars(config):
        if name in typed and name in unused:
            raise UserError(
                f"--{name}: has no effect with --method {config.method} ({unused[name]}); leave it"
                " out"
            )


def given(argv: list[str], name: str) -> Any:
    """The last value of --name on a command line; None if it is not given."""
    found = None
    for word, after in zip(argv, [*argv[1:], ""]):
        if word == f"--{name}":
            found = after
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found
