"""test_vllm.py: the real vLLM inside the training process. It samples with the learner's weights,
or the run stops and says so.

Needs vLLM's CPU build (`make test-vllm`); elsewhere only the first test runs, the others are
skipped. vLLM takes seconds to import and keeps module state, so nothing here imports it before a
test needs it, and one engine lives at a time.

    .venv-vllm/bin/python -m pytest tests/runtime/test_vllm.py
"""

import copy
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from statistics import fmean

import pytest
import torch
from fixtures import ROOT, TOY_MODEL, metrics_of, same_file, typed
from helpers import random_tokens, tiny_model
from toy_runs import assert_same, set_up, step_without_sync
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnrl
import eval as evaluation
from attnrl import Config, parse_config, train
from learner import Learner
from runtime.cli import UserError, stop_on_user_error
from runtime.data import load_problems
from runtime.dist import full_weights
from runtime.rollout import Request, TransformersEngine, probe_requests, request_seed
from runtime.scoring import Sequence, engine_gap, score
from runtime.vllm_engine import VLLMEngine
from tree import TrainingSequence

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(),
    reason="needs vLLM's CPU build: `make test-vllm` (on a GPU: tests/test_gpu.py)",
)
# vLLM's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
# or a failed test's report has a thousand empty lines of it
logging.getLogger("torch.__trace").addFilter(lambda record: False)
# the toy preset: its learning rate and the tolerance of the check are the real ones
TOY = parse_config([])
EOS = [1]  # the toy's
LONGEST = 160  # prompt and completion
SMALL = typed(
    "--preset toy --engine vllm --steps 2 --batch_size 4 --eval_samples 2"
    " --test_problems toy:8:10:2 --log_samples 99"
)
# a learning rate at which one update changes every kind of stale weight by more than the tolerance
VISIBLE = 0.003
LEAVING = 20  # seconds from the last line of a run to the end of its process (measured: 1 to 3)


class Engines:
    """One engine at a time, kept for the next test that asks for the same model."""

    def __init__(self):
        self.path = self.engine = None

    def get(self, path) -> VLLMEngine:
        if path != self.path:
            self.close()
            self.engine, self.path = VLLMEngine(str(path), EOS, LONGEST), path
        return self.engine

    def close(self) -> None:
        if self.engine:
            self.engine.close()
        self.path = self.engine = None


@pytest.fixture(scope="module")
def engines():
    holder = Engines()
    yield holder
    holder.close()


@pytest.fixture(scope="module")
def toy_model():
    return AutoModelForCausalLM.from_pretrained(TOY_MODEL).eval()


@pytest.fixture
def toy(engines, toy_model):
    """(engine, policy): an engine with the weights of a fresh copy of the toy's policy."""
    policy = copy.deepcopy(toy_model)
    engine = engines.get(TOY_MODEL)
    engine.eos_ids = EOS
    engine.sync_weights(full_weights(policy))
    return engine, policy


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    random_model("qwen2").save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(engines, tiny_folder):
    """(engine, policy) of a random model, whose next token is far less certain than the toy's."""
    policy = random_model("qwen2")
    engine = engines.get(tiny_folder)
    engine.eos_ids = EOS
    engine.sync_weights(full_weights(policy))
    return engine, policy


def random_model(kind: str, tied: bool = True):
    """vLLM's attention on the CPU wants a head dimension of 32."""
    return tiny_model(
        kind, hidden_size=128, head_dim=32, intermediate_size=192, tie_word_embeddings=tied
    )


def requests_for(seed: int, temperatures=(1.0, 0.6)) -> list[Request]:
    """Like a training step's call, with prefixes of several blocks (32 tokens): four samples of
    each of three problems, two continuations from the middle of a response, and short prompts (one
    token is the shortest)."""
    rng = random.Random(seed)
    prompts = []
    for length in (33, 50, 70):
        problem = random_tokens(rng, length)
        prompts += [problem] * 4 + [problem + random_tokens(rng, 20)] * 2
    prompts += [random_tokens(rng, length) for length in (1, 2, 32)]
    return [
        Request(
            prompt, rng.randint(1, 30), temperatures[i % len(temperatures)], request_seed(seed, i)
        )
        for i, prompt in enumerate(prompts)
    ]


def toy_requests(count: int, max_tokens: int = 40) -> list[Request]:
    problems = load_problems("toy:8:20:7", AutoTokenizer.from_pretrained(TOY_MODEL), max_prompt=100)
    return [
        Request(problems[i // 2].prompt_ids, max_tokens, 1.0, request_seed(1, i))
        for i in range(count)
    ]


def learner_logprobs(policy, requests, completions) -> list[list[float]]:
    """The learner's log-probs of sampled tokens, each at its own request's temperature."""
    return [
        score(policy, [Sequence(r.prompt_ids, c.tokens)], r.temperature or 1.0)[0].logprobs
        for r, c in zip(requests, completions)
    ]


def largest(first: list[list[float]], second: list[list[float]]) -> float:
    """The largest difference between the log-probs of the same tokens."""
    assert [len(row) for row in first] == [len(row) for row in second]
    return max(abs(a - b) for one, other in zip(first, second) for a, b in zip(one, other))


def update(policy, requests, completions, lr: float) -> None:
    """One real PPO update on what was sampled, good and bad in turn."""
    logprobs = learner_logprobs(policy, requests, completions)
    sequences = [
        TrainingSequence(r.prompt_ids, c.tokens, [(-1.0) ** i] * len(c.tokens), lp)
        for i, (r, c, lp) in enumerate(zip(requests, completions, logprobs))
    ]
    assert Learner(policy, lr=lr, kl_coef=0.0).train(sequences, mini_batch=999, seed=0).updates == 1


def sampled_by(engine):
    """Eight requests on the toy's problems, their completions, and the probes that a run would make
    of them."""
    requests = toy_requests(8)
    completions = engine.generate(requests)
    return requests, completions, probe_requests(requests, completions)


def refused(engine, policy, requests) -> tuple[float, float, float]:
    """engine_gap stops the run; what its message says: the engine's and the learner's mean
    log-prob, and the gap."""
    with pytest.raises(UserError) as stop:
        engine_gap(engine, policy, requests, TOY.sync_tolerance)
    numbers = re.search(
        r"engine's mean log-prob is (\S+), the learner's (\S+), mean \|difference\| (\S+), above",
        str(stop.value),
    )
    assert numbers and "\n" not in str(stop.value), stop.value
    return tuple(map(float, numbers.groups()))


# --------------------------------------------------------------------------------------------------
# Where vLLM is missing
# --------------------------------------------------------------------------------------------------
def test_asking_for_vllm_where_it_is_missing_says_how_to_install_it(capsys, monkeypatch, tmp_path):
    """One line and exit code 2, before anything is written. (Where vLLM is installed it is hidden
    from the import.)"""
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as stop, stop_on_user_error("attnrl.py"):
        attnrl.main([*SMALL, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error
    assert "vLLM is not installed here" in error and "pip install -r requirements-gpu.txt" in error
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# A whole run
# --------------------------------------------------------------------------------------------------
def launch(*options, ranks: int = 0, code: int = 0) -> tuple[str, str, float]:
    """Run attnrl.py as a user does, with torchrun if there are ranks; (stdout, stderr, seconds it
    took to leave)."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks
        else []
    )
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "attnrl.py", *map(str, options)],
            cwd=ROOT,
            text=True,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        alarm = threading.Timer(300, process.kill)
        alarm.start()
        lines, last = [], time.perf_counter()
        for line in process.stdout:
            lines.append(line)
            last = time.perf_counter()
        process.wait()
        leaving = time.perf_counter() - last
        alarm.cancel()
        print(f"{leaving:.1f} s from the last line (of an error: from the start) to the end")
        errors.seek(0)
        text = errors.read()
    assert process.returncode == code, "".join(lines) + text
    return "".join(lines), text, leaving


def assert_agreement(records: list[dict], scored: tuple[int, ...] = (1, 2)) -> None:
    """Engine and learner agreed in every step: over all tokens, in the steps that score any, and in
    the check after the sync."""
    assert [m["step"] for m in records] == [0, 1, 2]
    for m in records[1:]:
        assert m["train/updates"] >= 1 and 0 < m["logprob_gap/sync"] < 1e-4
        if m["step"] in scored:
            assert 0 < m["logprob_gap/mean"] <= m["logprob_gap/max"] < 1e-4
        else:
            assert m["logprob_gap/mean"] == m["logprob_gap/max"] == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, seconds it took to leave) of a small run from the command line."""
    folder = tmp_path_factory.mktemp("run") / "one"
    text, _, leaving = launch(*SMALL, "--out", folder)
    assert f"run folder: {folder}" in text
    return folder, leaving


@needs_vllm
def test_a_run_samples_with_the_learners_weights_and_ends_by_itself(finished):
    folder, leaving = finished
    assert_agreement(metrics_of(folder))
    assert leaving < LEAVING
    first, last = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (TOY_MODEL, folder / "last")
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)


@needs_vllm
def test_a_resumed_run_has_the_state_and_the_tokens_of_the_undisturbed_one(tmp_path):
    """Killed after the checkpoint of step 1: steps 2 and 3 must sample the same tokens, and end
    with the same weights."""
    options = [*SMALL, "--steps", "3", "--save_every", "1", "--keep", "9"]
    launch(*options, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / f"step-{step:06}")
    text, *_ = launch(*options, "--out", tmp_path / "run", "--resume", "auto")
    assert "resumed from" in text
    same_file(tmp_path / "run" / "samples.jsonl", tmp_path / "whole" / "samples.jsonl")
    for step in (2, 3):  # the in-flight half, moments and counters; and the weights
        folders = [tmp_path / name / f"step-{step:06}" for name in ("run", "whole")]
        assert_same(*(torch.load(folder / "training.pt", weights_only=True) for folder in folders))
        same_file(*(folder / "model.safetensors" for folder in folders))


def assert_two_ranks_equal_one(finished, tmp_path, *options) -> None:
    one, _ = finished
    *_, leaving = launch(*SMALL, *options, "--out", tmp_path / "two", ranks=2)
    assert leaving < LEAVING
    for mine, theirs in zip(
        *(
            (folder / "samples.jsonl").read_text().splitlines()
            for folder in (one, tmp_path / "two")
        ),
        strict=True,
    ):
        # rounded to four decimals, so what differs in the last bit may differ there
        numbers: list[list[float]] = [[], []]
        trees = [
            json.loads(
                line,
                object_hook=lambda node, to=to: {
                    key: value
                    for key, value in node.items()
                    if not (key in ("logprobs", "entropies") and to.extend(value) is None)
                },
            )
            for line, to in zip((mine, theirs), numbers)
        ]
        assert (
            trees[0] == trees[1]
            and numbers[0] == pytest.approx(numbers[1], abs=2e-4)
            and len(numbers[0]) > 100
        )
    assert_agreement(metrics_of(tmp_path / "two"))
    for mine, theirs in zip(metrics_of(one), metrics_of(tmp_path / "two")):
        same = [key for key in mine if not key.startswith(("seconds/", "logprob_gap/"))]
        assert {key: mine[key] for key in same} == pytest.approx(
            {key: theirs[key] for key in same}, rel=1e-4, abs=1e-6
        )


@needs_vllm
def test_two_ranks_sample_what_one_samples(finished, tmp_path):
    """Each rank has an engine of its own; a rollout's seed is its place in the run."""
    assert_two_ranks_equal_one(finished, tmp_path)


@needs_vllm
@pytest.mark.full
def test_two_ranks_with_sharded_weights_sample_what_one_samples(finished, tmp_path):
    assert_two_ranks_equal_one(finished, tmp_path, "--parallel", "fsdp")


@needs_vllm
@pytest.mark.full
def test_a_run_that_must_stop_leaves_at_once(tmp_path):
    """The check after the sync fails while vLLM is alive: one line, exit code 2, and the process
    ends."""
    _, error, _ = launch(*SMALL, "--sync_tolerance", "1e-12", "--out", tmp_path / "run", code=2)
    assert (
        error.count("attnrl.py: engine and learner disagree after the weight sync") == 1
        and "Traceback" not in error
    )


def run_here(engines, tmp_path, *options) -> list[dict]:
    """A run inside this process (no import of vLLM to wait for): its metrics."""
    engines.close()
    return metrics_of(train(parse_config([*SMALL, *options, "--out", str(tmp_path / "run")])))


@needs_vllm
@pytest.mark.parametrize(
    "options",
    [
        ["--one_step_off_policy", "false"],
        ["--behaviour", "engine"],
        pytest.param(["--tis_cap", "2"], marks=pytest.mark.full),
        pytest.param(["--parallel", "fsdp"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_every_way_to_train_runs_with_vllm(engines, tmp_path, options):
    records = run_here(engines, tmp_path, *options)
    # the last step samples continuations only, of which the engine's log-probs are all that is
    # wanted
    assert_agreement(records, scored=(1,) if "--behaviour" in options else (1, 2))
    # the policy that sampled is the one that trains
    assert records[1]["train/ratio"] == pytest.approx(1, abs=1e-5)


@needs_vllm
@pytest.mark.full
def test_half_precision_runs_with_vllm(engines, tmp_path):
    """bf16: rounding differs between engine and learner, and the tolerance is that of bf16."""
    for m in run_here(engines, tmp_path, "--dtype", "bf16")[1:]:
        print({key: value for key, value in m.items() if key.startswith("logprob_gap")})
        assert (
            m["train/updates"] >= 1
            and 1e-4 < m["logprob_gap/mean"] < 0.05
            and m["logprob_gap/sync"] < 0.05
        )


@needs_vllm
def test_the_evaluation_command_equals_the_transformers_engine_at_temperature_0(
    engines, tmp_path, capsys
):
    engines.close()
    written = []
    for engine in ("vllm", "transformers"):
        out = tmp_path / engine
        evaluation.main(
            [
                "--model",
                str(TOY_MODEL),
                *typed("--problems toy:8:10:2 --k 1 --temperature 0"),
                "--engine",
                engine,
                "--out",
                str(out),
            ]
        )
        # without the settings, which name the engine
        written.append((out / "toy-8-10-2.jsonl").read_text().splitlines()[1:])
    assert (
        len(written[0]) == 10
        and all(a == b for a, b in zip(*written))
        and capsys.readouterr().out.count("avg@k") == 2
    )


# --------------------------------------------------------------------------------------------------
# Log-probs
# --------------------------------------------------------------------------------------------------
@needs_vllm
@pytest.mark.parametrize(
    "kind, tied",
    [("qwen2", True), ("qwen2", False), ("llama", True), ("llama", False), ("qwen3", False)],
)
def test_logprobs_equal_the_learners_before_and_after_each_update(engines, tmp_path, kind, tied):
    """Three times sampled, two real updates in between that change the same tokens' log-probs by a
    lot; temperatures 1.0 and 0.6. The requests repeat, so their prefixes are in the cache with the
    KV of the weights before."""
    policy = random_model(kind, tied)
    policy.save_pretrained(tmp_path)
    engine = engines.get(tmp_path)
    requests = requests_for(1)
    engine.sync_weights(full_weights(policy))
    for again in range(3):
        completions = engine.generate(requests)
        learnt = learner_logprobs(policy, requests, completions)
        assert largest([c.logprobs for c in completions], learnt) < 1e-4, f"after {again} updates"
        update(policy, requests, completions, lr=0.003)
        # 1000 times what is tolerated
        assert largest(learnt, learner_logprobs(policy, requests, completions)) > 0.1
        engine.sync_weights(full_weights(policy))


@needs_vllm
def test_a_configurations_head_dimension_is_read(engines, tmp_path):
    """Heads that are wider than hidden_size / heads (as Qwen3's): the KV cache holds what was asked
    for."""
    policy = tiny_model("qwen3", hidden_size=64, head_dim=32, tie_word_embeddings=True)
    policy.save_pretrained(tmp_path)
    engine = engines.get(tmp_path)
    engine.sync_weights(full_weights(policy))
    requests = requests_for(2)
    completions = engine.generate(requests)
    assert (
        largest([c.logprobs for c in completions], learner_logprobs(policy, requests, completions))
        < 1e-4
    )
    assert engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 65536 // 32


# --------------------------------------------------------------------------------------------------
# Requests
# --------------------------------------------------------------------------------------------------
@needs_vllm
def test_tokens_depend_on_the_own_seed_only(tiny):
    """Alone, in any order, with a cold or a warm prefix cache: the same tokens."""
    engine, policy = tiny
    requests = requests_for(3)
    wanted = engine.generate(requests)
    alone = [engine.generate([r])[0] for r in requests]
    order = random.Random(3).sample(range(len(requests)), len(requests))
    engine.sync_weights(full_weights(policy))  # the cache is cold again
    permuted = engine.generate([requests[i] for i in order])
    for got in (alone, [permuted[order.index(i)] for i in range(len(order))]):
        assert [(c.tokens, c.finished) for c in got] == [(c.tokens, c.finished) for c in wanted]
        assert largest([c.logprobs for c in got], [c.logprobs for c in wanted]) < 1e-4


@needs_vllm
def test_another_seed_gives_other_tokens_and_the_same_seed_the_same(tiny):
    engine, _ = tiny
    requests = [Request([1, 2, 3], 10, 1.0, request_seed(0, i)) for i in range(12)]
    engine.eos_ids = []
    torch.manual_seed(0)
    twelve = engine.generate(requests)
    assert len({tuple(c.tokens) for c in twelve}) >= 11
    torch.manual_seed(1)  # global generators play no role, although vLLM advances them
    assert [c.tokens for c in engine.generate(requests)] == [c.tokens for c in twelve]
    largest_seed = 2**63 - 1
    same = engine.generate([Request([1, 2, 3], n, 1.0, largest_seed) for n in (20, 20, 20, 6)])
    assert same[0] == same[1] == same[2] and len(same[0].tokens) == 20
    assert same[3].tokens == same[0].tokens[:6]  # a larger budget only appends


@needs_vllm
def test_end_tokens_finish_a_completion_and_max_tokens_cuts_it(tiny):
    """An end token is the last of its completion and counts as one; without one exactly max_tokens
    are made."""
    engine, _ = tiny
    requests = [Request([i % 40, 2, 3], 1 + i % 30, 1.0, request_seed(3, i)) for i in range(80)]
    engine.eos_ids = []
    free = engine.generate(requests)
    assert all(len(c.tokens) == r.max_tokens and not c.finished for r, c in zip(requests, free))
    engine.eos_ids = [5, 11]
    completions = engine.generate(requests)
    for request, completion, whole in zip(requests, completions, free):
        ends = [t for t, token in enumerate(whole.tokens) if token in engine.eos_ids]
        stop = ends[0] + 1 if ends else request.max_tokens
        assert completion.tokens == whole.tokens[:stop] and len(completion.logprobs) == stop
        assert completion.finished == bool(ends)
    assert 20 < sum(c.finished for c in completions) < 70
    exact = [
        (Request(r.prompt_ids, len(c.tokens), 1.0, r.seed), c)
        for r, c in zip(requests, completions)
        if c.finished
    ]
    # the end token in the last place that is allowed: finished, too
    at_the_limit = engine.generate([r for r, _ in exact])
    assert [(c.tokens, c.finished) for c in at_the_limit] == [(c.tokens, True) for _, c in exact]


@needs_vllm
@pytest.mark.parametrize("model", ["toy", "tiny"])
def test_greedy_equals_the_transformers_engine(model, request):
    engine, policy = request.getfixturevalue(model)
    requests = requests_for(5, temperatures=[0])
    if model == "toy":
        requests += [Request(r.prompt_ids, 60, 0, r.seed) for r in toy_requests(20)[::2]]
    got, wanted = engine.generate(requests), TransformersEngine(policy, EOS).generate(requests)
    assert [(c.tokens, c.finished) for c in got] == [(c.tokens, c.finished) for c in wanted]
    assert largest([c.logprobs for c in got], [c.logprobs for c in wanted]) < 1e-4


@needs_vllm
def test_temperatures_of_a_batch_do_not_mix(tiny):
    """Greedy, cool and warm requests side by side: each as if alone, each with the log-probs of its
    own temperature."""
    engine, policy = tiny
    requests = requests_for(4, temperatures=(1.0, 0, 0.6, 1.7))
    completions = engine.generate(requests)
    assert [engine.generate([r])[0].tokens for r in requests] == [c.tokens for c in completions]
    assert (
        largest([c.logprobs for c in completions], learner_logprobs(policy, requests, completions))
        < 1e-4
    )


@needs_vllm
def test_wrong_requests_are_refused_and_leave_nothing_behind(tiny):
    engine, _ = tiny
    good = Request([1, 2, 3], 5, 1.0, 0)
    wanted = engine.generate([good])
    for bad, message in (
        (Request([], 5, 1.0, 0), "cannot be empty"),
        (Request([1], 0, 1.0, 0), "max_tokens must be at least 1"),
        (Request([1] * (LONGEST + 1), 5, 1.0, 0), "maximum context length"),
    ):
        with pytest.raises(Exception, match=message):
            engine.generate([good, bad])
        assert engine.generate([good]) == wanted
    assert engine.generate([]) == []


@needs_vllm
def test_the_samples_are_those_of_the_softmax(tiny):
    """First tokens of 2000 requests against the learner's probabilities: chi-square, 99.9 %
    quantiles."""
    engine, policy = tiny
    prompt = [3, 4, 5, 6] * 9
    for temperature in (1.0, 0.6):
        completions = engine.generate(
            [Request(prompt, 1, temperature, request_seed(9, i)) for i in range(2000)]
        )
        with torch.no_grad():
            p = (policy(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).double()
        counts = torch.bincount(torch.tensor([c.tokens[0] for c in completions]), minlength=len(p))
        likely = p * 2000 >= 5  # the others are counted as one
        observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
        expected = 2000 * torch.cat([p[likely], p[~likely].sum()[None]])
        bins = int(likely.sum())
        assert bins >= 10
        # Wilson and Hilferty
        quantile = bins * (1 - 2 / (9 * bins) + 3.09 * (2 / (9 * bins)) ** 0.5) ** 3
        assert ((observed - expected) ** 2 / expected).sum() < quantile


# --------------------------------------------------------------------------------------------------
# Weights that did not arrive
# --------------------------------------------------------------------------------------------------
@needs_vllm
def test_weights_that_never_came_are_caught(engines, toy_model):
    """vLLM starts with dummy weights, so whatever a sync leaves out shows in the first check: also
    the output head."""
    engines.close()
    engine = engines.get(TOY_MODEL)
    assert refused(engine, toy_model, toy_requests(4))[2] > 1
    engine.sync_weights(toy_model.named_parameters())
    assert refused(engine, toy_model, toy_requests(4))[2] > 1
    engine.sync_weights(full_weights(toy_model))
    assert engine_gap(engine, toy_model, toy_requests(4), TOY.sync_tolerance) < 1e-5


@needs_vllm
def test_a_forgotten_sync_is_caught(toy):
    """One update with the preset's own learning rate and the tolerance that a run has. The message
    has both numbers."""
    engine, policy = toy
    requests, completions, probes = sampled_by(engine)
    assert engine_gap(engine, policy, probes, TOY.sync_tolerance) < 1e-5
    update(policy, requests, completions, lr=TOY.lr)
    numbers = refused(engine, policy, probes)
    print(
        f"a forgotten sync after one update with lr {TOY.lr:g}: mean gap {numbers[2]:.2g},"
        f" tolerance {TOY.sync_tolerance:g}"
    )
    again = engine.generate(probes)
    mean = (
        fmean(lp for c in again for lp in c.logprobs),
        fmean(lp for row in learner_logprobs(policy, probes, again) for lp in row),
    )
    assert numbers[:2] == pytest.approx(mean, abs=1e-4)
    engine.sync_weights(full_weights(policy))
    assert engine_gap(engine, policy, probes, TOY.sync_tolerance) < 1e-5


@needs_vllm
def test_a_training_step_whose_sync_is_forgotten_stops_the_run(engines, tmp_path, monkeypatch):
    """The same in the training loop, and what a forgotten sync amounts to there."""
    engines.close()
    run = set_up(*SMALL, "--out", tmp_path / "run")
    try:
        assert 0 < run.monitor.sync_gap < 1e-5
        said = step_without_sync(run, monkeypatch)
        print(
            "a step of the toy without sync:", re.search(r"\|difference\| \S+", str(said)).group()
        )
        run.sync_engine()
        assert 0 < run.monitor.sync_gap < 1e-5
    finally:
        run.engine.close()


@needs_vllm
def test_a_stale_output_head_is_caught(toy):
    """Tied embeddings: `named_parameters()` lacks lm_head.weight, and on the CPU vLLM silently
    keeps the old one."""
    engine, policy = toy
    requests, completions, probes = sampled_by(engine)
    assert "lm_head.weight" not in dict(policy.named_parameters()) and "lm_head.weight" in dict(
        full_weights(policy)
    )
    update(policy, requests, completions, lr=VISIBLE)
    engine.sync_weights(policy.named_parameters())
    print("a stale output head: mean gap", refused(engine, policy, probes)[2])
    engine.sync_weights(full_weights(policy))
    assert engine_gap(engine, policy, probes, TOY.sync_tolerance) < 1e-5


@needs_vllm
def test_a_stale_prefix_cache_is_caught(toy):
    """New weights, old KV: only requests whose prefixes the engine has seen can show it, and
    probe_requests makes such."""
    engine, policy = toy
    requests, completions, probes = sampled_by(engine)
    assert all(len(r.prompt_ids) > 32 for r in probes)  # at least one whole block
    update(policy, requests, completions, lr=VISIBLE)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_weights(policy)})
    print("a stale prefix cache: mean gap", refused(engine, policy, probes)[2])
    unseen = [Request(r.prompt_ids[::-1], r.max_tokens, r.temperature, r.seed) for r in probes]
    assert engine_gap(engine, policy, unseen, TOY.sync_tolerance) < 1e-5  # the weights did arrive
    engine.llm.reset_prefix_cache()
    assert engine_gap(engine, policy, probes, TOY.sync_tolerance) < 1e-5


@needs_vllm
def test_probes_have_prefixes_that_the_engine_has_cached(toy):
    engine, _ = toy
    requests, completions, probes = sampled_by(engine)
    assert [r.prompt_ids for r in probes] == [
        r.prompt_ids + c.tokens[: len(c.tokens) // 2] for r, c in zip(requests[:4], completions)
    ]
    params = engine.params(max_tokens=1, detokenize=False)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": r.prompt_ids} for r in probes], params, use_tqdm=False
    )
    assert all(o.num_cached_tokens >= 32 for o in outputs)


@needs_vllm
def test_the_engine_can_be_closed_and_another_model_follows(engines, toy_model, tmp_path):
    """close() leaves no process group and no patched torch behind; the next engine in the same
    process works."""
    before = torch.set_num_threads
    engine = engines.get(TOY_MODEL)
    engines.close()
    assert (
        not hasattr(engine, "llm")
        and not torch.distributed.is_initialized()
        and torch.set_num_threads is before
    )
    engine = engines.get(TOY_MODEL)
    engine.sync_weights(full_weights(toy_model))
    assert engine_gap(engine, toy_model, toy_requests(4), TOY.sync_tolerance) < 1e-5


def test_the_tolerance_follows_the_precision():
    assert parse_config(["--device", "cpu"]).sync_tolerance == 1e-4 and Config().sync_tolerance == 0
    assert parse_config(["--dtype", "bf16"]).sync_tolerance == 0.05
    assert parse_config(["--sync_tolerance", "0.2"]).sync_tolerance == 0.2
