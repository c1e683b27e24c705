"""Contrastive loss over cosine similarities and both of its gradients without a (B, P) matrix.

Derivation. q̂ = q/|q|, p̂ = p/|p|, z_ip = q̂_i·p̂_p / τ, loss = −(1/B) Σ_i logprob_i. With E_ip = onehot − softmax:

    ∂loss/∂q̂ = −(1/(Bτ)) E P̂          ∂loss/∂p̂ = −(1/(Bτ)) Eᵀ Q̂          ∂loss/∂x = (g − x̂ (x̂·g)) / |x|

The loss is a scalar and both operands are trained, so both gradients are formed in the forward: with F = 2·B·P·D that
is 3F, and a chunk of rows of E is all that is ever there of it. Logits come from the operands as they are, with
1/|q| and 1/|p| as fp32 factors on fp32 products, so that 16-bit inputs lose nothing on the way to the loss; the two
gradient GEMMs read q̂ and p̂ rounded to the inputs' dtype. A passage with the positive's id that is not the positive
leaves the row (a duplicate is no negative).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk, work_dtype
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.linear_logprob import epilogue, score
from autoregembed.kernels.triton.primitives import Logits, dense, launch, matmul

EPS = 1e-12  # of torch.nn.functional.normalize
NEVER = -(2**31)  # ignore_index: every target counts


@triton.jit(do_not_specialize=["rows"])
def _unit(x_ptr, inverse_ptr, unit_ptr, rows, D, stride, eps: tl.float64, BLOCK: tl.constexpr):
    """inverse = 1 / max(|x|, eps) per row and, where asked for, unit = inverse · x."""
    WORK: tl.constexpr = inverse_ptr.dtype.element_ty
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride + d, mask=d < D, other=0.0).to(WORK)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x)), tl.full((), eps, WORK))
    tl.store(inverse_ptr + row, inverse)
    if unit_ptr is not None:
        unit = (x * inverse).to(unit_ptr.dtype.element_ty)
        tl.store(unit_ptr + tl.cast(row, tl.int64) * D + d, unit, mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _unit_backward(
    x_ptr, inverse_ptr, g_ptr, out_ptr, rows, D, stride, factor: tl.float64, eps: tl.float64, BLOCK: tl.constexpr
):
    """out = factor · (g − x̂ (x̂·g)) / |x|; without the projection where |x| ≤ eps, as autograd has it."""
    WORK: tl.constexpr = inverse_ptr.dtype.element_ty
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inverse = tl.load(inverse_ptr + row)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride + d, mask=d < D, other=0.0).to(WORK) * inverse
    g = tl.load(g_ptr + tl.cast(row, tl.int64) * D + d, mask=d < D, other=0.0)
    along = tl.sum(x * g)
    along = tl.where(inverse * tl.full((), eps, WORK) < 1.0, along, 0.0)
    out = (g - x * along) * (inverse * tl.full((), factor, WORK))
    tl.store(out_ptr + tl.cast(row, tl.int64) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def _normalize(x: Tensor, with_unit: bool) -> tuple[Tensor, Tensor | None]:
    """1/|x| (R,) in the working dtype, and x̂ (R, D) in x's."""
    rows, d = x.shape
    inverse = x.new_empty(rows, dtype=work_dtype(x))
    unit = x.new_empty(rows, d) if with_unit else None
    t = tiles.tile("unit", x.device)
    launch(
        _unit, rows, x.device, x, inverse, unit, rows, d, x.stride(0), EPS,
        BLOCK=triton.next_power_of_2(d), **t.options,
    )  # fmt: skip
    return inverse, unit


def _project(x: Tensor, inverse: Tensor, g: Tensor, factor: float) -> Tensor:
    rows, d = x.shape
    out = x.new_empty(rows, d)
    t = tiles.tile("unit", x.device)
    launch(
        _unit_backward, rows, x.device, x, inverse, g, out, rows, d, x.stride(0), factor, EPS,
        BLOCK=triton.next_power_of_2(d), **t.options,
    )  # fmt: skip
    return out


def forward(
    query: Tensor,  # (B, D), B > 0
    passages: Tensor,  # (P, D)
    target: Tensor,  # (B,) int64
    passage_ids: Tensor | None,  # (P,) int64
    temperature: float,
    query_gradient: bool,
    passage_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D) and passages (P, D), each (0, D) unless asked for."""
    (b, d), p = query.shape, len(passages)
    query, passages, target = dense(query), dense(passages), target.contiguous()
    passage_ids = None if passage_ids is None else passage_ids.contiguous()
    q_inverse, q_unit = _normalize(query, passage_gradient)
    p_inverse, p_unit = _normalize(passages, query_gradient)
    d_query, d_passages = query.new_empty(0, d), passages.new_empty(0, d)
    work = work_dtype(query)
    if not (query_gradient or passage_gradient) and work != torch.float64:
        logprob = score(
            query, passages, target,
            scale=1 / temperature, ignore_index=NEVER, norms=(q_inverse, p_inverse), ids=passage_ids,
        )  # fmt: skip
        return -logprob.mean(), d_query, d_passages
    logprob = query.new_empty(b, dtype=work)
    g_query = query.new_empty(b, d, dtype=work) if query_gradient else None
    g_passages = None
    step = rows_per_chunk(b, p, work.itemsize, query.device)
    memory = Logits(step, p, query.dtype, query.device)
    for i in range(0, b, step):
        rows = slice(i, min(i + step, b))
        z, e = memory.z[: rows.stop - i], memory.e[: rows.stop - i]
        matmul(query[rows], passages.t(), z)
        epilogue(
            z, e, target[rows], logprob[rows],
            scale=1 / temperature, gradient_scale=1.0, ignore_index=NEVER, norms=(q_inverse[rows], p_inverse),
            ids=passage_ids, with_gradient=query_gradient or passage_gradient,
        )  # fmt: skip
        if g_query is not None:
            matmul(e, p_unit, g_query[rows])
        if passage_gradient:
            part = matmul(e.t(), q_unit[rows], passages.new_empty(p, d, dtype=work))
            g_passages = part if g_passages is None else g_passages.add_(part)
    factor = -1 / (b * temperature)
    if g_query is not None:
        d_query = _project(query, q_inverse, g_query, factor)
    if g_passages is not None:
        d_passages = _project(passages, p_inverse, g_passages, factor)
    return -logprob.mean(), d_query, d_passages
