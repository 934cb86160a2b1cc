"""dist.py: many GPUs, one node or several, with plain torch.distributed under torchrun.

    torchrun --nproc_per_node 8 attnrl.py --preset paper --model DIR ...       # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id attnrl \\
        --rdzv_endpoint HOST:29500 attnrl.py ...                               # on each of two

What is split over ranks, and what is not:
- Forward passes are split. Every rank samples, scores and grades its own problems (`mine`: every
  world-th one).
- Everything else is plain Python and cheap, so every rank computes it from the same data: the ranks
  exchange the finished groups of a batch (`everyone`), so trees, sequences, batch size and metrics
  are global. A rollout's seed depends on its place in the batch, so one rank and eight sample the
  same responses (up to rounding).
- An update splits the rows of each mini-batch by token count (`deal`), so that ranks finish
  together. The token mean is over the GLOBAL mini-batch; DDP or FSDP2 sums gradients over ranks.

FSDP gathers weights in every forward pass, so ranks with unequal numbers of micro-batches would
wait for each other for ever. `in_step` adds empty batches until all ranks have equally many.

DDP: every rank holds all weights in fp32. FSDP2 (`fully_shard`): weights, gradients and AdamW's
moments are cut into one part per rank, in fp32; each layer is gathered when it is needed, in bf16
or fp32. So bf16 on GPUs always uses FSDP2, even on a single GPU (a group of one). On a CPU, bf16 is
autocast over whole fp32 weights.

Left out: tensor, pipeline and sequence parallelism.

    python -m pytest tests/runtime/test_dist.py
"""

import math
import os
import random
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.distributed as group
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# the longest that ranks may wait for the one with the longest rollouts
TIMEOUT = timedelta(hours=1)


# --------------------------------------------------------------------------------------------------
# The group
# --------------------------------------------------------------------------------------------------
def rank() -> int:
    return group.get_rank() if group.is_initialized() else 0


def world() -> int:
    return group.get_world_size() if group.is_initialized() else 1


def start(device: str, alone: bool = False) -> str:
    """Join the group that torchrun describes; returns this rank's device ("cuda" -> "cuda:3").
    Without torchrun nothing happens, unless `alone` asks for a group of one (FSDP2 needs a
    group)."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    if (launched or alone) and not group.is_initialized():
        # gloo is for objects and offloaded weights
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        where: dict[str, Any] = (
            {} if launched else dict(store=group.HashStore(), rank=0, world_size=1)
        )
        group.init_process_group(backend, timeout=TIMEOUT, **where)
    return device


def stop(close=lambda: None) -> None:
    """End together: a rank that ends early would look like one that died. `close` is the engine's;
    vLLM shares the group.

    A group of several ranks is not destroyed: the process must end by cli.leave, without
    destructors. DDP's destructor holds the interpreter's lock and waits for a gloo thread, which
    sometimes waits for that lock (torch 2.13; seen once in ten runs).
    """
    if group.is_initialized():
        group.barrier()
    close()
    if group.is_initialized() and world() == 1:
        group.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Work and results
# --------------------------------------------------------------------------------------------------
def mine(items: list) -> list:
    """This rank's share: every world-th item, so that neighbours of equal difficulty go to
    different ranks."""
    return items[rank() :: world()]


def everyone(share: list) -> list:
    """The inverse of `mine`: the items of all ranks, in their original order. Every rank must call
    it.

    Items are pickled between processes of one run, which trust each other; nothing is read from a
    file.
    """
    if world() == 1:
        return share
    shares: list = [None] * world()
    group.all_gather_object(shares, share)
    missing = object()
    return [
        item
        for item in chain.from_iterable(zip_longest(*shares, fillvalue=missing))
        if item is not missing
    ]


def mini_batches(sequences: list, size: int, seed: int) -> list[list]:
    """The sequences in parts of about `size`, as equal as possible; problems are shuffled.

    All sequences with the same prompt, the leaves of one problem, stay together: their shared
    prefixes are then computed once (packing.py). A problem of more than `size` sequences is a
    separate part.
    """
    problems: dict[tuple, list] = {}
    for s in sequences:
        problems.setdefault(tuple(s.prompt_ids), []).append(s)
    shuffled = list(problems.values())
    random.Random(seed).shuffle(shuffled)
    even = len(sequences) / max(1, math.ceil(len(sequences) / size))
    parts: dict[tuple, list] = {}
    before = 0
    for problem in shuffled:
        # cuts are at the ends of problems, near even cuts: a problem's middle decides its part
        number = (before + len(problem) / 2) // even
        parts.setdefault((number, len(problem) > size), []).extend(problem)
        before += len(problem)
    return list(parts.values())


def deal(costs: list[int], hands: int) -> list[list[int]]:
    """Indices for each of `hands` ranks, with sums of `costs` as equal as possible: the most
    expensive first, always to the rank with the smallest sum.

    >>> deal([5, 4, 3, 2], hands=2)
    [[0, 3], [1, 2]]
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    total = [0] * hands
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        poorest = total.index(min(total))
        dealt[poorest].append(i)
        total[poorest] += costs[i]
    return dealt


def in_step(batches: list[list[int]]) -> list[list[int]]:
    """The batches, followed by empty ones until all ranks have the same number. Every rank must
    call it, even one without any batch."""
    return batches + [[]] * (max(everyone([len(batches)])) - len(batches))


# --------------------------------------------------------------------------------------------------
# The model on many ranks
# --------------------------------------------------------------------------------------------------
def decoder_layers(model) -> list[torch.nn.Module]:
    """The modules that are gathered and recomputed one at a time: those that transformers marks as
    not to be split."""
    return [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]


def spread(
    forward: Any,
    device: str,
    parallel: str = "ddp",
    dtype: str = "fp32",
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
) -> torch.nn.Module:
    """Put `forward` (scoring.TokenLogprobs: a causal model and its output head as ONE forward pass)
    on all ranks.

    Returns the module to call; `forward.model` stays an ordinary transformers model, with DTensor
    weights under FSDP2. activation_checkpointing: keep one hidden state per layer and compute the
    rest again in the backward pass. dtype: bf16 without FSDP2 is autocast. cpu_offload: sharded
    weights, gradients and moments live in host memory, and AdamW runs there.
    """
    layers = decoder_layers(forward.model)
    if activation_checkpointing:
        for layer in layers:
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    forward.device = torch.device(device)
    if parallel == "fsdp":
        # here: the import takes a second
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        settings: dict[str, Any] = dict(
            mesh=init_device_mesh(forward.device.type, (world(),)),
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32),
            offload_policy=(
                CPUOffloadPolicy(pin_memory=device != "cpu") if cpu_offload else OffloadPolicy()
            ),
        )
        for layer in layers:
            fully_shard(layer, **settings)
        fully_shard(forward, **settings)  # what is left: embedding, last norm, output head
        return forward
    forward.to(device)
    forward.autocast = dtype == "bf16"
    if world() == 1 or not any(p.requires_grad for p in forward.parameters()):
        return forward
    return DistributedDataParallel(forward, gradient_as_bucket_view=True)


def send_gradients(model: torch.nn.Module, wanted: bool) -> None:
    """wanted: DDP's next backward pass sums gradients over ranks; else they only add up here."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted


def cast(model, dtype: str):
    """The model with parameters in `dtype`. Parameters only: `model.to(torch.bfloat16)` would also
    round the rotary frequencies, and after some thousand tokens the engine's positions would differ
    from the learner's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all parts of a DTensor. Every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The inverse of `whole`, for an optimizer's state: placed and cut like its parameter (scalars
    stay whole)."""
    if tensor.dim() == 0:
        return tensor
    if not hasattr(parameter, "full_tensor"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    layout: Any = parameter  # a DTensor
    return distribute_tensor(
        tensor.to(parameter.device), layout.device_mesh, layout.placements, src_data_rank=None
    )


def full_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) for every entry of the state dict, one at a time. Every rank must
    iterate, in step.

    The state dict, not `named_parameters()`: with tied embeddings those lack "lm_head.weight", and
    an engine with a separate copy of it would continue to sample from the old one.
    """
    for name, value in model.state_dict().items():
        yield name, whole(value)
