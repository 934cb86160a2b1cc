"""side_by_side.py: does the working tree still compute what an older commit computes? Bit for bit.

    python tests/side_by_side.py COMMIT              # about 10 minutes on 2 cores
    python tests/side_by_side.py COMMIT --methods grpo

For moves and renames. Both sides run one after the other on the same machine, because floats differ
between processors (so the repository holds no golden numbers):

- every method, 2 small steps, seed 0: the same metrics (but seconds) and the same final weights;
- eval.py --k 2: the same lines of samples;
- a checkpoint that the commit wrote resumes in the working tree and ends with the commit's weights,
  and its run folder opens (tools.view).

Not part of the suite: it needs a second checkout of the repository, which it makes and removes.
"""

import argparse
import filecmp
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = shlex.split(
    "--model toy/model --steps 2 --batch_size 4 --problems toy:8:200:1 --test_problems toy:8:8:2"
    " --eval_samples 2 --mini_batch 32 --seed 0"
)
METHODS = "attnrl atb_ads_nofilter atb_ads_noexpand atb_drop_easy atb treerl_off treerl grpo prl"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run(tree: Path, *words) -> None:
    """A command in a checkout; ends the whole comparison where it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tree,
        env=os.environ | ONE_THREAD,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.startswith("seconds/")} for r in records]


def check(what: str, same: bool, found: list[str]) -> None:
    print(f"{'same' if same else 'DIFFERENT':10} {what}", flush=True)
    found += [] if same else [what]


def compare_runs(what: str, old: Path, new: Path, found: list[str]) -> None:
    for a, b in zip(metrics(old), metrics(new)):
        names = [name for name in a if a[name] != b.get(name)]
        check(f"{what}: metrics of step {a['step']} {names or ''}", not names, found)
    weights = "last/model.safetensors"
    same = filecmp.cmp(old / weights, new / weights, shallow=False)
    check(f"{what}: final weights", same, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--methods", nargs="+", default=METHODS.split())
    args = parser.parse_args()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        base, out = Path(temporary) / "base", Path(temporary) / "runs"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(base), args.commit], check=True)
        try:
            for method in args.methods:
                for side, tree in (("old", base), ("new", ROOT)):
                    words = ["attnrl.py", *SMALL, "--method", method]
                    run(tree, *words, "--out", out / side / method)
                compare_runs(method, out / "old" / method, out / "new" / method, found)
            compare_evaluations(base, out, found)
            compare_resumed(base, out, found)
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)
    sys.exit(f"{len(found)} differences: {'; '.join(found)}" if found else 0)


def compare_evaluations(base: Path, out: Path, found: list[str]) -> None:
    for side, tree in (("old", base), ("new", ROOT)):
        command = "eval.py --model toy/model --problems toy:8:20:2 --k 2 --temperature 1 --out"
        run(tree, *shlex.split(command), out / side / "eval")
    files = [next((out / side / "eval").glob("*.jsonl")) for side in ("old", "new")]
    old, new = (file.read_text().splitlines()[1:] for file in files)
    check(f"eval.py: {len(old)} lines of samples", old == new, found)


def compare_resumed(base: Path, out: Path, found: list[str]) -> None:
    """The commit writes a checkpoint after 2 of 4 steps; both sides go on from copies of it."""
    longer = [*SMALL, "--steps", "4", "--save_every", "1", "--keep", "9"]
    whole = out / "whole"
    run(base, "attnrl.py", *longer, "--out", whole)
    run(ROOT, "-m", "tools.view", whole)
    check("the old run folder opens", (whole / "explorer.html").exists(), found)
    for step in (3, 4):
        shutil.rmtree(whole / f"step-{step:06}")
    for side, tree in (("old", base), ("new", ROOT)):
        folder = out / side / "resumed"
        shutil.copytree(whole, folder, symlinks=True)
        run(tree, "attnrl.py", *longer, "--resume", "auto", "--out", folder)
    compare_runs("resumed", out / "old/resumed", out / "new/resumed", found)


if __name__ == "__main__":
    main()
