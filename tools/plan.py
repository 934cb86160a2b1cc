"""plan.py: what a run will do and how much memory it needs, before it starts: `attnrl.py
--dry_run`, and the table of docs/memory.md.

Runs on any CPU in seconds: the model is built from its config on the "meta" device (shapes without
numbers), so parameters are counted, not guessed. The rest is arithmetic on shapes; the tests
compare it with what PyTorch allocates on the CPU.

The memory of one GPU, in bytes (P parameters; b = 2 for bf16, 4 for fp32). FSDP2 divides all that
is 4 P or 8 P here by the number of ranks:
    always     4 P weights, 8 P Adam's moments, 4 P reference (with a KL term, or PRL)
    sampling   the engine: vLLM's share, or a KV cache (and, next to FSDP2, a copy of the weights of
               b P)
    scoring    the engine's weights; the activations inside one layer
    update     4 P gradients; activations of `token_budget` tokens for the backward pass; logits of
               HEAD_CHUNK positions
    optimizer  4 P gradients; AdamW's temporary copy
The phases follow each other, and vLLM sleeps in the last two: the largest phase must fit.

Left out: mixtures of experts (their parameters are right, their activations are not). Not yet
compared with a GPU.

    python -m tools.plan        # the table of docs/memory.md
    python -m pytest tests/tools/test_plan.py
"""

import runtime  # isort: split

import itertools
import math
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from fci import indicator_width
from runtime.cli import Parser, UserError, first_line, stop_on_user_error
from runtime.data import file_rows, is_toy
from runtime.dist import DTYPES, decoder_layers
from runtime.scoring import HEAD_CHUNK

GIB = 2**30
PHASES = ("sampling", "scoring", "update", "optimizer")
TOKENS_PER_STEP = 32  # of reasoning, a low guess: only FCI's indicator matrix depends on it
# PyTorch's CUDA kernels that never store attention need bf16, or as many KV heads as heads (up to
# torch 2.13). With fp32 and grouped-query attention SDPA falls back to a kernel that stores
# H x T x T numbers.
FP32_GQA_STORES_ATTENTION = True


@dataclass(frozen=True)
class Shape:
    """The sizes that memory depends on. `root`: the parameters outside the decoder layers
    (embedding, last norm, output head)."""

    parameters: int
    layer: int  # parameters of one
    root: int
    layers: int
    hidden: int
    inner: int  # width of the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    normed_heads: bool  # Qwen3 normalises queries and keys


def count(model_config) -> Shape:
    """The Shape of a transformers config: real modules on the meta device, so no memory and no
    weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    modules = (model, *decoder_layers(model))
    # tied weights count once
    total, *each = (sum(p.numel() for p in module.parameters()) for module in modules)
    c = model_config.get_text_config()
    return Shape(
        total,
        max(each),
        total - sum(each),
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads,
        getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        c.vocab_size,
        any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
    )


def parameter_counts(model_dir: str) -> Shape:
    """The Shape of a model directory. Only its config.json is read. Raises UserError."""
    if "/" not in model_dir and not Path(model_dir).is_dir():  # no hub name either
        raise UserError(f"--model {model_dir}: cannot be loaded (no such directory)")
    try:
        return count(AutoConfig.from_pretrained(model_dir, trust_remote_code=False))
    # no such directory, no config, an unknown architecture, not a decoder
    except Exception as error:
        raise UserError(f"--model {model_dir}: cannot be loaded ({first_line(error)})") from error


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------
def saved_per_token(shape: Shape, b: int) -> int:
    """Bytes per token that ONE decoder layer keeps for its backward pass, if attention is not
    stored.

    Two RMSNorms: input and 1 / rms in fp32, normalised, output. Attention: q, k, v, output, and
    logsumexp in fp32. MLP: gate, its activation, up, their product.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * ((4 + 2 * b) * shape.hidden + 4)
    if shape.normed_heads:  # two more, whose outputs are attention's q and k
        norms += (4 + b) * (q + kv) + 4 * (shape.heads + shape.kv_heads)
    return norms + b * (2 * q + 2 * kv) + 4 * shape.heads + b * 4 * shape.inner


def kv_per_token(shape: Shape, b: int) -> int:
    """Bytes of a token in the KV cache: a key and a value in every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * b


def row_tokens(config) -> tuple[int, int]:
    """(longest row of a training step, longest row that is sampled). They differ if evaluations
    have longer responses."""
    return config.max_prompt + config.max_response, config.max_prompt + max(
        config.max_response, config.eval_max_response
    )


def memory(config, shape: Shape, ranks: int, phase: str, gpu_gib: float = 80.0) -> dict[str, float]:
    """GiB on each GPU in one of the PHASES, by part. The sum of the parts is needed."""
    b, h, fsdp, vllm = (
        DTYPES[config.dtype].itemsize,
        shape.hidden,
        config.parallel == "fsdp",
        config.engine == "vllm",
    )
    row, sampled_row = row_tokens(config)
    n = max(config.token_budget, row)  # padded tokens of a pass: one row always fits
    # parameters with their fp32 state
    held = 0 if config.cpu_offload else shape.parameters / (ranks if fsdp else 1)
    logits = min(n, HEAD_CHUNK) * shape.vocabulary
    # of a layer, per token, without gradients: gate, up, product, residual, ...
    inside = b * (3 * shape.inner + 4 * h)
    gqa = config.dtype == "fp32" and shape.kv_heads < shape.heads
    # attention, per token, one copy
    stored = 4 * shape.heads * row if gqa and FP32_GQA_STORES_ATTENTION else 0

    parts = {
        "weights": 4 * held,
        "Adam's moments": 8 * held,
        "reference": 4 * held if config.keeps_reference() else 0,
    }
    # DDP never frees its gradient buckets
    if phase in ("update", "optimizer") or (not fsdp and ranks > 1):
        parts["gradients"] = 4 * held
    if phase in ("sampling", "scoring"):
        if vllm:
            parts["engine: vLLM"] = config.engine_memory * gpu_gib * GIB
        elif fsdp:  # with DDP it samples with the policy itself
            parts["engine: weights"] = b * shape.parameters
    if phase == "sampling" and not vllm:
        kv, cached = kv_per_token(shape, b), max(config.rollout_tokens, sampled_row)
        sharing = config.continuations if config.branches() else config.grpo_samples
        # tokens of one prefill; requests that share a prompt compute it once
        prompts = max(row, cached // sharing)
        parts["engine: KV cache"] = cached * kv
        # before the rows' cache exists: the prompts' cache and a layer's inside; then both caches
        parts["engine: prefill"] = max(
            prompts * (kv + inside + 3 * stored) - cached * kv, prompts * kv
        )
    # in `dtype`: the root; a layer, and the next one while it computes
    if phase in ("scoring", "update") and fsdp:
        parts["gathered weights"] = b * (shape.root + 2 * shape.layer)
    if phase == "scoring":
        steps = math.ceil(config.max_response / TOKENS_PER_STEP)
        if config.branches():
            width = indicator_width(steps, shape.head_dim)
            # (T, K) twice; (T, H, width) of alpha @ E
            parts["FCI"] = n * (8 * steps + (b + 8) * shape.heads * width)
        # in a layer; in the head
        parts["working space"] = max(n * (inside + 3 * stored), n * 2 * b * h + 12 * logits)
    if phase == "update":
        saved = saved_per_token(shape, b) + stored
        back = b * (2 * shape.inner + 3 * h) + 2 * stored  # gradients inside a layer
        # last norm; 5 fp32 copies; the weight's gradient
        head = n * 24 * h + 20 * logits + 2 * b * shape.vocabulary * h
        # unsharded: the root's, and a layer's, which is copied to fp32 to be summed over ranks
        if fsdp:
            parts["gathered gradients"] = b * shape.root + (b + 4) * shape.layer
        # a hidden state per layer; the inside of the one that is recomputed
        if config.activation_checkpointing:
            parts["activations"] = n * shape.layers * b * h
            parts["working space"] = max(head, n * (saved + back))
        else:
            parts["activations"] = n * shape.layers * saved
            parts["working space"] = max(head, n * back)
    # AdamW's square roots; before it, FSDP2's root: weights, gradients, these in fp32 to be summed
    if phase == "optimizer":
        parts["working space"] = max(4 * held, (2 * b + 4) * shape.root if fsdp else 0)
    parts = {name: size / GIB for name, size in parts.items() if size}
    # a guess
    parts["context, gaps"] = 1 + 0.1 * sum(
        size for name, size in parts.items() if name != "engine: vLLM"
    )
    return parts


def peak(config, shape: Shape, ranks: int, gpu_gib: float) -> tuple[float, str]:
    """(GiB, phase) of the phase that needs the most memory."""
    return max(
        (sum(memory(config, shape, ranks, phase, gpu_gib).values()), phase) for phase in PHASES
    )


def vllm_tokens(config, shape: Shape, gpu_gib: float) -> int:
    """Tokens that fit into vLLM's share of a GPU beside its weights."""
    b = DTYPES[config.dtype].itemsize
    return max(
        0,
        int((config.engine_memory * gpu_gib * GIB - b * shape.parameters) / kv_per_token(shape, b)),
    )


def fits(config, shape: Shape, ranks: int, gpu_gib: float) -> bool:
    one_row = (
        config.engine != "vllm" or vllm_tokens(config, shape, gpu_gib) >= row_tokens(config)[1]
    )
    return one_row and peak(config, shape, ranks, gpu_gib)[0] <= gpu_gib


def remedy(config, shape: Shape, ranks: int, gpu_gib: float) -> str:
    """The fewest changes that make it fit, as command-line options; "" if none do. It tries all
    combinations, since each is only arithmetic."""
    row, sampled_row = row_tokens(config)
    least = dict(token_budget=row, rollout_tokens=sampled_row, engine_memory=0.3)
    changes = [
        dict(activation_checkpointing=True),
        *({name: min(getattr(config, name), least[name])} for name in least),
        dict(parallel="fsdp"),
        dict(dtype="bf16", parallel="fsdp"),
        dict(parallel="fsdp", cpu_offload=True),
    ]
    changes = [
        {name: value for name, value in change.items() if getattr(config, name) != value}
        for change in changes
    ]
    for size in range(1, 5):
        for chosen in itertools.combinations(filter(None, changes), size):
            change = {name: value for one in chosen for name, value in one.items()}
            if fits(replace(config, **change), shape, ranks, gpu_gib):
                return " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
    return ""


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------
def memory_lines(config, shape: Shape, ranks: int, gpu_gib: float) -> list[str]:
    """The memory table, and whether it fits."""
    phases = [memory(config, shape, ranks, phase, gpu_gib) for phase in PHASES]
    rows = {name: [parts.get(name, 0) for parts in phases] for parts in phases for name in parts}
    rows["context, gaps"] = rows.pop("context, gaps")  # last
    rows["sum"] = [sum(parts.values()) for parts in phases]
    lines = [f"{'GiB per GPU':18}" + "".join(f"{phase:>11}" for phase in PHASES)]
    for name, row in rows.items():
        lines.append(
            f"{name:18}" + "".join(f"{size:11.1f}" if size else f"{'-':>11}" for size in row)
        )
    most, phase = peak(config, shape, ranks, gpu_gib)
    needs = (
        f"{most:.1f} of {gpu_gib:g} GiB at the peak ({phase}); an estimate, of which a guess: 1 GiB"
        " + 10 % context, gaps"
    )
    if fits(config, shape, ranks, gpu_gib):
        return lines + [f"fits: {needs}"]
    if most <= gpu_gib:
        needs = "the share of vLLM does not hold its weights and one response"
    options = remedy(config, shape, ranks, gpu_gib)
    return lines + [
        f"DOES NOT FIT: {needs}",
        (
            f"would fit with: {options}"
            if options
            else "no option makes it fit: more GPUs, or a shorter response"
        ),
    ]


def launch(argv: list[str] | tuple, ranks: int) -> str:
    """The command of the run: the plan's command without the options that only the plan uses."""
    words, skipping = [], False
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            skipping = name in ("dry_run", "gpus", "gpu_gib")
        words += [] if skipping else [word]
    return shlex.join(
        (["torchrun", "--nproc_per_node", str(ranks)] if ranks > 1 else ["python"])
        + ["attnrl.py", *words]
    )


def millions(tokens: float, digits: int = 1) -> str:
    """A number of millions; small ones with three decimals."""
    return f"{tokens:,.{digits}f}" if tokens >= 1 else f"{tokens:.3f}"


def step_lines(config, ranks: int) -> list[str]:
    """What one training step samples and trains."""
    tree, samples = config.branches(), config.samples_per_problem()
    initial = config.batch_size * samples
    continued = initial * config.branch_points * config.continuations if tree else 0
    leaves = initial + continued
    tokens = leaves * config.max_response / 1e6
    sizes = wanted = ""
    if config.ads_batch:
        low, high = config.batch_size / config.batch_range, config.batch_size * config.batch_range
        sizes = f" ({low:.0f} to {high:.0f} later)"
        wanted = f" ({config.target_sequences:,} wanted)"
    updates = math.ceil(leaves / config.mini_batch)
    return [
        f"{config.batch_size} problems{sizes} x {samples} responses = {initial:,}, and up to"
        f" {continued:,} continuations",
        f"up to {leaves:,} leaves = training sequences{wanted} = {updates} updates of"
        f" {config.mini_batch}",
        f"up to {millions(tokens)} M tokens, {millions(tokens / ranks)} M a GPU (if all are"
        f" {config.max_response:,} long)",
    ]


def run_line(config) -> str:
    """What the whole run samples."""
    tree = config.branches()
    leaves = config.leaves_per_problem() if tree else config.grpo_samples
    tokens = config.steps * config.batch_size * leaves * config.max_response / 1e6
    # without a tree there is nothing to continue; one-step off-policy makes one call more than
    # there are steps, to warm up
    calls = config.steps * (1 if config.one_step_off_policy or not tree else 2)
    calls += config.one_step_off_policy and tree
    evaluated = {0, config.steps}
    if config.eval_every:
        evaluated |= set(range(0, config.steps + 1, config.eval_every))
    return (
        f"{config.steps} steps, up to {millions(tokens, 0)} M tokens; {calls} generation calls and"
        f" {len(evaluated)} evaluations ({config.eval_samples} samples a problem)"
    )


def data_lines(config) -> list[str]:
    """Where the problems are. Of files that are here, rows are counted and columns chosen, as
    training would; hub sets are not fetched. Raises UserError if training could not read a file."""
    lines: list[str] = []

    def named(source: str) -> str:
        if is_toy(source) or source.startswith("hf:"):
            return source
        if not os.path.exists(source):
            return f"{source} (no such file here)"
        columns = config.problem_column, config.answer_column
        rows, _ = file_rows(source, *columns, lines.append)
        return f"{source} ({len(rows):,} row{'s' * (len(rows) != 1)})"

    held_back = f"{100 * config.test_fraction:g} % of them, held back"
    tested = held_back if config.test_fraction else named(config.test_problems)
    return [f"{named(config.problems)}, evaluated on {tested}", *lines]


def cpu_line(config, shape: Shape) -> str:
    """A machine without a GPU: would this run fit into its memory?"""
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    line = f"the machine at hand has no GPU and {here:.0f} GiB: "
    config = replace(config, parallel="ddp", dtype="fp32", cpu_offload=False)
    most = peak(config, shape, 1, here)[0]
    if most <= here:
        return line + f"on its CPU the run takes at most about {most:.1f} GiB: fits"
    line += f"on its CPU the run may take {most:.1f} GiB: DOES NOT FIT"
    while (budget := config.token_budget // 2) >= row_tokens(config)[0]:
        config = replace(config, token_budget=budget)
        if (less := peak(config, shape, 1, here)[0]) <= here:
            return line + f"; --token_budget {budget} takes {less:.1f}"
    return line


def machine_line(config, ranks: int, gpu_gib: float) -> str:
    gpus = "GPU" if ranks == 1 else "GPUs"
    checkpointing = "on" if config.activation_checkpointing else "off"
    offload = ", cpu offload" if config.cpu_offload else ""
    return (
        f"{ranks} {gpus} of {gpu_gib:g} GiB (--gpus, --gpu_gib), {config.parallel} {config.dtype},"
        f" activation checkpointing {checkpointing}{offload}"
    )


def engine_line(config, shape: Shape, gpu_gib: float) -> str:
    if config.engine != "vllm":
        return f"transformers, at most {config.rollout_tokens:,} tokens of KV cache"
    tokens = vllm_tokens(config, shape, gpu_gib)
    share = f"{config.engine_memory:.0%} of a GPU"
    return f"vLLM, {share}: weights and about {tokens:,} tokens of KV cache"


def host_line(config, shape: Shape, ranks: int) -> str:
    """Host memory of one node."""
    # policy, and the engine's copy of it
    copies = 2 if config.parallel == "fsdp" and config.engine != "vllm" else 1
    start = ranks * copies * 4 * shape.parameters / GIB
    line = f"{start:.1f} GiB while it starts (every rank reads the fp32 weights)"
    if config.cpu_offload:
        then = (16 + 4 * config.keeps_reference()) * shape.parameters / GIB
        line += f", {then:.1f} GiB then; all ranks together"
    return line


def disk_line(config, shape: Shape) -> str:
    one, count = 12 * shape.parameters / GIB, config.keep + 2
    return (
        f"{count * one:.1f} GiB: {count} checkpoints of {one:.1f} (--keep {config.keep}, the best,"
        " and a new one before an old one goes)"
    )


def describe(config, ranks: int, gpu_gib: float = 80.0, argv: list[str] | tuple = ()) -> str:
    """What `config` (from the command line `argv`) will do on `ranks` GPUs. Raises UserError if
    there is no such model."""
    shape = parameter_counts(config.model)
    sizes = (
        f"{shape.parameters:,} parameters: {shape.layers} layers of {shape.layer:,}, and"
        f" {shape.root:,} in embedding, last norm and head"
    )
    parts = {
        "model": [config.model, sizes],
        "machine": [machine_line(config, ranks, gpu_gib)],
        "engine": [engine_line(config, shape, gpu_gib)],
        "data": data_lines(config),
        "a step": step_lines(config, ranks),
        "the run": [run_line(config), "how long: not planned; the first step tells"],
        "memory": memory_lines(config, shape, ranks, gpu_gib),
        "host": [host_line(config, shape, ranks)],
        "disk": [disk_line(config, shape)],
        "command": [launch(argv, ranks)],
    }
    if config.engine != "vllm" and not torch.cuda.is_available():
        parts["machine"].append(cpu_line(config, shape))
    lines = []
    for name, texts in parts.items():
        lines += [f"{name:10}{texts[0]}", *(f"{'':10}{text}" for text in texts[1:])]
    return "\n".join(lines)


def print_plan(config, argv: list[str]) -> None:
    """Print what --dry_run shows; with several ranks, only rank 0 prints."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(describe(config, config.gpus, config.gpu_gib, argv))


# --------------------------------------------------------------------------------------------------
# The table of docs/memory.md
# --------------------------------------------------------------------------------------------------
QWEN2: dict[str, dict[str, Any]] = {
    "1.5B": dict(
        hidden_size=1536,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        vocab_size=151936,
    ),
    "7B": dict(
        hidden_size=3584,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
    ),
}
MACHINES: dict[str, tuple[int, dict]] = {
    "ddp fp32, 1 GPU": (1, {}),
    "ddp fp32, 8 GPUs": (8, {}),
    "fsdp bf16, 1 GPU": (1, dict(parallel="fsdp", dtype="bf16")),
    "the same, cpu_offload": (1, dict(parallel="fsdp", dtype="bf16", cpu_offload=True)),
    "fsdp bf16, 8 GPUs": (8, dict(parallel="fsdp", dtype="bf16")),
}


def memory_table() -> str:
    """Peak GiB per GPU without / with activation checkpointing, transformers engine, as Markdown;
    bold: more than 80."""
    from attnrl import Config

    base = Config(parallel="ddp", dtype="fp32", engine="transformers")
    lines = [f"| model | response | {' | '.join(MACHINES)} |", "|---|---|" + "---|" * len(MACHINES)]
    for (name, sizes), response in itertools.product(QWEN2.items(), (2048, 8192, 32768)):
        shape = count(Qwen2Config(num_hidden_layers=28, tie_word_embeddings=False, **sizes))
        cells = []
        for ranks, settings in MACHINES.values():
            needs = [
                peak(
                    replace(base, max_response=response, activation_checkpointing=on, **settings),
                    shape,
                    ranks,
                    80,
                )[0]
                for on in (False, True)
            ]
            cells.append(
                " / ".join(f"**{gib:.0f}**" if gib > 80 else f"{gib:.0f}" for gib in needs)
            )
        lines.append(f"| {name} | {response // 1024}k | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = Parser(
        "-m tools.plan",
        "The table of docs/memory.md; for the plan of one run: attnrl.py --dry_run.",
        "python -m tools.plan",
    )
    if unknown := parser.parse_known_args(argv)[1]:
        raise UserError(
            f"{' '.join(unknown)}: plan.py takes no arguments; the plan of a run is python"
            " attnrl.py ... --dry_run"
        )
    print(memory_table())


if __name__ == "__main__":
    with stop_on_user_error("tools.plan"):
        main(sys.argv[1:])
