"""bench/fci.py: what FCI costs, next to a plain forward pass and to the naive way of reading attention.

    plain   forward pass with SDPA: what a scoring pass costs without FCI
    fci     the same pass with StepAttention (fci.py): alpha @ E instead of alpha
    naive   eager attention with output_attentions=True, then AttnRL Eq. 4-6 on the stored H x T x T matrices

Two decoder layers of Qwen2-1.5B's shape (hidden 1536, 12 heads, 2 key-value heads, head dimension 128, MLP 8960),
random weights, batch 1, no output head. Seconds are medians of interleaved repeats in one process. Peak extra memory is
measured in a fresh process for every number: the peak during one pass, less what was there before it (model included).
Left out: the output head, which is the same for all three; on a long batch over 150k words it hides FCI's share.

    python bench/fci.py                                   # CPU, or the GPU if there is one (bf16 there)
    python bench/fci.py --lengths 512 4096 --repeats 5 --json bench.json
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2Model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fci import StepAttention, scoring_mode  # noqa: E402

CASES = ("plain", "fci", "naive")
DELTA = 4


def build_model(device: str):
    """Two layers; few words in the vocabulary, for the embedding is not what is measured."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=512, hidden_size=1536, intermediate_size=8960, num_hidden_layers=2,
                         num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768,
                         bos_token_id=None, eos_token_id=None)
    return Qwen2Model(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


@torch.no_grad()
def naive_fci(attentions, bounds: list[int]) -> torch.Tensor:
    """AttnRL Eq. 4-6 from stored attention, as matrix products: E^T alpha E per head. (K,)"""
    step = torch.zeros(bounds[-1] + 1, len(bounds) - 1, device=attentions[0].device)  # (T, K); token 0 is the prompt
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        step[1 + a:1 + b, k] = 1 / (b - a)
    index = torch.arange(step.shape[1], device=step.device)
    later = (index[:, None] >= index[None] + DELTA).float()
    return torch.stack([((step.T @ alpha[0].float() @ step) * later).sum(1).amax(0) for alpha in attentions]).amax(0)


def run_case(model, case: str, length: int, steps: int) -> torch.Tensor | None:
    """One pass over one prompt token and `length` - 1 response tokens in `steps` equal steps; FCI (K,) or None."""
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length)).to(model.device)
    bounds = [(length - 1) * k // steps for k in range(steps + 1)]
    if case == "fci":
        collector = StepAttention([1], [bounds], length, DELTA, model.device)
        with scoring_mode(model, collector):
            model(input_ids=ids, use_cache=False)
        return collector.fci[0]
    model.set_attn_implementation("eager" if case == "naive" else "sdpa")
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False, output_attentions=case == "naive")
    return naive_fci(output.attentions, bounds) if case == "naive" else None


# ---------------------------------------------------------------------------------------------------------------------
# Memory: one fresh process for each number
# ---------------------------------------------------------------------------------------------------------------------
def status_bytes(key: str) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def peak_resident(run) -> tuple[int, int]:
    """(before, peak) resident bytes around run(). A thread looks every 2 ms; the kernel's own peak is taken where it
    can be reset first (and is not that of building the model)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    except OSError:
        pass
    before = status_bytes("VmRSS")
    if before is None:  # not Linux: the peak of the whole process, so building the model must not have been larger
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        run()
        return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    kernel_tells = (status_bytes("VmHWM") or 1 << 62) <= before + (1 << 20)
    peak, done = before, threading.Event()

    def look():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, status_bytes("VmRSS"))

    watcher = threading.Thread(target=look)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return before, max(peak, status_bytes("VmHWM") if kernel_tells else 0)


def child(device: str, case: str, length: int, steps: int) -> int:
    """Extra bytes of one pass. A tiny pass comes first: libraries and thread pools are not what is measured."""
    model = build_model(device)
    run_case(model, case, 64, 8)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_case(model, case, length, steps)
        return torch.cuda.max_memory_allocated() - before
    before, peak = peak_resident(lambda: run_case(model, case, length, steps))
    return peak - before


def measure_memory(args, case: str, length: int) -> int | None:
    """`child` in a new process; None if it died (out of memory)."""
    command = [sys.executable, __file__, "--child", case, "--lengths", str(length), "--steps", str(args.steps),
               "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------
def measure_times(model, device: str, args, length: int) -> tuple[dict[str, float | None], float | None]:
    """(median seconds a case, largest difference between the two FCIs). Interleaved: other load hits all alike."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    scores = {}
    for repeat in range(args.repeats + 1):  # the first round warms up and is not counted
        for case in CASES:
            if seconds[case] is None:
                continue
            try:
                started = time.perf_counter()
                scores[case] = run_case(model, case, length, args.steps)
                if device == "cuda":
                    torch.cuda.synchronize()
            except torch.cuda.OutOfMemoryError:
                seconds[case] = None
                continue
            if repeat:
                seconds[case].append(time.perf_counter() - started)
    difference = (scores["fci"] - scores["naive"]).abs().max().item() if "naive" in scores else None
    return {case: statistics.median(times) if times else None for case, times in seconds.items()}, difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--steps", type=int, default=64, help="steps of the response")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1 or args.steps < DELTA + 2 or min(args.lengths) <= args.steps:
        parser.error(f"--repeats must be at least 1, --steps at least {DELTA + 2} and --lengths above --steps")
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.child:
        print(child(device, args.child, args.lengths[0], args.steps))
        return
    name = torch.cuda.get_device_name() + ", bf16" if device == "cuda" else f"CPU, {args.threads} threads, fp32"
    print(f"{name}; torch {torch.__version__}; 2 layers of Qwen2-1.5B, {args.steps} steps, median of {args.repeats}\n")
    print(f"{'':>6} | {'seconds':^23} | {'times plain':^15} | {'peak extra MiB':^23} | {'times plain':^15} | largest")
    print(f"{'T':>6} | " + f"{'plain':>7} {'fci':>7} {'naive':>7} | {'fci':>7} {'naive':>7} | " * 2 + "difference")
    rows = []
    model = build_model(device)
    for length in args.lengths:
        seconds, difference = measure_times(model, device, args, length)
        memory = {case: measure_memory(args, case, length) for case in CASES}
        line = f"{length:>6} | "
        for numbers, unit, form in ((seconds, 1, "7.3f"), (memory, 2 ** 20, "7.0f")):
            ratio = {case: numbers[case] / numbers["plain"] if numbers[case] else None for case in CASES}
            line += " ".join(format(numbers[c] / unit, form) if numbers[c] else "   none" for c in CASES) + " | "
            line += " ".join(format(ratio[c], form[0] + ".2f") if ratio[c] else "none" for c in CASES[1:]) + " | "
        print(line + (f"{difference:.1e}" if difference is not None else "none"), flush=True)
        rows.append({"length": length, "seconds": seconds, "extra_bytes": memory, "largest_difference": difference})
    if args.json:
        Path(args.json).write_text(json.dumps({"device": name, "torch": torch.__version__, "steps": args.steps,
                                               "repeats": args.repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
