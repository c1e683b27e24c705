"""alignment_loss: from scores to the loss, its gradients and its statistics. On a GPU, launches dominate the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import alignment_loss, reference

from .harness import OURS, Case, ForwardBackward, Inputs, our_impl


def _eager(a: Tensor, b: Tensor, c: Tensor, r_a: Tensor, r_c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    margin = a[:, None] - c
    s1 = torch.sigmoid(0.1 * (a - b).abs())
    s2 = torch.sigmoid(0.1 * (margin + r_a[:, None] - r_c))
    loss = F.softplus((s1[:, None] - s2) / 0.1).mean()
    return loss, s1.mean(), s2.mean(), (margin > 0).float().mean()


def alignment_loss_case(b: int, m: int, device: str, *, curve: str | None = None) -> Case:
    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        scores = [-60 + 20 * torch.randn(*shape, generator=generator) for shape in ((b,), (b,), (b, m), (b,), (b, m))]
        scores = [s.to(device) for s in scores]
        return Inputs(scores[:3], tuple(scores[3:]))

    job = ForwardBackward(make, lambda *scores: reference.alignment_loss(*scores)[0], 1e-4)
    ours = job.variant(lambda: partial(alignment_loss, impl=our_impl()))
    return Case(
        op="alignment_loss", shape={"B": b, "M": m}, inputs="Gaussian scores; about 0.01 % of a training step",
        variants={OURS: ours, **job.eager(_eager, compiled=True)},
        flops=30.0 * b * m, bytes=16.0 * (b + b * m), check=job.check, rounds=11, device=device, curve=curve,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    for b, m in ((8, 2),) if quick else ((64, 1), (64, 7), (1024, 15)):
        yield partial(alignment_loss_case, b, m, device)
    for m in () if quick else (1, 4, 16, 64):
        yield partial(alignment_loss_case, 256, m, device, curve="M")
