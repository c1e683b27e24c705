"""Collectives among the processes of one run, through torch.distributed.

All processes call every function here, in the same order. In a process that runs alone each function is its plain
form, without a call to torch.distributed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from autoregembed.derivatives import first_order_only

T = TypeVar("T")


class LostProcess(RuntimeError):
    """Another process of the run has ended."""


@contextlib.contextmanager
def naming_lost(what: str) -> Iterator[None]:
    """At the end all processes wait for each other; where one has ended, the others raise LostProcess that names it.

    Args:
        what: they are doing, for the error.
    """
    if world_size() == 1:
        yield
        return
    # NCCL does not see that a process has ended; gloo's connection to it closes at once.
    group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    try:
        yield
        dist.monitored_barrier(group, timeout=timedelta(hours=2), wait_all_ranks=True)
    except RuntimeError as error:
        reason = str(error).strip()
        if not isinstance(error, dist.DistError) and not re.search("gloo|monitoredBarrier|closed by peer", reason):
            raise
        raise LostProcess(
            f"{what}: got no answer from another process, expected all {world_size()}; its own last lines, or the "
            f"launcher's, say why it ended ({reason[-300:]})"
        ) from error


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(x: Tensor, op: str = "SUM") -> Tensor:
    """The elementwise sum of x ("MAX": maximum) over processes, a new tensor; shape and dtype agree on all."""
    x = x.clone()
    if world_size() > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in any process."""
    return bool(all_reduce(torch.tensor(int(flag), device=device), "MAX")) if world_size() > 1 else flag


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """The result of `function`, which runs in process 0 alone; its exception is raised in every process."""
    if world_size() == 1:
        return function()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = function()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def first_found(found: T | None) -> T | None:
    """What the first process found that found anything."""
    if world_size() == 1:
        return found
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, found)
    return next((x for x in every if x is not None), None)


def equalize_microbatches(microbatches: list[list[int]], device: torch.device) -> list[list[int]]:
    """Splits this process's microbatches until it has as many as the process with the most.

    Sharded weights are gathered anew for each pass, so every process must make the same number of passes.

    Args:
        microbatches: row indices of each microbatch.

    Raises:
        ValueError: this process has fewer rows than another one has microbatches.
    """
    out = [list(microbatch) for microbatch in microbatches]
    wanted = int(all_reduce(torch.tensor(len(out), device=device), "MAX")) if world_size() > 1 else len(out)
    if sum(map(len, out)) < wanted:
        raise ValueError(f"rows: got {sum(map(len, out))} in process {rank()}, expected at least {wanted}")
    while len(out) < wanted:
        i = max(range(len(out)), key=lambda i: len(out[i]))
        longest = out[i]
        out[i : i + 1] = [longest[: len(longest) // 2], longest[len(longest) // 2 :]]
    return out


def shard_microbatches(microbatches: list[T]) -> Iterator[tuple[T, bool]]:
    """This process's microbatches, every `world_size()`-th, and whether their result counts.

    All processes get the same number. A process that would have none left repeats the last one, which does not count.
    """
    world, count = world_size(), len(microbatches)
    for i in range(rank(), rank() + -(-count // world) * world, world):
        yield microbatches[min(i, count - 1)], i < count


def _all_gather(x: Tensor) -> list[Tensor]:
    out = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(out, x)
    return out


class _GatherRows(torch.autograd.Function):
    """Gathers blocks of `most` rows; the gradient of a block is the sum over all processes (reduce-scatter)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.rows = x.shape[0]
        block = x.new_zeros(most, *x.shape[1:])
        block[: len(x)] = x
        return torch.cat(_all_gather(block))

    @staticmethod
    @first_order_only("gather_rows", "InfoNCE in one process has them")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        block = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        dist.reduce_scatter(block, list(grad.contiguous().chunk(world_size())))
        return block[: ctx.rows], None


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes in rank order, and the index of this process's first row.

    Args:
        x: (R, ...); R may differ between processes (0 included), everything else agrees.

    Returns:
        (sum of R, ...), and the sum of R over the processes before this one. The gradient of x is the sum over
        processes of their gradients with respect to these rows, hence that of the *sum* of their losses.
    """
    if world_size() == 1:
        return x, 0
    counts = torch.cat(_all_gather(torch.tensor([len(x)], device=x.device))).tolist()
    blocks = _GatherRows.apply(x, max(counts)).split(max(counts)) if max(counts) else [x] * world_size()
    rows = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    return rows, sum(counts[: rank()])


def to_full_tensor(x: Tensor) -> Tensor:
    """All of a tensor of which each process holds a shard (a DTensor, as FSDP2 makes them); any other unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, like: Any) -> Tensor:
    """This process's shard of x, sharded as `like` is; the inverse of `to_full_tensor`. x agrees on all processes."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(module: Any) -> Any:
    """`module`, whose parameters are shards until its next pass: FSDP2 leaves some of them whole after one."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return module


def pieces(x: Tensor) -> Iterator[Tensor]:
    """The rows of a tensor in process 0, shard after shard, on the CPU; in the others nothing.

    All processes run through it, so that each can send its shard when its turn comes.
    """
    if not isinstance(getattr(x, "placements", None), tuple):
        if rank() == 0:
            yield x.detach().cpu()
        return
    shard: Any = x
    mesh, local = shard.device_mesh, shard.detach().to_local()
    dims = [dim for dim, placement in enumerate(shard.placements) if placement.is_shard()]
    if any(shard.placements[dim].dim != 0 for dim in dims) or len(dims) > 1:
        raise ValueError(f"x: got {shard.placements}, expected shards of its rows")
    owners = mesh.mesh.movedim(dims[0], 0).reshape(mesh.size(dims[0]), -1)[:, 0].tolist() if dims else [0]
    size = -(-x.shape[0] // len(owners)) if dims else x.shape[0]
    for i, owner in enumerate(owners):
        rows = max(0, min(x.shape[0] - i * size, size))
        if rows == 0:
            continue
        if owner == 0:
            if rank() == 0:
                yield local.cpu()
        elif rank() == 0:
            part = torch.empty(rows, *x.shape[1:], dtype=x.dtype, device=mesh.device_type)
            dist.recv(part, owner)
            yield part.cpu()
        elif rank() == owner:
            dist.send(local.to(mesh.device_type).contiguous(), 0)
