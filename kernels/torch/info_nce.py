"""Contrastive loss over cosine similarities and its gradients by chunks of rows, for any torch device.

Derivation: kernels/triton/info_nce.py. A chunk of the (B, P) similarities is all that is ever there of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk

EPS = 1e-12  # of torch.nn.functional.normalize


def fits_one_chunk(query: Tensor, passages: Tensor) -> bool:
    """Whether the (B, P) similarities of query (B, D) and passages (P, D) are one chunk."""
    return rows_per_chunk(len(query), len(passages), query.element_size(), query.device) >= len(query)


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / max(|x|, EPS), (R, D), and |x|, (R, 1)."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / length.clamp(min=EPS), length


def project(unit: Tensor, length: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x from that of its unit vector, both (R, D); `grad` is overwritten."""
    along = (unit * grad).sum(1, keepdim=True).where(length > EPS, 0.0)
    return grad.addcmul_(unit, along, value=-1).div_(length.clamp(min=EPS))


def forward(
    query: Tensor,  # (B, D), B > 0
    passages: Tensor,  # (P, D), P > 0
    target: Tensor,  # (B,) int64 in [0, P)
    passage_ids: Tensor | None,  # (P,) int64
    temperature: Tensor,  # ()
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    (b, d), n = query.shape, len(passages)
    (q, q_length), (p, p_length) = normalize(query), normalize(passages)
    d_q, d_p = query.new_empty(b if query_gradient else 0, d), query.new_zeros(n if passage_gradient else 0, d)
    loss, d_temperature = query.new_zeros(()), query.new_zeros(())
    step = rows_per_chunk(b, n, query.element_size(), query.device)
    for i in range(0, b, step):
        rows = slice(i, min(i + step, b))
        y = target[rows, None]
        cos = q[rows] @ p.T
        cos_y = cos.gather(1, y)
        logits = cos / temperature
        if passage_ids is not None:
            duplicate = passage_ids[None, :] == passage_ids[y]
            logits.masked_fill_(duplicate.scatter_(1, y, False), -torch.inf)
        top = logits.amax(1, keepdim=True)
        # The target is left out of the sum: 1 − softmax[target] as a difference would cancel.
        e = logits.sub_(top).exp_().scatter_(1, y, 0.0)
        others = e.sum(1, keepdim=True)
        x_y = cos_y / temperature - top
        total = others + x_y.exp()
        loss += (total.log() - x_y).sum()
        if temperature_gradient:
            d_temperature -= (e / total * (cos - cos_y)).sum()
        if query_gradient or passage_gradient:
            e.scatter_(1, y, -others).div_(total * temperature * b)
        if query_gradient:
            torch.mm(e, p, out=d_q[rows])
        if passage_gradient:
            d_p.addmm_(e.T, q[rows])
    d_query = project(q, q_length, d_q) if query_gradient else d_q
    d_passages = project(p, p_length, d_p) if passage_gradient else d_p
    return loss / b, d_query, d_passages, d_temperature / (b * temperature.square())
