"""bench/against_trl.py: a GRPO step here and in TRL's GRPOTrainer, with the same model, prompts,
lengths, optimizer steps.

    make bench-trl          # in a separate environment, .venv-trl: the project's packages and trl

Both can do GRPO. Per step: 24 programs x 8 completions sampled at temperature 1, graded right or
wrong by the same string rule, advantages per group, one AdamW step on the token mean over all 192,
no KL term. Neither computes log-probs of its samples again before the update: with one update per
batch TRL does not need them, and ours takes the engine's (--behaviour engine; our default, a
scoring pass, makes a step a sixth longer). TRL is set up as its documentation says for a plain run
on a CPU. It makes one forward and backward pass per `--micro` completions; the default is the
fastest value that we tried. Rounds take turns, each in a fresh process; the first step of each is
not counted. Peak memory is the process's, including libraries. Lines: the files that one must read
to understand everything in a step (ours include AttnRL).
"""

import argparse
import importlib.util
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

from measure import command, gain, peak_mib, positive, record

from runtime.cli import UserError, stop_on_user_error

PROMPTS, SAMPLES, LENGTH, LR = 24, 8, 110, 1e-5


def right(text: str, answers: list[str]) -> float:
    """The reward of both."""
    return float(text.endswith(f"\\boxed{{{answers[0]}}}"))


def ours(steps: int) -> list[float]:
    from pipeline import Side

    side = Side(
        "grpo",
        grpo_samples=SAMPLES,
        batch_size=PROMPTS,
        lr=LR,
        mini_batch=PROMPTS * SAMPLES,
        reward="against_trl:right",
        behaviour="engine",
    )
    for _ in range(steps):
        side.step()
    return [seen["step"] for seen in side.seen]


def trl(steps: int, micro: int) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from toy.programs import toy_set

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.started)

    def reward(completions, answer, **_) -> list[float]:
        return [right(text, [a]) for text, a in zip(completions, answer)]

    programs = toy_set(f"toy:8:{PROMPTS * (steps + 1)}:1")
    rows = [{"prompt": text, "answer": answer} for text, answer in programs]
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            AutoModelForCausalLM.from_pretrained("toy/model"),
            reward,
            trl_settings(folder, steps, micro),
            processing_class=AutoTokenizer.from_pretrained("toy/model", padding_side="left"),
            callbacks=[Clock()],
            train_dataset=Dataset.from_list(rows),
        ).train()
    return Clock.seconds


def trl_settings(folder: str, steps: int, micro: int):
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        num_generations=SAMPLES,
        per_device_train_batch_size=micro,
        max_completion_length=LENGTH,
        gradient_accumulation_steps=PROMPTS * SAMPLES // micro,
        gradient_checkpointing=False,
        loss_type="dapo",
        scale_rewards="group",
        mask_truncated_completions=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
    )


def lines_to_read() -> dict[str, int]:
    import transformers.trainer
    from trl.trainer import grpo_config, grpo_trainer

    import attnrl
    import baselines
    import eval as evaluation
    import fci
    import learner
    import sampler
    import tree
    from runtime import config, data, models, monitor, rewards, rollout, scoring, setup, stream

    method = (attnrl, baselines, evaluation, fci, learner, sampler, tree)
    rest = (config, data, models, monitor, rewards, rollout, scoring, setup, stream)
    theirs = (grpo_config, grpo_trainer, transformers.trainer)
    return {"attnrl": count_lines(*method, *rest), "trl": count_lines(*theirs)}


def count_lines(*modules) -> int:
    return sum(len(inspect.getsource(module).splitlines()) for module in modules)


def one_round(side: str, args) -> tuple[list[float], float]:
    """Seconds of the steps and peak MiB of one side, in a fresh process."""
    words = ["--child", side, "--steps", args.steps, "--micro", args.micro]
    words = [sys.executable, __file__, *words, "--threads", args.threads]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    spent, peak = json.loads(done.stdout.split("RESULT")[1])
    print(side, [round(s, 2) for s in spent], flush=True)
    return spent, peak


def compare(args) -> None:
    seconds: dict[str, list] = {"attnrl": [], "trl": []}
    memory: dict[str, list] = {"attnrl": [], "trl": []}
    for n in range(args.rounds):
        for side in list(seconds)[:: 1 if n % 2 else -1]:
            spent, peak = one_round(side, args)
            seconds[side] += spent
            memory[side].append(peak)
    lines = lines_to_read()
    one, two = rows = [
        {
            "GRPO step": side,
            "s": statistics.median(seconds[side]),
            "peak MiB": statistics.median(memory[side]),
            "lines to read": lines[side],
        }
        for side in seconds
    ]
    what = "GRPO step on the toy: TRL's GRPOTrainer"
    ratios = [
        gain(f"{what}, time", one["s"], two["s"], "s", 1.5),
        gain(f"{what}, peak memory", one["peak MiB"], two["peak MiB"], "MiB"),
        gain("GRPO: lines to read, TRL's", one["lines to read"], two["lines to read"], "lines"),
    ]
    record("trl", rows, ratios)


def main() -> None:
    parser = command(__doc__, "--rounds 2")
    parser.add_argument("--rounds", type=positive, default=4)
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--micro", type=positive, default=96, help="TRL: completions a pass")
    parser.add_argument("--child", choices=("attnrl", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not importlib.util.find_spec("trl"):
        raise UserError(
            "TRL is not installed here: make bench-trl runs this in an environment that has it"
        )
    if args.child:
        import torch

        torch.set_num_threads(args.threads)
        seconds = ours(args.steps) if args.child == "attnrl" else trl(args.steps, args.micro)
        print("RESULT", json.dumps([seconds[1:] or seconds, peak_mib()]))
    else:
        compare(args)


if __name__ == "__main__":
    with stop_on_user_error("bench/against_trl.py"):
        main()
