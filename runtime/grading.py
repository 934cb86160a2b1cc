r"""grading.py: is this response's final answer right? Cheap string rules here, computer algebra in
worker processes.

Grading is the reward, so whatever the grader can be talked into is what the policy learns to say.
The rules:

1. Only the content of the LAST closed \boxed{...} after the last </think> counts. No box: wrong.
2. There may be several gold answers; matching any of them is enough. An empty gold matches nothing.
3. Equal after normalising (spaces, \left, \dfrac, $, a trailing full stop, "x =" ...): correct.
4. Plain numbers (integer, decimal, 8.7e8, 8.7 \times 10^8, a/b, \frac{a}{b}) are compared exactly,
   without rounding. Units and percent signs are ignored: they have too many spellings.
5. A gold that is a number or a word takes only its own kind: no chain such as 205=204, no "5 apples
   and 6 pears", no \sum that repeats the question. A numeral in a base (52_8) must match as a
   string.
6. The rest is decided by math-verify (sympy) in a worker process. One that needs more than 3
   seconds, dies or raises means wrong, and the verdict says which: training logs these, for too
   many of them are a bug and not a bad policy.

Left out, on purpose: answers outside the box, an OR of several graders (it adds up their false
positives), partial credit, and any sympy in this process (it hangs, eats memory, and its plain-text
parser calls eval).

    python -m pytest tests/runtime/test_grading.py
"""

# The standard library only: a grading worker is this file run as a script, so importing torch up
# here would cost every worker seconds and memory.
import atexit
import ctypes
import json
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import wait  # just a select() that also works above descriptor 1024
from queue import LifoQueue
from typing import Any

# characters, or twice the gold's; a longer box is wrong, for cutting it would grade another answer
MAX_ANSWER = 300
# characters; a longer gold (real ones have up to 200) takes only itself, for rules 3 to 5 are
# quadratic
MAX_GOLD = 1000
MEMORY = 2 << 30  # bytes of address space for a worker; importing sympy takes about 0.1 GB
START_LIMIT = 120.0  # seconds for that import: 1 on an idle machine, many more on an overloaded one
KILL_GRACE = 4.0  # seconds between a worker's own alarm and the kill from outside


@dataclass
class Verdict:
    correct: bool
    boxed: bool  # there was a closed box: the first rate to look at when all rewards are zero
    error: str = ""  # "", "timeout", "died" or "error"; with an error, correct is False


# --------------------------------------------------------------------------------------------------
# Rules 1-5: plain string work in this process. Against the integer golds of most training sets it
# decides everything.


def last_box(response: str) -> str | None:
    r"""The content of the last closed box after the last </think>: r"\boxed{3} or \boxed{\frac12}"
    -> r"\frac12"."""
    text = response.rpartition("</think>")[2]
    # One pass with a stack of open braces. Closing each \boxed{ on its own would be quadratic, and
    # a collapsed policy does write thousands of them. An escaped brace, as in \{1,2\}, is text and
    # neither opens nor closes.
    open_braces: list[int] = []
    latest, content = 0, None
    for token in re.finditer(r"(\\{1,2}boxed\s*\{)|\\.|[{}]", text, re.DOTALL):
        if token[1] or token[0] == "{":
            open_braces.append(token.end() if token[1] else 0)  # 0: an ordinary brace
        elif token[0] == "}" and open_braces and (start := open_braces.pop()) > latest:
            # the box that STARTS last: of nested ones, the inner
            latest, content = start, text[start : token.start()]
    return content


# What models type instead of LaTeX. Zero-width characters and NUL are invisible, so they cannot be
# meant.
_TYPED = {"−": "-", "×": r"\times ", "·": r"\cdot ", "°": r"^\circ ", "π": r"\pi ", "…": r"\ldots "}
_UNICODE = str.maketrans({**_TYPED, **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\0", "")})
_TEXT = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s*"
# What may follow a number: \text{ square feet}, \mathrm{m}/\mathrm{s}^2, ^\circ C, %, and a few
# bare words (not any word: "3 pi" is not 3, nor is 3\mathrm{i}). Digits or "and" inside make it
# more than a unit.
_UNIT = re.compile(
    rf"(?:[\s/]*{_TEXT}\{{(?!\s*(?:[eij]|pi)\s*\}}|[^{{}}]*\b(?:and|or|not)\b)[^{{}}0-9,;:=<>]{{1,30}}\}}"
    r"(?:\^(?:[0-9]|\{-?[0-9]\}))?)+$|\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*[CF]?$|\s*\\?%$"
    r"|(?<=[0-9])\s*(?:[ckm]m|kg|mph|(?:degree|second|minute|hour|day|dollar|cent|mile|unit)s?|inches|feet|percent)$"
)
# "x =", "f(x) =", "m_{max} =", "x \in" in front of an answer, or of each of several: its name, not
# part of it.
_NAME = re.compile(
    r"(^|[,;]\s*)(?!\\pi)(?:\\[A-Za-z]+|[A-Za-z])\s*(?:_\s*(?:\w|\{[^{}]*\}))?\s*(?:\([A-Za-z]\))?\s*"
    r"(?:=|\\in(?![A-Za-z]))\s*"
)
_DECIMAL = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:(?:[eE]|(?:\\times|\\cdot|\*)10\^)\{?([+-]?[0-9]{1,4})\}?)?"
_FRACTION = r"([+-]?)(?:\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}|([0-9]+)/([0-9]+))"
# The commands that a number may be written with. \sum, \int and \lim are not among them: they
# repeat the question.
_ARITHMETIC = frozenset(
    [
        "frac",
        "sqrt",
        "cdot",
        "times",
        "div",
        "pi",
        "circ",
        "binom",
        "log",
        "ln",
        "exp",
        "sin",
        "cos",
        "tan",
    ]
)


def _clean(text: str) -> str:
    """Remove what has no meaning. The result is still LaTeX, and it is what a worker gets."""
    text = re.sub(
        r"\\!\s*|\\?\$|\\(?:displaystyle|left|right)(?![A-Za-z])", "", text.translate(_UNICODE)
    )
    # (?<!\\): "\\ " ends a row of a matrix
    text = re.sub(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+", " ", text)
    text = re.sub(r"\s*,?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}\s*", ", ", text).replace("{,}", ",")
    # \dfrac is \frac, and \frac12, \frac1{2}, \sqrt2 get their braces, which math-verify wants too.
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(frac|sqrt)\s*([0-9]|(?<=\s)[A-Za-z]|\\pi(?![A-Za-z]))", r"\\\1{\2}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z]|\\pi(?![A-Za-z]))", r"\1{\2}", text)
    # one full stop; three would be an ellipsis
    text = re.sub(r"(?<!\.)\.$", "", text.strip()).strip()
    # 1,234; but "1, 234" is a list
    if re.fullmatch(r"[+-]?[0-9]{1,3}(?:[ ,][0-9]{3})+(?:\.[0-9]+)?", text):
        text = re.sub("[ ,]", "", text)
    return text


def _key(text: str) -> str:
    """The string that is compared: a cleaned text without the choices that LaTeX leaves to the
    writer."""
    text = re.sub(_TEXT + r"\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2", text)
    # a space between two digits stays: "1 2" is not 12
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # choice (C) is C


def _number(text: str) -> Fraction | None:
    """The value of a plain number, else None. Sizes are bounded: Fraction("1e999999999") would fill
    the memory."""
    text = re.sub(r"^([+-]?)10\^", r"\g<1>1\\times10^", _key(_clean(_UNIT.sub("", text))))
    if len(text) > 100:
        return None
    if match := re.fullmatch(_DECIMAL, text):
        return Fraction(f"{match[1]}e{match[2] or 0}")
    if (match := re.fullmatch(_FRACTION, text)) and (bottom := int(match[3] or match[5])):
        return Fraction(int(match[2] or match[4]), bottom) * (-1 if match[1] == "-" else 1)
    return None


def _decide(box: str, gold: str) -> bool | tuple[str, str]:
    """The verdict on one gold if strings and fractions can give it, else the (gold, answer) for
    math-verify."""
    if len(box) > max(MAX_ANSWER, 2 * len(gold)):
        return False
    if len(gold) > MAX_GOLD:
        return box.strip() == gold.strip() != ""
    answer, gold = _clean(box), _clean(gold)
    if bool(_NAME.search(answer)) != bool(_NAME.search(gold)):  # x=5 matches 5, but not y=5
        answer, gold = _NAME.sub(r"\1", answer), _NAME.sub(r"\1", gold)
    a, g = _key(answer), _key(gold)
    if not a or not g or a == g:
        return a == g != ""
    x, y = _number(answer), _number(gold)
    if x is not None and y is not None:
        return x == y
    answer_value, gold_value = _UNIT.sub("", answer), _UNIT.sub("", gold)
    if y is not None:  # rule 5: e and i are the only letters that can stand in a number
        rest = re.sub(
            r"\\([A-Za-z]+)",
            lambda command: " " if command[1] in _ARITHMETIC else "?",
            answer_value,
        )
        if re.search(r"[^0-9ei\s+\-*/^!(){}\[\].|_]|[0-9]\s*_|[0-9]\s+[0-9]", rest):
            return False
    # rule 5: sympy would read a word as a product of its letters
    if re.fullmatch(_TEXT + r"\{[^{}]*\}", gold):
        return a.casefold() == g.casefold()
    # Three things that math-verify skips: bases (2516_7 for 2516_8), chains (1=2=x for x), ellipses
    # ("1, ..., n").
    if (
        re.search(r"[0-9]_", a + g)
        or a.count("=") != g.count("=")
        or re.search(r"\\[lc]?dots|\.\.\.", a + g)
    ):
        return False
    return gold_value, answer_value


# --------------------------------------------------------------------------------------------------
# Rule 6: math-verify in worker processes.
#
# Sympy on hostile input hangs, at times inside one C call that no Python signal handler interrupts;
# only a process can be stopped for certain. Workers are plain scripts that speak JSON lines over
# pipes. Not multiprocessing: spawn and forkserver run the caller's script again, a second training
# run if it has no __main__ guard, and fork in a process with CUDA and threads is no option. Not
# pickle: the other end has read model output.


def _confine() -> None:
    """From here on this process may compute and read, but not write files, reach a network or start
    programs.

    Seatbelts, not a sandbox: the hook refuses what Python code asks for, and machine code that has
    broken out of Python does not ask. The kernel itself refuses file contents (the limit) and,
    where it grants an empty network, every address.
    """
    # pipes are no files: replies get through
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    # Linux only: CLONE_NEWNET, and with CLONE_NEWUSER before it for all but root
    with suppress(Exception):
        ctypes.CDLL(None).unshare(0x40000000) and ctypes.CDLL(None).unshare(0x50000000)
    sys.dont_write_bytecode = True

    def refuse(event: str, args: tuple) -> None:
        writes = event == "open" and (args[2] or 0) & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        )
        family = event.partition(".")[0] in (
            "os",
            "socket",
            "subprocess",
            "shutil",
            "ctypes",
            "pty",
            "fcntl",
            "syslog",
        )
        # what imports need
        if (
            writes
            or family
            and event not in ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
        ):
            raise PermissionError(f"a grading worker may not: {event}")

    sys.addaudithook(refuse)  # cannot be taken off again


def _grading_worker(seconds: int) -> None:
    """A worker: [[gold, answer], ...] a line in, {"correct": ..., "error": ...} a line out, until
    its input ends."""
    # A stray print of sympy's must not pass for a verdict: put the real pipes aside, and /dev/null
    # in their place.
    requests, replies, nowhere = os.fdopen(os.dup(0)), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    with suppress(ValueError, OSError):  # macOS refuses; the time limit still holds
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import N

    # Not the default extractors: one hands text to sympy's parse_expr, which calls eval. Not its
    # units: it takes the variables c, d, g, h, l, m, o, s and t for units and drops them. No
    # fallback to strings: a text that does not parse must equal nothing. No timeouts of its own:
    # they are lost at times, and they would take over our alarm.
    normal = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    extractors = [LatexExtractionConfig(normalization_config=normal)]

    def read(text: str) -> list:  # boxed, for bare LaTeX parses to nothing
        return parse(
            "\\boxed{" + text + "}", extractors, fallback_mode="no_fallback", parsing_timeout=None
        )

    def equal(gold_text: str, answer_text: str) -> bool:
        gold, answer = read(gold_text), read(answer_text)
        if not verify(
            gold, answer, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True
        ):
            return False
        # It compares numbers to absolute 1e-15 (decimals 1e-6), so that 2^{-99} equals 2^{-98}. Ask
        # for relative 1e-6.
        numbers = getattr(gold[0], "is_number", False) and getattr(answer[0], "is_number", False)
        return not numbers or bool(abs(N(gold[0] - answer[0])) <= 1e-6 * abs(N(gold[0])) + 1e-60)

    _confine()
    os.write(replies, b"ready\n")
    os.dup2(nowhere, 2)  # not earlier: the parent's terminal should show why an import fails
    for line in requests:
        # The alarm's default action is that the kernel ends this process: sympy can neither delay
        # nor swallow it, and half-written caches go with it. The parent recognises the exit code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        reply = {"correct": False, "error": ""}
        for gold, answer in json.loads(line):
            try:
                if equal(gold, answer):
                    reply = {"correct": True, "error": ""}
                    break
            except Exception:
                reply["error"] = "error"
        # Sympy swallows MemoryError, so a worker that has leaked its memory away would quietly call
        # everything wrong.
        mmap.mmap(-1, MEMORY // 8).close()  # it dies here instead, which is reported
        signal.alarm(0)
        os.write(replies, json.dumps(reply).encode() + b"\n")


class Grader:
    """A pool of workers, started when first needed. The hang or death of one costs its own item and
    no other."""

    def __init__(self, workers: int = 2, timeout: int = 3):
        # whole seconds, for all golds of an item together
        self.size, self.timeout = workers, timeout
        self._reset()
        # parent and child must not write to the same workers
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._idle: LifoQueue[Any] = LifoQueue()  # last in, first out: prefer workers that run
        for _ in range(self.size):
            self._idle.put(None)  # None: a worker that is yet to be started

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; later calls would start new ones. (If this process dies, they end with
        their input.)"""
        for worker in [self._idle.get() for _ in range(self.size)]:
            _end(worker)
            self._idle.put(None)

    def grade_many(self, items: list[tuple[str, list[str]]]) -> list[Verdict]:
        """Verdicts on (response, answers) pairs, in order."""
        verdicts, questions = [], {}
        for index, (response, answers) in enumerate(items):
            # The training file has a string where the evaluation files have a list, and the
            # characters of "15" as golds would reward 1 and 5.
            answers = [answers] if isinstance(answers, str) else answers
            box = last_box(response)
            decided = [] if box is None else [_decide(box, gold) for gold in answers]
            verdicts.append(Verdict(correct=True in decided, boxed=box is not None))
            pairs = [pair for pair in decided if isinstance(pair, tuple)]
            if pairs and not verdicts[-1].correct:
                questions[index] = json.dumps(pairs).encode() + b"\n"
        if questions:  # one thread a worker does nothing but wait for it
            pool = ThreadPoolExecutor(self.size)
            try:
                for index, reply in zip(questions, pool.map(self._ask, questions.values())):
                    verdicts[index].correct, verdicts[index].error = (
                        reply["correct"],
                        reply["error"],
                    )
            finally:  # after Ctrl-C do not work through the rest
                pool.shutdown(cancel_futures=True)
        return verdicts

    def _ask(self, question: bytes) -> dict:
        worker: Any = self._idle.get()
        try:
            # it died while idle, which says nothing about this question
            if worker and worker.poll() is not None:
                _end(worker)
                worker = None
            worker = worker or self._start()
            # it died just now: the read below finds the end of the file
            with suppress(BrokenPipeError):
                worker.stdin.write(question)
            in_time = wait([worker.stdout], self.timeout + KILL_GRACE)
            # A reply is one small write, which a pipe never splits, and there is never a second
            # one.
            if reply := os.read(worker.stdout.fileno(), 4096) if in_time else b"":
                return json.loads(reply)
            _end(worker)
            timeout, worker = not in_time or worker.returncode == -signal.SIGALRM, None
            return {"correct": False, "error": "timeout" if timeout else "died"}
        finally:
            self._idle.put(worker)

    def _start(self) -> subprocess.Popen:
        # No gmpy2: its calls are long and deaf to signals. -P: our modules must not shadow a
        # library's. A session of its own: Ctrl-C in the terminal is for the training loop, not for
        # its workers.
        env = os.environ | {
            "SYMPY_GROUND_TYPES": "python",
            "MPMATH_NOGMPY": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-P",
            os.path.abspath(__file__),
            "--grading-worker",
            str(self.timeout),
        ]
        for _ in range(3):
            worker: Any = subprocess.Popen(
                command,
                env=env,
                start_new_session=True,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            # it says "ready"
            if wait([worker.stdout], START_LIMIT) and os.read(worker.stdout.fileno(), 4096):
                return worker
            _end(worker)
        # A broken installation must not pass for a policy that is always wrong.
        raise RuntimeError(
            "grading workers do not start; is math-verify installed? See the error output"
        )


def _end(worker: subprocess.Popen | None) -> None:
    if worker:
        with worker:  # leaving the block closes the pipes and collects the exit code
            worker.kill()


_GRADER = Grader(workers=1)  # nothing runs before grade() meets an answer that needs it
atexit.register(_GRADER.close)


def grade(response: str, answers: list[str]) -> bool:
    r"""Does the response's final answer equal any of the answers? grade(r"So \boxed{\frac12}",
    ["0.5"]) -> True."""
    return _GRADER.grade_many([(response, answers)])[0].correct


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grading-worker"]:
        _grading_worker(int(sys.argv[2]))
