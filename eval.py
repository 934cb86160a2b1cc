r"""eval.py: evaluate a model on problem sets, and a policy during training.

    python eval.py --model DIR --problems FILE... --k 32      # avg@k, pass@k; a result file per set
    python eval.py --model DIR --suite paper --problems aime24=FILE ...    # the paper's benchmarks
    python eval.py --model DIR --ask "What is 2 + 3?" --answer 5           # one answer, streamed

To resume a stopped evaluation, give the same command with the same --out. The files end up as if it
had not been stopped. For files, statistics and tables see runtime/results.py. In notebooks,
`eval.grade(response, answers)` is the grader.

    python -m pytest tests/test_eval.py
"""

import runtime  # isort: split

import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from runtime import dist
from runtime.checkpoint import model_hash, setting_of
from runtime.cli import Parser, UserError, plain, stop_on_user_error
from runtime.data import PROMPT_SUFFIX, Problem, checked_day, is_toy, load_problems, usable_suffix
from runtime.dist import DTYPES, cast
from runtime.grading import grade  # noqa: F401
from runtime.metrics import Outcomes
from runtime.models import check_context, load_model, pick_device
from runtime.results import (
    Results,
    Sample,
    append_samples,
    avg_at_k,
    make_folder,
    open_results,
    results_table,
)
from runtime.rewards import GRADED, Reward, response_texts
from runtime.rollout import Request, TransformersEngine, request_seed
from runtime.vllm_engine import VLLMEngine
from sampler import is_correct


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------
@dataclass
class Evaluator:
    """Samples responses to problems and grades them. max_tokens: per response."""

    engine: Any
    tokenizer: Any
    reward: Reward
    max_tokens: int
    temperature: float
    seed: int

    def sample(self, asked: list[tuple[Problem, int]]) -> list[Sample]:
        """One Sample per (problem, number of the sample). Seeds depend only on (seed, problem,
        number), so evaluations are paired."""
        requests = []
        for problem, i in asked:
            seed = request_seed(self.seed, zlib.crc32(problem.text.encode()), i)
            requests.append(Request(problem.prompt_ids, self.max_tokens, self.temperature, seed))
        completions = self.engine.generate(requests)
        tokens = [c.tokens for c in completions]
        texts = response_texts(self.tokenizer, tokens)
        rewards = self.reward([(text, p.answers) for text, (p, _) in zip(texts, asked)])
        samples = []
        for n, (problem, i) in enumerate(asked):
            samples.append(
                Sample(
                    source=problem.source,
                    problem=problem.text,
                    answers=problem.answers,
                    sample=i,
                    seed=requests[n].seed,
                    reward=rewards[n],
                    tokens=len(tokens[n]),
                    finished=completions[n].finished,
                    boxed=self.reward.boxed[n],
                    error=self.reward.errors[n],
                    response=texts[n],
                )
            )
        return samples


def held_out_accuracy(run) -> dict:
    """avg@k of a run's policy on its held-out problems, and how many responses were wrong, cut off,
    without an answer or could not be graded.

    The seeds are the same at every evaluation: evaluations are paired, which reduces noise. run:
    attnrl.Run. Every rank must call it.
    """
    config, counts, k = run.config, run.reward.counts, run.config.eval_samples
    length, temperature = config.eval_max_response, config.eval_temperature
    with run.monitor.phase("evaluate"):
        run.reward.counts = Counter()
        evaluator = Evaluator(
            run.engine, run.tokenizer, run.reward, length, temperature, config.seed
        )
        problems = dist.mine(run.test_problems)
        samples = evaluator.sample([(p, i) for p in problems for i in range(k)])
        groups = [samples[a : a + k] for a in range(0, len(samples), k)]
        solved = dist.everyone([avg_at_k([s.reward for s in group]) for group in groups])
        run.reward.counts = counts
    outcomes, wrong = Outcomes(), None
    for s in samples:
        outcomes.add(s.reward, s.boxed, s.finished, s.error)
        wrong = wrong or (None if is_correct(s.reward) else (s.response, s.answers))
    ranks = dist.everyone([(outcomes, wrong)])
    outcomes = Outcomes.sum(share for share, _ in ranks)
    run.monitor.tested(outcomes, next((one for _, one in ranks if one), None), config)
    return {
        "test_accuracy": fmean(solved),
        "test_faults": outcomes.ungraded,
        "test_unboxed": outcomes.unboxed + outcomes.unboxed_cut,
        "test_cut_off": sum(dist.everyone([sum(not s.finished for s in samples)])),
        "test_wrong": outcomes.wrong,
    }


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
# The paper's settings; `samples` is the k of each benchmark. The paper has top-p 1.0: our engines
# always sample from the full distribution.
SUITES: dict[str, dict[str, Any]] = {
    "paper": dict(
        temperature=0.6,
        max_response=32768,
        prompt_suffix=PROMPT_SUFFIX,
        samples=dict(aime24=32, aime25=32, amc23=32, math500=4, minerva=4, olympiad=4),
    )
}
# What --help shows
FIRST = ["model", "problems", "ask", "answer", "suite"]
FIRST += ["k", "temperature", "max_response", "reward", "out"]
# responses that are sampled, graded and written together: a killed evaluation loses at most these
CHUNK = 256


def parse(argv: list[str]):
    """The settings. Given options come first, then the suite's, then (for the prompt suffix) the
    model's, then the defaults. Raises UserError."""
    parser = Parser(
        "eval.py",
        "Evaluate a model, or ask a question.",
        "python eval.py --model toy/model --problems toy:8:100:2",
        "--model DIR --problems FILE ... [--OPTION VALUE ...]",
        FIRST,
    )
    add_problem_options(parser.add_argument_group("what is evaluated"))
    add_sampling_options(parser.add_argument_group("sampling"))
    add_other_options(parser.add_argument_group("grading, output and machine"))
    args = parser.parse_args(argv)
    if args.reward == "eval:grade":  # its name in version 1
        args.reward = "boxed"
    asked_by = "as given"
    if args.suite:
        asked_by = f"that of --suite {args.suite}" if args.prompt_suffix is None else asked_by
        parser.set_defaults(**SUITES[args.suite])
        args = parser.parse_args(argv)
    if args.prompt_suffix is None:
        trained_with = setting_of(Path(args.model), "prompt_suffix")
        asked_by = "the default" if trained_with is None else "as the model was trained"
        args.prompt_suffix = PROMPT_SUFFIX if trained_with is None else trained_with
    args.asked_by = asked_by
    check_range("k", args.k, 1, 10**5)
    for name, low in {"max_prompt": 1, "max_response": 1, "temperature": 0, "seed": 0}.items():
        check_range(name, getattr(args, name), low)
    if args.answer is not None and args.ask is None:
        raise UserError("--answer: is for --ask; the answers to --problems are in their files")
    args.sets = problem_sets(args) if args.problems else {}
    return args


def add_problem_options(group) -> None:
    suite = ", ".join(SUITES["paper"]["samples"])
    files = "FILE.jsonl, .json, .csv, .parquet ..., hf:OWNER/NAME:SPLIT or toy:8:100:2"
    group.add_argument("--model", required=True, help="model directory")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--problems", nargs="+", metavar="[NAME=]FILE", help=files)
    one.add_argument("--ask", metavar="PROBLEM", help="print one sampled answer")
    group.add_argument("--answer", help="the right answer, to grade what --ask prints")
    group.add_argument("--suite", choices=SUITES, help=f"the paper's settings for {suite}")
    group.add_argument(
        "--subset", action="store_true", help="go on even if benchmarks of the suite are missing"
    )
    group.add_argument(
        "--drop_bad_rows", action="store_true", help="leave out bad rows instead of stopping"
    )


def add_sampling_options(group) -> None:
    def add(name: str, kind: type, default, text: str) -> None:
        group.add_argument(f"--{name}", type=kind, default=default, help=text)

    add("k", int, None, "samples per problem; default 8, or the suite's")
    add("temperature", float, 0.6, "0: always the most likely token")
    add("max_prompt", int, 1024, "tokens; longer problems are bad rows")
    add("max_response", int, None, "tokens; default: the suite's, else at most 1024")
    suffix = "added to every problem that does not end in it; default: the suite's, else the"
    add("prompt_suffix", str, None, f"{suffix} one the model was trained with, else the paper's")
    add("problem_column", str, "", "column of the problem (a.b: inside a); default: usual names")
    add("answer_column", str, "", "column of the answer; default: usual names")
    add("date", str, "", "for chat templates that use one, as 2026-01-31; default: today")
    add("seed", int, 0, "the same command with the same seed gives the same samples")


def add_other_options(group) -> None:
    def choose(name: str, default: str, choices, text: str) -> None:
        group.add_argument(f"--{name}", choices=choices, default=default, help=text)

    out = "folder of NAME.jsonl per set (if it exists: resume); default runs/eval-NAME-DATE-TIME"
    reward = "boxed, number, boxed_or_number, or module:function(response, answers) -> number"
    group.add_argument("--out", help=out)
    group.add_argument("--reward", default="boxed", help=reward)
    choose("device", "auto", ("auto", "cpu", "cuda"), "auto: a GPU if there is one")
    engines = ("transformers", "vllm")
    choose("engine", "transformers", engines, "samples the responses (not for --ask)")
    units = "loose: units are ignored; strict: if one answer has a unit, both need the same unit"
    choose("grade_units", "loose", ("loose", "strict"), units)
    choose("dtype", "fp32", sorted(DTYPES), "of forward passes")


def check_range(name: str, value, low: float, high: float = sys.float_info.max) -> None:
    """Raises UserError for a number outside this range; None is allowed."""
    if value is not None and not low <= value <= high:
        most = f", at most {high}" if high < sys.float_info.max else ""
        raise UserError(f"--{name} {value}: must be a number, at least {low}{most}")


def problem_sets(args) -> dict[str, tuple[str, int]]:
    """Name -> (source, k), in the suite's order. Raises UserError for names that are not in the
    suite, and for missing benchmarks without --subset."""
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


@dataclass
class Work:
    """One problem set: its result file, its settings, and the samples to draw."""

    path: Path
    settings: dict
    asked: list[tuple[Problem, int]]  # (problem, number of the sample)


def date_of(path: Path) -> str:
    """The date on which a result file was begun. A chat template may write the date into prompts,
    and an evaluation resumed on another day needs the same prompts. "": a new or damaged file."""
    try:
        with path.open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["settings"].get("date", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def read_set(name: str, args, out: Path, model, tokenizer) -> Work:
    """Read one problem set. Raises UserError."""
    source, k = args.sets[name]
    problems = load_problems(
        source,
        tokenizer,
        max_prompt=args.max_prompt,
        suffix=args.prompt_suffix,
        drop=args.drop_bad_rows,
        today=date_of(out / f"{name}.jsonl") or args.date,
        problem_column=args.problem_column,
        answer_column=args.answer_column,
        graded=args.reward in GRADED,
    )
    prompts = json.dumps([(p.text, p.answers, p.prompt_ids) for p in problems])
    settings = {
        "model": args.model,
        "problems": source,
        "prompts": zlib.crc32(prompts.encode()),
        "date": date_of(out / f"{name}.jsonl") or checked_day(args.date),
        "questions": len(problems),
        "k": k,
        "max_response": check_context(model, problems, args.max_response),
    }
    for same in (
        "temperature",
        "prompt_suffix",
        "seed",
        "reward",
        "grade_units",
        "engine",
        "dtype",
    ):
        settings[same] = getattr(args, same)
    return Work(out / f"{name}.jsonl", settings, [(p, i) for p in problems for i in range(k)])


def evaluate_sets(args, model, tokenizer, eos_ids: list[int]) -> list[Results]:
    """Sample and grade what is not yet in the result files."""
    name = args.suite or next(iter(args.sets))
    out = Path(args.out or f"runs/eval-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not all(is_toy(source) for source, _ in args.sets.values()):
        args.prompt_suffix = usable_suffix(tokenizer, args.prompt_suffix)
        print(plain(f"prompts end in {args.prompt_suffix!r} ({args.asked_by}; --prompt_suffix)"))
    trained = setting_of(Path(args.model), "reward")
    if trained not in (None, args.reward):
        print(plain(f"graded with --reward {args.reward}; in training it was {trained}"))
    work = [read_set(name, args, out, model, tokenizer) for name in args.sets]
    weights, reward = model_hash(args.model)[:16], Reward(args.reward, units=args.grade_units)
    make_folder(out, [w.path for w in work])
    found = []
    for w in work:
        expected = [(p.text, i) for p, i in w.asked]
        found.append(open_results(w.path, w.settings | {"weights": weights}, expected))
    for results in found:
        append_samples(results, [])
    paths = " ".join(str(w.path) for w in work)
    print(plain(f"results: {paths} (killed? --out {out} and the same again goes on)"), flush=True)
    engine = start_engine(args, model, eos_ids, work)
    for results, w in zip(found, work):
        length = w.settings["max_response"]
        evaluator = Evaluator(engine, tokenizer, reward, length, args.temperature, args.seed)
        complete(results, w, evaluator)
    engine.close()
    return found


def start_engine(args, model, eos_ids: list[int], work: list[Work]) -> Any:
    if args.engine != "vllm":
        return TransformersEngine(model, eos_ids)
    longest = max(w.settings["max_response"] + len(p.prompt_ids) for w in work for p, _ in w.asked)
    device = pick_device(args.device)
    engine = VLLMEngine(args.model, eos_ids, longest, args.dtype, device, memory=0.9)
    engine.sync_weights(model.state_dict().items())
    return engine


def complete(results: Results, work: Work, evaluator: Evaluator) -> None:
    """Sample the rest of one set, a chunk at a time."""
    total, done = len(work.asked), len(results.samples)
    bar = tqdm(total=total, initial=done, unit="response", desc=plain(work.path.stem), disable=None)
    with bar:
        while (done := len(results.samples)) < total:
            # ends where it would end without a stop, so that batches are the same
            chunk = work.asked[done : done - done % CHUNK + CHUNK]
            append_samples(results, evaluator.sample(chunk))
            bar.update(len(chunk))


def main(argv: list[str]) -> None:
    args = parse(argv)
    # vLLM needs the whole GPU: load the model on the CPU, only to pass its weights on
    device = "cpu" if args.engine == "vllm" else args.device
    model, tokenizer, eos_ids = load_model(args.model, device)
    cast(model, args.dtype)
    if args.ask is None:
        print(results_table(evaluate_sets(args, model, tokenizer, eos_ids)))
    else:
        from tools.ask import ask

        ask(model, tokenizer, eos_ids, args)


if __name__ == "__main__":
    with stop_on_user_error("eval.py"):
        main(sys.argv[1:])
