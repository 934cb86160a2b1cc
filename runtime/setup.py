"""setup.py: build the parts of a run before its first step. Nothing of the method is here.

The order matters on a GPU: vLLM checks the free memory, so the engine is built before the policy
goes to the GPU; and the reference is read only when the policy has left host memory.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fci import Separators, separator_tokens
from runtime import checkpoint, dist
from runtime.config import Config
from runtime.data import Problem, checked_day, hold_out, is_toy, load_problems, usable_suffix
from runtime.models import check_context, check_model, load_model, packing_obstacle
from runtime.monitor import Display, Monitor
from runtime.packing import alone, pack
from runtime.rewards import GRADED, Reward, response_texts
from runtime.rollout import Request, TransformersEngine
from runtime.scoring import Scores, Sequence, TokenLogprobs, engine_gap, score, tis_weights
from runtime.vllm_engine import VLLMEngine


@dataclass
class Parts:
    """The parts of a run. The policy has three forms: the transformers model (policy), one forward
    pass with its output head (scorer), and the scorer on all ranks (trained_policy)."""

    config: Config
    checkpoint: Path | None  # the one that the run resumes from
    policy: Any
    tokenizer: Any
    eos_ids: list[int]
    separators: Separators
    problems: list[Problem]
    test_problems: list[Problem]
    engine: Any
    copied: bool  # does the engine have a separate copy of the weights?
    scorer: TokenLogprobs
    trained_policy: torch.nn.Module
    reference: TokenLogprobs | None
    frozen_reference: torch.nn.Module | None
    packing: Callable[[list], list]  # which sequences share a row
    reward: Reward
    probes: list[Request]  # requests for the check after each weight sync
    monitor: Monitor

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of what must not change when a run is resumed, besides its settings: the problems,
        in order, and the initial weights. Computed only when a checkpoint is written or restored,
        because the weights are gigabytes."""
        texts = json.dumps([[p.text, p.answers] for p in self.problems])
        problems = hashlib.sha256(texts.encode()).hexdigest()
        return {"problems": problems, "model": checkpoint.model_hash(self.config.model)}

    def score(
        self, model: TokenLogprobs, sequences: list[Sequence], only_logprobs: bool = False
    ) -> list[Scores]:
        """A scoring pass. Skipped (empty Scores) if only the policy's log-probs are needed and PPO
        takes the engine's instead."""
        config = self.config
        if only_logprobs and config.behaviour == "engine":
            return [Scores([], []) for _ in sequences]
        with self.monitor.phase("score"):
            settings = config.temperature, config.delta, config.token_budget
            return score(model, sequences, *settings, packing=self.packing)

    def grade(self, items: list[tuple[list[int], Problem]]) -> list[tuple[float, bool]]:
        """For each (response tokens, problem): the reward; and is there an answer to grade?"""
        with self.monitor.phase("grade"):
            texts = response_texts(self.tokenizer, [response for response, _ in items])
            rewards = self.reward([(text, p.answers) for text, (_, p) in zip(texts, items)])
            return list(zip(rewards, self.reward.boxed))

    def old_logprobs(
        self, engine: list[float], learner: list[float]
    ) -> tuple[list[float], list[float]]:
        """PPO's old (behaviour) log-probs of one response's tokens and, with --tis_cap, their
        importance weights, from the log-probs of engine and learner."""
        self.monitor.compare(engine, learner)
        old = engine if self.config.behaviour == "engine" else learner
        cap = self.config.tis_cap
        return old, tis_weights(learner, engine, cap) if cap else []

    def sync_engine(self) -> None:
        """Give the policy's weights to the engine. If the engine has a copy, check with a few
        tokens that they arrived. Raises UserError above --sync_tolerance."""
        with self.monitor.phase("sync"):
            self.engine.sync_weights(dist.full_weights(self.policy))
            if self.copied:
                tolerance = self.config.sync_tolerance
                gap = engine_gap(self.engine, self.scorer, self.probes, tolerance)
                self.monitor.sync_gap = gap


def build(config: Config, display: Display) -> Parts:
    """Read the model (or the newest checkpoint of the run) and the problems, check that they fit
    together, start the engine. Raises UserError."""
    device = dist.start(config.device, alone=config.parallel == "fsdp")
    newest = checkpoint.find(config)
    path = str(newest or config.model)
    if config.resume == "auto" and not newest:
        display.say(f"--resume auto: no checkpoint in {config.out} yet: the run starts at step 0")
    # one date for the whole run: a chat template may write it into every prompt
    config.date = checked_day(
        config.date or (newest and checkpoint.setting_of(newest, "date") or "")
    )
    policy, tokenizer, eos_ids = load_model(path, "cpu")
    problems, test_problems = read_problems(config, policy, tokenizer, display.say)
    check_model(policy, path)
    packing = choose_packing(config, policy, device, display)
    # bf16 without FSDP2: the policy stays fp32, a copy in bf16 decodes 1.5 times as fast on a CPU
    copied = config.engine == "vllm" or config.parallel == "fsdp" or config.dtype == "bf16"
    engine = start_engine(config, policy, eos_ids, problems, test_problems, copied, device)
    scorer = TokenLogprobs(policy)
    trained_policy, reference, frozen_reference = place(config, scorer, device), None, None
    if config.keeps_reference():
        # read again, now that the policy is on the GPU: one copy in host memory at a time
        model = load_model(config.model, "cpu")[0].requires_grad_(False).eval()
        reference = TokenLogprobs(model)
        frozen_reference = place(config, reference, device)
    probes = [Request(p.prompt_ids, 16, config.temperature, config.seed) for p in test_problems[:4]]
    if copied:  # KV of the engine's first weights (vLLM: random): if it is kept, the check fails
        engine.generate(probes)
    return Parts(
        config=config,
        checkpoint=newest,
        policy=policy,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        separators=separator_tokens(tokenizer),
        problems=problems,
        test_problems=test_problems,
        engine=engine,
        copied=copied,
        scorer=scorer,
        trained_policy=trained_policy,
        reference=reference,
        frozen_reference=frozen_reference,
        packing=packing,
        reward=Reward(config.reward, config.grading_workers, config.grade_units),
        probes=probes,
        monitor=Monitor(display),
    )


def read_problems(config: Config, policy, tokenizer, say) -> tuple[list[Problem], list[Problem]]:
    """Training and test problems that fit the model's positions. Raises UserError."""
    tested = [] if config.test_fraction else [config.test_problems]
    if not all(map(is_toy, [config.problems, *tested])):
        config.prompt_suffix = usable_suffix(tokenizer, config.prompt_suffix, say)
        say(f"prompts end in {config.prompt_suffix!r} (--prompt_suffix)")
    load: dict[str, Any] = dict(
        max_prompt=config.max_prompt,
        suffix=config.prompt_suffix,
        drop=config.drop_bad_rows,
        today=config.date,
        say=say,
        problem_column=config.problem_column,
        answer_column=config.answer_column,
        graded=config.reward in GRADED,
    )
    if config.test_fraction:
        every = load_problems(config.problems, tokenizer, **load)
        problems, test_problems = hold_out(
            every, config.test_fraction, config.seed, config.prompt_suffix
        )
    else:
        test_problems = load_problems(config.test_problems, tokenizer, **load)
        problems = load_problems(config.problems, tokenizer, evaluation=test_problems, **load)
    check_context(policy, problems, config.max_response)
    check_context(policy, test_problems, config.eval_max_response, option="eval_max_response")
    return problems, test_problems


def choose_packing(config: Config, policy, device: str, display: Display) -> Callable:
    """Packed rows if they are enabled and exact, else one row per sequence."""
    if not config.packing:
        return alone
    if obstacle := packing_obstacle(policy):
        display.say(f"packing   off for this model: {obstacle}", "debug")
        return alone
    hidden = policy.config.get_text_config().hidden_size
    longest = min(longest_row(torch.device(device).type, hidden), config.token_budget)
    return partial(pack, longest=longest, hidden=hidden)


def longest_row(device: str, hidden: int) -> int:
    """Tokens of the longest packed row. On a CPU twice the hidden size: an update of the toy (128)
    with rows of up to 256, 384, 512, 1,024 tokens was 1.73, 1.55, 1.48, 1.45 times as fast as
    without packing. On a GPU the flash kernel cannot be used with a mask, so rows stay short; not
    measured."""
    return 2048 if device == "cuda" else min(1024, 2 * hidden)


def start_engine(config: Config, policy, eos_ids, problems, test_problems, copied, device):
    """vLLM, or the transformers engine: with the policy itself, or with a copy if the policy is
    sharded or sampling is in bf16."""
    if config.engine == "vllm":
        lengths = [len(p.prompt_ids) + config.max_response for p in problems]
        lengths += [len(p.prompt_ids) + config.eval_max_response for p in test_problems]
        return VLLMEngine(
            config.model,
            eos_ids,
            max(lengths),
            config.dtype,
            device,
            config.engine_memory,
            config.rollout_tokens,
        )
    model = policy
    if copied:
        model = dist.cast(copy.deepcopy(policy), config.dtype).to(device)
    return TransformersEngine(model, eos_ids, config.rollout_tokens)


def place(config: Config, forward: TokenLogprobs, device: str) -> torch.nn.Module:
    """Put a model on all ranks, as configured."""
    return dist.spread(
        forward,
        device=device,
        parallel=config.parallel,
        dtype=config.dtype,
        cpu_offload=config.cpu_offload,
        activation_checkpointing=config.activation_checkpointing,
    )
