"""test_experiments.py: what experiments/methods.py reads off the runs, by hand; and real (tiny)
runs, killed and resumed."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from statistics import fmean, stdev

import pytest
from fixtures import ROOT

from runtime.cli import UserError

spec = importlib.util.spec_from_file_location("methods", ROOT / "experiments" / "methods.py")
methods = importlib.util.module_from_spec(spec)
spec.loader.exec_module(methods)


def result(seed: int, accuracies: list[float], tokens: float = 100, seconds: float = 10.0) -> dict:
    """A run whose steps generate 100 tokens in `seconds` and make 4 optimizer steps; evaluated
    before it and after each."""
    records = [
        {"step": i, "generated_tokens": tokens * i, "test_accuracy": a}
        | ({"seconds/step": seconds, "train/updates": 4} if i else {})
        for i, a in enumerate(accuracies)
    ]
    return {"seed": seed, "tokens": 150.0, "records": records}


def test_accuracy_is_read_off_between_two_evaluations():
    records = result(0, [0.5, 0.6, 0.9])["records"]
    # halfway between 60 and 90
    for at, axis in ((150, "tokens"), (15, "seconds"), (6, "updates")):
        assert methods.accuracy_at(records, at, axis) == pytest.approx(75), axis
    assert methods.accuracy_at(records, 0, "tokens") == 50
    assert methods.accuracy_at(records, 200, "tokens") == pytest.approx(90)
    del records[1]["test_accuracy"]  # not evaluated there: the line goes from 50 to 90
    assert methods.accuracy_at(records, 150, "tokens") == pytest.approx(80)
    assert methods.along(records, "seconds") == [0, 10, 20]


def test_interval_by_hand():
    """Values 1, 2, 3: standard deviation 1, t(2 degrees of freedom) = 4.303."""
    mean, half = methods.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    mean, half = methods.mean_and_interval([7.0])
    assert mean == 7 and math.isnan(half)


def test_the_interval_holds_what_it_says():
    """Of 2,000 draws of 5 normal numbers the interval must hold the true mean in 95 % (by 1.5
    points)."""
    rng = random.Random(0)
    draws = [[rng.gauss(3, 2) for _ in range(5)] for _ in range(2000)]
    held = [abs(mean - 3) <= half for mean, half in map(methods.mean_and_interval, draws)]
    assert fmean(held) == pytest.approx(0.95, abs=0.015)


def test_table_by_hand():
    """At 150 tokens attnrl has 70 and 80, grpo 65 and 73: differences -5 and -7, mean -6, t(1) =
    12.706, std sqrt 2."""
    runs = {
        "grpo": {0: result(0, [0.5, 0.6, 0.7]), 1: result(1, [0.5, 0.66, 0.8])},
        "attnrl": {0: result(0, [0.5, 0.6, 0.8]), 1: result(1, [0.5, 0.7, 0.9], seconds=20.0)},
    }
    text = methods.table(runs)
    # the fastest run's end, and the end of the one with the fewest
    places = "T = 0.00 M generated tokens; equal time: 20 s of training; equal optimizer steps: 8."
    assert text.splitlines()[0] == places
    grpo, attnrl = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} ")).split(" | ")
        for name in ("grpo", "attnrl")
    )
    half = 12.706 * stdev([-5, -7]) / math.sqrt(2)
    assert grpo[1:5] == [
        "2",
        "50.0",
        f"69.0 ± {12.706 * stdev([65, 73]) / math.sqrt(2):.1f}",
        f"-6.0 ± {half:.1f}",
    ]
    assert attnrl[3].startswith("75.0 ±") and attnrl[4] == ""
    # at 20 s: 80 after two steps, and 70 after one of 20 s
    assert float(attnrl[5].split()[0]) == 75.0
    # after 8 optimizer steps: 70, 80 against 80, 90
    assert grpo[7].startswith("75.0 ±") and grpo[8].startswith("-10.0 ±")
    # one seed in common with grpo: 75 - 73, no interval
    runs["treerl"] = {1: result(1, [0.5, 0.7, 0.8])}
    assert "| treerl - grpo | 2.0 | 0.0 | 0.0 |" in methods.table(runs).splitlines()
    # training steps, optimizer steps and seconds to 150 tokens: 1.5, 6, 15
    assert grpo[-3:] == ["2", "6", "15 |"], grpo


TINY = (
    "--eval_every 1 --eval_samples 1 --steps 50 --keep 1 --log_samples 0 --batch_size 2"
    " --problems toy:6:50:1 --test_problems toy:6:5:2"
)
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT / "experiments")!r}, {str(ROOT)!r}]
import methods
from pathlib import Path

methods.SHARED, methods.SETTINGS = {TINY!r}, {{"tiny": ""}}
methods.HERE = Path(sys.argv[1]) / "here"
methods.__file__ = {str(ROOT / "experiments" / "methods.py")!r}
methods.HERE.mkdir(exist_ok=True)
folder = Path(sys.argv[1]) / "full"
for method in ("grpo", "attnrl"):
    print(methods.run_one("tiny", method, 0, 8000, folder), flush=True)
print(methods.report(folder))
"""


@pytest.mark.full
def test_a_killed_experiment_goes_on_and_finished_runs_are_not_run_again(tmp_path):
    """Real runs of two methods; the first is killed with SIGKILL in the middle. What is there is
    then only reported."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    run = tmp_path / "runs" / "experiments" / "full" / "tiny-grpo-0"
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    log, end = run / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert first.poll() is None and time.monotonic() < end, first.communicate()[0]
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "full" / "results").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from" in run.with_suffix(".log").read_text() and not run.exists()
    saved = json.loads((tmp_path / "full" / "results" / "tiny" / "grpo-0.json").read_text())
    records = saved["records"]
    assert records[-1]["generated_tokens"] >= 8000 > records[-2]["generated_tokens"]
    assert "test_accuracy" in records[-1]
    assert [m["step"] for m in records] == list(range(len(records)))
    assert "| grpo | 1 |" in done.stdout and "| attnrl | 1 |" in done.stdout
    figures = ("accuracy", "fig6_outcomes", "fig7_sampling", "fig8_training")
    drawn = {path.name for path in (tmp_path / "full" / "figures").iterdir()}
    assert drawn == {f"{name}_tiny.png" for name in figures}
    started = time.monotonic()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.stdout == done.stdout and time.monotonic() - started < 30 and not run.exists()


def test_sigterm_ends_the_runs_that_go_on_and_starts_no_other(tmp_path, monkeypatch, capsys):
    begun, started, before = [], time.monotonic(), signal.getsignal(signal.SIGTERM)
    both = threading.Barrier(2, timeout=30)

    def run_one(*what):
        begun.append(what)
        process = subprocess.Popen(["sleep", "60"])
        methods.running.append(process)
        if both.wait() == 0:  # one of the two threads, after both processes have been started
            os.kill(os.getpid(), signal.SIGTERM)
        process.wait()

    monkeypatch.setattr(methods, "run_one", run_one)
    monkeypatch.setattr(methods, "running", [])
    try:
        with pytest.raises(KeyboardInterrupt):
            methods.run_all([("toy8", "grpo", seed) for seed in range(6)], 1.0, tmp_path, jobs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(begun) == 2 and time.monotonic() - started < 30
    assert all(p.poll() is not None for p in methods.running)
    assert "6 runs to do; logs: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, words",
    [
        (["--seeds", "0"], "--seeds"),
        (["--report"], "no results"),
        (["--methods", "ppo"], "--methods"),
        (["--tokens", "0"], "--tokens"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_bad_input_is_one_line(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "run_one", lambda *_: pytest.fail("started to run"))
    with pytest.raises((UserError, SystemExit)) as stop:
        methods.main([*args, "--folder", str(tmp_path)])
    said = str(stop.value) if isinstance(stop.value, UserError) else capsys.readouterr().err
    assert words in said
