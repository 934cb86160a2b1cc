r"""data.py: problem sets, prompts, and the toy that everything runs on without a download.

A problem set is one of
    FILE.jsonl     one object a line: {"problem": "...", "answer": "..."}; answer may be a number or a list of answers,
                   any of which is right
    FILE.parquet   verl-style: `prompt` = [{"role", "content"}, ...], `reward_model.ground_truth` = string or list
    toy:8:2000:1   generated: 2000 programs of 8 variables, seed 1 (the end may be left out: "toy" = toy:8:2000:0)

Training on a bad row is worse than stopping. Malformed rows, empty answers, duplicates, conflicting answers, over-long
prompts and training problems that occur in the evaluation set are all reported with file and row, and loading stops;
with `drop` they are left out and counted. Lines of a JSONL file count from 1 (as editors do), parquet rows from 0.

Left out: streaming. A set is held in memory, as token ids.

    python -m pytest tests/test_data.py
"""
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SHOWN_PER_KIND = 5  # a file with 1,500 duplicates needs one line that says so, not 1,500


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """What an error says, fit for a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def stop_on_user_error(command: str):
    """Every command runs inside this: bad input ends it with one line and exit code 2, Ctrl-C with 130."""
    try:
        yield
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)


@dataclass
class Problem:
    text: str  # as shown to a person
    answers: list[str]  # any of them is right
    source: str  # "FILE, line 7"
    prompt_ids: list[int] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------------------------------
def parse_answers(value) -> list[str]:
    """One answer (string or number) or a list of them -> strings. Raises ValueError for anything else."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError("the answer must be a string, a number or a list of them")
    return [str(v).strip() for v in values if str(v).strip()]


def parse_row(row) -> tuple[list[dict], list[str]]:
    """(messages, answers) of a row of either format. Raises ValueError that names the field."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "problem" in row:
        messages, answer = [{"role": "user", "content": row["problem"]}], row.get("answer")
    else:
        messages, reward_model = row.get("prompt"), row.get("reward_model")
        answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if not isinstance(messages, list) or not messages or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError('no text in the field "problem" (or, as verl has it, [{"role", "content"}] in "prompt")')
    if answer is None:
        raise ValueError('the field "answer" (or, as verl has it, "reward_model.ground_truth") is missing')
    if not messages[-1]["content"].strip():
        raise ValueError("the problem is empty")
    return messages, parse_answers(answer)


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """("line 7", row) for every row; a row that cannot be read is a ValueError object in its place."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet  # only for those who have such files
        try:
            rows = parquet.read_table(path).to_pylist()
        except Exception as error:  # pyarrow raises a dozen types for a broken file
            raise UserError(f"{path}: not a readable parquet file ({first_line(error)})") from error
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
                    yield f"line {number}", ValueError(f"not JSON in UTF-8 ({error})")


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and problem sets
# ---------------------------------------------------------------------------------------------------------------------
def encode_prompt(tokenizer, messages: list[dict]) -> list[int]:
    """Token ids through the tokenizer's chat template if it has one (ready for the assistant's turn), else plain text."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens
    return tokenizer("\n".join(m["content"] for m in messages))["input_ids"]


def problem_key(text: str, suffix: str) -> str:
    """What makes two rows the same problem: their text without the instruction at the end and without layout."""
    return " ".join(text.removesuffix(suffix).split())


def leak_key(text: str, suffix: str) -> str:
    """The same for "does it occur in the evaluation set?", where a false alarm costs one training problem and a miss the
    honesty of the result: letters and digits only, so that another way of typesetting is no disguise."""
    return "".join(c for c in problem_key(text, suffix).lower() if c.isalnum())


def load_problems(source: str, tokenizer, *, max_prompt: int, suffix: str = "", evaluation: list[Problem] = (),
                  drop: bool = False, say=print) -> list[Problem]:
    """The problem set with its prompts as token ids, in the order of the file.

    suffix: an instruction added to every problem that does not already end in it. evaluation: problems that must not
    occur in this set. Bad rows are said one per line (SHOWN_PER_KIND of a kind); then raises UserError, or with `drop`
    leaves them out and says how many. Raises UserError also for an unreadable file or a set with nothing left.
    """
    if source.split(":")[0] == "toy":
        held_texts = {p.text for p in evaluation}  # a generated set is never wrong: programs of the test set are passed over
        rows = ((f"program {i}", {"problem": text, "answer": answer}) for i, (text, answer) in enumerate(toy_set(source))
                if text not in held_texts)
        suffix, evaluation = "", ()
    elif not Path(source).is_file():
        raise UserError(f"{source}: no such problem file; give a .jsonl or .parquet file, or toy:8:2000:1")
    else:
        rows = read_rows(Path(source))
    bad: dict[str, list[str]] = {}  # kind -> one line each
    problems: dict[str, list[Problem]] = {}  # by key: rows with the same problem come together
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
        except Exception as error:  # also what a chat template or a tokenizer says of odd roles and characters
            bad.setdefault("malformed", []).append(f"{where}: {first_line(error)}")
            continue
        if not answers:
            bad.setdefault("empty answer", []).append(f"{where}: the answer is empty")
        elif (leak := held_out.get(leak_key(text, suffix))):
            bad.setdefault("in the evaluation set", []).append(f"{where}: the same problem is {leak}")
        elif not problem.prompt_ids:
            bad.setdefault("malformed", []).append(f"{where}: the tokenizer knows no character of this problem")
        elif len(problem.prompt_ids) > max_prompt:
            bad.setdefault("over-long prompt", []).append(
                f"{where}: {len(problem.prompt_ids)} tokens, more than --max_prompt {max_prompt}")
        else:
            problems.setdefault(problem_key(text, suffix), []).append(problem)
    kept = []
    for first, *others in problems.values():
        if any(sorted(other.answers) != sorted(first.answers) for other in others):  # nobody knows which is right
            bad.setdefault("conflicting answers", []).extend(
                f"{p.source}: answer {p.answers}, but {first.source} has the same problem with {first.answers}"
                for p in (first, *others))
            continue
        kept.append(first)
        bad.setdefault("duplicate", []).extend(f"{p.source}: the same problem as {first.source}" for p in others)
    report_bad_rows(source, {kind: lines for kind, lines in bad.items() if lines}, drop, say)
    if not kept:
        raise UserError(f"{source}: no usable problem in it")
    return kept


def report_bad_rows(source: str, bad: dict[str, list[str]], drop: bool, say) -> None:
    """One line per bad row (a few per kind); then an error, or with `drop` the counts."""
    if bad and not drop:
        for kind, lines in bad.items():
            for line in lines[:SHOWN_PER_KIND]:
                say(f"{kind}: {line}")
            if len(lines) > SHOWN_PER_KIND:
                say(f"{kind}: ... and {len(lines) - SHOWN_PER_KIND} more in {source}")
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in bad.items())
    if bad and not drop:
        raise UserError(f"{source}: bad rows ({counts}); mend them, or leave them out with --drop_bad_rows")
    if bad:
        say(f"{source}: left out {counts}")


# ---------------------------------------------------------------------------------------------------------------------
# The toy: straight-line programs modulo 10
# ---------------------------------------------------------------------------------------------------------------------
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPS = {"+": lambda x, y: (x + y) % 10, "-": lambda x, y: (x - y) % 10, "*": lambda x, y: (x * y) % 10}


def toy_program(n_vars: int, rng: random.Random, hub: int | None = None, pull: float = 0.8, constant: bool = True) -> str:
    """One program as text, e.g. "a=3;b=a+4;c=a*b;?c": n_vars assignments, then the question for the last variable.

    One variable, the fourth or a later one, is a "hub": a constant that each later line uses with probability `pull`. So
    steps differ in how much of the rest depends on them, and the earliest ones are not those that matter most: that is
    what FCI should find. (toy/build.py asks for other hubs in its first stage.)
    """
    if hub is None:
        hub = rng.randrange(3, max(4, n_vars // 2 + 1))
    lines = [f"a={rng.randrange(10)}"]
    for i in range(1, n_vars):
        first, second = i - 1, rng.randrange(i)
        if i > hub:
            first = rng.choices([hub, i - 1, rng.randrange(i)], [pull, (1 - pull) * 2 / 3, (1 - pull) / 3])[0]
            second = rng.choice([hub, second])
        operand = LETTERS[second] if rng.random() < 0.5 else str(rng.randrange(10))
        expression = f"{LETTERS[first]}{rng.choice('+-*')}{operand}"
        lines.append(f"{LETTERS[i]}={rng.randrange(10) if constant and i == hub else expression}")
    return ";".join(lines) + f";?{LETTERS[n_vars - 1]}"


def toy_solution(program: str, slip: float = 0.0, rng: random.Random | None = None) -> str:
    r"""The teacher's response: one step "b=3+4=7" and a blank line per variable, then "\boxed{7}".

    With probability `slip` a step's result is replaced by a wrong digit, and later steps go on from it: such a teacher
    knows how to solve every program but slips, which is what reinforcement learning can mend in minutes.
    >>> toy_solution("a=3;b=a+4;?b")
    'a=3\n\nb=3+4=7\n\n\\boxed{7}'
    """
    values: dict[str, int] = {}
    steps = []
    *lines, question = program.split(";")
    for line in lines:
        name, _, expression = line.partition("=")
        filled = "".join(str(values[c]) if c in values else c for c in expression)
        values[name] = int(filled) if len(filled) == 1 else OPS[filled[1]](int(filled[0]), int(filled[2]))
        if slip and rng.random() < slip:
            values[name] = (values[name] + rng.randrange(1, 10)) % 10
        steps.append(f"{name}={values[name]}" if len(filled) == 1 else f"{name}={filled}={values[name]}")
    return "\n\n".join([*steps, rf"\boxed{{{values[question[1]]}}}"])


def toy_set(source: str) -> Iterator[tuple[str, str]]:
    """(program, answer) pairs for "toy[:VARIABLES[:COUNT[:SEED]]]"; no program twice. Raises UserError."""
    try:
        given = [int(part) for part in source.split(":")[1:]]
        n_vars, count, seed = given + [8, 2000, 0][len(given):]
        if not (4 <= n_vars <= 26 and count >= 1 and seed >= 0):
            raise ValueError
    except ValueError:
        raise UserError(f"{source}: write toy:VARIABLES:COUNT:SEED, for example toy:8:2000:1 (4 to 26 variables)") from None
    rng = random.Random(f"toy/{n_vars}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        program = toy_program(n_vars, rng)
        if program not in seen:
            seen.add(program)
            yield program, toy_solution(program).rsplit("{")[-1].rstrip("}")
