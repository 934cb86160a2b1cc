r"""eval.py: the reward of a run, and the evaluation of a model on a problem set.

    python eval.py --model DIR --problems FILE --k 8        avg@k, pass@k, one JSON line per problem
    python eval.py --model DIR --ask "What is 2 + 3?"       one answer, streamed

Grading itself, with its worker processes, is grading.py; `grade` here is the same function.

    avg@k  = mean over problems of c / n                          c right of n samples
    pass@k = mean over problems of 1 - C(n - c, k) / C(n, k)      unbiased, with n the actual number of samples

With 30 problems (AIME) the standard error from the choice of questions alone is about 5 points even at k = 32: do not
read a difference of 2 points as progress. Left out: intervals and paired comparisons (they belong to experiments).
"""
import argparse
import atexit
import importlib
import json
import math
import os
import sys
import time
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from data import Problem, encode_question, load_problems
from errors import UserError, first_line, plain, stop_on_user_error
from dist import DTYPES, cast
from grading import Grader, grade, last_box  # noqa: F401  (eval.grade is what notebooks and --reward call)
from rollout import Request, TransformersEngine, request_seed
from sampler import is_correct
from vllm_engine import VLLMEngine


# ---------------------------------------------------------------------------------------------------------------------
# The reward of a run: one function, which a fork can replace (--reward module:function)
# ---------------------------------------------------------------------------------------------------------------------
class Reward:
    """Grades (response, answers) pairs; counts in `counts` what a training log should show: timeouts, deaths, no box."""

    def __init__(self, spec: str = "eval:grade", workers: int = 2):
        self.counts: Counter[str] = Counter()
        self.grader = self.function = None
        if spec == "eval:grade":  # the default goes to the pool as a whole: many answers at a time
            self.grader = Grader(workers)
            atexit.register(self.grader.close)
            return
        module, _, name = spec.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except Exception as error:  # a module that is not there, or anything that it does wrong itself
            raise UserError(f"--reward {spec}: cannot be imported as module:function ({first_line(error)})") from error
        if not callable(self.function):
            raise UserError(f"--reward {spec}: is not a function")
        self.spec = spec

    def __call__(self, items: list[tuple[str, list[str]]]) -> list[float]:
        """One finite number per item, in order; 0 or 1 by default. Raises UserError if a function of yours gives another."""
        if self.grader:
            verdicts = self.grader.grade_many(items)
            self.counts.update(v.error for v in verdicts if v.error)
            self.counts["unboxed"] += sum(not v.boxed for v in verdicts)
            return [float(v.correct) for v in verdicts]
        return [self.ask(response, answers) for response, answers in items]

    def ask(self, response: str, answers: list[str]) -> float:
        """Your function, which may do anything."""
        try:
            reward = self.function(response, answers)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(f"--reward {self.spec}: raised {type(error).__name__} in {place.filename}:{place.lineno} "
                            f"({first_line(error)})") from error
        if not isinstance(reward, (bool, int, float)) or not abs(reward) <= sys.float_info.max:  # false for NaN, too
            raise UserError(f"--reward {self.spec}: returned {reward!r}; it must return a finite number")
        return float(reward)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def avg_at_k(rewards: list[float]) -> float:
    """Mean accuracy over the samples of one problem: c / n."""
    return sum(rewards) / len(rewards)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, unbiased from n >= k samples of which c are right.

    1 - C(n-c, k) / C(n, k) (Chen et al. 2021), with n the actual number of samples. Raises ValueError for k > n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, got n = {n}, c = {c}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@dataclass
class Result:
    """One problem with its k sampled responses."""
    problem: Problem
    responses: list[str]
    rewards: list[float]
    lengths: list[int]  # tokens
    finished: list[bool]  # False: cut off at the length limit


def evaluate(engine, tokenizer, problems: list[Problem], reward: Reward, k: int, max_tokens: int, temperature: float,
             seed: int = 0) -> list[Result]:
    """k samples for every problem, graded. Seeds depend on (seed, problem, sample) only: evaluations are paired."""
    asked = [(p, Request(p.prompt_ids, max_tokens, temperature, request_seed(seed, zlib.crc32(p.text.encode()), i)))
             for p in problems for i in range(k)]
    completions = engine.generate([request for _, request in asked])
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    rewards = reward([(text, p.answers) for text, (p, _) in zip(texts, asked)])
    return [Result(p, texts[a:a + k], rewards[a:a + k], [len(c.tokens) for c in completions[a:a + k]],
                   [c.finished for c in completions[a:a + k]]) for a, p in zip(range(0, len(asked), k), problems)]


def pick_device(device: str) -> str:
    """"auto" -> "cuda" where there is one, else "cpu". Raises UserError where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: cannot be used (PyTorch sees no GPU)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_model(path: str, device: str):
    """(model in fp32, tokenizer, end token ids) from a directory. Raises UserError."""
    transformers_logging.disable_progress_bar()  # the only bar on the terminal is ours
    transformers_logging.set_verbosity_error()
    if "/" not in path and not os.path.isdir(path):  # no hub name either (OWNER/NAME), so do not wait for the hub to say so
        raise UserError(f"--model {path}: cannot be loaded (no such directory)")
    device = pick_device(device)
    try:
        # False, said aloud: without it transformers asks on the terminal whether to run code that lies beside the weights
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False,
                                                            output_loading_info=True)
        model = model.to(device)
    except Exception as error:  # a dozen types for "no such model", "no such tokenizer", "broken weights"
        raise UserError(f"--model {path}: cannot be loaded ({first_line(error)})") from error
    if lacking := sorted(found["missing_keys"]):  # transformers would go on with random numbers in their place
        raise UserError(f"--model {path}: cannot be loaded (its weights lack {lacking[0]} and {len(lacking) - 1} more tensors)")
    end = model.generation_config.eos_token_id if model.generation_config else None
    eos_ids = {*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id} - {None}
    if not eos_ids:
        raise UserError(f"--model {path}: neither its generation config nor its tokenizer names an end-of-sequence token")
    if not tokenizer.encode("1", add_special_tokens=False):  # transformers makes an empty one of nothing
        raise UserError(f"--model {path}: its tokenizer knows no text (is tokenizer.json missing?)")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"--model {path}: the tokenizer has {len(tokenizer)} tokens, the model only "
                        f"{model.get_input_embeddings().num_embeddings}")
    return model, tokenizer, sorted(eos_ids)


def check_context(model, problems: list[Problem], max_response: int | None, at_most: int = 1024,
                  option: str = "max_response") -> int:
    """The response length that fits the model's positions after the longest prompt: `max_response`, or if that is None as
    much of `at_most` as there is room for. Raises UserError, which names the option, if it does not fit."""
    longest = max(problems, key=lambda p: len(p.prompt_ids))
    if not longest.prompt_ids:
        raise UserError(f"{longest.source}: the problem is empty for this tokenizer")
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 40
    room = positions - len(longest.prompt_ids)
    if room < (max_response or 1):
        raise UserError(f"--{option} {max_response or 1}: with the {len(longest.prompt_ids)} prompt tokens of "
                        f"{longest.source} that is more than the model's {positions} positions")
    return max_response or min(room, at_most)


def summary(results: list[Result], k: int) -> str:
    """The table of an evaluation."""
    correct = [sum(map(is_correct, result.rewards)) for result in results]
    lengths = [n for result in results for n in result.lengths]
    cut = [not f for result in results for f in result.finished]
    rows = [("problems", f"{len(results)}"), (f"avg@{k}", f"{100 * fmean(avg_at_k(r.rewards) for r in results):.1f} %")]
    rows += [(f"pass@{j}", f"{100 * fmean(pass_at_k(k, c, j) for c in correct):.1f} %")
             for j in sorted({1, 2, 4, 8, 16, 32, k}) if 1 < j <= k]
    rows += [("response length", f"{fmean(lengths):.0f} tokens"), ("cut off", f"{100 * fmean(cut):.1f} %"),
             ("without a box", f"{100 * fmean(last_box(t) is None for r in results for t in r.responses):.1f} %")]
    return "\n".join(f"{name:16} {value:>12}" for name, value in rows)


def ask(model, tokenizer, eos_ids: list[int], problem: str, args) -> None:
    """Print one answer while it is sampled."""
    tokens, shown = [], 0

    def show(_, token):
        nonlocal shown
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            print(plain(text[shown:]), end="", flush=True)
            shown = len(text)

    prompt = encode_question(tokenizer, problem + args.prompt_suffix, "--ask")
    limit = check_context(model, [Problem(problem, [], "--ask", prompt)], args.max_response)
    engine = TransformersEngine(model, eos_ids)
    engine.generate([Request(prompt, limit, args.temperature, args.seed)], on_token=show)
    print()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.py", description="Evaluate a model on a problem set, or ask it one question.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--problems", help="FILE.jsonl, FILE.parquet or toy:8:100:2")
    what.add_argument("--ask", metavar="PROBLEM", help="print one sampled answer")
    parser.add_argument("--k", type=int, default=8, help="samples per problem")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max_prompt", type=int, default=1024)
    parser.add_argument("--max_response", type=int, help="tokens; default 1024, or what the model has room for")
    parser.add_argument("--prompt_suffix", default="", help="added to every problem that does not end in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSONL with one line per problem; default runs/eval-PROBLEMS-DATE-TIME.jsonl")
    parser.add_argument("--reward", default="eval:grade", help="module:function(response, answers) -> number")
    parser.add_argument("--drop_bad_rows", action="store_true", help="leave out bad rows instead of stopping")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.error = lambda message: parser.exit(2, f"eval.py: {message} (see --help)\n")
    args = parser.parse_args(argv)
    for name, low in (("k", 1), ("max_prompt", 1), ("max_response", 1), ("temperature", 0), ("seed", 0)):
        if getattr(args, name) is not None and not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be a number, at least {low}")
    if args.k > 10**5:
        raise UserError(f"--k {args.k}: must be at most 100000")
    # vLLM wants the GPU for itself: the model that was loaded only hands over its weights
    model, tokenizer, eos_ids = load_model(args.model, "cpu" if args.engine == "vllm" else args.device)
    cast(model, args.dtype)
    if args.ask is not None:
        return ask(model, tokenizer, eos_ids, args.ask, args)
    problems = load_problems(args.problems, tokenizer, max_prompt=args.max_prompt, suffix=args.prompt_suffix,
                             drop=args.drop_bad_rows)
    max_response = check_context(model, problems, args.max_response)
    reward, engine = Reward(args.reward), TransformersEngine(model, eos_ids)
    if args.engine == "vllm":
        engine = VLLMEngine(args.model, eos_ids, max_response + max(len(p.prompt_ids) for p in problems), args.dtype,
                            pick_device(args.device), memory=0.9)
        engine.sync_weights(model.state_dict().items())
    out = Path(args.out or f"runs/eval-{Path(args.problems).stem.replace(':', '-')}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    try:
        if out.exists():
            raise UserError(f"--out {out}: exists already; give another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    results: list[Result] = []
    with file, tqdm(total=len(problems), unit="problem", disable=None) as bar:
        for start in range(0, len(problems), 16):  # a few problems at a time: progress to see, and results on the disk
            for r in evaluate(engine, tokenizer, problems[start:start + 16], reward, args.k, max_response,
                              args.temperature, args.seed):
                file.write(json.dumps({"source": r.problem.source, "problem": r.problem.text, "answers": r.problem.answers,
                                       "rewards": r.rewards, "lengths": r.lengths, "finished": r.finished,
                                       "responses": r.responses}) + "\n")
                results.append(r)
                bar.update()
            file.flush()
            bar.set_postfix_str(f"avg@{args.k} {100 * fmean(avg_at_k(r.rewards) for r in results):.1f} %")
    print(summary(results, args.k))
    for name in ("timeout", "died", "error"):
        if reward.counts[name]:
            print(f"grading: {reward.counts[name]} x {name} (counted as wrong)")
    engine.close()
    print(f"responses: {out}")


if __name__ == "__main__":
    with stop_on_user_error("eval.py"):
        main(sys.argv[1:])
