"""bench/: the arithmetic of the ratios is right, and the ways of reading attention that are timed
compute the same."""

import importlib.util
import json
import subprocess
import sys

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

    found = measure.interleave(
        {"a": case("a", [99, 1, 3, 2], None), "b": case("b", [99, 40, 20, 60], 10)}, repeats=3
    )
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
    found = measure.extra_bytes(lambda: torch.ones(25_000_000).sum())
    assert found == pytest.approx(100e6, rel=0.1)


def test_all_ways_of_reading_attention_agree():
    bench = load("fci")
    torch.manual_seed(0)
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
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
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, (
        done.stderr
    )


def test_bad_options_are_one_line():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "measure.py", "--nope"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "bench/measure.py: unrecognized arguments: --nope (see --help)"
    ]
