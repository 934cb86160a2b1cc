"""Problem files, prompts and the toy: every kind of bad row is named with file and row, and the
real files load."""

import json
import random
import re
from pathlib import Path

import pytest
from fixtures import REAL_DATA, bpe_tokenizer, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import data
from runtime.cli import UserError
from runtime.data import Problem, encode_prompt, load_problems, parse_answers, report_bad_rows
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
    (
        {"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}},
        "malformed",
        "line 2: no text",
    ),
    (
        {"prompt": [{"role": "user", "content": "a"}], "reward_model": "x"},
        "malformed",
        'line 2: the field "answer"',
    ),
    ({"problem": "a \ud800", "answer": "1"}, "malformed", "line 2: "),
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
    path = write_lines(tmp_path / "p.jsonl", {"problem": "good one", "answer": "1"}, row)
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
    assert [p.text for p in problems] == ["good one"] and said == [f"{path}: left out 1 {kind}"]


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
        REAL_DATA / f"{name}.parquet", tokenizer, suffix=SUFFIX, max_prompt=10_000
    )
    assert len(problems) == rows and said == [] and all(p.answers for p in problems)
    assert all(tokenizer.decode(p.prompt_ids).count("within \\boxed{}.") == 1 for p in problems)


@needs_data
def test_real_training_file_is_cleaned_and_counted(tokenizer, monkeypatch):
    held_out = [
        p
        for name in ("math500", "olympiad")
        for p in load(REAL_DATA / f"{name}.parquet", tokenizer, suffix=SUFFIX, max_prompt=10_000)[0]
    ]
    path, leaks = REAL_DATA / "dapo_math_train.parquet", []
    monkeypatch.setattr(data, "SHOWN_PER_KIND", 10**6)

    def report(source, bad, drop, say):  # both ways it can end, after reading 25,000 rows once
        with pytest.raises(UserError, match="mend them, or leave them out"):
            report_bad_rows(source, bad, False, leaks.append)
        report_bad_rows(source, bad, drop, say)

    monkeypatch.setattr(data, "report_bad_rows", report)
    problems, said = load(
        path, tokenizer, drop=True, suffix=SUFFIX, evaluation=held_out, max_prompt=10_000
    )
    counts = {
        kind: int(n)
        for n, kind in re.findall(r"(\d+) ([a-z-]+(?: [a-z]+)*)", said[0].split("left out")[1])
    }
    assert counts.pop("empty answer") == 2
    # the 7 problems of math500 and 11 of olympiad that occur in the training file, some of them in
    # several rows
    in_training = {
        line.split("the same problem is ")[1] for line in leaks if "the same problem is" in line
    }
    assert (
        sum("math500" in line for line in in_training) == 7
        and sum("olympiad" in line for line in in_training) == 11
    )
    # 1,510 rows repeat a prompt to the letter, 1,940 up to layout; 8 prompts have conflicting
    # answers
    assert counts["duplicate"] > 1_510 and counts["conflicting answers"] >= 16
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
    assert said == [f"{path}: left out 1 malformed"]
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
