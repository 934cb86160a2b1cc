"""The README tells the truth: equations stand where it says, line counts and switches are those of
the code."""

import re
import subprocess
import sys
from dataclasses import fields

from fixtures import ROOT

from attnrl import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")


def equation_rows() -> list[tuple[str, str, str]]:
    """(equation, file:line, test) of every row of the README's equation table."""
    return re.findall(
        r"^\| AttnRL (Eq\. \d+) \|.*\| `(\w+\.py:\d+)` \| `(\w+\.py::\w+)` \|$",
        README,
        re.MULTILINE,
    )


def equation_lines() -> dict[str, str]:
    """Where the code computes each equation: the lines that carry "# AttnRL Eq. N"."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := re.search(r"\S.*# AttnRL (Eq\. \d+)", line):
                found[match[1]] = f"{path.name}:{number}"
    return found


def test_equation_table_points_at_the_lines_that_compute_them():
    assert dict((equation, line) for equation, line, _ in equation_rows()) == equation_lines()
    assert {int(e.split()[1]) for e in equation_lines()} == set(range(1, 11))


def test_every_equation_has_a_test_with_its_number_in_the_name():
    for equation, _, test in equation_rows():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
        assert f"eq{equation.split()[1]}" in name


def test_line_counts_are_right_and_the_reading_path_is_short():
    rows = dict(re.findall(r"`(\w+\.py)` \| (\d+) \|", README))
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in rows}
    assert {name: int(count) for name, count in rows.items()} == lines
    path = ("attnrl", "rollout", "fci", "tree", "sampler", "learner", "eval", "data")
    assert sum(lines[f"{name}.py"] for name in path) <= 2200


def test_the_table_of_timings_is_that_of_the_results():
    printed = subprocess.run(
        [sys.executable, ROOT / "bench" / "measure.py", "--markdown"],
        capture_output=True,
        text=True,
    )
    assert printed.stdout.count("\n") > 10 and printed.stdout in README
    computed = subprocess.run(
        [sys.executable, ROOT / "bench" / "scale.py", "--model"], capture_output=True, text=True
    ).stdout
    assert computed.count("\n") == 8 and computed in (ROOT / "bench" / "scale.md").read_text(
        encoding="utf-8"
    )


def test_every_switch_in_the_readme_exists():
    switches = set(
        re.findall(r"--([a-z_]+)", README.split("## Switches")[1].split("## A run's folder")[0])
    ) - {"help"}
    assert switches <= {f.name for f in fields(Config)}
