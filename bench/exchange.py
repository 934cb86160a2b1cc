"""bench/exchange.py: the cost of sending every finished group to every rank (dist.everyone), at the
sizes of the paper's runs.

    torchrun --nproc_per_node 2 bench/exchange.py                 # 64 problems
    torchrun --nproc_per_node 2 bench/exchange.py --problems 8

A problem has 6 responses of 8,192 tokens, each with 2 branch points of 2 continuations; every
continuation is as long as the rest of its response, the worst case. Prints the bytes that each rank
sends and receives, the seconds of the exchange (median of 3), and the peak memory of a rank.
"""

import pickle
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import numpy as np

from attnrl import Group
from runtime import dist
from runtime.cli import Parser, UserError, stop_on_user_error
from runtime.data import Problem
from tree import Continuation, Response


def sampled(count: int, rng) -> dict[str, list]:
    tokens, logprobs = rng.integers(0, 150_000, count), rng.normal(size=count)
    return {"tokens": tokens.tolist(), "logprobs": logprobs.tolist()}


def make_response(tokens: int, rng) -> Response:
    """Branched at a quarter and at half of its length."""
    points = [tokens // 4, tokens // 2]
    return Response(
        **sampled(tokens, rng),
        entropies=rng.random(tokens).tolist(),
        bounds=list(range(0, tokens + 1, 32)),
        fci=rng.random(tokens // 32).tolist(),
        branch_points=points,
        continuations=[Continuation(at, **sampled(tokens - at, rng)) for at in points * 2],
    )


def make_group(index: int, tokens: int) -> Group:
    """A problem with 6 responses."""
    rng, problem = np.random.default_rng(index), Problem("?", ["1"], "bench", [1] * 200)
    return Group(index, index, problem, [make_response(tokens, rng) for _ in range(6)])


def main(argv: list[str]) -> None:
    example = "torchrun --nproc_per_node 2 bench/exchange.py --problems 8"
    parser = Parser("bench/exchange.py", __doc__ or "", example)
    parser.add_argument("--problems", type=int, default=64, help="in the batch of all ranks")
    parser.add_argument("--tokens", type=int, default=8192, help="of every response")
    args = parser.parse_args(argv)
    if min(args.problems, args.tokens) < 1:
        raise UserError("--problems and --tokens: must be at least 1")
    dist.start("cpu", alone=True)
    mine = [make_group(j, args.tokens) for j in dist.mine(list(range(args.problems)))]
    sent, seconds = len(pickle.dumps(mine)) / 2**20, []
    for _ in range(3):
        dist.group.barrier()
        started = time.perf_counter()
        groups = dist.everyone(mine)
        seconds.append(time.perf_counter() - started)
    assert [g.index for g in groups] == list(range(args.problems))
    if dist.rank() == 0:
        responses = [r for g in groups for r in g.responses]
        ends = responses + [c for r in responses for c in r.continuations]
        millions = sum(len(end.tokens) for end in ends) / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{args.problems} problems, {millions:.1f} M sampled tokens, {dist.world()} ranks:"
            f" each sends {sent:.0f} MiB and receives {dist.world() * sent:.0f} MiB;"
            f" {statistics.median(seconds):.2f} s (median of 3); peak memory of a rank"
            f" {peak:.1f} GiB"
        )
    dist.stop()


if __name__ == "__main__":
    with stop_on_user_error("bench/exchange.py"):
        main(sys.argv[1:])
