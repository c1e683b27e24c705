"""Contrastive loss over cosine similarities and its gradients by chunks of rows, for any torch device.

Derivation: kernels/triton/info_nce.py. A chunk of the (B, P) similarities is all that is ever there of them; with other
directions, of those of all of them beside each other.
"""

from __future__ import annotations

from typing import NamedTuple

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


class _Block(NamedTuple):
    """Similarities in one direction; gradients of unit vectors are added to d_rows and d_columns."""

    rows: Tensor  # (B, D)
    columns: Tensor  # (C, D)
    ids: Tensor | None  # (C,)
    d_rows: Tensor | None  # (B, D)
    d_columns: Tensor | None  # (C, D)


def _add_rows(
    blocks: list[_Block],
    rows: slice,
    y: Tensor,  # (R, 1), the positive's column in the first block
    own: Tensor | None,  # (R,) ids of rows
    temperature: Tensor,
    copies: int,  # of the positive in the partition function
    margin: float | None,
    share: float,  # of a row in the loss
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Σ −logprob of some rows, and Σ softmax · (cos − cos_y); adds to the gradients of the blocks."""
    parts = [block.rows[rows] @ block.columns.T for block in blocks]
    cos = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    del parts
    cos_y = cos.gather(1, y)
    logits = cos / temperature
    if own is not None:
        ids = torch.cat([block.ids for block in blocks if block.ids is not None])
        logits.masked_fill_((ids[None, :] == own[:, None]).scatter_(1, y, False), -torch.inf)
    if margin is not None:
        logits.masked_fill_((cos > cos_y + margin).scatter_(1, y, False), -torch.inf)
    top = logits.amax(1, keepdim=True)
    # The target is left out of the sum: 1 − softmax[target] as a difference would cancel.
    e = logits.sub_(top).exp_().scatter_(1, y, 0.0)
    others = e.sum(1, keepdim=True)
    x_y = cos_y / temperature - top
    total = others + copies * x_y.exp()
    loss, excess = (total.log() - x_y).sum(), total.new_zeros(())
    if temperature_gradient:
        excess = (e / total * (cos - cos_y)).sum()
    if any(x is not None for block in blocks for x in (block.d_rows, block.d_columns)):
        e.scatter_(1, y, -others).mul_(share / (total * temperature))
    for block, part in zip(blocks, e.split([len(block.columns) for block in blocks], 1), strict=True):
        if block.d_rows is not None:
            block.d_rows[rows].addmm_(part, block.columns)
        if block.d_columns is not None:
            block.d_columns.addmm_(part.T, block.rows[rows])
    return loss, excess


def forward(
    query: Tensor,  # (B, D), B > 0
    passages: Tensor,  # (P, D), P > 0
    target: Tensor,  # (B,) int64 in [0, P)
    passage_ids: Tensor | None,  # (P,) int64
    temperature: Tensor,  # ()
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
    directions: str = "query_to_doc",  # and others, after commas
    per_direction: bool = False,
    margin: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    b, chosen = len(query), directions.split(",")
    (q, q_length), (p, p_length) = normalize(query), normalize(passages)
    d_q, d_p = torch.zeros_like(q) if query_gradient else None, torch.zeros_like(p) if passage_gradient else None
    ids = own = None
    if passage_ids is not None or len(chosen) > 1:
        ids = torch.arange(len(p), device=p.device) if passage_ids is None else passage_ids
        own = ids[target]
    left, right = {"query": (q, d_q)}, {"query": (q, own, d_q), "doc": (p, ids, d_p)}
    if any(direction.startswith("doc") for direction in chosen):
        left["doc"] = p[target], torch.zeros_like(q) if passage_gradient else None
    loss, excess = query.new_zeros(()), query.new_zeros(())
    for several in [[direction] for direction in chosen] if per_direction else [chosen]:
        blocks = []
        for direction in several:
            of_rows, _, of_columns = direction.partition("_to_")
            (rows, d_rows), (columns, column_ids, d_columns) = left[of_rows], right[of_columns]
            blocks.append(_Block(rows, columns, column_ids, d_rows, d_columns))
        positive = target if several[0] == "query_to_doc" else torch.arange(b, device=target.device)
        copies = 1 + (len(several) > 1 and "doc_to_query" in several)
        share = 1 / b / (len(chosen) if per_direction else 1)
        step = rows_per_chunk(b, sum(len(x.columns) for x in blocks), query.element_size(), query.device)
        for i in range(0, b, step):
            at = slice(i, min(i + step, b))
            of_rows_ids = None if own is None else own[at]
            found = _add_rows(
                blocks, at, positive[at, None], of_rows_ids, temperature, copies, margin, share, temperature_gradient
            )  # fmt: skip
            loss += share * found[0]
            excess -= share * found[1]
    d_positives = left["doc"][1] if "doc" in left else None
    if d_p is not None and d_positives is not None:
        d_p.index_put_((target,), d_positives, accumulate=True)
    d_query = query.new_empty(0, query.shape[1]) if d_q is None else project(q, q_length, d_q)
    d_passages = passages.new_empty(0, passages.shape[1]) if d_p is None else project(p, p_length, d_p)
    return loss, d_query, d_passages, excess / temperature.square()
