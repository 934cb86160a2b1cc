"""test_notebook.py: docs/attnrl.ipynb runs from its first cell to its last, with the toy and with a
chat model, and what is stored below its cells is what they write.

    python -m pytest tests/test_notebook.py
    python tests/test_notebook.py --renew     # run it, and store its outputs anew

Without Jupyter: a cell is run as Jupyter runs it. Its last expression is its result, unless a ";"
ends it, and figures that pyplot has open are shown at its end.
"""

import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402
from fixtures import ROOT, save_real_model, typed  # noqa: E402

NOTEBOOK = ROOT / "docs" / "attnrl.ipynb"
MINE = re.compile(r"^MODEL, PROBLEM, ANSWER = .*$", re.M)  # the one line to change
PNG = b"\x89PNG\r\n\x1a\n"
DPI = 100


def read() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


# --------------------------------------------------------------------------------------------------
# Running it
# --------------------------------------------------------------------------------------------------
def picture(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return base64.b64encode(file.getvalue()).decode()


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def run_cell(code: str, names: dict, number: int) -> list[dict]:
    """The outputs of one cell, as a notebook stores them. names: of all cells."""
    body = ast.parse(code).body
    result = body.pop() if isinstance(body[-1], ast.Expr) and not code.endswith(";") else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"<cell {number}>", "exec"), names)
        if result is not None:
            value = eval(compile(ast.Expression(result.value), f"<cell {number}>", "eval"), names)
    outputs: list[dict] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines(text)})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if isinstance(value, matplotlib.figure.Figure):
            data = {"image/png": picture(value)} | data
        kind = {"output_type": "execute_result", "execution_count": number}
        outputs.append(kind | {"data": data, "metadata": {}})
    for figure in map(plt.figure, plt.get_fignums()):
        data = {"image/png": picture(figure), "text/plain": lines(repr(figure))}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def run(sources: list[str], folder: Path) -> tuple[list[list[dict]], dict]:
    """(the outputs of every cell, the names that they leave behind)."""
    names: dict = {"__name__": "__main__"}
    path = list(sys.path)
    try:
        with contextlib.chdir(folder):
            return [run_cell(code, names, n) for n, code in enumerate(sources, 1)], names
    finally:
        sys.path[:] = path


def sources() -> list[str]:
    return [source(cell) for cell in code_cells(read())]


# --------------------------------------------------------------------------------------------------
# What it is
# --------------------------------------------------------------------------------------------------
def test_it_is_a_notebook_of_format_4():
    """As https://nbformat.readthedocs.io/en/latest/format_description.html has it."""
    notebook = read()
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"]["name"] == "python"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z0-9-]{1,64}", i) for i in ids)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        keys |= {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == keys and cell["cell_type"] in ("code", "markdown")
        assert cell["metadata"] == {} and lines(source(cell)) == cell["source"]
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            check_output(output, cell["execution_count"])


def check_output(output: dict, count: int) -> None:
    kind = output["output_type"]
    if kind == "stream":
        assert set(output) == {"output_type", "name", "text"} and output["name"] == "stdout"
        return
    own = {"execution_count"} if kind == "execute_result" else set()
    assert set(output) == {"output_type", "data", "metadata"} | own
    assert kind in ("execute_result", "display_data") and output.get("execution_count", count)
    assert base64.b64decode(output["data"]["image/png"]).startswith(PNG)


def test_it_is_small_and_its_cells_are_short_and_explained():
    notebook = read()
    assert NOTEBOOK.stat().st_size < 600_000
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    for cell, before in zip(notebook["cells"][1:], kinds):
        assert cell["cell_type"] == "markdown" or before == "markdown", cell["id"]
        assert max(map(len, source(cell).splitlines())) <= 100, cell["id"]
    for code in sources():
        assert len([line for line in code.splitlines() if line]) <= 13
        assert not re.search(r"^\s*(def|class) ", code, re.M), "its functions are the project's"


def test_it_tells_the_whole_story():
    """Every equation of the paper by its number, and a picture of every stage."""
    told = "".join(source(cell) for cell in read()["cells"] if cell["cell_type"] == "markdown")
    named = {int(n) for n in re.findall(r"AttnRL Eq\. (\d+)", told)}
    assert named == set(range(1, 11))
    for function in typed(
        "split_steps fci_scores without_answer show choose_trees tree_count choose_branch_points"
        " build_tree show_tree tree_sequences Learner ppo_loss TransformersEngine Reward"
    ):
        assert re.search(rf"\b{function}\(", "\n".join(sources())), function
    assert len(pictures([cell["outputs"] for cell in code_cells(read())])) >= 8


def test_its_links_lead_somewhere():
    told = "".join(source(cell) for cell in read()["cells"] if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", told):
        assert target.startswith("https://") or (NOTEBOOK.parent / target).is_file(), target


# --------------------------------------------------------------------------------------------------
# What it does
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ran() -> tuple[list[list[dict]], dict]:
    return run(sources(), NOTEBOOK.parent)


def pictures(outputs: list[list[dict]]) -> list[str]:
    """Of all cells."""
    every = [output.get("data", {}) for cell in outputs for output in cell]
    return [data["image/png"] for data in every if "image/png" in data]


def texts(output: dict) -> str:
    return "".join(output.get("text") or output["data"]["text/plain"])


def test_its_stored_outputs_are_what_it_writes(ran):
    outputs, _ = ran
    for cell, new in zip(code_cells(read()), outputs, strict=True):
        stored = cell["outputs"]
        assert [o["output_type"] for o in stored] == [o["output_type"] for o in new], cell["id"]
        assert list(map(texts, stored)) == list(map(texts, new)), cell["id"]


def test_its_problem_teaches_something(ran):
    """Right and wrong responses, branch points, advantages of both signs, weights that moved."""
    _, names = ran
    responses = names["responses"]
    assert 0 < sum(r.reward for r in responses) < len(responses)
    assert sum(len(r.branch_points) for r in responses) >= 4
    advantages = [a for s in names["leaves"] for a in s.advantages]
    assert min(advantages) < 0 < max(advantages)
    assert any(abs(change) > 1e-3 for change in names["change"])
    assert names["stats"].updates == 1 and names["stats"].grad_norm > 0


def test_it_also_runs_from_the_root():
    first = sources()[0]
    assert run([first], ROOT)[1]["ROOT"] == ROOT == run([first], NOTEBOOK.parent)[1]["ROOT"]


@pytest.mark.full
def test_it_runs_with_a_chat_model_and_a_word_problem(tmp_path):
    """Random weights: responses that are never right, of one step or of many."""
    folder = str(save_real_model(tmp_path / "model"))
    problem = "Ann has 3 apples and buys 4 more. How many $n$ has she now?"
    [line] = MINE.findall("\n".join(sources()))
    mine = [
        code.replace(line, f"MODEL, PROBLEM, ANSWER = {folder!r}, {problem!r}, '7'")
        for code in sources()
    ]
    outputs, names = run(mine, NOTEBOOK.parent)
    assert len(names["responses"]) == 6 and names["prompt"] != []
    assert names["question"].startswith(problem) and "boxed" in names["question"]
    assert len(pictures(outputs)) >= 8


def renew() -> None:
    """Run all cells and store what they write."""
    notebook = read()
    outputs, _ = run(sources(), NOTEBOOK.parent)
    for number, (cell, new) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell |= {"execution_count": number, "outputs": new}
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")
    print(f"renewed: docs/{NOTEBOOK.name}, {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit("usage: python tests/test_notebook.py --renew")
    renew()
