r"""leaks.py: when are two texts the same problem? For duplicates, and for "was this trained on?".

python -m pytest tests/runtime/test_leaks.py
"""

import re
import unicodedata
from collections.abc import Iterable

# Characters that people type, as LaTeX or as the sign on the keyboard.
_TYPED: dict[str, str | int | None] = {
    **dict.fromkeys("‐‑‒–—−", "-"),
    **dict.fromkeys("×⋅·∗", "*"),
    **{digit: f"^{value}" for value, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{"÷": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "√": r"\sqrt "},
    **{"π": r"\pi ", "∞": r"\infty ", "…": r"\ldots ", "°": ""},
}
# An argument without an operator: {12}, {\pi}, or one character or command without braces.
_ARGUMENT = r"\s*(?:\{([^{}+\-*/=]*)\}|(\w|\\[a-z]+))"
# In this order, on lower case. (?![a-z]) ends a command's name. Each rule was found on real files.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # layout, alignment, text in formulas
        (
            r"\\(?:left|right|big+[lrm]?|displaystyle|q?quad|text\w*|math(?:rm|bf|it)|mbox|limits)"
            r"(?![a-z])|\\(?:begin|end)\s*\{[a-z]*\*?\}|\\[,;: \[\]()\\]|[&$]",
            " ",
        ),
        # 1,000 and 1{,}000 and 1,\!000; empty groups: n^{}_{}
        (r"\\!", ""),
        (r"(?<=\d)(?:,\s?|\{,\})(?=\d{3}(?!\d))|[_^]\s*\{[\s{}_^]{0,9}\}", ""),
        # several commands for one sign
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(?:times|cdot|ast)(?![a-z])", "*"),
        (r"\\div(?![a-z])", "/"),
        (r"\\leq?(?:slant)?(?![a-z])|<=", "≤"),
        (r"\\geq?(?:slant)?(?![a-z])|>=", "≥"),
        (r"\\neq?(?![a-z])|\s!=\s", "≠"),
        (r"\\(?:[lr]?vert|mid)(?![a-z])", "|"),
        (r"\\[lc]?dots[bcmio]?(?![a-z])|\.\.\.+", r"\\ldots "),
        # degrees, and the th of 12^{\text{th}}
        (r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?|\^(?=[\s{]*(?:st|nd|rd|th)\b)", " "),
        # a simple fraction is a/b. Until the end its slash is a different sign, since it groups.
        (r"\\frac" + _ARGUMENT + _ARGUMENT, r" \1\2∕\3\4 "),
        # \sin- is not a word with a hyphen: from here on, a command also ends with a backslash
        (r"\\([a-z]+)", r"\\\1\\"),
        # hyphens, dashes and bullets in prose are not a minus, "!" after a word is not a factorial
        (r"-+", "-"),
        (
            r"-\s*(?=[a-z]{3}|(?:by|to|th|st|nd|rd)\b)|(?<=[a-z]{3})\s*-\s*(?=[a-z])"
            r"|(?:^|(?<=[.:;?]))\s*-\s|(?<=[a-z]{2})\s?!",
            " ",
        ),
        (r"(?<!\d)_", ""),  # x_1 is x1; but 10_2 is not 102
    )
]
_BRACKETS = re.compile(r"[(\[{]([^()\[\]{}]*)[)\]}]")
_WORD = re.compile(r"(?<![\\a-z])[a-z]{3,}(?![\\a-z])")


def problem_key(text: str, suffix: str) -> str:
    """Rows with the same key are the same problem: the text without instruction and layout."""
    return " ".join(text.removesuffix(suffix).split())


def leak_key(text: str, suffix: str) -> str:
    r"""The key for "does it occur in the evaluation set?": it ignores differences of typesetting.

    A false alarm costs one training problem; a miss makes the result dishonest. So only letters,
    digits, operators and brackets around an operator count. The known price: open and closed
    intervals are equal, and so are ab-cd and abcd (a hyphen or a minus?).

    >>> leak_key(r"Compute $\dfrac{1}{2} - 3 \cdot 4$.", "")
    'compute1/2-3*4'
    """
    text = problem_key(text, suffix).translate(str.maketrans(_TYPED))
    text = unicodedata.normalize("NFKC", text).lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    for _ in range(8):  # from the innermost brackets outwards; deeper ones are dropped below
        text = _BRACKETS.sub(_group, text)
    text = re.sub(r"[^\w+\-*/^=<>≤≥≠!|⟨⟩.∕]+|(?<!\d)\.|\.(?!\d)", " ", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # "3 45" is neither "34 5" nor "345"
    return re.sub(r"(?<!\d)\*+|\*+(?!\d)", "", text).replace("∕", "/")  # 2*x is 2x; *so* is so


def _group(match: re.Match) -> str:
    """Keep brackets that decide the order of operations; drop those around arguments and prose."""
    inside = match[1]
    own = re.sub(r"⟨[^⟨⟩]*⟩", "", inside)  # without the content of inner brackets
    keep = re.search(r"[-+*/]", own) and not _WORD.search(own)
    return f"⟨{inside}⟩" if keep else f" {inside} "


class Known:
    """The problems of an evaluation set, for looking up other problems."""

    def __init__(self, problems: Iterable[tuple[str, str]], suffix: str):
        """problems: (text, what to call it)."""
        self.suffix = suffix
        self.names = {leak_key(text, suffix): name for text, name in problems}
        self.digits = {digits(key) for key in self.names}

    def find(self, text: str) -> str | None:
        """The name of the problem with the same text, or None."""
        if digits(text) not in self.digits:  # a key keeps all digits; most problems need no key
            return None
        return self.names.get(leak_key(text, self.suffix))


def digits(text: str) -> str:
    return re.sub(r"\D+", "", unicodedata.normalize("NFKC", text))
