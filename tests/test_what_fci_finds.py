"""test_what_fci_finds.py: the two studies of experiments/what_fci_finds.py, each number by hand or
by a naive second computation.

    python -m pytest tests/test_what_fci_finds.py
"""

import json
import random
import sys

import numpy as np
import pytest
import torch
from fixtures import ROOT, TOY_MODEL, toy_tokenizer
from helpers import random_tokens, tiny_model
from transformers import AttentionInterface

sys.path.insert(0, str(ROOT / "experiments"))
import what_fci_finds as study  # noqa: E402

from runtime.cli import UserError  # noqa: E402
from runtime.rollout import Request, TransformersEngine  # noqa: E402
from tree import Response  # noqa: E402

PROGRAM = "a=4;b=a-2;c=b+b;d=7;e=d+c;f=d-e;g=d*d;h=g+d;?h"


# --------------------------------------------------------------------------------------------------
# Study 1
# --------------------------------------------------------------------------------------------------
def test_true_influence_by_hand():
    """d is mentioned by e, f, g, h. a reaches b, c (through b), e (through c), f (through e). "b+b"
    is one mention."""
    transitive, direct = study.true_influence(PROGRAM)
    assert direct.tolist() == [1, 1, 1, 4, 1, 0, 1, 0]
    assert transitive.tolist() == [4, 3, 2, 4, 1, 0, 1, 0]


def test_ranks_share_the_mean_of_their_places():
    assert study.ranks(np.array([[3, 1, 3, 2], [5, 5, 5, 5]])).tolist() == [
        [3.5, 1, 3.5, 2],
        [2.5, 2.5, 2.5, 2.5],
    ]


def test_spearman_within_responses_by_hand():
    """Ranks of 1 2 2 3 are 1 2.5 2.5 4, less their mean -1.5 0 0 1.5; those of 10 30 20 40 are -1.5
    0.5 -0.5 1.5: rho = 4.5 / sqrt(4.5 * 5) = 0.948683. The second response is reversed: -1. The
    third has equal scores: no rho, left out."""
    scores = np.array([[1, 2, 2, 3], [4, 3, 2, 1], [7, 7, 7, 7]])
    truth = np.array([[10, 30, 20, 40], [0, 1, 2, 3], [0, 1, 2, 3]])
    weights = study.bootstrap_weights([0, 1, 2], resamples=50)
    found = study.correlations(scores, truth, np.tile(np.arange(4), (3, 1)), weights)
    assert found["within"][0] == pytest.approx((4.5 / np.sqrt(22.5) - 1) / 2)
    assert -1 <= found["within"][1] < found["within"][0] < found["within"][2] <= 0.948684


def test_partial_takes_out_what_the_step_index_explains():
    """Mean ranks per index are 1.5 1.5 3 of scores and truth both; what is left is -.5 .5 0 and .5
    -.5 0 for the truth. Scores that say the same, the opposite, or nothing but the index, which
    within responses alone looks well."""
    truth, cell = np.array([[1, 2, 3], [2, 1, 3]]), np.array([[0, 1, 2], [0, 1, 2]])
    weights = study.bootstrap_weights([0, 1], resamples=50)

    def found(scores):
        return study.correlations(np.array(scores), truth, cell, weights)

    assert found([[1, 2, 3], [2, 1, 3]])["partial"][0] == pytest.approx(1)
    assert found([[2, 1, 3], [1, 2, 3]])["partial"][0] == pytest.approx(-1)
    assert found([[1, 2, 3], [1, 2, 3]])["partial"] is None
    assert found([[1, 2, 3], [1, 2, 3]])["within"][0] == pytest.approx(0.75)  # rho 1 and 1/2


def test_bootstrap_draws_whole_problems():
    weights = study.bootstrap_weights([7, 7, 3, 5], resamples=200)
    assert (weights[0] == 1).all() and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 1:].sum(1) == 3).all()
    assert weights[1:].std(0).min() > 0.5
    values = np.array([1.0, 3.0, 8.0, np.nan])
    assert study.weighted_mean(weights, values)[0] == 4
    assert study.weighted_mean(weights, values, np.array([True, False, True, True]))[0] == 4.5


def test_step_attention_by_hand_uniform_attention():
    """alpha[q, s] = 1 / (q + 1). As in test_fci.py: prompt {0}, steps {1}, {2, 3}, {4}, {5}: y[1] =
    1/5 + 1/6, y[2] = 1/6. Result only: steps {1, 2}, {3, 4}; the key of the first step is token 1,
    so y[0] = (1/4 + 1/5) / 2."""
    alpha = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    y = study.influence(study.step_attention(alpha[None, None], 1, [0, 1, 3, 4, 5]), 1)
    assert y.shape == (1, 1, 4) and y[0, 0, 1:] == pytest.approx([11 / 30, 1 / 6, 0])
    y = study.influence(study.step_attention(alpha, 1, [0, 1, 3, 4, 5]), 2)
    assert y[1] == pytest.approx(1 / 6)
    alpha[:, 2] = 9  # the separator of the first step: does not count
    y = study.influence(study.step_attention(alpha[:5, :5], 1, [0, 2, 4], result_only=True), 1)
    assert y[0] == pytest.approx(0.225)


def test_decoys_look_like_the_toy_and_nobody_needs_their_constant():
    for problem in study.decoys(20, 8, toy_tokenizer()):
        lines = problem.text.split(";")[:-1]
        (hub,) = [k for k, line in enumerate(lines) if k and len(line) == 3]
        assert len(lines) == 8 and hub in (3, 4) and len(problem.text) == len(PROGRAM)
        assert study.true_influence(problem.text)[:, hub].tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------
# Study 2
# --------------------------------------------------------------------------------------------------
CUT = {"keys": (0, 0), "from": 0, "renormalise": False}


def naive_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """softmax(q k) v with the whole matrix; columns CUT["keys"] of the rows from CUT["from"] on
    become zero after the softmax."""
    groups, length = module.num_key_value_groups, query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    later = torch.ones(length, length).triu(1).bool()
    alpha = (query @ key.transpose(2, 3) * scaling).masked_fill(later, -torch.inf).softmax(-1)
    alpha[:, :, CUT["from"] :, slice(*CUT["keys"])] = 0
    if CUT["renormalise"]:
        alpha = alpha / alpha.sum(-1, keepdim=True)
    return (alpha @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive_disrupted", naive_attention)


@torch.no_grad()
def naive_logprobs(
    model, prompt: list[int], tokens: list[int], cut: tuple[int, int], renormalise: bool = False
) -> list[float]:
    """Of `tokens`, in one pass over everything; queries of the prompt see all, those of the new
    tokens not the cut."""
    CUT.update({"keys": cut, "from": len(prompt), "renormalise": renormalise})
    model.set_attn_implementation("naive_disrupted")
    logprobs = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    model.set_attn_implementation("sdpa")
    return [logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(tokens)]


def cut_requests() -> list:
    """Prompts of different lengths in one batch (so it is padded on the left), some a prefix of
    another, cuts anywhere."""
    rng = random.Random(0)
    long = random_tokens(rng, 20)
    prompts = [
        (long, (4, 9)),
        (long, (0, 0)),
        (long[:12], (7, 12)),
        (long[:12], (0, 3)),
        (random_tokens(rng, 7), (2, 6)),
    ]
    return [
        study.CutRequest(prompt, 8, 1.0, seed, cut) for seed, (prompt, cut) in enumerate(prompts)
    ]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_disruption_is_zero_softmax_weights_not_renormalised(kind):
    model, requests = tiny_model(kind), cut_requests()
    engine = study.DisruptedEngine(model, eos_ids=[])
    for r, c in zip(requests, engine.generate(requests)):
        wanted, plain, renormalised = (
            np.array(naive_logprobs(model, r.prompt_ids, c.tokens, cut, again))
            for cut, again in ((r.cut, False), ((0, 0), False), (r.cut, True))
        )
        np.testing.assert_allclose(c.logprobs, wanted, rtol=0, atol=1e-4)
        # the prefix is not disrupted, and it predicts the first token
        assert c.logprobs[0] == pytest.approx(plain[0], abs=1e-4)
        if r.cut != (0, 0):  # the comparison above could have failed
            assert abs(wanted - plain)[1:].max() > 0.05
            assert abs(wanted - renormalised)[1:].max() > 0.05


def test_an_empty_step_changes_nothing_and_the_model_stays():
    model, requests = tiny_model("qwen2"), cut_requests()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    usual = TransformersEngine(model, eos_ids=[]).generate(
        [Request(r.prompt_ids, 8, 1.0, r.seed) for r in requests]
    )
    cut = study.DisruptedEngine(model, eos_ids=[]).generate(requests)
    assert [a.tokens == b.tokens for a, b in zip(usual, cut)] != [True] * 5, "the cuts do something"
    assert cut[1].tokens == usual[1].tokens, (
        "a request without a cut is not disturbed by the others of its batch"
    )
    for r in requests:
        r.cut = (5, 5)
    assert study.DisruptedEngine(model, eos_ids=[]).generate(requests) == usual
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def made_row(problem: int, top: int, with_hits: list[int]):
    """Three steps of which one is above the 80 % quantile of FCI; entropy is highest in the
    last."""
    scores = np.zeros((len(study.MEASURES), 3))
    scores[0, top] = 1
    scores[study.MEASURES.index("mean entropy"), 2] = 1
    hits = np.array([[[8, 8, 8], [8, 8, 8]], [with_hits, [4, 4, 4]]])
    return study.Row(problem, 3, "", True, [], None, {}, scores, None, None, hits)


def test_disruption_study_by_hand():
    """10 responses with their high step first, 10 second. Accuracy without is 1 everywhere; with,
    of 8: (0, 4, 8) and (4, 2, 8). Top FCI: drops 1 and 3/4. The rest: (1/2 + 0)/2 and (1/2 + 0)/2.
    Entropy: the last step, 0. At equal index: first 1 - 1/2 = 1/2, second 3/4 - 1/2 = 1/4; ten
    steps each, so 3/8 in all. The last has one kind only."""
    rows = [made_row(i, 0, [0, 4, 8]) for i in range(10)] + [
        made_row(i, 1, [4, 2, 8]) for i in range(10, 20)
    ]
    found = study.disruption_study(rows)
    classes = {name: [x[0] for x in row.values()] for name, row in found["classes"].items()}
    assert classes["top 20 % FCI"] == pytest.approx([1, 0.125, 0.875, 0.5])
    assert classes["the rest"] == pytest.approx([1, 0.75, 0.25, 0.5])
    assert classes["top 20 % entropy"] == pytest.approx([1, 1, 0, 0.5])
    assert {
        k: (x["n"], x["drop"] and x["drop"][0]) for k, x in found["by step"]["the rest"].items()
    } == {"1": (10, 0.5), "2": (10, 0.5), "3": (20, 0)}
    matched = found["matched"]["top 20 % FCI - the rest"]
    assert {k: x["gap"][0] for k, x in matched.items()} == pytest.approx(
        {"1": 0.5, "2": 0.25, "all": 0.375}
    )
    assert found["matched"]["top 20 % entropy - all others"] == {}


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def test_one_command_writes_both_figures_and_all_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "SAMPLES", 2)
    study.main(["--quick", "--model", str(TOY_MODEL), "--problems", "toy:8:2:3"])
    out = tmp_path / "runs" / "what_fci_finds-quick"
    assert all(
        (out / "figures" / f"{name}.png").stat().st_size > 10_000
        for name in ("fci_correlation", "disruption")
    )
    # strict: no NaN
    found = json.loads(
        (out / "results" / "what_fci_finds.json").read_text(), parse_constant=pytest.fail
    )
    for name in ("toy", "decoy"):
        rows = found[name]["rows"]
        assert len(rows) <= 4 and found[name]["right"] == sum(row["right"] for row in rows) > 0
        for row in rows:
            transitive, direct = study.true_influence(row["problem"])
            assert (row["T"], row["D"]) == (transitive[1:].tolist(), direct[1:].tolist())
            assert (
                study.in_format(row["response"], row["problem"]) and len(row["FCI, Delta 1"]) == 7
            )
    # per set: two views, branch points
    assert capsys.readouterr().out.count("\n| FCI, Delta 1 |") == 2 * 3


def test_a_response_may_have_any_number_of_steps():
    """Two responses of 3 steps and one of 4, each its own cell: as if the two sets were alone."""
    three = np.array([[1, 3, 2], [2, 1, 3]]), np.array([[1, 2, 3], [1, 3, 2]])
    four = np.array([[4, 1, 2, 3]]), np.array([[3, 1, 4, 2]])
    cells = [np.arange(3), np.arange(3), 10 + np.arange(4)]
    ones = np.ones((1, 3))
    mixed = study.correlations([*three[0], *four[0]], [*three[1], *four[1]], cells, ones)
    apart = [
        study.correlations(*both, cells[first : first + len(both[0])], np.ones((1, len(both[0]))))
        for both, first in ((three, 0), (four, 2))
    ]
    # within: the mean over responses; alone in its cells the third has nothing left to pool
    means = (2 * apart[0]["within"][0] + apart[1]["within"][0]) / 3
    assert mixed["within"][0] == pytest.approx(means)
    assert mixed["partial"][0] == pytest.approx(apart[0]["partial"][0])
    assert apart[1]["partial"] is None


def test_programs_of_unequal_length_are_refused_at_once():
    with pytest.raises(UserError, match="--problems toy:6-7:4:3: only programs of one length"):
        study.main(["--quick", "--problems", "toy:6-7:4:3"])


def test_scores_and_branch_points_by_hand():
    r = Response([1] * 9, [0.0] * 9, entropies=[0.0] * 9, bounds=[0, 2, 3, 6, 9], branchable=4)
    fci = {d: np.array([0, 0.1, 0.9, 0]) for d in (1, 2, 4)}
    one = study.Scored(r, fci, np.full(4, 7.0), None, np.array([0, 5.0, 1, 0]))
    found = dict(zip(study.MEASURES, one.measures(np.random.default_rng(0)).tolist()))
    assert found["shortness"] == [-2, -1, -3, -3] and found["position (early)"] == [0, -1, -2, -3]
    assert found["mean entropy"] == [0, 5, 1, 0] and found["FCI, result only"] == [7] * 4
    steps = one.branch_steps(0)
    assert list(steps["FCI, Delta 1"]) == [1, 2] == list(steps["two steps of highest mean entropy"])
