"""Distillation of a teacher's scores into cosines, and both of its gradients.

Derivation. x_ij = q̂_i·p̂_j / τ, s_ij = scores_ij / τ_g, R rows and C columns with a pair that the mask keeps,
T = softmax_j(s − marginal_j) and T' = softmax_i(s), each mixed with the known positives. With p and p' the softmax of x
over j and over i, all over kept pairs alone,

    loss = 1/(2R) Σ_ij T_ij (lse_i − x_ij) + 1/(2C) Σ_ij T'_ij (lse'_j − x_ij)         no term is negative
    E    = (p − T) + R/C (p' − T')        ∂loss/∂x = E / (2R)
    ∂loss/∂q̂ = E P̂ / (2Rτ)                ∂loss/∂p̂ = Eᵀ Q̂ / (2Rτ)            ∂loss/∂τ = −Σ E x / (2Rτ)

The scores are a (B, P) matrix in memory, so x is one too: one library GEMM forms it, `_lse` walks once over both by
columns and once by rows, `_gradient` once more for the loss and E, and two GEMMs make the gradients. E is of order 1,
so that 16 bits hold it. Counts stay on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import work_dtype
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.info_nce import normalize, project
from autoregembed.kernels.triton.primitives import dense, finite_shift, launch, matmul


@triton.jit
def _add(running_max, running_sum, x):
    """A running maximum and Σ e^{x − maximum} (OUTER,) with the columns of x (OUTER, INNER) added."""
    new_max = tl.maximum(running_max, tl.max(x, 1))
    shift = finite_shift(new_max)
    return new_max, running_sum * tl.exp(running_max - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)


@triton.jit(do_not_specialize=["outer", "inner"])
def _lse(
    z_ptr, s_ptr, mask_ptr,  # (outer, inner), the strides below: q·p, the scores, bool or None
    outer_norm_ptr, inner_norm_ptr, inner_shift_ptr,  # (outer,), (inner,): factors of z; (inner,) or None
    z_lse_ptr, s_lse_ptr, count_ptr,  # (outer,), count int32
    outer, inner, outer_stride, inner_stride, teacher: tl.float64,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """logsumexp over the kept pairs of every outer index, of z and of s / teacher − shift, and how many there are."""
    WORK: tl.constexpr = z_ptr.dtype.element_ty
    tau = tl.full((), teacher, WORK)
    i = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    norm = tl.load(outer_norm_ptr + i, mask=i < outer, other=0.0)
    z_max = tl.full((OUTER,), -float("inf"), WORK)
    z_sum = tl.zeros((OUTER,), WORK)
    s_max = tl.full((OUTER,), -float("inf"), WORK)
    s_sum = tl.zeros((OUTER,), WORK)
    count = tl.zeros((OUTER,), tl.int32)
    for start in range(0, inner, INNER):
        j = start + tl.arange(0, INNER)
        at = i.to(tl.int64)[:, None] * outer_stride + j.to(tl.int64)[None, :] * inner_stride
        kept = (i < outer)[:, None] & (j < inner)[None, :]
        if mask_ptr is not None:
            kept = kept & (tl.load(mask_ptr + at, mask=kept, other=0) != 0)
        z = tl.load(z_ptr + at, mask=kept, other=0.0) * norm[:, None]
        z = z * tl.load(inner_norm_ptr + j, mask=j < inner, other=0.0)[None, :]
        s = tl.load(s_ptr + at, mask=kept, other=0.0) / tau
        if inner_shift_ptr is not None:
            s = s - tl.load(inner_shift_ptr + j, mask=j < inner, other=0.0)[None, :]
        z_max, z_sum = _add(z_max, z_sum, tl.where(kept, z, -float("inf")))
        s_max, s_sum = _add(s_max, s_sum, tl.where(kept, s, -float("inf")))
        count += tl.sum(kept.to(tl.int32), 1)
    z_lse = finite_shift(z_max) + tl.log(z_sum)
    s_lse = finite_shift(s_max) + tl.log(s_sum)
    tl.store(z_lse_ptr + i, tl.where(count > 0, z_lse, 0.0), mask=i < outer)
    tl.store(s_lse_ptr + i, tl.where(count > 0, s_lse, 0.0), mask=i < outer)
    tl.store(count_ptr + i, count, mask=i < outer)


@triton.jit(do_not_specialize=["B", "P"])
def _gradient(
    z_ptr, e_ptr, s_ptr, mask_ptr,  # (B, P); e may be z, mask may be None
    row_norm_ptr, col_norm_ptr,  # (B,), (P,): factors of z
    z_row_ptr, z_col_ptr, s_row_ptr, s_col_ptr, shift_ptr,  # (B,), (P,), (B,), (P,) from _lse; (P,) or None
    target_ptr, owners_ptr,  # (B,), (P,), or None
    ratio_ptr,  # () R / C
    loss_ptr, slope_ptr,  # (B,): the row's terms of 2R · loss, and of Σ E x
    B, P, teacher: tl.float64, mixture: tl.float64,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WORK: tl.constexpr = z_ptr.dtype.element_ty
    tau = tl.full((), teacher, WORK)
    share = tl.full((), mixture, WORK)
    row = tl.program_id(0)
    origin = tl.cast(row, tl.int64) * P
    ratio = tl.load(ratio_ptr)
    norm = tl.load(row_norm_ptr + row)
    z_row = tl.load(z_row_ptr + row)
    s_row = tl.load(s_row_ptr + row)
    y = tl.full((), -1, tl.int64)
    bad = tl.full((), 0.0, WORK)
    if target_ptr is not None:
        y = tl.load(target_ptr + row)
        valid = (y >= -1) & (y < P)
        if mask_ptr is not None:
            there = tl.load(mask_ptr + origin + y, mask=valid & (y >= 0), other=0) != 0
            valid = valid & (there | (y < 0))
        bad = tl.where(valid, 0.0, float("nan")).to(WORK)
    loss = tl.zeros((BLOCK,), WORK)
    slope = tl.zeros((BLOCK,), WORK)
    for start in range(0, P, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < P
        kept = inside
        if mask_ptr is not None:
            kept = kept & (tl.load(mask_ptr + origin + j, mask=inside, other=0) != 0)
        z = tl.load(z_ptr + origin + j, mask=kept, other=0.0) * norm
        z = z * tl.load(col_norm_ptr + j, mask=inside, other=0.0)
        s = tl.load(s_ptr + origin + j, mask=kept, other=0.0) / tau
        by_row = s
        if shift_ptr is not None:
            by_row = s - tl.load(shift_ptr + j, mask=inside, other=0.0)
        t_row = tl.exp(by_row - s_row)
        t_col = tl.exp(s - tl.load(s_col_ptr + j, mask=inside, other=0.0))
        if target_ptr is not None:
            hit = tl.where(j == y, 1.0, 0.0).to(WORK)
            owners = tl.load(owners_ptr + j, mask=inside, other=0.0)
            t_row = tl.where(y >= 0, share * t_row + (1.0 - share) * hit, t_row)
            t_col = tl.where(owners > 0, share * t_col + (1.0 - share) * (hit / tl.maximum(owners, 1.0)), t_col)
        along_row = z - z_row
        along_col = z - tl.load(z_col_ptr + j, mask=inside, other=0.0)
        loss += tl.where(kept, -(t_row * along_row + ratio * t_col * along_col), 0.0)
        if GRADIENT:
            e = (tl.exp(along_row) - t_row) + ratio * (tl.exp(along_col) - t_col)
            e = tl.where(kept, e, 0.0)
            slope += e * z
            tl.store(e_ptr + origin + j, (e + bad).to(e_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, tl.sum(loss) + bad)
    tl.store(slope_ptr + row, tl.sum(slope) + bad)


def forward(
    query: Tensor,  # (B, D)
    passages: Tensor,  # (P, D)
    scores: Tensor,  # (B, P) fp32 (fp64 for fp64)
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
    (b, d), p = query.shape, len(passages)
    device, work = query.device, work_dtype(query)
    query, passages, scores = dense(query), dense(passages), scores.contiguous()
    mask = None if mask is None else mask.contiguous()
    q_inverse, q_unit = normalize(query, passage_gradient)
    p_inverse, p_unit = normalize(passages, query_gradient)
    q_scale = q_inverse / temperature
    z = matmul(query, passages.t(), query.new_empty(b, p, dtype=work))
    (z_row, s_row), (z_col, s_col) = query.new_empty(2, b, dtype=work), query.new_empty(2, p, dtype=work)
    in_row, in_col = (torch.empty(n, dtype=torch.int32, device=device) for n in (b, p))
    c, r = tiles.tile("distillation_columns", device), tiles.tile("distillation_rows", device)
    launch(
        _lse, triton.cdiv(p, c.rows), device,
        z, scores, mask, p_inverse, q_scale, None, z_col, s_col, in_col, p, b, 1, p, teacher_temperature,
        OUTER=c.rows, INNER=c.cols, **c.options,
    )  # fmt: skip
    shift = s_col if batch_marginal else None if log_prior is None else log_prior / teacher_temperature
    launch(
        _lse, triton.cdiv(b, r.rows), device,
        z, scores, mask, q_scale, p_inverse, shift, z_row, s_row, in_row, b, p, p, 1, teacher_temperature,
        OUTER=r.rows, INNER=r.cols, **r.options,
    )  # fmt: skip
    rows, columns = ((n > 0).sum().clamp(min=1).to(work) for n in (in_row, in_col))
    owners = None
    if target is not None:
        target = target.contiguous()
        known = ((target >= 0) & (target < p)).to(work)
        owners = known.new_zeros(p).index_add_(0, target.clamp(0, p - 1), known)
    loss, slope = query.new_empty(2, b, dtype=work)
    e = z if query.dtype == work else query.new_empty(b, p)
    launch(
        _gradient, b, device,
        z, e, scores, mask, q_scale, p_inverse, z_row, z_col, s_row, s_col, shift, target, owners,
        rows / columns, loss, slope, b, p, teacher_temperature, mixture,
        GRADIENT=query_gradient or passage_gradient or temperature_gradient, BLOCK=r.cols, **r.options,
    )  # fmt: skip
    d_query, d_passages = query.new_empty(0, d), query.new_empty(0, d)
    scale = 2 * rows * temperature
    if query_gradient:
        d_query = project(query, q_inverse, matmul(e, p_unit, query.new_empty(b, d, dtype=work)), scale, 1.0)
    if passage_gradient:
        g = matmul(e.t(), q_unit, query.new_empty(p, d, dtype=work))
        d_passages = project(passages, p_inverse, g, scale, 1.0)
    d_temperature = -slope.sum() / scale if temperature_gradient else torch.zeros_like(temperature)
    return loss.sum() / (2 * rows), d_query, d_passages, d_temperature
