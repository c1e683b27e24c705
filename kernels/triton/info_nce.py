"""Contrastive loss over cosine similarities and both of its gradients without a (B, P) matrix.

Derivation. q̂ = q/|q|, p̂ = p/|p|, z_ip = q̂_i·p̂_p / τ, loss = −(1/B) Σ_i logprob_i. With E_ip = onehot − softmax:

    ∂loss/∂q̂ = −(1/(Bτ)) E P̂          ∂loss/∂p̂ = −(1/(Bτ)) Eᵀ Q̂          ∂loss/∂x = (g − x̂ (x̂·g)) / |x|
    ∂loss/∂τ = −(1/(Bτ²)) Σ_i Σ_p softmax_ip (cos_ip − cos_iy)

The loss is a scalar and both operands are trained, so both gradients are formed in the forward: with F = 2·B·P·D that
is 3F, and a chunk of rows of E is all that is ever there of it. Logits come from the operands as they are, with
1/|q| and 1/|p| as fp32 factors on fp32 products, so that 16-bit inputs lose nothing on the way to the loss; the two
gradient GEMMs read q̂ and p̂ rounded to the inputs' dtype. A passage with the positive's id that is not the positive
leaves the row (a duplicate is no negative). 1/τ is a factor of 1/|q|: it stays on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk, work_dtype
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.linear_logprob import epilogue, score
from autoregembed.kernels.triton.primitives import Logits, dense, launch, matmul, multiprocessors

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
    x_ptr, inverse_ptr, g_ptr, temperature_ptr, out_ptr,  # (rows, D), (rows,), (rows, D), (), (rows, D)
    rows, D, stride, factor: tl.float64, eps: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor / τ · (g − x̂ (x̂·g)) / |x|; without the projection where |x| ≤ eps, as autograd has it."""
    WORK: tl.constexpr = inverse_ptr.dtype.element_ty
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inverse = tl.load(inverse_ptr + row)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride + d, mask=d < D, other=0.0).to(WORK) * inverse
    g = tl.load(g_ptr + tl.cast(row, tl.int64) * D + d, mask=d < D, other=0.0)
    along = tl.sum(x * g)
    along = tl.where(inverse * tl.full((), eps, WORK) < 1.0, along, 0.0)
    out = (g - x * along) * (inverse * (tl.full((), factor, WORK) / tl.load(temperature_ptr)))
    tl.store(out_ptr + tl.cast(row, tl.int64) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _excess(
    z_ptr,  # (rows, P), stride z_stride: q·p
    target_ptr, row_norm_ptr, col_norm_ptr, id_ptr,  # (rows,), (rows,), (P,), (P,) int64 or None
    temperature_ptr, out_ptr,  # (), (rows,)
    rows, P, z_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = Σ_p softmax_p (cos_p − cos_y) of a row."""
    WORK: tl.constexpr = out_ptr.dtype.element_ty
    temperature = tl.load(temperature_ptr)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        y = tl.load(target_ptr + row)
        valid = (y >= 0) & (y < P)
        at = tl.where(valid, y, 0)
        z_row = z_ptr + tl.cast(row, tl.int64) * z_stride
        norm = tl.load(row_norm_ptr + row)
        cos_y = tl.load(z_row + at) * norm * tl.load(col_norm_ptr + at)
        own = y
        if id_ptr is not None:
            own = tl.load(id_ptr + at)
        # The target's own term, e^0 · 0, is there from the start: no sum is empty.
        running_max = tl.full((), 0.0, WORK)
        total = tl.full((), 1.0, WORK)
        excess = tl.full((), 0.0, WORK)
        for start in range(0, P, BLOCK):
            col = start + tl.arange(0, BLOCK)
            cos = tl.load(z_row + col, mask=col < P, other=0.0) * norm
            more = cos * tl.load(col_norm_ptr + col, mask=col < P, other=0.0) - cos_y
            counts = (col < P) & (col != y)
            if id_ptr is not None:
                counts = counts & (tl.load(id_ptr + col, mask=col < P, other=0) != own)
            x = tl.where(counts, more / temperature, -float("inf"))
            new_max = tl.maximum(running_max, tl.max(x))
            e = tl.exp(x - new_max)
            rescale = tl.exp(running_max - new_max)
            total = total * rescale + tl.sum(e)
            excess = excess * rescale + tl.sum(e * more)
            running_max = new_max
        tl.store(out_ptr + row, tl.where(valid, excess / total, float("nan")))


def normalize(x: Tensor, with_unit: bool) -> tuple[Tensor, Tensor | None]:
    """1/max(|x|, EPS) (R,) in the working dtype, and x̂ (R, D) in x's."""
    rows, d = x.shape
    inverse = x.new_empty(rows, dtype=work_dtype(x))
    unit = x.new_empty(rows, d) if with_unit else None
    t = tiles.tile("unit", x.device)
    launch(
        _unit, rows, x.device, x, inverse, unit, rows, d, x.stride(0), EPS,
        BLOCK=triton.next_power_of_2(d), **t.options,
    )  # fmt: skip
    return inverse, unit


def project(x: Tensor, inverse: Tensor, g: Tensor, temperature: Tensor, factor: float) -> Tensor:
    """The gradient of x (R, D) from g (R, D), that of x̂ times `temperature` () / `factor`."""
    rows, d = x.shape
    out = x.new_empty(rows, d)
    t = tiles.tile("unit", x.device)
    launch(
        _unit_backward, rows, x.device, x, inverse, g, temperature, out, rows, d, x.stride(0), factor, EPS,
        BLOCK=triton.next_power_of_2(d), **t.options,
    )  # fmt: skip
    return out


def _store_excess(
    z: Tensor, target: Tensor, norms: tuple[Tensor, Tensor], ids: Tensor | None, temperature: Tensor, out: Tensor
) -> None:
    (rows, p), device = z.shape, z.device
    t = tiles.tile("epilogue", device, z.dtype)
    launch(
        _excess, min(rows, t.programs * multiprocessors(device)), device,
        z, target, *norms, ids, temperature, out, rows, p, z.stride(0), BLOCK=t.cols, **t.options,
    )  # fmt: skip


def forward(
    query: Tensor,  # (B, D), B > 0
    passages: Tensor,  # (P, D)
    target: Tensor,  # (B,) int64
    passage_ids: Tensor | None,  # (P,) int64
    temperature: Tensor,  # () fp32 (fp64 for fp64)
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    (b, d), p = query.shape, len(passages)
    query, passages, target = dense(query), dense(passages), target.contiguous()
    passage_ids = None if passage_ids is None else passage_ids.contiguous()
    q_inverse, q_unit = normalize(query, passage_gradient)
    p_inverse, p_unit = normalize(passages, query_gradient)
    d_query, d_passages = query.new_empty(0, d), passages.new_empty(0, d)
    work = work_dtype(query)
    q_scale = q_inverse / temperature
    none = query.new_zeros((), dtype=work)
    if not (query_gradient or passage_gradient or temperature_gradient) and work != torch.float64:
        logprob = score(
            query, passages, target, ignore_index=NEVER, norms=(q_scale, p_inverse), ids=passage_ids
        )  # fmt: skip
        return -logprob.mean(), d_query, d_passages, none
    logprob, excess = query.new_empty(2, b, dtype=work).unbind()
    g_query = query.new_empty(b, d, dtype=work) if query_gradient else None
    g_passages = None
    step = rows_per_chunk(b, p, work.itemsize, query.device)
    memory = Logits(step, p, query.dtype, query.device)
    for i in range(0, b, step):
        rows = slice(i, min(i + step, b))
        z, e = memory.z[: rows.stop - i], memory.e[: rows.stop - i]
        matmul(query[rows], passages.t(), z)
        if temperature_gradient:
            norms = q_inverse[rows], p_inverse
            _store_excess(z, target[rows], norms, passage_ids, temperature, excess[rows])
        epilogue(
            z, e, target[rows], logprob[rows],
            ignore_index=NEVER, norms=(q_scale[rows], p_inverse), ids=passage_ids,
            with_gradient=query_gradient or passage_gradient,
        )  # fmt: skip
        if g_query is not None:
            matmul(e, p_unit, g_query[rows])
        if passage_gradient:
            part = matmul(e.t(), q_unit[rows], passages.new_empty(p, d, dtype=work))
            g_passages = part if g_passages is None else g_passages.add_(part)
    if g_query is not None:
        d_query = project(query, q_inverse, g_query, temperature, -1 / b)
    if g_passages is not None:
        d_passages = project(passages, p_inverse, g_passages, temperature, -1 / b)
    d_temperature = -excess.mean() / temperature.square() if temperature_gradient else none
    return -logprob.mean(), d_query, d_passages, d_temperature
