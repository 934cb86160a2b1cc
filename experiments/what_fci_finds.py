r"""what_fci_finds.py: does FCI find the steps that matter? Two studies on the toy, where the answer
is known.

    python experiments/what_fci_finds.py              # writes figures/ and results/, prints tables;
                                                      about 15 minutes on one core
    python experiments/what_fci_finds.py --quick      # the same, small, into
                                                      runs/what_fci_finds-quick; about a minute

Study 1, correlation. In a program such as "a=4;b=a-2;c=b+b;d=7;e=d+c;?e" the influence of a line is
known:
    transitive  T[k] = number of later lines that mention variable k, or a variable that depends on
    it
    direct      D[k] = number of later lines that mention variable k
(read off the text: "x*0" and "x-x" count as dependence). T and D are compared with scores of the
steps of a response:
    FCI         y[k] = max over l, h of y^{l,h}[k],  y^{l,h}[k] = sum over j >= k + Delta of A^{l,h}[j, k]   (AttnRL Eq. 4-6)
    result only the same, but keys in Eq. 4 are one token a step, the result's digit, instead of
    all: blind to a step's length
    baselines   mean entropy of the step's tokens; position (early = high); shortness (few tokens =
                high); random
by Spearman's rho, Pearson's correlation of average ranks:
    within      over the steps of one response, averaged over responses
    partial     early steps have more dependants AND are summed over more later ones in Eq. 5, so
                position alone raises both.
                From each rank the mean rank of all responses at that step index is taken; what is
                left is correlated, all responses pooled. What depends on the index alone cannot
                enter (so position itself has no such value).
The first step (FCI 0 by definition) and the final "\boxed{}" (no variable) are left out.

Shortness is a baseline because Eq. 4 is a mean over the step's tokens, and because the toy's hub
(the variable that many lines need) is its only constant, "d=7", so the only short step. Two
controls keep the two apart:
    without the hub   the same responses, that step left out: all steps are equally long ("partial":
                      means per step index and hub)
    decoy             programs that look the same, but no later line mentions the constant: short
                      and without influence

Study 2, disruption (the paper's Fig. 3). A response whose final answer was right is kept up to the
end of a step, and its rest is sampled anew, 8 times: attention to that step is set to zero after
the softmax, not renormalised, in all layers and heads, for all tokens after it. Drop = accuracy
without less accuracy with disruption, from the same prefix with the same random numbers. The paper
draws one step of a class (top 20 % FCI; the rest; top 20 % mean entropy). Here EVERY step is
disrupted and a class is the mean over its steps: the expectation of that draw, with less noise.
Quantiles are over the steps 1 to n - 1.
    output of a later query q = sum over s of alpha[q, s] [s not in step] v[s]  =  the usual sum
    with v[s] = 0 in the step
so the disruption is zero rows in the VALUE cache, set when the prefix has been computed: keys,
hence the softmax, stay, and nothing inside the prefix changes (also not its last token, which
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

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Problem, encode_question, load_problems  # noqa: E402
from errors import Parser, UserError, stop_on_user_error  # noqa: E402
from eval import Reward, load_model  # noqa: E402
from fci import Sequence, score, separator_tokens, split_steps  # noqa: E402
from rollout import Request, TransformersEngine, request_seed  # noqa: E402
from toy.programs import toy_program, toy_solution  # noqa: E402
from tree import Response, choose_branch_points  # noqa: E402
from view import BLUE, GREEN, GREY, ORANGE  # noqa: E402

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
class Row:
    """One response that lines up with its program. Arrays are over the steps 1 .. n - 1 of n
    variables (S of them)."""

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
    """T and D, (2, n): later lines that depend on a line's variable directly or through others;
    that mention it."""
    lines = program.split(";")[:-1]
    # (j, k): line j mentions variable k
    uses = np.array([[name[0] in line[2:] for name in lines] for line in lines])
    depends = uses.copy()
    for j in range(len(lines)):  # in order: what line j mentions is complete already
        depends[j] |= depends[uses[j]].any(0)
    return np.array([depends.sum(0), uses.sum(0)])


def decoys(count: int, variables: int, tokenizer) -> list[Problem]:
    """Programs with the toy's layout whose constant nobody needs."""
    rng, found = random.Random(0), {}
    while len(found) < count:
        hub = rng.randrange(3, max(4, variables // 2 + 1))  # as toy_program draws it
        text = toy_program(variables, rng, hub, pull=0.0)
        if true_influence(text)[1, hub] == 0:
            answer = toy_solution(text).rsplit("{")[-1].rstrip("}")
            found[text] = Problem(
                text, [answer], "decoy", encode_question(tokenizer, text, "decoy")
            )
    return list(found.values())


def in_format(text: str, program: str) -> bool:
    """One step for every line, with its variable, then the box."""
    return [step[:2] for step in text.split("\n\n")] == [
        line[:2] for line in program.split(";")[:-1]
    ] + [r"\b"]


def step_attention(
    alpha: np.ndarray, start: int, bounds: list[int], result_only: bool = False
) -> np.ndarray:
    """A[l, h, j, k] of Eq. 4 from alpha[l, h, q, s]; `start` = length of the prompt, which is in no
    step.

    result_only: the key of a step is the token before its separator only.
    """
    mean, result = np.zeros((2, len(bounds) - 1, alpha.shape[-1]))
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        mean[k, start + a : start + b] = 1 / (b - a)
        result[k, start + b - 2] = 1
    return mean @ alpha @ (result if result_only else mean).T


def influence(attention: np.ndarray, delta: int) -> np.ndarray:
    """y[..., k] of Eq. 5: the sum over steps j >= k + Delta of A[..., j, k]."""
    return np.tril(attention, -delta).sum(-2)


def sample_rows(
    problems, model, tokenizer, eos_ids, reward, count: int, seed: int = 0
) -> list[Row]:
    """`count` responses a problem; those in format, right or wrong, with their scores."""
    separators, rng, rows = separator_tokens(tokenizer), np.random.default_rng(seed), []
    asked = [
        (i, Request(p.prompt_ids, 16 * len(p.text.split(";")), 1.0, request_seed(seed, i, j)))
        for i, p in enumerate(problems)
        for j in range(count)
    ]
    completions = TransformersEngine(model, eos_ids).generate([request for _, request in asked])
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    verdicts = reward([(text, problems[i].answers) for text, (i, _) in zip(texts, asked)])
    # shows attention as it is: single heads, and a second opinion on fci.py
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for (i, request), completion, text, verdict in zip(
        tqdm(asked, unit="response", disable=None), completions, texts, verdicts
    ):
        tokens, lines, prompt = (
            completion.tokens,
            problems[i].text.split(";")[:-1],
            request.prompt_ids,
        )
        bounds, n = split_steps(tokens, separators), len(lines)
        if not in_format(text, problems[i].text) or len(bounds) != n + 2 or not completion.finished:
            continue  # steps and lines do not correspond
        # the only constant but the first line
        hub = next(k for k, line in enumerate(lines) if k and len(line) == 3)
        scored = score(model, [Sequence(prompt, tokens, bounds)], delta=1)[0]
        with torch.no_grad():
            alpha = torch.cat(
                eager.base_model(torch.tensor([prompt + tokens]), output_attentions=True).attentions
            )
        attention, on_result = (
            step_attention(alpha.double().numpy(), len(prompt), bounds, only)
            for only in (False, True)
        )
        fci = {delta: influence(attention, delta).max((0, 1)) for delta in (1, 2, 4)}  # Eq. 6
        assert np.allclose(fci[1][1:], scored.fci[1:], atol=1e-5), (
            "fci.py and eager attention disagree"
        )
        entropy = np.array([np.mean(scored.entropies[a:b]) for a, b in zip(bounds, bounds[1:])])
        response = Response(
            tokens, scored.logprobs, verdict, scored.entropies, bounds, scored.fci, n + 1
        )
        rules = {
            f"FCI, Delta {d}": (replace(response, fci=y.tolist()), "fci") for d, y in fci.items()
        }
        rules |= {
            "entropy, two tokens (TreeRL)": (response, "entropy"),
            "random": (response, "random"),
        }
        branch = {
            name: [
                np.searchsorted(bounds, at, side="right") - 1
                for at in choose_branch_points(r, how, 2, random.Random(len(rows)))
            ]
            for name, (r, how) in rules.items()
        }
        branch |= {
            "two steps of highest mean entropy": 1 + np.argsort(-entropy[1:n])[:2],
            "earliest two": [1, 2],
        }
        scores = np.array(
            [
                *fci.values(),
                influence(on_result, 1).max((0, 1)),
                entropy,
                -np.arange(n + 1),
                -np.diff(bounds),
                rng.random(n + 1),
            ]
        )
        branch = {rule: hub in steps for rule, steps in branch.items()}
        rows.append(
            Row(
                i,
                hub,
                text,
                verdict == 1,
                prompt,
                response,
                branch,
                scores[:, 1:n],
                influence(attention, 1)[..., 1:n],
                true_influence(problems[i].text)[:, 1:],
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
    """Average ranks (1 = smallest) along the last axis; equal values share the mean of their
    places."""
    below, equal = x[..., :, None] > x[..., None, :], x[..., :, None] == x[..., None, :]
    return below.sum(-1) + (equal.sum(-1) + 1) / 2


def bootstrap_weights(problems: list[int], resamples: int = RESAMPLES) -> np.ndarray:
    """(1 + resamples, rows): how often each row counts. The first line is all ones: the estimate
    itself."""
    _, of_row = np.unique(problems, return_inverse=True)
    count = of_row.max() + 1
    # whole problems are drawn
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, resamples)
    return np.vstack([np.ones(len(problems)), drawn[:, of_row]])


def weighted_mean(weights: np.ndarray, values: np.ndarray, where=True) -> np.ndarray:
    """A mean over rows for every line of `weights`; rows without a value (NaN), or not in `where`,
    do not count."""
    where = np.isfinite(values) & where
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(where, values, 0)) / (weights @ where)


def estimate(values: np.ndarray) -> list[float] | None:
    """[estimate, low, high] from a statistic under every line of bootstrap weights; None where it
    is undefined."""
    return (
        [float(values[0]), *np.nanquantile(values[1:], [0.025, 0.975]).tolist()]
        if np.isfinite(values[0])
        else None
    )


def correlations(
    scores: np.ndarray, truth: np.ndarray, cell: np.ndarray, weights: np.ndarray
) -> dict:
    """Spearman's rho of scores and truth, both (rows, steps), "within" responses and "partial":
    without the means of `cell`."""
    x, y = ranks(scores), ranks(truth)
    of_cell = np.unique(cell, return_inverse=True)[1].reshape(cell.shape)
    size = np.bincount(of_cell.ravel())
    found = {}
    for name in ("within", "partial"):
        dx, dy = (
            (
                r - r.mean(1, keepdims=True)
                if name == "within"
                else r - (np.bincount(of_cell.ravel(), r.ravel()) / size)[of_cell]
            )
            for r in (x, y)
        )
        # one number a response
        xy, xx, yy = ((a * b).sum(1) for a, b in ((dx, dy), (dx, dx), (dy, dy)))
        if name == "partial":
            xy, xx, yy = weights @ xy, weights @ xx, weights @ yy
        # equal scores throughout have no rank correlation
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = np.where(xx * yy > 1e-9, xy / np.sqrt(xx * yy), np.nan)
        found[name] = estimate(rho if name == "partial" else weighted_mean(weights, rho))
    return found


def correlation_study(rows: list[Row]) -> dict:
    """view -> measure (and "heads") -> truth -> within, partial; the truth of disrupted rows is the
    measured drop."""
    weights, hub = (
        bootstrap_weights([r.problem for r in rows]),
        np.array([r.hub for r in rows])[:, None],
    )
    scores, heads = (
        np.array([r.scores for r in rows]).swapaxes(0, 1),
        np.array([r.heads for r in rows]),
    )
    truths = dict(zip(("transitive", "direct"), np.array([r.truth for r in rows]).swapaxes(0, 1)))
    if rows[0].hits is not None:
        truths = {"drop": np.array([r.hits[0, 0] - r.hits[1, 0] for r in rows])}
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
    """A request whose new tokens get nothing from the positions cut[0] .. cut[1] - 1 of its
    prompt."""

    cut: tuple[int, int] = (0, 0)


class DisruptedEngine(TransformersEngine):
    """The usual engine; between prefix and first new token the values at the cut become zero in
    every layer."""

    def _prefill(self, requests):
        # by now every request has a cache row of its own
        cache, mask, hidden = super()._prefill(requests)
        for row, r in enumerate(requests):
            start = mask.shape[1] - len(r.prompt_ids)  # prompts are aligned to the right
            for layer in cache.layers:
                layer.values[row, :, start + r.cut[0] : start + r.cut[1]] = 0
        return cache, mask, hidden


def disrupt(rows: list[Row], problems, model, tokenizer, eos_ids, reward, seed: int = 1) -> None:
    """Fills `hits`: every step in turn is kept, then hidden from the rest, which is sampled
    anew."""
    engine = DisruptedEngine(model, eos_ids)
    # one at a time: its prefixes are computed once
    for number, row in enumerate(tqdm(rows, unit="response", disable=None)):
        tokens, bounds, before, requests = (
            row.response.tokens,
            row.response.bounds,
            len(row.prompt_ids),
            [],
        )
        for k in range(1, len(bounds) - 2):
            for j in range(SAMPLES):
                # without and with, same random numbers
                for cut in ((0, 0), (before + bounds[k], before + bounds[k + 1])):
                    requests.append(
                        CutRequest(
                            row.prompt_ids + tokens[: bounds[k + 1]],
                            16 * len(bounds) - bounds[k + 1],
                            1.0,
                            request_seed(seed, number, k, j),
                            cut,
                        )
                    )
        texts = tokenizer.batch_decode(
            [r.prompt_ids[before:] + c.tokens for r, c in zip(requests, engine.generate(requests))],
            skip_special_tokens=True,
        )
        right = reward([(text, problems[row.problem].answers) for text in texts])
        kept = [in_format(text, problems[row.problem].text) for text in texts]
        row.hits = np.array([right, kept]).reshape(2, -1, SAMPLES, 2).sum(2).transpose(2, 0, 1)


def disruption_study(rows: list[Row]) -> dict:
    """Study 2: accuracy per class; drop per class and step index; classes compared at equal step
    index."""
    weights = bootstrap_weights([r.problem for r in rows])
    # (rows, S) each
    (right, _), (disrupted, kept) = np.array([r.hits for r in rows]).transpose(1, 2, 0, 3) / SAMPLES
    drop = right - disrupted
    fci, entropy = (
        np.array([r.scores[MEASURES.index(name)] for r in rows])
        for name in ("FCI, Delta 1", "mean entropy")
    )
    top, high = (x >= np.quantile(x, 1 - RHO, axis=1, keepdims=True) for x in (fci, entropy))
    found = {"classes": {}, "by step": {}, "matched": {}}
    for name, mask in (("top 20 % FCI", top), ("the rest", ~top), ("top 20 % entropy", high)):
        found["classes"][name] = {
            what: estimate(weighted_mean(weights, (x * mask).sum(1) / mask.sum(1)))
            for what, x in (
                ("without", right),
                ("with", disrupted),
                ("drop", drop),
                ("in format, with", kept),
            )
        }
        found["by step"][name] = {
            str(k + 1): {
                "n": int(mask[:, k].sum()),
                "drop": estimate(weighted_mean(weights, drop[:, k], mask[:, k])),
            }
            for k in range(drop.shape[1])
        }
    for name, mask in (("top 20 % FCI - the rest", top), ("top 20 % entropy - all others", high)):
        total, count = 0, 0
        found["matched"][name] = {}
        # step indices that have both kinds
        for k in np.flatnonzero(np.minimum(mask.sum(0), (~mask).sum(0)) >= 10):
            gap = weighted_mean(weights, drop[:, k], mask[:, k]) - weighted_mean(
                weights, drop[:, k], ~mask[:, k]
            )
            found["matched"][name][str(k + 1)] = {
                "n": [int(mask[:, k].sum()), int((~mask[:, k]).sum())],
                "gap": estimate(gap),
            }
            total, count = total + mask[:, k].sum() * gap, count + mask[:, k].sum()
        if count:  # the mean gap of the steps in the class
            found["matched"][name]["all"] = {"n": int(count), "gap": estimate(total / count)}
    return found


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
def shown(found: list[float] | None, scale: float = 1, digits: int = 2) -> str:
    return (
        "-"
        if found is None
        else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*(scale * x for x in found), d=digits)
    )


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))


def print_tables(name: str, found: dict) -> None:
    print(
        f"\n## {name}: {found['problems']} problems, {len(found['rows'])} responses in format,"
        f" {found['right']} of them right"
    )
    for view, by in found["correlation"].items():
        both = [{**by[m], **found["drop correlation"][view][m]} for m in MEASURES]
        table(
            f"Spearman's rho, {view} (drop: of study 2)",
            ["score", *(f"{t}, {way}" for t in both[0] for way in both[0][t])],
            [
                [m, *(shown(value) for ways in row.values() for value in ways.values())]
                for m, row in zip(MEASURES, both)
            ],
        )
        table(
            f"Single heads y^(l,h), Delta 1, with T, {view}: within / partial",
            ["layer", *(f"head {h}" for h in range(len(by["heads"][0])))],
            [
                [
                    str(l),
                    *(
                        " / ".join(f"{v[0]:.2f}" if v else "-" for v in head["transitive"].values())
                        for head in row
                    ),
                ]
                for l, row in enumerate(by["heads"])
            ],
        )
    table(
        "The constant is among the two branch points, % of responses",
        ["rule", "%"],
        [
            [rule, shown(share, 100, 1)]
            for rule, share in found["constant among branch points"].items()
        ],
    )
    classes, by_step, matched = found["disruption"].values()
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
    """Estimates with their intervals at x = `places`; those that are undefined are left out."""
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
        for shift, way, colour, mark in (
            (-0.12, "within", BLUE, "o"),
            (0.12, "partial", ORANGE, "s"),
        ):
            points(
                axis,
                np.arange(len(MEASURES)) + shift,
                [by[m]["transitive"][way] for m in MEASURES],
                fmt=mark,
                color=colour,
                label={"within": "within responses", "partial": "partial: position taken out"}[way],
            )
        axis.axhline(0, color=GREY, lw=0.8)
        axis.set(
            title=title,
            ylim=(-1, 1),
            ylabel="rank correlation with true influence T" if axis is axes[0, 0] else "",
        )
        axis.set_xticks(range(len(MEASURES)), MEASURES, rotation=40, ha="right")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
        values = [
            [[v[0] if v else np.nan for v in head["transitive"].values()] for head in row]
            for row in by["heads"]
        ]
        image = heat.imshow(np.array(values)[..., 0], cmap="PuOr_r", vmin=-1, vmax=1)
        for l, h in np.ndindex(len(values), len(values[0])):
            heat.text(
                h,
                l,
                "\n".join("-" if np.isnan(v) else f"{v:.2f}" for v in values[l][h]),
                ha="center",
                va="center",
                color="white" if abs(values[l][h][0]) > 0.6 else "black",
            )
        heat.set(
            xlabel="head",
            ylabel="layer",
            xticks=range(len(values[0])),
            yticks=range(len(values)),
            title="single heads $y^{l,h}$, Delta 1: within, below it partial",
        )
    figure.colorbar(image, ax=axes[1], label="rank correlation with T, within", shrink=0.8)
    figure.savefig(path, dpi=110)


def draw_disruption(path: Path, studies: dict[str, dict]) -> None:
    """Accuracy by class; drop by class and step index; classes compared at equal index."""
    figure = Figure(figsize=(15, 4.4 * len(studies)), layout="constrained")
    axes = figure.subplots(len(studies), 3)
    looks = [dict(fmt="o", color=BLUE), dict(fmt="s", color=GREEN), dict(fmt="^", color=ORANGE)]
    for (name, (classes, by_step, matched)), (left, middle, right) in zip(studies.items(), axes):
        for i, (kind, look) in enumerate(zip(classes, looks)):
            for shift, what, fill in ((-0.1, "without", "white"), (0.1, "with", look["color"])):
                points(left, [i + shift], [classes[kind][what]], 100, mfc=fill, **look)
            shown_steps = {int(k): x["drop"] for k, x in by_step[kind].items() if x["n"] >= 10}
            points(
                middle,
                [k + 0.15 * (i - 1) for k in shown_steps],
                shown_steps.values(),
                100,
                label=kind,
                **look,
            )
        last = len(by_step["the rest"])
        places = {**{str(k): k for k in range(1, last + 1)}, "all": last + 1.5}
        for shift, (kind, by), look in zip((-0.1, 0.1), matched.items(), looks[::2]):
            points(
                right,
                [places[k] + shift for k in by],
                [x["gap"] for x in by.values()],
                100,
                label=kind,
                **look,
            )
        left.set(
            title=f"{name}: without (hollow), with disruption (filled)",
            ylabel="accuracy, %",
            ylim=(0, 100),
            xlim=(-0.5, 2.5),
        )
        left.set_xticks(range(3), list(classes))
        middle.set(
            title=f"{name}: by position",
            xlabel="index of the disrupted step",
            ylabel="accuracy drop, points",
            ylim=(-20, 105),
        )
        right.set(
            title=f"{name}: at equal position",
            xlabel="index of the disrupted step",
            ylabel="difference of drops, points",
            xlim=(0.5, last + 2),
            ylim=(-80, 80),
        )
        right.set_xticks(list(places.values()), list(places))
        right.axhline(0, color=GREY, lw=0.8)
        for axis in (left, middle, right):
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    parser = Parser(
        "experiments/what_fci_finds.py",
        "What FCI finds on the toy: correlation with true influence, disruption.",
        "python experiments/what_fci_finds.py --quick",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few problems; writes to runs/what_fci_finds-quick, not experiments",
    )
    parser.add_argument("--model", default=str(ROOT / "toy" / "model"), help="model directory")
    parser.add_argument(
        "--problems", help="toy:VARIABLES:COUNT:SEED; default toy:8:240:3, with --quick toy:8:16:3"
    )
    args = parser.parse_args(argv)
    source, started = args.problems or ("toy:8:16:3" if args.quick else "toy:8:240:3"), time.time()
    if source.split(":")[0] != "toy":
        raise UserError(
            f"--problems {source}: the true influence of a step is known on the toy only; give"
            " toy:8:100:3"
        )
    model, tokenizer, eos_ids = load_model(args.model, "cpu")
    toy, reward, results = load_problems(source, tokenizer, max_prompt=1024), Reward(), {}
    out = ROOT / "runs" / "what_fci_finds-quick" if args.quick else ROOT / "experiments"
    try:
        for folder in ("figures", "results"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    for name, problems in (
        ("toy", toy),
        ("decoy", decoys(len(toy), toy[0].text.count(";"), tokenizer)),
    ):
        print(f"{name}: sampling and scoring", flush=True)
        rows = sample_rows(
            problems, model, tokenizer, eos_ids, reward, count=2 if args.quick else 3
        )
        right, weights = (
            [row for row in rows if row.right],
            bootstrap_weights([row.problem for row in rows]),
        )
        disrupt(right, problems, model, tokenizer, eos_ids, reward)
        without = [replace(row, hits=None) for row in rows]
        results[name] = {
            "problems": len(problems),
            "right": len(right),
            "correlation": correlation_study(without),
            "constant among branch points": {
                rule: estimate(weighted_mean(weights, np.array([r.branch[rule] for r in rows]) * 1))
                for rule in rows[0].branch
            },
            "drop correlation": correlation_study(right),
            "disruption": disruption_study(right),
            "rows": [
                {
                    "problem": problems[row.problem].text,
                    "response": row.text,
                    "right": row.right,
                    "T": row.truth[0].tolist(),
                    "D": row.truth[1].tolist(),
                    **{m: row.scores[i].round(4).tolist() for i, m in enumerate(MEASURES[:5])},
                    "right of 8, without and with": row.hits[:, 0].tolist() if row.right else None,
                }
                for row in rows
            ],
        }
        print_tables(name, results[name])
    views = {
        f"{name}, {view}": by
        for name, found in results.items()
        for view, by in found["correlation"].items()
    }
    draw_correlation(out / "figures" / "fci_correlation.png", dict(list(views.items())[:3]))
    draw_disruption(
        out / "figures" / "disruption.png",
        {name: found["disruption"].values() for name, found in results.items()},
    )
    settings = {
        "model": os.path.relpath(args.model, ROOT),
        "problems": source,
        "samples": SAMPLES,
        "resamples": RESAMPLES,
    }
    text = json.dumps(settings | results)
    (out / "results" / "what_fci_finds.json").write_text(
        text.replace('{"problem":', '\n{"problem":') + "\n", encoding="utf-8"
    )
    print(
        f"\n{(time.time() - started) / 60:.1f} minutes; written: {out}/figures/fci_correlation.png,"
        f" disruption.png, {out}/results/what_fci_finds.json"
    )


if __name__ == "__main__":
    with stop_on_user_error("experiments/what_fci_finds.py"):
        main(sys.argv[1:])
