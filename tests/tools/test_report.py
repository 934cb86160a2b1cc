"""test_report.py: the command of tools/report.py. Numbers and tables: runtime/test_results.py.

python -m pytest tests/tools/test_report.py
"""

import pytest
from result_files import sample_line, write

from runtime.cli import stop_on_user_error
from runtime.results import read_results, results_table
from tools import report


def test_the_command_prints_tables_and_comparisons(tmp_path, capsys):
    a, b = (
        write(tmp_path / "a.jsonl", [[1, 0], [0, 0]]),
        write(tmp_path / "b.jsonl", [[1, 1], [0, 0]]),
    )
    report.main([str(a), str(b), str(a)])  # given twice, shown once
    assert capsys.readouterr().out == results_table([read_results(a), read_results(b)]) + "\n"
    report.main(["--compare", str(a), str(b)])
    assert "| B - A " in capsys.readouterr().out


@pytest.mark.parametrize(
    "number, content, words",
    [
        (1, b"", "line 1: "),
        (1, b"[]", "line 1: not a JSON object"),
        (1, b"{}", "line 1: no settings with a number 'k'"),
        (1, b'{"problem": "1+1", "answer": "2"}', "line 1: no settings"),
        (1, b'{"settings": {"k": 0, "questions": 1}}', "line 1: no settings"),
        (1, b'{"settings": {"k": true, "questions": 1}}', "line 1: no settings"),
        (1, b'{"settings": {"k": 2}}', "line 1: |'questions'"),
        (2, b"", "line 2: "),
        (2, b"7", "line 2: not a JSON object"),
        (3, b"\xff", "line 3: "),
        (3, b"[" * 10**6, "line 3: "),
        (3, b'{"source": ', "line 3: "),
        (2, sample_line(reward="1"), "line 2: the field 'reward' is no finite number"),
        (2, sample_line(reward=float("nan")), "line 2: the field 'reward'"),
        (2, sample_line(tokens=None), "line 2: the field 'tokens' is no int"),
        (2, sample_line(finished=1), "line 2: the field 'finished' is no bool"),
        (2, sample_line(problem=7), "line 2: the field 'problem' is no str"),
        (3, sample_line(), r"line 3: sample 0, but sample 1 is expected here (k = 2)"),
        (3, sample_line(sample=1, problem="x"), "line 3: another problem"),
        (4, sample_line(sample=2), "line 4: sample 2, but sample 0 is expected here (k = 2)"),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_a_broken_line_is_named(number, content, words, tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", [[1, 0], [0, 0]])
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = content
    path.write_bytes(b"\n".join(lines))
    for command in ([str(path)], ["--compare", str(path), str(path)]):
        with pytest.raises(SystemExit) as stop, stop_on_user_error("tools.report"):
            report.main(command)
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and len(error.splitlines()) == 1
            and error.startswith(f"tools.report: {path}, ")
        ), error
        assert all(word in error for word in words.split("|")), error
