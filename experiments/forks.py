r"""forks.py: where should a response be forked? Every rule, at equal tokens, without training.

    python experiments/forks.py                                     # the toy: about 15 minutes
    python experiments/forks.py --model DIR --problems FILE --name mine
    python experiments/forks.py --report --name mine                # tables and figure again

All rules have the same initial responses. At EVERY step of them, T continuations are sampled once.
Each rule of tree.BRANCH_RULES that chooses steps reads this pool, and pays for the tokens that it
would have sampled. Only token entropy, which forks inside steps, has separate samples.

Equal tokens: on each problem all rules have the same budget, the tokens that the cheapest rule
needs to fork all responses at N points. A rule buys whole forks, response by response, in the same
order for all rules. If it can pay only a share of the next fork, measures are interpolated by that
share between the forest without this fork and with it. So rules that fork early, and have long
continuations, get fewer forks.

Measures of a problem under a rule (leaves: initial responses and the continuations it bought):

    solved      is there a right leaf?
    rescued     the same, for problems without a right initial response
    disagree    share of forked responses whose leaves (its end, its continuations) disagree
    variance    of V between the children of a fork, mean over forks: what the fork distinguishes
    per 1,000   summed variance per 1,000 sampled tokens: what a token of exploration buys
    forks       number of forks bought
    kept        share of a continuation's tokens that come from its response

Differences from `fci` are paired by problem; intervals are 95 %, bootstrap over problems
(runtime/results.py). Left out: training with them (experiments/methods.py).
"""

import json
import random
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean, pvariance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from fci import separator_tokens, split_steps, without_answer
from runtime.checkpoint import model_hash
from runtime.cli import Parser, UserError, reason, stop_on_user_error
from runtime.data import PROMPT_SUFFIX, Problem, is_toy, load_problems, usable_suffix
from runtime.models import check_context, load_model
from runtime.results import bootstrap
from runtime.rewards import Reward, response_texts
from runtime.rollout import Request, TransformersEngine, request_seed
from runtime.scoring import Sequence, score
from sampler import is_correct
from tools.view import BLUE, GREY
from tree import BRANCH_RULES, Response, choose_branch_points

HERE = Path(__file__).resolve().parent
OWN_SAMPLES = ("entropy",)  # rules that fork inside steps
MEASURES = ("solved", "rescued", "disagree", "variance", "per 1,000", "forks", "kept")
CHUNK = 8  # problems that are sampled, graded and written together


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
@dataclass
class Pool:
    """Samples and grades."""

    model: object
    tokenizer: object
    engine: TransformersEngine
    reward: Reward
    args: object

    def sample(self, asked: list[tuple[Problem, list[int], int]]) -> list[tuple[list[int], float]]:
        """(continuation, reward of prefix and continuation) of each (problem, prefix, seed)."""
        limit, heat = self.args.max_response, self.args.temperature
        requests = [
            Request(p.prompt_ids + prefix, max(1, limit - len(prefix)), heat, seed)
            for p, prefix, seed in asked
        ]
        tokens = [c.tokens for c in self.engine.generate(requests)]
        whole = [prefix + new for (_, prefix, _), new in zip(asked, tokens)]
        texts = response_texts(self.tokenizer, whole)
        rewards = self.reward([(text, p.answers) for text, (p, _, _) in zip(texts, asked)])
        return list(zip(tokens, rewards))


def initial_responses(pool: Pool, problems: list[tuple[int, Problem]]) -> list[list[Response]]:
    """G scored responses of each (number, problem)."""
    args, separators = pool.args, separator_tokens(pool.tokenizer)
    asked = [(p, [], request_seed(args.seed, n, i)) for n, p in problems for i in range(args.group)]
    sampled = pool.sample(asked)
    bounds = [split_steps(tokens, separators) for tokens, _ in sampled]
    rows = [Sequence(p.prompt_ids, t, b) for (p, _, _), (t, _), b in zip(asked, sampled, bounds)]
    responses = []
    for (tokens, reward), own, b in zip(
        sampled, score(pool.model, rows, args.temperature, args.delta), bounds
    ):
        r = Response(tokens, own.logprobs, reward, entropies=own.entropies, bounds=b)
        r.fci, r.branchable = without_answer(own.fci, tokens, b, separators)
        responses.append(r)
    G = args.group
    return [responses[a : a + G] for a in range(0, len(responses), G)]


def chosen_points(args, number: int, responses: list[Response]) -> dict[str, list[list[int]]]:
    """rule -> the token positions at which it would fork each response."""
    points = {}
    for rule in BRANCH_RULES:
        rng = random.Random(request_seed(args.seed, number))
        points[rule] = [
            choose_branch_points(r, rule, args.points, rng, args.rho, 0, args.delta)
            for r in responses
        ]
    return points


def sample_forks(pool: Pool, problems: list[tuple[int, Problem]]) -> list[dict]:
    """One record per problem: its responses, what each rule chose, and the pool: for each
    (response, position), the lengths and rewards of T continuations."""
    args, groups = pool.args, initial_responses(pool, problems)
    points = [chosen_points(args, n, group) for (n, _), group in zip(problems, groups)]
    places, asked = [], []
    for g, ((number, problem), group) in enumerate(zip(problems, groups)):
        for i, r in enumerate(group):
            inside = [at for rule in OWN_SAMPLES for at in points[g][rule][i]]
            for at in sorted({*r.bounds[1 : r.branchable], *inside}):
                for t in range(args.continuations):
                    places.append((g, f"{i},{at}"))
                    seed = request_seed(args.seed, number, i, at, t)
                    asked.append((problem, r.tokens[:at], seed))
    continued: list[dict[str, list]] = [{} for _ in problems]
    for (g, place), (tokens, reward) in zip(places, pool.sample(asked) if asked else []):
        continued[g].setdefault(place, []).append([len(tokens), reward])
    return [
        {
            "number": number,
            "problem": problem.text,
            "responses": [[len(r.tokens), r.reward, len(r.bounds) - 1] for r in group],
            "points": points[g],
            "pool": continued[g],
        }
        for g, ((number, problem), group) in enumerate(zip(problems, groups))
    ]


# --------------------------------------------------------------------------------------------------
# What a rule gets for its tokens
# --------------------------------------------------------------------------------------------------
Fork = tuple[int, int, list]  # response, position, [[tokens, reward], ...]


def forks_of(record: dict, rule: str) -> list[Fork]:
    """All forks that a rule would buy, in the order of buying."""
    order = list(range(len(record["responses"])))
    random.Random(record["number"]).shuffle(order)
    return [(i, at, record["pool"][f"{i},{at}"]) for i in order for at in record["points"][rule][i]]


def cost(forks: list[Fork]) -> int:
    """The sampled tokens of these forks."""
    return sum(tokens for _, _, ends in forks for tokens, _ in ends)


def measures(record: dict, forks: list[Fork]) -> dict[str, float]:
    """The measures of the forest with these forks; NaN: not defined."""
    initial = [is_correct(reward) for _, reward, _ in record["responses"]]
    right = any(initial) or any(is_correct(r) for _, _, ends in forks for _, r in ends)
    disagree, variances = [], []
    for i in sorted({i for i, _, _ in forks}):
        own = sorted((at, [r for _, r in ends]) for j, at, ends in forks if j == i)
        below = [record["responses"][i][1]]  # leaves under the chain, from its end up
        for _, rewards in reversed(own):
            chain = Fraction(sum(map(Fraction, below))) / len(below)
            variances.append(float(pvariance([chain, *map(Fraction, rewards)])))
            below += rewards
        disagree.append(len({is_correct(r) for r in below}) > 1)
    kept = [at / (at + tokens) for _, at, ends in forks for tokens, _ in ends]
    nothing = float("nan")
    return {
        "solved": float(right),
        "rescued": nothing if any(initial) else float(right),
        "disagree": fmean(disagree) if disagree else nothing,
        "variance": fmean(variances) if variances else nothing,
        "per 1,000": sum(variances),  # divided by the tokens at the end
        "forks": float(len(forks)),
        "kept": fmean(kept) if kept else nothing,
    }


def at_budget(record: dict, rule: str, budget: int) -> dict[str, float]:
    """The measures of a rule that may sample `budget` tokens: whole forks as long as it can pay
    them, then a share of the next one."""
    forks = forks_of(record, rule)
    whole: list[Fork] = []
    while len(whole) < len(forks) and cost(forks[: len(whole) + 1]) <= budget:
        whole = forks[: len(whole) + 1]
    found = measures(record, whole)
    if len(whole) < len(forks):
        more = measures(record, forks[: len(whole) + 1])
        share = (budget - cost(whole)) / cost(forks[len(whole) : len(whole) + 1])
        for name, value in found.items():
            if np.isnan(value):  # the budget pays no whole fork
                found[name] = more[name]
            else:
                found[name] = value + share * (more[name] - value)
    found["per 1,000"] *= 1000 / max(1, budget)
    return found


def compare(records: list[dict], rules: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(problems, rules, measures) at equal tokens, and the solve rate of each problem's initial
    responses. Problems without anything to fork are left out."""
    values, rates = [], []
    for record in records:
        budget = min(cost(forks_of(record, rule)) for rule in rules)
        if budget:
            found = [at_budget(record, rule, budget) for rule in rules]
            values.append([[one[name] for name in MEASURES] for one in found])
            rates.append(fmean(is_correct(r) for _, r, _ in record["responses"]))
    if not values:
        raise UserError("no response has two steps: there is nothing to fork")
    return np.array(values), np.array(rates)


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
def interval(values: np.ndarray) -> tuple[float, float, float] | None:
    """(mean over problems, low, high); problems without a value do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    means = bootstrap(values[:, None])[:, 0]
    return float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def shown(found: tuple[float, float, float] | None, name: str, sign: str = "") -> str:
    scale = 1 if name == "forks" else 100
    if found is None:
        return "-"
    middle, low, high = (f"{scale * x:{sign}.1f}" for x in found)
    return f"{middle} [{low}, {high}]"


def table(values: np.ndarray, rules: list[str], name: str) -> str:
    """Every rule's measures, and their differences from fci, paired by problem."""
    head = ["rule", *MEASURES]
    lines = [f"**{name}**: {len(values)} problems", "", f"| {' | '.join(head)} |"]
    lines.append("|---" * len(head) + "|")
    for r, rule in enumerate(rules):
        cells = [shown(interval(values[:, r, m]), what) for m, what in enumerate(MEASURES)]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    base = rules.index("fci")
    for r, rule in enumerate(rules):
        if r != base:
            gaps = values[:, r] - values[:, base]
            cells = [shown(interval(gaps[:, m]), what, "+") for m, what in enumerate(MEASURES)]
            lines.append(f"| {rule} - fci | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(records: list[dict], settings: dict, folder: Path, name: str) -> str:
    """All problems, then by difficulty; in %, forks as numbers."""
    # results may be older than a rule
    rules = [rule for rule in BRANCH_RULES if all(rule in one["points"] for one in records)]
    values, rates = compare(records, rules)
    about = ", ".join(f"{key} {value}" for key, value in settings.items())
    parts = [f"{name}: {about}", table(values, rules, "all problems")]
    kinds = {
        "no initial response is right": rates == 0,
        "some are": (rates > 0) & (rates < 1),
        "all are": rates == 1,
    }
    parts += [table(values[mask], rules, kind) for kind, mask in kinds.items() if mask.any()]
    draw(folder / f"{name}.png", values, rules, name)
    return "\n\n".join(parts)


def draw(path: Path, values: np.ndarray, rules: list[str], name: str) -> None:
    """The rules beside each other, with intervals."""
    drawn = ("solved", "disagree", "variance", "per 1,000")
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, what in zip(figure.subplots(1, len(drawn)), drawn):
        m = MEASURES.index(what)
        for r in range(len(rules)):
            if found := interval(values[:, r, m]):
                middle, low, high = (100 * x for x in found)
                colour = BLUE if rules[r] == "fci" else GREY
                bounds = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
                axis.errorbar(middle, r, xerr=bounds, fmt="o", color=colour, capsize=3)
        axis.set_yticks(range(len(rules)), rules)
        axis.invert_yaxis()
        axis.set(title=f"{what}, %" if what != "per 1,000" else "variance per 1,000 tokens, %")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{name}: forking rules at equal sampled tokens, {len(values)} problems")
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def parse(argv: list[str]):
    parser = Parser(
        "experiments/forks.py",
        "Forking rules at equal tokens, on any model and problems, without training.",
        "python experiments/forks.py --problems toy:8:20:5 --name small",
    )
    parser.add_argument("--points", type=int, default=2, help="N: forks a response")
    parser.add_argument("--rho", type=float, default=0.2, help="of FCI's quantile")
    args = parse_options(parser, argv, "forks", group=6, continuations=2)
    if args.points < 1 or not 0 <= args.rho <= 1:
        raise UserError("--points or --rho: not in its range")
    return args


def parse_options(parser: Parser, argv: list[str], results: str, group: int, continuations: int):
    """Options that disruption.py has, too."""
    add = parser.add_argument
    add("--model", default=str(HERE.parent / "toy" / "model"), help="model directory")
    add("--problems", default="toy:8:500:5", help="problem file, or toy:8:500:5")
    add("--count", type=int, default=0, help="only the first COUNT problems; 0: all")
    add("--name", default="toy", help=f"of the results: results/{results}/NAME.jsonl, .png, tables")
    add("--group", type=int, default=group, help="G: initial responses a problem")
    add("--continuations", type=int, default=continuations, help="T: at each place")
    add("--delta", type=int, default=1, help="of FCI")
    add("--temperature", type=float, default=1.0, help="of sampling")
    add("--max_response", type=int, default=110, help="tokens")
    add("--max_prompt", type=int, default=1024, help="tokens; longer problems are left out")
    add("--prompt_suffix", default=PROMPT_SUFFIX, help="added to problems of a file")
    add("--reward", default="boxed", help="as in attnrl.py")
    add("--seed", type=int, default=0, help="of sampling")
    add("--folder", type=Path, default=HERE / "results" / results, help="of the results")
    add("--report", action="store_true", help="only tables and figure of the existing results")
    args = parser.parse_args(argv)
    for name in ("group", "continuations", "delta", "max_response", "max_prompt"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 0 < args.temperature < 100 or args.count < 0 or args.seed < 0:
        raise UserError("--temperature, --count or --seed: not in its range")
    return args


def settings_of(args) -> dict:
    names = "model problems group points continuations delta rho temperature max_response"
    names += " prompt_suffix reward seed"
    values = {name: getattr(args, name) for name in names.split() if name in args}
    for name in ("model", "problems"):  # the name, not the path
        if not is_toy(str(values[name])):
            values[name] = Path(values[name]).name
    return values | {"weights": model_hash(args.model)[:16]}


def read_records(path: Path) -> tuple[dict, list[dict]]:
    """(settings, records) of a results file; drops an incomplete last line. Raises UserError."""
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        if not lines:  # killed while it wrote the first one
            return {}, []
        head, *records = map(json.loads, lines)
        return head["settings"], records
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); give another --name") from error


def start(args, path: Path) -> list[dict]:
    """The existing records of this experiment. Raises UserError if it had other settings."""
    settings, records = read_records(path)
    asked = settings_of(args)
    if settings and settings != asked:
        other = next(k for k, v in asked.items() if settings.get(k) != v)
        option = "model (its weights differ)" if other == "weights" else other
        raise UserError(f"{path}: was made with another --{option}; give another --name")
    lines = [{"settings": asked}, *records]
    fresh = path.with_suffix(".new")  # a full disk loses nothing of the old one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({reason(error)})") from error
    return records


def begin(args, path: Path) -> tuple[Pool, list[tuple[int, Problem]]]:
    """The pool, and the (number, problem) pairs that are left."""
    model, tokenizer, eos_ids = load_model(args.model, "cpu")
    if not is_toy(args.problems):
        args.prompt_suffix = usable_suffix(tokenizer, args.prompt_suffix)
    how = dict(max_prompt=args.max_prompt, suffix=args.prompt_suffix, drop=True)
    problems = load_problems(args.problems, tokenizer, **how)[: args.count or None]
    check_context(model, problems, args.max_response)
    records = start(args, path)
    for record in records:  # another file of this name, or another --max_prompt: other numbers
        number, text = record["number"], record.get("problem")
        if text and number < len(problems) and text != problems[number].text:
            raise UserError(f"{path}: was made with other --problems; give another --name")
    done = {record["number"] for record in records}
    left = [(n, p) for n, p in enumerate(problems) if n not in done]
    engine = TransformersEngine(model, eos_ids)
    return Pool(model, tokenizer, engine, Reward(args.reward), args), left


def run(args, path: Path) -> None:
    """Sample the problems that are missing; a killed run is resumed."""
    pool, left = begin(args, path)
    bar = tqdm(total=len(left), unit="problem", disable=None)
    with bar, path.open("a", encoding="utf-8") as file:
        for a in range(0, len(left), CHUNK):
            fresh = sample_forks(pool, left[a : a + CHUNK])
            file.write("".join(json.dumps(record) + "\n" for record in fresh))
            file.flush()
            bar.update(len(fresh))


def main(argv: list[str]) -> None:
    args = parse(argv)
    path = args.folder / f"{args.name}.jsonl"
    if not args.report:
        run(args, path)
    settings, records = read_records(path)
    if not records:
        raise UserError(f"{path}: nothing there yet; the same command without --report")
    text = report(records, settings, args.folder, args.name)
    (args.folder / f"{args.name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with stop_on_user_error("experiments/forks.py"):
        main(sys.argv[1:])
