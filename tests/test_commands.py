"""Every command in README.md and docs/ does what the page says: each block of commands is run, at
reduced size, in a copy of the project, with small models and files in the place of real ones. So is
each block of Python, and what its comments say is printed must be. A block that is not run stands
in NOT_RUN with the reason.

    python -m pytest tests/test_commands.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pyarrow
import pyarrow.parquet
import pytest
from fixtures import ROOT, save_real_model

from toy.programs import toy_set

PAGES = [
    "README.md",
    "docs/tour.md",
    "docs/methods.md",
    "docs/runs.md",
    "docs/data-and-models.md",
    "docs/evaluation.md",
    "docs/grading.md",
    "docs/multi-gpu.md",
    "docs/memory.md",
    "docs/benchmarks.md",
    "docs/differences.md",
    "docs/faq.md",
    "docs/what-fci-finds.md",
    "experiments/README.md",
    "toy/README.md",
    "bench/scale.md",
]  # docs/variants.md has a test of its own
COMMAND = r"(python|torchrun|make|git|for|source|pip|uv|hf|\.venv)\b"
SMALL = "--steps 1 --batch_size 2 --test_problems toy:6:2:2 --eval_samples 1"
TINY_FILES = "--steps 1 --batch_size 2 --max_response 20 --eval_max_response 20 --eval_samples 1"
REDUCED = [  # in this order; what a command is replaced by
    (r" *\\\n *", " "),  # a command on several lines
    (r" --engine vllm", ""),
    (r" --dtype bf16", ""),
    (r"--nproc_per_node 8", "--nproc_per_node 2"),
    (
        (
            r"(attnrl\.py --preset paper --model \S+ --problems \S+ --test_problems \S+)("
            r" --drop_bad_rows)?"
        ),
        (
            r"\1 --drop_bad_rows --engine transformers --dtype fp32 --activation_checkpointing"
            rf" false {TINY_FILES}"
        ),
    ),
    (
        r"(attnrl\.py --preset small --model DIR [^\n#]*--steps 2)",
        rf"\1 {TINY_FILES.replace('--steps 1 ', '')}",
    ),
    (r"(attnrl\.py)(?![^\n]*(?:--steps|--dry_run|nan|--model))([^\n#]*)", rf"\1 {SMALL}\2"),
    (r"aime24\.parquet \.\.\.", "aime24.parquet --subset --max_response 20"),
    (r"(eval\.py --model DIR (?!--suite)[^\n#]*?)--k 32", r"\1--k 2 --max_response 20"),
    (r"--suite paper --out", "--suite paper --k 1 --max_response 20 --out"),
    (r"toy:8:100:2", "toy:8:4:2"),
    (r"toy:10:100:2", "toy:10:4:2"),
    (r"--steps 8 --eval_every 8", SMALL),
    (r"bench/fci\.py", "bench/fci.py --lengths 64 --steps 8 --repeats 1"),
    (r"for s in 0 1 2", "for s in 0 1"),
    (r" runs/toy-seed2", ""),
    (
        r"methods\.py --quick",
        "methods.py --quick --seeds 1 --methods grpo --tokens 0.001 --folder small",
    ),
    (r"methods\.py --report", "methods.py --report --folder small"),
    (r"methods\.py  +#", "methods.py --report --folder small #"),
    (r"what_fci_finds\.py", "what_fci_finds.py --quick"),
    (r"disruption\.py", "disruption.py --problems toy:6:4:5 --group 2 --folder smaller"),
    (r"forks\.py", "forks.py --problems toy:6:4:5 --group 2 --folder small"),
    (
        r"sparkle\.py(?: --models[^\n#]*)?",
        "sparkle.py --problems toy:6:4:5 --samples 1 --folder small",
    ),
]
NOT_RUN = {  # a line of the block: why
    "git clone ... && cd attnrl": (
        "the network; `make demo`, `make test` and `make test-vllm` are what CI and people run"
    ),
    "python -m venv .venv &&": "installs",
    "pip install -r requirements.txt": "installs",
    "torchrun --nnodes 2": "two machines",
    "python attnrl.py ... --out runs/mine --resume auto": "not a whole command; test_checkpoint.py",
    "python toy/build.py --out toy/model": "an hour; test_toy.py runs its parts",
    "git apply rule.diff": "test_variants.py",
}


def fenced(page: str) -> list[tuple[str, str]]:
    """(language, text) of every block, also of those inside lists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", text, re.M | re.S)
    return [(language, textwrap.dedent(block)) for _, language, block in found]


def blocks(page: str) -> list[str]:
    """Blocks of commands: those whose first line is one."""
    return [block for _, block in fenced(page) if re.match(COMMAND, block)]


def reduced(block: str) -> str:
    for pattern, instead in REDUCED:
        block = re.sub(pattern, instead, block)
    return "\n".join(line for line in block.splitlines() if "toy/build.py" not in line)  # an hour


# What the reader of a block of Python has at hand, who is told "model", "prompt_ids" ...
AT_HAND = """
import fci
from runtime.models import load_model
model, tokenizer, _ = load_model("toy/model", "cpu")
prompt_ids = tokenizer("a=4;b=a-2;?b")["input_ids"]
response_ids = tokenizer("a=4\\n\\nb=4-2=2\\n\\n\\\\boxed{2}")["input_ids"]
bounds = fci.split_steps(response_ids, fci.separator_tokens(tokenizer))
"""


def said(block: str) -> list[str]:
    """What the comments say that the lines print, up to a colon."""
    return re.findall(r"^print\(.*\)  # ([^:\n]*)", block, re.M)


RUN = [
    (page, i, block)
    for page in PAGES
    for i, block in enumerate(blocks(page))
    if not any(line in block for line in NOT_RUN)
]


def test_what_is_not_run_is_still_there():
    text = "".join(block for page in [*PAGES, "docs/variants.md"] for block in blocks(page))
    assert all(line in text for line in NOT_RUN) and len(RUN) > 20


def test_every_page_and_every_block_of_commands_is_looked_at():
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(PAGES) == {"docs/variants.md"}
    for page in PAGES:
        for language, block in fenced(page):
            commands = re.findall(rf"^{COMMAND} [^a-z]*\S*(?:\.py|--)", block, re.M)
            assert language == "python" or not commands or block in blocks(page), (page, block)
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(fenced(page)) * 2 == len(re.findall(r"^ *```", text, re.M)), page


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project, with models and problem files of the names that the pages use."""
    folder = tmp_path_factory.mktemp("pages") / "attnrl"
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(
            ".venv*", "runs", ".git", "__pycache__", ".hypothesis", ".*_cache", "full"
        ),
    )
    for name in ("DIR", "R1-1.5B"):
        save_real_model(folder / name, max_position_embeddings=65536)
    (folder / "data").mkdir()
    for n, name in enumerate(
        ("aime24", "aime25", "amc23", "math500", "minerva", "olympiad", "deepscaler")
    ):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{name}: {text}"}],
                "reward_model": {"ground_truth": answer},
                "data_source": name,
            }
            for text, answer in toy_set(f"toy:6:4:{n}")
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / "data" / f"{name}.parquet"
        )
        for place in (folder, folder / "data"):
            (place / f"{name}.json").write_text(
                json.dumps(
                    [{"problem": row["prompt"][0]["content"], "answer": "1"} for row in rows]
                )
            )
    (folder / "other").mkdir()
    (folder / "other/test.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    run(
        folder,
        f"python attnrl.py {SMALL} --out runs/NAME && cp -r runs/NAME runs/A && cp -r runs/NAME"
        " runs/B && cp -r runs/NAME runs/short\npython eval.py --model DIR --problems"
        " aime24.parquet --k 2 --max_response 20 --out runs/other\nfor r in A B; do cp"
        " runs/other/aime24.jsonl runs/$r; done",
    )
    return folder


def run(folder, script: str) -> None:
    environment = os.environ | {
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == (2 if "nan" in script else 0), (
        f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )


@pytest.mark.full
@pytest.mark.parametrize("page, i, block", RUN, ids=[f"{page}-{i}" for page, i, _ in RUN])
def test_commands_of_the_pages_run(page, i, block, copy):
    run(copy, reduced(block))


PYTHON = [
    (page, i, block)
    for page in PAGES
    for i, (language, block) in enumerate(fenced(page))
    if language == "python"
]


@pytest.mark.full
@pytest.mark.parametrize("page, i, block", PYTHON, ids=[f"{page}-{i}" for page, i, _ in PYTHON])
def test_python_of_the_pages_runs(page, i, block, copy, tmp_path):
    (tmp_path / "block.py").write_text(AT_HAND + block)
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "block.py"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == said(block)
