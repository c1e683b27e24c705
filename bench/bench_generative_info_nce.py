"""generative_info_nce, InfoNCE over likelihoods: from the scores of all pairs to the loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import generative_info_nce, reference

from .harness import OURS, Case, ForwardBackward, Inputs


def _eager(scores: Tensor, num_tokens: Tensor) -> Tensor:
    return F.cross_entropy(scores / num_tokens, torch.arange(len(scores), device=scores.device))


def generative_info_nce_case(b: int, p: int, device: str) -> Case:
    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        num_tokens = torch.randint(8, 64, (p,), generator=generator)
        per_token = -3 + torch.randn(b, p, generator=generator)
        return Inputs([(per_token * num_tokens).to(device)], (num_tokens.to(device),))

    job = ForwardBackward(make, lambda scores, n: reference.generative_info_nce(scores, num_tokens=n), 1e-4)
    return Case(
        op="generative_info_nce", shape={"B": b, "P": p}, inputs="Gaussian scores a token, passages of 8 to 63 tokens",
        variants={
            OURS: job.variant(lambda: lambda scores, n: generative_info_nce(scores, num_tokens=n)),
            **job.eager(_eager, compiled=True),
        },
        flops=8.0 * b * p, bytes=8.0 * b * p, check=job.check, rounds=11, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    for b, p in ((8, 16),) if quick else ((64, 64), (256, 2048)):
        yield partial(generative_info_nce_case, b, p, device)
