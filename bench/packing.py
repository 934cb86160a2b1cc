"""bench/packing.py: the gain from computing shared prefixes once: --packing true against --packing
false.

    python bench/packing.py

Both sides of a ratio come from one run and take turns; medians count.

1. Update: the leaves of a real training step of the toy, in the mini-batches of its preset; for
   AttnRL, and for GRPO, whose leaves only share their prompts. Seconds of `Learner.train`, the
   largest difference of the two gradients, tokens that the passes compute, and the peak of memory,
   each in a fresh process.
2. Step: whole training steps of two runs that take turns (learning rate 0, so that lengths and
   accuracy stay the same).
3. Word problems: an update of SmolLM2-135M-Instruct (--model; skipped if it is not there) on
   prompts of about 150 tokens, responses of about 100, 30 leaves per problem: six trees with two
   branch points early in the response, or 30 samples. Tokens are random: only their number matters.
4. Tokens: the same counts for 64 problems in the paper's shape, with one token for 40 of the
   paper's. Rows stay causal if `pack` finds that the denser mask would cost more.
"""

import argparse
import ctypes
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import command, extra_bytes, gain, in_new_process, interleave, positive, record
from pipeline import Side

from learner import Learner
from runtime.cli import stop_on_user_error
from runtime.dist import mini_batches
from runtime.metrics import TrainStats
from runtime.models import load_model
from runtime.packing import alone, pack
from runtime.scoring import Sequence, width
from runtime.setup import longest_row
from tree import TrainingSequence

GOALS = {  # (update, whole step) of the toy, update of the word problems
    "attnrl": (1.7, 1.25, 2.5),
    "grpo": (2.2, 1.35, None),
}
BOTH = {"packing": True, "plain": False}


def pack_for(hidden: int):
    """As a run on a CPU packs."""
    return partial(pack, longest=longest_row("cpu", hidden), hidden=hidden)


def rows_of(sequences: list, packing, size: int) -> list[list]:
    """The rows of all mini-batches."""
    return [
        [part[i] for i in row]
        for part in mini_batches(sequences, size, seed=0)
        for row in packing(part)
    ]


def counts(sequences: list, packing, size: int) -> dict:
    """Tokens that are computed, without and with packing."""
    packed = rows_of(sequences, packing, size)
    tokens = sum(len(s.prompt_ids) + len(s.tokens) for s in sequences)
    once = sum(map(width, packed))
    return {
        "leaves": len(sequences),
        "rows": len(packed),
        "plain, tokens": tokens,
        "packing, tokens": once,
        "times": tokens / once,
    }


def learner_of(model, packing, budget: int) -> tuple[Learner, dict]:
    """A learner that leaves the weights as they are, and where its gradient goes."""
    steady = dict(lr=0.0, weight_decay=0.0, max_grad_norm=1e9, kl_coef=0.0)
    learner, kept = Learner(model, **steady, token_budget=budget, packing=packing), {}

    def keep():
        kept["gradient"] = [p.grad.clone() for p in model.parameters()]

    learner.optimizer.step = keep
    return learner, kept


def time_updates(model, sequences: list, packing, budget: int, size: int, repeats: int):
    """(seconds with packing, seconds without, largest difference of the last gradients)."""
    cases, gradients = {}, []
    for name, on in BOTH.items():
        learner, kept = learner_of(model, packing if on else alone, budget)
        gradients.append(kept)

        def case(learner=learner) -> None:
            learner.train(sequences, size, seed=0)

        cases[name] = case
    ours, plain = interleave(cases, repeats).values()
    a, b = (kept["gradient"] for kept in gradients)
    return ours, plain, max((x - y).abs().max().item() for x, y in zip(a, b))


def update(method: str, repeats: int, problems: int) -> None:
    side = Side(method, lr=0, batch_size=problems)
    run, sequences = side.run, side.step().sequences
    config = run.config
    packing = run.learner.packing
    ours, plain, gap = time_updates(
        run.policy, sequences, packing, config.token_budget, config.mini_batch, repeats
    )
    found = counts(sequences, packing, config.mini_batch)
    peaks = [
        in_new_process(__file__, "--child", method, name, "--problems", problems) for name in BOTH
    ]
    row = {"update of the toy": method, "packing, s": ours, "plain, s": plain}
    row |= {"difference of gradients": gap} | found
    row |= {f"{name}, peak MiB": peak for name, peak in zip(BOTH, peaks)}
    what = f"packing, update of the toy, {method}: without"
    ratios = [gain(what, ours, plain, "s", GOALS[method][0])]
    if all(peaks):
        ratios.append(gain(f"{what}, peak memory", *peaks, "MiB", 1))
    record(f"packing/update/{method}", [row], ratios)


def child(method: str, name: str, problems: int) -> float:
    """Extra MiB at the peak of one update."""
    side = Side(method, lr=0, batch_size=problems, packing=BOTH[name])
    run, config = side.run, side.run.config
    learner, _ = learner_of(run.policy, run.learner.packing, config.token_budget)
    run.learner.train = lambda *_: TrainStats()  # no update before the one that is measured
    sequences = side.step().sequences
    learner.train(sequences[:2], 2, seed=0)  # libraries and gradients are not what is measured
    ctypes.CDLL(None).malloc_trim(0)  # what sampling has left to the allocator would hide the peak
    return extra_bytes(lambda: learner.train(sequences, config.mini_batch, seed=0)) / 2**20


def whole_step(method: str, steps: int, problems: int) -> None:
    sides = {name: Side(method, lr=0, batch_size=problems, packing=on) for name, on in BOTH.items()}
    for i in range(steps):
        for side in list(sides.values())[:: 1 if i % 2 else -1]:
            side.step()
    rows = [
        {"seconds of a step of the toy": f"{method}, {name}"} | side.medians()
        for name, side in sides.items()
    ]
    ours, plain = (row["step"] for row in rows)
    ratio = gain(f"packing, step of the toy, {method}: without", ours, plain, "s", GOALS[method][1])
    record(f"packing/step/{method}", rows, [ratio])


def taught(prompt: list[int], tokens: list[int], rng: random.Random) -> TrainingSequence:
    return TrainingSequence(prompt, tokens, [rng.gauss(0, 1) for _ in tokens], [-3.0] * len(tokens))


def word_problems(method: str, problems: int, rng: random.Random) -> list[TrainingSequence]:
    """Six trees of five leaves, or 30 samples, of each problem."""

    def words(mean: float) -> list[int]:
        return [rng.randrange(10**4) for _ in range(max(4, round(rng.gauss(mean, mean / 5))))]

    found = []
    for _ in range(problems):
        prompt = words(150)
        for _ in range(6):
            response = words(100)
            found.append(taught(prompt, response, rng))
            for at in sorted(rng.sample(range(5, 40), 2)):
                for _ in range(2):
                    kept = response[:at] if method == "attnrl" else words(at)
                    found.append(taught(prompt, kept + words(100 - at), rng))
    return found


def words(folder: str, method: str, repeats: int, problems: int, budget: int) -> None:
    model = load_model(folder, "cuda" if torch.cuda.is_available() else "cpu")[0]
    sequences = word_problems(method, problems, random.Random(0))
    packing = pack_for(model.config.hidden_size)
    timed = time_updates(model, sequences, packing, budget, len(sequences), repeats)
    ours, plain, gap = timed
    row = {"update of SmolLM2-135M": method, "packing, s": ours, "plain, s": plain}
    row |= {"difference of gradients": gap} | counts(sequences, packing, len(sequences))
    what = f"packing, update of SmolLM2-135M, word problems, {method}: without"
    ratio = gain(what, ours, plain, "s", GOALS[method][2])
    record(f"packing/words/{method}", [row], [ratio])


def papers_shape() -> None:
    """64 problems, 6 trees of 5 leaves each, branched at a quarter and at half; no two tokens are
    equal. A token here is 40 of the paper's, and so is the hidden size."""
    new, leaves = iter(range(10**9)), []

    def take(count: int) -> list[int]:
        return [next(new) for _ in range(count)]

    for _ in range(64):
        prompt = take(4)
        for _ in range(6):
            response = take(72)
            leaves.append(Sequence(prompt, response))
            leaves += [
                Sequence(prompt, response[:at] + take(72 - at)) for at in (18, 36) for _ in range(2)
            ]
    rows = []
    for name, hidden, longest in (
        ("as pack chooses on a GPU", 1536 // 40, longest_row("cuda", 1536) // 40),
        ("each prefix once", 10**9, 10**9),
    ):
        packing = partial(pack, longest=longest, hidden=hidden)
        rows.append({"the paper's shape": name} | counts(leaves, packing, 192))
    record("packing/tokens", rows, [])


def main() -> None:
    parser = command(__doc__, "--repeats 5")
    parser.add_argument(
        "--repeats", type=positive, default=7, help="timed rounds of an update; the median counts"
    )
    parser.add_argument(
        "--steps", type=positive, default=8, help="of each run; the first is not counted"
    )
    parser.add_argument("--problems", type=positive, default=24, help="of a step of the toy")
    parser.add_argument("--model", default="/tmp/smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--words", type=positive, default=2, help="word problems of its update")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        print(child(*args.child, args.problems))
        return
    papers_shape()
    for method in GOALS:
        update(method, args.repeats, args.problems)
        whole_step(method, args.steps, args.problems)
    if not (Path(args.model) / "config.json").exists():
        print(f"word problems: skipped, there is no model in {args.model} (--model)")
        return
    for method in GOALS:
        words(args.model, method, args.repeats, args.words, budget=4096)


if __name__ == "__main__":
    with stop_on_user_error("bench/packing.py"):
        main()
