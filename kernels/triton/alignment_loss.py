"""Stage 2's loss, its gradient with respect to every score, and the logged statistics in one launch.

Derivation. With d = a − b, s1 = σ(β|d|), s2_j = σ(β((a − c_j) ± (r_a − r_{c_j}))), x_j = (s1 − s2_j)/τ:

    independent: L = Σ softplus(x_ij) / pairs             ∂L/∂x_ij = σ(x_ij) / pairs
    joint:       L = Σ_i log(1 + Σ_j e^{x_ij}) / rows     ∂L/∂x_ij = e^{x_ij} / (1 + Σ_j e^{x_ij}) / rows
    ∂x_j/∂a = (β/τ) (s1(1 − s1) sign d − s2_j(1 − s2_j)),  ∂x_j/∂b = −(β/τ) s1(1 − s1) sign d,
    ∂x_j/∂c_j = (β/τ) s2_j(1 − s2_j)

B·M numbers are few: one program walks over them in a fixed order, so sums need neither atomics nor a second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import launch, log1p


@triton.jit
def _sigmoid(x):
    """σ(x) and σ(x)(1 − σ(x)), neither by a difference."""
    t = tl.exp(-tl.abs(x))
    s = tl.where(x >= 0, 1.0, t) / (1.0 + t)
    return s, t / ((1.0 + t) * (1.0 + t))


@triton.jit(do_not_specialize=["B", "M"])
def _alignment_loss(
    a_ptr, b_ptr, c_ptr, ra_ptr, rc_ptr, mask_ptr,  # (B,), (B,), (B, M), (B,), (B, M), (B, M)
    loss_ptr, s1_ptr, s2_ptr, accuracy_ptr,  # () each
    da_ptr, db_ptr, dc_ptr,  # (B,), (B,), (B, M)
    B, M, beta: tl.float64, temperature: tl.float64,
    SIGN: tl.constexpr, JOINT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """SIGN: 1 for ref_margin="add", −1 for "subtract", 0 for "none"."""
    WORK: tl.constexpr = a_ptr.dtype.element_ty
    beta_w = tl.full((), beta, WORK)
    tau = tl.full((), temperature, WORK)
    lane = tl.arange(0, ROWS)
    j = tl.arange(0, COLS)

    pairs = tl.full((), 0, tl.int32) + B * M
    filled = tl.full((), 0, tl.int32)
    if mask_ptr is not None:
        pairs = tl.full((), 0, tl.int32)
        for start in range(0, B, ROWS):
            i = start + lane
            inside = (i < B)[:, None] & (j < M)[None, :]
            there = tl.load(mask_ptr + i[:, None] * M + j[None, :], mask=inside, other=0) != 0
            some = tl.sum(there.to(tl.int32), 1)
            pairs += tl.sum(some)
            filled += tl.sum((some > 0).to(tl.int32))
    elif M > 0:
        filled = tl.full((), 0, tl.int32) + B
    per_pair = 1.0 / tl.maximum(pairs, 1).to(WORK)
    per_row = 1.0 / tl.maximum(filled, 1).to(WORK)

    loss = tl.full((), 0.0, WORK)
    sum_s1 = tl.full((), 0.0, WORK)
    sum_s2 = tl.full((), 0.0, WORK)
    hits = tl.full((), 0.0, WORK)
    for start in range(0, B, ROWS):
        i = start + lane
        inside = (i < B)[:, None] & (j < M)[None, :]
        at = i[:, None] * M + j[None, :]  # [ROWS, COLS]
        there = inside
        if mask_ptr is not None:
            there = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        a = tl.load(a_ptr + i, mask=i < B, other=0.0)
        d = a - tl.load(b_ptr + i, mask=i < B, other=0.0)
        margin = a[:, None] - tl.load(c_ptr + at, mask=there, other=0.0)
        signed = margin
        if SIGN != 0:
            ra = tl.load(ra_ptr + i, mask=i < B, other=0.0)
            signed = margin + SIGN * (ra[:, None] - tl.load(rc_ptr + at, mask=there, other=0.0))
        s1, s1_grad = _sigmoid(beta_w * tl.abs(d))
        s2, s2_grad = _sigmoid(beta_w * signed)
        x = (s1[:, None] - s2) / tau
        if JOINT:
            x = tl.where(there, x, -float("inf"))
            top = tl.maximum(tl.max(x, 1), 0.0)
            e = tl.exp(x - top[:, None])
            s = tl.sum(e, 1)
            lse = tl.where(top == 0.0, log1p(s), top + tl.log(tl.exp(-top) + s))
            loss += tl.sum(tl.where(i < B, lse, 0.0)) * per_row
            dx = e / (tl.exp(-top) + s)[:, None] * per_row
        else:
            softplus = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
            loss += tl.sum(tl.where(there, softplus, 0.0)) * per_pair
            dx, _ = _sigmoid(x)
            dx = dx * per_pair
        dx = tl.where(there, dx, 0.0) * (beta_w / tau)
        d1 = s1_grad * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)) * tl.sum(dx, 1)
        d2 = dx * s2_grad
        tl.store(da_ptr + i, d1 - tl.sum(d2, 1), mask=i < B)
        tl.store(db_ptr + i, -d1, mask=i < B)
        tl.store(dc_ptr + at, d2, mask=inside)
        sum_s1 += tl.sum(tl.where(i < B, s1, 0.0))
        sum_s2 += tl.sum(tl.where(there, s2, 0.0))
        hits += tl.sum(tl.where(there & (margin > 0), 1.0, 0.0))
    tl.store(loss_ptr, loss)
    tl.store(s1_ptr, sum_s1 / tl.maximum(B, 1).to(WORK))
    tl.store(s2_ptr, sum_s2 * per_pair)
    tl.store(accuracy_ptr, hits * per_pair)


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
    b, m = query_negatives.shape
    scalars = [query_positive.new_empty(()) for _ in range(4)]
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format)
                 for x in (query_positive, positive_positive, query_negatives)]  # fmt: skip
    t = tiles.tile("alignment_loss", query_positive.device)
    cols = triton.next_power_of_2(max(m, 1))
    sign = {"add": 1, "subtract": -1, "none": 0}[ref_margin]
    given = (query_positive, positive_positive, query_negatives)
    given += (reference_positive, reference_negatives) if sign else (None, None)
    launch(
        _alignment_loss, 1, query_positive.device,
        *(None if x is None else x.contiguous() for x in (*given, mask)), *scalars, *gradients,
        b, m, beta, temperature,
        SIGN=sign, JOINT=negatives == "joint", ROWS=max(1, t.rows // cols), COLS=cols, **t.options,
    )  # fmt: skip
    return (*scalars, *gradients)  # type: ignore[return-value]
