"""bench/: the arithmetic of the ratios is right, the ways of reading attention that are timed
compute the same, and every command asks for sleeping threads before torch is there."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fixtures import ROOT
from transformers import Qwen2Config, Qwen2Model


def load(name: str):
    """A script of bench/ under another name: bench/fci.py is not fci.py."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(ROOT / "bench"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return module


measure = load("measure")


@pytest.mark.parametrize(
    "line, ratio, reached",
    [
        (measure.gain("x", 2.0, 5.0, "s", 2.5), 2.5, "yes"),
        (measure.gain("x", 2.0, 4.9, "s", 2.5), 2.45, "no"),
        (measure.gain("x", 300, 100, "tokens/s", 2, more=True), 3.0, "yes"),
        (measure.gain("x", 2.0, 1.0, "s"), 0.5, None),
        (measure.cost("x", 3.0, 2.0, "s", 1.5), 1.5, "yes"),
        (measure.cost("x", 3.1, 2.0, "s", 1.5), 1.55, "no"),
    ],
)
def test_gain_and_cost_by_hand(line, ratio, reached):
    assert (line["ratio"], line["reached"]) == (pytest.approx(ratio), reached)


def test_interleaved_medians_leave_out_the_first_round_and_count_per_unit(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def case(name, seconds, units):
        spent = iter(seconds)

        def run():
            order.append(name)
            clock[0] += next(spent)
            return units

        return run

    cases = {"a": case("a", [99, 1, 3, 2], None), "b": case("b", [99, 40, 20, 60], 10)}
    found = measure.interleave(cases, repeats=3)
    assert found == {"a": 2, "b": 4} and "".join(order) == "baabbaab"


def test_record_keeps_other_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    for name in ("one", "two", "one"):
        measure.record(name, [{"x": 1}], [measure.cost(name, 1.0, 2.0, "s", 1)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["one", "two"] and found["one"]["machine"]["torch"] == torch.__version__
    assert measure.markdown().splitlines()[2:] == [
        f"| {name} | 1 s | 2 s | 0.5 times the cost | <= 1 | yes |" for name in found
    ]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Linux tells the peak of a process"
)
def test_extra_bytes_are_those_of_the_peak():
    # in a process of its own: here the allocator may still hold as much of earlier tests
    code = (
        "import sys; sys.path.insert(0, 'bench'); import measure, torch;"
        "print(measure.extra_bytes(lambda: torch.ones(25_000_000).sum()))"
    )
    words = [sys.executable, "-c", code]
    found = float(subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout)
    assert found == pytest.approx(100e6, rel=0.1)


def test_all_ways_of_reading_attention_agree():
    bench = load("fci")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen2Model(config).eval()
    scores = {case: bench.run_case(model, case, 150, 40) for case in bench.CASES}
    assert scores["plain"] is None and scores["fci"].max() > 0.01
    for case in ("rows", "layer", "naive"):
        assert torch.allclose(scores["fci"], scores[case], atol=1e-6), case


@pytest.mark.full
@pytest.mark.parametrize(
    "package, arguments, words",
    [
        ("trl", ["against_trl.py"], "TRL is not installed here: make bench-trl"),
        ("vllm", ["rollout.py", "--vllm"], "--vllm: vllm is not installed here; make bench"),
    ],
)
def test_what_is_not_installed_is_one_line(package, arguments, words):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / arguments[0], *arguments[1:]],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


def test_bad_options_are_one_line():
    script = ROOT / "bench" / "measure.py"
    done = subprocess.run([sys.executable, script, "--nope"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "bench/measure.py: unrecognized arguments: --nope (see --help)"
    ]


# --------------------------------------------------------------------------------------------------
# A step is the project's own
# --------------------------------------------------------------------------------------------------
def test_a_side_makes_the_steps_of_attnrl():
    """Two steps: three calls of the engine, and all that was sampled is counted."""
    side = load("pipeline").Side("attnrl", batch_size=1, lr=0, problems="toy:4:8:1")
    results = [side.step() for _ in range(2)]
    assert [r.upcoming.step for r in results] == [2, 3] and side.number == 2
    first, second, third = side.calls
    assert not any(r.parent for r in first) and any(not r.parent for r in second)
    assert {r.group.index for r in first} == {0} and third
    assert sum(seen["tokens"] for seen in side.seen) == side.run.monitor.generated_tokens > 0
    phases = ("generate", "score", "grade", "exchange", "train", "sync", "other")
    for seen in side.seen:
        assert sum(seen[phase] for phase in phases) == pytest.approx(seen["step"])


def test_medians_leave_out_the_first_step_unless_there_is_no_other():
    side = SimpleNamespace(seen=[{"step": 9.0}, {"step": 1.0}, {"step": 3.0}])
    medians = load("pipeline").Side.medians
    assert medians(side) == {"step": 2.0}
    assert medians(SimpleNamespace(seen=side.seen[:1])) == {"step": 9.0}


# --------------------------------------------------------------------------------------------------
# Threads that sleep
# --------------------------------------------------------------------------------------------------
COMMANDS = [
    *sorted((ROOT / "bench").glob("*.py")),
    *sorted(p for p in (ROOT / "experiments").glob("*.py") if "__main__" in p.read_text()),
    ROOT / "toy" / "build.py",
    ROOT / "recipes" / "sft.py",
    ROOT / "recipes" / "smollm2" / "fetch.py",
]
WATCH = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            leave()

def leave():
    print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
    os._exit(0)

command, sys.argv = sys.argv[1], [sys.argv[1], "--help"]
sys.path[0] = os.path.dirname(command)  # as for a script
sys.meta_path.insert(0, Watch())
try:
    runpy.run_path(command, run_name="__main__")
finally:
    leave()  # one that leaves torch to its children
"""


def policy_when_torch_is_imported(command, **environment) -> str:
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    words = [sys.executable, "-c", WATCH, command]
    done = subprocess.run(words, capture_output=True, text=True, env=free | environment)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_asks_for_sleeping_threads_before_torch_is_imported(command):
    assert policy_when_torch_is_imported(command) == "passive 1000"


def test_whoever_has_set_the_policy_keeps_it():
    measured = ROOT / "bench" / "measure.py"
    assert policy_when_torch_is_imported(measured, OMP_WAIT_POLICY="active") == "active None"
    assert policy_when_torch_is_imported(measured, OMP_WAIT_POLICY="passive") == "passive None"
    assert policy_when_torch_is_imported(measured, GOMP_SPINCOUNT="7") == "passive 7"


def test_the_watch_sees_a_command_that_asks_too_late(tmp_path):
    late = tmp_path / "late.py"
    late.write_text(f"import sys, torch\nsys.path.append({str(ROOT)!r})\nimport runtime\n")
    assert policy_when_torch_is_imported(late) == "None None"


def test_ratios_of_a_busy_machine_by_hand():
    busy = load("busy")
    policies = ("ours", "passive", "without")
    step = {("alone", p): s for p, s in zip(policies, (2.0, 3.0, 1.0))}
    step |= {("beside one busy process", p): s for p, s in zip(policies, (5.0, 4.0, 40.0))}
    step |= {("two runs at once", p): s for p, s in zip(policies, (6.0, 6.0, 30.0))}
    rows, ratios = busy.summary(step, 8)
    assert [row["ours, times alone"] for row in rows] == [1, 2.5, 3]
    assert [row["without, times alone"] for row in rows] == [1, 40, 30]
    assert [(r["is"], r["ratio"], r["reached"]) for r in ratios] == [
        ("cost", 2.5, "yes"),
        ("cost", 3, "no"),
        ("gain", 8, None),
        ("gain", 5, None),
        ("cost", 1.25, None),
        ("gain", 1.5, None),
        ("cost", 2, None),
    ]


@pytest.mark.full
@pytest.mark.parametrize(
    "policy, spins", [("ours", "1000"), ("passive", "0"), ("without", "300000")]
)
def test_what_openmp_was_told_in_a_run(policy, spins):
    """OpenMP prints its own settings when it is loaded; 300,000 turns are its default."""
    busy = load("busy")
    words = busy.words_of(policy, ["--help"])
    rest = busy.environment_of(policy) | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(words, cwd=ROOT, env=rest, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert done.returncode == 0 and "--batch_size" in done.stdout


@pytest.mark.full
def test_a_run_waits_for_the_others_and_a_busy_process_ends():
    busy = load("busy")
    args = SimpleNamespace(steps=2, batch_size=1, threads=1)
    with busy.busy_process() as endless:
        assert endless.poll() is None
    assert endless.poll() is not None
    seconds = busy.measure("two runs at once", "ours", args)
    assert len(seconds) == 4 and all(s > 0 for s in seconds)
