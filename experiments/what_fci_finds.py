r"""what_fci_finds.py: does FCI find the steps that matter? Two studies on the toy, where the answer
is known; the first of them also on word problems, for any model.

    python experiments/what_fci_finds.py               # the toy: about 15 minutes on one core
    python experiments/what_fci_finds.py --quick       # the same, small: about a minute
    python experiments/what_fci_finds.py --model DIR   # word problems, see in_words.py

Prints tables; writes figures/ and results/ beside this file, with --quick into
runs/what_fci_finds-quick. The rest of this text is about the toy.

Study 1, correlation. In a program such as "a=4;b=a-2;c=b+b;d=7;e=d+c;?e" the influence of a line is
known:

    transitive  T[k] = later lines that mention variable k, or a variable that depends on it
    direct      D[k] = later lines that mention variable k

(read off the text: "x*0" and "x-x" count as dependence). T and D are compared with scores of the
steps of a response:

    FCI         y[k] = max over l, h of y^{l,h}[k]                      (AttnRL Eq. 6)
                y^{l,h}[k] = sum over j >= k + Delta of A^{l,h}[j, k]   (AttnRL Eq. 5)
    result only the same, but with one key for step k: its result, the digit before the separator.
                Does not depend on a step's length
    baselines   mean entropy of the step's tokens; position (early = high); shortness (few tokens =
                high); random

by Spearman's rho, Pearson's correlation of average ranks:

    within      over the steps of one response, averaged over responses
    partial     early steps have more dependants AND are summed over more later ones in Eq. 5, so
                position alone raises both. Subtract from each rank the mean rank of all responses
                at that step index, and correlate the rest, all responses pooled. So what depends
                only on the index has no effect (and position itself has no value here).

The first step (FCI 0 by definition) and the final "\boxed{}" (no variable) are left out.

Shortness is a baseline because A is a mean over the step's tokens, and because the toy's hub (the
variable that many lines need) is its only constant, "d=7", and so the only short step. Two controls
separate influence from shortness:

    without the hub   the same responses, that step left out: all steps are equally long ("partial":
                      means per step index and hub)
    decoy             programs that look the same, but no later line mentions the constant: short
                      and without influence

Study 2, disruption (the paper's Fig. 3). Take a response with a right final answer. Keep it up to
the end of a step, and sample the rest again, 8 times: attention to that step is set to zero after
the softmax, not renormalised, in all layers and heads, for all tokens after it. Drop = accuracy
without minus accuracy with disruption, from the same prefix with the same random numbers. The paper
draws one step of a class (top 20 % FCI; the rest; top 20 % mean entropy). Here EVERY step is
disrupted, and the value of a class is the mean over its steps: the expectation of the paper's draw,
with less noise. Quantiles are over the steps 1 to n - 1.

    output of a later query q = sum over s of alpha[q, s] [s not in step] v[s]
                              = the usual sum with v[s] = 0 in the step

So the disruption sets rows of the VALUE cache to zero, when the prefix has been computed. Keys, and
so the softmax, do not change, and nothing inside the prefix changes (not even its last token, which
predicts the first new one).

Intervals: 95 %, percentiles of a bootstrap over problems. Left out: other models, the paper's own
problems.
"""

import copy
import json
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from fci import Separators, separator_tokens, split_steps
from runtime.cli import Parser, UserError, stop_on_user_error
from runtime.data import Problem, encode_question, load_problems
from runtime.models import load_model
from runtime.rewards import Reward
from runtime.rollout import Request, TransformersEngine, request_seed
from runtime.scoring import Sequence, score
from tools.view import BLUE, GREEN, GREY, ORANGE
from toy.programs import toy_program, toy_solution
from tree import Response, choose_branch_points

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy" / "model"
SAMPLES, RHO, RESAMPLES = 8, 0.2, 1000  # a step; the quantile of Eq. 7; bootstrap
MEASURES = (
    "FCI, Delta 1",
    "FCI, Delta 2",
    "FCI, Delta 4",
    "FCI, result only",
    "mean entropy",
    "position (early)",
    "shortness",
    "random",
)


# --------------------------------------------------------------------------------------------------
# Responses, what is true of their steps, and the steps' scores
# --------------------------------------------------------------------------------------------------
@dataclass
class Study:
    """What both studies ask: a model (in two forms) and a reward."""

    model: Any
    tokenizer: Any
    eos_ids: list[int]
    reward: Reward
    separators: Separators
    # returns the attention itself: for single heads, and as a check of fci.py
    eager: Any

    def grade(self, problems: list[Problem], tokens: list[list[int]]) -> tuple[list[str], list]:
        """The texts of responses, one to each of `problems`, and their rewards."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts, self.reward([(text, p.answers) for text, p in zip(texts, problems)])


def load_study(path: str) -> Study:
    model, tokenizer, eos_ids = load_model(path, "cpu")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return Study(model, tokenizer, eos_ids, Reward(), separator_tokens(tokenizer), eager)


@dataclass
class Row:
    """One response whose steps correspond to the lines of its program. Arrays are over the steps
    1 .. n - 1 of n variables (S of them)."""

    problem: int  # index: the bootstrap draws problems
    hub: int  # index of the constant's step: the toy's hub, or the decoy
    text: str
    right: bool
    prompt_ids: list[int]
    response: Response
    branch: dict[str, bool]  # rule -> is that step among its two branch points?
    scores: np.ndarray  # (measures, S)
    heads: np.ndarray  # (layers, heads, S): y^{l,h}, Delta 1
    truth: np.ndarray  # (2, S): T, D
    # (2, 2, S): [without, with disruption][right, in format], counts of SAMPLES
    hits: np.ndarray | None = None


def true_influence(program: str) -> np.ndarray:
    """T and D, (2, n): number of later lines that depend on a line's variable, directly or through
    others; that mention it."""
    lines = program.split(";")[:-1]
    # (j, k): line j mentions variable k
    uses = np.array([[name[0] in line[2:] for name in lines] for line in lines])
    return influence_of(uses)


def influence_of(uses: np.ndarray) -> np.ndarray:
    """T and D, (2, n), from (j, k): step j needs step k, an earlier one."""
    depends = uses.copy()
    for j in range(len(uses)):  # in order: the rows that step j needs are complete
        depends[j] |= depends[uses[j]].any(0)
    return np.array([depends.sum(0), uses.sum(0)])


def constant_step(program: str) -> int:
    """The index of the only constant after the first line."""
    return next(k for k, line in enumerate(program.split(";")) if k and len(line) == 3)


def decoys(count: int, variables: int, tokenizer) -> list[Problem]:
    """Programs with the toy's layout in which no line needs the constant."""
    rng, found = random.Random(0), {}
    while len(found) < count:
        hub = rng.randrange(3, max(4, variables // 2 + 1))  # the same draw as in toy_program
        text = toy_program(variables, rng, hub, pull=0.0)
        if true_influence(text)[1, hub] == 0:
            answer = toy_solution(text).rsplit("{")[-1].rstrip("}")
            prompt = encode_question(tokenizer, text, "decoy")
            found[text] = Problem(text, [answer], "decoy", prompt)
    return list(found.values())


def in_format(text: str, program: str) -> bool:
    """Is there one step for every line, with its variable, then the box?"""
    begins = [line[:2] for line in program.split(";")[:-1]]
    return [step[:2] for step in text.split("\n\n")] == [*begins, r"\b"]


def step_attention(
    alpha: np.ndarray, start: int, bounds: list[int], result_only: bool = False
) -> np.ndarray:
    """A[l, h, j, k], the mean over the queries of step j and the keys of step k of alpha[l, h, q,
    s]; `start` = length of the prompt, which is in no step.

    result_only: a step has one key, the token before its separator.
    """
    mean, result = np.zeros((2, len(bounds) - 1, alpha.shape[-1]))
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        mean[k, start + a : start + b] = 1 / (b - a)
        result[k, start + b - 2] = 1
    return mean @ alpha @ (result if result_only else mean).T


def influence(attention: np.ndarray, delta: int) -> np.ndarray:
    """y[..., k] of Eq. 5: the sum over steps j >= k + Delta of A[..., j, k]."""
    return np.tril(attention, -delta).sum(-2)


@dataclass
class Scored:
    """The results of a scoring pass for one response. Arrays are over all its steps."""

    response: Response
    fci: dict[int, np.ndarray]  # Delta -> y
    result_only: np.ndarray  # y, Delta 1, but keys are the steps' results only
    heads: np.ndarray  # (layers, heads, steps): y^{l,h}, Delta 1
    entropy: np.ndarray  # mean of the step's tokens

    def measures(self, rng) -> np.ndarray:
        """(measures, steps)"""
        steps, lengths = len(self.entropy), np.diff(self.response.bounds)
        rest = [self.result_only, self.entropy, -np.arange(steps), -lengths, rng.random(steps)]
        return np.array([*self.fci.values(), *rest])

    def branch_steps(self, seed: int) -> dict[str, list[int]]:
        """rule -> the steps of its two branch points"""
        own, n = self.response, len(self.entropy) - 1  # the last step is the box
        rules = {
            f"FCI, Delta {delta}": (replace(own, fci=y.tolist()), "fci")
            for delta, y in self.fci.items()
        }
        rules |= {"entropy, two tokens (TreeRL)": (own, "entropy"), "random": (own, "random")}
        steps: dict[str, list[int]] = {}
        for name, (response, rule) in rules.items():
            points = choose_branch_points(response, rule, 2, random.Random(seed))
            steps[name] = [np.searchsorted(own.bounds, at, side="right") - 1 for at in points]
        steps["two steps of highest mean entropy"] = 1 + np.argsort(-self.entropy[1:n])[:2]
        steps["earliest two"] = [1, 2]
        return steps


def score_steps(study: Study, prompt: list[int], tokens: list[int], bounds: list[int]) -> Scored:
    """FCI from the attention matrices; checks that fci.py gives the same."""
    scored = score(study.model, [Sequence(prompt, tokens, bounds)], delta=1)[0]
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        layers = study.eager.base_model(ids, output_attentions=True).attentions
    alpha = torch.cat(layers).double().numpy()  # Eq. 4, (layers, heads, T, T)
    attention, on_result = (
        step_attention(alpha, len(prompt), bounds, only) for only in (False, True)
    )
    fci = {delta: influence(attention, delta).max((0, 1)) for delta in (1, 2, 4)}  # Eq. 6
    assert np.allclose(fci[1][1:], scored.fci[1:], atol=1e-5), "fci.py and eager attention disagree"
    steps = zip(bounds, bounds[1:])
    return Scored(
        response=Response(
            tokens,
            scored.logprobs,
            entropies=scored.entropies,
            bounds=bounds,
            fci=scored.fci,
            branchable=len(bounds) - 1,
        ),
        fci=fci,
        result_only=influence(on_result, 1).max((0, 1)),
        heads=influence(attention, 1),
        entropy=np.array([np.mean(scored.entropies[a:b]) for a, b in steps]),
    )


def sample_rows(study: Study, problems: list[Problem], count: int, seed: int = 0) -> list[Row]:
    """`count` responses per problem; returns those in the right format, right or wrong, with their
    scores. Raises UserError if none is right."""
    rng, rows = np.random.default_rng(seed), []
    asked = [
        (i, Request(p.prompt_ids, 16 * len(p.text.split(";")), 1.0, request_seed(seed, i, j)))
        for i, p in enumerate(problems)
        for j in range(count)
    ]
    engine = TransformersEngine(study.model, study.eos_ids)
    completions = engine.generate([request for _, request in asked])
    texts, rewards = study.grade([problems[i] for i, _ in asked], [c.tokens for c in completions])
    for number, completion in enumerate(tqdm(completions, unit="response", disable=None)):
        i, text = asked[number][0], texts[number]
        program, prompt = problems[i].text, problems[i].prompt_ids
        bounds, n = split_steps(completion.tokens, study.separators), program.count(";")
        if not in_format(text, program) or len(bounds) != n + 2 or not completion.finished:
            continue  # steps and lines do not correspond
        scored, hub = score_steps(study, prompt, completion.tokens, bounds), constant_step(program)
        branch = scored.branch_steps(seed=len(rows))
        rows.append(
            Row(
                problem=i,
                hub=hub,
                text=text,
                right=rewards[number] == 1,
                prompt_ids=prompt,
                response=scored.response,
                branch={rule: hub in steps for rule, steps in branch.items()},
                scores=scored.measures(rng)[:, 1:n],
                heads=scored.heads[..., 1:n],
                truth=true_influence(program)[:, 1:],
            )
        )
    if not any(row.right for row in rows):
        raise UserError(
            "no response is right and in the toy's format: nothing to study (more problems? another"
            " model?)"
        )
    return rows


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------
def ranks(x: np.ndarray) -> np.ndarray:
    """Average ranks (1 = smallest) along the last axis; equal values get the mean of their
    ranks."""
    below, equal = x[..., :, None] > x[..., None, :], x[..., :, None] == x[..., None, :]
    return below.sum(-1) + (equal.sum(-1) + 1) / 2


def bootstrap_weights(problems: list[int], resamples: int = RESAMPLES) -> np.ndarray:
    """(1 + resamples, rows): how often each row counts. The first line is all ones: the estimate
    itself."""
    _, of_row = np.unique(problems, return_inverse=True)
    count = of_row.max() + 1
    # the draws are of whole problems
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, resamples)
    return np.vstack([np.ones(len(problems)), drawn[:, of_row]])


def weighted_mean(weights: np.ndarray, values: np.ndarray, where=True) -> np.ndarray:
    """The mean over rows for every line of `weights`; rows without a value (NaN), or not in
    `where`, do not count."""
    where = np.isfinite(values) & where
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(where, values, 0)) / (weights @ where)


def estimate(values: np.ndarray) -> list[float] | None:
    """[estimate, low, high] from a statistic under every line of bootstrap weights ([estimate] if
    there is one line); None where it is undefined."""
    if not np.isfinite(values[0]):
        return None
    if len(values) == 1:
        return [float(values[0])]
    return [float(values[0]), *np.nanquantile(values[1:], [0.025, 0.975]).tolist()]


def rho(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """A correlation from sums of products; NaN if all scores are equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(xx * yy > 1e-9, xy / np.sqrt(xx * yy), np.nan)


def correlations(scores, truth, cell, weights: np.ndarray) -> dict:
    """Spearman's rho of scores and truth, "within" responses and "partial": without the means of
    `cell`. One array over its steps for each response, of any number of steps."""
    of_row = np.repeat(np.arange(len(scores)), list(map(len, scores)))
    of_cell = np.unique(np.concatenate(list(cell)), return_inverse=True)[1]
    size = np.bincount(of_cell)

    def centred(rows) -> np.ndarray:
        return np.concatenate([r - r.mean() for r in map(ranks, rows)])

    def without_cell_means(x: np.ndarray) -> np.ndarray:
        return x - (np.bincount(of_cell, x) / size)[of_cell]

    def products(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        """xy, xx, yy: one number per response"""
        return [np.bincount(of_row, a * b, len(scores)) for a, b in ((x, y), (x, x), (y, y))]

    both = centred(scores), centred(truth)
    within = rho(*products(*both))
    pooled = rho(*(weights @ sums for sums in products(*map(without_cell_means, both))))
    return {"within": estimate(weighted_mean(weights, within)), "partial": estimate(pooled)}


def correlation_study(rows: list[Row]) -> dict:
    """view -> measure (and "heads") -> truth -> within, partial; the truth of disrupted rows is the
    measured drop."""
    weights = bootstrap_weights([r.problem for r in rows])
    scores = np.array([r.scores for r in rows]).swapaxes(0, 1)  # (measures, rows, S)
    heads = np.array([r.heads for r in rows])  # (rows, layers, heads, S)
    if rows[0].hits is None:
        transitive, direct = np.array([r.truth for r in rows]).swapaxes(0, 1)
        truths = {"transitive": transitive, "direct": direct}
    else:
        truths = {"drop": np.array([r.hits[0, 0] - r.hits[1, 0] for r in rows])}
    hub = np.array([r.hub for r in rows])[:, None]
    step = np.arange(1, scores.shape[-1] + 1) + 0 * hub  # (rows, S)
    found = {}
    for view, keep, cell in (
        ("all steps", step > 0, step),
        ("without the hub", step != hub, 100 * hub + step),
    ):

        def compare(x):
            return {
                name: correlations(*(a[keep].reshape(len(rows), -1) for a in (x, y, cell)), weights)
                for name, y in truths.items()
            }

        found[view] = {name: compare(x) for name, x in zip(MEASURES, scores)}
        found[view]["heads"] = [
            [compare(heads[:, l, h]) for h in range(heads.shape[2])] for l in range(heads.shape[1])
        ]
    return found


# --------------------------------------------------------------------------------------------------
# Disruption
# --------------------------------------------------------------------------------------------------
@dataclass
class CutRequest(Request):
    """A request whose new tokens get no values from the positions cut[0] .. cut[1] - 1 of its
    prompt."""

    cut: tuple[int, int] = (0, 0)


class DisruptedEngine(TransformersEngine):
    """The usual engine, but between the prefix and the first new token it sets the values at the
    cut to zero in every layer."""

    def _prefill(self, requests, preamble):
        # now every request has a separate cache row
        cache, mask, hidden = super()._prefill(requests, preamble)
        for row, r in enumerate(requests):
            start = mask.shape[1] - len(r.prompt_ids)  # prompts are aligned to the right
            for layer in cache.layers:
                layer.values[row, :, start + r.cut[0] : start + r.cut[1]] = 0
        return cache, mask, hidden


def cut_requests(
    prompt: list[int], r: Response, steps: int, samples: int, limit: int, heat: float, place: tuple
) -> list[CutRequest]:
    """(steps x samples x 2) requests: the response is kept up to the end of each of the steps
    1 .. steps; the rest is sampled without and with disruption, with the same random numbers.
    limit: tokens of a response; heat: temperature; place: (seed, number)."""
    requests = []
    for k in range(1, steps + 1):
        start, end = r.bounds[k], r.bounds[k + 1]
        prefix, left = prompt + r.tokens[:end], max(1, limit - end)
        for j in range(samples):
            same = request_seed(*place, k, j)
            for cut in ((0, 0), (len(prompt) + start, len(prompt) + end)):
                requests.append(CutRequest(prefix, left, heat, same, cut))
    return requests


def disrupt(study: Study, rows: list[Row], problems: list[Problem], seed: int = 1) -> None:
    """Fill `hits`: for every step, keep the response up to its end, and sample the rest with the
    step hidden, and without."""
    engine = DisruptedEngine(study.model, study.eos_ids)
    # one response at a time: its prefixes are computed once
    for number, row in enumerate(tqdm(rows, unit="response", disable=None)):
        prompt, r, before = row.prompt_ids, row.response, len(row.prompt_ids)
        steps, limit = len(r.bounds) - 3, 16 * len(r.bounds)  # not the first, not the box
        requests = cut_requests(prompt, r, steps, SAMPLES, limit, 1.0, (seed, number))
        sampled = zip(requests, engine.generate(requests))
        tokens = [r.prompt_ids[before:] + c.tokens for r, c in sampled]
        texts, right = study.grade([problems[row.problem]] * len(tokens), tokens)
        kept = [in_format(text, problems[row.problem].text) for text in texts]
        row.hits = np.array([right, kept]).reshape(2, -1, SAMPLES, 2).sum(2).transpose(2, 0, 1)


def disruption_study(rows: list[Row]) -> dict:
    """Study 2: accuracy per class; drop per class and step index; classes compared at equal step
    index."""
    # (rows, S) each
    (right, _), (disrupted, kept) = np.array([r.hits for r in rows]).transpose(1, 2, 0, 3) / SAMPLES
    fci, entropy = (
        np.array([r.scores[MEASURES.index(name)] for r in rows])
        for name in ("FCI, Delta 1", "mean entropy")
    )
    weights = bootstrap_weights([r.problem for r in rows])
    return by_class(weights, right, disrupted, kept, fci, entropy)


def by_class(weights: np.ndarray, right, disrupted, kept, fci, entropy) -> dict:
    """Study 2 from arrays (rows, S); NaN where a response has fewer steps."""
    drop = right - disrupted
    there = np.isfinite(drop)
    top, high = (
        there & (x >= np.nanquantile(x, 1 - RHO, axis=1, keepdims=True)) for x in (fci, entropy)
    )
    shown = {"without": right, "with": disrupted, "drop": drop, "in format, with": kept}
    masks = {"top 20 % FCI": top, "the rest": there & ~top, "top 20 % entropy": high}
    pairs = {"top 20 % FCI - the rest": top, "top 20 % entropy - all others": high}

    def mean(x: np.ndarray, mask: np.ndarray) -> list[float] | None:
        with np.errstate(invalid="ignore"):  # a response without a step of the class
            of_row = np.where(mask, x, 0).sum(1) / mask.sum(1)
        return estimate(weighted_mean(weights, of_row))

    return {
        "classes": {n: {what: mean(x, m) for what, x in shown.items()} for n, m in masks.items()},
        "by step": {name: drop_by_step(weights, drop, mask) for name, mask in masks.items()},
        "matched": {n: matched_gaps(weights, drop, m, there & ~m) for n, m in pairs.items()},
    }


def drop_by_step(weights: np.ndarray, drop: np.ndarray, mask: np.ndarray) -> dict:
    return {
        str(k + 1): {
            "n": int(mask[:, k].sum()),
            "drop": estimate(weighted_mean(weights, drop[:, k], mask[:, k])),
        }
        for k in range(drop.shape[1])
    }


def matched_gaps(weights: np.ndarray, drop, mask: np.ndarray, others: np.ndarray) -> dict:
    """The drop of the steps in a class minus that of the others, at every step index that has both
    kinds; "all": the mean gap of the steps in the class."""
    found, total, count = {}, 0, 0
    for k in np.flatnonzero(np.minimum(mask.sum(0), others.sum(0)) >= 10):
        inside, outside = (
            weighted_mean(weights, drop[:, k], which) for which in (mask[:, k], others[:, k])
        )
        n = int(mask[:, k].sum())
        found[str(k + 1)] = {
            "n": [n, int(others[:, k].sum())],
            "gap": estimate(inside - outside),
        }
        total, count = total + n * (inside - outside), count + n
    if count:
        found["all"] = {"n": count, "gap": estimate(total / count)}
    return found


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
def shown(found: list[float] | None, scale: float = 1, digits: int = 2) -> str:
    if found is None:
        return "-"
    middle, low, high = (f"{scale * x:.{digits}f}" for x in found)
    return f"{middle} [{low}, {high}]"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n" + "|---" * len(header) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_tables(name: str, found: dict) -> None:
    print(
        f"\n## {name}: {found['problems']} problems, {len(found['rows'])} responses in format,"
        f" {found['right']} of them right"
    )
    for view, by in found["correlation"].items():
        print_correlations(view, by, found["drop correlation"][view])
    constant = found["constant among branch points"].items()
    table(
        "The constant is among the two branch points, % of responses",
        ["rule", "%"],
        [[rule, shown(share, 100, 1)] for rule, share in constant],
    )
    print_disruption(found["disruption"])


def print_correlations(view: str, by: dict, drop: dict) -> None:
    both = {m: by[m] | drop[m] for m in MEASURES}
    columns = [f"{truth}, {way}" for truth, ways in both[MEASURES[0]].items() for way in ways]
    table(
        f"Spearman's rho, {view} (drop: of study 2)",
        ["score", *columns],
        [
            [m, *(shown(value) for ways in row.values() for value in ways.values())]
            for m, row in both.items()
        ],
    )

    def cell(head: dict) -> str:
        ways = head["transitive"].values()
        return " / ".join(f"{found[0]:.2f}" if found else "-" for found in ways)

    table(
        f"Single heads y^(l,h), Delta 1, with T, {view}: within / partial",
        ["layer", *(f"head {h}" for h in range(len(by["heads"][0])))],
        [[str(l), *map(cell, row)] for l, row in enumerate(by["heads"])],
    )


def print_disruption(study: dict) -> None:
    classes, by_step, matched = study["classes"], study["by step"], study["matched"]
    table(
        "Disruption, %",
        ["class", *classes["the rest"]],
        [[c, *(shown(x, 100, 1) for x in row.values())] for c, row in classes.items()],
    )
    table(
        "Drop by index of the disrupted step, points",
        ["class", *by_step["the rest"]],
        [
            [c, *(f"{shown(x['drop'], 100, 0)} ({x['n']})" for x in row.values())]
            for c, row in by_step.items()
        ],
    )
    table(
        "Difference of drops at equal index, points",
        ["classes", "index", "n", "gap"],
        [
            [c, k, str(x["n"]), shown(x["gap"], 100, 1)]
            for c, row in matched.items()
            for k, x in row.items()
        ],
    )


def points(axis, places, found, scale: float = 1.0, **style) -> None:
    """Draw estimates with intervals at x = `places`, without the undefined ones."""
    if kept := [(x, *(scale * v for v in value)) for x, value in zip(places, found) if value]:
        x, middle, low, high = np.array(kept).T
        axis.errorbar(
            x, middle, yerr=np.maximum([middle - low, high - middle], 0), capsize=2.5, ms=5, **style
        )


def draw_correlation(path: Path, views: dict[str, dict]) -> None:
    """Above: every score with T. Below: single heads."""
    figure = Figure(figsize=(5 * len(views), 9), layout="constrained")
    axes = figure.subplots(2, len(views))
    for (title, by), axis, heat in zip(views.items(), *axes):
        draw_scores(axis, by)
        axis.set_title(title)
        image = draw_heads(heat, by["heads"])
    axes[0, 0].set_ylabel("rank correlation with true influence T")
    figure.colorbar(image, ax=axes[1], label="rank correlation with T, within", shrink=0.8)
    figure.savefig(path, dpi=110)


def draw_scores(axis, by: dict) -> None:
    names = {"within": "within responses", "partial": "partial: position taken out"}
    looks = {
        "within": dict(fmt="o", color=BLUE),
        "partial": dict(fmt="s", color=ORANGE),
    }
    for shift, (way, look) in zip((-0.12, 0.12), looks.items()):
        found = [by[m]["transitive"][way] for m in MEASURES]
        points(axis, np.arange(len(MEASURES)) + shift, found, label=names[way], **look)
    axis.axhline(0, color=GREY, lw=0.8)
    axis.set_ylim(-1, 1)
    axis.set_xticks(range(len(MEASURES)), MEASURES, rotation=40, ha="right")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower left")


def draw_heads(heat, heads: list[list[dict]]):
    """One square per head: its colour is the correlation within responses."""
    values = np.array(
        [
            [[v[0] if v else np.nan for v in head["transitive"].values()] for head in row]
            for row in heads
        ]
    )  # (layers, heads, [within, partial])
    image = heat.imshow(values[..., 0], cmap="PuOr_r", vmin=-1, vmax=1)
    for l, h in np.ndindex(values.shape[:2]):
        text = "\n".join("-" if np.isnan(v) else f"{v:.2f}" for v in values[l, h])
        colour = "white" if abs(values[l, h, 0]) > 0.6 else "black"
        heat.text(h, l, text, ha="center", va="center", color=colour)
    heat.set(
        xlabel="head",
        ylabel="layer",
        xticks=range(values.shape[1]),
        yticks=range(values.shape[0]),
        title="single heads $y^{l,h}$, Delta 1: within, below it partial",
    )
    return image


LOOKS = [dict(fmt="o", color=BLUE), dict(fmt="s", color=GREEN), dict(fmt="^", color=ORANGE)]


def draw_disruption(path: Path, studies: dict[str, dict]) -> None:
    """Accuracy by class; drop by class and step index; classes compared at equal index."""
    figure = Figure(figsize=(15, 4.4 * len(studies)), layout="constrained")
    axes = figure.subplots(len(studies), 3)
    for (name, study), row in zip(studies.items(), axes):
        draw_panels(row, name, study)
    figure.savefig(path, dpi=110)


def draw_panels(axes, name: str, study: dict) -> None:
    """The three panels of one study."""
    left, middle, right = axes
    draw_classes(left, study["classes"])
    left.set_title(f"{name}: without (hollow), with disruption (filled)")
    draw_by_step(middle, study["by step"])
    middle.set_title(f"{name}: by position")
    draw_matched(right, study["matched"], last=len(study["by step"]["the rest"]))
    right.set_title(f"{name}: at equal position")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower right")


def draw_classes(axis, classes: dict) -> None:
    for i, (found, look) in enumerate(zip(classes.values(), LOOKS)):
        for shift, what, fill in ((-0.1, "without", "white"), (0.1, "with", look["color"])):
            points(axis, [i + shift], [found[what]], 100, mfc=fill, **look)
    axis.set(ylabel="accuracy, %", ylim=(0, 100), xlim=(-0.5, 2.5))
    axis.set_xticks(range(3), list(classes))


def draw_by_step(axis, by_step: dict) -> None:
    for i, (kind, by) in enumerate(by_step.items()):
        enough = {int(k): x["drop"] for k, x in by.items() if x["n"] >= 10}
        places = [k + 0.15 * (i - 1) for k in enough]
        points(axis, places, enough.values(), 100, label=kind, **LOOKS[i])
    axis.set(xlabel="index of the disrupted step", ylabel="accuracy drop, points", ylim=(-20, 105))


def draw_matched(axis, matched: dict, last: int) -> None:
    places = {str(k): k for k in range(1, last + 1)} | {"all": last + 1.5}
    for shift, (kind, by), look in zip((-0.1, 0.1), matched.items(), LOOKS[::2]):
        gaps = [x["gap"] for x in by.values()]
        points(axis, [places[k] + shift for k in by], gaps, 100, label=kind, **look)
    axis.set(
        xlabel="index of the disrupted step",
        ylabel="difference of drops, points",
        xlim=(0.5, last + 2),
        ylim=(-80, 80),
    )
    axis.set_xticks(list(places.values()), list(places))
    axis.axhline(0, color=GREY, lw=0.8)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def run_studies(study: Study, problems: list[Problem], count: int) -> dict:
    """Both studies on `count` responses to each problem."""
    rows = sample_rows(study, problems, count)
    right, weights = [r for r in rows if r.right], bootstrap_weights([r.problem for r in rows])
    disrupt(study, right, problems)
    without = [replace(row, hits=None) for row in rows]
    constant = {rule: np.array([r.branch[rule] for r in rows]) * 1 for rule in rows[0].branch}
    return {
        "problems": len(problems),
        "right": len(right),
        "correlation": correlation_study(without),
        "constant among branch points": {
            rule: estimate(weighted_mean(weights, chosen)) for rule, chosen in constant.items()
        },
        "drop correlation": correlation_study(right),
        "disruption": disruption_study(right),
        "rows": [row_record(row, problems[row.problem].text) for row in rows],
    }


def row_record(row: Row, program: str) -> dict:
    return {
        "problem": program,
        "response": row.text,
        "right": row.right,
        "T": row.truth[0].tolist(),
        "D": row.truth[1].tolist(),
        **{m: row.scores[i].round(4).tolist() for i, m in enumerate(MEASURES[:5])},
        "right of 8, without and with": row.hits[:, 0].tolist() if row.right else None,
    }


def parse(argv: list[str]):
    parser = Parser(
        "experiments/what_fci_finds.py",
        "What FCI finds: correlation with known influence; on the toy disruption, too.",
        "python experiments/what_fci_finds.py --quick",
    )
    add = parser.add_argument
    text = "few problems; writes to runs/what_fci_finds-quick, not experiments"
    add("--quick", action="store_true", help=text)
    add("--model", default=str(TOY), help="model directory")
    text = "toy:8:240:3 (with --quick toy:8:16:3); another model: words:10:40:1, or a file"
    add("--problems", help=text)
    text = "samples a problem, in words; 0: the solutions as they are"
    add("--sampled", type=int, default=0, help=text)
    add("--name", default="", help="of the results, in words; default: the model's folder")
    args = parser.parse_args(argv)
    is_toy = Path(args.model).resolve() == TOY
    few, many = ("toy:8:16:3", "toy:8:240:3") if is_toy else ("words:6:8:1", "words:10:40:1")
    args.problems = args.problems or (few if args.quick else many)
    args.name = args.name or Path(args.model).resolve().name
    if args.sampled < 0:
        raise UserError(f"--sampled {args.sampled}: must be at least 0")
    return args


def draw(folder: Path, results: dict[str, dict]) -> None:
    views = {
        f"{name}, {view}": by
        for name, found in results.items()
        for view, by in found["correlation"].items()
    }
    draw_correlation(folder / "fci_correlation.png", dict(list(views.items())[:3]))
    studies = {name: found["disruption"] for name, found in results.items()}
    draw_disruption(folder / "disruption.png", studies)


def results_folder(quick: bool) -> Path:
    """Raises UserError."""
    out = ROOT / "runs" / "what_fci_finds-quick" if quick else ROOT / "experiments"
    try:
        for folder in ("figures", "results"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    return out


def study_toy(args, out: Path) -> tuple[dict, list[str]]:
    """Both studies, on the toy and on the decoys."""
    study = load_study(args.model)
    toy = load_problems(args.problems, study.tokenizer, max_prompt=1024)
    if len({p.text.count(";") for p in toy}) > 1:
        raise UserError(f"--problems {args.problems}: only programs of one length, as toy:8:240:3")
    sets = {"toy": toy, "decoy": decoys(len(toy), toy[0].text.count(";"), study.tokenizer)}
    results = {}
    for name, problems in sets.items():
        print(f"{name}: sampling and scoring", flush=True)
        results[name] = run_studies(study, problems, count=2 if args.quick else 3)
        print_tables(name, results[name])
    draw(out / "figures", results)
    settings = {"samples": SAMPLES, "resamples": RESAMPLES}
    return settings | results, ["figures/fci_correlation.png", "figures/disruption.png"]


def main(argv: list[str]) -> None:
    args, started = parse(argv), time.time()
    out = results_folder(args.quick)
    if args.problems.split(":")[0] == "toy":
        name = "what_fci_finds"
        found, figures = study_toy(args, out)
    else:
        sys.path.insert(0, str(ROOT / "experiments"))  # also when run by its path
        import in_words  # it imports this module's statistics

        name = f"what_fci_finds-{args.name}"
        found, figures = in_words.study(args, out / "figures" / f"{name}.png")
    settings = {"model": os.path.relpath(args.model, ROOT), "problems": args.problems}
    text = json.dumps(settings | found).replace('{"problem":', '\n{"problem":')
    (out / "results" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    written = ", ".join(str(out / file) for file in (*figures, f"results/{name}.json"))
    print(f"\n{(time.time() - started) / 60:.1f} minutes; written: {written}")


if __name__ == "__main__":
    with stop_on_user_error("experiments/what_fci_finds.py"):
        main(sys.argv[1:])
