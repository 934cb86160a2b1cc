"""bench/against_trl.py: a GRPO step here and in TRL's GRPOTrainer, with the same model, prompts,
lengths, optimizer steps.

    make bench-trl          # an environment of its own, .venv-trl: the project's packages and trl

GRPO is what both can do. Per step: 24 programs x 8 completions sampled at temperature 1, graded
right or wrong by the same string rule, advantages per group, one AdamW step on the token mean over
all 192, no KL term. Neither computes log-probs of its samples anew before the update: with one
update a batch TRL does without them, ours takes the engine's (--behaviour engine; a scoring pass,
our default, is a sixth of a step more). TRL is set up as its documentation says for a plain run on
a CPU; it makes one forward and backward pass per `--micro` completions, of which the fastest that
was tried is the default. Rounds alternate, each in a fresh process; the first step of each is not
counted. Peak memory is the process's, libraries included. Lines: the files that a reader of the
algorithm has to go through.
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

from measure import command, gain, peak_mib, positive, record

from errors import UserError, stop_on_user_error

PROMPTS, SAMPLES, LENGTH, LR = 24, 8, 110, 1e-5


def right(text: str, answers: list[str]) -> float:
    """The reward of both."""
    return float(text.endswith(f"\\boxed{{{answers[0]}}}"))


def ours(steps: int) -> list[float]:
    from pipeline import Side

    side = Side(
        "grpo",
        [
            "--grpo_samples",
            str(SAMPLES),
            "--batch_size",
            str(PROMPTS),
            "--lr",
            str(LR),
            "--mini_batch",
            str(PROMPTS * SAMPLES),
            "--test_problems",
            "toy:8:4:2",
            "--reward",
            "against_trl:right",
            "--behaviour",
            "engine",
        ],
    )
    for _ in range(steps):
        side.step()
    return [seen["step"] for seen in side.seen]


def trl(steps: int, micro: int) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from toy.programs import toy_set

    rows = [
        {"prompt": text, "answer": answer}
        for text, answer in toy_set(f"toy:8:{PROMPTS * (steps + 1)}:1")
    ]
    tokenizer = AutoTokenizer.from_pretrained("toy/model", padding_side="left")

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
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
        GRPOTrainer(
            AutoModelForCausalLM.from_pretrained("toy/model"),
            lambda completions, answer, **_: [
                right(text, [a]) for text, a in zip(completions, answer)
            ],
            config,
            processing_class=tokenizer,
            callbacks=[Clock()],
            train_dataset=Dataset.from_list(rows),
        ).train()
    return Clock.seconds


def lines_to_read() -> dict[str, int]:
    import transformers.trainer
    from trl.trainer import grpo_config, grpo_trainer

    import attnrl
    import data
    import eval as evaluation
    import fci
    import learner
    import rollout
    import sampler
    import tree

    count = lambda *modules: sum(len(inspect.getsource(m).splitlines()) for m in modules)  # noqa: E731
    return {
        "attnrl": count(attnrl, data, evaluation, fci, learner, rollout, sampler, tree),
        "trl": count(grpo_config, grpo_trainer, transformers.trainer),
    }


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
        return print("RESULT", json.dumps([seconds[1:] or seconds, peak_mib()]))
    seconds: dict[str, list] = {"attnrl": [], "trl": []}
    memory: dict[str, list] = {"attnrl": [], "trl": []}
    for n in range(args.rounds):
        for side in list(seconds)[:: 1 if n % 2 else -1]:
            words = [
                sys.executable,
                __file__,
                "--child",
                side,
                "--steps",
                str(args.steps),
                "--micro",
                str(args.micro),
                "--threads",
                str(args.threads),
            ]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            spent, peak = json.loads(done.stdout.split("RESULT")[1])
            seconds[side] += spent
            memory[side].append(peak)
            print(side, [round(s, 2) for s in spent], flush=True)
    lines = lines_to_read()
    rows = [
        {
            "GRPO step": side,
            "s": statistics.median(seconds[side]),
            "peak MiB": statistics.median(memory[side]),
            "lines to read": lines[side],
        }
        for side in seconds
    ]
    one, two = rows
    record(
        "trl",
        rows,
        [
            gain("GRPO step on the toy: TRL's GRPOTrainer, time", one["s"], two["s"], "s", 1.5),
            gain(
                "GRPO step on the toy: TRL's GRPOTrainer, peak memory",
                one["peak MiB"],
                two["peak MiB"],
                "MiB",
            ),
            gain("GRPO: lines to read, TRL's", one["lines to read"], two["lines to read"], "lines"),
        ],
    )


if __name__ == "__main__":
    with stop_on_user_error("bench/against_trl.py"):
        main()
