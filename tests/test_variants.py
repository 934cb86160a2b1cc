"""docs/variants.md does what it says: each diff is small, applies to a copy of the project, its
example and its commands run there, and the run's log shows that the rule acted. Without the diff,
both fail."""

import math
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import pytest
from fixtures import ROOT, TOY_MODEL, lines, metrics_of, same_file

import attnrl
from fci import separator_tokens, split_steps
from runtime.cli import stop_on_user_error
from runtime.models import load_model
from runtime.rollout import request_seed
from runtime.scoring import Sequence, score
from runtime.stream import ProblemStream
from toy.programs import toy_set
from tree import fci_branch_steps

PAGE = ROOT / "docs" / "variants.md"
# The page's commands are those of real runs; these options, which come last and so have the last
# word, make them short.
SMALL = (
    "--steps 1 --batch_size 4 --group_size 4 --mini_batch 64 --eval_samples 1 --eval_every 0"
    " --log_samples 99"
)
TOY = f"{SMALL} --problems toy:6:50:1 --test_problems toy:6:5:2"
TWICE = "--problems toy:6:8:1 --steps 4"  # eight problems, asked twice
OPTIONS = {
    "A branching rule": TOY,
    "An advantage estimator": f"{TOY} --grpo_samples 8 --temperature 1.6",  # lengths differ
    "A sampler rule": f"{TOY} {TWICE} --group_size 2 --branch_points 1 --ads_batch false",
    "An own task": SMALL,
    "A bonus for the format": TOY.replace("toy:6", "toy:10"),  # for which it has not enough skill
    "Problems drawn": f"{TOY} {TWICE} --group_size 4 --branch_points 1 --ads_batch false",
    "A squared loss": f"{TOY} --mini_batch 999",  # a single update
    "Fewer samples": f"{TOY} {TWICE} --grpo_samples 8",
}
NAMES = list(OPTIONS)


@dataclass
class Variant:
    diff: str
    commands: list[list[str]]
    example: str

    def changed_lines(self) -> list[str]:
        return [line for line in self.diff.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]


def variants() -> dict[str, Variant]:
    """The page's walk-throughs by the first words of their titles."""
    found = {}
    page = PAGE.read_text(encoding="utf-8")
    for section in re.split(r"^## \d+\. ", page, flags=re.MULTILINE)[1:]:
        name = next((name for name in NAMES if section.startswith(name)), section[:60])
        (diff,), (commands,), (example,) = (
            re.findall(rf"^```{kind}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
            for kind in ("diff", "sh", "python")
        )  # one of each
        found[name] = Variant(diff, [shlex.split(line) for line in commands.splitlines()], example)
    return found


VARIANTS = variants()


def execute(folder: Path, *command) -> subprocess.CompletedProcess:
    """A command in `folder`, with no trace of a repository around it (git hooks set GIT_DIR and the
    like)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )


def python(folder: Path, *arguments) -> str:
    done = execute(folder, sys.executable, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fork(folder: Path, *diffs: str) -> Path:
    """A copy of the project with these diffs applied; in a repository of its own, so that git looks
    no further up."""
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("runtime", "tools", "toy"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    done = execute(folder, "git", "init", "--quiet")
    assert done.returncode == 0, done.stderr
    for number, diff in enumerate(diffs):
        (folder / f"{number}.diff").write_text(diff, encoding="utf-8")
        done = execute(folder, "git", "apply", "--whitespace=nowarn", f"{number}.diff")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """name -> the copy with that variant, made once."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = fork(tmp_path_factory.mktemp("fork") / "attnrl", VARIANTS[name].diff)
        return made[name]

    return folder


def run_page(
    folder: Path, name: str, out: str = "run", *more: str
) -> tuple[list[dict], list[dict]]:
    """The walk-through's commands, one after the other, with the small options; (metrics, samples)
    of the run."""
    for program, *arguments in VARIANTS[name].commands:
        assert program == "python"
        if arguments[0] == "attnrl.py":
            arguments += [*OPTIONS[name].split(), "--out", out, *more]
        python(folder, *arguments)
    return metrics_of(folder / out), lines(folder / out / "samples.jsonl")


# --------------------------------------------------------------------------------------------------
# Of all eight
# --------------------------------------------------------------------------------------------------
def test_the_page_has_the_eight_walk_throughs():
    assert list(VARIANTS) == NAMES
    assert PAGE.read_text(encoding="utf-8").count("```diff") == 8


def test_what_counts_as_a_changed_line():
    diff = "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n same\n-old\n+new\n+\n+++i\n"
    assert Variant(diff, [], "").changed_lines() == ["-old", "+new", "+", "+++i"]


@pytest.mark.parametrize("name", NAMES)
def test_a_diff_has_under_30_changed_lines_and_small_context(name):
    rows, changed = VARIANTS[name].diff.splitlines(), VARIANTS[name].changed_lines()
    assert 1 <= len(changed) < 30
    assert all(len(row) <= 101 for row in changed)  # 100 and the sign
    hunks = [row for row in rows if row.startswith("@@")]
    context = [row for row in rows if not re.match(r"[+-]|@@|diff |new file ", row)]
    assert len(context) <= 2 * len(hunks)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_holds_with_the_diff_and_fails_without(name, forked, tmp_path):
    """Checked by Python's doctest. Without the diff: the name, the rule or the module is not
    there."""
    (tmp_path / "example.txt").write_text(VARIANTS[name].example, encoding="utf-8")
    assert VARIANTS[name].example.count(">>>") >= 3
    python(forked(name), "-m", "doctest", tmp_path / "example.txt")
    without = execute(ROOT, sys.executable, "-m", "doctest", tmp_path / "example.txt")
    assert "***Test Failed***" in without.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_command_is_refused_without_the_diff(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = VARIANTS[name].commands[-1]
    assert command[:2] == ["python", "attnrl.py"]
    with pytest.raises(SystemExit) as stop, stop_on_user_error("attnrl.py"):
        attnrl.main([*command[2:], *OPTIONS[name].split(), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert re.search(
        "invalid choice: '(fci_entropy|rloo|direct)'|no such problem file"
        "|--skip_settled|--cures_tau|--esrl"
        "|--reward bonus:reward: cannot be imported",
        capsys.readouterr().err,
    )


def test_all_eight_also_apply_one_after_the_other(tmp_path):
    fork(tmp_path / "attnrl", *(variant.diff for variant in VARIANTS.values()))


# --------------------------------------------------------------------------------------------------
# Each acts in a real run
# --------------------------------------------------------------------------------------------------
def test_a_run_branches_where_fci_times_entropy_is_highest(forked):
    """From the texts in samples.jsonl, scored anew by the initial model (which sampled the first
    step's responses)."""
    _, samples = run_page(forked("A branching rule"), "A branching rule")
    model, tokenizer, eos_ids = load_model(str(TOY_MODEL), "cpu")
    checked = other_than_eq7 = 0
    for problem in samples:
        prompt = tokenizer(problem["problem"])["input_ids"]
        for r in problem["responses"]:
            if not r["branch_points"]:
                continue
            tokens = tokenizer("".join(r["tokens"]))["input_ids"]
            bounds = split_steps(tokens, separator_tokens(tokenizer))
            scores = score(model, [Sequence(prompt, tokens, bounds)], delta=1)[0]
            assert scores.fci == pytest.approx(r["fci"], abs=1e-5) and bounds == r["bounds"]
            spans = enumerate(zip(scores.fci, bounds, bounds[1:]))
            product = {k: y * sum(scores.entropies[a:b]) / (b - a) for k, (y, a, b) in spans}
            steps = [bounds.index(at) for at in r["branch_points"]]
            chosen = [product.pop(k) for k in steps]
            assert len(chosen) == 2 and min(chosen) >= max(product.values()) - 1e-6
            checked += 1
            other_than_eq7 += steps != fci_branch_steps(scores.fci, bounds[:-1], 2)
    assert checked >= 4 and other_than_eq7 >= 1


@pytest.mark.full
def test_a_run_is_credited_by_leaving_one_out(forked):
    """The first step's loss: its policy is the one that sampled, so the ratio is 1 and the loss is
    -mean(A) over trained tokens."""
    metrics, samples = run_page(forked("An advantage estimator"), "An advantage estimator")
    _, tokenizer, _ = load_model(str(TOY_MODEL), "cpu")
    assert metrics[1]["cut_off"] == 0 and metrics[1]["train/updates"] == 1 and len(samples) == 4

    def loss(advantage) -> float:
        total = tokens = 0
        for problem in samples:
            rewards = [r["reward"] for r in problem["responses"]]
            assert len(rewards) == 8
            for i, r in enumerate(problem["responses"]):
                length = len(r["tokens"])  # where all agree as well: GRPO drops none
                total, tokens = total - length * advantage(rewards, i), tokens + length
        assert tokens == metrics[1]["train/tokens"]
        return total / tokens

    def by_rloo(rewards: list[float], i: int) -> float:
        return rewards[i] - (sum(rewards) - rewards[i]) / 7

    def by_grpo(rewards: list[float], i: int) -> float:
        return (rewards[i] - sum(rewards) / 8) / (statistics.stdev(rewards) + 1e-6)

    rloo, grpo = loss(by_rloo), loss(by_grpo)
    assert metrics[1]["train/policy_loss"] == pytest.approx(rloo, abs=1e-5)
    assert abs(rloo - grpo) > 1e-3


@pytest.mark.full
def test_a_run_passes_over_settled_problems(forked):
    """samples.jsonl holds every problem that was asked: the same walk through the shuffled set,
    rule applied by hand."""
    metrics, samples = run_page(forked("A sampler rule"), "A sampler rule")
    texts = [text for text, _ in toy_set("toy:6:8:1")]
    batches = [[s for s in samples if s["step"] == m["step"]] for m in metrics[1:]]
    assert [len(batch) for batch in batches] == [4, 4, 4, 4]
    in_turn, settled, skipped = iter(ProblemStream(8).take(100)), set(), 0
    for m, batch in enumerate(batches):
        # batch m is drawn before batch m - 1 is finished
        for s in batches[m - 2] if m >= 2 else []:
            rewards = [r["reward"] for r in s["responses"]]
            (settled.add if len(set(rewards)) == 1 else settled.discard)(texts.index(s["problem"]))
        for s in batch:
            while (number := next(in_turn)) in settled:
                settled.remove(number)
                skipped += 1
            assert s["problem"] == texts[number]
    assert skipped >= 2


@pytest.mark.full
@pytest.mark.parametrize("name", ["A sampler rule", "Problems drawn", "Fewer samples"])
def test_what_a_rule_remembers_survives_a_resume(name, forked):
    """Killed after step 2 and resumed: the same log, byte for byte, as without."""
    folder = forked(name)
    run_page(folder, name, "whole", "--save_every", "1", "--keep", "9")
    shutil.copytree(folder / "whole", folder / "again", symlinks=True)
    for step in folder.glob("again/step-*"):
        if int(step.name.split("-")[1]) > 2:
            shutil.rmtree(step)
    every = ["--save_every", "1", "--keep", "9"]
    run_page(folder, name, "again", *every, "--resume", "auto")
    for file in ("samples.jsonl", "last/model.safetensors"):
        same_file(folder / "again" / file, folder / "whole" / file)


@pytest.mark.full
def test_a_run_on_an_own_task_with_its_own_reward(forked):
    """Rewards in the log are those that a reader gives who follows the texts step by step."""
    metrics, samples = run_page(forked("An own task"), "An own task")
    folder, seen = forked("An own task"), []
    for name, count in (("train", 2000), ("test", 50)):
        rows = lines(folder / f"middle_{name}.jsonl")
        assert len(rows) == count and all(re.search(r";\?[defg]$", row["problem"]) for row in rows)
    for s in samples:
        steps = s["answers"][0].split("\n\n")
        # of the variable that is asked for
        value = next(step[-1] for step in steps if step[0] == s["problem"][-1])
        assert steps[-1] == f"\\boxed{{{value}}}"
        for r in s["responses"]:
            for end in [r, *r["continuations"]]:
                text = "".join([*r["tokens"][: end.get("at", 0)], *end["tokens"]])
                assert end["reward"] == pytest.approx(credit(text.removesuffix("<eos>"), steps))
                seen.append(end["reward"])
    assert len({r for r in seen if 0 < r < 0.5}) >= 2 and metrics[1]["sequences"] > 0
    initial = [r["reward"] for s in samples for r in s["responses"]]
    assert metrics[1]["initial/reward"] == pytest.approx(statistics.fmean(initial))


@pytest.mark.full
def test_a_run_is_paid_for_the_format(forked):
    """1 for the right digit in a box, 0.1 for another one, 0 without; the log's counts agree."""
    metrics, samples = run_page(forked("A bonus for the format"), "A bonus for the format")
    seen = []
    for s in samples:
        for r in s["responses"]:
            for end in [r, *r["continuations"]]:
                text = "".join([*r["tokens"][: end.get("at", 0)], *end["tokens"]])
                box = re.findall(r"\\boxed\{(\d)\}", text)
                paid = 0.0 if not box else 1.0 if box[-1] == s["answers"][0] else 0.1
                assert end["reward"] == paid and end["boxed"] == bool(box)
                seen.append(paid)
    assert len(set(seen)) >= 2 and metrics[1]["grading/unboxed"] == seen.count(0.0)


@pytest.mark.full
def test_a_run_draws_problems_by_their_posterior(forked):
    """The same draws from the texts' rewards and the run's random numbers, by the inverse of the
    exponential distribution."""
    metrics, samples = run_page(forked("Problems drawn"), "Problems drawn")
    batches = [[s for s in samples if s["step"] == m["step"]] for m in metrics[1:]]
    counts = {number: [1, 1] for number in range(8)}  # right, wrong
    for m, batch in enumerate(batches):
        # batch m is drawn before batch m - 1 is finished
        for s in batches[m - 2] if m >= 2 else []:
            for r in s["responses"]:
                counts[s["number"]][r["reward"] != 1] += 1
        rng, times = random.Random(request_seed(0, m + 1)), {}
        for number, (right, wrong) in counts.items():
            p = right / (right + wrong)
            times[number] = -math.log(1 - rng.random()) / math.exp(math.sqrt(p * (1 - p)) / 0.1)
        assert [s["number"] for s in batch] == sorted(times, key=times.__getitem__)[:4]
    assert len(batches) == 4 and len(set(map(tuple, counts.values()))) >= 3


def blocks(responses: list[dict]) -> list[list[tuple[Fraction, int, bool]]]:
    """Of each leaf its blocks: (V(its end) - V(its start), tokens, trained here?), from the rewards
    below each state. A shared block is trained with the leaf that sampled it."""
    ends = [(r, [r, *r["continuations"]]) for r in responses]
    every = [Fraction(end["reward"]) for _, below in ends for end in below]
    root, leaves = sum(every) / len(every), []
    for r, below in ends:
        chain, state, start = [], root, 0
        cuts = sorted({c["at"] for c in r["continuations"]})
        for cut in [*cuts, len(r["tokens"])]:
            # leaves that go through the end of this block; the last block is the response's own
            through = [e for e in below if e.get("at", len(r["tokens"])) >= cut]
            value = sum(Fraction(e["reward"]) for e in through) / len(through)
            chain.append((value - state, cut - start, True))
            state, start = value, cut
            known = [(gain, length, False) for gain, length, _ in chain]
            for c in [c for c in r["continuations"] if c["at"] == cut]:
                leaves.append([*known, (Fraction(c["reward"]) - state, len(c["tokens"]), True)])
        leaves.append(chain)
    return leaves


@pytest.mark.full
def test_a_run_is_trained_on_the_squared_distance_from_the_advantages(forked):
    """The first step's loss: its policy is the one that sampled, so every log-ratio is 0, and a
    step costs A^2 / 2."""
    metrics, samples = run_page(forked("A squared loss"), "A squared loss")
    assert metrics[1]["train/updates"] == 1 and len(samples) == 4
    total, tokens, inner = 0.0, 0, 0
    for leaf in [leaf for s in samples for leaf in blocks(s["responses"])]:
        if not any(gain for gain, _, trained in leaf if trained):
            continue  # --ads_drop
        inner += len(leaf) > 1
        for gain, parts in groupby(leaf, key=lambda block: block[0]):
            sizes = [(length, trained) for _, length, trained in parts]
            ours = sum(length for length, trained in sizes if trained)
            total += float(gain) ** 2 / 2 * ours / sum(length for length, _ in sizes)
            tokens += ours
    assert inner >= 4 and tokens == metrics[1]["train/tokens"]
    assert metrics[1]["train/policy_loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert metrics[1]["train/policy_loss"] > 0 == metrics[1]["train/clip_fraction"]


@pytest.mark.full
def test_a_run_samples_less_and_hotter_what_is_mastered(forked):
    """Numbers of responses by what the problem's last ones were graded; the engine's log-probs are
    the learner's only where nothing was sampled hotter."""
    metrics, samples = run_page(forked("Fewer samples"), "Fewer samples")
    rates: dict[int, float] = {}
    fewer = 0
    for m in metrics[1:]:
        batch = [s for s in samples if s["step"] == m["step"]]
        known = [rates.get(s["number"], 0.0) for s in batch]
        for s, z in zip(batch, known):
            assert len(s["responses"]) == max(2, math.floor(8 * math.exp(-z) + 0.5))
            fewer += len(s["responses"]) < 8
        assert (m["logprob_gap/mean"] > 1e-3) == any(known)
        for s in batch:
            rates[s["number"]] = statistics.fmean(r["reward"] for r in s["responses"])
    assert fewer >= 4


def credit(text: str, steps: list[str]) -> float:
    """A second reading of the page's rule; `steps` are the 8 right ones and the box."""
    *given, box = text.split("\n\n")
    if box == steps[-1]:
        return 1.0
    good = 0
    while good < 8 and given[good : good + 1] == steps[good : good + 1]:
        good += 1
    return 0.4 * good / 8
