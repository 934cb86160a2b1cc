"""test_eval.py: the evaluation command, the suite, stop and go on; prepared responses, real problem
files."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures import (
    REAL_DATA,
    ROOT,
    TOY_MODEL,
    bpe_tokenizer,
    lines,
    same_file,
    save_real_model,
    typed,
)
from launch import run

import attnrl
import eval as evaluation
from runtime.cli import UserError, stop_on_user_error
from runtime.data import PROMPT_SUFFIX, load_problems
from runtime.models import load_model
from runtime.results import read_results
from runtime.rollout import Completion
from toy.programs import toy_solution


def test_evaluation_command_writes_one_line_per_sample(tmp_path, capsys):
    options = typed("--problems toy:6:20:5 --k 4 --temperature 1")
    evaluation.main(["--model", str(TOY_MODEL), *options, "--out", str(tmp_path / "r")])
    text = capsys.readouterr().out
    settings, *rows = [
        json.loads(line) for line in (tmp_path / "r" / "toy-6-20-5.jsonl").read_text().splitlines()
    ]
    expected = {"model": str(TOY_MODEL), "k": 4, "questions": 20, "temperature": 1.0, "seed": 0}
    assert expected.items() <= settings["settings"].items()
    assert (
        len(rows) == 80
        and [row["sample"] for row in rows] == [0, 1, 2, 3] * 20
        and len({row["seed"] for row in rows}) == 80
    )
    average = 100 * sum(row["reward"] for row in rows) / 80
    assert f"| 20        | 4 | {average:.1f} [" in text and "pass@2" in text and "pass@4" in text
    tokenizer = load_model(str(TOY_MODEL), "cpu")[1]
    for row in rows:  # the grade is what a look at the text says
        assert (f"\\boxed{{{row['answers'][0]}}}" in row["response"]) == bool(row["reward"])
        assert row["boxed"] == ("boxed{" in row["response"]) and row["error"] == ""
        # the end token
        assert row["tokens"] == len(tokenizer(row["response"])["input_ids"]) + row["finished"]


# --------------------------------------------------------------------------------------------------
# Stop and go on
# --------------------------------------------------------------------------------------------------
EVALUATION = [
    "--model",
    str(TOY_MODEL),
    *typed("--problems toy:4:10:1 b=toy:4:6:2 --k 2 --temperature 1"),
]
BOTH = ("toy-4-10-1.jsonl", "b.jsonl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, what was printed below its name) of EVALUATION from beginning to end, 8 responses at
    a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, evaluate_again(folder)


def evaluate_again(folder: Path, *options: str) -> str:
    """The command in this process; returns the table."""
    with (
        pytest.MonkeyPatch.context() as patch,
        open(folder.parent / f"{folder.name}.txt", "w+") as said,
    ):
        patch.setattr(evaluation, "CHUNK", 8)
        patch.setattr(sys, "stdout", said)
        evaluation.main([*EVALUATION, "--out", str(folder), *options])
        said.seek(0)
        return said.read().partition("\n")[2]


@pytest.mark.parametrize(
    "first, second",
    [
        (0, None),
        (50, None),
        (None, 0),
        (None, None),
        ("8 lines", None),
        ("13 lines", None),
        ("16 lines and half", None),
        ("all but a byte", 0),
        ("all", "3 lines and half"),
        ("all", "all"),
    ],
)
def test_wherever_it_was_cut_it_ends_the_same(first, second, undisturbed, tmp_path):
    """Both files are cut at a place where a killed process may have left them (None: not there)."""
    whole, table = undisturbed
    for name, cut in zip(BOTH, (first, second)):
        content = (whole / name).read_bytes()
        ends = [i + 1 for i, byte in enumerate(content) if byte == 10]
        if isinstance(cut, str) and "line" in cut:
            number = int(cut.split()[0])
            cut = ends[number] + (ends[number + 1] - ends[number]) // 2 * ("half" in cut)
        if cut is not None:
            (tmp_path / name).write_bytes(
                content[: {"all": None, "all but a byte": -1}.get(cut, cut)]
            )
    if first is None and second is None:
        tmp_path = tmp_path / "new" / "folder"
        tmp_path.parent.mkdir()
    assert evaluate_again(tmp_path) == table
    for name in BOTH:
        same_file(tmp_path / name, whole / name)


def test_a_killed_evaluation_goes_on_and_ends_the_same(tmp_path, capsys):
    """A real SIGKILL of a real process, after the first responses were written; then the same
    command again."""
    command = [
        "--model",
        str(TOY_MODEL),
        *typed("--problems toy:6:64:2 toy:4:8:2 --k 8 --temperature 1 --out"),
    ]
    process = subprocess.Popen(
        [sys.executable, "eval.py", *command, tmp_path / "killed"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        # as here: the same rounding
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    file, deadline = tmp_path / "killed" / "toy-6-64-2.jsonl", time.monotonic() + 120
    while (
        not (file.exists() and file.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 < file.read_bytes().count(b"\n") < 1 + 64 * 8  # some, not all
    tables = []
    for name in ("killed", "whole"):
        evaluation.main([*command, str(tmp_path / name)])
        tables.append(capsys.readouterr().out.partition("\n")[2])
    assert tables[0] == tables[1] and "| mean of 2 " in tables[0]
    for path in (tmp_path / "whole").iterdir():
        same_file(tmp_path / "killed" / path.name, path)


def test_a_finished_evaluation_is_not_sampled_again(undisturbed, monkeypatch):
    monkeypatch.setattr(evaluation.TransformersEngine, "generate", None)
    assert evaluate_again(undisturbed[0]) == undisturbed[1]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--k", "1"], "k 2 -> 1"),
        (["--k", "4", "--seed", "1"], "k 2 -> 4; |seed 0 -> 1"),
        (["--temperature", "0.5"], "temperature 1.0 -> 0.5"),
        (["--max_response", "20"], "max_response |-> 20"),
        (["--reward", "runtime.grading:last_box"], "reward 'boxed' -> 'runtime.grading:last_box'"),
        (["--dtype", "bf16"], "dtype 'fp32' -> 'bf16'"),
        (["--problems", "toy-4-10-1=toy:4:10:3"], "problems 'toy:4:10:1' -> |prompts "),
        (["--problems", "toy-4-10-1=toy:4:9:1"], "questions 10 -> 9"),
    ],
)
def test_going_on_with_other_settings_is_refused(options, words, undisturbed, capsys):
    folder = undisturbed[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="other settings") as error:
        evaluate_again(folder, *options)
    assert all(word in str(error.value) for word in words.split("|")) and "toy-4-10-1.jsonl" in str(
        error.value
    ), error.value
    assert all(path.read_bytes() == content for path, content in before.items())


def test_going_on_with_other_weights_in_the_same_folder_is_refused(tmp_path):
    """A checkpoint's link `last` leads elsewhere after a while."""
    first, second = (
        save_real_model(tmp_path / name, vocab_size=400 + extra)
        for name, extra in (("a", 0), ("b", 8))
    )
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem": "1+1?", "answer": "2"}')
    link = tmp_path / "last"
    link.symlink_to(first)
    command = [
        "--model",
        str(link),
        "--problems",
        str(problems),
        *typed("--k 1 --max_response 2"),
        "--out",
        str(tmp_path / "out"),
    ]
    evaluation.main(command)
    link.unlink()
    link.symlink_to(second)
    with pytest.raises(UserError, match=r"other settings \(weights '"):
        evaluation.main(command)


def test_a_damaged_line_is_named_before_anything_is_sampled(undisturbed, tmp_path):
    content = (undisturbed[0] / BOTH[0]).read_bytes().split(b"\n")
    (tmp_path / BOTH[0]).write_bytes(b"\n".join([*content[:5], content[5][:40], *content[6:]]))
    with pytest.raises(UserError, match="toy-4-10-1.jsonl, line 6: "):
        evaluate_again(tmp_path)
    # a whole question is lacking
    (tmp_path / BOTH[0]).write_bytes(b"\n".join(content[:3] + content[5:]))
    with pytest.raises(UserError, match="toy-4-10-1.jsonl, line 4: not the expected problem"):
        evaluate_again(tmp_path)


# --------------------------------------------------------------------------------------------------
# The paper's suite
# --------------------------------------------------------------------------------------------------
SIX = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad"]


def test_the_suite_has_the_settings_of_the_paper_and_of_training():
    others = [f"d/{name}.parquet" for name in SIX if name != "math500"]
    args = evaluation.parse(
        ["--model", "m", "--suite", "paper", "--problems", "math500=x.jsonl", *others]
    )
    assert args.sets == {
        "aime24": ("d/aime24.parquet", 32),
        "aime25": ("d/aime25.parquet", 32),
        "amc23": ("d/amc23.parquet", 32),
        "math500": ("x.jsonl", 4),
        "minerva": ("d/minerva.parquet", 4),
        "olympiad": ("d/olympiad.parquet", 4),
    }
    assert list(args.sets) == SIX
    training = attnrl.parse_config(
        ["--preset", "paper", "--model", "m", "--problems", "p", "--test_problems", "t"]
    )
    assert (args.temperature, args.max_response, args.max_prompt) == (0.6, 32768, 1024)
    assert args.prompt_suffix == training.prompt_suffix
    # while training at 8,192 tokens; 32,768 belong to the final evaluation
    assert (training.eval_max_response, training.eval_every) == (8192, 20)
    assert (training.eval_temperature, training.eval_samples) == (0.6, args.sets["aime24"][1])


def test_options_given_by_hand_override_the_suite(capsys):
    args = evaluation.parse(
        [
            *typed(
                "--model m --suite paper --subset --problems minerva.jsonl aime24=toy --k 2"
                " --temperature 1 --max_response 50"
            ),
            "--prompt_suffix",
            "",
        ]
    )
    assert args.sets == {"aime24": ("toy", 2), "minerva": ("minerva.jsonl", 2)}
    assert (args.temperature, args.max_response, args.prompt_suffix) == (1.0, 50, "")
    assert (
        capsys.readouterr().out
        == "only a subset of --suite paper: without aime25, amc23, math500, olympiad\n"
    )


def asked(model, *options) -> tuple[str, str]:
    """(the prompt's suffix, whose it is)."""
    args = evaluation.parse(["--model", str(model), "--problems", "minerva.jsonl", *options])
    return args.prompt_suffix, args.asked_by


def test_one_prompt_everywhere_typed_then_the_suites_then_the_models_then_the_default(tmp_path):
    """A trained model's folder says how it was asked."""
    run = attnrl.parse_config([])
    run.prompt_suffix = " Box it."
    (tmp_path / "run.json").write_text(json.dumps({"config": dataclasses.asdict(run)}))
    suite = ["--suite", "paper", "--subset"]
    mine = ["--prompt_suffix", " Mine."]
    assert asked(tmp_path, *mine) == (" Mine.", "as given")
    assert asked(tmp_path, *mine, *suite) == (" Mine.", "as given")
    assert asked(tmp_path, *suite) == (PROMPT_SUFFIX, "that of --suite paper")
    assert asked(tmp_path) == (" Box it.", "as the model was trained")
    assert asked(TOY_MODEL) == (PROMPT_SUFFIX, "the default")
    assert attnrl.Config().prompt_suffix == PROMPT_SUFFIX
    assert asked(tmp_path, "--prompt_suffix", "") == ("", "as given")
    (tmp_path / "run.json").write_text("{")  # damaged, or something else's
    assert asked(tmp_path) == (PROMPT_SUFFIX, "the default")


@pytest.mark.full
def test_a_model_is_evaluated_with_the_prompts_of_its_training(tmp_path):
    """The real commands, with a real tokenizer: the same prompts, by number of tokens."""
    model, problems = save_real_model(tmp_path / "m"), tmp_path / "p.jsonl"
    rows = [{"problem": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(6)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = typed(
        "--steps 1 --batch_size 2 --max_response 8 --eval_max_response 8 --group_size 2"
    )
    where = [
        "--model",
        model,
        "--problems",
        problems,
        "--test_fraction",
        "0.3",
        "--out",
        tmp_path / "r",
    ]
    said, _ = run("attnrl.py", "--preset", "toy", *where, *options, "--prompt_suffix", " Box it.")
    assert "prompts end in ' Box it.' (--prompt_suffix)" in said
    assert "2 problems: a change of less than 98 points may be chance" in said
    evaluate = ["eval.py", "--model", tmp_path / "r/last", "--problems", problems]
    evaluate += typed("--k 1 --max_response 8")
    text, _ = run(*evaluate, "--out", tmp_path / "e")
    assert "prompts end in ' Box it.' (as the model was trained; --prompt_suffix)" in text
    assert "graded with" not in text
    assert lines(tmp_path / "e/p.jsonl")[0]["settings"]["prompt_suffix"] == " Box it."
    text, _ = run(*evaluate, "--reward", "number", "--out", tmp_path / "n")
    assert "graded with --reward number; in training it was boxed" in text


# --------------------------------------------------------------------------------------------------
# Prepared responses through the real command and the real grader
# --------------------------------------------------------------------------------------------------
class Prepared:
    """An engine that says what it was given: (response, finished), one per request."""

    def __init__(self, said: list[tuple[str, bool]]):
        self.said, self.tokenizer = iter(said), bpe_tokenizer()

    def __call__(self, model, eos_ids):
        self.eos_ids = eos_ids
        return self

    def generate(self, requests):
        said = [
            (self.tokenizer.encode(text), finished)
            for text, finished in itertools.islice(self.said, len(requests))
        ]
        return [
            Completion(tokens + self.eos_ids[:1] * finished, [], finished)
            for tokens, finished in said
        ]

    def close(self):
        pass


GOLDS = ["204", "\\frac{1}{2}", "3\\sqrt{2}", "(1, 2]"]
PREPARED = [  # 4 questions x 4 samples; True: ended by itself
    # all right, each in its way: as the gold, among others, after thinking, cut off behind its box
    (r"So \boxed{204}.", True),
    (r"\boxed{7} or rather \boxed{204}", True),
    (r"<think>\boxed{1}</think> \boxed{204.0}", True),
    (r"\boxed{204} and now", False),
    # 2 of 4 right: equal by value, by computer algebra; wrong; without a box
    (r"\boxed{0.5}", True),
    (r"\boxed{\sqrt{\frac14}}", True),
    (r"\boxed{\frac{1}{3}}", True),
    (r"It is \frac{1}{2}.", True),
    # 1 of 4: computer algebra; wrong; cut off in the box and before it
    (r"\boxed{\sqrt{18}}", True),
    (r"\boxed{2\sqrt{3}}", True),
    (r"\boxed{3\sqrt{2", False),
    ("Let me think", False),
    # none: the other interval; a box only inside the thinking; an empty box; nothing at all
    ("\\boxed{[1, 2)}", True),
    (r"<think>\boxed{(1, 2]}</think> done", True),
    (r"\boxed{}", True),
    ("", True),
]


def test_prepared_responses_give_exactly_this_table(tmp_path, monkeypatch, capsys):
    """avg@4 = mean of 1, 1/2, 1/4, 0; pass@2 = mean of 1, 1 - C(2,2)/6 = 5/6, 1 - C(3,2)/6 = 1/2,
    0; pass@4 = 3/4. The intervals are those of all 256 ways to draw 4 of 4 questions. 5 of 16 have
    no closed box after the thinking, 4 a wrong one, and 3 were cut off."""
    model = save_real_model(tmp_path / "model")
    problems = tmp_path / "four.jsonl"
    problems.write_text(
        "".join(
            json.dumps({"problem": f"Problem {i}?", "answer": gold}) + "\n"
            for i, gold in enumerate(GOLDS)
        )
    )
    monkeypatch.setattr(evaluation, "TransformersEngine", Prepared(PREPARED))
    capsys.readouterr()
    evaluation.main(
        [
            "--model",
            str(model),
            "--problems",
            str(problems),
            "--k",
            "4",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    samples = read_results(tmp_path / "out" / "four.jsonl").samples
    assert [s.response for s in samples] == [text for text, _ in PREPARED]
    assert [s.reward for s in samples] == [1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert [i for i, s in enumerate(samples) if not s.boxed] == [7, 10, 11, 13, 15]
    assert [i for i, s in enumerate(samples) if not s.finished] == [3, 10, 11]
    tokens = sum(len(bpe_tokenizer().encode(text)) + finished for text, finished in PREPARED) / 16
    draws = list(itertools.product(range(4), repeat=4))
    assert ends((1, 1 / 2, 1 / 4, 0), draws) == [12.5, 81.25] and ends(
        (1, 5 / 6, 1 / 2, 0), draws
    ) == [20.83, 91.67]
    assert ends((1, 1, 1, 0), draws) == [25, 100]
    asked, _, table = capsys.readouterr().out.split("\n", 2)
    assert asked.startswith(f"prompts end in {PROMPT_SUFFIX!r} (the default")
    assert table == "\n".join(
        [
            "| set  | questions | k | avg@k             | tokens | cut off | no box | wrong |"
            " not graded |",
            "|------|-----------|---|-------------------|--------|---------|--------|-------|"
            "------------|",
            f"| four | 4         | 4 | 43.8 [12.5, 81.2] | {tokens:<6.0f} | 18.8    | 31.2   |"
            " 25.0  | 0.0        |",
            "",
            "| set  | pass@1            | pass@2            | pass@4             |",
            "|------|-------------------|-------------------|--------------------|",
            "| four | 43.8 [12.5, 81.2] | 58.3 [20.8, 91.7] | 75.0 [25.0, 100.0] |",
            "",
        ]
    )


def ends(values, draws) -> list[float]:
    """In percent: where the lowest and the highest 2.5 % of all draws begin."""
    means = sorted(sum(values[i] for i in draw) / 4 for draw in draws)
    return [
        round(100 * means[int(0.025 * len(means))], 2),
        round(100 * means[-1 - int(0.025 * len(means))], 2),
    ]


REAL = ["aime24", "math500", "minerva", "olympiad"]
needs_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"real problem files are not at {REAL_DATA}"
)
REAL_SUITE = [
    *typed("--suite paper --subset --problems"),
    *(str(REAL_DATA / f"{name}.parquet") for name in REAL),
    "--max_prompt",
    "8000",
]


@needs_data
def test_real_files_with_prepared_responses_give_exactly_this_table(tmp_path, monkeypatch, capsys):
    """Every question: its gold boxed, an empty box, the gold without a box, the gold in a box that
    was cut off: 1 of 4 right."""
    model = save_real_model(tmp_path / "model", max_position_embeddings=16384)
    tokenizer, said = bpe_tokenizer(), []
    for name in REAL:
        for p in load_problems(str(REAL_DATA / f"{name}.parquet"), tokenizer, max_prompt=8000):
            gold = p.answers[-1]
            said += [
                (f"\\boxed{{{gold}}}", True),
                ("\\boxed{}", True),
                (gold, True),
                (f"\\boxed{{{gold}", False),
            ]
    monkeypatch.setattr(evaluation, "TransformersEngine", Prepared(said))
    capsys.readouterr()
    evaluation.main(
        [
            "--model",
            str(model),
            *REAL_SUITE,
            *typed("--k 4 --max_response 8000"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    rows = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    shares = ["25.0 [25.0, 25.0]", "25.0", "50.0", "25.0", "0.0"]
    assert [row[:4] + row[5:] for row in rows[1:6]] == [
        *([name, str(n), "4", *shares] for name, n in zip(REAL, (30, 500, 272, 674))),
        ["mean of 4", "", "", *shares],
    ]
    assert [row[1:] for row in rows[7:]] == [
        ["25.0 [25.0, 25.0]", "50.0 [50.0, 50.0]", "100.0 [100.0, 100.0]"]
    ] * 5


# --------------------------------------------------------------------------------------------------
# The other uses of the command
# --------------------------------------------------------------------------------------------------
def test_ask_streams_one_answer():
    program = "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"
    text, notes = run("eval.py", "--model", TOY_MODEL, "--ask", program, "--temperature", 0)
    assert text == toy_solution(program) + "\n"
    assert "left out, the model's tokenizer cannot write it" in notes


@pytest.mark.parametrize(
    "options, end",
    [
        ("--answer 6", "\\boxed{6}\n(right)\n"),
        ("--answer 5", "\\boxed{6}\n(wrong)\n"),
        (
            "--answer 6 --max_response 9",
            "(cut off after 9 tokens; --max_response)\n(wrong: no answer to grade)\n",
        ),
        (
            "--answer 4 --max_response 5 --reward number",
            "(cut off after 5 tokens; --max_response)\n(right)\n",
        ),
    ],
)
def test_ask_says_cut_off_and_the_grade(options, end, capsys):
    program = "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"
    evaluation.main(
        ["--model", str(TOY_MODEL), "--ask", program, "--temperature", "0", *typed(options)]
    )
    assert capsys.readouterr().out.endswith(end)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--problems", "toy"], "--model"),
        (["--model", "nowhere", "--problems", "toy"], "--model nowhere: cannot be loaded"),
        (
            ["--model", TOY_MODEL, "--problems", "nowhere.jsonl"],
            "nowhere.jsonl: no such problem file",
        ),
        (
            ["--model", TOY_MODEL, "--problems", "toy", "--k", "0"],
            "--k 0: must be a number, at least 1",
        ),
        (["--model", TOY_MODEL, "--problems", "toy", "--temperature", "nan"], "--temperature nan"),
        (["--model", TOY_MODEL, "--problems", "toy", "--ask", "x"], "not allowed with"),
        (
            ["--model", TOY_MODEL, "--problems", "toy", "--max_response", "100000"],
            "more than the model's",
        ),
        (["--model", TOY_MODEL, "--ask", ""], "the problem is empty"),
        (
            ["--model", TOY_MODEL, "--problems", "toy:8:5", "--out", "/dev/null/x"],
            "--out /dev/null/x: cannot be written",
        ),
        (
            ["--model", TOY_MODEL, "--problems", "toy", "--device", "cud"],
            "argument --device: invalid choice: 'cud'",
        ),
        (
            ["--model", TOY_MODEL, "--problems", "toy", "--reward", "math:pi"],
            "--reward math:pi: is not a function",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop, stop_on_user_error("eval.py"):
        evaluation.main([str(a) for a in args])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1


@needs_data
@pytest.mark.full
def test_the_four_real_files_run_through_it_with_a_tiny_model_that_gets_everything_wrong(
    tmp_path, capsys
):
    model = save_real_model(
        tmp_path / "model",
        max_position_embeddings=16384,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    capsys.readouterr()
    evaluation.main(
        [
            "--model",
            str(model),
            *REAL_SUITE,
            *typed("--k 2 --max_response 4"),
            "--out",
            str(tmp_path / "r"),
        ]
    )
    text = capsys.readouterr().out
    assert text.startswith("only a subset of --suite paper: without aime25, amc23\n")
    for name, count in zip(REAL, (30, 500, 272, 674)):
        assert len((tmp_path / "r" / f"{name}.jsonl").read_bytes().splitlines()) == 1 + 2 * count
        assert [
            line.split("|")[2:5] for line in text.splitlines() if line.startswith(f"| {name} ")
        ][0] == [f" {count:<9} ", " 2 ", " 0.0 [0.0, 0.0] "]
