"""monitor.py: the clock, the counters and the terminal of a run.

`Monitor.phase` is a context manager around each part of a step: it shows the current phase, adds up
seconds, and turns "out of memory" into advice. Nothing here changes what is trained.

    python -m pytest tests/runtime/test_monitor.py
"""

import math
import os
import signal
import time
from collections import Counter, defaultdict
from contextlib import contextmanager

import torch
from tqdm import tqdm

from runtime import dist
from runtime.cli import UserError, first_line
from runtime.metrics import FAULTS, Example, Gap, Outcomes, outcome_lines, prompt_end

LEVELS = ("debug", "info", "warning")
SLOW = 10.0  # seconds: a phase that a log file shows before the first step's line


class Display:
    """The terminal: a bar with the current phase and the time left, and one line per step; if the
    output is piped, only lines, and the slow phases of the first step. Only rank 0 writes. Lines
    below `level` are not shown; quiet: no bar, only warnings."""

    def __init__(self, steps: int, level: str = "info", quiet: bool = False):
        self.steps, self.quiet, self.done = steps, quiet, 0  # done: steps before resuming
        self.level = "warning" if quiet else level
        self.tested = ""  # the newest test accuracy, always shown
        # created at the first phase, so that the bar does not mix with earlier errors
        self.bar: tqdm | None = None
        self.silent = True  # no step has been shown yet

    def phase(self, name: str) -> None:
        if dist.rank():
            return
        if self.bar is None:
            self.bar = tqdm(
                total=self.steps,
                initial=self.done,
                unit="step",
                disable=self.quiet or None,
                dynamic_ncols=True,
                leave=False,
            )
        self.bar.set_description_str(name)

    def phase_done(self, name: str, seconds: float) -> None:
        """Without a bar, nothing shows that a slow model's first step goes on, but this."""
        if self.silent and seconds > SLOW and self.bar is not None and self.bar.disable:
            self.say(f"    {name} took {seconds:.0f} s")

    def say(self, text: str, level: str = "info") -> None:
        if dist.rank() == 0 and LEVELS.index(level) >= LEVELS.index(self.level):
            tqdm.write(text)

    def step(self, m: dict) -> None:
        self.silent = False
        test = ""
        if "test_accuracy" in m:
            test = f"   test {100 * m['test_accuracy']:5.1f} %"
            self.tested = f", test {100 * m['test_accuracy']:.1f} %"
        self.say(
            f"step {m['step']:>4}   reward {m['initial/reward']:.3f}   {m['problems']:>3} problems,"
            f" {m['sequences']:>4} sequences trained   {millions(m['generated_tokens']):>6} M"
            f" tokens   {m['seconds/step']:5.1f} s{test}"
        )
        split = [
            f"{key.removeprefix('seconds/')} {m[key]:.2f} s"
            for key in m
            if key.startswith("seconds/")
        ]
        self.say(f"            {', '.join(split)}", "debug")
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix_str(f"reward {m['initial/reward']:.2f}{self.tested}")

    def resumed(self, done: int, checkpoint) -> None:
        self.done = done
        if checkpoint:
            finished = ": all steps are done" if done >= self.steps else ""
            self.say(f"resumed from {checkpoint}{finished}")

    def stopped(self, step: int, folder) -> None:
        self.say(
            f"stopped after step {step}, on request; the same command with --out {folder}"
            " --resume auto goes on"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def millions(tokens: int) -> str:
    """0.72; small numbers with three decimals: 0.003"""
    return f"{tokens / 1e6:.{2 if tokens >= 10_000 else 3}f}"


class Monitor:
    """Measures the steps of a run: seconds by phase, sampled tokens, the gap between the log-probs
    of engine and learner."""

    def __init__(self, display: Display):
        self.display = display
        self.generated_tokens = 0  # by this rank, so far
        self.gap = Gap()
        self.agreed = False  # did engine and learner agree at the first step?
        self.sync_gap = 0.0  # of the newest check after a weight sync
        self.explanation: list[str] = []  # of the newest test accuracy
        self.start_step()

    def start_step(self) -> None:
        """Reset the clock of the step."""
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)  # by phase

    @contextmanager
    def phase(self, name: str):
        """Show the phase, and add its wall-clock time to this step's seconds."""
        self.display.phase(name)
        started = time.perf_counter()
        with say_out_of_memory(name):
            yield
        took = time.perf_counter() - started
        self.seconds[name] += took
        self.display.phase_done(name, took)

    def tested(self, outcomes: Outcomes, example: Example, config) -> None:
        """Keep the `explanation` of the newest evaluation."""
        length, suffix = "eval_max_response", prompt_end(config)
        self.explanation = outcome_lines(outcomes, example, config.reward, length, suffix)

    def compare(self, engine: list[float], learner: list[float]) -> None:
        """Add the log-probs of one response's tokens, from engine and learner. Raises UserError if
        they are not finite."""
        self.gap.add(engine, learner)
        if not math.isfinite(sum(engine) + sum(learner)):
            raise UserError(
                "the log-probs of sampled tokens are not finite: the policy's weights are damaged;"
                " remove the newest checkpoint, and --resume auto --resume_changed true with a"
                " lower --lr"
            )

    def check_gap(self, gap: float, tolerance: float) -> None:
        """Engine and learner should agree on the sampled tokens. `gap`: the mean difference of
        their log-probs (nats) over a step. Above the tolerance, raises UserError at the first step
        and warns later."""
        if gap > tolerance:
            said = (
                f"engine and learner disagree on the sampled tokens: mean |log-prob difference|"
                f" {gap:.4g}, above --sync_tolerance {tolerance:g}"
            )
            if not self.agreed:
                raise UserError(
                    f"{said}; PPO's ratio would be wrong. Likely causes: a model whose positions"
                    " depend on the length, another dtype. To go on, raise --sync_tolerance"
                )
            self.display.say(said, "warning")
        self.agreed = True

    def record(self, reward_counts: Counter, tolerance: float) -> dict:
        """Tokens, gaps, grading faults and seconds of a step, over all ranks. Seconds are those of
        the slowest rank (`exchange` includes the time spent waiting for it). Resets the gap."""
        share = (self.generated_tokens, self.gap, reward_counts, self.seconds)
        tokens, gaps, counts, seconds = zip(*dist.everyone([share]))
        gap = Gap.sum(gaps)
        count: Counter = sum(counts, Counter())
        self.gap = Gap()
        self.check_gap(gap.total / max(1, gap.tokens), tolerance)
        phases = ("generate", "score", "grade", "exchange", "train", "sync")
        return {
            "generated_tokens": sum(tokens),
            "logprob_gap/mean": gap.total / max(1, gap.tokens),
            "logprob_gap/max": gap.largest,
            "logprob_gap/sync": self.sync_gap,
            **{f"grading/{name}": count[name] for name in ("unboxed", *FAULTS)},
            **{f"seconds/{name}": round(max(s[name] for s in seconds), 3) for name in phases},
            "seconds/step": round(time.perf_counter() - self.started, 3),
        }


@contextmanager
def say_out_of_memory(phase: str):
    """Turns out of memory, on a GPU or a CPU, into one line that says what to lower. Other errors
    are not changed."""
    try:
        yield
    # CUDA's error is a subclass of RuntimeError; the CPU allocator raises a plain one
    except (RuntimeError, MemoryError) as error:
        if not isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) and "can't allocate memory" not in str(error):
            raise
        engine = "--rollout_tokens (vLLM on a GPU: --engine_memory)"
        lower = {
            "generate": engine,
            "evaluate": engine,
            "sync": engine,
            "score": "--token_budget",
            "train": "--token_budget, or --activation_checkpointing true, or --cpu_offload true",
        }.get(phase, "--batch_size")
        raise UserError(
            f"out of memory in phase '{phase}': lower {lower}; --resume auto --resume_changed true"
            f" goes on from the newest checkpoint ({first_line(error)})"
        ) from error


def stop_on_signals():
    """A function that says whether Ctrl-C or SIGTERM has asked the run to stop after this step. A
    second one ends it at once: the files on the disk are complete at every moment."""
    asked = []

    def ask(number, _):
        if asked:
            os._exit(128 + number)
        asked.append(number)
        # print is not safe inside a signal handler
        os.write(2, b"\nstopping after this step (once more: at once)\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return lambda: bool(asked)
