"""Every command in README.md and docs/ does what the page says: each block of commands is run, at
reduced size, in a copy of the project, with small models and files in the place of real ones. A
block that is not run stands in NOT_RUN with the reason.

    python -m pytest tests/test_commands.py
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from fixtures import ROOT, save_real_model

from toy.programs import toy_set

# variants: own test
PAGES = [
    "README.md",
    "docs/tour.md",
    "docs/faq.md",
    "docs/memory.md",
    "experiments/README.md",
    "toy/README.md",
]
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
    (r"(attnrl\.py --model DIR [^\n#]*--steps 2)", rf"\1 {TINY_FILES.replace('--steps 1 ', '')}"),
    (r"(attnrl\.py)(?![^\n]*(?:--steps|--dry_run|nan|--model))([^\n#]*)", rf"\1 {SMALL}\2"),
    (r"aime24\.parquet \.\.\.", "aime24.parquet --subset --max_response 20"),
    (r"(eval\.py --model DIR (?!--suite)[^\n#]*?)--k 32", r"\1--k 2 --max_response 20"),
    (r"--suite paper --out", "--suite paper --k 1 --max_response 20 --out"),
    (r"toy:8:100:2", "toy:8:4:2"),
    (r"toy:10:100:2", "toy:10:4:2"),
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
]
NOT_RUN = {  # a line of the block: why
    "git clone ... && cd attnrl": (
        "the network; `make demo`, `make test` and `make test-vllm` are what CI and people run"
    ),
    "python -m venv .venv &&": "installs",
    "torchrun --nnodes 2": "two machines",
    "python attnrl.py ... --out runs/mine --resume auto": "not a whole command; test_checkpoint.py",
    "python toy/build.py --out toy/model": "an hour; test_toy.py runs its parts",
    "git apply rule.diff": "test_variants.py",
}


def blocks(page: str) -> list[str]:
    """Blocks of commands: those whose first line is one."""
    found = re.findall(
        r"^```\w*\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S
    )
    return [
        block
        for block in found
        if re.match(r"(python|torchrun|make|git|for|source|\.venv)\b", block)
    ]


def reduced(block: str) -> str:
    for pattern, instead in REDUCED:
        block = re.sub(pattern, instead, block)
    return "\n".join(line for line in block.splitlines() if "toy/build.py" not in line)  # an hour


RUN = [
    (page, i, block)
    for page in PAGES
    for i, block in enumerate(blocks(page))
    if not any(line in block for line in NOT_RUN)
]


def test_what_is_not_run_is_still_there():
    text = "".join(block for page in [*PAGES, "docs/variants.md"] for block in blocks(page))
    assert all(line in text for line in NOT_RUN) and len(RUN) > 20


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
