"""Problem files, prompts and the toy: every kind of bad row is named with file and row, and the
real files load."""

import json
import random
import re
from collections import Counter
from datetime import date, datetime
from pathlib import Path

import pytest
from fixtures import REAL_DATA, bpe_tokenizer, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from runtime import data
from runtime.cli import UserError
from runtime.data import (
    Problem,
    encode_prompt,
    encode_question,
    hold_out,
    load_problems,
    report_bad_rows,
    usable_suffix,
)
from runtime.golds import parse_answers
from toy.programs import LETTERS, toy_program, toy_set, toy_solution

SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


def load(path, tokenizer, **options):
    """(problems, lines said)"""
    said = []
    options = {"max_prompt": 200, **options}
    return load_problems(str(path), tokenizer, say=said.append, **options), said


def write_lines(path: Path, *rows) -> Path:
    path.write_bytes(
        b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    )
    return path


@pytest.mark.parametrize(
    "tokenizer, written", [(toy_tokenizer(), False), (bpe_tokenizer(), True)], ids=["toy", "bpe"]
)
def test_a_suffix_that_the_tokenizer_cannot_write_is_left_out_and_that_is_said(tokenizer, written):
    said: list[str] = []
    assert usable_suffix(tokenizer, SUFFIX, said.append) == (SUFFIX if written else "")
    assert len(said) == (not written) and all(repr(SUFFIX) in line for line in said)
    assert usable_suffix(tokenizer, "", said.append) == "" and len(said) == (not written)


def test_a_lower_case_tokenizer_still_writes_the_suffix():
    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert usable_suffix(tokenizer, SUFFIX, pytest.fail) == SUFFIX


def test_jsonl_takes_strings_numbers_and_lists_of_answers(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "p.jsonl",
        {"problem": "1+1?", "answer": "2"},
        b"",
        {"problem": "1+2?", "answer": 3},
        {"problem": "x^2=1?", "answer": ["1", " -1\n"]},
    )
    problems, said = load(path, tokenizer, suffix=SUFFIX)
    assert [p.answers for p in problems] == [["2"], ["3"], ["1", "-1"]] and said == []
    assert [p.source for p in problems] == [f"{path}, line {n}" for n in (1, 3, 4)]
    assert tokenizer.decode(problems[0].prompt_ids).count(SUFFIX) == 1


BAD_ROWS = [
    (b'{"problem": "a", ', "malformed", "line 2: not JSON in UTF-8"),
    (b'{"problem": "\xff", "answer": "1"}', "malformed", "line 2: not JSON in UTF-8"),
    (b"[" * 100_000, "malformed", "line 2: not JSON in UTF-8"),
    (b'["problem"]', "malformed", "line 2: not a JSON object"),
    ({"question": "a", "answer": "1"}, "malformed", 'line 2: no text in the field "problem"'),
    ({"problem": 7, "answer": "1"}, "malformed", 'line 2: no text in the field "problem"'),
    ({"problem": "  ", "answer": "1"}, "malformed", "line 2: the problem is empty"),
    ({"problem": "a"}, "malformed", 'line 2: the field "answer"'),
    (
        {"problem": "a", "answer": {"x": 1}},
        "malformed",
        "line 2: the answer must be a string, a number or a list",
    ),
    (
        {"problem": "a", "answer": True},
        "malformed",
        "line 2: the answer must be a string, a number or a list",
    ),
    ({"problem": "a \ud800", "answer": "1"}, "malformed", "line 2: half a character"),
    ({"problem": "a", "answer": " "}, "empty answer", "line 2: the answer is empty"),
    ({"problem": "a", "answer": []}, "empty answer", "line 2: the answer is empty"),
    ({"problem": " good  one", "answer": "1"}, "duplicate", "line 2: the same problem as"),
    ({"problem": "good one" + SUFFIX, "answer": "1"}, "duplicate", "line 2: the same problem as"),
    ({"problem": "word " * 300, "answer": "1"}, "over-long prompt", "more than --max_prompt 200"),
    (
        {"problem": "held  out", "answer": "1"},
        "in the evaluation set",
        "line 2: the same problem is test.jsonl, line 9",
    ),
]


@pytest.mark.parametrize("row, kind, message", BAD_ROWS)
def test_a_bad_row_is_named_and_stops_or_is_dropped_with_a_count(
    tmp_path, tokenizer, row, kind, message
):
    others = [{"problem": f"another {i}", "answer": "1"} for i in range(3)]
    path = write_lines(tmp_path / "p.jsonl", {"problem": "good one", "answer": "1"}, row, *others)
    held_out = [Problem("held out" + SUFFIX, ["1"], "test.jsonl, line 9")]
    said = []
    with pytest.raises(UserError, match=f"bad rows .1 {kind}.*--drop_bad_rows"):
        load_problems(
            str(path),
            tokenizer,
            max_prompt=200,
            suffix=SUFFIX,
            evaluation=held_out,
            say=said.append,
        )
    assert (
        len(said) == 1
        and said[0].startswith(f"{kind}: {path}, line 2")
        and message in said[0]
        and "\n" not in said[0]
    )
    problems, said = load(path, tokenizer, suffix=SUFFIX, evaluation=held_out, drop=True)
    assert [p.text for p in problems] == ["good one", "another 0", "another 1", "another 2"]
    assert said == [f"{path}: left out 1 {kind}"]


def test_conflicting_answers_drop_every_row_of_that_problem(tmp_path, tokenizer):
    path = write_lines(
        tmp_path / "p.jsonl",
        {"problem": "a", "answer": "1"},
        {"problem": "b", "answer": "1"},
        {"problem": "a", "answer": "2"},
    )
    said = []
    with pytest.raises(UserError, match="2 conflicting answers"):
        load_problems(str(path), tokenizer, max_prompt=200, say=said.append)
    assert (
        "line 1: answer ['1'], but" in said[0]
        and "line 3 has the same problem with ['2']" in said[0]
    )
    assert (
        "line 3: answer ['2'], but" in said[1]
        and "line 1 has the same problem with ['1']" in said[1]
    )
    problems, said = load(path, tokenizer, drop=True)
    assert [p.text for p in problems] == ["b"] and said == [
        f"{path}: left out 2 conflicting answers"
    ]


def test_unusable_files_are_one_line(tmp_path, tokenizer):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "empty.jsonl").touch()
    for name, message in (
        ("missing.jsonl", "no such problem file"),
        ("broken.parquet", "not a readable parquet file"),
        ("empty.jsonl", "no usable problem"),
        ("", "no such problem file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(tmp_path / name, tokenizer)
        assert "\n" not in str(error.value)


def test_many_bad_rows_are_summed_up(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", *[{"problem": "same", "answer": "1"}] * 100)
    said = []
    with pytest.raises(UserError, match="99 duplicate"):
        load_problems(str(path), tokenizer, max_prompt=200, say=said.append)
    assert len(said) == 6 and said[-1].startswith("duplicate: ... and 94 more")


def test_prompts_use_the_chat_template_if_there_is_one():
    messages = [{"role": "user", "content": "Hi there"}]
    chat = bpe_tokenizer()
    assert (
        chat.decode(encode_prompt(chat, messages))
        == "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = bpe_tokenizer(chat=False)
    assert plain.decode(encode_prompt(plain, messages)) == "Hi there"


# Templates ask for the date in these ways: Llama 3.2's with a default, Mistral's and gpt-oss's in a
# variable, SmolLM3's in a text, Granite's with its own format, and a macro of the template's that
# asks for it.
DATED = {
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today Date: {{ date_string }}\n": ("Today Date: 31 Jan 2026"),
    '{%- set today = strftime_now("%Y-%m-%d") %}\nThe current date is {{ today }}.': (
        "The current date is 2026-01-31."
    ),
    '{%- set today = strftime_now("%d %B %Y") -%}Today Date: {{ today ~ "" }}': (
        "Today Date: 31 January 2026"
    ),
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.": "Today's Date: January 31, 2026.",
    "{% macro header() %}"
    "{{ strftime_now(format='%A %-d/%-m/%y, %H:%M, day %j, 100%%, %%d') }}"
    "{% endmacro %}{{ header() }}": ("Saturday 31/1/26, 00:00, day 031, 100%, %d"),
    "{% if strftime_now('%Y') | int > 2025 %}new{% else %}old{% endif %}": "new",
}


@pytest.mark.parametrize("start", DATED)
def test_the_date_in_a_chat_template_is_the_one_given(start):
    tokenizer, messages = bpe_tokenizer(), [{"role": "user", "content": "Hi"}]
    dated, plain = bpe_tokenizer(), tokenizer.decode(encode_prompt(tokenizer, messages))
    dated.chat_template = start + "|" + tokenizer.chat_template
    text = dated.decode(encode_prompt(dated, messages, "2026-01-31"))
    assert (
        text == DATED[start].replace("\n", "") + "|" + plain or text == DATED[start] + "\n|" + plain
    )
    # without a date: as transformers writes it on this day
    by_clock = dated.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if "%H" not in start:  # its clock goes on meanwhile
        assert dated.decode(encode_prompt(dated, messages)) == by_clock


@settings(max_examples=50, deadline=None)
@given(
    st.dates(min_value=date(1990, 1, 1)),
    st.lists(st.sampled_from([*"aAbBdeHIjmMpSuUVwWyYGZ", "-d", "-m", "-j", "%"]), max_size=6),
)
def test_every_code_of_strftime_is_the_days(day, codes):
    form = "/".join(f"%{code}" for code in codes)
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ strftime_now(messages[0].content) }}"
    got = tokenizer.decode(
        encode_prompt(tokenizer, [{"role": "user", "content": form}], day.isoformat())
    )
    assert got == datetime(day.year, day.month, day.day).strftime(form)


def test_a_template_without_a_date_is_used_as_it_is_and_white_space_at_its_start_stays():
    tokenizer, messages = bpe_tokenizer(), [{"role": "user", "content": "Hi"}]
    assert encode_prompt(tokenizer, messages, "2026-01-31") == encode_prompt(tokenizer, messages)
    tokenizer.chat_template = "\n  {{ strftime_now('%Y') }}"
    text = tokenizer.decode(encode_prompt(tokenizer, messages, "2026-01-31"))
    assert text == tokenizer.apply_chat_template(messages, tokenize=False).replace(
        str(date.today().year), "2026"
    )


def test_one_day_for_a_whole_set_and_a_date_that_is_none_is_one_line(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    path = write_lines(tmp_path / "p.jsonl", {"problem": "1+1?", "answer": 2})
    (problem,), _ = load(path, tokenizer, today="2024-02-29")
    assert tokenizer.decode(problem.prompt_ids).startswith("29 Feb 2024 ")
    assert encode_question(tokenizer, "1+1?", "--ask", "2024-02-29") == problem.prompt_ids
    for wrong in ("2023-02-29", "today", "31.1.2026"):
        with pytest.raises(UserError, match="the date .*: write it like 2026-01-31"):
            load(path, tokenizer, today=wrong)


problem_sets = st.lists(st.integers(0, 50), min_size=3, max_size=40, unique=True).map(
    lambda numbers: [Problem(f"What is {n} - 1?", [str(n - 1)], f"row {n}", [1]) for n in numbers]
)


@settings(max_examples=100, deadline=None)
@given(problem_sets, st.floats(0.01, 0.6), st.integers(0, 99), st.randoms())
def test_a_part_is_held_out_without_leak_whatever_the_order(problems, fraction, seed, rng):
    disguised = [
        Problem(
            p.text.replace("What is ", "What is $").replace("?", "$?"),
            p.answers,
            p.source + "'",
            [2],
        )
        for p in problems
    ]
    everything = [*problems, *disguised]
    train, test = hold_out(everything, fraction, seed)
    assert len(train) + len(test) == len(everything) and {id(p) for p in train + test} == {
        id(p) for p in everything
    }
    assert {tuple(p.answers) for p in train}.isdisjoint(tuple(p.answers) for p in test)
    assert len(test) == 2 * max(1, round(fraction * len(problems)))
    assert [p for p in everything if p in test] == test and [
        p for p in everything if p in train
    ] == train
    again = hold_out(rng.sample(everything, len(everything)), fraction, seed)[1]
    assert {p.source for p in again} == {p.source for p in test}


def test_other_seeds_hold_out_other_problems_and_each_equally_often():
    problems = [Problem(f"What is {n} - 1?", [str(n - 1)], f"row {n}", [1]) for n in range(10)]
    counts = Counter(p.source for seed in range(400) for p in hold_out(problems, 0.3, seed)[1])
    assert len(counts) == 10 and all(
        80 < count < 160 for count in counts.values()
    )  # 120 expected, 9 a standard deviation


def test_a_part_that_cannot_be_held_out_is_one_line():
    two = [Problem("1 + 1?", ["2"], "row 0", [1]), Problem("1 - 1?", ["0"], "row 1", [1])]
    for fraction in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"--test_fraction .*: must be between 0 and 1"):
            hold_out(two, fraction, 0)
    assert [len(part) for part in hold_out(two, 0.01, 0)] == [1, 1]
    for problems in ([], two[:1]):
        with pytest.raises(UserError, match="--test_fraction 0.5: leaves nothing to train on"):
            hold_out(problems, 0.5, 0)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_answer_value_is_parsed_or_refused(value):
    try:
        answers = parse_answers(value)
    except ValueError:
        return
    assert all(isinstance(a, str) and a.strip() for a in answers)


# --- the real files (read where they are, never copied)
# ---------------------------------------------------------------
needs_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"real problem files are not at {REAL_DATA}"
)


@needs_data
@pytest.mark.parametrize(
    "name, rows", [("aime24", 30), ("math500", 500), ("minerva", 272), ("olympiad", 674)]
)
def test_real_evaluation_files_load_whole(tokenizer, name, rows):
    problems, said = load(
        REAL_DATA / f"{name}.parquet",
        tokenizer,
        suffix=SUFFIX,
        max_prompt=10_000,
        graded=False,
    )
    assert len(problems) == rows and said == [] and all(p.answers for p in problems)
    assert all(tokenizer.decode(p.prompt_ids).count("within \\boxed{}.") == 1 for p in problems)


@needs_data
def test_real_training_file_is_cleaned_and_counted(tokenizer, monkeypatch):
    held_out = [
        p
        for name in ("math500", "olympiad")
        for p in load(
            REAL_DATA / f"{name}.parquet",
            tokenizer,
            suffix=SUFFIX,
            max_prompt=10_000,
            graded=False,
        )[0]
    ]
    path, leaks = REAL_DATA / "dapo_math_train.parquet", []
    monkeypatch.setattr(data, "SHOWN_PER_KIND", 10**6)

    def report(source, bad, drop, say):  # both ways it can end, after reading 25,000 rows once
        with pytest.raises(UserError, match="correct them, or leave them out"):
            report_bad_rows(source, bad, False, leaks.append)
        report_bad_rows(source, bad, drop, say)

    monkeypatch.setattr(data, "report_bad_rows", report)
    problems, said = load(
        path,
        tokenizer,
        drop=True,
        suffix=SUFFIX,
        evaluation=held_out,
        max_prompt=10_000,
    )
    counts = {
        kind: int(n)
        for n, kind in re.findall(r"(\d+) ([a-z-]+(?: [a-z]+)*)", said[0].split("left out")[1])
    }
    assert counts.pop("empty answer") == 2
    # the 8 problems of math500 and 15 of olympiad that occur in the training file, some of them in
    # several rows
    in_training = {
        line.split("the same problem is ")[1] for line in leaks if "the same problem is" in line
    }
    assert (
        sum("math500" in line for line in in_training) == 8
        and sum("olympiad" in line for line in in_training) == 15
    )
    # 1,510 rows repeat a prompt to the letter, 1,940 up to layout; 5 prompts and more have
    # conflicting answers (3 others have 72 and 072, 83 and 83^\\circ: no conflict)
    assert counts["duplicate"] > 1_510 and 10 <= counts["conflicting answers"] <= 16
    # nothing is lost without being counted
    assert len(problems) == 24_898 - 2 - sum(counts.values())


# --- the toy
# --------------------------------------------------------------------------------------------------
def run_program(program: str) -> dict[str, int]:
    """An independent interpreter: python's own arithmetic on the expression's characters."""
    values: dict[str, int] = {}
    for line in program.split(";")[:-1]:
        name, expression = line.split("=")
        x, *rest = [values[c] if c in values else int(c) if c.isdigit() else c for c in expression]
        if rest:
            x = {"+": x.__add__, "-": x.__sub__, "*": x.__mul__}[rest[0]](rest[1])
        values[name] = x % 10
    return values


@settings(max_examples=100, deadline=None)
@given(st.integers(4, 26), st.integers(0, 10**6))
def test_toy_programs_are_well_formed_and_the_teacher_is_right(n_vars, seed):
    program = toy_program(n_vars, random.Random(seed))
    values = run_program(program)
    *steps, box = toy_solution(program).split("\n\n")
    assert len(steps) == n_vars == len(values) and program.endswith(f";?{LETTERS[n_vars - 1]}")
    assert [int(step[-1]) for step in steps] == list(values.values())
    assert box == f"\\boxed{{{values[LETTERS[n_vars - 1]]}}}"


def test_the_teacher_slips_as_often_as_told_and_goes_on_from_its_slip():
    rng = random.Random(0)
    slips = steps = 0
    for _ in range(300):
        program = toy_program(8, rng)
        for step in toy_solution(program, 0.2, rng).split("\n\n")[:-1]:
            if step.count("=") == 2:
                _, filled, result = step.split("=")
                slips += run_program(f"a={filled};?a")["a"] != int(result)
                steps += 1
    assert 0.17 < slips / steps < 0.23


def test_toy_sets_are_reproducible_distinct_and_validated():
    assert list(toy_set("toy:6:50:3")) == list(toy_set("toy:6:50:3")) != list(toy_set("toy:6:50:4"))
    assert len({program for program, _ in toy_set("toy:4:500:0")}) == 500
    lengths = [program.count("=") for program, _ in toy_set("toy:8-10:300:0")]
    assert set(lengths) == {8, 9, 10} and min(map(lengths.count, (8, 9, 10))) > 70
    for wrong in (
        "toy:x",
        "toy:10-8",
        "toy:8-9-10",
        "toy:-8",
        "toy:3",
        "toy:27",
        "toy:8:0",
        "toy:8:1:-1",
        "toy:8:10:0:9",
    ):
        with pytest.raises(ValueError):
            list(toy_set(wrong))
        with pytest.raises(UserError, match="write toy:VARIABLES:COUNT:SEED"):
            load_problems(wrong, toy_tokenizer(), max_prompt=99)


def test_toy_tokens_are_characters_and_the_blank_line():
    tokenizer = toy_tokenizer()
    text = "b=3+4=7\n\n\\boxed{7}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 7 + 1 + 9 and tokenizer.decode(ids) == text


def test_a_json_array_is_read_as_published_and_a_wrong_one_says_so(tmp_path, tokenizer):
    path = tmp_path / "deepscaler.json"
    rows = [
        {"problem": f"What is {i} + 1?", "answer": str(i + 1), "solution": "It is."}
        for i in range(3)
    ]
    path.write_text(json.dumps([*rows, {"problem": "no answer"}]))
    problems, said = load(path, tokenizer, drop=True)
    assert [p.answers for p in problems] == [["1"], ["2"], ["3"]] and problems[
        1
    ].source == f"{path}, entry 1"
    assert said == [
        f"{path}: the problem is read from problem, the answer from answer, nothing from solution",
        f"{path}: left out 1 malformed",
    ]
    for text, message in (
        ('{"problem": "x", "answer": "1"}', "not an array"),
        ('[{"problem": "x",', "not JSON in UTF-8"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load(path, tokenizer)


def test_parquet_with_plain_columns(tmp_path, tokenizer):
    """DeepScaleR as the hub converts it: columns problem, answer, solution."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "deepscaler.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "problem": ["What is 1 + 1?", "What is 2 + 2?"],
                "answer": ["2", "4"],
                "solution": ["", ""],
            }
        ),
        path,
    )
    problems, _ = load(path, tokenizer)
    assert [p.answers for p in problems] == [["2"], ["4"]]
