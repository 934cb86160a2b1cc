r"""data.py: problem sets and prompts.

A problem set is a file, a folder or a hub set (files.py: JSON, JSONL, CSV, parquet, arrow), or
    toy:8:2000:1   generated (toy/programs.py): 2000 programs of 8 (or 8-10) variables, seed 1

Its columns have their usual names (columns.py: problem, question, prompt, messages ...; answer,
solution, target, reward_model.ground_truth ...) or names that the user gives. An answer is a
string, a number or a list of them, any of which is right. In a worked solution, the answer is what
follows the last "####", or else the last box (golds.py).

Training on a bad row is worse than stopping. Malformed rows, empty answers, duplicates, conflicting
answers, over-long prompts and training problems that occur in the evaluation set are all reported
with file and row, and loading stops; with `drop` they are left out and counted. Some answers are
right only if a response repeats them letter by letter. They are counted and shown, and loading
continues.

Left out: streaming. A set is held in memory, as token ids.

    python -m pytest tests/runtime/test_data.py
"""

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cache
from typing import Any

from runtime import golds
from runtime.cli import UserError, first_line
from runtime.columns import Columns, choose_columns, may_be_asked, names_of, parse_row
from runtime.files import read_rows
from runtime.leaks import Known, leak_key, problem_key
from toy.programs import toy_set

# The paper's suffix, the same for training and evaluation
PROMPT_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
SHOWN_PER_KIND = 5  # a file with 1,500 duplicates needs one line that says so, not 1,500
CHECK_SECONDS = 20.0  # the longest time for checking which answers of a set can be read


@dataclass
class Problem:
    text: str  # as shown to a person
    answers: list[str]  # any of them is right
    source: str  # "FILE, line 7"
    prompt_ids: list[int] = field(default_factory=list)


Groups = defaultdict[str, list]

# --------------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------------
# A template that asks for the date gets this function instead of the one that reads the clock.
# `strftime_codes` has the value of each code on the run's day. It is written in the template
# language because transformers can pass only plain values to a template, no functions.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(value=format) -%}"
    "{%- for code, value in strftime_codes.items() -%}"
    "{%- set text.value = text.value | replace(code, value) -%}{%- endfor -%}"
    "{{ text.value }}{%- endmacro -%}{{ '' }}"
)


def checked_day(today: str) -> str:
    """The day as 2026-01-31; for "", today. Raises UserError."""
    try:
        return date.fromisoformat(today).isoformat() if today else date.today().isoformat()
    except ValueError as error:
        raise UserError(f"the date {today!r}: write it like 2026-01-31") from error


@cache
def date_codes(today: str) -> dict[str, str]:
    """The values of the codes of strftime at midnight of a day."""
    midnight = datetime.fromisoformat(today)
    codes = [f"%{letter}" for letter in "aAbBcdDeFgGhHIjklmMnpPrRSsTtuUVwWxXyYzZC"]
    codes += [f"%-{letter}" for letter in "dmHIMSjyeklUWV"]
    values = {code: midnight.strftime(code) for code in codes}
    return {"%%": "\0"} | values | {"\0": "%"}  # "%%d" is the text "%d", no day


def encode_prompt(tokenizer, messages: list[dict], today: str = "") -> list[int]:
    """Token ids of a prompt that is ready for the assistant's turn.

    Uses the tokenizer's chat template if there is one, else plain text. today: the date, as in
    "2026-01-31", for templates that write one; default: the day of the call, so a run that is
    resumed on another day must give the day of its start.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer("\n".join(m["content"] for m in messages))["input_ids"]
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        codes = date_codes(checked_day(today))
        how |= {"chat_template": _FIXED_DATE + template, "strftime_codes": codes}
    text = tokenizer.apply_chat_template(messages, **how)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has added them


def is_toy(source: str) -> bool:
    """Is the set generated, not read from a file? Then it has no prompt suffix."""
    return source.split(":")[0] == "toy"


def usable_suffix(tokenizer, suffix: str, say=print) -> str:
    """The suffix; but "" (with a message) if the tokenizer lacks characters of it: then only
    fragments of it would be in every prompt."""

    def letters(text: str) -> str:
        return "".join(text.split()).casefold()

    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    if letters(tokenizer.decode(ids)) == letters(suffix):
        return suffix
    say(f"--prompt_suffix {suffix!r}: left out, the model's tokenizer cannot write it")
    return ""


def encode_question(tokenizer, text: str, option: str, today: str = "") -> list[int]:
    """The prompt of a problem that came with a command-line option. Raises UserError."""
    try:
        return encode_prompt(tokenizer, [{"role": "user", "content": text}], today)
    except Exception as error:  # a broken template, one that refuses, a text that is not UTF-8
        raise UserError(
            f"{option}: cannot be written with the model's chat template and tokenizer, or is not "
            f"UTF-8 ({first_line(error)})"
        ) from error


# --------------------------------------------------------------------------------------------------
# Problem sets
# --------------------------------------------------------------------------------------------------
def load_problems(
    source: str,
    tokenizer,
    *,
    max_prompt: int,
    suffix: str = "",
    evaluation: list[Problem] | tuple = (),
    drop: bool = False,
    say=print,
    problem_column: str = "",
    answer_column: str = "",
    today: str = "",
    graded: bool = True,
) -> list[Problem]:
    """The problem set with its prompts as token ids, in the order of the file. Raises UserError.

    suffix: added to problems that do not end in it. evaluation: problems that must not be in here.
    today: see encode_prompt. graded: answers are for the grader, so only the final answers of
    worked solutions are kept, and they are checked (may start workers, for up to CHECK_SECONDS); a
    custom reward gets the answers unchanged. Bad rows are reported and raise the error, or are left
    out with `drop`; a set with no problem left raises it, too.
    """
    today = checked_day(today)  # one day for the whole set, even around midnight
    if is_toy(source):
        rows, columns = toy_rows(source, {p.text for p in evaluation}), Columns("problem", "answer")
        suffix, evaluation, graded = "", (), False  # a generated set has no bad rows
    else:
        rows, columns = file_rows(source, problem_column, answer_column, say)
    held_out = Known([(p.text, p.source) for p in evaluation], suffix)
    bad, problems = Groups(list), Groups(list)  # kind -> lines, problem -> its rows
    for place, row in rows:
        where = f"{source}, {place}"
        try:
            problem = read_problem(row, columns, where, tokenizer, suffix, today)
            if graded:
                problem.answers = golds.final_answers(problem.answers)
            kind, fault = fault_of(problem, max_prompt, held_out)
        except Exception as error:  # also errors of a template or a tokenizer about odd characters
            kind, fault = "malformed", first_line(error)
        if kind:
            bad[kind].append(f"{where}: {fault}")
        else:
            problems[problem_key(problem.text, suffix)].append(problem)
    return report(source, problems, bad, drop, graded, say)


def report(source: str, problems: dict, bad: dict, drop: bool, graded: bool, say) -> list:
    """Report bad rows and odd answers; return the problems that are left. Raises UserError."""
    try:
        kept = without_repeats(problems, bad, CHECK_SECONDS if graded else 0)
        if bad:
            report_bad_rows(source, bad, drop, say)
        if graded:
            report_letters(source, kept, say)
    finally:
        golds.GRADER.close()
    if not kept:
        raise UserError(f"{source}: no usable problem in it")
    return kept


def toy_rows(source: str, passed_over: set[str]) -> list[tuple[str, object]]:
    """Generated programs as rows, without those of the evaluation. Raises UserError."""
    try:
        programs = list(toy_set(source))
    except ValueError:
        raise UserError(
            f"{source}: write toy:VARIABLES:COUNT:SEED, for example toy:8:2000:1 "
            "(4 to 26 variables)"
        ) from None
    return [
        (f"program {i}", {"problem": text, "answer": answer})
        for i, (text, answer) in enumerate(programs)
        if text not in passed_over
    ]


def file_rows(source: str, problem: str, answer: str, say) -> tuple[list, Columns]:
    """Rows with their places, without unused columns; and which columns to read."""
    rows: list[tuple[str, object]] = []
    found: dict[str, None] = {}  # the names of all columns, in order
    wanted: dict[str, bool] = {}
    for place, row in read_rows(source):
        if isinstance(row, dict):  # a dozen sampled solutions in other columns would fill memory
            found |= dict.fromkeys(names_of(row))
            wanted |= {k: may_be_asked(k, (problem, answer)) for k in row if k not in wanted}
            row = {k: value for k, value in row.items() if wanted[k]}
        rows.append((place, row))
    objects = [row for _, row in rows if isinstance(row, dict)]
    if not objects:  # no columns to choose from: each row will be reported as bad
        return rows, Columns("problem", "answer")
    return rows, choose_columns(source, objects, [*found], problem, answer, say)


def read_problem(row, columns: Columns, where: str, tokenizer, suffix: str, today: str) -> Problem:
    """A problem with its prompt. Raises ValueError, and whatever a template or tokenizer raises."""
    if isinstance(row, ValueError):
        raise row
    messages, answers = parse_row(row, columns)
    text = messages[-1]["content"]
    if not text.endswith(suffix):
        messages[-1] = {**messages[-1], "content": text + suffix}
    return Problem(text, answers, where, encode_prompt(tokenizer, messages, today))


def fault_of(problem: Problem, max_prompt: int, held_out: Known) -> tuple[str, str]:
    """(kind, message) of a problem that can be read but not used; else ("", "")."""
    if not problem.answers:
        return "empty answer", "the answer is empty"
    if leak := held_out.find(problem.text):
        return "in the evaluation set", f"the same problem is {leak}"
    if not problem.prompt_ids:
        return "malformed", "the tokenizer knows no character of this problem"
    if (length := len(problem.prompt_ids)) > max_prompt:
        return "over-long prompt", f"{length} tokens, more than --max_prompt {max_prompt}"
    return "", ""


def without_repeats(problems: dict, bad: dict[str, list[str]], seconds: float) -> list[Problem]:
    """The first row of every problem; none if its rows have different answers. seconds: time limit
    for asking the grader whether two answers are equal; 0: only equal strings are."""
    kept = []
    deadline = time.monotonic() + seconds
    for first, *others in problems.values():
        if all(golds.agree(first.answers, p.answers, deadline) for p in others):
            kept.append(first)
            for p in others:
                bad["duplicate"].append(f"{p.source}: the same problem as {first.source}")
            continue
        rivals = (others[-1], *[first] * len(others))  # nobody knows which is right
        bad["conflicting answers"] += [
            f"{p.source}: answer {str(p.answers)[:200]}, but {q.source} has the same problem with "
            f"{str(q.answers)[:200]}"
            for p, q in zip((first, *others), rivals, strict=True)
        ]
    return kept


def report_bad_rows(source: str, bad: dict[str, list[str]], drop: bool, say) -> None:
    """One line per bad row (a few per kind), then an error; with `drop` only the counts."""
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in bad.items())
    if drop:
        return say(f"{source}: left out {counts}")
    for kind, lines in bad.items():
        say_some(source, kind, lines, say)
    raise UserError(
        f"{source}: bad rows ({counts}); correct them, or leave them out with --drop_bad_rows"
    )


def say_some(source: str, kind: str, lines: list[str], say) -> None:
    for line in lines[:SHOWN_PER_KIND]:
        say(f"{kind}: {line}")
    if len(lines) > SHOWN_PER_KIND:
        say(f"{kind}: ... and {len(lines) - SHOWN_PER_KIND} more in {source}")


def report_letters(source: str, problems: list[Problem], say) -> None:
    """Report answers that only a letter-by-letter copy matches: their reward is nearly always 0."""
    everything = [gold for p in problems for gold in p.answers]
    lost, unknown = golds.only_by_letters(everything, CHECK_SECONDS)
    if unknown:
        say(f"{source}: {unknown} unusual answers were too slow to check; other spellings may fail")
    if not lost:
        return
    named = set(lost)
    lines = [
        f"{p.source}: the answer {gold[:100]!r}"
        for p in problems
        for gold in dict.fromkeys(p.answers)
        if gold in named
    ]
    say(
        f"{source}: {len(lines)} of {len(everything)} answers right only letter by letter "
        "(math-verify cannot read them, so no other way of writing them is accepted)"
    )
    say_some(source, "right only letter by letter", lines, say)


def hold_out(
    problems: list[Problem], fraction: float, seed: int, suffix: str = ""
) -> tuple[list[Problem], list[Problem]]:
    """(training problems, test problems): `fraction` of the problems, at least one, is held out.

    The order of the set is kept. The same problems, fraction and seed give the same parts, whatever
    the order of the problems. Problems that differ only in typesetting go to the same part.
    Raises UserError.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--test_fraction {fraction}: must be between 0 and 1, without both")
    keys = [leak_key(p.text, suffix) for p in problems]
    order = sorted(set(keys))
    random.Random(seed).shuffle(order)
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise UserError(
            f"--test_fraction {fraction}: leaves nothing to train on of {len(order)} problems"
        )
    held = set(order[:count])
    train = [p for p, key in zip(problems, keys, strict=True) if key not in held]
    return train, [p for p, key in zip(problems, keys, strict=True) if key in held]
