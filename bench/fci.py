"""bench/fci.py: the cost of FCI, compared with a plain forward pass and with other ways to read
attention.

    plain   forward pass with SDPA: the lower bound, the cost of a scoring pass without FCI
    fci     the same pass with StepAttention (fci.py): alpha @ E instead of alpha
    rows    the same, but alpha (AttnRL Eq. 4) of 32 queries at a time is computed and averaged, by
            matrix products
    layer   the same with all queries at once: heads x T x T exist for one layer
    naive   eager attention with output_attentions=True, then Eq. 4-6 on the stored matrices of all
            layers

Two decoder layers of Qwen2-1.5B's shape (hidden 1536, 12 heads, 2 key-value heads, head dimension
128, MLP 8960), random weights, batch 1, no output head. Seconds are medians of repeats that take
turns in one process. A fresh process measures every peak of extra memory: the peak during one pass,
minus the memory before it (including the model). Left out: the output head, which is the same for
all; on a long batch with a vocabulary of 150k it hides FCI's share.

The cost of `rows` does not grow with the number of steps. fci.py does not use it, because it is not
faster, would have to read the masks of sliding windows itself, and on a GPU would write every
attention weight to memory, which the fused kernel never does.

    python bench/fci.py                    # on the CPU, or on the GPU (in bf16) if there is one
    python bench/fci.py --lengths 512 4096 --repeats 5
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runtime  # isort: split

import torch
from measure import command, cost, extra_bytes, gain, in_new_process, interleave, positive, record
from transformers import Qwen2Config, Qwen2Model

from fci import StepAttention, scoring_mode
from runtime.cli import stop_on_user_error

CASES = ("plain", "fci", "rows", "layer", "naive")
DELTA = 4


def build_model(device: str):
    """Two layers; few words in the vocabulary, for the embedding is not what is measured."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Qwen2Model(config).to(device, dtype).eval()


@torch.no_grad()
def naive_fci(attentions, bounds: list[int]) -> torch.Tensor:
    """AttnRL Eq. 5-6 from stored attention (Eq. 4), averaged by matrix products: E^T alpha E per
    head. (K,)"""
    # (T, K); token 0 is the prompt
    step = torch.zeros(bounds[-1] + 1, len(bounds) - 1, device=attentions[0].device)
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        step[1 + a : 1 + b, k] = 1 / (b - a)
    index = torch.arange(step.shape[1], device=step.device)
    later = (index[:, None] >= index[None] + DELTA).float()
    means = (step.T @ alpha[0].float() @ step for alpha in attentions)  # (H, J, K) of a layer
    return torch.stack([(mean * later).sum(1).amax(0) for mean in means]).amax(0)


class Materialised(StepAttention):
    """Reads alpha itself, of a few queries at a time. For models without sliding windows."""

    def __init__(self, *args, queries: int):
        super().__init__(*args)
        self.queries = queries

    def add(self, module, query, key, attention_mask, **_):
        self.layers += 1
        batch, heads, width, depth = query.shape
        # heads of one key-value head together
        grouped = (query * depth**-0.5).view(batch, key.shape[1], -1, width, depth)
        step_attention = torch.zeros(batch, heads, *self.later.shape, device=key.device)
        for a in range(0, width, self.queries):
            # nobody looks ahead: keys end with the last query of the block
            b = min(width, a + self.queries)
            logits = grouped[..., a:b, :].flatten(2, 3) @ key[:, :, :b].transpose(-1, -2)
            logits = logits.view(batch, heads, b - a, b).float()
            future = torch.ones(b - a, b - a, dtype=torch.bool, device=key.device).triu(1)
            logits[..., a:].masked_fill_(future, -torch.inf)
            alpha = logits.softmax(-1)  # (B, H, queries, b)
            queries_of = self.query_mean[:, None, :, a:b]
            # the few steps that these queries are in
            found = queries_of.sum((0, 1, 3)).nonzero()[:, 0].tolist() or [0]
            j = slice(found[0], found[-1] + 1)
            step_attention[:, :, j] += (
                queries_of[:, :, j] @ alpha @ (self.keys[:, :b] * self.key_mean[:, None])[:, None]
            )
        self.fci = torch.maximum(self.fci, (step_attention * self.later).sum(2).amax(1))


def run_case(model, case: str, length: int, steps: int) -> torch.Tensor | None:
    """One pass over one prompt token and `length` - 1 response tokens in `steps` equal steps; FCI
    (K,) or None."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 512, (1, length), generator=generator).to(model.device)
    bounds = [(length - 1) * k // steps for k in range(steps + 1)]
    if case in ("plain", "naive"):
        model.set_attn_implementation("eager" if case == "naive" else "sdpa")
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=False, output_attentions=case == "naive")
        return naive_fci(output.attentions, bounds) if case == "naive" else None
    given = [1], [bounds], length, DELTA, model.device
    if case == "fci":
        collector = StepAttention(*given)
    else:
        collector = Materialised(*given, queries={"rows": 32, "layer": length}[case])
    with scoring_mode(model, collector):
        model(input_ids=ids, use_cache=False)
    return collector.fci[0]


def memory(case: str, length: int, steps: int, threads: int) -> float | None:
    """Extra bytes of one pass, in a fresh process; None: out of memory."""
    size = ["--lengths", length, "--steps", steps, "--threads", threads]
    return in_new_process(__file__, "--child", case, *size)


def compare(model, cases, length: int, steps: int, args) -> dict:
    """A row of a table: seconds and extra MiB of every case, and the largest difference between the
    FCIs."""
    scores: dict[str, torch.Tensor | None] = {}

    def run(case: str) -> None:
        scores[case] = run_case(model, case, length, steps)

    seconds = interleave({case: partial(run, case) for case in cases}, args.repeats)
    mib = {case: memory(case, length, steps, args.threads) for case in cases}
    found = [score for score in scores.values() if score is not None]
    row = {"T": length, "steps": steps} | {f"{case}, s": seconds[case] for case in cases}
    row |= {f"{case}, MiB": mib[case] and mib[case] / 2**20 for case in cases}
    return row | {"largest difference": max((s - scores["fci"]).abs().max().item() for s in found)}


def length_ratios(row: dict) -> list[dict]:
    """FCI against a plain pass and against naive attention, in time and (where neither ran out of
    it) memory."""
    at = f"FCI, T = {row['T']}, {row['steps']} steps"
    stated = (row["T"], row["steps"]) == (8192, 200)  # the size that the goals are for
    time, most = (row["fci, s"], row["plain, s"], "s"), 1.5 if stated else None
    ratios = [cost(f"{at}: plain pass, time", *time, most)]
    if row["plain, MiB"] and row["fci, MiB"]:
        mib, most = (row["fci, MiB"], row["plain, MiB"], "MiB"), 1.2 if stated else None
        ratios.append(cost(f"{at}: plain pass, memory", *mib, most))
    time, least = (row["fci, s"], row["naive, s"], "s"), 5 if row["T"] == 4096 else None
    ratios.append(gain(f"{at}: naive, time", *time, least))
    if row["naive, MiB"] and row["fci, MiB"]:
        ratios.append(gain(f"{at}: naive, memory", row["fci, MiB"], row["naive, MiB"], "MiB"))
    return ratios


def parse():
    parser = command(__doc__, "--lengths 512 4096 --repeats 5")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        default=[200, 16, 64, 400],
        help=(
            "steps of the response; all ways are compared with the first number, and plain, fci and"
            " rows with the others, at the greatest length but one"
        ),
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="timed rounds; the median counts"
    )
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.steps) < DELTA + 2 or min(args.lengths) <= max(args.steps):
        parser.error(f"--steps must be at least {DELTA + 2}, and --lengths above --steps")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model = build_model("cuda" if torch.cuda.is_available() else "cpu")
    if args.child:
        run_case(model, args.child, 64, 8)  # libraries and thread pools are not what is measured
        print(extra_bytes(lambda: run_case(model, args.child, args.lengths[0], args.steps[0])))
        return
    rows = [compare(model, CASES, length, args.steps[0], args) for length in args.lengths]
    record("fci/lengths", rows, [ratio for row in rows for ratio in length_ratios(row)])
    length = args.lengths[-2:][0]
    rows = [compare(model, CASES[:3], length, steps, args) for steps in args.steps[1:]]
    ratios = [
        cost(
            f"FCI, T = {length}, {row['steps']} steps: plain pass, time",
            row["fci, s"],
            row["plain, s"],
            "s",
        )
        for row in rows
    ]
    record("fci/steps", rows, ratios)


if __name__ == "__main__":
    with stop_on_user_error("bench/fci.py"):
        main()
