r"""data.py: problem sets and prompts.

A problem set is one of
    FILE.jsonl     one object a line: {"problem": "...", "answer": "..."}; answer may be a number or
                   a list of answers,
                   any of which is right
    FILE.parquet   such columns, or verl-style: `prompt` = [{"role", "content"}, ...],
                   `reward_model.ground_truth` =
                   string or list
    FILE.json      the same in one array, as DeepScaleR is published
    toy:8:2000:1   generated (toy/programs.py): 2000 programs of 8 (or 8-10) variables, seed 1

Training on a bad row is worse than stopping. Malformed rows, empty answers, duplicates, conflicting
answers, over-long prompts and training problems that occur in the evaluation set are all reported
with file and row, and loading stops; with `drop` they are left out and counted. Lines of a JSONL
file count from 1 (as editors do), parquet rows from 0.

Left out: streaming. A set is held in memory, as token ids.

    python -m pytest tests/runtime/test_data.py
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runtime.cli import UserError, first_line
from toy.programs import toy_set

SHOWN_PER_KIND = 5  # a file with 1,500 duplicates needs one line that says so, not 1,500


@dataclass
class Problem:
    text: str  # as shown to a person
    answers: list[str]  # any of them is right
    source: str  # "FILE, line 7"
    prompt_ids: list[int] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# Reading files
# --------------------------------------------------------------------------------------------------
def parse_answers(value) -> list[str]:
    """One answer (string or number) or a list of them -> strings. Raises ValueError for anything
    else."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError("the answer must be a string, a number or a list of them")
    # what other libraries write where there is none
    if not all(math.isfinite(v) for v in values if isinstance(v, float)):
        raise ValueError("the answer is NaN or infinite")
    return [str(v).strip() for v in values if str(v).strip()]


def parse_row(row) -> tuple[list[dict], list[str]]:
    """(messages, answers) of a row of either format. Raises ValueError that names the field."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "problem" in row:
        messages, answer = [{"role": "user", "content": row["problem"]}], row.get("answer")
    else:
        messages, reward_model = row.get("prompt", []), row.get("reward_model")
        answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        raise ValueError(
            'no text in the field "problem" (or, as verl has it, [{"role", "content"}] in "prompt")'
        )
    if answer is None:
        raise ValueError(
            'the field "answer" (or, as verl has it, "reward_model.ground_truth") is missing'
        )
    if not messages[-1]["content"].strip():
        raise ValueError("the problem is empty")
    return messages, parse_answers(answer)


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """("line 7", row) for every row; a row that cannot be read is a ValueError object in its
    place."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet  # only for those who have such files

        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception as error:  # pyarrow raises a dozen types for a broken file
            raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from error
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
        return
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path}: not JSON in UTF-8 ({first_line(error)})") from error
        if not isinstance(rows, list):
            raise UserError(
                f"{path}: not an array of problems; a file with one object a line must end in"
                " .jsonl"
            )
        yield from ((f"entry {i}", row) for i, row in enumerate(rows))
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                    yield f"line {number}", ValueError(f"not JSON in UTF-8 ({error})")


# --------------------------------------------------------------------------------------------------
# Prompts and problem sets
# --------------------------------------------------------------------------------------------------
def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids through the tokenizer's chat template if it has one (ready for the assistant's
    turn), else plain text."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # the template has written the special tokens
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer("\n".join(m["content"] for m in messages))["input_ids"]


def encode_question(tokenizer, text: str, option: str) -> list[int]:
    """The prompt of a problem that came with a command-line option. Raises UserError."""
    try:
        return encode_prompt(tokenizer, [{"role": "user", "content": text}])
    # a chat template that is broken or refuses, a text that is not UTF-8
    except Exception as error:
        raise UserError(
            f"{option}: cannot be written with the model's chat template and tokenizer, or is not"
            f" UTF-8 ({first_line(error)})"
        ) from error


def problem_key(text: str, suffix: str) -> str:
    """What makes two rows the same problem: their text without the instruction at the end and
    without layout."""
    return " ".join(text.removesuffix(suffix).split())


def leak_key(text: str, suffix: str) -> str:
    """The same for "does it occur in the evaluation set?", where a false alarm costs one training
    problem and a miss the honesty of the result: letters and digits only, so that another way of
    typesetting is no disguise."""
    return "".join(c for c in problem_key(text, suffix).lower() if c.isalnum())


def load_problems(
    source: str,
    tokenizer,
    *,
    max_prompt: int,
    suffix: str = "",
    evaluation: list[Problem] | tuple = (),
    drop: bool = False,
    say=print,
) -> list[Problem]:
    """The problem set with its prompts as token ids, in the order of the file.

    suffix: an instruction added to every problem that does not already end in it. evaluation:
    problems that must not occur in this set. Bad rows are said one per line (SHOWN_PER_KIND of a
    kind); then raises UserError, or with `drop` leaves them out and says how many. Raises UserError
    also for an unreadable file or a set with nothing left.
    """
    if source.split(":")[0] == "toy":
        # a generated set is never wrong: programs of the test set are passed over
        held_texts = {p.text for p in evaluation}
        try:
            programs = list(toy_set(source))
        except ValueError:
            raise UserError(
                f"{source}: write toy:VARIABLES:COUNT:SEED, for example toy:8:2000:1 (4 to 26"
                " variables)"
            ) from None
        rows: Iterator[tuple[str, object]] = (
            (f"program {i}", {"problem": text, "answer": answer})
            for i, (text, answer) in enumerate(programs)
            if text not in held_texts
        )
        suffix, evaluation = "", ()
    # Path's raises where a folder may not be read or a name is too long
    elif not os.path.isfile(source):
        raise UserError(
            f"{source}: no such problem file; give a .jsonl, .json or .parquet file, or"
            " toy:8:2000:1"
        )
    else:
        rows = read_rows(Path(source))
    bad: dict[str, list[str]] = defaultdict(list)  # kind -> one line each
    # by key: rows with the same problem come together
    problems: dict[str, list[Problem]] = defaultdict(list)
    held_out = {leak_key(p.text, suffix): p.source for p in evaluation}
    for place, row in rows:
        where = f"{source}, {place}"
        try:
            if isinstance(row, ValueError):
                raise row
            messages, answers = parse_row(row)
            text = messages[-1]["content"]
            if not text.endswith(suffix):
                messages[-1] = {**messages[-1], "content": text + suffix}
            problem = Problem(text, answers, where, encode_prompt(tokenizer, messages))
        # also what a chat template or a tokenizer says of odd roles and characters
        except Exception as error:
            bad["malformed"].append(f"{where}: {first_line(error)}")
            continue
        if not answers:
            bad["empty answer"].append(f"{where}: the answer is empty")
        elif leak := held_out.get(leak_key(text, suffix)):
            bad["in the evaluation set"].append(f"{where}: the same problem is {leak}")
        elif not problem.prompt_ids:
            bad["malformed"].append(f"{where}: the tokenizer knows no character of this problem")
        elif len(problem.prompt_ids) > max_prompt:
            bad["over-long prompt"].append(
                f"{where}: {len(problem.prompt_ids)} tokens, more than --max_prompt {max_prompt}"
            )
        else:
            problems[problem_key(text, suffix)].append(problem)
    kept = []
    for first, *others in problems.values():
        # nobody knows which is right
        if any(sorted(other.answers) != sorted(first.answers) for other in others):
            bad["conflicting answers"] += (
                f"{p.source}: answer {str(p.answers)[:200]}, but {q.source} has the same problem"
                f" with {str(q.answers)[:200]}"
                for p, q in zip((first, *others), (others[-1], *[first] * len(others)))
            )
            continue
        kept.append(first)
        for p in others:
            bad["duplicate"].append(f"{p.source}: the same problem as {first.source}")
    if bad:
        report_bad_rows(source, bad, drop, say)
    if not kept:
        raise UserError(f"{source}: no usable problem in it")
    return kept


def report_bad_rows(source: str, bad: dict[str, list[str]], drop: bool, say) -> None:
    """One line per bad row (a few per kind); then an error, or with `drop` the counts."""
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in bad.items())
    if drop:
        return say(f"{source}: left out {counts}")
    for kind, lines in bad.items():
        for line in lines[:SHOWN_PER_KIND]:
            say(f"{kind}: {line}")
        if len(lines) > SHOWN_PER_KIND:
            say(f"{kind}: ... and {len(lines) - SHOWN_PER_KIND} more in {source}")
    raise UserError(
        f"{source}: bad rows ({counts}); mend them, or leave them out with --drop_bad_rows"
    )
