"""conditional_compression beside its parts: stage 1 from hidden states to the loss and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import compression_loss, conditional_compression, linear_logprob, reference

from .harness import GEMM_ONLY, OURS, Case, ForwardBackward, Inputs, gemm_only, training_dtype


def conditional_compression_case(n: int, d: int, v: int, device: str) -> Case:
    dtype = training_dtype(device)

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(rows, d, generator=generator).to(device, dtype) / d**0.5 for rows in (n, v))
        return Inputs([hidden], (weight, torch.randint(v, (n,), generator=generator).to(device)))

    def parts(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return compression_loss(linear_logprob(hidden, weight, target), n)

    def operands() -> tuple[Tensor, Tensor]:
        inputs = job.inputs()
        return inputs.leaves[0], inputs.constants[0]

    job = ForwardBackward(make, reference.conditional_compression, 1e-3 if dtype == torch.float32 else 5e-2)
    return Case(
        op="conditional_compression", shape={"N": n, "D": d, "V": v}, dtype=dtype, inputs="Gaussian states",
        variants={
            GEMM_ONLY: gemm_only(operands, 2),
            OURS: job.variant(lambda: conditional_compression),
            "linear_logprob + compression_loss": job.variant(lambda: parts),
            **job.eager(reference.conditional_compression),
        },
        flops=4.0 * n * v * d, bytes=float(dtype.itemsize * (2 * n + v) * d), check=job.check, rounds=5, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    for shape in ((12, 16, 64),) if quick else ((512, 576, 49152),):
        yield partial(conditional_compression_case, *shape, device)
