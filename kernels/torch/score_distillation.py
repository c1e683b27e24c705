"""Distillation of a teacher's scores into cosines, and its gradients, for any torch device.

Derivation: kernels/triton/score_distillation.py. What is (B, P) here lies in memory as a whole, as the scores do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoregembed.kernels.torch.info_nce import normalize, project


def _log_softmax(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Over what the mask keeps; −inf elsewhere."""
    x = x.masked_fill(~mask, -torch.inf)
    return (x - x.logsumexp(dim, keepdim=True)).masked_fill_(~mask, -torch.inf)


def _teacher(
    scores: Tensor,
    mask: Tensor,
    target: Tensor | None,
    log_prior: Tensor | None,
    teacher_temperature: float,
    mixture: float,
    batch_marginal: bool,
) -> tuple[Tensor, Tensor]:
    """T and T' (B, P), 0 where the mask keeps nothing."""
    s = scores / teacher_temperature
    log_columns = _log_softmax(s, mask, 0)
    if batch_marginal:
        s = log_columns
    elif log_prior is not None:
        s = s - log_prior / teacher_temperature
    rows, columns = _log_softmax(s, mask, 1).exp_(), log_columns.exp_()
    if target is not None:
        known = target >= 0
        positive = torch.zeros_like(rows).scatter_(1, target.where(known, 0)[:, None], known[:, None].to(rows.dtype))
        owners = positive.sum(0)
        rows = torch.where(known[:, None], mixture * rows + (1 - mixture) * positive, rows)
        shared = positive / owners.clamp(min=1)
        columns = torch.where(owners > 0, mixture * columns + (1 - mixture) * shared, columns)
    return rows, columns


def forward(
    query: Tensor,  # (B, D)
    passages: Tensor,  # (P, D)
    scores: Tensor,  # (B, P)
    mask: Tensor | None,  # (B, P) bool
    target: Tensor | None,  # (B,) int64, −1 for none
    log_prior: Tensor | None,  # (P,)
    temperature: Tensor,  # ()
    teacher_temperature: float,
    mixture: float,
    batch_marginal: bool,
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    (q, q_length), (p, p_length) = normalize(query), normalize(passages)
    d_query, d_passages = query.new_empty(0, query.shape[1]), query.new_empty(0, query.shape[1])
    x = q @ p.T / temperature
    rows, columns = _teacher(scores, mask, target, log_prior, teacher_temperature, mixture, batch_marginal)
    loss, g = x.new_zeros(()), torch.zeros_like(x)
    for weights, dim in ((rows, 1), (columns, 0)):
        log_p = _log_softmax(x, mask, dim)
        count = 2 * mask.any(dim).sum().clamp(min=1)
        loss -= (weights * log_p.where(mask, 0.0)).sum() / count
        g += log_p.exp_().sub_(weights) / count
    d_temperature = -(g * x).sum() / temperature if temperature_gradient else torch.zeros_like(temperature)
    g /= temperature
    if query_gradient:
        d_query = project(q, q_length, g @ p)
    if passage_gradient:
        d_passages = project(p, p_length, g.T @ q)
    return loss, d_query, d_passages, d_temperature
