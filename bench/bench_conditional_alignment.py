"""conditional_alignment beside its parts: stage 2 from hidden states to the loss and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from autoregembed import (
    AlignmentOutput,
    AlignmentPairs,
    alignment_loss,
    conditional_alignment,
    linear_logprob,
    reference,
)

from .baselines.linear_logprob import trl as trl_logprob
from .harness import GEMM_ONLY, OURS, Case, ForwardBackward, Inputs, gemm_only, training_dtype, version


def conditional_alignment_case(b: int, m: int, length: int, d: int, v: int, device: str) -> Case:
    dtype, s = training_dtype(device), b * (2 + m)
    pairs = AlignmentPairs.in_order([m] * b, device)
    cu_seqlens = torch.arange(0, s * length + 1, length, dtype=torch.int32, device=device)

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, d, generator=generator).to(device, dtype) / d**0.5 for n in (s * length, v))
        target = torch.randint(v, (s * length,), generator=generator).to(device)
        references = -60 + 20 * torch.randn(b, 1 + m, generator=generator).to(device)
        return Inputs([hidden], (weight, target, references[:, 0], references[:, 1:]))

    def fused(hidden: Tensor, weight: Tensor, target: Tensor, r_a: Tensor, r_c: Tensor) -> AlignmentOutput:
        return conditional_alignment(hidden, weight, target, cu_seqlens, pairs, r_a, r_c)

    def parts(hidden: Tensor, weight: Tensor, target: Tensor, r_a: Tensor, r_c: Tensor) -> AlignmentOutput:
        scores = linear_logprob(hidden, weight, target, cu_seqlens=cu_seqlens)
        return alignment_loss(scores[:b], scores[b : 2 * b], scores[2 * b :].view(b, m), r_a, r_c)

    def alignment(logprob: Tensor, r_a: Tensor, r_c: Tensor) -> Tensor:
        scores = logprob.view(s, length).sum(1)
        return reference.alignment_loss(scores[:b], scores[b : 2 * b], scores[2 * b :].view(b, m), r_a, r_c)[0]

    def trl() -> Callable[..., Tensor]:
        """The fused head of TRL's DPO, and this loss on its scores."""
        head = trl_logprob(device)
        return lambda hidden, weight, target, r_a, r_c: alignment(head(hidden, weight, target), r_a, r_c)

    def released(hidden: Tensor, weight: Tensor, target: Tensor, r_a: Tensor, r_c: Tensor) -> Tensor:
        """All logits, and a log-softmax in their dtype."""
        logprob = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
        return alignment(logprob.float(), r_a, r_c)

    def eager(hidden: Tensor, weight: Tensor, target: Tensor, r_a: Tensor, r_c: Tensor) -> Tensor:
        return reference.conditional_alignment(hidden, weight, target, cu_seqlens, pairs, r_a, r_c)[0]

    def operands() -> tuple[Tensor, Tensor]:
        inputs = job.inputs()
        return inputs.leaves[0], inputs.constants[0]

    job = ForwardBackward(make, eager, 1e-3 if dtype == torch.float32 else 5e-2)
    return Case(
        op="conditional_alignment", shape={"B": b, "M": m, "N": s * length, "D": d, "V": v}, dtype=dtype,
        inputs=f"Gaussian states, {length} tokens a sequence",
        variants={
            GEMM_ONLY: gemm_only(operands, 2),
            OURS: job.variant(lambda: fused),
            "linear_logprob + alignment_loss": job.variant(lambda: parts),
            "trl": job.variant(trl, version("trl"), "fused head of its DPO, this loss"),
            "released": job.variant(lambda: released, note="from its description"),
            **job.eager(eager, compiled=False),
        },
        flops=4.0 * s * length * v * d, bytes=float(dtype.itemsize * (2 * s * length + v) * d), check=job.check,
        rounds=5, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    shapes = ((2, 1, 3, 16, 64),) if quick else ((8, 1, 16, 576, 49152),)
    for shape in shapes:
        yield partial(conditional_alignment_case, *shape, device)
