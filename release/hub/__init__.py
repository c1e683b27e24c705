"""Fused kernels for text embeddings by conditional likelihood (AutoRegEmbed, arXiv 2502.11401), in Triton.

Every function takes tensors on one GPU and checks nothing. The package autoregembed does; its ops also have a CPU
backend, trainable heads and torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import info_nce as _info_nce
from ._triton import linear_logprob as _linear_logprob
from ._triton import pool_last_k as _pool_last_k
from ._triton import segment_sum as _segment_sum
from ._triton import splice as _splice

__all__ = ["info_nce", "linear_logprob", "pool_last_k", "segment_sum", "splice"]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, scale: float, ignore_index: int) -> Tensor:
        needed = ctx.needs_input_grad[0]
        logprob, u = _linear_logprob.forward(hidden, weight, target, None, None, scale, ignore_index, needed)
        ctx.save_for_backward(u)
        return logprob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        return _linear_logprob.scale_rows(grad, u), None, None, None, None


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, scale: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """log softmax(scale · hidden Wᵀ)[target] of a frozen head, without the (N, V) logits; two GEMMs in all.

    Args:
        hidden: (N, D), float16, bfloat16 or float32.
        weight: (V, D), frozen, the same dtype.
        target: (N,) int64; `ignore_index` gives 0 and no gradient.

    Returns:
        (N,) float32, in nats.
    """
    if weight.requires_grad:
        raise TypeError("weight: got one that requires grad, expected a frozen head (autoregembed trains one as well)")
    return _LinearLogprob.apply(hidden, weight, target, scale, ignore_index)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.length = len(x)
        return _segment_sum.forward(x, cu_seqlens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _segment_sum.backward(grad, *ctx.saved_tensors, ctx.length), None


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of x (N,) over the sequences of a pack, (S,); cu_seqlens (S+1,) holds their boundaries, from 0 to N."""
    return _SegmentSum.apply(x, cu_seqlens)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, passages: Tensor, target: Tensor, passage_ids: Tensor | None, temperature: float
    ) -> Tensor:
        needs = ctx.needs_input_grad
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        fixed = torch.full((), temperature, dtype=work, device=query.device)
        loss, *gradients, _ = _info_nce.forward(query, passages, target, passage_ids, fixed, needs[0], needs[1], False)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both = (
            grad * x if needed else None for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        )
        return (*both, None, None, None)


def info_nce(
    query: Tensor, passages: Tensor, target: Tensor, temperature: float = 0.05, passage_ids: Tensor | None = None
) -> Tensor:
    """Mean InfoNCE over cosine similarities, without the (B, P) matrix.

    Args:
        query: (B, D).
        passages: (P, D).
        target: (B,) int64, each query's positive.
        passage_ids: (P,) int64; a passage with the positive's id is no negative.
    """
    return _InfoNCE.apply(query, passages, target, passage_ids, temperature)


class _PoolLastK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cu_seqlens: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.length = len(hidden)
        return _pool_last_k.forward(hidden, cu_seqlens, k, None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _pool_last_k.backward(grad, *ctx.saved_tensors, None, ctx.length), None, None


def pool_last_k(hidden: Tensor, cu_seqlens: Tensor, k: int) -> Tensor:
    """The last k rows of every text of a pack: hidden (T, D) to (B, k, D)."""
    return _PoolLastK.apply(hidden, cu_seqlens, k)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, z_index: Tensor | None, offset: int
    ) -> Tensor:
        ctx.save_for_backward(cu_seqlens, z_index)
        ctx.options = offset, len(z), z.shape[1], z.dtype
        return _splice.forward(z, embedding, ids, cu_seqlens, z_index, offset, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _splice.backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def splice(
    z: Tensor, embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, z_index: Tensor | None = None, offset: int = 0
) -> Tensor:
    """A decoder's packed input: rows of the frozen embedding, with the K rows of z at `offset` of every sequence.

    Args:
        z: (B, K, D).
        embedding: (V, D), frozen.
        ids: (T,) int64; those at the places of z are not read.
        cu_seqlens: (S+1,).
        z_index: (S,) int64, which z each sequence gets; None: the i-th.
        offset: rows before z, 1 with bos.

    Returns:
        (T, D).
    """
    return _Splice.apply(z, embedding, ids, cu_seqlens, z_index, offset)
