"""segment_sum: sums over the sequences of a pack, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import reference
from autoregembed.ops import segment_sum

from .harness import OURS, Case, ForwardBackward, Inputs, our_impl
from .workload import ragged_bounds


def _ours(x: Tensor, cu_seqlens: Tensor, _: Tensor) -> Tensor:
    return segment_sum(x, cu_seqlens, impl=our_impl())


def _eager(x: Tensor, cu_seqlens: Tensor, sequence: Tensor) -> Tensor:
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, x)


def _segment_reduce(x: Tensor, cu_seqlens: Tensor, _: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long())


def _specification(x: Tensor, cu_seqlens: Tensor, _: Tensor) -> Tensor:
    return reference.segment_sum(x, cu_seqlens)


def segment_sum_case(s: int, length: int, device: str) -> Case:
    """fp32 token log-probabilities of S sequences of L tokens on average."""

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(1)
        cu_seqlens = ragged_bounds(s, length, device)
        sequence = torch.repeat_interleave(cu_seqlens.diff().long())
        x = -3 * torch.rand(len(sequence), generator=generator)
        return Inputs([x.to(device)], (cu_seqlens, sequence), torch.randn(s, generator=generator).to(device))

    job = ForwardBackward(make, _specification, 1e-5)
    return Case(
        op="segment_sum", shape={"S": s, "L": length}, inputs="ragged pack",
        variants={
            OURS: job.variant(lambda: _ours),
            **job.eager(_eager),
            "segment_reduce": job.variant(lambda: _segment_reduce, torch.__version__),
        },
        flops=1.0 * s * length, bytes=8.0 * s * (length + 1), check=job.check, rounds=21, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    for s, length in ((8, 12),) if quick else ((192, 32), (4096, 64)):
        yield partial(segment_sum_case, s, length, device)
