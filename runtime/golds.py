r"""golds.py: gold answers, the right ones of a problem set. How they are read; what can match them.

python -m pytest tests/runtime/test_golds.py
"""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

from runtime.grading import Grader, last_box

GRADER = Grader(workers=2, timeout=3)  # starts when a gold needs it; `close` ends it
LONGEST = 1000  # characters; a longer gold is only compared letter by letter

_NONE = {"nan", "inf", "-inf"}  # how tables write missing numbers
# Readable without computer algebra: a number, with or without LaTeX around it; one word; a choice.
_NUMBER = re.compile(
    r"\\?\$?\s*[-+]?\s*(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:\s*/\s*[0-9]+)?\s*(?:\\?%)?\s*\\?\$?\.?"
    r"|[-+]?\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
)
_WORD = re.compile(r"(?:\\(?:text|mathrm|textbf|mathbf)\{)?\(?[^\W\d_]{1,20}\)?\}?\.?")
# math-verify can certainly read these: sums of products of numbers, letters, roots and fractions,
# alone, in a tuple or as x = ... Most golds are so; saves 8 ms for each. (++, ?+: no backtracking.)
_TERM = r"[-+]?+[0-9]*+(?:\\sqrt\{[0-9]++\}|\\pi|[a-z])?+"
_FACTOR = (
    r"(?:[0-9]++(?:\.[0-9]++)?+|[a-zA-Z]|\\pi(?![a-zA-Z])|\([-+ 0-9a-z]{1,20}\)"
    rf"|\\sqrt\{{{_TERM}\}}|\\[dt]?frac\{{{_TERM}\}}\{{{_TERM}\}})"
    r"(?:\^(?:[0-9a-z]|\{[0-9a-z]++\}))?+\s*+"
)
_SUM = rf"\s*+[-+]?+\s*+(?:{_FACTOR})++(?:[-+]\s*+(?:{_FACTOR})++)*+"
_FORMULA = re.compile(rf"\$?(?:\\left)?[(\[]?{_SUM}(?:[,=]{_SUM})*+(?:\\right)?[)\]]?\s*\$?\.?")
# Words that are mathematics, with or without a backslash.
_FUNCTIONS = {
    "and",
    "mod",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "log",
    "exp",
    "sqrt",
    "gcd",
    "lcm",
}


def parse_answers(value) -> list[str]:
    """One answer (string or number) or a list of them -> strings. Raises ValueError otherwise."""
    values = value if isinstance(value, list) else [value]
    kinds = (str, int, float, Decimal)
    if not all(isinstance(v, kinds) and not isinstance(v, bool) for v in values):
        raise ValueError("the answer must be a string, a number or a list of them")
    if any(
        v.strip().lower() in _NONE if isinstance(v, str) else not math.isfinite(v) for v in values
    ):
        raise ValueError("the answer is NaN or infinite")  # written where an answer is missing
    texts = [str(v).strip() for v in values]
    return [text for text in texts if text]


def final_answers(answers: list[str]) -> list[str]:
    """The answers for the grader: of worked solutions, only the final answer."""
    return [final for final in map(final_answer, answers) if final]


def final_answer(text: str) -> str:
    r"""The final answer of a solution: what follows its last "####" (GSM8K), else its last box.

    >>> final_answer("3 + 4 = 7\n#### 7"), final_answer(r"So \boxed{7}."), final_answer("7")
    ('7', '7', '7')
    """
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip()
    box = last_box(text)
    return text if box is None else box.strip()


def agree(some: list[str], others: list[str], deadline: float) -> bool:
    """Do two rows have equal answers? 7, "7.0" and "$7$" are: the grader accepts each for each.

    After the deadline (of time.monotonic) only equal strings count as equal.
    """
    if sorted(some) == sorted(others):
        return True
    if time.monotonic() > deadline:
        return False
    items = [(f"\\boxed{{{one}}}", others) for one in some]
    items += [(f"\\boxed{{{one}}}", some) for one in others]
    return all(verdict.correct for verdict in GRADER.grade_many(items))


def only_by_letters(golds: list[str], seconds: float) -> tuple[list[str], int]:
    """(golds that only match letter by letter, number of golds that there was no time to check).

    One word or a choice is not reported: there a letter-by-letter comparison is right. Takes at
    most about `seconds`.
    """
    lost = {gold for gold in golds if is_prose(gold) or len(gold) > LONGEST}
    unclear = [gold for gold in dict.fromkeys(golds) if not (gold in lost or is_simple(gold))]
    verdicts = dict(zip(unclear, readable(unclear, seconds), strict=True))
    lost |= {gold for gold, verdict in verdicts.items() if verdict is False}
    return [gold for gold in dict.fromkeys(golds) if gold in lost], [*verdicts.values()].count(None)


def is_simple(gold: str) -> bool:
    """A plain number, one word, the letter of a choice, or a formula of the simplest kind."""
    if any(kind.fullmatch(gold) for kind in (_NUMBER, _FORMULA)):
        return True
    return bool(_WORD.fullmatch(gold)) and not any(map(str.isnumeric, gold))  # ½ is numeric


def is_prose(gold: str) -> bool:
    """Two words or more, no number first: computer algebra would multiply the letters."""
    text = re.sub(r"\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", gold[:LONGEST])
    words = re.findall(r"(?<![\\A-Za-z])[^\W\d_]{3,}", text)
    words = [word for word in words if word.lower() not in _FUNCTIONS]
    has_number = re.search(r"[0-9]", text)
    return len(words) >= (4 if has_number else 2) and not re.match(r"[\s$\\({-]*[0-9]", text)


def readable(golds: list[str], seconds: float) -> list[bool | None]:
    """Does math-verify read each gold, without falling back to strings? None: it took too long.

    It asks the grader's workers whether a gold equals itself: a gold that does not parse equals
    nothing. Workers, because a hostile gold can hang or fill the memory.
    """
    deadline = time.monotonic() + seconds

    def ask(gold: str) -> bool | None:
        if time.monotonic() > deadline:
            return None
        text = re.sub(r"\\!|\\?\$|[\s.,;]+$", "", gold)  # the grader removes these, too
        reply = GRADER._ask(json.dumps([[text, text]]).encode() + b"\n")
        return None if reply["error"] in ("timeout", "died") else reply["correct"]

    pool = ThreadPoolExecutor(GRADER.size)
    try:
        return list(pool.map(ask, golds))
    finally:  # after Ctrl-C, drop the rest
        pool.shutdown(cancel_futures=True)
