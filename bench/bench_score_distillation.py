"""score_distillation: from embeddings and a teacher's scores to the loss and the gradients of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import reference, score_distillation

from .harness import GEMM_ONLY, OURS, Case, ForwardBackward, Inputs, gemm_only, training_dtype


def _eager(query: Tensor, passages: Tensor, scores: Tensor) -> Tensor:
    return reference.score_distillation(query, passages, scores)


def score_distillation_case(b: int, p: int, d: int, device: str) -> Case:
    dtype = training_dtype(device)

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        sides = [torch.randn(n, d, generator=generator).to(device, dtype) for n in (b, p)]
        likely, own = torch.randn(p, generator=generator), torch.randn(b, p, generator=generator)
        return Inputs(sides, ((-60 + 20 * likely + 8 * own).to(device),))

    def operands() -> tuple[Tensor, Tensor]:
        query, passages = job.inputs().leaves
        return query, passages

    job = ForwardBackward(make, _eager, 1e-3 if dtype == torch.float32 else 5e-2)
    return Case(
        op="score_distillation", shape={"B": b, "P": p, "D": d}, dtype=dtype,
        inputs="Gaussian; 86 % of the scores' variance is the passage's",
        variants={
            GEMM_ONLY: gemm_only(operands, 3),
            OURS: job.variant(lambda: score_distillation),
            **job.eager(_eager, compiled=True),
        },
        flops=6.0 * b * p * d, bytes=float(dtype.itemsize * 2 * (b + p) * d + 4 * b * p), check=job.check, rounds=11,
        device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    for b, p, d in ((8, 16, 32),) if quick else ((256, 256, 576), (1024, 1024, 896)):
        yield partial(score_distillation_case, b, p, d, device)
