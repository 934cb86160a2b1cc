r"""disruption.py: does hiding a step of high FCI hurt more? The paper's Fig. 3, on any model and
problems.

    python experiments/disruption.py --model DIR --problems FILE --name mine
    python experiments/disruption.py --report --name mine         # tables and figure again

For each problem it takes one right response (the first of G samples). For each step of it, the
response is kept up to the end of the step and the rest is sampled again: T times with the step
hidden (attention to it is zero after the softmax, in all layers and heads, for all new tokens) and
T times without, with the same random numbers. The drop in accuracy measures what the step is worth.

Classes, as in the paper: the top 20 % of a response's steps by FCI, the rest, the top 20 % by mean
entropy. Early steps have a high FCI, and after an early step more can go wrong. So classes are also
compared at equal step index. The first step (FCI 0 by definition) and the answer's step are left
out. Intervals: 95 %, bootstrap over problems.

what_fci_finds.py does the same on the toy; it explains how a step is hidden, and every number of
the report. Left out: wrong responses, which have nothing to lose.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import runtime  # isort: split

import forks
import numpy as np
import what_fci_finds as study
from matplotlib.figure import Figure
from tqdm import tqdm

from runtime.cli import Parser, UserError, stop_on_user_error
from runtime.data import Problem
from runtime.rewards import response_texts
from sampler import is_correct
from tree import Response

FOLDER = Path(__file__).resolve().parent / "results" / "disruption"


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def first_right(group: list[Response]) -> Response | None:
    """The first right response with a step to hide and one after it."""
    return next((r for r in group if is_correct(r.reward) and r.branchable > 2), None)


def requests_of(args, number: int, prompt: list[int], r: Response) -> list[study.CutRequest]:
    """Requests in the order (steps, samples, [without, with]), flat."""
    how = args.continuations, args.max_response, args.temperature, (args.seed, number)
    return study.cut_requests(prompt, r, r.branchable - 2, *how)


def disrupt(pool: forks.Pool, engine, number: int, problem: Problem) -> dict:
    """The record of one problem; only its counts if no right response has a step to hide."""
    [group] = forks.initial_responses(pool, [(number, problem)])
    record = {"number": number, "right": sum(is_correct(r.reward) for r in group)}
    if (r := first_right(group)) is None:
        return record
    requests, start = requests_of(pool.args, number, problem.prompt_ids, r), len(problem.prompt_ids)
    completions = engine.generate(requests)
    whole = [q.prompt_ids[start:] + c.tokens for q, c in zip(requests, completions)]
    texts = response_texts(pool.tokenizer, whole)
    right = [is_correct(x) for x in pool.reward([(text, problem.answers) for text in texts])]
    boxed = ["boxed" in text for text in texts]
    # (right or boxed, steps, without or with)
    hits = np.array([right, boxed]).reshape(2, -1, pool.args.continuations, 2).sum(2)
    inside = slice(1, r.branchable - 1)
    entropy = [float(np.mean(r.entropies[a:b])) for a, b in zip(r.bounds, r.bounds[1:])]
    return record | {
        "problem": problem.text,
        "response": pool.tokenizer.decode(r.tokens, skip_special_tokens=True),
        "fci": [round(x, 5) for x in r.fci[inside]],
        "entropy": [round(x, 5) for x in entropy[inside]],
        "right without, with": hits[0].tolist(),
        "boxed without, with": hits[1].tolist(),
    }


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------
def padded(rows: list[list[float]]) -> np.ndarray:
    """An array (rows, largest number of steps), with NaN after the end of a row."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(found, rows):
        line[: len(row)] = row
    return found


def compare(records: list[dict], samples: int) -> dict:
    """study.by_class of the responses that have a step to hide. Raises UserError."""
    rows = [r for r in records if r.get("fci")]
    if not rows:
        raise UserError("no response is right and has three steps: nothing to hide")
    right, boxed = (
        [padded([[hit[i] / samples for hit in r[what]] for r in rows]) for i in (0, 1)]
        for what in ("right without, with", "boxed without, with")
    )
    fci, entropy = (padded([r[what] for r in rows]) for what in ("fci", "entropy"))
    weights = study.bootstrap_weights([r["number"] for r in rows])
    return study.by_class(weights, *right, boxed[1], fci, entropy)


def report(records: list[dict], settings: dict, folder: Path, name: str) -> None:
    found = compare(records, settings["continuations"])
    used, tried = sum(bool(r.get("fci")) for r in records), len(records)
    print(f"{name}: {used} right responses of {tried} problems; {settings}")
    study.print_disruption(found)
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    study.draw_panels(figure.subplots(1, 3), name, found)
    figure.suptitle(f"{name}: a step is hidden, {used} responses")
    figure.savefig(folder / f"{name}.png", dpi=110)
    text = json.dumps({"settings": settings, "responses": used, "problems": tried} | found)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------
def parse(argv: list[str]):
    parser = Parser(
        "experiments/disruption.py",
        "Hide one step from the rest of a right response: what is it worth?",
        "python experiments/disruption.py --problems toy:8:8:5 --name small",
    )
    return forks.parse_options(parser, argv, "disruption", group=4, continuations=4)


def run(args, path: Path) -> None:
    """Sample the problems that are missing; a killed run is resumed."""
    pool, left = forks.begin(args, path)
    engine = study.DisruptedEngine(pool.model, pool.engine.eos_ids)
    with path.open("a", encoding="utf-8") as file:
        for number, problem in tqdm(left, unit="problem", disable=None):
            file.write(json.dumps(disrupt(pool, engine, number, problem)) + "\n")
            file.flush()


def main(argv: list[str]) -> None:
    args = parse(argv)
    path = args.folder / f"{args.name}.jsonl"
    if not args.report:
        run(args, path)
    settings, records = forks.read_records(path)
    if not records:
        raise UserError(f"{path}: nothing there yet; the same command without --report")
    report(records, settings, args.folder, args.name)


if __name__ == "__main__":
    with stop_on_user_error("experiments/disruption.py"):
        main(sys.argv[1:])
