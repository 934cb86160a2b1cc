"""What it costs that every rank gets every finished group (dist.everyone), at the sizes of the
paper's runs.

    torchrun --nproc_per_node 2 bench/exchange.py            # 64 problems, 6 responses of 8,192
                                                             tokens, 2 x 2 continuations
    torchrun --nproc_per_node 2 bench/exchange.py --problems 8

Worst case: every response and continuation as long as allowed. Prints the bytes that each rank
sends and receives, the seconds of the exchange (median of 3), and the memory that the groups take
on one rank afterwards.
"""

import pickle
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dist  # noqa: E402
from attnrl import Group  # noqa: E402
from data import Problem  # noqa: E402
from errors import Parser, UserError, stop_on_user_error  # noqa: E402
from tree import Continuation, Response  # noqa: E402


def make_group(index: int, tokens: int, rng) -> Group:
    """A problem with 6 responses, each branched at a quarter and at half of its length."""

    def sampled(count):
        return dict(
            tokens=rng.integers(0, 150_000, count).tolist(),
            logprobs=rng.normal(size=count).tolist(),
        )

    responses = [
        Response(
            **sampled(tokens),
            entropies=rng.random(tokens).tolist(),
            bounds=list(range(0, tokens + 1, 32)),
            fci=rng.random(tokens // 32).tolist(),
            continuations=[
                Continuation(at, **sampled(tokens - at)) for at in (tokens // 4, tokens // 2) * 2
            ],
        )
        for _ in range(6)
    ]
    return Group(index, Problem("?", ["1"], "bench", [1] * 200), responses)


def main(argv: list[str]) -> None:
    parser = Parser(
        "bench/exchange.py",
        __doc__ or "",
        "torchrun --nproc_per_node 2 bench/exchange.py --problems 8",
    )
    parser.add_argument("--problems", type=int, default=64, help="in the batch of all ranks")
    parser.add_argument("--tokens", type=int, default=8192, help="of every response")
    args = parser.parse_args(argv)
    if min(args.problems, args.tokens) < 1:
        raise UserError("--problems and --tokens: must be at least 1")
    dist.start("cpu", alone=True)
    mine = dist.mine(
        [make_group(j, args.tokens, np.random.default_rng(j)) for j in range(args.problems)]
    )
    size = len(pickle.dumps(mine))
    seconds = []
    for _ in range(3):
        dist.group.barrier()
        started = time.perf_counter()
        groups = dist.everyone(mine)
        seconds.append(time.perf_counter() - started)
    assert [g.index for g in groups] == list(range(args.problems))
    if dist.rank() == 0:
        sampled = sum(
            len(r.tokens) + sum(len(c.tokens) for c in r.continuations)
            for g in groups
            for r in g.responses
        )
        print(
            f"{args.problems} problems, {sampled / 1e6:.1f} M sampled tokens, {dist.world()} ranks:"
            f" each sends {size / 2**20:.0f} MiB and receives"
            f" {dist.world() * size / 2**20:.0f} MiB; {statistics.median(seconds):.2f} s (median of"
            " 3); peak memory of a rank"
            f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
        )
    dist.stop()


if __name__ == "__main__":
    with stop_on_user_error("bench/exchange.py"):
        main(sys.argv[1:])
