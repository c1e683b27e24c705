"""Contrastive loss over cosine similarities by chunks of rows, for any torch device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk


class _Similarities(torch.autograd.Function):
    """q pᵀ whose gradients too are computed without autocast."""

    @staticmethod
    def forward(ctx, q: Tensor, p: Tensor) -> Tensor:  # (B, D), (P, D) -> (B, P)
        ctx.save_for_backward(q, p)
        return q @ p.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (q, p), (grad,) = ctx.saved_tensors, grads
        for_q, for_p = ctx.needs_input_grad
        with torch.autocast(q.device.type, enabled=False):
            return grad @ p if for_q else None, grad.T @ q if for_p else None


def fits_one_chunk(query: Tensor, passages: Tensor) -> bool:
    """Whether the (B, P) similarities of query (B, D) and passages (P, D) are one chunk."""
    return rows_per_chunk(len(query), len(passages), query.element_size(), query.device) >= len(query)


def forward(
    query: Tensor,  # (B, D), B > 0
    passages: Tensor,  # (P, D), P > 0
    target: Tensor,  # (B,) int64 in [0, P)
    passage_ids: Tensor | None,  # (P,) int64
    temperature: float,
) -> Tensor:
    """The loss (). Each chunk is recomputed in the backward unless it is the only one."""
    q, p = F.normalize(query, dim=-1), F.normalize(passages, dim=-1)

    def loss_of(q: Tensor, p: Tensor, y: Tensor) -> Tensor:
        logits = _Similarities.apply(q, p) / temperature
        if passage_ids is not None:
            duplicate = passage_ids[None, :] == passage_ids[y][:, None]
            logits = logits.masked_fill(duplicate.scatter(1, y[:, None], False), -torch.inf)
        return F.cross_entropy(logits, y, reduction="sum")

    step = rows_per_chunk(len(q), len(p), q.element_size(), q.device)
    if step >= len(q):
        return loss_of(q, p, target) / len(q)
    chunks = zip(q.split(step), target.split(step), strict=True)
    return torch.stack([checkpoint(loss_of, rows, p, y, use_reentrant=False) for rows, y in chunks]).sum() / len(q)
