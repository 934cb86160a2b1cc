r"""eval.py: the reward of a run, and the evaluation of a model on problem sets.

    python eval.py --model DIR --problems FILE... --k 32        avg@k, pass@k; one JSON line per
                                                                sample, one file per set
    python eval.py --model DIR --suite paper --problems aime24=FILE ...      the paper's six benchmarks and
                                                                             settings
    python eval.py --model DIR --ask "What is 2 + 3?"           one answer, streamed

The same command with the same --out goes on with an evaluation that was stopped, and ends with the
same files. The files, the statistics and the tables are report.py; grading, with its worker
processes, is grading.py (`grade` is here, too).

    python -m pytest tests/test_eval.py
"""

import atexit
import importlib
import json
import os
import re
import sys
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from checkpoint import model_hash
from data import Problem, load_problems
from dist import DTYPES, cast
from errors import Parser, UserError, first_line, plain, stop_on_user_error
from grading import (
    Grader,
    last_box,
)  # noqa: F401  (eval.grade is what notebooks and --reward call)
from report import Sample, append, avg_at_k, make_folder, resume, table
from rollout import Request, TransformersEngine, request_seed
from vllm_engine import VLLMEngine


# --------------------------------------------------------------------------------------------------
# The reward of a run: one function, which a fork can replace (--reward module:function)
# --------------------------------------------------------------------------------------------------
class Reward:
    """Grades (response, answers) pairs; counts in `counts` what a training log should show:
    timeouts, deaths, no box."""

    def __init__(self, spec: str = "eval:grade", workers: int = 2):
        self.counts: Counter[str] = Counter()
        # of the latest call: per item "", or why it could not be graded
        self.errors: list[str] = []
        self.grader: Grader | None = None
        if spec == "eval:grade":  # the default goes to the pool as a whole: many answers at a time
            self.grader = Grader(workers)
            atexit.register(self.grader.close)
            return
        module, _, name = spec.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        # a module that is not there, or anything that it does wrong itself
        except Exception as error:
            raise UserError(
                f"--reward {spec}: cannot be imported as module:function ({first_line(error)})"
            ) from error
        if not callable(self.function):
            raise UserError(f"--reward {spec}: is not a function")
        self.spec = spec

    def __call__(self, items: list[tuple[str, list[str]]]) -> list[float]:
        """One finite number per item, in order; 0 or 1 by default. Raises UserError if a function
        of yours gives another."""
        if self.grader:
            verdicts = self.grader.grade_many(items)
            self.errors = [v.error for v in verdicts]
            self.counts.update(filter(None, self.errors))
            self.counts["unboxed"] += sum(not v.boxed for v in verdicts)
            return [float(v.correct) for v in verdicts]
        self.errors = [""] * len(items)
        return [self.ask(response, answers) for response, answers in items]

    def ask(self, response: str, answers: list[str]) -> float:
        """Your function, which may do anything."""
        try:
            reward = self.function(response, answers)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"--reward {self.spec}: raised {type(error).__name__} in"
                f" {place.filename}:{place.lineno} ({first_line(error)})"
            ) from error
        # false for NaN, too
        if not isinstance(reward, (bool, int, float)) or not abs(reward) <= sys.float_info.max:
            raise UserError(
                f"--reward {self.spec}: returned {reward!r}; it must return a finite number"
            )
        return float(reward)


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
def evaluate(
    engine,
    tokenizer,
    problems: list[Problem],
    reward: Reward,
    k: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[float]:
    """avg@k of every problem."""
    samples = sample(
        engine,
        tokenizer,
        [(p, i) for p in problems for i in range(k)],
        reward,
        max_tokens,
        temperature,
        seed,
    )
    return [avg_at_k([s.reward for s in samples[a : a + k]]) for a in range(0, len(samples), k)]


def sample(
    engine,
    tokenizer,
    asked: list[tuple[Problem, int]],
    reward: Reward,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[Sample]:
    """Graded samples, one per (problem, its number). Seeds depend on (seed, problem, number) only:
    evaluations are paired."""
    requests = [
        Request(
            p.prompt_ids,
            max_tokens,
            temperature,
            request_seed(seed, zlib.crc32(p.text.encode()), i),
        )
        for p, i in asked
    ]
    completions = engine.generate(requests)
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    rewards = reward([(text, p.answers) for text, (p, _) in zip(texts, asked)])
    return [
        Sample(
            p.source,
            p.text,
            p.answers,
            i,
            r.seed,
            value,
            len(c.tokens),
            c.finished,
            last_box(text) is not None,
            error,
            text,
        )
        for (p, i), r, c, text, value, error in zip(
            asked, requests, completions, texts, rewards, reward.errors
        )
    ]


def pick_device(device: str) -> str:
    """ "auto" -> "cuda" where there is one, else "cpu". Raises UserError where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: cannot be used (PyTorch sees no GPU)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_model(path: str, device: str):
    """(model in fp32, tokenizer, end token ids) from a directory. Raises UserError."""
    transformers_logging.disable_progress_bar()  # the only bar on the terminal is ours
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of every try to reach the hub
    if os.path.isfile(os.path.join(path, "metrics.jsonl")):  # its config.json is that of the run
        raise UserError(
            f"--model {path}: is the folder of a run; give one of its models,"
            f" {os.path.join(path, 'last')} or best"
        )
    # no hub name either (OWNER/NAME), so do not wait for the hub to say so
    if "/" not in path and not os.path.isdir(path):
        raise UserError(f"--model {path}: cannot be loaded (no such directory)")
    device = pick_device(device)
    try:
        # False, said aloud: without it transformers asks on the terminal whether to run code that
        # lies beside the weights
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        model, found = loaded[0].to(device), loaded[1]
    # a dozen types for "no such model", "no such tokenizer", "broken weights"
    except Exception as error:
        raise UserError(f"--model {path}: cannot be loaded ({first_line(error)})") from error
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise UserError(
            f"--model {path}: has layers without softmax attention ({', '.join(sorted(others))}),"
            " which attnrl lacks"
        )
    # transformers would go on with random numbers in their place
    if lacking := sorted(found["missing_keys"]):
        raise UserError(
            f"--model {path}: cannot be loaded (its weights lack {lacking[0]} and"
            f" {len(lacking) - 1} more tensors)"
        )
    end = model.generation_config.eos_token_id if model.generation_config else None
    eos_ids = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id} - {None}
    if not eos_ids:
        raise UserError(
            f"--model {path}: neither its generation config nor its tokenizer names an"
            " end-of-sequence token"
        )
    # transformers makes an empty one of nothing
    if not tokenizer.encode("1", add_special_tokens=False):
        raise UserError(
            f"--model {path}: cannot be loaded (its tokenizer knows no text; is tokenizer.json"
            " missing?)"
        )
    if len(tokenizer) > (size := model.get_input_embeddings().num_embeddings):
        raise UserError(
            f"--model {path}: the tokenizer has {len(tokenizer)} tokens, the model only {size}"
        )
    return model, tokenizer, sorted(eos_ids)


def check_context(
    model,
    problems: list[Problem],
    max_response: int | None,
    at_most: int = 1024,
    option: str = "max_response",
) -> int:
    """The response length that fits the model's positions after the longest prompt: `max_response`,
    or if that is None as much of `at_most` as there is room for. Raises UserError, which names the
    option, if it does not fit."""
    longest = max(problems, key=lambda p: len(p.prompt_ids))
    if not longest.prompt_ids:
        raise UserError(f"{longest.source}: the problem is empty for this tokenizer")
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 40
    room = positions - len(longest.prompt_ids)
    if room < (max_response or 1):
        raise UserError(
            f"--{option} {max_response or 1}: with the {len(longest.prompt_ids)} prompt tokens of "
            f"{longest.source} that is more than the model's {positions} positions"
        )
    return max_response or min(room, at_most)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
# Settings of the paper; `samples` is the k of each benchmark. Its top-p is 1.0: engines sample from
# the full distribution.
SUITES: dict[str, dict[str, Any]] = {
    "paper": dict(
        temperature=0.6,
        max_response=32768,
        prompt_suffix=" Let's think step by step and output the final answer within \\boxed{}.",
        samples=dict(aime24=32, aime25=32, amc23=32, math500=4, minerva=4, olympiad=4),
    )
}
# responses that are sampled, graded and written together: what a killed evaluation loses
CHUNK = 256


def parse(argv: list[str]):
    """The settings: options given by hand, then the suite's, then the defaults. Raises
    UserError."""
    parser = Parser(
        "eval.py",
        "Evaluate a model, or ask a question.",
        "python eval.py --model toy/model --problems toy:8:100:2",
    )
    what, sampling, rest = map(
        parser.add_argument_group, ("what is evaluated", "sampling", "grading, output and machine")
    )
    what.add_argument("--model", required=True, help="model directory")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument(
        "--problems",
        nargs="+",
        metavar="[NAME=]FILE",
        help="FILE.jsonl, .json, .parquet or toy:8:100:2",
    )
    one.add_argument("--ask", metavar="PROBLEM", help="print one sampled answer")
    what.add_argument(
        "--suite",
        choices=SUITES,
        help="the paper's settings for " + ", ".join(SUITES["paper"]["samples"]),
    )
    what.add_argument(
        "--subset", action="store_true", help="go on though benchmarks of the suite are missing"
    )
    sampling.add_argument("--k", type=int, help="samples per problem; default 8, or the suite's")
    sampling.add_argument(
        "--temperature", type=float, default=0.6, help="0: always the most likely token"
    )
    sampling.add_argument(
        "--max_prompt", type=int, default=1024, help="tokens; longer problems are bad rows"
    )
    sampling.add_argument(
        "--max_response", type=int, help="tokens; default 1024, or what the model has room for"
    )
    sampling.add_argument(
        "--prompt_suffix", default="", help="added to every problem that does not end in it"
    )
    sampling.add_argument(
        "--seed", type=int, default=0, help="the same seed and command: the same samples"
    )
    rest.add_argument(
        "--out",
        help="folder of NAME.jsonl per set; again: goes on; default runs/eval-NAME-DATE-TIME",
    )
    rest.add_argument(
        "--reward", default="eval:grade", help="module:function(response, answers) -> number"
    )
    what.add_argument(
        "--drop_bad_rows", action="store_true", help="leave out bad rows instead of stopping"
    )
    rest.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    rest.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="what samples (not for --ask)",
    )
    rest.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of forward passes")
    args = parser.parse_args(argv)
    if args.suite:
        parser.set_defaults(**SUITES[args.suite])
        args = parser.parse_args(argv)
    for name, low in (
        ("k", 1),
        ("max_prompt", 1),
        ("max_response", 1),
        ("temperature", 0),
        ("seed", 0),
    ):
        if (value := getattr(args, name)) is not None and not low <= value <= (
            10**5 if name == "k" else sys.float_info.max
        ):
            raise UserError(
                f"--{name} {value}: must be a number, at least {low}"
                + ", at most 100000" * (name == "k")
            )
    args.sets = problem_sets(args) if args.problems else {}
    return args


def problem_sets(args) -> dict[str, tuple[str, int]]:
    """Name -> (source, k), in the suite's order. Raises UserError for names it lacks, and for
    missing ones without --subset."""
    sets: dict[str, tuple[str, int]] = {}
    suite = args.samples if args.suite else {}
    for given in args.problems:
        pair = None if os.path.isfile(given) else re.fullmatch(r"([\w-]+)=(.+)", given)
        name, source = pair.groups() if pair else (Path(given).stem.replace(":", "-"), given)
        if suite and name not in suite:
            raise UserError(
                f"--problems {given}: write NAME=FILE, with a NAME of --suite {args.suite}:"
                f" {', '.join(suite)}"
            )
        if name in sets:
            raise UserError(
                f"--problems {given}: {sets[name][0]} is called {name}, too; write NAME=FILE with"
                " another name"
            )
        sets[name] = source, args.k or suite.get(name, 8)
    if missing := ", ".join(name for name in suite if name not in sets):
        if not args.subset:
            raise UserError(
                f"--suite {args.suite}: no file for {missing}; give NAME=FILE, or leave them out"
                " with --subset"
            )
        print(f"only a subset of --suite {args.suite}: without {missing}")
    return {name: sets[name] for name in suite or sets if name in sets}


def main(argv: list[str]) -> None:
    args = parse(argv)
    # vLLM wants the GPU for itself: the model that was loaded only hands over its weights
    model, tokenizer, eos_ids = load_model(
        args.model, "cpu" if args.engine == "vllm" else args.device
    )
    cast(model, args.dtype)
    if args.ask is not None:
        from view import ask  # here, so that an evaluation needs no matplotlib

        return ask(model, tokenizer, eos_ids, args)
    out = Path(
        args.out
        or f"runs/eval-{args.suite or next(iter(args.sets))}-{time.strftime('%Y%m%d-%H%M%S')}"
    )
    # per set: its file, its settings, what to sample
    work: list[tuple[Path, dict, list[tuple[Problem, int]]]] = []
    for name, (source, k) in args.sets.items():
        problems = load_problems(
            source,
            tokenizer,
            max_prompt=args.max_prompt,
            suffix=args.prompt_suffix,
            drop=args.drop_bad_rows,
        )
        prompts = zlib.crc32(
            json.dumps([(p.text, p.answers, p.prompt_ids) for p in problems]).encode()
        )
        settings = {
            "model": args.model,
            "problems": source,
            "prompts": prompts,
            "questions": len(problems),
            "k": k,
            "max_response": check_context(model, problems, args.max_response),
        }
        settings |= {
            name: getattr(args, name)
            for name in ("temperature", "prompt_suffix", "seed", "reward", "engine", "dtype")
        }
        work.append((out / f"{name}.jsonl", settings, [(p, i) for p in problems for i in range(k)]))
    engine: Any = TransformersEngine(model, eos_ids)
    weights, reward = model_hash(args.model)[:16], Reward(args.reward)
    make_folder(out, [path for path, _, _ in work])
    found = [
        resume(path, settings | {"weights": weights}, [(p.text, i) for p, i in asked])
        for path, settings, asked in work
    ]
    for results in found:
        append(results, [])
    print(
        plain(
            f"results: {' '.join(str(path) for path, *_ in work)} (the same command with --out"
            f" {out} goes on)"
        ),
        flush=True,
    )
    if args.engine == "vllm":
        longest = max(
            settings["max_response"] + len(p.prompt_ids)
            for _, settings, asked in work
            for p, _ in asked
        )
        engine = VLLMEngine(
            args.model, eos_ids, longest, args.dtype, pick_device(args.device), memory=0.9
        )
        engine.sync_weights(model.state_dict().items())
    for results, (path, settings, asked) in zip(found, work):
        with tqdm(
            total=len(asked),
            initial=len(results.samples),
            unit="response",
            desc=plain(path.stem),
            disable=None,
        ) as bar:
            while (done := len(results.samples)) < len(asked):
                # ends where it would without a stop: the same batches
                chunk = asked[done : done - done % CHUNK + CHUNK]
                append(
                    results,
                    sample(
                        engine,
                        tokenizer,
                        chunk,
                        reward,
                        settings["max_response"],
                        args.temperature,
                        args.seed,
                    ),
                )
                bar.update(len(chunk))
    engine.close()
    print(table(found))


if __name__ == "__main__":
    with stop_on_user_error("eval.py"):
        main(sys.argv[1:])
