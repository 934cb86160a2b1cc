"""dist.py: many GPUs, one node or several, with plain torch.distributed under torchrun.

    torchrun --nproc_per_node 8 attnrl.py --preset paper --model DIR ...       # one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id attnrl \\
        --rdzv_endpoint HOST:29500 attnrl.py ...                               # on each of two

What is spread out and what is not:
- Forward passes are spread out. Every rank samples, scores and grades its own problems (`mine`:
  every world-th one).
- All else is plain Python and cheap, so it is computed by every rank from the same data: the
  finished groups of a batch are exchanged (`everyone`), and then trees, sequences, batch size and
  metrics are global because nothing is partial. A rollout's seed depends on its place in the batch,
  so one rank and eight sample the same responses (up to rounding).
- An update deals the rows of each mini-batch out by token count (`deal`), so that ranks finish
  together. The token mean is that of the GLOBAL mini-batch; gradients are summed over ranks by DDP
  or FSDP2.

Ranks with unequal numbers of micro-batches would wait for each other for ever, because FSDP gathers
weights in every forward pass: `in_step` gives the others empty batches to pass the time with.

DDP: every rank holds all weights in fp32. FSDP2 (`fully_shard`): weights, gradients and AdamW's
moments are cut into one part per rank, in fp32; each layer is gathered when it is needed, in bf16
or fp32. So bf16 on GPUs always goes through FSDP2, also on a single one (a group of one). On a CPU
it is autocast over whole fp32 weights.

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
        # objects and offloaded weights: gloo
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        where: dict[str, Any] = (
            {} if launched else dict(store=group.HashStore(), rank=0, world_size=1)
        )
        group.init_process_group(backend, timeout=TIMEOUT, **where)
    return device


def stop(close=lambda: None) -> None:
    """Leave together: a rank that left early would look like one that died. `close` is the
    engine's; vLLM shares the group.

    The group of several ranks is left alone: the process must end by errors.leave, without
    destructors. DDP's holds the interpreter's lock and waits for a gloo thread, which at times
    waits for that lock (torch 2.13; seen once in ten runs).
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
    """This rank's share: every world-th item, so that neighbours of equal difficulty are spread
    out."""
    return items[rank() :: world()]


def everyone(share: list) -> list:
    """The inverse of `mine`: all ranks' items, in their order before they were shared out. Every
    rank must call it.

    The items are pickled between processes of one run that trust each other; nothing is read from a
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
    """The sequences in parts of about `size`, as equal as it goes; problems are shuffled.

    A problem, which is what has one prompt, stays whole: its leaves share prefixes, which are then
    computed once (packing.py). One of more than `size` sequences is a part of its own.
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
        # cut where a problem ends next to an even cut: its middle says on which side it is
        number = (before + len(problem) / 2) // even
        parts.setdefault((number, len(problem) > size), []).extend(problem)
        before += len(problem)
    return list(parts.values())


def deal(costs: list[int], hands: int) -> list[list[int]]:
    """Indices for each of `hands` ranks with sums of `costs` as equal as it goes: the dearest
    first, to whoever has least.

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
    """The batches, and empty ones until no rank has more. Every rank must call it, also one without
    any batch."""
    return batches + [[]] * (max(everyone([len(batches)])) - len(batches))


# --------------------------------------------------------------------------------------------------
# The model on many ranks
# --------------------------------------------------------------------------------------------------
def decoder_layers(model) -> list[torch.nn.Module]:
    """The modules that are gathered and recomputed one at a time: those that transformers says must
    not be split."""
    return [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]


def spread(
    forward: Any,
    device: str,
    parallel: str = "ddp",
    dtype: str = "fp32",
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
) -> torch.nn.Module:
    """Put `forward` (fci.TokenLogprobs: a causal model and its output head as ONE forward pass) on
    all ranks.

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
    """Does the next backward pass sum gradients over ranks (DDP), or add them up here?"""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted


def cast(model, dtype: str):
    """The model with parameters in `dtype`. Parameters only: `model.to(torch.bfloat16)` rounds the
    rotary frequencies, too, and after some thousand tokens an engine that was cast like that reads
    other positions than the learner."""
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
    an engine that keeps its own copy of it would go on sampling from the old one.
    """
    for name, value in model.state_dict().items():
        yield name, whole(value)
