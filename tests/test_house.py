"""test_house.py: what may import what, and how long things may be. See CONTRIBUTING.md.

python -m pytest tests/test_house.py
"""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
from fixtures import ROOT

READING_PATH = ("fci", "tree", "sampler", "learner", "attnrl")
TOP = (*READING_PATH, "baselines", "eval")
COLUMNS, LINES, FUNCTION, METHODS = 100, 1300, 40, 10
# runtime/ and tools/: a function that draws four panels or reads a table of formulas is no shorter
LONGEST_FUNCTION = 95


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {
    module_of(path): path
    for folder in (ROOT, ROOT / "runtime", ROOT / "tools", ROOT / "toy")
    for path in sorted(folder.glob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def names_imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in inside]
    return []


def when_imported(node: ast.AST):
    """All statements that run when the module is imported: not those of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from when_imported(child)


def imports(name: str, anywhere: bool = False) -> set[str]:
    """The project's modules that a module imports: at its top level, or anywhere in it."""
    nodes = ast.walk(TREES[name]) if anywhere else when_imported(TREES[name])
    found = {imported for node in nodes for imported in names_imported(node)}
    return {m for m in found if m in MODULES or m.partition(".")[0] in ("runtime", "tools", "toy")}


def test_the_reader_of_the_code_finds_the_imports_that_this_file_checks():
    """The rules below would hold for a checker that sees nothing."""
    assert {"fci", "runtime.scoring", "tree", "sampler"} <= imports("attnrl") | imports("learner")
    assert "runtime.dist" in imports("learner") and "tools.view" in imports("attnrl", True)


@pytest.mark.parametrize("name", ["fci", "tree", "sampler"])
def test_the_method_imports_nothing_of_the_project(name):
    assert imports(name, anywhere=True) == set()


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("runtime")])
def test_runtime_knows_no_method_and_no_tool(name):
    forbidden = {"attnrl", "eval", "learner", "baselines"}
    assert not imports(name, anywhere=True) & forbidden
    assert not [m for m in imports(name) if m.startswith("tools")]
    toy = {"toy.programs"} if name == "runtime.data" else set()
    assert {m for m in imports(name) if m.startswith("toy")} <= toy


def test_the_learner_never_meets_a_baseline():
    assert imports("learner") <= {"tree", "fci"} | {m for m in MODULES if m.startswith("runtime")}
    assert not imports("baselines", True) & {"attnrl", "eval", "learner"}


@pytest.mark.parametrize("name", [m for m in MODULES if not m.startswith("tools")])
def test_nothing_imports_tools_at_module_level(name):
    assert not [m for m in imports(name) if m.startswith("tools")]


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in imports(name) & MODULES.keys():
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def python_files() -> list[Path]:
    folders = ("runtime", "tools", "toy", "bench", "experiments", "recipes", "tests")
    return [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py"))]


def test_no_line_is_longer_than_100_columns():
    long = []
    for path in python_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > COLUMNS:
                long.append(f"{path.relative_to(ROOT)}:{number}")
    assert not long


def functions(name: str) -> list[tuple[str, int]]:
    found = [
        n for n in ast.walk(TREES[name]) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [(f"{name}.{n.name}", n.end_lineno - n.lineno + 1) for n in found]


@pytest.mark.parametrize("name", TOP)
def test_functions_and_classes_of_the_reading_path_are_short(name):
    assert [f for f in functions(name) if f[1] > FUNCTION] == []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            assert len(methods) <= METHODS, node.name


@pytest.mark.parametrize("name", [m for m in MODULES if "." in m])
def test_no_function_beside_it_is_a_page_long(name):
    assert [f for f in functions(name) if f[1] > LONGEST_FUNCTION] == []


@pytest.mark.parametrize("name", MODULES)
def test_the_tests_that_a_module_names_are_there(name):
    named = re.findall(r"pytest ((?:tests/\S+\.py ?)+)", MODULES[name].read_text(encoding="utf-8"))
    lacking = [p for line in named for p in line.split() if not (ROOT / p).exists()]
    assert not lacking


def explained_lines(text: str) -> int:
    """Lines of docstrings, and lines with a comment."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines.add(token.start[0])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_reading_path_takes_twenty_minutes():
    texts = [MODULES[name].read_text(encoding="utf-8") for name in READING_PATH]
    lines = sum(len(text.splitlines()) for text in texts)
    assert lines <= LINES, "CONTRIBUTING.md says what to do in a fork"
    explained = sum(map(explained_lines, texts))
    assert explained >= lines / 3, (
        f"{explained} of {lines} lines are docstrings or have a comment; a third is wanted"
    )


def test_the_functions_of_outside_checks_keep_their_places_and_signatures():
    import eval as evaluation
    import fci
    import tree

    def parameters(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(fci.fci_scores) == ["model", "prompt_ids", "response_ids", "bounds", "delta"]
    assert parameters(fci.split_steps) == ["tokens", "separators"]
    assert parameters(fci.separator_tokens) == ["tokenizer"]
    assert parameters(tree.step_advantages) == ["responses"]
    assert parameters(evaluation.grade)[:2] == ["response", "answers"]
    assert evaluation.grade(r"so \boxed{\frac12}", ["0.5"]) is True


def test_the_old_name_of_the_default_reward_still_works():
    from attnrl import parse_config

    assert parse_config(["--reward", "eval:grade"]).reward == parse_config([]).reward == "boxed"
