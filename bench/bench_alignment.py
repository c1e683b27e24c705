"""The alignment loss: scores to loss, gradient of every score and statistics; launch-bound, so time is what counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import alignment_loss, reference

from .harness import OURS, Case, Variant, relative_error, replay


def _eager(a: Tensor, b: Tensor, c: Tensor, r_a: Tensor, r_c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    margin = a[:, None] - c
    s1 = torch.sigmoid(0.1 * (a - b).abs())
    s2 = torch.sigmoid(0.1 * (margin + r_a[:, None] - r_c))
    loss = F.softplus((s1[:, None] - s2) / 0.1).mean()
    return loss, s1.mean(), s2.mean(), (margin > 0).float().mean()


def alignment_case(b: int, m: int, device: str, *, rounds: int = 11, curve: str | None = None) -> Case:
    generator = torch.Generator().manual_seed(0)
    scores = [-60 + 20 * torch.randn(*shape, generator=generator) for shape in ((b,), (b,), (b, m), (b,), (b, m))]
    scores = [s.to(device) for s in scores]

    def call(loss: Callable) -> Callable:
        def run():
            leaves = [s.detach().requires_grad_() for s in scores[:3]]
            out = loss(*leaves, *scores[3:])
            out[0].backward()
            return out[0].detach(), *(x.grad for x in leaves)

        return run

    def check(name: str, outputs: tuple[Tensor, ...]) -> float:
        leaves = [s.double().requires_grad_() for s in scores[:3]]
        loss = reference.alignment_loss(*leaves, *(s.double() for s in scores[3:]))[0]
        exact = (loss.detach(), *torch.autograd.grad(loss, leaves))
        error = max(relative_error(x, y) for x, y in zip(outputs, exact, strict=True))
        assert error <= 1e-4, f"relative error {error:.1e}, expected 1e-4"
        return error

    variants = {
        OURS: Variant(lambda: call(alignment_loss)),
        "eager": Variant(lambda: call(_eager), torch.__version__),
        "compiled": Variant(lambda: call(torch.compile(_eager, dynamic=False)), torch.__version__),
    }
    values = 4 * b + 4 * b * m
    return Case(
        suite="head", op="alignment", job="gradient", shape={"B": b, "M": m}, dtype="float32", inputs="Gaussian scores",
        variants=variants, flops=30.0 * b * m, bytes=4.0 * values, check=check, rounds=rounds, device=device,
        curve=curve,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    if quick:
        yield partial(alignment_case, 8, 2, device, rounds=3)
        return
    for b, m in ((64, 1), (64, 7), (1024, 15)):
        yield partial(alignment_case, b, m, device)
    for m in (1, 4, 16, 64):
        yield partial(alignment_case, 256, m, device, curve="M")


def test_alignment(variant, benchmark):
    replay(variant, benchmark)
