r"""sparkle.py: what does training improve? Two questions of SPARKLE (arXiv 2506.04723), on the toy.

    python experiments/sparkle.py                                   # the toy: a minute or two
    python experiments/sparkle.py --models before=toy/model grpo=runs/A/last --name mine
    python experiments/sparkle.py --report --name mine              # tables and figure again

With a part of the solution.  A model that knows the steps but slips gains from every right step
that it is given; a model that cannot do the later steps gains nothing. So each response begins with
the first k steps of the teacher's solution (toy/programs.py), and the model continues it:

    accuracy(k) = mean over problems of the share of right final answers, k = 0, 1, ..., n

n is the number of variables. With k = n all steps are given, and only the box is missing.

The first slip.  In responses with k = 0: which step is the first that differs from the teacher's?

    slip(k) = mean over problems of the share of responses whose first wrong step is step k

Later steps do not count, whether they follow from the slip or not. A step that is missing, or is of
another variable, is a slip at the place where it should be. Everything in the place of the box
counts as step "box", including extra steps before it; "none" are responses without a slip. These
are right; one with a slip may be right, too (no later step needs the variable, or a later slip
corrects it). So "none" is at most accuracy(0). A step is compared with the teacher's as text: if it
is written differently, it is a slip.

Models are compared on the same problems with the same random numbers. Intervals are 95 %, bootstrap
over problems (runtime/results.py); differences from the first model are paired. One model of a
method is one seed: the interval says nothing about another training run.

Left out: SPARKLE's plans and pieces of knowledge, which the toy's problems do not have; training on
hard problems with a part of the solution; problems without a known solution in steps.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from fci import separator_tokens, split_steps
from runtime.checkpoint import model_hash
from runtime.cli import Parser, UserError, plain, reason, stop_on_user_error
from runtime.data import Problem, is_toy, load_problems
from runtime.models import check_context, load_model
from runtime.results import bootstrap, markdown
from runtime.rewards import Reward, response_texts
from runtime.rollout import Request, TransformersEngine, request_seed
from sampler import is_correct
from tools.view import GREY, PALETTE
from toy.programs import toy_solution

HERE = Path(__file__).resolve().parent
CHUNK = 10  # problems that are sampled and graded together
SETTINGS = ("problems", "count", "samples", "temperature", "max_response", "seed")


# --------------------------------------------------------------------------------------------------
# Solutions and slips
# --------------------------------------------------------------------------------------------------
def first_slip(response: str, program: str) -> int:
    r"""The number, from 1 on, of the first step that differs from the teacher's; the box is the
    step after the last variable's. 0: there is none.

    >>> first_slip("a=3\n\nb=3+4=8\n\n\\boxed{8}", "a=3;b=a+4;?b")
    2
    """
    *steps, box = toy_solution(program).split("\n\n")
    # all text after the last variable's step is in the place of the box
    given = response.rstrip().split("\n\n", len(steps))
    for k, right in enumerate([*steps, box], 1):
        if given[k - 1 : k] != [right]:
            return k
    return 0


@dataclass
class Solved:
    """A problem with the teacher's solution as tokens, and where its steps end."""

    problem: Problem
    tokens: list[int]
    bounds: list[int]  # step k is tokens[bounds[k]:bounds[k + 1]]; the last one is the box


def with_solution(problem: Problem, tokenizer, name: str) -> Solved:
    """Raises UserError if the model's tokenizer has no such solution in steps."""
    text = toy_solution(problem.text)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    bounds = split_steps(tokens, separator_tokens(tokenizer))
    steps = [tokenizer.decode(tokens[a:b]) for a, b in zip(bounds, bounds[1:])]
    if [step.strip() for step in steps] != text.split("\n\n"):
        raise UserError(f"--models {name}: its tokenizer cannot write {text.splitlines()[0]!r}")
    return Solved(problem, tokens, bounds)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
@dataclass
class Sampler:
    """Samples responses of one model and grades them."""

    tokenizer: object
    engine: TransformersEngine
    reward: Reward
    args: object

    def sample(self, part: list[tuple[int, Solved]]) -> list[dict]:
        """For each (number, problem): how many responses were right with the first k steps given,
        for each k, and the first slips of the responses with k = 0."""
        args, asked, requests = self.args, [], []
        for number, one in part:
            for k, cut in enumerate(one.bounds[:-1]):
                for i in range(args.samples):
                    asked.append((one, cut))
                    prompt, length = one.problem.prompt_ids + one.tokens[:cut], args.max_response
                    seed = request_seed(args.seed, number, k, i)
                    requests.append(Request(prompt, length - cut, args.temperature, seed))
        completions = self.engine.generate(requests)
        whole = [one.tokens[:cut] + c.tokens for (one, cut), c in zip(asked, completions)]
        texts = response_texts(self.tokenizer, whole)
        graded = self.reward([(t, one.problem.answers) for t, (one, _) in zip(texts, asked)])
        found, at, S = [], 0, args.samples
        for _, one in part:
            program, prefixes = one.problem.text, len(one.bounds) - 1
            right = [is_correct(reward) for reward in graded[at : at + prefixes * S]]
            slips = [first_slip(text, program) for text in texts[at : at + S]]  # k = 0
            found.append(
                {"right": [sum(right[k * S : k * S + S]) for k in range(prefixes)], "slips": slips}
            )
            at += prefixes * S
        return found


def run_model(args, name: str, folder: str) -> list[dict]:
    """One record per problem: its text, and the results of `Sampler.sample`."""
    model, tokenizer, eos_ids = load_model(folder, "cpu")
    problems = load_problems(args.problems, tokenizer, max_prompt=1024)[: args.count or None]
    check_context(model, problems, args.max_response)
    solved = [with_solution(p, tokenizer, name) for p in problems]
    longest = max(solved, key=lambda one: len(one.tokens))
    if len(longest.tokens) >= args.max_response:  # one more: the end of the response
        raise UserError(
            f"--max_response {args.max_response}: the solution of {longest.problem.source} has"
            f" {len(longest.tokens)} tokens, and its end is one more"
        )
    sampler = Sampler(tokenizer, TransformersEngine(model, eos_ids), Reward(), args)
    numbered, records = list(enumerate(solved)), []
    with tqdm(total=len(solved), unit="problem", desc=plain(name), disable=None) as bar:
        for a in range(0, len(numbered), CHUNK):
            part = numbered[a : a + CHUNK]
            found = sampler.sample(part)
            records += [{"problem": one.problem.text} | f for (_, one), f in zip(part, found)]
            bar.update(len(part))
    return records


# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------
def shares(records: list[dict], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """accuracy (problems, steps + 1) for k = 0, 1, ..., and slip (problems, steps + 2) at step 1,
    2, ..., box, none. Programs with fewer variables have NaN for the steps that they lack."""
    accuracy = np.full((len(records), steps + 1), np.nan)
    slip = np.full((len(records), steps + 2), np.nan)
    for row, record in enumerate(records):
        samples, own = len(record["slips"]), len(record["right"]) - 1  # own: variables
        accuracy[row, : own + 1] = np.array(record["right"]) / samples
        counts = np.bincount(record["slips"], minlength=own + 2) / samples
        slip[row, :own] = counts[1 : own + 1]
        slip[row, steps:] = counts[own + 1], counts[0]
    return accuracy, slip


def intervals(values: np.ndarray) -> np.ndarray:
    """(3, M): mean over the problems that have a value, and its interval, of (problems, M)."""
    has = np.isfinite(values)
    means = bootstrap(np.hstack([np.where(has, values, 0), has]).astype(float))
    total, count = np.hsplit(means, 2)
    # a draw may contain no problem with a value: it has no mean
    means = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return np.vstack([np.nanmean(values, 0), np.nanquantile(means, [0.025, 0.975], axis=0)])


def row(name: str, values: np.ndarray, sign: str = "") -> list[str]:
    cells = [[f"{100 * x:{sign}.1f}" for x in column] for column in intervals(values).T]
    return [plain(name), *(f"{middle} [{low}, {high}]" for middle, low, high in cells)]


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
Found = dict[str, tuple[np.ndarray, np.ndarray]]  # model -> (accuracy, slip)


def table(found: Found, which: int, head: list[str]) -> str:
    """A row for each model, then for each other model its difference from the first."""
    (first, base), *others = [(name, values[which]) for name, values in found.items()]
    rows = [head, row(first, base), *(row(name, values) for name, values in others)]
    rows += [row(f"{name} - {first}", values - base, "+") for name, values in others]
    return markdown(rows)


def report(settings: dict, records: dict[str, list[dict]], folder: Path, name: str) -> str:
    """Return both tables, in %; draw the figure."""
    steps = max(len(r["right"]) for rows in records.values() for r in rows) - 1
    found = {model: shares(rows, steps) for model, rows in records.items()}
    about = ", ".join(f"{key} {settings[key]}" for key in SETTINGS)
    count = len(next(iter(records.values())))
    places = [f"step {k}" for k in range(1, steps + 1)]
    draw(folder / f"{name}.png", found, name)
    return "\n\n".join(
        [
            f"{name}: {count} problems; {about}. In %, in brackets 95 % intervals over problems.",
            "**Accuracy when the first k steps of the solution are given**",
            table(found, 0, ["model", *(f"k = {k}" for k in range(steps + 1))]),
            "**The first slip**: share of responses (k = 0) whose first wrong step is this one",
            table(found, 1, ["model", *places, "box", "none"]),
        ]
    )


def draw(path: Path, found: Found, name: str) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    steps = next(iter(found.values()))[0].shape[1] - 1
    places = [[str(k) for k in range(steps + 1)]]
    places.append([*(str(k) for k in range(1, steps + 1)), "box", "none"])
    titles = ("accuracy, %", "share of responses, %")
    labels = ("steps of the solution that are given", "the first wrong step")
    for axis, which in zip(panels, (0, 1)):
        for m, (model, values) in enumerate(found.items()):
            middle, low, high = 100 * intervals(values[which])
            # a little apart, otherwise the bars hide each other
            x = np.arange(len(middle)) + 0.12 * (m - (len(found) - 1) / 2)
            colour = GREY if m == 0 else PALETTE[(m - 1) % (len(PALETTE) - 1)]
            bounds = np.maximum(0, [middle - low, high - middle])
            line = "o-" if which == 0 else "o"
            axis.errorbar(x, middle, yerr=bounds, fmt=line, color=colour, capsize=2, label=model)
        axis.set_xticks(range(len(places[which])), places[which])
        axis.set(xlabel=labels[which], ylabel=titles[which])
        axis.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    figure.suptitle(f"{name}: what did training improve? Bars: 95 % intervals over problems")
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def parse(argv: list[str]):
    parser = Parser(
        "experiments/sparkle.py",
        "Accuracy with a part of the solution given, and the first slip, of models on the toy.",
        "python experiments/sparkle.py --models before=toy/model after=runs/NAME/last --name mine",
    )
    add = parser.add_argument
    toy = f"toy={HERE.parent / 'toy' / 'model'}"
    add("--models", nargs="+", default=[toy], metavar="NAME=DIR", help="the first: compared with")
    add("--problems", default="toy:8:200:6", help="toy:VARIABLES:COUNT:SEED")
    add("--count", type=int, default=0, help="only the first COUNT problems; 0: all")
    add("--name", default="toy", help="of the results: results/sparkle/NAME.json, .md, .png")
    add("--samples", type=int, default=8, help="responses for each problem and k")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--max_response", type=int, default=110, help="tokens, the given steps included")
    add("--seed", type=int, default=0, help="of sampling")
    add("--folder", type=Path, default=HERE / "results" / "sparkle", help="of the results")
    add("--report", action="store_true", help="tables and figure of what is there")
    args = parser.parse_args(argv)
    for name, low in (("samples", 1), ("max_response", 1), ("count", 0), ("seed", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {low}")
    if not 0 < args.temperature < 100:
        raise UserError(f"--temperature {args.temperature}: must be above 0 and below 100")
    if not is_toy(args.problems):
        raise UserError(
            f"--problems {args.problems}: only the toy's programs have a solution in known steps;"
            " write toy:VARIABLES:COUNT:SEED, for example toy:8:200:6"
        )
    args.models = named_models(args.models)
    return args


def named_models(given: list[str]) -> dict[str, str]:
    """NAME -> DIR, in order. Raises UserError."""
    models: dict[str, str] = {}
    for word in given:
        pair = re.fullmatch(r"([\w.-]+)=(.+)", word)
        if not pair:
            raise UserError(f"--models {word}: write NAME=DIR, for example before=toy/model")
        if pair[1] in models:
            raise UserError(f"--models {word}: {models[pair[1]]} is called {pair[1]}, too")
        models[pair[1]] = pair[2]
    return models


def settings_of(args) -> dict:
    """The settings, with hashes of weights instead of folders: a folder's model may change."""
    weights = {name: model_hash(folder)[:16] for name, folder in args.models.items()}
    return {key: getattr(args, key) for key in SETTINGS} | {"models": weights}


def read(path: Path) -> dict:
    """The existing results; {} if there are none. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if set(found) != {"settings", "records"} or not found["records"]:
            raise ValueError("not a result of this script")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); give another --name") from error


def main(argv: list[str]) -> None:
    args = parse(argv)
    path, found = args.folder / f"{args.name}.json", {}
    before = read(path)
    if not args.report:
        found = {"settings": settings_of(args)}
        if before and before["settings"] != found["settings"]:
            other = [k for k, v in found["settings"].items() if before["settings"].get(k) != v]
            raise UserError(f"{path}: was made with another --{other[0]}; give another --name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--folder {path.parent}: cannot be written ({reason(error)})"
            ) from error
        found["records"] = {name: run_model(args, name, d) for name, d in args.models.items()}
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    elif not before:
        raise UserError(f"{path}: nothing there yet; the same command without --report")
    found = found or before
    text = report(found["settings"], found["records"], args.folder, args.name)
    (args.folder / f"{args.name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with stop_on_user_error("experiments/sparkle.py"):
        main(sys.argv[1:])
