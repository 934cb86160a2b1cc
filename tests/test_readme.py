"""README and docs tell the truth: equations are where they say, counts, tables, switches, tests,
names and links are those of the project.

    python -m pytest tests/test_readme.py
    python tests/test_readme.py --renew     # put line numbers, line counts and tables right

The second one is for after a change of the code: it rewrites what is copied from elsewhere.
"""

import importlib
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
READING_PATH = ("fci.py", "tree.py", "sampler.py", "learner.py", "attnrl.py")
PAGES = sorted(
    [ROOT / "README.md", ROOT / "experiments" / "README.md", ROOT / "toy" / "README.md"]
    + [ROOT / "bench" / "scale.md", ROOT / "recipes" / "smollm2" / "README.md"]
    + [*(ROOT / "docs").glob("*.md")]
)
# The comment that marks the line of each formula in the README's table. Its own line computes it,
# or the next line of code does.
MARKERS = {f"AttnRL Eq. {n}": rf"# AttnRL Eq\. {n}\b" for n in range(1, 11)} | {
    "aggregation": r'# "aggregating" \(unnumbered\)',
    "GRPO": r"\S.*# GRPO$",
    "PRL": r"\S.*# PRL$",
    "KL": r"\S.*# KL, k3$",
}
ROW = re.compile(r"^\| (AttnRL Eq\. \d+|aggregation|GRPO|PRL|KL) \|.*\| `(.*)` \| `(.*)` \|$", re.M)
COUNT = re.compile(r"^(\w+\.py)( +)(\d+)(?=   \S)", re.M)
# options of pip, uv, torchrun and others that the pages name
FOREIGN = (
    "extra-index-url torch-backend extra index index-strategy nproc_per_node nnodes rdzv_backend"
    " rdzv_endpoint rdzv_id rdzv_conf local_addr shutdown_timeout signal repo-type local-dir"
    " no-deps"
)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


README = text(ROOT / "README.md")


def page(name: str) -> str:
    return text(ROOT / name)


def marked_lines() -> dict[str, list[str]]:
    """FILE:LINE of every marker, in the modules that compute something."""
    found: dict[str, list[str]] = {name: [] for name in MARKERS}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py"), *ROOT.glob("tools/*.py")]):
        for number, line in enumerate(text(path).splitlines(), 1):
            for name, marker in MARKERS.items():
                if re.search(marker, line):
                    found[name].append(f"{path.relative_to(ROOT)}:{number}")
    return found


def line_count(name: str) -> int:
    return len(page(name).splitlines())


def output_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_equation_table_points_at_the_lines_that_compute_them():
    rows = {name: place for name, place, _ in ROW.findall(README)}
    assert {name: [place] for name, place in rows.items()} == marked_lines()
    assert list(rows) == list(dict.fromkeys(rows)) and len(ROW.findall(README)) == len(MARKERS)


def test_a_marker_stands_at_code():
    """On its line, or as a comment on the next line that is none."""
    for places in marked_lines().values():
        for file, number in (place.split(":") for place in places):
            rest = page(file).splitlines()[int(number) - 1 :]
            code = next(line for line in rest if not line.strip().startswith("#"))
            assert code.strip() and rest.index(code) <= 2, (file, number)


def test_every_equation_has_a_test_with_its_number_in_the_name():
    numbers = [int(name.split()[-1]) for name, _, _ in ROW.findall(README) if "Eq" in name]
    assert sorted(numbers) == list(range(1, 11))
    for name, _, test in ROW.findall(README):
        if "Eq" in name:
            assert re.search(rf"eq{name.split()[-1]}(?!\d)", test), test
        elif name != "aggregation":  # what is aggregated has the numbers of its neighbours
            assert f"_{name.lower()}_" in test


TESTS = {
    f"{path.name}::{name}"
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", text(path), re.M)
}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_are_named_exist(path):
    named = re.findall(r"`(?:tests/(?:\w+/)?)?(test_\w+\.py::\w+)", text(path))
    assert set(named) <= TESTS
    for file in re.findall(r"tests/[\w/]+\.py", text(path)):
        assert (ROOT / file).is_file(), file
    if path.name in ("README.md", "faq.md", "benchmarks.md") and path.parent.name != "toy":
        assert len(named) >= 5 or path.parent.name in ("experiments", "smollm2")


def test_line_counts_are_right():
    counts = {name: int(count) for name, _, count in COUNT.findall(README)}
    assert set(counts) == {path.name for path in ROOT.glob("*.py")} >= set(READING_PATH)
    assert counts == {name: line_count(name) for name in counts}


def test_the_tree_of_files_names_all_of_runtime_and_tools():
    tree = README.split("## The files")[1].split("```")[1]
    runtime, tools = tree.split("runtime/")[1].split("tools/")
    modules = {path.stem for path in ROOT.glob("runtime/*.py")} - {"__init__"}
    columns = [re.split(r" {3,}", line.strip())[0] for line in runtime.splitlines()[1:]]
    named = {
        word.strip(",") for words in columns for word in re.sub(r" files.*", "", words).split()
    }
    assert named == modules
    commands = set(re.findall(r"\w+", tools.splitlines()[0].split("tools.")[1]))
    assert commands == {path.stem for path in ROOT.glob("tools/*.py")} - {"__init__"}
    for folder in re.findall(r"(\w+)/", tree):
        assert (ROOT / folder).is_dir()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160 and len(README.split()) <= 1600


def test_the_table_of_timings_is_that_of_the_results():
    printed = output_of("bench/measure.py", "--markdown")
    assert printed.count("\n") > 10 and printed in page("docs/benchmarks.md")
    computed = output_of("bench/scale.py", "--model")
    assert computed.count("\n") == 14 and computed in page("bench/scale.md")


def test_the_table_of_memory_is_the_computed_one():
    from tools.plan import memory_table

    assert memory_table() + "\n\n" in page("docs/memory.md")


def test_the_quickstart_shows_the_run_of_the_toys_table():
    """Seed 0: the first and last accuracy, and the tokens."""
    shown = README.split("## Quickstart")[1].split("## Your own")[0]
    row = re.search(r"^\| toy-seed0 \| (.*) \|$", page("toy/README.md"), re.M)
    before, best, end, _, _, tokens, minutes = row[1].split(" | ")
    accuracies = re.findall(r"test +([\d.]+) %", shown)
    assert accuracies[0] == before and accuracies[-1] == end and max(accuracies) == best
    assert f" {tokens} M tokens" in shown and f"took {minutes} minutes" in shown


def test_every_switch_in_the_pages_exists():
    from attnrl import Config

    ours = "".join(
        text(path)
        for folder in (".", "tools", "bench", "experiments", "toy", "runtime", "recipes")
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    )
    known = {f.name for f in fields(Config)} | set(FOREIGN.split()) | {"help"}
    known |= set(re.findall(r"\"--(\w+)\"", ours))
    known |= set(re.findall(r"(?:add|choose)\(\"(\w+)\", ", ours))
    for path in PAGES:
        prose = re.sub(r"^```diff\n.*?^```", "", text(path), flags=re.M | re.S)
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", prose))
        if path.name != "variants.md":  # its options are what its diffs add
            assert named <= known, (path.name, named - known)
    options = page("docs/methods.md").split("## The options")[1].split("## Presets")[0]
    named = set(re.findall(r"--([a-z_]+)", options))
    assert len(named) > 30 and named <= {f.name for f in fields(Config)}


def test_every_method_and_preset_has_its_row():
    from attnrl import METHODS, PRESETS

    methods = page("docs/methods.md")
    rows = re.findall(r"^\| `(\w+)` \|", methods.split("## The options")[0], re.M)
    assert sorted(rows) == sorted(METHODS)
    assert all(f"`{name}`" in methods.split("## Presets")[1] for name in PRESETS)


MODULES = {path.stem: path.stem for path in ROOT.glob("*.py")} | {
    path.stem: f"{folder}.{path.stem}"
    for folder in ("runtime", "tools")
    for path in ROOT.glob(f"{folder}/*.py")
    if path.stem != "__init__"
}


def has(thing, names: list[str]) -> bool:
    """Is there thing.NAME, or thing.NAME.NAME? A field of a dataclass counts."""
    if hasattr(thing, names[0]):
        return len(names) == 1 or has(getattr(thing, names[0]), names[1:])
    return is_dataclass(thing) and names[0] in {f.name for f in fields(thing)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_code_exist(path):
    """`tree.Response.bounds` and the glossary's "runtime/scoring.py `token_batches`"."""
    if path.name == "variants.md":
        pytest.skip("tests/test_variants.py")
    spans = re.findall(r"`([a-z_]+)\.(\w+(?:\.\w+)*)(?=[`(])", text(path))
    endings = ("py", "md", "json", "jsonl", "html", "png", "pt", "txt", "parquet", "toml", "cff")
    for name, rest in spans:
        if name in MODULES and rest.split(".")[-1] not in endings:
            module = importlib.import_module(MODULES[name])
            assert has(module, rest.split(".")), f"{name}.{rest}"
    # in the glossary "FILE `name`" may be a method or field of a class, too
    for file, name in re.findall(r"((?:runtime/|tools/)?\w+\.py) `(\w+)`", text(path)):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        own = [c for c in vars(module).values() if isinstance(c, type)]
        assert any(has(thing, [name]) for thing in [module, *own]), f"{file} `{name}`"


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text(path), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(path)):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            found = (path.parent / file).resolve() if file else path
            assert found.is_file(), target
            assert not anchor or anchor in anchors(found), target


def test_the_readme_is_the_one_table_of_contents():
    linked = set(re.findall(r"\]\(([^)\s#]+)", README))
    for path in PAGES:
        if path.name != "README.md" or path.parent != ROOT:
            assert str(path.relative_to(ROOT)) in linked, path


def test_prose_keeps_to_100_columns():
    """Where Markdown allows: not tables, commands, output and links."""
    for path in PAGES:
        if path.name in ("variants.md", "scale.md"):
            continue
        prose = re.sub(r"^ *```.*?^ *```", "", text(path), flags=re.M | re.S)
        long = [line for line in prose.splitlines() if len(line) > 100]
        assert not [line for line in long if line[0] != "|" and "](" not in line], path.name


def renew() -> None:
    """Line numbers and line counts of the README, computed tables of the docs."""
    lines = marked_lines()

    def row(match: re.Match) -> str:
        return match[0].replace(f"`{match[2]}`", f"`{lines[match[1]][0]}`")

    def count(match: re.Match) -> str:
        name, digits = match[1], str(line_count(match[1]))
        return name + digits.rjust(len(match[2] + match[3]))

    new = {"README.md": COUNT.sub(count, ROW.sub(row, README))}
    tables = {
        "docs/benchmarks.md": ("| against |", ["bench/measure.py", "--markdown"]),
        "docs/memory.md": ("| model | response |", ["-m", "tools.plan"]),
        "bench/scale.md": ("| model | responses,", ["bench/scale.py", "--model"]),
    }
    for name, (head, command) in tables.items():
        # tables that follow one another are one output
        old = re.search(rf"^{re.escape(head)}.*?(?=\n\n(?!\|))", page(name), re.M | re.S)
        new[name] = page(name).replace(old[0], output_of(*command).strip())
    for name, fresh in new.items():
        if fresh != page(name):
            (ROOT / name).write_text(fresh, encoding="utf-8")
            print(f"renewed: {name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit("usage: python tests/test_readme.py --renew")
    renew()
