"""pool_last_k: the K compress rows of every text out of the packed encoder output, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import ops, reference

from .harness import OURS, Case, ForwardBackward, Inputs, our_impl, training_dtype
from .workload import packed_shape, ragged_bounds

K = 5


def _eager(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    return hidden[cu_seqlens[1:].long()[:, None] - K + torch.arange(K, device=hidden.device)]


def pool_last_k_case(s: int, length: int, d: int, device: str) -> Case:
    """S texts of L tokens on average."""
    dtype = training_dtype(device)

    def make() -> Inputs:
        cu_seqlens = ragged_bounds(s, length, device, least=K + 1)
        hidden = torch.randn(int(cu_seqlens[-1]), d, device=device).to(dtype)
        return Inputs([hidden], (cu_seqlens,), torch.randn(s, K, d, device=device).to(dtype))

    def prepare(case: Case) -> None:  # K rows read and written in both directions, zeros elsewhere in the gradient
        case.bytes = float(dtype.itemsize * (job.inputs().leaves[0].numel() + 3 * s * K * d))

    job = ForwardBackward(
        make, lambda x, cu: reference.pool_last_k(x, cu, K), 4 * torch.finfo(dtype).eps, value_tolerance=0.0
    )
    return Case(
        op="pool_last_k", shape={"S": s, "L": length, "D": d, "K": K}, dtype=dtype, inputs="ragged pack",
        variants={OURS: job.variant(lambda: partial(ops.pool_last_k, k=K, impl=our_impl())), **job.eager(_eager)},
        flops=0.0, bytes=0.0, prepare=prepare, check=job.check, rounds=21, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    yield partial(pool_last_k_case, *packed_shape(device, quick), device)
