"""Stage 2's loss, its gradient with respect to every score, and the logged statistics, for any torch device.

Derivation: kernels/triton/alignment_loss.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    query_positive: Tensor,  # a (B,) fp32 or fp64, as all below
    positive_positive: Tensor,  # b (B,)
    query_negatives: Tensor,  # c (B, M)
    reference_positive: Tensor | None,  # r_a (B,)
    reference_negatives: Tensor | None,  # r_c (B, M)
    mask: Tensor | None,  # (B, M) bool
    beta: float,
    temperature: float,
    ref_margin: str,
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, mean s1, mean s2, accuracy, each (), and the loss's gradients of a (B,), b (B,), c (B, M)."""
    a, b, c = query_positive, positive_positive, query_negatives
    mask = torch.ones_like(c, dtype=torch.bool) if mask is None else mask
    pairs = mask.sum().clamp(min=1)
    margin = a[:, None] - c.where(mask, 0.0)
    signed = margin
    if ref_margin != "none":
        assert reference_positive is not None
        assert reference_negatives is not None
        sign = 1 if ref_margin == "add" else -1
        signed = margin + sign * (reference_positive[:, None] - reference_negatives.where(mask, 0.0))
    difference = beta * (a - b)
    s1, s2 = torch.sigmoid(difference.abs()), torch.sigmoid(beta * signed)
    x = (s1[:, None] - s2) / temperature
    if negatives == "independent":
        # F.softplus drops e^−x above x = 20
        loss = torch.logaddexp(x, torch.zeros_like(x)).where(mask, 0.0).sum() / pairs
        dx = torch.sigmoid(x) / pairs
    else:
        joint = F.pad(x.masked_fill(~mask, -torch.inf), (1, 0))  # the row's own e^0
        rows = mask.any(1).sum().clamp(min=1)
        loss = joint.logsumexp(1).sum() / rows
        dx = joint.softmax(1)[:, 1:] / rows
    dx = dx.where(mask, 0.0) * (beta / temperature)
    # σ(−|·|) for 1 − σ: by a difference it would cancel.
    d1 = s1 * torch.sigmoid(-difference.abs()) * difference.sign() * dx.sum(1)
    d2 = dx * s2 * torch.sigmoid(-beta * signed)
    accuracy = (mask & (margin > 0)).sum().to(loss.dtype) / pairs
    means = s1.sum() / max(len(a), 1), s2.where(mask, 0.0).sum() / pairs
    return loss, *means, accuracy, d1 - d2.sum(1), -d1, d2
