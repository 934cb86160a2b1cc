r"""in_words.py: does FCI find the steps that matter, in a model that reads natural language?

    python experiments/what_fci_finds.py --model DIR                       # words:10:40:1
    python experiments/what_fci_finds.py --model DIR --problems words:6:100:2 --sampled 4
    python experiments/what_fci_finds.py --model DIR --problems FILE.jsonl

what_fci_finds.py calls this module for problems other than the toy's: words:PEOPLE:COUNT:SEED of
recipes/word_problems.py, or a file of rows {"problem", "steps", "depends"} (which that script also
writes): the steps of a solution, and for each step the earlier steps that it needs.

Responses are the solutions themselves ("teacher forced", so the model need not be able to solve
them). With --sampled N they are N samples of the model for each problem. A sample is kept if it has
one paragraph for every step, in the same order, each with the first word of its step.

Every rule's score of a step is compared with facts about the step:

    influence    how many later steps depend on it, directly or through others (T); directly (D)
    earliness    how early in the response it is
    shortness    how few tokens it has
    influence without earliness
                 from each rank, of scores and of facts, subtract the mean rank of all steps at the
                 same place in responses with as many steps; correlate the rest, all responses
                 pooled. So what depends only on the place has no effect

by Spearman's rho within a response, averaged over responses. Scores: FCI (AttnRL Eq. 5 and 6) and
FCI by count (Eq. 5 divided by its number of terms), each for Delta 1, 2 and 4; the mean and the
largest entropy of a step's tokens (DATPO's rule, TreeRL's); earliest; shortest; random. The rule
of equally spaced steps has no score. FCI also layer by layer: Eq. 6 over one layer's heads. The
first step (FCI 0 by definition) and the answer's step are left out. Intervals: 95 %, bootstrap over
problems.

Left out: disruption (see the toy's study), and steps of reasoning traces, which have no labels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from what_fci_finds import bootstrap_weights, correlations, influence_of, points, shown, table

from fci import StepAttention, scoring_mode, separator_tokens, split_steps
from recipes.word_problems import word_problems
from runtime.cli import UserError
from runtime.data import PROMPT_SUFFIX, encode_question, usable_suffix
from runtime.files import read_rows
from runtime.models import load_model
from runtime.rollout import Request, TransformersEngine, request_seed
from runtime.scoring import Sequence, token_logprobs
from tools.view import BLUE, GREEN, GREY, ORANGE

DELTAS = (1, 2, 4)
TRUTHS = ("influence T", "influence D", "earliness", "shortness")
FORM = "words:PEOPLE:COUNT:SEED, for example words:10:40:1"


# --------------------------------------------------------------------------------------------------
# Problems
# --------------------------------------------------------------------------------------------------
@dataclass
class Worked:
    """A problem with the steps of its solution, and the steps that each needs."""

    problem: str
    steps: list[str]
    depends: list[list[int]]
    source: str

    def influence(self) -> np.ndarray:
        """T and D, (2, steps): number of later steps that need a step at all, or directly."""
        n = len(self.steps)
        uses = np.zeros((n, n), bool)  # (j, k): step j needs step k
        for j, needs in enumerate(self.depends):
            uses[j, needs] = True
        return influence_of(uses)


def read_worked(source: str) -> list[Worked]:
    """Read problems. Raises a UserError that names file, line and field."""
    if source.startswith("words:"):
        parts = source.split(":")
        if len(parts) != 4 or not all(p.isdigit() for p in parts[2:]) or not int(parts[2]):
            raise UserError(f"--problems {source}: write {FORM}")
        rows = word_problems(parts[1], int(parts[2]), int(parts[3]), "test")
        return [worked(row, f"{source}, problem {i}") for i, row in enumerate(rows, 1)]
    try:
        rows = list(read_rows(source))
    except UserError as error:
        raise UserError(f"--problems {error}; or write {FORM}") from error
    found = [worked(row, f"{source}, {place}") for place, row in rows]
    if not found:
        raise UserError(f"{source}: no problem in it")
    return found


def worked(row, where: str) -> Worked:
    """A problem from a row. Raises UserError."""
    if isinstance(row, ValueError):
        raise UserError(f"{where}: {row}")
    fields = row if isinstance(row, dict) else {}
    problem, steps, depends = (fields.get(name) for name in ("problem", "steps", "depends"))
    if not isinstance(problem, str) or not problem.strip():
        raise UserError(f'{where}: the field "problem" must be a text')
    texts = isinstance(steps, list) and all(isinstance(s, str) and s.strip() for s in steps)
    if not texts or len(steps) < 3 or any("\n" in step.strip() for step in steps):
        raise UserError(f'{where}: the field "steps" must be a list of at least 3 lines of text')
    if not isinstance(depends, list) or len(depends) != len(steps):
        raise UserError(f'{where}: the field "depends" must have one list for each step')
    for j, needs in enumerate(depends):
        known = isinstance(needs, list) and all(type(k) is int and 0 <= k < j for k in needs)
        if not known:
            raise UserError(f'{where}: "depends" of step {j} must name steps before it (0 first)')
    return Worked(problem, [step.strip() for step in steps], depends, where)


# --------------------------------------------------------------------------------------------------
# Scores of the steps
# --------------------------------------------------------------------------------------------------
@dataclass
class Row:
    """One response. Arrays are over its S steps that count: all but the first and the answer's."""

    problem: int
    scores: dict[str, np.ndarray]  # rule -> (S,)
    layers: dict[str, np.ndarray]  # "FCI, Delta 1" -> (layers, S)
    truth: dict[str, np.ndarray]  # of TRUTHS -> (S,)


class LayerAttention(StepAttention):
    """FCI layer by layer, for several Delta: `layers_of[delta]`, a (K,) tensor for each layer.
    One response at a time."""

    def __init__(self, prompt_length: int, bounds: list[int], width: int, device):
        super().__init__([prompt_length], [bounds], width, 1, device)
        self.layers_of: dict[int, list[torch.Tensor]] = {delta: [] for delta in DELTAS}

    def collect(self, step_attention, columns: slice) -> None:
        steps = step_attention.shape[2]
        later = torch.arange(steps, device=step_attention.device)
        for delta, found in self.layers_of.items():
            counted = later[:, None] >= later[None, columns] + delta  # j >= k + Delta
            best = (step_attention[0] * counted).sum(1).amax(0)  # Eq. 5, then Eq. 6 over heads
            if columns.start:
                found[-1] = torch.cat([found[-1], best])
            else:
                found.append(best)


def fci_by_layer(model, prompt: list[int], tokens: list[int], bounds: list[int]) -> tuple:
    """({"FCI, Delta 1", "FCI by count, Delta 1", ...: (layers, steps)}, the entropies of the tokens
    from the same pass)."""
    collector = LayerAttention(len(prompt), bounds, len(prompt) + len(tokens), model.device)
    with scoring_mode(model, collector):
        _, entropies = token_logprobs(model, [[Sequence(prompt, tokens)]], 1.0)
    steps, found = len(bounds) - 1, {}
    for delta, layers in collector.layers_of.items():
        found[f"FCI, Delta {delta}"] = torch.stack(layers).double().cpu().numpy()
        terms = np.maximum(1, steps - np.arange(steps) - delta)
        found[f"FCI by count, Delta {delta}"] = found[f"FCI, Delta {delta}"] / terms
    return dict(sorted(found.items(), key=lambda item: "count" in item[0])), entropies.tolist()


def row_of(model, number: int, problem: Worked, prompt, tokens, bounds, rng) -> Row:
    """Scores and facts of one response whose steps correspond to the problem's."""
    count = slice(1, len(problem.steps))
    found, entropies = fci_by_layer(model, prompt, tokens, bounds)
    layers = {name: values[:, count] for name, values in found.items()}
    steps = [entropies[a:b] for a, b in zip(bounds, bounds[1:])][count]
    early, short = -np.arange(len(steps)), -np.diff(bounds)[count]
    transitive, direct = problem.influence()[:, count]
    scores = {name: found.max(0) for name, found in layers.items()}
    scores |= {
        "mean entropy": np.array([np.mean(step) for step in steps]),
        "largest entropy": np.array([np.max(step) for step in steps]),
        "earliest": early,
        "shortest": short,
        "random": rng.random(len(steps)),
    }
    return Row(number, scores, layers, dict(zip(TRUTHS, (transitive, direct, early, short))))


def lines_up(text: str, problem: Worked) -> bool:
    """Is there one paragraph for each step, with its first word, and one for the answer?"""
    *steps, _ = [part.split() for part in text.strip().split("\n\n")]
    first = [step[:1] for step in steps]
    return first == [step.split()[:1] for step in problem.steps]


def responses(model, tokenizer, eos_ids, worked: list[Worked], prompts, args) -> list[tuple]:
    """(number of its problem, tokens): the solutions, or what the model samples."""
    if not args.sampled:
        answer = "\n\nThat is the answer."  # a last step, which is not scored
        texts = ["\n\n".join(p.steps) + answer for p in worked]
        return [(i, tokenizer(t, add_special_tokens=False).input_ids) for i, t in enumerate(texts)]
    limit = 2 * max(len(tokenizer("\n\n".join(p.steps)).input_ids) for p in worked)
    asked = [
        (i, Request(prompt, limit, 1.0, request_seed(0, i, j)))
        for i, prompt in enumerate(prompts)
        for j in range(args.sampled)
    ]
    completions = TransformersEngine(model, eos_ids).generate([r for _, r in asked])
    texts = tokenizer.batch_decode([c.tokens for c in completions], skip_special_tokens=True)
    return [
        (i, c.tokens)
        for (i, _), c, text in zip(asked, completions, texts)
        if c.finished and lines_up(text, worked[i])
    ]


def rows_of(args, worked: list[Worked]) -> tuple[list[Row], str]:
    """The responses' rows, and what was left out. Raises UserError if nothing is left."""
    model, tokenizer, eos_ids = load_model(args.model, "cpu")
    suffix, separators = usable_suffix(tokenizer, PROMPT_SUFFIX), separator_tokens(tokenizer)
    prompts = [encode_question(tokenizer, p.problem + suffix, p.source) for p in worked]
    found = responses(model, tokenizer, eos_ids, worked, prompts, args)
    rng, rows = np.random.default_rng(0), []
    for number, tokens in tqdm(found, unit="response", disable=None):
        bounds = split_steps(tokens, separators)
        if len(bounds) - 1 == len(worked[number].steps) + 1:  # else the tokenizer joins two
            row = row_of(model, number, worked[number], prompts[number], tokens, bounds, rng)
            rows.append(row)
    asked = len(worked) * (args.sampled or 1)
    if not rows:
        raise UserError(
            f"none of {asked} responses has a paragraph for each step: nothing to study"
            + (" (a model that can solve them? or without --sampled)" if args.sampled else "")
        )
    return rows, f"{len(rows)} of {asked} responses, of {len({r.problem for r in rows})} problems"


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
COLUMNS = (  # title, truth, which of the two correlations
    ("influence (T)", "influence T", "within"),
    ("T without earliness", "influence T", "partial"),
    ("direct influence (D)", "influence D", "within"),
    ("D without earliness", "influence D", "partial"),
    ("earliness", "earliness", "within"),
    ("shortness", "shortness", "within"),
)


def study(args, figure: Path) -> tuple[dict, list[str]]:
    """Prints the tables and draws the figure; (results, names of figures)."""
    found = compare_all(args)
    print_words(found)
    title = f"{args.name}, {args.problems}: {found['kept']}"
    draw_words(figure, found, title)
    return found, [f"figures/{figure.name}"]


def compare_all(args) -> dict:
    """All results. "rules" and "layers": name -> title of a column -> [estimate, low, high] (for a
    layer only [estimate]), or None."""
    rows, kept = rows_of(args, read_worked(args.problems))
    weights = bootstrap_weights([r.problem for r in rows])
    cells = [100 * len(r.truth["earliness"]) + np.arange(len(r.truth["earliness"])) for r in rows]

    def compare(scores: list[np.ndarray], weights: np.ndarray) -> dict:
        by = {
            truth: correlations(scores, [r.truth[truth] for r in rows], cells, weights)
            for truth in TRUTHS
        }
        return {title: by[truth][way] for title, truth, way in COLUMNS}

    names = rows[0].layers
    count = len(next(iter(names.values())))
    alone = weights[:1]  # 30 layers: estimates only
    return {
        "kept": kept,
        "rules": {n: compare([r.scores[n] for r in rows], weights) for n in rows[0].scores},
        "layers": {
            n: [compare([r.layers[n][l] for r in rows], alone) for l in range(count)] for n in names
        },
    }


def print_words(found: dict) -> None:
    print(f"\n{found['kept']}")
    titles = [title for title, _, _ in COLUMNS]
    table(
        "Spearman's rho of a step's score with what is true of it, within a response",
        ["score", *titles],
        [[name, *(shown(by[t]) for t in titles)] for name, by in found["rules"].items()],
    )
    names = [n for n in found["layers"] if n.endswith(("Delta 1", "Delta 4"))]
    shown_of = {"T": "influence (T)", "T w. e.": "T without earliness", "early": "earliness"}
    table(
        "The same in single layers: T, T without earliness, earliness",
        ["layer", *names],
        [
            [
                str(l),
                *(
                    " / ".join(f"{by[t][0]:.2f}" if by[t] else "-" for t in shown_of.values())
                    for by in row
                ),
            ]
            for l, row in enumerate(zip(*(found["layers"][n] for n in names)))
        ],
    )


def draw_words(path: Path, found: dict, title: str) -> None:
    """Left: every rule. Right: FCI's layers."""
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rules = found["rules"]
    looks = {
        "influence (T)": dict(fmt="o", color=BLUE),
        "T without earliness": dict(fmt="s", color=ORANGE),
        "earliness": dict(fmt="^", color=GREY),
    }
    for shift, (what, look) in zip((-0.15, 0, 0.15), looks.items()):
        places = np.arange(len(rules)) + shift
        points(left, places, [by[what] for by in rules.values()], label=what, **look)
    left.set_xticks(range(len(rules)), list(rules), rotation=40, ha="right")
    left.set_ylabel("rank correlation within a response")
    for name, style in (("FCI, Delta 1", "-"), ("FCI by count, Delta 1", "--")):
        for what, colour in (("influence (T)", BLUE), ("T without earliness", ORANGE)):
            line = [by[what][0] if by[what] else np.nan for by in found["layers"][name]]
            right.plot(line, style, color=colour, marker=".", label=f"{name}: {what}")
    right.set_xlabel("layer")
    right.set_title("single layers")
    for axis in (left, right):
        axis.set_ylim(-1.05, 1.05)
        axis.axhline(0, color=GREEN, lw=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
