r"""grading.py: is this response's final answer right? Rewriting first, then math-verify.

math-verify runs in worker processes: sympy sometimes hangs, and only a process can be stopped.

Grading is the reward: if the grader accepts something wrong, the policy learns to write it.

1. Only the last closed \boxed{...} after the last </think> counts. No box: wrong.
2. There may be several gold answers; matching any of them is enough. An empty one matches nothing.
3. Both sides are rewritten: DRESS (different spellings of the same thing in LaTeX and by models),
   units, a name in front ("x =", "m+n ="). Equal strings and equal plain numbers are correct.
4. What math-verify would accept wrongly is refused: VETOES ((1,2) for {1,2}), opposite words (west
   for east), and every value of a chain must be right (205=204 is not 204).
5. math-verify (sympy) decides the rest, in a worker process. If the worker needs more than 3
   seconds, dies or raises, the answer counts as wrong, and the verdict says why: training logs it.

String rules say "correct". They say "wrong" only for item 4, other units ("strict"), no box, an
over-long box, an empty gold, or two plain numbers that differ. Most answers of a training run are
plain numbers. docs/grading.md lists what is ignored, and how many errors remain.

Left out, on purpose: answers outside the box, an OR of several graders (their false positives add
up), partial credit, and sympy in this process (it can hang or fill the memory, and its plain-text
parser calls eval).

    python -m pytest tests/runtime/test_grading.py
"""

# Only the standard library: a grading worker runs this file as a script, so an import of torch here
# would cost every worker seconds and memory.
import atexit
import ctypes
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from multiprocessing.connection import wait  # a select() that also works above descriptor 1024
from queue import LifoQueue
from typing import Any

try:
    import resource
except ImportError:
    raise SystemExit("grading needs Linux or macOS: on Windows, use WSL") from None

MAX_ANSWER = 300  # characters, or twice the gold's: a longer box is wrong (and never shortened)
MAX_GOLD = 1000  # characters; a longer gold (real ones have up to 200) only equals itself
MEMORY = 2 << 30  # bytes of address space for a worker; importing sympy takes about 0.1 GB
START_LIMIT = 120.0  # seconds for that import: 1 on an idle machine, more on an overloaded one
KILL_GRACE = 4.0  # seconds between a worker's own alarm and the kill from outside


@dataclass
class Verdict:
    correct: bool
    boxed: bool  # was there a closed box? If all rewards are zero, look at this rate first
    error: str = ""  # "", "timeout", "died" or "error"; with an error, correct is False


# --- Reading an answer: only string operations, microseconds, no worker --------------------------


def last_box(response: str) -> str | None:
    r"""The content of the last closed box after the last </think>: r"\boxed{3} \boxed{4" -> "3"."""
    text = response.rpartition("</think>")[2]
    # One pass with a stack of open braces. A search for the end of each \boxed{ would be quadratic,
    # and a collapsed policy does write thousands. An escaped brace, as in \{1,2\}, is text.
    open_braces: list[int] = []
    content = None
    for token in re.finditer(r"(\\{1,2}(?:boxed|fbox)\s*\{)|\\.|[{}]", text, re.DOTALL):
        if token[1] or token[0] == "{":
            open_braces.append(token.end() if token[1] else 0)  # 0: an ordinary brace
        elif token[0] == "}" and open_braces and (start := open_braces.pop()):
            content = text[start : token.start()]  # of nested boxes the outer one closes last
    return content


# Characters that models write. NFKC normalises the rest: full-width digits, thin spaces. Zero-width
# characters and NUL are invisible, so they have no meaning.
_SIGNS = str.maketrans({
    **dict.fromkeys("−–—‐‑", "-"), **dict.fromkeys("·⋅∙", r"\cdot "), "×": r"\times ",
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "…": r"\ldots ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∖": r"\setminus ", "⁄": "/",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ",
    "ω": r"\omega ", "φ": r"\phi ", **dict.fromkeys("μµ", r"\mu "), "。": ".",
    **dict.fromkeys("°º", r"^\circ "), **dict.fromkeys("Ω\u2126", r"\Omega "),
    **dict.fromkeys("Å\u212b", r"\AA "), **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\0", ""),
})  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")
# Commands with the same meaning as another one, or that only change the look.
_SAME = {
    "": "left right big Big bigl bigr Bigl Bigr displaystyle textstyle limits hfill large Large"
        " therefore Rightarrow implies",
    r"\frac": "dfrac tfrac cfrac nicefrac sfrac", r"\binom": "dbinom tbinom",
    r"\text": "textbf textit textrm textsf mathrm mathit mathsf mbox operatorname rm bf",
    "|": "vert lvert rvert mid", "(": "langle", ")": "rangle", r"\{": "lbrace", r"\}": "rbrace",
    r"\le": "leq leqslant", r"\ge": "geq geqslant", r"\ne": "neq", "<": "lt", ">": "gt",
    "'": "prime", r"\emptyset": "varnothing", r"^\circ": "degree", r"\log_{10}": "lg",
    r"\tan": "tg",
}  # fmt: skip
_COMMANDS = {name: same for same, names in _SAME.items() for name in names.split()}
_END = r"(?![A-Za-z])"  # of a command's name
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)}){_END} ?")
_GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*+\})*+\})*+)\}"  # three levels deep
_TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*+\}"
_FUNCTION = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_COMPARE = rf"(?:\\(?:[lg]e|ne){_END}|[<>]=?)"
_SMALL = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
_BIG = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
        "trillion": "10^{12}", "dozen": "12"}  # fmt: skip


def _big(match: re.Match) -> str:
    return rf"\times {_BIG[match[2].lower()]}" + (rf"\text{{{match[3]}}}" if match[3] else "")


def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} is (16 - 1)/90."""
    whole, start, cycle = match[1], match[2], match[3] or match[4]
    fraction = int(whole + start + cycle) - int(whole + start)
    return rf"\frac{{{fraction}}}{{{'9' * len(cycle) + '0' * len(start)}}}"


def _joined(match: re.Match) -> str:
    if not re.search(_COMPARE, match.string):
        return ", "
    return r" \cap " if "and" in match[0] else r" \cup "


# Rewriting rules: pattern, replacement, then "answer ~ gold" pairs that the row makes equal (a test
# removes each row and checks that its pairs fail). Rows are applied in this order.
DRESS: list[tuple] = [
    # LaTeX
    (r"\\\\ ?\[[0-9.]+ ?[a-z]{2}\]", r"\\\\ ",
     r"\begin{pmatrix} a \\[2pt] b \end{pmatrix} ~ \begin{pmatrix} a \\ b \end{pmatrix}"),
    (r"\\!\s*|(?<!\\)\\[()\[\]]|\\?\$", "", r"11,\! 222 ~ 11222", r"\(5a\) ~ 5a"),
    (r"^[*`\"]+|[*`\"]+$", "", "**7a** ~ 7a"),
    (r"\\(?:text)?color(?:box)? ?(?:\[\w*\])?\{[\w!]*\}", "", r"\color{red}{5a} ~ 5a"),
    (rf"\\(?:boxed|f(?:rame)?box|mathbf|boldsymbol|bm|underline|emph) ?{_GROUP}", r"\1",
     r"\mathbf{\frac{a}{2}} ~ \frac{a}{2}"),
    (r"(\\(?:frac|sqrt|binom|text|overline|mathbb)|\}) +(?=\{)", r"\1",
     r"\frac {40}7 ~ \frac{40}{7}"),
    (rf"(?<![A-Za-z}}])\{{([^{{}}]*)\\choose{_END}([^{{}}]*)\}}", r"\\binom{\1}{\2}",
     r"{n \choose a} ~ \binom{n}{a}"),
    (rf"(?<![\w^\]}}\\]) ?{_GROUP}", r" \1 ", "{x = 5a} ~ 5a"),
    (r"\\text\{((?:[^A-Za-z{}\\]|\\[A-Za-z]+|\\[^A-Za-z])*+| ?[ei] ?)\}", r" \1 ",
     r"3\mathrm{i} ~ \sqrt{-9}"),
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|\\hspace\{[^{}]*\}|~|\s)+", " ",
     r"12\;345 ~ 12345", r"5\ \mathrm{cm} ~ 5"),
    (r"(?<=[0-9]) ?\{([,:])\} ?(?=[0-9])", r"\1", "1{,}234a ~ 1234a"),
    (r"\^ ?\{ ?('[' ]*)\}|\^ ?(')", r"\1\2", r"a^{\prime} ~ a'"),
    # plain text for LaTeX
    (rf"(\\text\{{ ?)?(?<![A-Za-z\\])({_FUNCTION}|sqrt|pi|theta|infty){_END}(?(1) ?\}})",
     r"\\\2 ", r"pi/3 ~ \frac{\pi}{3}", r"\operatorname{arctan} a ~ \arctan a"),
    (r"√ ?([0-9]+|[A-Za-z])", r"\\sqrt{\1}", r"2√35 ~ 2\sqrt{35}"),
    (r"(?:√|\\sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}", r"√(6) ~ \sqrt{6}"),
    (r"(?i)(?<![\\a-z])(?:positive )?infinity(?![a-z])", r"\\infty ", r"\text{infinity} ~ \infty"),
    (r"(?i)(?:\\text\{ ?)?all real(?: number)?s ?\}?", r"\\mathbb{R}",
     r"\text{all real numbers} ~ \mathbb{R}"),
    (r"(?<=[\])}]) ?(?:-|\\backslash) ?(?=\\\{)", r"\\setminus ",
     r"\mathbb{R} - \{2\} ~ \mathbb{R} \setminus \{2\}"),
    (r"(?<=[\])}]) ?U ?(?=[(\[\\])", r"\\cup ", r"[0,1) U (2,3] ~ [0,1) \cup (2,3]"),
    (r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", r"\\times ", "8.7 x 10^8 ~ 870000000"),
    (r"\^ ?(-[0-9]+)", r"^{\1}", "x^-1 ~ x^{-1}"),
    (rf"\\(frac|sqrt) ?([0-9]|(?<= )[A-Za-z]|\\pi{_END})", r"\\\1{\2}",
     r"\frac\pi2 ~ \frac{\pi}{2}"),
    (r"(\\(?:sin|cos|tan|cot|sec|csc) ?\(?) ?([0-9.]+) ?\^ ?\{? ?\\circ ?\}?",
     r"\1\\frac{\2\\pi}{180}", r"\sin 30^\circ ~ \frac{1}{2}"),
    # words
    (r"\\text\{ ?([-+]?[0-9][0-9.,]*) ?", r"\1 \\text{", r"\text{12 cm} ~ 12"),
    (r"\\text\{([^{}=]*)=([^{}]*)\}", r"\\text{\1}=\2", r"\text{Area = 12} ~ 12"),
    (r"(?i)\b([ap])\. ?m\b\.?", r"\1m", "9 a.m. ~ 9 am"),
    (rf"(?i)(?<=[0-9]) ?(\\text\{{)? ?({'|'.join(_BIG)})s?\b ?(?(1)([^{{}}]*)\}}|)", _big,
     r"2 \text{ million dollars} ~ 2000000", "3 dozen ~ 36"),
    (rf"(?i)^(?:\\text\{{)? ?({_SMALL}) ?\}}?$",
     lambda match: str(_SMALL.split("|").index(match[1].lower())), r"\text{Seven} ~ 7"),
    (r"(?i)^(?:\\text\{)? ?(?:[a-z ]{0,20}answer(?: is)?:?|[a-z][a-z ]{3,}(?:\b(?:is|equals)\b|:)"
     r"(?= ?\}? ?[-\\(\[0-9*])) ?\}? ?(?=\S)", "", r"\text{The answer is } 5 ~ 5",
     r"\text{The area is } 12 ~ 12"),
    (r"(?i)^(?:\\text\{)? ?(?:negative|minus) ?\}? ?(?=[0-9])", "-", r"\text{negative } 5 ~ -5"),
    (r"(?i)^(?:\\approx|\\sim|(?:\\text\{)? ?(?:approximately|approx\.|about) ?\}?|=) ?", "",
     r"\approx 3.14 ~ 3.14", r"\text{about } 12 ~ 12"),
    (r" ?,? ?(?:\\text\{ ?,? ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)\b(?! more| less)|\\lor) ?",
     _joined,
     "17, 45, and 80 ~ 17, 45, 80", r"x<-2 \text{ or } x>3 ~ (-\infty,-2) \cup (3,\infty)"),
    (r"(?<=[0-9])(?:\^ ?\{? ?(?:\\text\{)?| ?\\text\{)? ?(?:st|nd|rd|th) ?\}?\}?(?=$| )", "",
     r"17^{\text{th}} ~ 17", "21st ~ 21"),
    (r"[,;]? ?(?:\\text\{[^{}]*\}|where|for)? ?\b[a-z] ?\\in ?\\mathbb\{?[ZN]\}?$"
     r"|^[a-z] ?\\in ?\\mathbb\{?R\}? ?[,;] ?", "",
     r"\frac{\pi}{3}+k\pi, k \in \mathbb{Z} ~ \frac{\pi}{3}+\pi k"),
    # numbers
    (r"\b([0-9]{1,9})\.([0-9]{0,9})\\(?:overline|bar|dot) ?\{?([0-9]{1,9})\}?()", _repeating,
     r"-0.1\overline{6} ~ -\frac{1}{6}"),
    (r"\b([0-9]{1,9})\.([0-9]{0,4}?)([0-9]{1,6}?)\3{2,}()(?:\\[lc]?dots|\.{3})", _repeating,
     r"0.333... ~ \frac{1}{3}"),
    (r"(?<![0-9.,(])([0-9]{1,3}(?:[ ,][0-9]{3})+)(?![0-9]|,[^ ]| [0-9])",
     lambda match: re.sub("[ ,]", "", match[1]), r"1,234\text{ cm} ~ 1234", "1 234 ~ 1234"),
    (r"(?:^|(?<==)) ?([^:=\\]+):([^:=\\]+):([^:=\\]+)$", r"(\\frac{\2}{\1},\\frac{\3}{\1})",
     "2:4:8 ~ 1:2:4"),
    (r"\\pmod ?(\w)(?!\w)|\( ?(?:\\mod|\\text\{ ?mod ?\}|mod) ?(\w+) ?\)", r"\\pmod{\1\2}",
     r"x = 3 (\text{mod } 4) ~ x = 3 \pmod{4}"),
    (r"^\(([0-9A-F]+)\)_", r"\1_", "(52)_8 ~ 52_8"),
    (r"(?<=[0-9])_ ?\{?(?:\\text\{|\() ?(?:base )?([0-9]+) ?[})]\}?|"
     r" ?(?:\\text\{)? ?\(?(?:in )?base (\w+)\)? ?\}?$", r"_{\1\2}", r"52 \text{ (base 8)} ~ 52_8"),
    (r"(?: ?[,;:]| ?(?<!\.)\.)+ ?$", "", "12, ~ 12", "7a. ~ 7a"),
]  # fmt: skip
_ROWS = [(re.compile(pattern), replacement) for pattern, replacement, *_ in DRESS]


def _clean(text: str) -> str:
    """Remove what has no meaning. The result is still LaTeX; workers get it in this form."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀-₉]+", lambda m: f"_{{{m[0].translate(_RAISED)}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    if r"\begin" not in text:  # there "\\" ends a row; elsewhere it is a doubled backslash
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    for _ in range(4):  # rules may apply to results of others: repeat until nothing changes
        before, text = text, _COMMAND.sub(lambda match: _COMMANDS[match[1]], text)
        for pattern, replacement in _ROWS:
            text = pattern.sub(replacement, text).strip()
        if text == before:
            break
    return text


def _key(text: str) -> str:
    """The string that is compared: a text without differences that do not matter in LaTeX."""
    text = re.sub(rf"\\text ?{_GROUP}", r"\1", text)
    text = re.sub(r"([_^]) *\{ *([0-9A-Za-z]) *\}", r"\1\2", text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)  # not in "1 2", which is not 12
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # choice (C) is C


def _number(text: str) -> Fraction | None:
    """The value of a plain number, else None. Sizes are bounded: 1e999999999 would fill memory."""
    text = re.sub(r"^([+-]?)10\^", r"\g<1>1\\times10^", _key(text)) if len(text) <= 100 else ""
    decimal = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))"
    power = r"(?:(?:[eE]|(?:\\times|\\cdot|\*)10\^)\{?([+-]?[0-9]{1,4})\}?)?"
    if match := re.fullmatch(decimal + power, text):
        return Fraction(f"{match[1]}e{match[2] or 0}")
    fraction = r"(?:\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\}|([0-9]+)/([0-9]+))"
    match = re.fullmatch(r"([+-]?)([0-9]+(?= |\\))? ?" + fraction, text)  # 1\frac{1}{2}, 1 1/2
    if match and (bottom := int(match[4] or match[6])):
        value = int(match[2] or 0) + Fraction(int(match[3] or match[5]), bottom)
        return -value if match[1] == "-" else value
    return None


# --- Units, names, lists --------------------------------------------------------------------------

# Spellings of units for units="strict". The longer ones count without \text, too.
_UNITS = {
    "m": "meter metre", "g": "gram", "s": "second sec", "L": "liter litre l", "N": "newton",
    "J": "joule", "W": "watt", "V": "volt", "A": "ampere amp", "K": "kelvin", "Hz": "hertz",
    "Pa": "pascal", "mol": "mole", "h": "hour hr", "min": "minute", "day": "", "week": "",
    "year": "yr", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "lb": "pound",
    "rad": "radian", "degree": "deg circ", "percent": "%", "dollar": "usd $", "cent": "",
    "euro": "€", "mph": "", "unit": "",
}  # fmt: skip
_SPELLED = {word: unit for unit, words in _UNITS.items() for word in [unit, *words.split()]}
_SPELLED |= {
    prefix + word: prefix[0] + unit
    for prefix in ("kilo", "centi", "milli")
    for word, unit in _SPELLED.items()
    if len(word) > 3
}
_BARE = "|".join(
    [*sorted((word for word in _SPELLED if len(word) > 2), reverse=True), "[kcmn]m|kg|ft|mi|lb"]
    + ["k[NJWVg]|[kMG]?Hz|[kMG]?eV"]
)
_ATOM = (
    rf"(?:{_TEXT}(?:_\{{?\\(?:odot|oplus)\}}?)?|[A-Z]_\{{?\\(?:odot|oplus)\}}?|\\Omega{_END}"
    rf"|\\mu(?= ?\\text)|\\AA{_END}|\^ ?\{{? ?\\circ ?\}}? ?(?:[CF]\b)?|\\?%|[€£¥₹¢]"
    rf"|(?<=[0-9 /])(?:{_BARE})s?\b|(?<=[0-9 ])m(?=/s)|(?<=/)[sh]\b|(?<= )[A-Za-z]{{4,}}\b(?!\())"
    r"(?: ?\^ ?(?:\{? ?-?[0-9] ?\}?))?"
)
_UNIT = re.compile(
    rf"(?<=[^\s,;(\[=]) ?(?:\\frac\{{{_TEXT}\}}\{{{_TEXT}\}}"
    rf"|{_ATOM}(?: ?(?:/|\\cdot|\\times)? ?{_ATOM})*+) ?(?=$|[,;)\]=]|\\\}})"
)
# Words that mean more than a unit: "5 or more" is not 5.
_MEANING = (
    "and or not no is are if for when where than at least most more less fewer between from to all"
    " every any with such only except factorial times plus minus mod modulo root half base even odd"
    " over under above below prime tenths hundredths thirds quarters fourths fifths halves"
)


def _split_units(text: str) -> tuple[str, str]:
    r"""The value and its units: r"25 \text{ cm}^2" -> ("25", r"\text{ cm}^2")."""
    units = []

    def take(match: re.Match) -> str:
        words = set(re.findall("[a-z]+", match[0].replace(r"\text", "").lower()))
        inside = re.sub(
            r"\^ ?\{?-?[0-9]\}?|(?<=[a-z])[0-9]", "", "".join(re.findall(_TEXT, match[0]))
        )
        if (
            words & set(_MEANING.split())
            or re.search("[0-9=<>,;]", inside)
            or words in ({"squared"}, {"cubed"})
        ):
            return match[0]
        units.append(match[0])
        return ""

    if currency := re.match(
        r"\\pounds ?|[€£¥₹] ?|(?:\\text\{)? ?(?:USD|Rs\.?) ?\}? ?(?=[0-9])", text
    ):
        units.append(currency[0])
        text = text[currency.end() :]
    return _UNIT.sub(take, text).strip(), " ".join(units)


_SYMBOL = (  # x, x_1, \theta', f(2), f^{-1}(x), P(A \cap B)
    rf"(?!\\(?:pi|frac|sqrt|infty|text|in|{_FUNCTION}){_END}|[ei]$)(?:\\[A-Za-z]+|[A-Za-z])'* ?"
    r"(?:_ ?(?:\w|\\[A-Za-z]+|\{[^{}]*\}) ?)?(?:\^ ?(?:\*|\{-1\}) ?)?(?:\([^()]*\))?"
)
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|psi|omega"


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside of all brackets. In (0,1] the bracket is closed, too."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"\\[{{}}]|[()\[\]{{}}]|({separator})", text):
        if token[1] is None:
            depth += 1 if token[0][-1] in "([{" else -1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def _symbols(text: str) -> set[str]:
    """The letters that are variables."""
    text = re.sub(rf"{_TEXT}|\\(?!(?:{_GREEK}){_END})[A-Za-z]+", " ", text)
    return set(re.findall(r"\\[A-Za-z]+|[A-Za-z]", text)) - {"e", "i"}


def _is_name(name: str, value: str) -> bool:
    """Does "name = value" say what a quantity is (m+n = 73, |z| = 5), or is it an equation?"""
    if re.fullmatch(
        rf"{_SYMBOL}|.*\\text.*|[A-Z][a-z]{{2,}}.*|\\frac\{{ ?d ?\w\}}\{{ ?d ?\w\}}", name
    ):
        return True
    symbols = _symbols(name)
    if not symbols or symbols & _symbols(value) or "'" in name:
        return False
    bare = re.sub(r"_ ?(?:\w|\{[^{}]*\})|\([^()]*\)", "", name)
    added = re.search(r"(?:^|[-+]) ?[0-9.]+ ?(?:$|[-+])", bare)
    if re.search("[+-]", name) and (value == "0" or added):
        return False  # x+5 = 12 is not solved yet, and any equation can end with = 0
    return (
        len(symbols) > 1
        or not re.search("[0-9]", bare)
        or bool(re.search(rf"\||{_FUNCTION}", name))
    )


def _both_signs(text: str) -> str:
    r"""r"1 \pm 2, 5" -> "1 + 2, 1 - 2, 5"."""
    if r"\pm" not in text:
        return text
    items: list[str] = []
    for item in _split(re.sub(r"^\\\{(.*)\\\}$", r"\1", text), ","):
        plus = item.replace(r"\pm", "+").replace(r"\mp", "-")
        items += dict.fromkeys([plus, item.replace(r"\pm", "-").replace(r"\mp", "+")])
    return ", ".join(items)


@dataclass
class _Reading:
    """The parts of an answer. "x = 2^2 = 4 cm": name "x", values ["2^2", "4"], units "cm"."""

    name: str
    values: list[str]  # all must be right: "205=204" is not 204
    units: str
    modulus: str
    equation: str  # everything but units, to compare equations that are not "name = value"


def _read(text: str) -> _Reading:
    text, units = _split_units(text)
    text, _, modulus = re.sub(r" ?\(?(\\pmod\{[^{}]*\})\)?$", r"\0\1", text).partition("\0")
    builder = rf"^\\\{{ ?{_SYMBOL} ?(?:\\in ?\\mathbb\{{R\}} ?)?[|:,](.*{_COMPARE}.*)\\\}}$"
    text = re.sub(builder, r"\1", text).strip()
    name = ""
    if not re.search(_COMPARE, text):
        chain = _split(text, rf"=|\\in{_END}")
        items = [_split(item, "=") for item in _split(text, "[,;]")]
        named = [item for item in items if len(item) == 2 and re.fullmatch(_SYMBOL, item[0])]
        if len(items) > 1 and named and items[0] is named[0] and max(map(len, items)) == 2:
            if len({item[0].partition("_")[0] for item in named}) == 1:  # x=1, x=2
                name, chain = items[0][0], ["", ", ".join(item[-1] for item in items)]
            elif len(named) == len(items):  # x=2, y=-1 is the point (2,-1)
                named.sort(key=lambda item: item[0].strip("\\"))
                name = ",".join(item[0] for item in named)
                chain = ["", f"({','.join(item[1] for item in named)})"]
        elif len(chain) > 1:
            if _symbols(chain[-1]) and not re.search("[A-Za-z]", chain[0]):
                chain.reverse()  # 3 = x
            name = re.sub(r"^\((.*)\)$", r"\1", chain[0])
        values = [_both_signs(value) for value in (chain[1:] if name else chain)]
        return _Reading(name, values, units, modulus, text)
    return _Reading("", [text], units, modulus, text)


# --- The verdict ----------------------------------------------------------------------------------

_OPPOSITES = [set(words.split()) for words in (
    "even odd", "east west north south", "am pm", "left right", "up down", "increase decrease",
    "clockwise counterclockwise anticlockwise", "profit loss", "gain loss", "above below",
    "before after", "positive negative", "prime composite", "increasing decreasing", "more less",
    "red blue green",
    "january february march april may june july august september october november december",
)]  # fmt: skip


def _words(text: str) -> list[str]:
    text = re.sub(r"\\(?!text)[A-Za-z]+", " ", text).replace(r"\text", " ")
    return re.findall(r"(?!(?:the|an|of)\b|a [a-z]{2})\b(?:[a-z]+|[0-9]+)", text.lower())


def _brackets(text: str) -> str:
    r"""The outer brackets of a list or pair, or "" if it is not wholly in brackets."""
    match = re.fullmatch(r"(\\\{|[(\[]).*,.*(\\\}|[)\]])", text)
    return match[1] + match[2] if match and len(_split(text, ",")) == 1 else ""


def _count(text: str) -> int:
    inside = re.sub(r"^(?:\\\{|\()|(?:\\\}|\))$", "", text) if _brackets(text) else text
    return len(_split(inside, "[,;]"))


_SKIPPED = r"[0-9]_|\\[lc]?dots|\.\.\."  # a numeral in a base, an ellipsis
_REPEATED = rf"\\(?:sum|prod|int|lim){_END}"
_SET = rf"\\(?:c[au]p|setminus|mathbb|emptyset){_END}|{_COMPARE}"
# Cases that math-verify would wrongly accept: (gold, answer) -> "this is not the gold". Each has
# "answer ~ gold" pairs that only this rule refuses.
VETOES: list[tuple] = [
    (lambda g, a: re.search(_SKIPPED, g + a), "2516_7 ~ 2516_8"),
    (lambda g, a: re.search(_REPEATED, a) and not re.search(_REPEATED, g),  # of the question
     r"\int_0^1 2x dx ~ 1"),
    (lambda g, a: (":" in g) != (":" in a) and re.search("[0-9]{2} ?:|: ?[0-9]{2}", f"{g} {a}"),
     "10:30 ~ 1/3"),
    (lambda g, a: ("=" in g) != ("=" in a), "x^2-4=0 ~ 0"),
    (lambda g, a: {_brackets(g)[:1], _brackets(a)[:1]} in ({"\\", "("}, {"\\", "["}),
     r"(1,2) ~ \{1,2\}"),
    (lambda g, a: not re.search(_SET, g + a) and _count(g) != _count(a), "1,1,2 ~ 1,2"),
    (lambda g, a: re.fullmatch(rf"[A-Za-z]{{3,}}(?: [A-Za-z]+)*|[A-Z]{{2,}}|{_TEXT}", g),
     "BAC ~ CAB"),
]  # fmt: skip


def _unit(raw: str, units: str) -> list[tuple[str, int]]:
    r"""r"\text{ meters per second}^2" -> [("m", 1), ("s", -2)]."""
    units = (r"\$ " if r"\$" in raw else "") + units.replace(r"\text", " ")
    units = re.sub(r"\bper\b|\\frac\{(.*)\}\{", r"\1/", units)
    units = re.sub(r"\bsq(?:uare|\.)? (\w+)|(\w+) squared", r"\1\2^2", units)
    units = re.sub(r"\bcubic (\w+)|(\w+) cubed", r"\1\2^3", units)
    powers: dict[str, int] = {}
    sign = 1
    for token in re.finditer(r"(/)|(\$|%|€|[A-Za-z]+)[ })]*(?:\^?[ {]*(-?[0-9]))?", units):
        if token[1]:
            sign = -1
            continue
        word = token[2] if token[2] in _SPELLED else token[2].lower().rstrip("s")
        word = _SPELLED.get(word, word)
        powers[word] = powers.get(word, 0) + sign * int(token[3] or 1)
    return sorted((word, power) for word, power in powers.items() if word not in ("unit", "cdot"))


def _align(answer: _Reading, gold: _Reading) -> None:
    """If the names do not match, values alone say nothing: compare whole equations."""
    if gold.name and answer.name:
        if gold.name != answer.name and r"\text" not in gold.name + answer.name:
            gold.values, answer.values = [gold.equation], [answer.equation]
    elif answer.name and not _is_name(answer.name, answer.values[-1]):
        known = not _symbols(answer.name)  # 2^3 = 8
        answer.values = [answer.name, *answer.values] if known else [answer.equation]
    elif gold.name:
        plain = re.fullmatch(_SYMBOL, gold.name) or not re.search("[-+0-9]", gold.name)
        word = re.fullmatch("[A-Z]{2,}", gold.values[-1])
        if word or not plain or not _is_name(gold.name, gold.values[-1]):
            gold.values = [gold.equation]


def _decide(box: str, gold: str, strict: bool = False) -> bool | tuple[str, ...]:
    """The verdict for one gold, or a question to a worker: gold, and values that must equal it."""
    gold = gold.rpartition("####")[2]  # GSM8K's solutions
    if len(box) > max(MAX_ANSWER, 2 * len(gold)):
        return False
    one, two = (re.fullmatch(r"\s*(-?[0-9]{1,99})\s*", text) for text in (box, gold))
    if one and two:  # most answers of a training run: 5 us instead of 300
        return int(one[1]) == int(two[1])
    if len(gold) > MAX_GOLD:
        return box.strip() == gold.strip() != ""
    a, g = _cleaned(box), _cleaned(gold)
    if not _key(a) or not _key(g):
        return False
    answer, right = _read(a), _read(g)
    if strict and _unit(box, answer.units) != _unit(gold, right.units):
        return False
    if _key(a) == _key(g) or _key(box) == _key(gold):
        return True
    choice = re.match(r"(?:[Oo]ption|[Cc]hoice)?\(?([A-J])(?:\)|[.:]|$)(?!.*\b[A-J]\b)", _key(a))
    words = all(re.fullmatch(rf"{_TEXT}|[A-Za-z]+(?:[ '-][A-Za-z]+)*", each) for each in (a, g))
    if choice and choice[1] == _key(g) or words and _words(a) == _words(g) != []:
        return True
    found = [[words & set(_words(text)) for text in (a, g)] for words in _OPPOSITES]
    if any(x and y and x != y for x, y in [*found, (answer.modulus, right.modulus)]):
        return False
    _align(answer, right)
    return _compare(answer, right)


def _compare(answer: _Reading, gold: _Reading) -> bool | tuple[str, ...]:
    question = [gold.values[0]]
    for value in answer.values:
        x, y = _number(value), _number(question[0])
        if x is not None and y is not None:
            percent = ("%" in answer.units) - ("%" in gold.units)
            if x == y or percent and x == y * Fraction(100) ** percent:
                continue
            return False
        if _key(value) == _key(question[0]):
            continue
        if any(veto(question[0], value) for veto, *_ in VETOES):
            return False
        question.append(value)
    return tuple(question) if len(question) > 1 else True


_cleaned = lru_cache(4096)(_clean)  # a gold is compared with many responses, and many are equal


# --- math-verify in worker processes --------------------------------------------------------------
#
# Sympy can hang on hostile input, sometimes inside a C call that no Python signal handler can
# interrupt; only a process can always be stopped. Workers are plain scripts that exchange JSON
# lines over pipes. Not multiprocessing: spawn and forkserver run the caller's script again (without
# a __main__ guard, a second training run), and fork is not safe with CUDA and threads. Not pickle:
# the other end has read model output.


def _confine() -> None:
    """From here on this process may compute and read, but not write files, use a network or start
    programs.

    This is not a sandbox: the hook only sees what Python code asks for, not what machine code does
    that has broken out of Python. The kernel itself refuses to write files (the limit) and, if it
    allows an empty network, every address.
    """
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):  # pipes are not files
        resource.setrlimit(limit, (0, 0))
    with suppress(Exception):  # Linux only: CLONE_NEWNET, with CLONE_NEWUSER before it if not root
        ctypes.CDLL(None).unshare(0x40000000) and ctypes.CDLL(None).unshare(0x50000000)
    sys.dont_write_bytecode = True
    families = ("os", "socket", "subprocess", "shutil", "ctypes", "pty", "fcntl", "syslog")
    imports_need = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")

    def refuse(event: str, args: tuple) -> None:
        changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        writes = event == "open" and (args[2] or 0) & changes
        if writes or event.partition(".")[0] in families and event not in imports_need:
            raise PermissionError(f"a grading worker may not: {event}")

    sys.addaudithook(refuse)  # cannot be removed again


def _comparison() -> Callable[[str, str], bool]:
    """Import math-verify and return "does this LaTeX equal that gold?"."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, I, Intersection, N, Symbol, Union, simplify

    # Not the default extractors: one passes text to sympy's parse_expr, which calls eval. Not its
    # units: it treats the variables c, d, g, h, l, m, o, s and t as units and drops them. No
    # fallback to strings: a text that does not parse must equal nothing. Not math-verify's
    # timeouts: they sometimes fail, and they would replace our alarm.
    normal = NormalizationConfig(True, False, malformed_operators=True, nits=True, boxed="all")
    extractors = [LatexExtractionConfig(normalization_config=normal)]

    def read(text: str) -> Any:  # in a box: bare LaTeX parses to nothing
        boxed = "\\boxed{" + text + "}"
        found = parse(boxed, extractors, fallback_mode="no_fallback", parsing_timeout=None)
        if not re.search(_COMPARE, text) or not re.search(r"\\c[au]p|,", text):
            return found[0] if found else None
        # Inequalities joined by "or", which math-verify would read as a list
        parts = [read(part) for part in re.split(r"\\c[au]p|,(?![^(\[]*[)\]])", text)]
        sets = [part.as_set() if hasattr(part, "as_set") else part for part in parts]
        return (Intersection if r"\cap" in text else Union)(*sets)

    def known(expression: Any) -> Any:
        """i becomes the imaginary unit. (In math-verify, real and complex symbols all differ.)"""
        names = expression.free_symbols
        real = {each: Symbol(each.name, real=True) for each in names if each.name != "i"}
        return expression.subs(real | dict.fromkeys(names - real.keys(), I)).doit()

    def equal(gold_text: str, answer_text: str) -> bool:
        gold, answer = read(gold_text), read(answer_text)
        if gold is None or answer is None:
            return False
        options: dict = {"timeout_seconds": None, "raise_on_error": True}
        same = verify(gold, answer, allow_set_relation_comp=True, **options)
        if not all(
            isinstance(each, Expr) and each.is_finite is not False for each in (gold, answer)
        ):
            return same
        if not same and not re.search(r"i|\\sqrt\{ ?-", gold_text + answer_text):
            return False
        gold, answer = known(gold), known(answer)
        if not gold.is_number or not answer.is_number:
            return same or simplify(gold - answer) == 0
        # math-verify's tolerance is absolute, 1e-15 (decimals 1e-6), so 2^{-99} would be 2^{-98}.
        far, size = abs(N(gold - answer)), abs(N(gold))
        return bool(far <= (1e-6 * size + 1e-60 if same else 1e-12 * min(1, size)))

    return equal


def _grading_worker(seconds: int) -> None:
    """For each line [[gold, value, ...], ...], write a line {"correct": ..., "error": ...}."""
    # Something that sympy prints must not be read as a verdict: keep the real pipes elsewhere, and
    # put /dev/null in their place.
    requests, replies, nowhere = os.fdopen(os.dup(0)), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    with suppress(ValueError, OSError):  # macOS refuses; the time limit still holds
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    equal = _comparison()
    _confine()
    os.write(replies, b"ready\n")
    os.dup2(nowhere, 2)  # only now: the terminal should show why an import fails
    for line in requests:
        # By the alarm's default action the kernel ends this process: sympy can neither delay nor
        # catch that, and half-written caches are gone. The parent recognises the exit code.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        reply = {"correct": False, "error": ""}
        for gold, *values in json.loads(line):
            try:
                if all(equal(gold, value) for value in values):
                    reply = {"correct": True, "error": ""}
                    break
            except Exception:
                reply["error"] = "error"
        # Sympy catches MemoryError, so a worker that has run out of memory would silently call
        # everything wrong. Here it dies instead, which is reported.
        mmap.mmap(-1, MEMORY // 8).close()
        signal.alarm(0)
        os.write(replies, json.dumps(reply).encode() + b"\n")


class Grader:
    """A pool of workers, started when needed. If one hangs or dies, only its item is lost.

    units: "loose" ignores them; "strict" needs the same units on both sides, if either has any.
    """

    def __init__(self, workers: int = 2, timeout: int = 3, units: str = "loose"):
        if units not in ("loose", "strict"):
            raise ValueError(f'units is {units!r}: it can be "loose" or "strict"')
        self.size, self.timeout = workers, timeout  # whole seconds, for all golds of an item
        self.strict = units == "strict"
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # never share workers

    def _reset(self) -> None:
        self._idle: LifoQueue[Any] = LifoQueue()  # last in, first out: prefer workers that run
        for _ in range(self.size):
            self._idle.put(None)  # None: a worker that has not been started

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; later calls start new ones. (They also end with this process.)"""
        for worker in [self._idle.get() for _ in range(self.size)]:
            _end(worker)
            self._idle.put(None)

    def grade_many(self, items: list[tuple[str, list[str]]]) -> list[Verdict]:
        """Verdicts on (response, answers) pairs, in order."""
        verdicts, questions = [], {}
        for index, (response, answers) in enumerate(items):
            # Training files have a string where evaluation files have a list. Read as a list, "15"
            # would accept 1 and 5.
            answers = [answers] if isinstance(answers, str) else answers
            box = last_box(response)
            decided = [] if box is None else [_decide(box, gold, self.strict) for gold in answers]
            verdicts.append(Verdict(correct=True in decided, boxed=box is not None))
            pairs = [pair for pair in decided if isinstance(pair, tuple)]
            if pairs and not verdicts[-1].correct:
                questions[index] = json.dumps(pairs).encode() + b"\n"
        if questions:  # one thread per worker, which only waits for it
            pool = ThreadPoolExecutor(self.size)
            try:
                replies = pool.map(self._ask, questions.values())
                for index, reply in zip(questions, replies, strict=True):
                    verdicts[index].correct, verdicts[index].error = (
                        reply["correct"],
                        reply["error"],
                    )
            finally:  # after Ctrl-C, drop the rest
                pool.shutdown(cancel_futures=True)
        return verdicts

    def _ask(self, question: bytes) -> dict:
        worker: Any = self._idle.get()
        try:
            if (
                worker and worker.poll() is not None
            ):  # it died while idle: not this question's fault
                _end(worker)
                worker = None
            worker = worker or self._start()
            with suppress(BrokenPipeError):  # it has just died: the read below sees it
                worker.stdin.write(question)
            in_time = wait([worker.stdout], self.timeout + KILL_GRACE)
            # A reply is one small write, which a pipe never splits. There is only one.
            if reply := os.read(worker.stdout.fileno(), 4096) if in_time else b"":
                return json.loads(reply)
            _end(worker)
            timeout, worker = not in_time or worker.returncode == -signal.SIGALRM, None
            return {"correct": False, "error": "timeout" if timeout else "died"}
        finally:
            self._idle.put(worker)

    def _start(self) -> subprocess.Popen:
        # No gmpy2: its calls can be long and ignore signals. -P: our modules must not shadow a
        # library's. A new session: Ctrl-C in the terminal is for the training loop.
        settings = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", os.path.abspath(__file__), "--grading-worker"]
        pipes: dict = {"bufsize": 0, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        for _ in range(3):
            worker: Any = subprocess.Popen(
                [*command, str(self.timeout)],
                env=os.environ | settings,
                start_new_session=True,
                **pipes,
            )
            if wait([worker.stdout], START_LIMIT) and os.read(worker.stdout.fileno(), 4096):
                return worker  # it says "ready"
            _end(worker)
        # A broken installation must not look like a policy that is always wrong.
        why = "is math-verify installed? See the error output"
        raise RuntimeError(f"grading workers do not start; {why}")


def _end(worker: subprocess.Popen | None) -> None:
    if worker:
        with worker:  # leaving the block closes the pipes and collects the exit code
            worker.kill()


_GRADERS = {units: Grader(1, units=units) for units in ("loose", "strict")}  # nothing runs yet
_GRADER = _GRADERS["loose"]
for _grader in _GRADERS.values():
    atexit.register(_grader.close)


def grade(response: str, answers: list[str], units: str = "loose") -> bool:
    r"""Is the final answer equal to any of them? grade(r"So \boxed{\frac12}", ["0.5"]) is True.

    units="strict": "5 \text{ cm}" equals neither 5 nor 5 m (see docs/grading.md).
    """
    return _GRADERS[units].grade_many([(response, answers)])[0].correct


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grading-worker"]:
        _grading_worker(int(sys.argv[2]))
