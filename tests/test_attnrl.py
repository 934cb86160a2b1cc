"""The training loop and the command line, run for real on the toy: pipeline order, determinism,
files, settings."""

import dataclasses
import json
import random

import pytest
import torch
from fixtures import (
    REAL_DATA,
    ROOT,
    TOY_MODEL,
    lines,
    metrics_of,
    same_file,
    save_real_model,
    typed,
)
from toy_runs import TINY, metrics, set_up, tiny, train, train_tiny, trained_sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnrl
import baselines
from attnrl import METHODS, Config, parse_config
from fci import separator_tokens, split_steps
from runtime.cli import UserError, stop_on_user_error
from runtime.data import Problem, load_problems
from runtime.metrics import batch_metrics
from runtime.rollout import Request, TransformersEngine, request_seed
from runtime.scoring import Sequence, score
from sampler import solve_rate, tree_count
from tree import Response, choose_branch_points, tree_sequences


# --- configuration
# --------------------------------------------------------------------------------------------------
def test_presets_and_command_line_in_this_order():
    assert parse_config([]).delta == 1 and parse_config([]).lr == 5e-5  # toy
    paper = parse_config(["--preset", "paper"])
    assert (paper.delta, paper.lr, paper.batch_size, paper.group_size, paper.max_response) == (
        4,
        1e-6,
        64,
        6,
        8192,
    )
    assert (paper.min_branch_gap, paper.mini_batch, paper.kl_coef, paper.rho) == (
        512,
        192,
        0.001,
        0.2,
    )
    assert (
        paper.one_step_off_policy
        and paper.ads_filter == "fci"
        and paper.ads_expansion
        and paper.ads_batch
    )
    assert parse_config(["--method", "prl"]).prl_steps == "blank", (
        "on the toy every response would be one step, and PRL would be GRPO"
    )
    assert paper.target_sequences == 1920  # B', the authors' 64 * 6 * 5
    assert (
        parse_config(["--delta", "3", "--preset=paper", "--one_step_off_policy", "false"]).delta
        == 3
    )
    assert not parse_config(["--one_step_off_policy", "false"]).one_step_off_policy
    grpo = parse_config(["--advantage", "grpo"])
    assert grpo.samples_per_problem() == 30 and parse_config([]).samples_per_problem() == 6
    assert (
        parse_config(
            ["--advantage", "grpo", "--grpo_samples", "8", "--batch_size", "4"]
        ).target_sequences
        == 32
    )


def test_help_is_grouped_with_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help_all"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "example: python attnrl.py" in text
    assert all(
        f"\n{group}:\n" in text
        for group in ("sampling", "branching", "adaptive sampling", "update", "machine")
    )
    assert all(
        f"--{f.name}" in text for f in dataclasses.fields(Config)
    ) and "top rho of FCI (default: 0.2)" in " ".join(text.split())
    assert (
        parse_config(["--ads_batch", "False"]).ads_batch is False
        and parse_config(["--dry_run"]).dry_run is True
    )


def test_a_method_is_attnrl_but_for_a_few_settings():
    names = list(METHODS)
    with pytest.raises(UserError) as refused:  # what the command line takes
        parse_config(["--method", "other"])
    assert all(f"'{name}'" in str(refused.value) for name in names)
    usual = vars(parse_config([]))
    changed = {
        name: {
            key: value
            for key, value in vars(parse_config(["--method", name])).items()
            if value != usual[key]
        }
        for name in names
    }
    off = dict(ads_filter="none", ads_expansion=False, ads_batch=False, ads_drop=False)
    synchronous = {"one_step_off_policy": False}
    assert {
        name: {key: value for key, value in settings.items() if key != "method"}
        for name, settings in changed.items()
    } == {
        "attnrl": {},
        "atb_ads_nofilter": {"ads_filter": "none"},
        "atb_ads_noexpand": {"ads_expansion": False},
        "atb_drop_easy": {"ads_filter": "easy"},
        "atb": off | synchronous,
        "treerl_off": off | {"branch": "entropy"},
        "treerl": off | synchronous | {"branch": "entropy"},
        "grpo": off | synchronous | {"advantage": "grpo"},
        "prl": off | synchronous | {"advantage": "prl"},
        "frpo": off
        | synchronous
        | {"advantage": "prl", "prl_steps": "length", "prl_length": 1, "prl_eta": 100.0},
        "datpo": off | synchronous | {"advantage": "datpo", "branch": "step_entropy"},
    }
    assert parse_config(["--method=prl", "--preset", "paper"]).kl_coef == 0.0  # its script has none
    assert parse_config(["--kl_coef", "0.1", "--method=prl", "--preset", "paper"]).kl_coef == 0.1


@pytest.mark.parametrize(
    "args, message",
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "-1"], "--lr -1"),
        (["--temperature", "0"], "--temperature 0"),
        (["--rho", "2"], "--rho 2"),
        (["--max_grad_norm", "0"], "--max_grad_norm 0"),
        (["--device", "cud"], "argument --device: invalid choice: 'cud'"),
        (["--branch", "best"], "--branch"),
        (["--preset", "mine"], "--preset"),
        (["--step", "3"], "--step"),
        (["--batch_size", "x"], "--batch_size"),
        (["--one_step_off_policy", "maybe"], "--one_step_off_policy"),
        (["--model", "nowhere"], "--model nowhere: cannot be loaded"),
        (["--problems", "nowhere.jsonl"], "no such problem file"),
        (["--problems", "toy:99"], "toy:99"),
        (["--reward", "no:thing"], "--reward no:thing"),
        (["--max_response", "100000"], "more than the model's"),
        (["--out", "/dev/null/x"], "--out"),
        (["--out", "tests"], "--out"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "file").touch()
    with pytest.raises(SystemExit) as stop, stop_on_user_error("attnrl.py"):
        attnrl.main([*TINY, *args])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1, error


# --- whole runs
# --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return attnrl.train(parse_config(tiny(tmp_path_factory.mktemp("runs"))))


def test_a_run_writes_its_folder(finished):
    assert {p.name.split("-0")[0] for p in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "batches.jsonl",
        "samples.jsonl",
        "curves.png",
        "explorer.html",
        "last",
        "best",
        "step",
    }
    config = json.loads((finished / "config.json").read_text())
    assert (
        config["out"] == str(finished)
        and config["target_sequences"] == 4 * 30
        and config["device"] in ("cpu", "cuda")
    )
    assert (
        config["steps"] == 2
        and config["branch"] == "fci"
        and set(config) == {f.name for f in dataclasses.fields(Config)} | {"versions"}
    )
    records = metrics_of(finished)
    assert [m["step"] for m in records] == [0, 1, 2] and all("test_accuracy" in m for m in records)
    assert records[2]["generated_tokens"] > records[1]["generated_tokens"] > 0
    assert (
        records[1]["logprob_gap/max"] < 1e-4
        and records[1]["train/tokens"] == records[1]["valid_tokens"] > 0
    )
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1, 1, 2, 2]
    for s in samples:
        for r in s["responses"]:
            assert [c["at"] for c in r["continuations"]] == [
                at for at in r["branch_points"] for _ in range(2)
            ]
            assert (
                set(r["branch_points"]) < set(r["bounds"]) and len(r["fci"]) == len(r["bounds"]) - 1
            )
            for end in [r, *r["continuations"]]:
                assert len(end["tokens"]) == len(end["logprobs"]) == len(end["entropies"]) and end[
                    "reward"
                ] in (0, 1)
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_models_load_and_the_last_one_was_trained(finished):
    first = AutoModelForCausalLM.from_pretrained(TOY_MODEL).state_dict()
    last = AutoModelForCausalLM.from_pretrained(finished / "last").state_dict()
    assert any(not torch.equal(first[name], last[name]) for name in first)
    text = "b=3+4=7\n\n\\boxed{7}"
    assert AutoTokenizer.from_pretrained(finished / "best").encode(
        text
    ) == AutoTokenizer.from_pretrained(TOY_MODEL).encode(text)


def test_every_metric_is_explained(finished):
    page = (ROOT / "docs" / "runs.md").read_text()
    missing = {key for m in metrics_of(finished) for key in m if f"`{key}`" not in page}
    assert not missing


def test_two_runs_with_one_seed_are_identical(finished, tmp_path):
    again = train_tiny(tmp_path)
    assert metrics(finished) == metrics(again)
    same_file(finished / "samples.jsonl", again / "samples.jsonl")
    same_file(finished / "last/model.safetensors", again / "last/model.safetensors")
    other = train_tiny(tmp_path, *typed("--seed 1 --steps 1 --eval_every 0"), name="other")
    kept = [lines(folder / "samples.jsonl")[0]["problem"] for folder in (finished, other)]
    assert (
        kept[0] != kept[1] and metrics(finished)[1]["train/loss"] != metrics(other)[1]["train/loss"]
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "grpo", "--grpo_samples", "8"],
        *(
            pytest.param(o, marks=pytest.mark.full)
            for o in (
                typed("--method prl --grpo_samples 8"),
                ["--method", "treerl"],
                ["--branch", "random"],
            )
        ),
        ["--kl_coef", "0.01", "--temperature", "0.8"],
    ],
)
def test_every_method_runs(tmp_path, options):
    records = metrics_of(train_tiny(tmp_path, *options))
    assert len(records) == 3 and records[2]["train/updates"] >= 1
    assert (
        records[2]["leaves"] == 4 * 8
        if "--grpo_samples" in options
        else records[2]["leaves"] > 4 * 6
    )
    if "--kl_coef" in options:
        assert records[1]["train/kl"] == pytest.approx(0, abs=1e-6) and records[2]["train/kl"] > 0


def test_grpo_has_no_branch_points_and_says_nothing_of_them(tmp_path, capsys):
    train_tiny(tmp_path, *typed("--advantage grpo --grpo_samples 8 --steps 1 --eval_every 0"))
    assert "filtered" not in capsys.readouterr().out


def test_prl_steps_and_process_rewards_in_a_run(tmp_path):
    """The first step starts at the initial policy, so the log-ratios are 0 (up to rounding); in the
    second they are not, and the advantage is another one in every step of a response. Groups whose
    rewards agree are trained, too."""
    options = typed("--method prl --grpo_samples 8 --prl_steps blank --prl_eta 2 --lr 1e-3")
    run = set_up(*tiny(tmp_path), *options)
    for number in (1, 2):
        result = attnrl.step(run, number, None)
        responses = [r for group in result.groups for r in group.responses]
        ratios = [
            abs(a - b) for r in responses for a, b in zip(r.logprobs, r.ref_logprobs, strict=True)
        ]
        assert max(ratios) < 1e-4 if number == 1 else max(ratios) > 0.01
        assert all(len(r.bounds) > 4 for r in responses), "programs of 6 lines have blank lines"
    agreeing = [g for g in result.groups if len({r.reward for r in g.responses}) == 1]
    assert agreeing and len(result.sequences) == len(responses)
    assert all(len(set(s.advantages)) > 2 for s in result.sequences)


@pytest.mark.parametrize("method, dropped", [("attnrl", True), ("treerl", False), ("grpo", False)])
def test_only_ads_drops_leaves_without_an_advantage(tmp_path, method, dropped):
    """Baselines train all leaves: those without an advantage count in the token mean, too."""
    samples = typed("--grpo_samples 6") if method == "grpo" else []
    run = set_up(*tiny(tmp_path), *samples, *typed(f"--method {method}"))
    grade, easy = run.grade, []  # the first problem's responses are all right

    def grades(items):
        easy.extend(p for _, p in items[:1])
        return [(1.0, True) if p == easy[0] else g for (_, p), g in zip(items, grade(items))]

    run.grade = grades
    result = attnrl.step(run, 1, None)
    every = [s for group in result.groups for s in attnrl.leaves(run.config, group)]
    kept = [s for s in every if any(s.advantages)]
    assert run.config.ads_drop is dropped and len(every) > len(kept) > 0
    assert len(result.sequences) == len(kept if dropped else every)
    assert result.stats.tokens == sum(len(s.tokens) for s in result.sequences)
    measured = batch_metrics(result.groups, result.sequences)
    assert measured["valid_tokens"] == sum(len(s.tokens) for s in kept)
    assert measured["valid_token_ratio"] < 1


def test_the_clips_of_the_configuration_reach_the_loss(tmp_path):
    """Clips 0.05, 0.1, 2 on ratio 1.5 with A = 1: -1.1; ratio 0.9 with A = -1: 0.95; ratio 2.5 with
    A = -1: 2."""
    clips = typed("--clip_low 0.05 --clip_high 0.1 --dual_clip 2")
    ratios, advantages = torch.tensor([1.5, 0.9, 2.5]), torch.tensor([1.0, -1.0, -1.0])
    run = set_up(*tiny(tmp_path), *clips)
    losses, clipped = run.learner.loss(ratios.log(), torch.zeros(3), advantages)
    assert losses.tolist() == pytest.approx([-1.1, 0.95, 2.0]) and clipped.all()


@pytest.mark.parametrize("choice, expanded", [("none", True), ("easy", False)])
def test_easy_problems_are_all_expanded_or_none(choice, expanded, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "all_right.py").write_text("def always(response, answers):\n    return 1.0\n")
    record = metrics_of(
        train_tiny(tmp_path, "--ads_filter", choice, "--reward", "all_right:always", "--steps", "1")
    )[1]
    assert (
        record["filtered_ratio"] == (0 if expanded else 1)
        and (record["leaves"] > 4 * 6) == expanded
    )


def test_eq9_is_what_a_run_expands(tmp_path):
    """As many trees as Eq. 9 says, none where all are right, the rarer outcome first."""
    run = set_up(*tiny(tmp_path), "--batch_size", "8", "--ads_filter", "easy")
    batch = attnrl.new_batch(run, 1)
    attnrl.sample(run, None, batch)
    for group in batch.groups:
        rewards = [r.reward for r in group.responses]
        z = solve_rate(rewards)
        wanted = 0 if z == 1 else tree_count(z, 6)
        assert group.filtered == (z == 1) and group.trees() == wanted
        if wanted:
            rare, grown = float(z < 0.5), [r.reward for r in group.responses if r.branch_points]
            assert grown.count(rare) == min(len(grown), rewards.count(rare))
    assert len({group.trees() for group in batch.groups}) > 2


@pytest.mark.parametrize(
    "options, fci, points",
    [
        ("--branch_points 1 --min_branch_gap 25", [0, 0.9, 0.9, 0.9, 0.9, 0.9, 0, 0], [30]),
        (
            "--branch_points 3 --rho 0.3",
            [0, 0.1, 0.5, 0.2, 0.9, 0.8, 0, 0, 0, 0],
            [20, 40, 50],
        ),
    ],
)
def test_eq7_settings_reach_the_branch_points(options, fci, points):
    n = len(fci)  # steps of ten tokens
    r = Response([1] * 10 * n, [0.0] * 10 * n, bounds=list(range(0, 10 * n + 1, 10)), fci=fci)
    r.branchable = n
    config = parse_config([*typed(options), *typed("--group_size 1 --ads_expansion false")])
    attnrl.choose_expansions(config, attnrl.Group(0, 0, None, [r]), 0.0, random.Random(0))
    assert r.branch_points == points


def test_options_of_the_baselines_reach_them(tmp_path):
    """PRL by hand, eta 2: 0.5 - 1/2 (0 + 1) and 0.5 - 0; CISPO at log-ratio 0.5: the weight 1.28
    times the log-prob 0.5."""
    r = Response([1, 2], [-1.0, -1.0], 1.0, bounds=[0, 1, 2], finished=False)
    r.ref_logprobs = [-2.0, -1.0]
    prl = parse_config(typed("--method prl --prl_eta 2 --scale_rewards none"))
    first, _ = baselines.flattening(prl)([9], [r, dataclasses.replace(r, reward=0.0)])
    assert first.advantages == [0.0, 0.5]
    group = attnrl.Group(0, 0, Problem("?", ["1"], "", [9]), [r])
    assert attnrl.leaves(parse_config([]), group)[0].trained == 2
    assert attnrl.leaves(parse_config(typed("--mask_cut_off true")), group)[0].trained == 0
    loss = set_up(*tiny(tmp_path), "--loss", "cispo").learner.loss
    value, _ = loss(torch.tensor([0.5]), torch.zeros(1), torch.ones(1), [1])
    assert value.item() == pytest.approx(-1.28 * 0.5)


def test_inert_fci_is_named(tmp_path, capsys):
    train_tiny(tmp_path, "--delta", "12", "--steps", "1")
    assert "FCI is inert" in capsys.readouterr().out


def test_without_adaptive_sampling_every_response_is_expanded(tmp_path):
    off = typed("--ads_filter none --ads_expansion false --ads_batch false")
    for m in metrics_of(train_tiny(tmp_path, *off, *typed("--batch_size 2 --eval_every 0")))[1:]:
        assert (m["problems"], m["trees"], m["filtered_ratio"], m["leaves"]) == (2, 6, 0, 2 * 30)


# --- the pipeline
# --------------------------------------------------------------------------------------------------
class CountingEngine(TransformersEngine):
    """The real engine, which also remembers what it was asked."""

    def __init__(self, engine):
        super().__init__(engine.model, engine.eos_ids, engine.token_budget)
        self.calls = []

    def generate(self, requests, on_token=None):
        self.calls.append(requests)
        return super().generate(requests, on_token)


def initial_requests(run: attnrl.Run) -> list[tuple[int, int]]:
    """(initial responses, all requests) of each generation call of three steps."""
    run.engine, batch = CountingEngine(run.engine), None
    for number in (1, 2, 3):
        batch = attnrl.step(run, number, batch).upcoming
    assert batch is None
    longest = run.config.max_response
    return [(sum(r.max_tokens == longest for r in call), len(call)) for call in run.engine.calls]


def test_one_step_off_policy_needs_one_call_a_step_and_one_warm_up(tmp_path):
    options = typed("--steps 3 --batch_size 2 --ads_batch false")
    calls = initial_requests(set_up(*tiny(tmp_path), *options))
    # warm-up; steps 1 and 2 sample the next batch too; nothing for a batch after the last
    assert [initial for initial, _ in calls] == [12, 12, 12, 0]
    # and each step has continuations
    assert all(asked > initial for initial, asked in calls[1:])


def test_synchronous_mode_needs_two_calls_a_step(tmp_path):
    options = typed("--steps 3 --batch_size 2 --ads_batch false --one_step_off_policy false")
    calls = initial_requests(set_up(*tiny(tmp_path), *options))
    assert [initial for initial, _ in calls] == [12, 0, 12, 0, 12, 0]


def test_every_token_keeps_the_log_prob_of_the_policy_that_sampled_it(tmp_path):
    run = set_up(*tiny(tmp_path), "--lr", "0.003")
    first, second = attnrl.new_batch(run, 1), attnrl.new_batch(run, 2)
    attnrl.sample(run, None, first)
    attnrl.sample(run, first, second)  # both with the initial policy

    def scored(group, tokens):
        sequence = Sequence(group.problem.prompt_ids, tokens)
        return torch.tensor(score(run.policy, [sequence])[0].logprobs)

    before = {
        (j, i): scored(g, r.tokens)
        for j, g in enumerate(second.groups)
        for i, r in enumerate(g.responses)
    }
    attnrl.update_policy(run, 1, trained_sequences(run, first.groups))
    attnrl.sample(run, second, None)  # continuations come from the updated policy
    for j, group in enumerate(second.groups):
        for i, r in enumerate(group.responses):
            now = scored(group, r.tokens)
            # the older policy's
            assert torch.allclose(torch.tensor(r.logprobs), before[j, i], atol=1e-5)
            assert not torch.allclose(now, before[j, i], atol=1e-3)
            for c in r.continuations:
                whole = scored(group, r.tokens[: c.at] + c.tokens)
                # the newer policy's
                assert torch.allclose(torch.tensor(c.logprobs), whole[c.at :], atol=1e-5)
        # and so they reach training: the shared prefix with the older, the suffix with the newer
        # log-probs
        trained = {
            (tuple(s.tokens), tuple(s.logprobs))
            for s in tree_sequences(group.problem.prompt_ids, group.responses)
        }
        for r in group.responses:
            for c in r.continuations:
                tokens = tuple(r.tokens[: c.at] + c.tokens)
                assert (tokens, tuple(r.logprobs[: c.at] + c.logprobs)) in trained
    assert any(r.continuations for g in second.groups for r in g.responses)


def test_a_rollout_depends_on_its_place_in_the_run_only(tmp_path):
    """Same (seed, step, problem, response) -> same tokens, whatever the batch size and however it
    is cut up."""
    tokens = []
    for options in (["--batch_size", 4], ["--batch_size", 2, "--rollout_tokens", 300]):
        run = set_up(*tiny(tmp_path), *options)
        torch.manual_seed(len(tokens))  # global generators play no role
        batch = attnrl.new_batch(run, 1)
        attnrl.sample(run, None, batch)
        tokens.append([[r.tokens for r in g.responses] for g in batch.groups[:2]])
    assert tokens[0] == tokens[1]


def test_one_generation_call_samples_what_two_calls_sample(tmp_path):
    """With weights that stay the same, batch m's leaves do not depend on what else is in its
    call."""

    def whole(sequence):
        return sequence.prompt_ids, sequence.tokens, sequence.advantages

    leaves = []
    for one_call in (True, False):
        run = set_up(*tiny(tmp_path), "--lr", 0)
        first, second = attnrl.new_batch(run, 1), attnrl.new_batch(run, 2)
        attnrl.sample(run, None, first)
        for call in (
            [(first, second), (second, None)]
            if one_call
            else [(first, None), (None, second), (second, None)]
        ):
            attnrl.sample(run, *call)
        leaves.append(
            [
                s
                for batch in (first, second)
                for group in batch.groups
                for s in attnrl.leaves(run.config, group)
            ]
        )
    assert list(map(whole, leaves[0])) == list(map(whole, leaves[1])) and len(leaves[0]) > 50
    for one, two in zip(*leaves):
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(two.logprobs), atol=1e-5)


# --- the toy checkpoint: FCI must matter
# -------------------------------------------------------------------------------
def test_toy_branch_points_chosen_by_fci_differ_from_the_earliest_two():
    config = parse_config([])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(TOY_MODEL),
        AutoTokenizer.from_pretrained(TOY_MODEL),
    )
    problems = load_problems("toy:8:60:7", tokenizer, max_prompt=100)
    requests = [
        Request(p.prompt_ids, config.max_response, 1.0, request_seed(7, i, j))
        for i, p in enumerate(problems)
        for j in range(2)
    ]
    completions = TransformersEngine(model, [tokenizer.eos_token_id]).generate(requests)
    bounds = [split_steps(c.tokens, separator_tokens(tokenizer)) for c in completions]
    scores = score(
        model,
        [Sequence(r.prompt_ids, c.tokens, b) for r, c, b in zip(requests, completions, bounds)],
        delta=config.delta,
    )
    different = 0
    for c, b, s in zip(completions, bounds, scores):
        response = Response(c.tokens, s.logprobs, 0.0, s.entropies, b, s.fci, len(b) - 1)
        points = choose_branch_points(response, "fci", 2, random.Random(0), config.rho)
        different += points != b[1:3]
    assert different >= len(completions) / 2, f"{different} of {len(completions)}"


@pytest.mark.full
def test_the_toy_is_learnt_in_minutes(tmp_path):
    """What the README's table shows: +20 points of test accuracy, and no fall from the best, mean
    of 3 seeds."""
    runs = [
        attnrl.train(parse_config(["--seed", str(seed), "--out", str(tmp_path / str(seed))]))
        for seed in range(3)
    ]
    tested = [
        [100 * m["test_accuracy"] for m in metrics_of(run) if "test_accuracy" in m] for run in runs
    ]
    assert sum(row[-1] - row[0] for row in tested) / 3 >= 20
    assert all(row[-1] >= max(row) - 3 for row in tested)
    assert all(metrics_of(run)[-1]["seconds/total"] < 300 for run in runs)


# --- real input
# --------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"real problem files are not at {REAL_DATA}")
def test_real_problems_with_a_tiny_random_model_run_and_say_that_nothing_is_learnt(
    tmp_path, capsys
):
    model = save_real_model(tmp_path / "model")
    options = ["--preset", "toy", "--model", model, "--out", tmp_path / "run", "--drop_bad_rows"]
    options += ["--problems", REAL_DATA / "math500.parquet"]
    options += ["--test_problems", REAL_DATA / "aime24.parquet"]
    options += typed("--steps 2 --batch_size 4 --max_response 48 --eval_samples 1")
    train(parse_config(list(map(str, options))))
    text = capsys.readouterr().out
    records = metrics_of(tmp_path / "run")
    assert [m["step"] for m in records] == [0, 1, 2]
    assert all(
        m["initial/solve_none"] == 1 and m["sequences"] == 0 and m["train/updates"] == 0
        for m in records[1:]
    )
    assert text.count("empty batch: all leaves of all") == 2
    first, last = (
        AutoModelForCausalLM.from_pretrained(d).state_dict()
        for d in (model, tmp_path / "run" / "last")
    )
    assert all(torch.equal(first[name], last[name]) for name in first)


# --- what is shown, and where metrics go
# --------------------------------------------------------------------------------
