"""columns.py: find the problem and the answer of a row, whatever the columns are called.

The usual names are listed below (capital letters do not matter). The first name of a list that most
rows have is taken; if others were possible, one line says which was chosen. For other names there
are --problem_column and --answer_column; a dot reaches into a nested field.

A problem is a text, or chat messages [{"role", "content"}, ...]. The last turn is the problem; the
turns before it (a system prompt, solved examples) are shown to the model unchanged. If messages end
with the assistant's turn, that turn is never shown, and it is the answer if no column has one.

    python -m pytest tests/runtime/test_columns.py
"""

import json
from dataclasses import dataclass

from runtime.cli import UserError
from runtime.golds import parse_answers

PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages", "instruction", "input")
# Final answers come before worked solutions: MATH has both an `answer` and a `solution`.
ANSWER_COLUMNS = (
    "final_answer",
    "answer",
    "expected_answer",
    "ground_truth",
    "reward_model.ground_truth",  # verl
    "target",
    "label",
    "solution",
    "output",
)


@dataclass
class Columns:
    problem: str
    answer: str  # "": the last turn of the problem's messages
    details: str = ""  # a second column with the input of an instruction ("input")


def take(row: dict, column: str):
    """The value of a column, or None. A dot reaches into a field: reward_model.ground_truth."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def names_of(row: dict) -> list[str]:
    """The columns of a row, with the fields of nested ones."""
    return [
        f"{name}.{inner}" if inner else name
        for name, value in row.items()
        for inner in (value if isinstance(value, dict) and value else ("",))
    ]


def may_be_asked(name: str, asked: tuple[str, ...]) -> bool:
    """Does choose_columns look at this column? `asked`: names that the user gave."""
    usual = [root.partition(".")[0] for root in (*PROBLEM_COLUMNS, *ANSWER_COLUMNS)]
    return name.lower() in usual or any(name in (one, one.partition(".")[0]) for one in asked)


def choose_columns(
    source: str, rows: list[dict], found: list[str], problem: str, answer: str, say
) -> Columns:
    """Which columns have the problem and the answer. problem, answer: names from the user, or "".

    found: all columns of the file. If none fits, raises a UserError that lists them.
    """
    problems = fitting(source, rows, found, problem, PROBLEM_COLUMNS, "problem")
    answers = fitting(source, rows, found, answer, ANSWER_COLUMNS, "answer")
    if not problems:
        raise UserError(no_column(source, "problem", found))
    chosen = Columns(problems[0], answers[0] if answers else "")
    if not answers and not any(ends_in_answer(take(row, chosen.problem)) for row in rows):
        raise UserError(no_column(source, "answer", found))
    read_from = problems[:1]
    if chosen.problem.lower() == "instruction" and problems[1:]:
        read_from, chosen.details = problems[:2], problems[1]
    if others := problems[len(read_from) :] + answers[1:]:
        say(
            f"{source}: the problem is read from {shown(read_from)}, the answer from "
            f"{shown(answers[:1] or ['the last message'])}, nothing from {shown(others)}"
        )
    return chosen


def fitting(
    source: str, rows: list[dict], found: list[str], asked: str, usual: tuple[str, ...], what: str
) -> list[str]:
    """The columns that may hold `what`. Rare columns do not count: at least half as many rows must
    have them as have the most frequent one."""
    spelled = {name.lower(): name for row in rows for name in row}
    names = [asked] if asked else [spelled.get(name, name) for name in usual]
    counts = {name: sum(take(row, name) is not None for row in rows) for name in names}
    most = max(counts.values())
    if asked and not most:
        raise UserError(f"{source}: --{what}_column {asked}: no such column in {shown(found)}")
    return [name for name in names if most and 2 * counts[name] >= most]


def no_column(source: str, what: str, found: list[str]) -> str:
    return f"{source}: no column for the {what}; --{what}_column NAME, one of: {shown(found)}"


def shown(names: list[str]) -> str:
    """Names from a file, safe and short enough for one line of a terminal."""
    text = ", ".join(repr(name)[1:-1] for name in names)
    return text if len(text) <= 300 else text[:300] + " ..."


def ends_in_answer(value) -> bool:
    """True for messages that end with the assistant's turn."""
    last = value[-1] if isinstance(value, list) and value else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def parse_row(row, columns: Columns) -> tuple[list[dict], list[str]]:
    """(messages, answers) of a row. Raises a ValueError that names the field."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    messages = conversation(take(row, columns.problem), columns.problem)
    last_turn = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    answer = take(row, columns.answer) if columns.answer else last_turn
    if not messages:
        raise ValueError(f'the field "{columns.problem}" has an answer, but no problem')
    if answer is None:
        raise ValueError(f'the field "{columns.answer or columns.problem}" lacks the answer')
    if not messages[-1]["content"].strip():
        raise ValueError("the problem is empty")
    details = take(row, columns.details) if columns.details else None
    if isinstance(details, str) and details.strip():
        messages[-1]["content"] += "\n\n" + details
    answers = parse_answers(answer)
    refuse_surrogates([text for m in messages for text in m.values()], columns.problem)
    refuse_surrogates(answers, columns.answer or columns.problem)
    return messages, answers


def refuse_surrogates(texts: list[str], column: str) -> None:
    """JSON can contain half a character, "\\ud83d", which no tokenizer or file accepts."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        message = f'half a character (the lone surrogate \\u{code:04x}) in the field "{column}"'
        raise ValueError(message) from error


def conversation(value, column: str) -> list[dict]:
    """Chat messages from a text, or from messages whose content is a text or a list of parts."""
    if isinstance(value, str) and not looks_like_messages(value):
        return [{"role": "user", "content": value}]
    if isinstance(value, str):  # the only way to write messages in a CSV
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'the field "{column}" has messages that are not JSON') from error
    if not isinstance(value, list) or not value:
        raise ValueError(f'no text in the field "{column}", nor messages [{{"role", "content"}}]')
    messages = []
    for message in value:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if isinstance(content, list):  # [{"type": "text", "text": "..."}]
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f'no text in a message of the field "{column}"')
        messages.append({"role": role, "content": content})
    return messages


def looks_like_messages(text: str) -> bool:
    """Is this text a JSON list of messages? As plain text, the model would see the brackets."""
    return text.lstrip().startswith("[{") and "role" in text and "content" in text
