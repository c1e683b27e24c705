"""splice: z and the frozen embedding rows of the targets into the decoder's packed input, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import ops, reference

from .harness import OURS, Case, ForwardBackward, Inputs, our_impl, training_dtype
from .workload import packed_shape, ragged_bounds

K = 5


def _eager(z: Tensor, embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, z_index: Tensor) -> Tensor:
    rows = cu_seqlens[:-1].long()[:, None] + torch.arange(K, device=z.device)
    return embedding[ids].index_copy(0, rows.flatten(), z[z_index].flatten(0, 1))


def splice_case(s: int, length: int, d: int, device: str) -> Case:
    """S pairs of L positions on average; two pairs share a z."""
    dtype = training_dtype(device)

    def make() -> Inputs:
        cu_seqlens = ragged_bounds(s, length, device, least=K + 1)
        t = int(cu_seqlens[-1])
        z, embedding, upstream = (
            torch.randn(*shape, device=device).to(dtype) for shape in ((s // 2 + 1, K, d), (1000, d), (t, d))
        )
        ids, z_index = torch.arange(t, device=device) % 1000, torch.arange(s, device=device) // 2
        return Inputs([z], (embedding, ids, cu_seqlens, z_index), upstream)

    def prepare(case: Case) -> None:  # T rows read and written; the gradient of K rows of every pair, summed over pairs
        z, upstream = job.inputs().leaves[0], job.inputs().upstream
        assert upstream is not None
        case.bytes = float(dtype.itemsize * (2 * upstream.numel() + z.numel() + s * K * d))

    job = ForwardBackward(make, reference.splice, 4 * torch.finfo(dtype).eps, value_tolerance=0.0)
    return Case(
        op="splice", shape={"S": s, "L": length, "D": d, "K": K}, dtype=dtype, inputs="ragged pack",
        variants={OURS: job.variant(lambda: partial(ops.splice, impl=our_impl())), **job.eager(_eager)},
        flops=0.0, bytes=0.0, prepare=prepare, check=job.check, rounds=21, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    yield partial(splice_case, *packed_shape(device, quick), device)
