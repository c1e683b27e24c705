"""compression_loss: from log-probabilities of whole targets to the loss and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import compression_loss

from .harness import OURS, Case, ForwardBackward, Inputs


def _eager(logprob: Tensor, num_tokens: Tensor) -> Tensor:
    return -logprob.sum() / num_tokens.sum()


def compression_loss_case(s: int, device: str) -> Case:
    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        num_tokens = torch.randint(8, 64, (s,), generator=generator)
        logprob = -3 * num_tokens * (0.5 + torch.rand(s, generator=generator))
        return Inputs([logprob.to(device)], (num_tokens.to(device),))

    job = ForwardBackward(make, _eager, 1e-5)
    return Case(
        op="compression_loss", shape={"S": s}, inputs="targets of 8 to 63 tokens",
        variants={OURS: job.variant(lambda: compression_loss), **job.eager(_eager, compiled=True)},
        flops=2.0 * s, bytes=16.0 * s, check=job.check, rounds=11, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    for s in (8,) if quick else (64, 4096):
        yield partial(compression_loss_case, s, device)
