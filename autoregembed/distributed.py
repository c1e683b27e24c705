"""What the processes of one run do together, through torch.distributed.

Every function is a collective: all processes call it, in the same order. In a process that runs alone each of them is
its plain form, without a call to torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The place of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(x: Tensor, op: str = "SUM") -> Tensor:
    """x summed ("MAX": largest) over processes, elementwise; a new tensor. Its shape and dtype are the same on all."""
    x = x.clone()
    if world_size() > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in any process."""
    return bool(all_reduce(torch.tensor(int(flag), device=device), "MAX")) if world_size() > 1 else flag


def broadcast_from_rank0(function: Callable[[], T]) -> T:
    """What `function` returns in process 0, which alone runs it; an exception of it is raised in every process."""
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


def equalize_microbatches(parts: list[list[int]], device: torch.device) -> list[list[int]]:
    """`parts` of the places of this process' rows, cut until there are as many as in the process with the most.

    Sharded weights are gathered anew for each pass, so every process must make the same number of passes.

    Raises:
        ValueError: this process has fewer rows than another one has parts.
    """
    parts = [list(part) for part in parts]
    wanted = int(all_reduce(torch.tensor(len(parts), device=device), "MAX")) if world_size() > 1 else len(parts)
    if sum(map(len, parts)) < wanted:
        raise ValueError(f"rows: got {sum(map(len, parts))} in process {rank()}, expected at least {wanted}")
    while len(parts) < wanted:
        place = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts[place]
        parts[place : place + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def shard_microbatches(parts: list[T]) -> Iterator[tuple[T, bool]]:
    """The parts that this process works on, every `world_size()`-th, and whether their result counts.

    All processes get the same number: where one would have none left, it repeats the last part, which does not count.
    """
    for place in range(rank(), rank() + -(-len(parts) // world_size()) * world_size(), world_size()):
        yield parts[min(place, len(parts) - 1)], place < len(parts)


def _gathered(x: Tensor) -> list[Tensor]:
    out = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(out, x)
    return out


class _GatherRows(torch.autograd.Function):
    """Blocks of `most` rows are gathered; the gradient of each block is the sum of all processes' (reduce-scatter)."""

    @staticmethod
    def forward(ctx, x: Tensor, most: int) -> Tensor:
        ctx.rows = x.shape[0]
        block = x.new_zeros(most, *x.shape[1:])
        block[: len(x)] = x
        return torch.cat(_gathered(block))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        block = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        dist.reduce_scatter(block, list(grad.contiguous().chunk(world_size())))
        return block[: ctx.rows], None


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, in their order, and where those of this one begin.

    Args:
        x: (R, ...), R of each process its own (0 too), everything else the same.

    Returns:
        (sum of R, ...), and the sum of R over the processes before this one. The gradient of x is the sum over
        processes of their gradients with respect to these rows, so it is that of the *sum* of their losses.
    """
    if world_size() == 1:
        return x, 0
    counts = torch.cat(_gathered(torch.tensor([len(x)], device=x.device))).tolist()
    blocks = _GatherRows.apply(x, max(counts)).split(max(counts)) if max(counts) else [x] * world_size()
    rows = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    return rows, sum(counts[: rank()])


def to_full_tensor(x: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part (a DTensor, as FSDP2 makes them); any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, like: Any) -> Tensor:
    """Of x, whole and the same in every process, what this one holds of `like`: the inverse of `to_full_tensor`."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
