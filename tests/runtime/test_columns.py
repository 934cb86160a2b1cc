"""Problem and answer are found by their usual names, or by the user's; where none fits, it is
said."""

import json

import pytest
from fixtures import bpe_tokenizer

from runtime.cli import UserError
from runtime.columns import ANSWER_COLUMNS, PROBLEM_COLUMNS, Columns, parse_row, take
from runtime.data import load_problems


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


def load(tmp_path, tokenizer, *rows, **options):
    """(problems, lines said) of a JSONL file with these rows."""
    path, said = tmp_path / "p.jsonl", []
    path.write_text("\n".join(map(json.dumps, rows)))
    problems = load_problems(str(path), tokenizer, max_prompt=500, say=said.append, **options)
    return problems, [line.replace(f"{path}: ", "") for line in said]


USUAL = {
    "DeepScaleR": {"problem": "1+1?", "answer": "2"},
    "GSM8K": {"question": "1+1?", "answer": "One and one is <<1+1=2>>2.\n#### 2"},
    "AIME on the hub": {"ID": "2024-I-1", "Problem": "1+1?", "Answer": 2},
    "verl": {
        "data_source": "x",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
    },
    "verl, several answers": {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": ["2"]},
    },
    "MATH without answers": {"problem": "1+1?", "solution": r"It is \boxed{3-1}, so \boxed{2}."},
    "text prompt": {"prompt": "1+1?", "ground_truth": "2"},
    "THUDM": {"prompt": "1+1?", "label": "2"},
    "OpenMath": {"problem": "1+1?", "generated_solution": "...", "expected_answer": "2"},
    "input and target": {"input": "1+1?", "target": 2.0},
    "instruction": {"instruction": "1+1?", "output": "2"},
    "a conversation": {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": r"So \boxed{2}."},
        ]
    },
    "parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}],
        "label": 2,
    },
    "a list in a text": {"prompt": '[{"role": "user", "content": "1+1?"}]', "answer": "2"},
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_columns(tmp_path, tokenizer, name):
    (problem,), said = load(tmp_path, tokenizer, USUAL[name])
    assert problem.text == "1+1?" and said == []
    assert problem.answers == (["2.0"] if name == "input and target" else ["2"])
    assert tokenizer.decode(problem.prompt_ids).count("1+1?") == 1
    assert tokenizer.decode(problem.prompt_ids).endswith("<|im_start|>assistant\n")


def test_final_answers_come_before_worked_ones_and_the_choice_is_said(tmp_path, tokenizer):
    rows = [{"solution": rf"\boxed{{{i}}}", "problem": f"{i}?", "answer": "7"} for i in range(3)]
    problems, said = load(tmp_path, tokenizer, *rows)
    assert [p.answers for p in problems] == [["7"]] * 3
    assert said == [
        "the problem is read from problem, the answer from answer, nothing from solution"
    ]
    row = {"input": "no", "prompt": "no", "question": "1?", "label": "8", "final_answer": "7"}
    (problem,), said = load(tmp_path, tokenizer, row | {"reward_model": {"ground_truth": 9}})
    assert (problem.text, problem.answers) == ("1?", ["7"])
    assert said == [
        "the problem is read from question, the answer from final_answer, "
        "nothing from prompt, input, reward_model.ground_truth, label"
    ]


def test_the_order_of_the_names_is_the_order_of_preference(tmp_path, tokenizer):
    for names, is_problem in ((PROBLEM_COLUMNS, True), (ANSWER_COLUMNS, False)):
        plain = [name for name in names if "." not in name and name != "instruction"]
        for better, worse in zip(plain, plain[1:], strict=False):
            row = {worse: "2", better: "1", ("answer" if is_problem else "problem"): "3"}
            if {better, worse} & {"messages"}:
                row["messages"] = [{"role": "user", "content": row["messages"]}]
            (problem,), said = load(tmp_path, tokenizer, row)
            assert (problem.text if is_problem else problem.answers[0]) == "1", (better, worse)
            assert f" {worse}" in said[0]


def test_a_stray_row_decides_no_column(tmp_path, tokenizer):
    rows = [{"question": f"{i}?", "target": i} for i in range(5)]
    problems, said = load(tmp_path, tokenizer, {"problem": "x", "answer": 1}, *rows, drop=True)
    assert [p.text for p in problems] == [f"{i}?" for i in range(5)]
    assert said == ["left out 1 malformed"]


def test_an_instruction_keeps_what_it_is_about(tmp_path, tokenizer):
    rows = [
        {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"},
        {"instruction": "What is 1+1?", "input": "", "output": "2"},
    ]
    problems, said = load(tmp_path, tokenizer, *rows)
    assert [p.text for p in problems] == ["Add the numbers.\n\n1, 2", "What is 1+1?"]
    assert said == []


def test_named_columns_and_fields_inside_them(tmp_path, tokenizer):
    row = {"problem": "id-7", "task": "1+1?", "meta": {"gold": {"value": 2}}, "a.b": "3"}
    (problem,), said = load(
        tmp_path, tokenizer, row, problem_column="task", answer_column="meta.gold.value"
    )
    assert (problem.text, problem.answers, said) == ("1+1?", ["2"], [])
    (problem,), _ = load(tmp_path, tokenizer, row, problem_column="task", answer_column="a.b")
    assert problem.answers == ["3"]  # a column whose name has a dot in it
    for options, message in (
        (
            {"problem_column": "tsk"},
            "--problem_column tsk: no such column in problem, task, meta.gold",
        ),
        (
            {"answer_column": "meta.x"},
            "--answer_column meta.x: no such column in problem, task, meta",
        ),
        ({"answer_column": "problem.x"}, "--answer_column problem.x: no such column in "),
    ):
        with pytest.raises(UserError) as stop:
            load(tmp_path, tokenizer, row, **options)
        assert message in str(stop.value) and "\n" not in str(stop.value)


def test_where_no_column_fits_the_columns_and_the_option_are_said(tmp_path, tokenizer):
    row = {"task": "1+1?", "answer": "2", "extra_info": {"index": 7}, "x\ny\ud800": None}
    with pytest.raises(UserError) as stop:
        load(tmp_path, tokenizer, row, row)
    names = r"task, answer, extra_info.index, x\ny\ud800"
    assert str(stop.value).endswith(
        f"p.jsonl: no column for the problem; --problem_column NAME, one of: {names}"
    )
    with pytest.raises(
        UserError, match="no column for the answer; --answer_column NAME, one of: problem, gold"
    ):
        load(tmp_path, tokenizer, {"problem": "1+1?", "gold": "2"})
    with pytest.raises(UserError) as stop:
        load(tmp_path, tokenizer, {f"column {i}": i for i in range(999)})
    assert len(str(stop.value)) < 500


def test_several_turns_are_shown_and_the_last_one_is_the_problem(tmp_path, tokenizer):
    shots = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    asked += "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2? Box it.<|im_end|>\n"
    answered = [*shots, {"role": "assistant", "content": "Four.\n#### 4"}]
    for row in ({"prompt": shots, "answer": 4}, {"messages": answered}, {"prompt": answered}):
        (problem,), said = load(tmp_path, tokenizer, row, suffix=" Box it.")
        assert (problem.text, problem.answers, said) == ("2+2?", ["4"], [])
        assert tokenizer.decode(problem.prompt_ids) == asked + "<|im_start|>assistant\n"
    (problem,), _ = load(tmp_path, tokenizer, {"prompt": answered, "answer": "IV"})
    assert problem.answers == ["IV"]  # a column is the better witness, and the turn stays hidden
    assert "#### 4" not in tokenizer.decode(problem.prompt_ids)


MALFORMED = [
    ({"prompt": []}, 'no text in the field "prompt", nor messages'),
    ({"prompt": 7}, 'no text in the field "prompt", nor messages'),
    ({"prompt": ["a"]}, 'no text in a message of the field "prompt"'),
    ({"prompt": [{"role": "user", "content": None}]}, 'no text in a message of the field "prompt"'),
    ({"prompt": [{"content": "a"}]}, 'no text in a message of the field "prompt"'),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "no text in a message of the"),
    ({"prompt": [{"role": "assistant", "content": "4"}]}, "has an answer, but no problem"),
    ({"prompt": "[{'role': 'user', 'content': 'a'}]"}, "messages that are not JSON"),
    (
        {"prompt": "a", "reward_model": "x"},
        'the field "reward_model.ground_truth" lacks the answer',
    ),
    ({"prompt": " \n"}, "the problem is empty"),
    (
        {"prompt": "a \ud83d b"},
        'half a character (the lone surrogate \\ud83d) in the field "prompt"',
    ),
    (
        {"prompt": "a", "reward_model": {"ground_truth": ["7", "\udc00"]}},
        'half a character (the lone surrogate \\udc00) in the field "reward_model.ground_truth"',
    ),
]


@pytest.mark.parametrize("row, message", MALFORMED)
def test_malformed_rows_name_the_field(row, message):
    row = {"reward_model": {"ground_truth": "7"}} | row
    with pytest.raises(ValueError) as stop:
        parse_row(row, Columns("prompt", "reward_model.ground_truth"))
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_a_lone_surrogate_is_a_malformed_row_with_file_and_line(tmp_path, tokenizer):
    good = {"problem": "1+1?", "answer": "2"}
    for row, column in (
        ({"problem": "a \ud800", "answer": "1"}, "problem"),
        ({"problem": "a", "answer": "\ud800"}, "answer"),
    ):
        problems, said = load(tmp_path, tokenizer, good, row, drop=True)
        assert len(problems) == 1 and said == ["left out 1 malformed"]
        said = []
        with pytest.raises(UserError, match="1 malformed"):
            load_problems(str(tmp_path / "p.jsonl"), tokenizer, max_prompt=99, say=said.append)
        assert said == [
            f"malformed: {tmp_path}/p.jsonl, line 2: half a character (the lone surrogate \\ud800) "
            f'in the field "{column}"'
        ]


def test_an_emoji_written_as_two_escapes_is_a_whole_character(tmp_path, tokenizer):
    (problem,), _ = load(tmp_path, tokenizer, {"problem": "\U0001f600?", "answer": "2"})
    assert problem.text == "\U0001f600?"


def test_take_reaches_into_fields_and_never_further():
    row = {"a": {"b": {"c": 1}}, "a.b": 2, "x": "text"}
    assert [take(row, name) for name in ("a.b", "a.b.c", "a", "x.y", "", "a.q.c")] == [
        2,
        1,
        {"b": {"c": 1}},
        None,
        None,
        None,
    ]
