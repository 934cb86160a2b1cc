"""Hostile text: fuzzing of problem files and of the grader, where a run may not write, and what a
grading worker may not do.

The fuzz inputs come from seeded random.Random: hypothesis spends half a second on making one nested
JSON value, of which loading takes a millisecond. The number of an input is in the message of its
failure, the file itself in pytest's temporary folder.
"""

import ctypes
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fixtures import TOY_MODEL, bpe_tokenizer, save_real_model, typed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnrl
import eval as evaluation
from runtime import grading
from runtime.cli import UserError, stop_on_user_error
from runtime.data import Problem, load_problems
from runtime.grading import Grader, Verdict, last_box
from tools import view  # noqa: F401  (matplotlib writes its font cache when it is first imported)

loose = dict(deadline=5000, suppress_health_check=list(HealthCheck), database=None)
FRAGMENTS = [
    "\\boxed{",
    "}",
    "{",
    "\\",
    "\\frac",
    "\\dfrac12",
    "\\sqrt",
    "\\text{",
    "\\left(",
    "\\right)",
    "</think>",
    "^",
    "_",
    "^{",
    "$",
    "%",
    "&",
    "\\\\",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "\\sum_{n=1}",
    "\\int",
    "\\pm",
    "\\cup",
    "10^{99999999}",
    "99999999!",
    "1e9999",
    ",",
    "=",
    "x\\in",
    "\0",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "\ufeff",
    "\u0661",
    "\u00b2",
    "\u2212",
    "\n",
    "7",
    "0",
    "1/0",
    "i",
    "e",
    ".",
    "...",
    "import os",
    "__import__('os')",
    "\\input{/etc/passwd}",
    "\\write18{x}",
    "9^{9^{9}}",
    "\\binom{9^9}{9^8}",
    "\\lim_{x\\to0}",
    "\\infty",
    "\\mathrm{m}^2",
    "/",
    "\\operatorname{factorint}",
    "Integral(",
    "lambda x:",
    "\\cdot",
    "\\times10^{9999}",
    "^\\circ",
    "\u0301",
    "\u0e33",
    "\ufdfa",
    "\U0001d7d9",
    "\u2028",
]


class Overtime(BaseException):
    """Not an Exception: what is under test must not take it for a bad row."""


@contextmanager
def time_limit(seconds: float):
    def ring(*_):
        raise Overtime(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- problem files
# --------------------------------------------------------------------------------------------------
PIECES = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b"\x1b[2J",
    b"\r",
    b"\x0b\x0c\x1c",
    b"\xc2\x85",
    b"\n",
    b"\n\n",
    "\u2028\u202e\u0301\u0661".encode(),
    b"[" * 3000,
    b'{"a":' * 3000,
    b"]",
    b"9" * 5000,
    b"1e999",
    b"-1e-999",
    b"NaN",
    b"-Infinity",
    b"null",
    b"true",
    b'""',
    b'"',
    b"\\",
    b"{",
    b"}",
    b",",
    b":",
    b"'",
    b"x" * 20_000,
    b" " * 20_000,
    b'"problem": ',
    b'"answer": ',
    b'"prompt": []',
    b'"reward_model": {}',
    b"PAR1",
    b"\\boxed{" * 50,
    b"../../x",
    b"__import__('os').system('x')",
]


def mutate(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """One to eight times: a bit flipped, a part cut out, repeated, overwritten with noise or a
    piece, the end cut off or another file's."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        a = rng.randrange(len(content) + 1)
        b = min(len(content), a + rng.choice((1, 1, 4, 16, 64, 1000)))
        content = [
            lambda: (
                content[:a]
                + bytes(c ^ 1 << rng.randrange(8) for c in content[a : a + 1])
                + content[a + 1 :]
            ),
            lambda: content[:a],
            lambda: content[:a] + content[b:],
            lambda: content[:b] + content[a:b] * rng.choice((1, 2, 30)) + content[b:],
            lambda: content[:a] + rng.choice(PIECES) + content[a:],
            lambda: content[:a] + rng.choice(PIECES) + content[b:],
            lambda: content[:a] + rng.randbytes(b - a) + content[b:],
            lambda: content[:a] + other[a:],
        ][rng.randrange(8)]()
    return content[:200_000]


def some_value(rng: random.Random, depth: int = 0):
    """Anything that JSON can say, of every type at every place."""
    kind = rng.randrange(12 if depth < 4 else 10)
    if kind == 10:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 11:
        names = ("problem", "answer", "prompt", "role", "content", "ground_truth", "\ud800", "")
        return {rng.choice(names): some_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [
        None,
        True,
        0,
        -(10 ** rng.randrange(400)),
        rng.choice((math.nan, math.inf, 1e308, 5e-324, -0.0)),
        "",
        " \n\t\u2003",
        "7",
        rng.choice(PIECES).decode("utf-8", "surrogateescape"),
        "".join(rng.choices(FRAGMENTS, k=rng.randrange(8))),
    ][kind]


def some_rows(rng: random.Random) -> list:
    """A few good rows of every kind, in some of which something else stands at some place."""
    rows = []
    for _ in range(rng.randrange(1, 6)):
        n = rng.randrange(5)
        message = {"role": rng.choice(("user", "system")), "content": f"What is {n} + 1?"}
        if rng.random() < 0.2:
            message[rng.choice(("role", "content"))] = some_value(rng)
        row = rng.choice(
            (
                {
                    "problem": message["content"],
                    "answer": rng.choice((n + 1, f"{n + 1}", [f"{n + 1}", "x"], n / 2)),
                },
                {
                    "prompt": [message] * rng.randrange(1, 3),
                    "reward_model": {"ground_truth": f"{n + 1}", "style": "rule"},
                },
            )
        )
        if rng.random() < 0.4:
            row[rng.choice(list(row))] = some_value(rng)
        rows.append(row if rng.random() < 0.95 else some_value(rng))
    return rows


def good_parquet() -> list[bytes]:
    """Valid files of many kinds: what problem files have, and types that nobody expects there."""
    import pyarrow
    import pyarrow.parquet

    message = [{"role": "user", "content": "What is 1 + 1?"}]
    bytes_, strings = (
        pyarrow.array([b"\xff", b"a"]),
        pyarrow.array(["What is 1 + 1?", "What is 2 + 2?"]),
    )
    invalid = pyarrow.StringArray.from_buffers(2, *bytes_.buffers()[1:])
    columns = [
        strings,
        strings.dictionary_encode(),
        strings.cast(pyarrow.large_string()),
        invalid,
        bytes_,
        pyarrow.nulls(2),
        pyarrow.array([True, None]),
        pyarrow.array([math.nan, 1e308]),
        pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
        pyarrow.array([2**31 - 1, 0]).cast(pyarrow.int32()),
        pyarrow.array([2**62, 1]).cast(pyarrow.timestamp("us")),
        pyarrow.array([1, 2**62]).cast(pyarrow.timestamp("ns", "Mars/Olympus")),
        pyarrow.array([2**31 - 1, 0], pyarrow.int32()).cast(pyarrow.date32()),
        pyarrow.array([2**62, 1]).cast(pyarrow.duration("s")),
        pyarrow.array([1, 2]).cast(pyarrow.decimal128(38, 5)),
        pyarrow.array([["1", "2"], []]),
        pyarrow.array([message, message]),
        pyarrow.array([[message], None]),
        pyarrow.array([{"ground_truth": "2"}, {"ground_truth": None}]),
        pyarrow.array([{"ground_truth": ["2", "3"]}, None]),
        pyarrow.array(
            [[("ground_truth", "2")], []], pyarrow.map_(pyarrow.string(), pyarrow.string())
        ),
    ]
    files, rng = [], random.Random(0)
    for _ in range(120):
        names = rng.choice(
            (
                ["problem", "answer"],
                ["prompt", "reward_model"],
                ["problem", "answer", "prompt", "reward_model"],
                ["problem", "problem"],
            )
        )
        usual = [strings, strings] if names[0] == "problem" else [columns[16], columns[18]]
        picked = [
            usual[j] if j < len(usual) and rng.random() < 0.6 else rng.choice(columns)
            for j in range(len(names))
        ]
        sink = pyarrow.BufferOutputStream()
        try:
            pyarrow.parquet.write_table(
                pyarrow.Table.from_arrays(picked, names),
                sink,
                row_group_size=rng.choice((1, 2)),
                version=rng.choice(("1.0", "2.6")),
                compression=rng.choice(("none", "snappy", "zstd", "gzip")),
                use_dictionary=rng.random() < 0.5,
                data_page_version=rng.choice(("1.0", "2.0")),
                store_schema=rng.random() < 0.7,
            )
        except pyarrow.ArrowException:  # not every type at every version
            continue
        files.append(sink.getvalue().to_pybytes())
    return files


def problem_files(count: int):
    """(file ending, content), the same ones every time: rows with something wrong in them, and such
    files with damage."""
    rng, parquet, before = random.Random(20), good_parquet(), b""
    for i in range(count):
        ending = (".jsonl", ".json", ".parquet")[i % 3]
        if ending == ".parquet":
            content = rng.choice(parquet)
        else:
            rows, plain = some_rows(rng), rng.random() < 0.5
            lines = [json.dumps(row, ensure_ascii=plain) for row in rows]
            text = "\n".join(lines) if ending == ".jsonl" else "[" + ", ".join(lines) + "]"
            content = text.encode("utf-16" if rng.random() < 0.02 else "utf-8", "surrogatepass")
        if rng.random() < 0.7:
            content = mutate(content, rng, before)
        before = content
        yield ending, content


def check_load(path: Path, tokenizer, drop: bool) -> int:
    """A list of whole problems, or one line that says what is wrong with this file; returns how
    many problems."""
    said, problems = [], []
    try:
        # hostile answers to the check of golds are tests/runtime/test_golds.py's
        how = dict(max_prompt=200, suffix=" Box it.", drop=drop, graded=False)
        problems = load_problems(str(path), tokenizer, say=said.append, **how)
        said = [line for line in said if not line.startswith(f"{path}: the problem is read from ")]
        assert isinstance(problems, list) and problems and (drop or not said), (
            "neither problems nor an error"
        )
    except UserError as error:
        assert str(error).startswith((f"{path}: ", f"{path}, line ")), ascii(error)
        said.append(str(error))
    # the row or line where it applies; nothing that moves the cursor, nothing that print refuses
    for line in said:
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line) and len(line) < 1000, ascii(
            line[:1500]
        )
        where = re.escape(str(path))
        assert re.match(
            rf"{where}(, line \d+)?: \S|[a-z -]+: (\.\.\. and \d+ more in {where}$"
            rf"|{where}, (line|row|entry) \d+: \S)",
            line,
        ), ascii(line)
    for p in problems:
        assert isinstance(p, Problem) and p.text.strip() and p.text.encode(), ascii(p)
        assert re.fullmatch(re.escape(str(path)) + r", (line|row|entry) \d+", p.source), p.source
        assert p.answers and all(isinstance(a, str) and a.strip() for a in p.answers), ascii(
            p.answers
        )
        assert not {"nan", "inf", "-inf"} & {*p.answers}, "a number that is none is no answer"
        assert 0 < len(p.prompt_ids) <= 200 and all(isinstance(t, int) for t in p.prompt_ids), (
            "prompt"
        )
    assert len({p.text for p in problems}) == len(problems), "a problem occurs twice"
    return len(problems)


@pytest.mark.parametrize("count", [2000, pytest.param(60_000, marks=pytest.mark.full)])
def test_fuzz_loading(count, tmp_path):
    tokenizers, whole, path = (bpe_tokenizer(), bpe_tokenizer(chat=False)), 0, tmp_path / "x"
    for i, (ending, content) in enumerate(problem_files(count)):
        path.unlink(missing_ok=True)  # not written over: some file systems flush that to the disk
        path = tmp_path / f"problems{ending}"
        path.write_bytes(content)
        try:
            with time_limit(20):
                whole += check_load(path, tokenizers[i // 3 % 2], drop=i // 6 % 2 == 1) > 0
        except BaseException as error:
            raise AssertionError(f"input {i}, kept in {path}: {type(error).__name__}") from error
    assert 0.1 * count < whole < 0.5 * count, whole  # both ways out are well trodden


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=9),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "ground_truth"]), x)
    ),
    max_leaves=5,
)
json_rows = st.fixed_dictionaries(
    {}, optional={name: json_values for name in ("problem", "answer", "prompt", "reward_model")}
)


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.full)])
def test_fuzz_loading_of_any_json_value(examples, tmp_path):
    path, tokenizer = tmp_path / "p.jsonl", bpe_tokenizer()

    def check(rows):
        path.unlink(missing_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
        for drop in (False, True):
            check_load(path, tokenizer, drop)

    settings(max_examples=examples, **loose)(
        given(st.lists(json_rows | json_values, max_size=3))(check)
    )()


# --- grading
# --------------------------------------------------------------------------------------------------
nasty = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
nested = st.tuples(
    st.sampled_from(["\\boxed{", "{", "\\frac{", "\\sqrt{", "("]),
    st.integers(1, 3000),
    nasty,
    st.integers(0, 3000),
).map(lambda t: t[0] * t[1] + t[2] + "}" * t[3])
hostile = st.text(st.characters(exclude_categories=()), max_size=60) | nasty | nested
ANSWERS = [
    "42",
    "-1,234.50",
    "\\frac{3}{4}",
    "8.7 \\times 10^{8}",
    "x \\in (-\\infty, 2] \\cup \\{3\\}",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "52_8",
    "\\text{(C)}",
    "3\\sqrt{2} + i\\pi",
    "12 \\text{ cm}^2",
    "90^\\circ",
    "y = 2x + 1",
    "\\left( \\frac{1}{2}, -\\frac{\\pi}{3} \\right)",
    "1, 2, \\ldots, 9",
]
TOWERS = [
    ("{", "}"),
    ("\\boxed{", "}"),
    ("\\frac{1}{", "}"),
    ("\\sqrt{", "}"),
    ("9^{", "}"),
    ("\\left(", "\\right)"),
    ("\\text{", "}"),
    ("\\begin{pmatrix}", "\\end{pmatrix}"),
    ("7", ""),
    ("\u0667", ""),
    ("\\frac", ""),
    ("-", ""),
    (" ", " "),
    ("a\u0301", ""),
    ("\\text{ m}/", ""),
    ("1,", ""),
    ("x=", ""),
    ("_{", "}"),
    ("/", ""),
]


def hostile_answer(rng: random.Random) -> str:
    """Half an answer that people give, or fragments; damaged; inside a tower of braces, fractions,
    powers, digits."""
    text = (
        rng.choice(ANSWERS)
        if rng.random() < 0.5
        else "".join(rng.choices(FRAGMENTS, k=rng.randrange(12)))
    )
    if rng.random() < 0.5:
        text = mutate(
            text.encode("utf-8", "surrogatepass"), rng, rng.choice(ANSWERS).encode()
        ).decode("utf-8", "surrogateescape")
    if rng.random() < 0.3:
        (opening, closing), height = rng.choice(TOWERS), rng.choice((2, 9, 40, 120, 1000))
        text = opening * height + text + closing * max(0, height + rng.choice((0, 0, 0, -1, 1)))
    return text[:3000]


def check_grade(response: str, gold: str):
    """All of grade() but the question to a worker (the fast path decides, or makes the question
    that can be sent)."""
    for text in (response, "\\boxed{" + response + "}"):
        box = last_box(text)
        for decision in [] if box is None else [grading._decide(box, gold)]:
            assert isinstance(decision, bool) or json.loads(json.dumps(decision).encode()) == list(
                decision
            )
            assert decision is False or gold.strip() and box.strip(), "nothing equals nothing"


@pytest.mark.parametrize("count", [4000, pytest.param(100_000, marks=pytest.mark.full)])
def test_fuzz_grading(count):
    rng = random.Random(21)
    for i in range(count):
        response, gold = (
            hostile_answer(rng),
            (rng.choice(ANSWERS) if rng.random() < 0.5 else hostile_answer(rng)),
        )
        try:
            with time_limit(20):
                check_grade(response, gold)
        except BaseException as error:
            raise AssertionError(f"input {i}: {response!a} for {gold!a}") from error


@pytest.mark.parametrize("examples", [200, pytest.param(5000, marks=pytest.mark.full)])
def test_fuzz_grading_of_any_text(examples):
    settings(max_examples=examples, **loose)(given(hostile, hostile)(check_grade))()


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.full)])
def test_fuzz_grading_workers(count):
    """The same through real workers with math-verify: a verdict for each, in time, and workers that
    go on being right after it."""
    rng, honest = random.Random(22), ("\\boxed{x^2+2x+1}", ["(x+1)^2"])
    golds = [*ANSWERS[2:], "9^{9^{9}}", "\\frac{1}{1000!}", "\\int_0^1 x^x dx"]
    items = [
        ("\\boxed{" + hostile_answer(rng)[:290] + "}", [rng.choice(golds)]) for _ in range(count)
    ]
    # 3 s: on a busy machine an honest answer may take more than one
    with Grader(workers=2, timeout=3) as grader:
        assert grader.grade_many([honest, honest]) == [Verdict(True, True)] * 2  # both have started
        started = time.perf_counter()
        for start in range(0, count, 50):
            verdicts = grader.grade_many(items[start : start + 50])
            assert all(
                v.error in ("", "timeout", "died", "error") and not (v.error and v.correct)
                for v in verdicts
            )
            assert grader.grade_many([honest, honest]) == [Verdict(True, True)] * 2, (
                f"after {start}"
            )
        # 5 s and a fresh worker for an item at the very worst; nearly all take milliseconds
        assert time.perf_counter() - started < 30 + count


def test_a_long_gold_takes_no_longer_than_its_length():
    """Only a problem file can have one (a box is cut at twice the gold's length), and it is looked
    at for every response."""
    for piece in ("/", "\\text{a}", "\\mathrm{m}^2", "{", " ", "1,", "x="):
        gold = piece * (100_000 // len(piece))
        with time_limit(5):
            check_grade("7", gold)
            check_grade(gold[:-1], gold)


# --- where a run may write
# --------------------------------------------------------------------------------------------
def listing(folder: Path) -> dict:
    return {
        str(p): (p.lstat().st_mode, p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
        if not p.is_dir()
    } | {str(p): None for p in folder.rglob("*") if p.is_dir()}


def paths_as_text(sandbox: Path) -> list[str]:
    target = sandbox / "escaped"
    return [
        "../escaped",
        "../../escaped",
        f"{target}",
        f"file://{target}",
        "~/escaped",
        "$HOME/escaped",
        f"`touch {target}`",
        f"$(touch {target})",
        f"; touch {target} #",
        f"| tee {target}",
        f"> {target}",
        f"{target}\0.txt",
        "\0",
        "..",
        "/",
        "x/" * 3000,
        "n" * 300,
        f"\\input{{{target}}}\\write18{{touch {target}}}",
        f"open({str(target)!r}, 'w')",
        f"__import__('os').mkdir({str(target)!r})",
        f"{{{{ ''.__class__ }}}} {{% include '{target}' %}}",
        "%s%n{0}{0.__class__}",
        "../last",
        "config.json",
        "step-000001",
        "C:\\escaped",
        "\u2025/escaped",
        "\r\x1b[2J",
    ]


def test_a_run_writes_nothing_outside_its_folder_whatever_texts_say(tmp_path, monkeypatch):
    """Problems, answers, roles and unused columns that are paths, commands and templates, and
    responses that end in them."""
    sandbox = tmp_path / "sandbox"
    inside = sandbox / "a" / "b"
    inside.mkdir(parents=True)
    (sandbox / "victim").write_text("whole")
    model, texts = save_real_model(sandbox / "model"), paths_as_text(sandbox)
    for name, some, rest in (("train", texts, ""), ("test", texts[:9], " held out")):
        rows = [
            {
                "prompt": [{"role": texts[-i], "content": text[:400] + rest}],
                "id": text,
                "data_source": text,
                "reward_model": {"ground_truth": [text, "\\frac{1}{2}" + text[:60]]},
            }
            for i, text in enumerate(some)
        ]
        (inside / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kind = type(bpe_tokenizer())
    # the latter go to workers
    decode, said = (
        kind.decode,
        itertools.cycle([*texts * 7, *("\\frac12" + text[:60] for text in texts)]),
    )

    def add_box(decoded):
        return (
            [add_box(text) for text in decoded]
            if isinstance(decoded, list)
            else decoded + "\\boxed{" + next(said) + "}"
        )

    monkeypatch.setattr(kind, "decode", lambda *args, **kw: add_box(decode(*args, **kw)))
    monkeypatch.chdir(inside)
    monkeypatch.setenv("HOME", str(sandbox))
    before, opened, watching = listing(sandbox), [], [True]

    others = typed("os.mkdir os.rename os.symlink os.link os.system subprocess.Popen")

    def watch(event, args):  # stays for the life of the process, so it can be told to look away
        writes = event in others or (
            event == "open"
            and isinstance(args[0], (str, bytes))
            and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if watching and writes:
            opened.append((event, os.fsdecode(args[0] or "")))

    sys.addaudithook(watch)
    both = [
        "--model",
        str(model),
        *typed("--test_problems test.jsonl --drop_bad_rows --max_prompt 900"),
    ]
    try:
        folder = attnrl.train(
            attnrl.parse_config(
                [
                    *both,
                    *typed(
                        "--preset toy --problems train.jsonl --out run --steps 2 --batch_size 4"
                        " --eval_samples 1"
                        " --eval_every 2 --max_response 24 --mini_batch 8"
                    ),
                    "--prompt_suffix",
                    "",
                    "--grading_workers",
                    "1",
                ]
            )
        )
        evaluation.main(
            [*both[:2], "--problems", *both[3:], *typed("--k 1 --max_response 8 --out run/eval")]
        )
    finally:
        watching.clear()
    assert (
        folder == Path("run")
        and "escaped" in (folder / "samples.jsonl").read_text()
        and "escaped" in (folder / "eval/test.jsonl").read_text()
    )
    after = {
        path: state
        for path, state in listing(sandbox).items()
        if path != str(inside / "run") and not path.startswith(f"{inside}/run/")
    }
    assert set(after) == set(before)
    assert not [path for path in before if after[path] != before[path]]
    names = {p.name for p in folder.rglob("*")}
    assert not [name for name in names if "escaped" in name or len(name) > 60], names
    # links have relative targets
    allowed = ("run", "step-", "best-", str(inside / "run"), "/dev/null", sys.executable)
    assert not {(event, path) for event, path in opened if not path.startswith(allowed)}


@pytest.mark.parametrize(
    "name",
    [
        "..jsonl",
        "...jsonl",
        "-k.jsonl",
        " .jsonl",
        "a:b:c.jsonl",
        "$(touch escaped).jsonl",
        "\x1b[2J\n.jsonl",
        "\udcff.jsonl",
        "{}%s.jsonl",
        "sub/../../b/p.jsonl",
        "toy:4:2:1",
        "toy:\uff14:2",
        "toy:\n4:2",
        "n" * 240 + ".jsonl",
    ],
)
def test_the_default_name_of_an_evaluation_stays_in_runs(name, tmp_path, monkeypatch, capsys):
    inside = tmp_path / "a" / "b"
    (inside / "sub").mkdir(parents=True)
    monkeypatch.chdir(inside)
    if not name.startswith("toy"):
        Path(name).write_text('{"problem": "a=4;b=a-2;c=b+b;d=7;?d", "answer": "7"}')
    before = set(tmp_path.rglob("*"))
    command = ["--model", str(TOY_MODEL), f"--problems={name}", "--k", "1", "--max_response", "1"]
    if len(name) > 200:
        with pytest.raises(UserError, match="--out .*: cannot be written"):
            evaluation.main(command)
    else:
        with stop_on_user_error("eval.py"):
            evaluation.main(command)
    new = sorted(set(tmp_path.rglob("*")) - before)
    assert [p.relative_to(inside).parts[0] for p in new] == ["runs"] * len(new) and len(new) == (
        1 if len(name) > 200 else 3
    )
    assert all(p.parent == inside / "runs" and p.name.startswith("eval-") for p in new[1:2])
    assert all(p.parent == new[1] and p.suffix == ".jsonl" for p in new[2:])


# --- files that may not be read or written
# ----------------------------------------------------------------------------
@contextmanager
def ordinary_user():
    """Permission bits hold for root, too: this thread gives up its two exceptions from them, for
    this block."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Sets(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("as root only on Linux")
    system, header, sets = ctypes.CDLL(None, use_errno=True), Header(0x20080522, 0), (Sets * 2)()
    assert system.capget(ctypes.byref(header), sets) == 0
    had = sets[0].effective
    sets[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert system.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = had
        assert system.capset(ctypes.byref(header), sets) == 0


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """Files and folders of no permission at all, beside good ones."""
    w = tmp_path_factory.mktemp("closed")
    good = '{"problem": "a=4;b=a-2;c=b+b;d=7;?d", "answer": "7"}'
    (w / "folder" / "model").mkdir(parents=True)
    (w / "readonly").mkdir()
    for name in ("good.jsonl", "p.jsonl", "p.json", "p.parquet", "folder/p.jsonl"):
        (w / name).write_text(good)
    for part in ("config.json", "model.safetensors", "tokenizer.json"):
        (w / f"no-{part}").mkdir()
        for path in TOY_MODEL.iterdir():
            (w / f"no-{part}" / path.name).write_bytes(path.read_bytes())
        (w / f"no-{part}" / part).chmod(0)
    for name in ("p.jsonl", "p.json", "p.parquet", "folder"):
        (w / name).chmod(0)
    (w / "readonly").chmod(0o555)
    yield w
    (w / "folder").chmod(0o755)


ASK, EVAL = "--ask x --max_response 1", f"--model {TOY_MODEL} --k 1 --max_response 1"
TRAIN = "--preset toy --steps 1 --batch_size 2 --problems toy:6:20:1 --test_problems toy:6:3:2"


@pytest.mark.parametrize(
    "command, args, words",
    [
        *[
            (
                "eval.py",
                f"{EVAL} --problems {{w}}/{name}",
                f"{{w}}/{name}: cannot be read (Permission denied)",
            )
            for name in ("p.jsonl", "p.json", "p.parquet")
        ],
        *[
            ("eval.py", f"{EVAL} --problems {{w}}/{name}", f"{{w}}/{name}: no such problem file")
            for name in ("folder/p.jsonl", "folder")
        ],
        ("eval.py", f"{EVAL} --problems " + "n" * 300, "nnn: no such problem file"),
        ("eval.py", f"{EVAL} --problems " + "n/" * 3000, "/n/: no such problem file"),
        ("attnrl.py", f"{TRAIN} --problems {{w}}/p.jsonl", "{w}/p.jsonl: "),
        ("attnrl.py", f"{TRAIN} --test_problems {{w}}/folder/p.jsonl", "{w}/folder/p.jsonl: "),
        *[
            (command, f"{rest} --model {{w}}/{name}", f"--model {{w}}/{name}: ")
            for command, rest in (("eval.py", ASK), ("attnrl.py", TRAIN))
            for name in (
                "no-config.json",
                "no-model.safetensors",
                "no-tokenizer.json",
                "folder/model",
            )
        ],
        ("eval.py", f"{ASK} --model " + "n" * 300, "--model nnn"),
        *[
            ("attnrl.py", f"{TRAIN} --out {{w}}/{name}", f"--out {{w}}/{name.split()[0]}: ")
            for name in ("readonly/x", "folder/x", "readonly", "folder", "folder/x --resume auto")
        ],
        *[
            (
                "eval.py",
                f"{EVAL} --problems {{w}}/good.jsonl --out {{w}}/{name}/x",
                f"--out {{w}}/{name}/x: cannot be written",
            )
            for name in ("readonly", "folder")
        ],
    ],
)
def test_files_of_no_permission_are_one_line_and_exit_code_2(
    command, args, words, closed, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with ordinary_user():
        with pytest.raises(PermissionError):
            (closed / "p.jsonl").open()
        with pytest.raises(SystemExit) as stop, stop_on_user_error(command):
            {"eval.py": evaluation, "attnrl.py": attnrl}[command].main(
                args.replace("{w}", str(closed)).split()
            )
    out, error = capfd.readouterr()
    assert stop.value.code == 2 and len(error.splitlines()) == 1 and "Traceback" not in out, error[
        -3000:
    ]
    assert (
        error.startswith(f"{command}: ")
        and words.replace("{w}", str(closed)).replace("nnn", "n" * 300) in error
    ), error
    assert not list(tmp_path.iterdir()) and not list((closed / "readonly").iterdir())


# --- numbers too large for any machine
# --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "command, option",
    [
        ("eval.py", "k"),
        *[
            ("attnrl.py", name)
            for name in (
                "batch_size",
                "eval_samples",
                "group_size",
                "grpo_samples",
                "grading_workers",
                "branch_points",
                "continuations",
            )
        ],
    ],
)
def test_a_number_that_no_machine_can_take_is_refused(
    command, option, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    args = [
        *(EVAL + " --problems toy:6:3" if command == "eval.py" else TRAIN).split(),
        f"--{option}",
        str(10**12),
    ]
    with pytest.raises(SystemExit) as stop, time_limit(20), stop_on_user_error(command):
        {"eval.py": evaluation, "attnrl.py": attnrl}[command].main(args)
    error = capfd.readouterr().err
    assert (
        stop.value.code == 2
        and f"--{option} {10**12}: must be" in error
        and len(error.splitlines()) == 1
    ), error
    assert not list(tmp_path.iterdir())


# --- what a grading worker may not do
# ---------------------------------------------------------------------------------
ATTACKS = {
    "write": "open(TARGET, 'w').write('x')",
    "append": "open(TARGET, 'a')",
    "os.open": "os.open(TARGET, os.O_CREAT | os.O_WRONLY)",
    "mkdir": "os.mkdir(TARGET)",
    "symlink": "os.symlink('/', TARGET)",
    "remove": "os.remove(VICTIM)",
    "rename": "os.rename(VICTIM, TARGET)",
    "truncate": "os.truncate(VICTIM, 0)",
    "system": "os.system('touch ' + TARGET)",
    "fork": "os.fork()",
    "kill": "os.kill(os.getppid(), 0)",
    "program": "subprocess.run(['touch', TARGET])",
    "spawn": "os.posix_spawn('/usr/bin/touch', ['touch', TARGET], {})",
    "loopback": "socket.create_connection(('127.0.0.1', PORT), 2)",
    "listen": "socket.socket().bind(('127.0.0.1', 0))",
    "machine code": "ctypes.CDLL(None).system(b'touch x')",
}


def test_a_worker_writes_no_file_opens_no_socket_and_starts_no_program(tmp_path, monkeypatch):
    """The real worker; in place of math-verify a module that does what a text would do that had
    taken it over."""
    target, victim = tmp_path / "target", tmp_path / "victim"
    victim.write_text("whole")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            f"import os, socket, subprocess, ctypes\nTARGET, VICTIM, PORT = {str(target)!r},"
            f" {str(victim)!r}, {server.getsockname()[1]}\n"
        )
        code += (
            f"ATTACKS = {ATTACKS!r}\nclass LatexExtractionConfig:\n    def __init__(self, **_):"
            " pass\n"
        )
        code += (
            "def parse(text, *_, **__):\n    if text[7:-1] in ATTACKS:\n       "
            " exec(ATTACKS[text[7:-1]])\n    return [text]\n"
        )
        code += "def verify(*_, **__): return True\n"
        (tmp_path / "math_verify.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        before = {p.name for p in tmp_path.iterdir()}
        with Grader(workers=1) as grader:
            assert json.loads(json.dumps(grader._ask(b'[["harmless", "x"]]\n'))) == {
                "correct": True,
                "error": "",
            }
            for attack in ATTACKS:
                assert grader._ask(json.dumps([[attack, "x"]]).encode() + b"\n") == {
                    "correct": False,
                    "error": "error",
                }, attack
            if sys.platform == "linux":
                import resource

                pid = grader._idle.queue[-1].pid
                assert resource.prlimit(pid, resource.RLIMIT_FSIZE) == (0, 0)
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert {p.name for p in tmp_path.iterdir()} - {
        "__pycache__"
    } == before and victim.read_text() == "whole"
