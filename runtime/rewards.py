r"""rewards.py: the reward of a run, a function that you can replace.

    --reward boxed              the last \boxed{...} after the last </think> (default)
    --reward number             the last number of the response, as in GSM8K
    --reward boxed_or_number    the box if there is one, else the last number
    --reward mymodule:myfunction      myfunction(response, answers) -> number

The first three ask the grader of runtime/grading.py and give 1 for a right answer, else 0. A looser
reward is easier to exploit: any number at the end counts as the answer, even if the model did not
mean it as one. A model that never writes a box learns nothing from the first.

    python -m pytest tests/runtime/test_rewards.py
"""

import atexit
import importlib
import re
import sys
import traceback
from collections import Counter

from runtime.cli import UserError, first_line
from runtime.grading import Grader, last_box

DEFAULT = ("boxed", "eval:grade")  # the second is its name in runs and commands of version 1
GRADED = (*DEFAULT, "number", "boxed_or_number")
# 1,234.5 or -7 or 3/4; not the 5 of x5
NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?")
# The grader looks for these in a response, even if they are special tokens
MARKS = ("<think>", "</think>")


def response_texts(tokenizer, responses: list[list[int]]) -> list[str]:
    """The texts of responses (token ids), without special tokens except the marks of thinking: the
    grader must see where the thinking ends, and for some models that is a special token."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    special -= {tokenizer.get_vocab().get(mark) for mark in MARKS}
    kept = [[token for token in tokens if token not in special] for tokens in responses]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def number_in_a_box(response: str) -> str:
    r"""The last number after the thinking, in a box for the grader: "so 1,200 in all." -> the text
    \boxed{1,200}; "" if there is none."""
    found = NUMBER.findall(response.rpartition("</think>")[2])
    return rf"\boxed{{{found[-1]}}}" if found else ""


class Reward:
    """Grades (response, answers) pairs. `counts`: timeouts, deaths and missing boxes, for the
    training log. units: "loose" ignores them, "strict" needs the same units on both sides."""

    def __init__(self, spec: str = "boxed", workers: int = 2, units: str = "loose"):
        self.spec = spec
        self.counts: Counter[str] = Counter()
        # of the latest call, per item: why it could not be graded ("" if it could); whether there
        # was an answer to grade, in a box or as a number
        self.errors: list[str] = []
        self.boxed: list[bool] = []
        self.grader: Grader | None = None
        if spec in GRADED:  # the pool grades many answers at a time
            self.grader = Grader(workers, units=units)
            atexit.register(self.grader.close)
        else:
            self.function = named_function(spec)

    def __call__(self, items: list[tuple[str, list[str]]]) -> list[float]:
        """One finite number per item, in order; 0 or 1 by default. Raises UserError if a custom
        function returns anything else."""
        if not self.grader:
            self.errors = [""] * len(items)
            self.boxed = [last_box(response) is not None for response, _ in items]
            self.counts["unboxed"] += self.boxed.count(False)
            return [self.ask(response, answers) for response, answers in items]
        verdicts = self.grader.grade_many([(self.answer(text), golds) for text, golds in items])
        self.errors = [v.error for v in verdicts]
        self.boxed = [v.boxed for v in verdicts]
        self.counts.update(filter(None, self.errors))
        self.counts["unboxed"] += self.boxed.count(False)
        return [float(v.correct) for v in verdicts]

    def answer(self, response: str) -> str:
        """The text that the grader gets for a response."""
        if self.spec in DEFAULT:
            return response
        if self.spec == "boxed_or_number" and last_box(response) is not None:
            return response
        return number_in_a_box(response)

    def ask(self, response: str, answers: list[str]) -> float:
        """Call the custom function, which may raise or return anything."""
        try:
            reward = self.function(response, answers)
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"--reward {self.spec}: raised {type(error).__name__} in"
                f" {place.filename}:{place.lineno} ({first_line(error)})"
            ) from error
        # also catches NaN
        if not isinstance(reward, (bool, int, float)) or not abs(reward) <= sys.float_info.max:
            raise UserError(
                f"--reward {self.spec}: returned {reward!r}; it must return a finite number"
            )
        return float(reward)


def named_function(spec: str):
    """Import the function module:name. Raises UserError."""
    module, colon, name = spec.partition(":")
    if not colon:
        raise UserError(
            f"--reward {spec}: cannot be imported; give boxed, number, boxed_or_number or"
            " module:function"
        )
    try:
        function = getattr(importlib.import_module(module), name)
    # no such module, or any error when it is imported
    except Exception as error:
        raise UserError(
            f"--reward {spec}: cannot be imported as module:function ({first_line(error)})"
        ) from error
    if not callable(function):
        raise UserError(f"--reward {spec}: is not a function")
    return function
