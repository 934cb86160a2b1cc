r"""test_steps.py: where a response is cut, with tokenizers of every family.

A blank line is one token for some tokenizers (Qwen: "\n\n", ".\n\n") and several for others (GPT-2:
"\n", "\n" before a word; Llama-2: <0x0A>, <0x0A>). The tokenizers are built here, each with the
rule of its family, and trained on a few lines. The second opinion is `steps_by_definition`: it
walks over the characters of the decoded text and knows neither tokens nor regular expressions.

    python -m pytest tests/test_steps.py
"""

import copy
import functools
import json
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from baselines import prl_steps
from fci import Separators, cut_at_newlines, separator_tokens, split_steps, without_answer

LINES = [
    "First we add.",
    "Then we go on:",
    "\\[ x = 2 \\]",
    "So x = 12.",
    "Ċ is Maltese, é not",
    ")",
]
CORPUS = ["\n\n".join(LINES) + "\n\n\n" + "\n".join(LINES) + "\r\n\r\n" + LINES[0] + "\n"] * 30
EOS = "<|end|>"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
BREAKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"qwen": rf"{WORDS}|\p{{N}}|{BREAKS}", "llama3": rf"{WORDS}|\p{{N}}{{1,3}}|{BREAKS}"}
FAMILIES = ["gpt2", "pythia", "llama2", "gemma", "qwen", "llama3"]


def byte_level(family: str) -> Tokenizer:
    """GPT-2's rule splits newlines from the words beside them; Qwen's and Llama-3's let
    punctuation take newlines along."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=family not in PATTERNS)
    if family in PATTERNS:
        split = Split(Regex(PATTERNS[family]), "isolated")
        bpe.pre_tokenizer = Sequence([split, bpe.pre_tokenizer])
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=ByteLevel.alphabet())
    bpe.train_from_iterator(CORPUS, trainer)
    return bpe


def byte_fallback(family: str) -> Tokenizer:
    """A space is "▁" (Llama-2 puts one before a text, and drops it), what has no token is bytes."""
    prepend, spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Sequence([prepend, spaces])
    words.train_from_iterator(CORPUS[0].split(), BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(words.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    bpe = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "llama2":
        bpe.normalizer, strip = words.normalizer, [decoders.Strip(" ", 1, 0)]
    else:
        bpe.normalizer, strip = spaces, []
    bpe.decoder = decoders.Sequence(decoder + strip)
    return bpe


@functools.cache
def tokenizer_of(family: str, think: str = "text"):
    """`think`: "</think>" is ordinary "text", an "added" token or a "special" one."""
    if family in ("llama2", "gemma"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(family), eos_token=EOS)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(family), eos_token=EOS)
    if family == "gemma":
        tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (1, 2, 3)])
    if family == "pythia":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in (4, 3, 2)])
    if think != "text":
        tokenizer.add_tokens([AddedToken("</think>", special=think == "special", normalized=False)])
    return tokenizer


@functools.cache
def table_of(family: str, think: str = "text") -> Separators:
    return separator_tokens(tokenizer_of(family, think))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def steps_of(tokenizer, tokens: list[int], bounds: list[int]) -> list[str]:
    """The text that each step adds to the text before it (some decoders drop a leading space)."""
    until = [tokenizer.decode(tokens[:b], clean_up_tokenization_spaces=False) for b in bounds]
    return [after[len(before) :] for before, after in zip(until, until[1:])]


def steps_by_definition(text: str) -> list[str]:
    """The steps of a text, where every end of a run of newlines is also the end of a token."""
    pieces = pieces_at_newlines(text, 2)
    if len(pieces) == 1 and not text.endswith(("\n\n", "\n\r\n")):
        pieces = pieces_at_newlines(text, 1)
    steps, waiting = [], ""
    for piece in pieces:
        waiting += piece
        if waiting.replace(EOS, "").strip():
            steps.append(waiting)
            waiting = ""
    if waiting and steps:
        steps[-1] += waiting
    return steps or [text] * bool(text)


def pieces_at_newlines(text: str, at_least: int) -> list[str]:
    pieces, start, i = [], 0, 0
    while i < len(text):
        newlines = 0
        while text.startswith(("\n", "\r\n"), i):
            i += 1 if text[i] == "\n" else 2
            newlines += 1
        if newlines >= at_least:
            pieces.append(text[start:i])
            start = i
        i += newlines == 0
    return pieces + [text[start:]] * (start < len(text))


# Text, and its steps by hand. "^" marks a cut; <|end|> is the end-of-sequence token.
CUTS = [
    "So we add.\n\n^Then 2 = x.\n\n\n^Done: 3",
    "So x\n\n^Then x\n\n^\\[ x = 2 \\]\n\n^)<|end|>",
    "First.\r\n\r\n^Then we go\r\n\r\n\r\n^on:",  # "\r\n" is one newline
    "First.\n\r\n^Then\r\n\n^on",
    "First\nwe\n\n^add\nThen",  # with a blank line, single newlines do not cut
    "First we\n^add:\n^Then<|end|>",  # without one, they do
    "First\r\n^we add<|end|>",
    "So x = 2.<|end|>",  # no newline: one step
    "First\n^ \nThen\n^we",  # only newlines make a blank line; yet no step is white space alone
    "\n\nFirst.\n\n^ \n\nThen.\n\n\t<|end|>",  # leading white space opens a step
    "<|end|>\n\nFirst.\n\n^Then.\n\n<|end|>",  # so does a special token; a trailing one closes
    "First\nThen\n\n",  # a blank line after all lines is one, too
    "First.\n\n^\u00a0\n\n\u3000\n\nThen.",  # white space is more than ASCII
    "\n\n \n\n<|end|>",  # nothing else: one step
    "First\n^\rThen",  # "\r" alone is no newline
    "é is\n\n^Ċ is\n\n^∑ is",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marked", CUTS)
def test_cuts_by_hand(family, marked):
    tokenizer, steps = tokenizer_of(family), marked.split("^")
    tokens = encode(tokenizer, "".join(steps))
    cut = steps_of(tokenizer, tokens, split_steps(tokens, table_of(family)))
    assert [step.replace(EOS + " ", EOS) for step in cut] == steps  # Llama-2 puts a space there
    assert steps_by_definition("".join(steps)) == steps


def test_the_families_write_blank_lines_differently():
    """Else the table above would try one tokenizer six times."""
    newlines = {
        family: [t for t in map(table.texts.get, encode(tokenizer, "add.\n\nThen")) if b"\n" in t]
        for family in FAMILIES
        for tokenizer, table in [(tokenizer_of(family), table_of(family))]
    }
    assert newlines["gpt2"] == newlines["pythia"] == newlines["llama2"] == [b"\n", b"\n"]
    assert newlines["gemma"] == [b"\n\n"]
    assert newlines["qwen"] == newlines["llama3"] == [b".\n\n"]


TEXTS = st.lists(
    st.sampled_from(
        ["First", " we", "x", ".", ":", ")", "12", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n"]
        + ["\r", " ", "\t", "    ", "\u00a0", "\u3000", "é", "∑", EOS]
    ),
    max_size=14,
).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_cuts_are_those_of_the_text(family, text):
    """The same text, the same cuts, with every tokenizer whose token borders allow it."""
    tokenizer = tokenizer_of(family)
    tokens = encode(tokenizer, text)
    steps = steps_of(tokenizer, tokens, split_steps(tokens, table_of(family)))
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(steps) == whole
    if family not in ("llama2", "gemma"):  # these put a space before a text, and after EOS
        assert whole == text
    prefixes = (tokens[:b] for b in range(len(tokens) + 1))
    borders = {len(tokenizer.decode(p, clean_up_tokenization_spaces=False)) for p in prefixes}
    runs = [set(accumulate(map(len, pieces_at_newlines(whole, n)))) for n in (1, 2)]
    if borders >= runs[0] | runs[1]:
        assert steps == steps_by_definition(whole)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_step_is_white_space_or_special_tokens_alone(family, data):
    """Any tokens in any order, as a policy may sample them; newlines and spaces more often."""
    tokenizer, table = tokenizer_of(family), table_of(family)
    empty = [i for i in table.texts if table.blank([i])]
    ids = st.one_of(st.sampled_from(empty), st.integers(0, len(table.texts) + 5))
    tokens = data.draw(st.lists(ids, max_size=40))
    for cut in (lambda: split_steps(tokens, table), lambda: prl_steps(tokens, table, "newline")):
        bounds = cut()
        assert bounds == sorted(set(bounds)) and bounds[0] == 0 and bounds[-1] == len(tokens)
        steps = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
        if len(steps) > 1:
            assert all(tokenizer.decode(s, skip_special_tokens=True).strip() for s in steps)
        for step in steps[:-1]:  # a step ends with the token of its last newline
            assert b"\n" in table.texts[step[-1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_the_vocabulary_is_read(family):
    """As the tokenizer decodes it, behind itself, so that no leading space is dropped."""
    tokenizer, table = tokenizer_of(family), table_of(family)
    assert table.texts.keys() == set(tokenizer.get_vocab().values())
    for i, text in table.texts.items():
        once, twice = tokenizer.decode([i]), tokenizer.decode([i, i])
        if "\ufffd" not in twice:  # a part of a character decodes to nothing to compare with
            assert text.decode() == twice[len(once) :], tokenizer.convert_ids_to_tokens(i)
    text = "é∑\u3000Ċ 12.\r\n"
    assert table.read(encode(tokenizer, text))[0].decode().removeprefix(" ") == text


def test_special_tokens_are_those_of_the_files_and_those_with_a_role():
    tokenizer = copy.deepcopy(tokenizer_of("gpt2"))
    user = "<\uff5cuser\uff5c>"  # as DeepSeek writes it: no letters of a byte-level vocabulary
    tokenizer.add_tokens([AddedToken(user, special=True), AddedToken("<tool>", special=False)])
    eos, a = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(user)
    table = separator_tokens(tokenizer)
    assert table.special == {eos, a}
    tokens = encode(tokenizer, f"First\n\n{user}\n\n<tool>\n\nThen")
    steps = steps_of(tokenizer, tokens, split_steps(tokens, table))
    assert steps == ["First\n\n", f"{user}\n\n<tool>\n\n", "Then"]
    tokenizer.eos_token = "x"  # an ordinary token that has the role
    assert separator_tokens(tokenizer).special == {tokenizer.eos_token_id, eos, a}


# 0 to 9: tokens that no tokenizer above has, but others do
TABLE = Separators(
    dict(
        enumerate([b"a", b"\n", b"\n\nb", b"\nb", b"\r", b")\n\n\t", b" ", b"\n\n", b"</s>", b""])
    ),
    frozenset({8}),
)


@pytest.mark.parametrize(
    "tokens, bounds",
    [
        ([0, 2, 0], [0, 2, 3]),  # a token that goes on behind the blank line closes the step
        ([0, 7, 3, 0], [0, 3, 4]),  # so does one that goes on behind a further newline
        ([0, 1, 3, 0], [0, 3, 4]),
        ([0, 5, 0, 5], [0, 2, 4]),
        ([2, 2], [0, 1, 2]),
        ([0, 4, 1, 4, 1, 0], [0, 5, 6]),  # "\r\n\r\n" as four tokens
        ([0, 1, 4, 1, 0], [0, 4, 5]),
        ([0, 1, 4, 0, 1, 0], [0, 2, 5, 6]),
        ([0, 7, 1, 1, 7, 0], [0, 5, 6]),  # further newlines belong to the same run
        ([0, 1, 6, 1, 0], [0, 2, 5]),
        ([0, 1, 8, 1, 0], [0, 2, 5]),  # a special token is no newline, and not nothing
        ([0, 1, 9, 1, 0], [0, 4, 5]),  # a token without a text is nothing
        ([0, 1, 99, 1, 0], [0, 4, 5]),  # so is an id that the tokenizer does not know
        ([0, 7, 8], [0, 3]),
        ([0, 7, 0, 7, 8, 8], [0, 2, 6]),
        ([8, 7, 0, 7, 0], [0, 4, 5]),
        ([8], [0, 1]),
        ([99, 9], [0, 2]),
        ([], [0]),
    ],
)
def test_cuts_of_unusual_tokens(tokens, bounds):
    assert split_steps(tokens, TABLE) == bounds


def test_prl_steps_are_cut_the_same_way():
    text = "\nFirst\nwe\r\nadd.\n\nThen\n\n\n"
    for family in FAMILIES:
        tokenizer, table = tokenizer_of(family), table_of(family)
        tokens = [*encode(tokenizer, text), tokenizer.eos_token_id]
        by = {ends: prl_steps(tokens, table, ends, 4) for ends in ("newline", "blank", "length")}
        assert steps_of(tokenizer, tokens, by["newline"])[1:] == [
            "we\r\n",
            "add.\n\n",
            "Then\n\n\n" + EOS,
        ]
        assert by["blank"] == split_steps(tokens, table)
        assert by["length"] == [*range(0, len(tokens), 4), len(tokens)]
        assert prl_steps(tokens[:3], table, "blank") == [0, 3]  # no fall-back to single newlines


@pytest.mark.parametrize("think", ["text", "added", "special"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_starts_at_the_last_end_of_thought(family, think):
    """However the tokenizer writes "</think>": as one token, special or not, or as several."""
    tokenizer, table = tokenizer_of(family, think), table_of(family, think)
    end = encode(tokenizer, "x</think>")
    assert (len(end) - len(encode(tokenizer, "x")) == 1) == (think != "text")
    for text, usable in [
        ("So\n\nadd</think>\n\nThen x.\n\n)", 1),  # inside a step: that step is out as well
        ("So\n\nadd\n\n</think>\n\nThen x.\n\n)", 2),
        ("So\n\nadd.\n\n</think>Then x.", 2),
        ("</think>\n\nSo\n\nadd", 0),
        ("So</think>\n\nadd\n\n</think>", 1 if think == "special" else 2),  # the last one counts
        ("So\n\nadd\n\n</think", 3),
        ("So", 1),
    ]:
        tokens = encode(tokenizer, text)
        bounds = split_steps(tokens, table)
        scores = [1.0] * (len(bounds) - 1)
        zeroed, count = without_answer(scores, tokens, bounds, table)
        assert (count, zeroed) == (usable, [1.0] * usable + [0.0] * (len(scores) - usable)), text
        assert without_answer([], tokens, bounds, table) == ([], usable)


def test_an_end_of_thought_across_two_steps_shuts_out_both():
    table = Separators(dict(enumerate([b"a", b"\n\n", b".\n\n</", b"think>"])))
    tokens = [0, 1, 0, 2, 3, 0]
    bounds = split_steps(tokens, table)
    assert bounds == [0, 2, 4, 6]
    assert without_answer([3.0, 2.0, 1.0], tokens, bounds, table) == ([3.0, 0.0, 0.0], 1)


def test_cutting_looks_at_every_token_once():
    """A policy that broke down repeats " \\n" up to its limit: quadratic time would be seconds."""
    looked_at = []

    class Counting(Separators):
        def blank(self, tokens):
            looked_at.append(len(tokens))
            return super().blank(tokens)

    tokens = [0, *[6, 1] * 4096, 0]
    assert cut_at_newlines(tokens, Counting(TABLE.texts, TABLE.special), 1) == [0, 3, 8194]
    assert sum(looked_at) == len(tokens)
