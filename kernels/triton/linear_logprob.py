"""Token log-probabilities of a linear head on a GPU, and their gradients in two GEMMs.

Derivation. kernels/torch/linear_logprob.py has the algebra. Logits are in base 2: z stands for log2 e times a logit.
With a shift m of a row, the target taken out of its sum, r = Σ_{v≠y} 2^{z_v − m}, s = r + 2^{z_y − m}, and c_v the
softcap's slope (`softcap_grad`):

    logprob = −log(1 + r / 2^{z_y − m})                                             (1)
    U = scale · (c_y · r/s · W[y] − 1/s · Σ_{v≠y} c_v 2^{z_v − m} W[v])              (2)

Any m gives the same numbers as long as nothing overflows, and bf16 has the exponents of fp32. So bf16 needs no
maximum:

`shifted`. m = z_y + margin. `_target_logits` forms z_y by a row dot. `_emit` is the first GEMM; its own epilogue
writes e = c 2^{z − m} in bf16, 0 in the target's column, and fp32 sums of e, of each tile. `_finish` turns the sums
into (1) and into the factors of (2); the second GEMM is the library's, on e as it stands, and `_gradient_rows` ends
with (2). Logits are never in memory. A row with r + 2^{z_y − m} > LIMIT is beyond: `_finish` finds its maximum, shifts
by that instead and writes its e anew. Nothing waits for the host, and no other row changes. Weights up to 2^24 in size
keep the second GEMM's sums finite; with larger ones a row near the limit may become infinite, never finite and wrong.

The margin divides the range of bf16. With 84, a target 2^188 times less probable than the maximum fits, 130 nats, and
what falls below 2^−126 is 2^−42 of the target's own weight a column. It also puts z − m near −84, whose rounding costs
2.6e-6 nats where one other column has all the weight. That is within the numeric rule from V = 1024 on, since log V or
a logit is large then; below, the margin is 0 and 72 nats fit.

`cublas`. For fp16, fp32 and fp64. Per chunk of rows: Z = H Wᵀ (library GEMM, 16-bit operands, fp32 result),
`_epilogue` over Z in place, then U = E W with E = c · (onehot − softmax). `_epilogue` reads Z from memory once. On its
way along a row it writes 2^{z − m'} in the dtype of E, m' being the maximum so far, over the bytes of the fp32 logits
that it has read. Once it knows the row's m and its sum s, it multiplies by 2^{m' − m} / s. What it reads again is half
a row of 16-bit numbers a multiprocessor, which comes from L2.

`_score` keeps no logits: every program streams a part of the vocabulary past a block of rows, with the shift of
`shifted` and its `_finish`. Sums depend on the split, which depends on N, so the same row scored in a batch of another
size may differ in its last bits; no sum depends on timing.

Rows with `ignore_index` give 0 and no gradient, and rows with any other id outside [0, V) give NaN: reading the
targets on the host would wait for the device, so nothing here does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk, work_dtype
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import (
    Logits,
    base2_factors,
    capped,
    dense,
    exp2,
    finite_shift,
    launch,
    log1p,
    matmul,
    multiprocessors,
    operand,
    product_tile,
    split_count,
    target_products,
    tma_ready,
    without,
)

LIMIT = tl.constexpr(2.0**104)  # of a row's sum
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _epilogue(
    z_ptr,  # (rows, V), stride z_stride, writable to the next multiple of 16 columns; overwritten
    e_ptr,  # (rows, V), stride e_stride, padded alike; may be the bytes of z
    target_ptr,  # (rows,) int64
    bias_ptr,  # (V,)
    grad_ptr,  # (rows,) factor of a row of E
    row_norm_ptr,  # (rows,) factors of the logits, with
    col_norm_ptr,  # (V,)
    id_ptr,  # (V,) int64: a column other than the target's with the target's id does not count
    logprob_ptr,  # (rows,)
    rows, V, z_stride, e_stride,
    inner: tl.float64, outer: tl.float64, gradient_scale: tl.float64, ignore_index,
    LINEAR: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, PTX: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """logprob, and with GRADIENT E = c · (onehot − softmax) times gradient_scale and grad.

    LINEAR says that there is no softcap and inner > 0: a column leaves the row by a logit of −inf.
    """
    WORK: tl.constexpr = logprob_ptr.dtype.element_ty
    E: tl.constexpr = e_ptr.dtype.element_ty
    FAST: tl.constexpr = PTX and tl.float32 == WORK
    inner = tl.full((), inner, WORK)
    outer = tl.full((), outer, WORK)
    lanes = tl.arange(0, BLOCK)
    places = tl.arange(0, BLOCKS)
    blocks = tl.cdiv(V, BLOCK)
    width = tl.cdiv(V, 16) * 16  # masks of whole words
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        y = tl.load(target_ptr + row)
        z_row = z_ptr + tl.cast(row, tl.int64) * z_stride
        e_row = e_ptr + tl.cast(row, tl.int64) * e_stride
        if y == ignore_index:
            tl.store(logprob_ptr + row, 0.0)
            if GRADIENT:
                for block in range(0, blocks):
                    col = block * BLOCK + lanes
                    tl.store(e_row + col, tl.zeros((BLOCK,), E), mask=col < width)
        else:
            valid = (y >= 0) & (y < V)
            at = tl.where(valid, y, 0).to(tl.int32)
            row_norm = tl.full((), 1.0, WORK)
            x_y = tl.load(z_row + at).to(WORK)
            if bias_ptr is not None:
                x_y += tl.load(bias_ptr + at).to(WORK)
            if row_norm_ptr is not None:
                row_norm = tl.load(row_norm_ptr + row).to(WORK)
                x_y = x_y * row_norm * tl.load(col_norm_ptr + at).to(WORK)
            own = y
            if id_ptr is not None:
                own = tl.load(id_ptr + at)
            z_y, softcap_grad_y = capped(x_y, inner, outer, SOFTCAP)
            if LINEAR:
                tl.debug_barrier()  # every thread has the target's logit
                tl.store(z_row + at, -float("inf"))
                tl.store(z_row + V + tl.arange(0, 16), -float("inf"), mask=V + tl.arange(0, 16) < width)
                tl.debug_barrier()
            running_max = tl.full((), -float("inf"), WORK)
            sums = tl.zeros((BLOCK,), WORK)
            shifts = tl.zeros((BLOCKS,), WORK)
            for block in range(0, blocks):
                col = block * BLOCK + lanes
                x = tl.load(z_row + col, mask=col < width, other=-float("inf"), eviction_policy="evict_first").to(WORK)
                if bias_ptr is not None:
                    x += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(WORK)
                if row_norm_ptr is not None:
                    x = x * row_norm * tl.load(col_norm_ptr + col, mask=col < V, other=1.0).to(WORK)
                if LINEAR:
                    z = x
                else:
                    z, softcap_grad = capped(x, inner, outer, SOFTCAP)
                    z = tl.where((col < V) & (col != at), z, -float("inf"))
                if id_ptr is not None:
                    same = tl.load(id_ptr + col, mask=col < V, other=0) == own
                    z = tl.where(same, -float("inf"), z)
                most = tl.max(z)
                if LINEAR:
                    most = most * inner
                new_max = tl.maximum(running_max, most)
                shift = finite_shift(new_max)
                e = exp2(z * inner - shift, FAST) if LINEAR else exp2(z - shift, FAST)
                sums = sums * exp2(running_max - shift, FAST) + e
                running_max = new_max
                if GRADIENT:
                    if SOFTCAP:
                        e = e * softcap_grad
                    shifts = tl.where(places == block, shift, shifts)
                    # The maximum above made every warp wait for all loads of this block, the only one whose bytes
                    # the narrower e can reach.
                    tl.store(e_row + col, e.to(E), mask=col < width)
            shift = finite_shift(tl.maximum(running_max, z_y))
            rest = tl.sum(sums) * exp2(running_max - shift, FAST)
            s = rest + exp2(z_y - shift, FAST)
            logprob = (z_y - shift) * tl.full((), LN_2, WORK) - tl.log(s)
            logprob = tl.where(z_y == shift, -log1p(rest), logprob)  # exact for p → 1
            tl.store(logprob_ptr + row, tl.where(valid, logprob, float("nan")))
            if GRADIENT:
                g = tl.full((), gradient_scale, WORK)
                if grad_ptr is not None:
                    g = g * tl.load(grad_ptr + row).to(WORK)
                g = tl.where(valid, g, float("nan"))
                factors = exp2(shifts - shift, FAST) * (-g / s)
                tl.debug_barrier()  # what a thread reads below another one may have written
                for block in range(0, blocks):
                    col = block * BLOCK + lanes
                    e = tl.load(e_row + col, mask=col < width, other=0.0).to(WORK)
                    e = e * tl.sum(tl.where(places == block, factors, 0.0))
                    tl.store(e_row + col, e.to(E), mask=col < width)
                tl.debug_barrier()
                tl.store(e_row + at, (g * softcap_grad_y * (rest / s)).to(E))


@triton.jit(do_not_specialize=["N"])
def _target_logits(
    h_ptr, w_ptr,  # (N, D), (V, D)
    target_ptr, bias_ptr,  # (N,) int64, (V,)
    zy_ptr, softcap_grad_ptr,  # (N,), (N,) or None
    N, V, D, h_stride, w_stride,
    inner: tl.float64, outer: tl.float64,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """z_y of rows by a dot in fp32, and its softcap_grad. Rows with an id outside [0, V) get those of id 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    x, y = target_products(h_ptr, w_ptr, target_ptr, row, inside, V, D, h_stride, w_stride, ROWS, COLS)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + y).to(tl.float32)
    z, softcap_grad = capped(x, tl.full((), inner, tl.float32), tl.full((), outer, tl.float32), SOFTCAP)
    tl.store(zy_ptr + row, z, mask=inside)
    if softcap_grad_ptr is not None:
        tl.store(softcap_grad_ptr + row, softcap_grad, mask=inside)


@triton.jit
def _logits(
    x,  # [ROWS, COLS] products
    col,  # [COLS]
    bias_ptr, V, inner, outer, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of a tile in base 2, and softcap_grad."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
    return capped(x, inner, outer, SOFTCAP)


@triton.jit(do_not_specialize=["N", "splits"])
def _score(
    hidden, weight,  # (N, D), (V, D): pointers, or descriptors with TMA
    target_ptr, bias_ptr,  # (N,) int64, (V,)
    zy_ptr, sum_ptr,  # (N,), (splits, N)
    N, V, D, h_stride, w_stride, splits,
    inner: tl.float64, outer: tl.float64, margin: tl.float64,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Per row and part of the vocabulary: Σ 2^{z − z_y − margin} without the target."""
    inner = tl.full((), inner, tl.float32)
    outer = tl.full((), outer, tl.float32)
    margin = tl.full((), margin, tl.float32)
    blocks = tl.cdiv(N, ROWS)
    tiles_v = tl.cdiv(V, COLS)
    for unit in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        block = unit % blocks
        split = unit // blocks
        row = block * ROWS + tl.arange(0, ROWS)
        y = tl.load(target_ptr + row, mask=row < N, other=-1)
        shift = tl.load(zy_ptr + row, mask=row < N, other=0.0) + margin
        total = tl.zeros((ROWS,), tl.float32)
        for t in range(split * tiles_v // splits, (split + 1) * tiles_v // splits):
            x = product_tile(
                hidden, weight, block * ROWS, t * COLS, N, V, D, h_stride, w_stride,
                ROWS, COLS, DEPTH, TMA, EVEN, PRECISION,
            )  # fmt: skip
            col = t * COLS + tl.arange(0, COLS)
            z, _ = _logits(x, col, bias_ptr, V, inner, outer, SOFTCAP)
            total += tl.sum(without(exp2(z - shift[:, None], PTX), 0.0, y, t * COLS, V, WHOLE, COLS), 1)
        tl.store(sum_ptr + tl.cast(split, tl.int64) * N + row, total, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def _emit(
    hidden, weight,  # (N, D), (V, D): pointers, or descriptors with TMA
    e_out,  # (N, V), stride e_stride: as hidden and weight
    target_ptr, bias_ptr,  # (N,) int64, (V,)
    zy_ptr, sum_ptr,  # (N,), (V / COLS, N)
    N, V, D, h_stride, w_stride, e_stride,
    inner: tl.float64, outer: tl.float64, margin: tl.float64,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, FLATTEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """GEMM with e = softcap_grad · 2^{z − z_y − margin} as its result, and the sums of a tile without softcap_grad."""
    inner = tl.full((), inner, tl.float32)
    outer = tl.full((), outer, tl.float32)
    margin = tl.full((), margin, tl.float32)
    blocks = tl.cdiv(N, ROWS)
    # Row blocks are innermost: programs that run together share one tile of W.
    for unit in tl.range(tl.program_id(0), blocks * tl.cdiv(V, COLS), tl.num_programs(0), flatten=FLATTEN):
        block = unit % blocks
        t = unit // blocks
        x = product_tile(
            hidden, weight, block * ROWS, t * COLS, N, V, D, h_stride, w_stride,
            ROWS, COLS, DEPTH, TMA, EVEN, PRECISION,
        )  # fmt: skip
        row = block * ROWS + tl.arange(0, ROWS)
        col = t * COLS + tl.arange(0, COLS)
        y = tl.load(target_ptr + row, mask=row < N, other=-1)
        shift = tl.load(zy_ptr + row, mask=row < N, other=0.0) + margin
        z, softcap_grad = _logits(x, col, bias_ptr, V, inner, outer, SOFTCAP)
        e = without(exp2(z - shift[:, None], PTX), 0.0, y, t * COLS, V, WHOLE, COLS)
        tl.store(sum_ptr + tl.cast(t, tl.int64) * N + row, tl.sum(e, 1), mask=row < N)
        if SOFTCAP:
            e = e * softcap_grad
        if TMA:
            e_out.store([block * ROWS, t * COLS], e.to(e_out.dtype))
        else:
            e_at = e_out + tl.cast(block, tl.int64) * ROWS * e_stride + t * COLS
            local = tl.arange(0, ROWS)[:, None] * e_stride + tl.arange(0, COLS)[None, :]
            tl.store(e_at + local, e.to(e_out.dtype.element_ty), mask=(row < N)[:, None] & (col < V)[None, :])


@triton.jit(do_not_specialize=["N", "parts", "ignore_index"])
def _finish(
    h_ptr, w_ptr, e_ptr,  # (N, D), (V, D), (N, V) or None
    target_ptr, bias_ptr,  # (N,) int64, (V,)
    zy_ptr, softcap_grad_ptr, sum_ptr,  # (N,), (N,) or None, (parts, N)
    logprob_ptr, at_target_ptr, elsewhere_ptr,  # (N,), and the factors of W[y] and of e W in (2), with e
    N, V, D, h_stride, w_stride, e_stride, parts,
    inner: tl.float64, outer: tl.float64, margin: tl.float64, scale: tl.float64, ignore_index,
    SOFTCAP: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums to log-probabilities and factors. Rows beyond LIMIT are summed, and their e written, again."""
    inner = tl.full((), inner, tl.float32)
    outer = tl.full((), outer, tl.float32)
    margin = tl.full((), margin, tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    y = tl.load(target_ptr + row, mask=inside, other=0)
    ignored = y == ignore_index
    valid = (y >= 0) & (y < V)
    z_y = tl.load(zy_ptr + row, mask=inside, other=0.0)
    shift = z_y + margin
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = part.to(tl.int64)[:, None] * N + row[None, :]
        total += tl.sum(tl.load(sum_ptr + at, mask=(part < parts)[:, None] & inside[None, :], other=0.0), 0)
    beyond = inside & valid & (ignored == 0) & ((total > LIMIT) | (z_y == -float("inf")))
    if tl.max(beyond.to(tl.int32), 0) > 0:
        block = tl.program_id(0)
        most = tl.full((ROWS,), -float("inf"), tl.float32)
        for t in range(0, tl.cdiv(V, COLS)):
            x = product_tile(
                h_ptr, w_ptr, block * ROWS, t * COLS, N, V, D, h_stride, w_stride,
                ROWS, COLS, DEPTH, False, EVEN, PRECISION,
            )  # fmt: skip
            col = t * COLS + tl.arange(0, COLS)
            z, _ = _logits(x, col, bias_ptr, V, inner, outer, SOFTCAP)
            most = tl.maximum(most, tl.max(tl.where((col < V)[None, :], z, -float("inf")), 1))
        shift = tl.where(beyond, finite_shift(most), shift)
        again = tl.zeros((ROWS,), tl.float32)
        for t in range(0, tl.cdiv(V, COLS)):
            x = product_tile(
                h_ptr, w_ptr, block * ROWS, t * COLS, N, V, D, h_stride, w_stride,
                ROWS, COLS, DEPTH, False, EVEN, PRECISION,
            )  # fmt: skip
            col = t * COLS + tl.arange(0, COLS)
            z, softcap_grad = _logits(x, col, bias_ptr, V, inner, outer, SOFTCAP)
            e = without(exp2(z - shift[:, None], PTX), 0.0, y, t * COLS, V, WHOLE, COLS)
            again += tl.sum(e, 1)
            if e_ptr is not None:
                if SOFTCAP:
                    e = e * softcap_grad
                e_at = e_ptr + tl.cast(block, tl.int64) * ROWS * e_stride + t * COLS
                local = tl.arange(0, ROWS)[:, None] * e_stride + tl.arange(0, COLS)[None, :]
                tl.store(e_at + local, e.to(e_ptr.dtype.element_ty), mask=beyond[:, None] & (col < V)[None, :])
        total = tl.where(beyond, again, total)
    e_y = exp2(z_y - shift, PTX)
    s = total + e_y
    # Relative to the target's own weight as long as the quotient is finite: exact for p → 1.
    near = (total <= 1.0) & (beyond == 0)
    logprob = tl.where(near, -log1p(total / e_y), (z_y - shift) * LN_2 - tl.log(s))
    logprob = tl.where(valid, logprob, float("nan"))
    tl.store(logprob_ptr + row, tl.where(ignored, 0.0, logprob), mask=inside)
    if e_ptr is not None:
        g = tl.where(valid, tl.full((), scale, tl.float32), float("nan"))
        at_target = g * (total / s)
        if softcap_grad_ptr is not None:
            at_target = at_target * tl.load(softcap_grad_ptr + row, mask=inside, other=0.0)
        tl.store(at_target_ptr + row, tl.where(ignored, 0.0, at_target), mask=inside)
        tl.store(elsewhere_ptr + row, tl.where(ignored, 0.0, -g / s), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _gradient_rows(
    product_ptr, w_ptr,  # (N, D) e W, (V, D)
    target_ptr, at_target_ptr, elsewhere_ptr,  # (N,)
    u_ptr,  # (N, D)
    N, V, D, w_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """U (2). Rows whose factors are both 0 are 0, whatever the product holds there."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    y = tl.load(target_ptr + row, mask=inside, other=0)
    w_at = w_ptr + tl.where((y >= 0) & (y < V), y, 0) * w_stride
    at_target = tl.load(at_target_ptr + row, mask=inside, other=0.0)
    elsewhere = tl.load(elsewhere_ptr + row, mask=inside, other=0.0)
    counts = inside & ((at_target != 0.0) | (elsewhere != 0.0))
    for start in range(0, D, COLS):
        d = start + tl.arange(0, COLS)
        within = (d < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        u = tl.load(product_ptr + at, mask=counts[:, None] & within, other=0.0) * elsewhere[:, None]
        w = tl.load(w_at[:, None] + d[None, :], mask=counts[:, None] & within, other=0.0).to(tl.float32)
        u += w * at_target[:, None]
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=inside[:, None] & within)


@triton.jit(do_not_specialize=["rows"])
def _scale_rows(u_ptr, grad_ptr, out_ptr, rows, D, grad_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out = grad[:, None] · u, multiplied in grad's precision and rounded once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g = tl.load(grad_ptr + row.to(tl.int64) * grad_stride, mask=row < rows, other=0.0)
    for start in range(0, D, COLS):
        col = start + tl.arange(0, COLS)
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        mask = (row < rows)[:, None] & (col < D)[None, :]
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(g.dtype)
        tl.store(out_ptr + at, (g[:, None] * u).to(out_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


def epilogue(
    z: Tensor,  # (R, V), stride(0) a multiple of 16 with its padding readable
    e: Tensor,  # (R, V), padded alike
    target: Tensor,  # (R,)
    logprob: Tensor,  # (R,) out
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    grad: Tensor | None = None,  # (R,)
    norms: tuple[Tensor, Tensor] | None = None,  # (R,), (V,)
    ids: Tensor | None = None,  # (V,)
    gradient_scale: float | None = None,
    with_gradient: bool = True,
) -> None:
    """Writes logprob (R,) and, with a gradient, E times `gradient_scale` (by default `scale`) and `grad` into `e`."""
    rows, v = z.shape
    kind = "epilogue_cosine" if norms is not None else "epilogue" if softcap is None else "epilogue_softcap"
    t = tiles.tile(kind, z.device, z.dtype)
    launch(
        _epilogue, min(rows, t.programs * multiprocessors(z.device)), z.device,
        z, e, target, bias, grad, *(norms or (None, None)), ids, logprob,
        rows, v, z.stride(0), e.stride(0),
        *base2_factors(softcap, scale), scale if gradient_scale is None else gradient_scale, ignore_index,
        LINEAR=softcap is None and scale > 0, SOFTCAP=softcap is not None, GRADIENT=with_gradient,
        PTX=tiles.has_ptx(z.device), BLOCK=t.cols, BLOCKS=triton.next_power_of_2(triton.cdiv(v, t.cols)), **t.options,
    )  # fmt: skip


def score(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """logprob (N,) fp32 with no logits in memory: hidden and weight in 16 or 32 bits."""
    (n, d), v = hidden.shape, weight.shape[0]
    device = hidden.device
    hidden, weight = dense(hidden), dense(weight)
    z_y, _ = _shifts(hidden, weight, target, bias, softcap, scale)
    t, tma = gemm_tile("score", hidden, weight, softcap)
    blocks = triton.cdiv(n, t.rows)
    processors = multiprocessors(device) * t.programs
    splits = split_count(blocks, triton.cdiv(v, t.cols), processors)
    sums = torch.empty(splits, n, dtype=torch.float32, device=device)
    launch(
        _score, min(blocks * splits, processors), device,
        operand(hidden, (t.rows, t.depth), tma), operand(weight, (t.cols, t.depth), tma), target, bias,
        z_y, sums,
        n, v, d, hidden.stride(0), weight.stride(0), splits, *base2_factors(softcap, scale), margin(v),
        SOFTCAP=softcap is not None, TMA=tma, EVEN=d % t.depth == 0, WHOLE=v % t.cols == 0, PRECISION="ieee",
        PTX=tiles.has_ptx(device), ROWS=t.rows, COLS=t.cols, DEPTH=t.depth, **t.options,
    )  # fmt: skip
    logprob = torch.empty(n, dtype=torch.float32, device=device)
    _finished(hidden, weight, None, target, bias, softcap, scale, ignore_index, z_y, None, sums, logprob, None)
    return logprob


def margin(v: int) -> float:
    """How far the shift of a row lies above its target's logit, in base 2."""
    return 84.0 if v >= 1024 else 0.0


def gemm_tile(kernel: str, a: Tensor, b: Tensor, softcap: float | None = None) -> tuple[tiles.Tile, bool]:
    """The tile, and whether to load it through tensor descriptors. "general" ones leave registers for a softcap, or
    for the addresses and masks of rows that are not whole 16-byte words."""
    t = tiles.tile(kernel, a.device, a.dtype, b.shape[1])
    words = tma_ready(a, b)
    if softcap is not None or not words or (a.shape[1] % t.depth and not t.tma):
        t = tiles.tile(f"{kernel}_general", a.device, a.dtype)
    return t, t.tma and words


def _shifts(hidden, weight, target, bias, softcap, scale) -> tuple[Tensor, Tensor | None]:
    """z_y (N,) in base 2, fp32, and its softcap_grad (N,) with a softcap."""
    (n, d), v = hidden.shape, weight.shape[0]
    device = hidden.device
    z_y = torch.empty(n, dtype=torch.float32, device=device)
    softcap_grad = None if softcap is None else torch.empty_like(z_y)
    t = tiles.tile("rows", device)
    launch(
        _target_logits, triton.cdiv(n, t.rows), device,
        hidden, weight, target, bias, z_y, softcap_grad,
        n, v, d, hidden.stride(0), weight.stride(0), *base2_factors(softcap, scale),
        SOFTCAP=softcap is not None, ROWS=t.rows, COLS=t.cols, **t.options,
    )  # fmt: skip
    return z_y, softcap_grad


def _finished(
    hidden, weight, e, target, bias, softcap, scale, ignore_index, z_y, softcap_grad, sums, logprob, factors
) -> None:
    """Writes logprob (N,), and with e (N, V) the factors (2, N) of W[y] and e W."""
    (n, d), v = hidden.shape, weight.shape[0]
    t, _ = gemm_tile("finish", hidden, weight, softcap)
    launch(
        _finish, triton.cdiv(n, t.rows), hidden.device,
        hidden, weight, e, target, bias, z_y, softcap_grad, sums,
        logprob, *((None, None) if factors is None else factors),
        n, v, d, hidden.stride(0), weight.stride(0), 0 if e is None else e.stride(0), len(sums),
        *base2_factors(softcap, scale), margin(v), scale, ignore_index,
        SOFTCAP=softcap is not None, EVEN=d % t.depth == 0, WHOLE=v % t.cols == 0, PRECISION="ieee",
        PTX=tiles.has_ptx(hidden.device), ROWS=t.rows, COLS=t.cols, DEPTH=t.depth,
        PARTS=min(32, triton.next_power_of_2(len(sums))), **t.options,
    )  # fmt: skip


def _cublas_chunk(hidden, weight, target, bias, softcap, scale, ignore_index, logprob, u, memory) -> None:
    rows = slice(0, len(hidden))
    z, e = memory.z[rows], memory.e[rows]
    matmul(hidden, weight.t(), z)
    epilogue(
        z, e, target, logprob,
        bias=bias, softcap=softcap, scale=scale, ignore_index=ignore_index, with_gradient=u is not None,
    )  # fmt: skip
    if u is not None:
        matmul(e, weight, u)


def _shifted_chunk(hidden, weight, target, bias, softcap, scale, ignore_index, logprob, u, memory) -> None:
    (n, d), v = hidden.shape, weight.shape[0]
    device = hidden.device
    e, product = memory[0][:n], memory[1][:n]
    z_y, softcap_grad = _shifts(hidden, weight, target, bias, softcap, scale)
    t, tma = gemm_tile("emit", hidden, weight, softcap)
    tiles_v, blocks = triton.cdiv(v, t.cols), triton.cdiv(n, t.rows)
    sums = torch.empty(tiles_v, n, dtype=torch.float32, device=device)
    launch(
        _emit, min(blocks * tiles_v, multiprocessors(device) * t.programs), device,
        operand(hidden, (t.rows, t.depth), tma), operand(weight, (t.cols, t.depth), tma),
        operand(e, (t.rows, t.cols), tma), target, bias, z_y, sums,
        n, v, d, hidden.stride(0), weight.stride(0), e.stride(0), *base2_factors(softcap, scale), margin(v),
        SOFTCAP=softcap is not None, TMA=tma, EVEN=d % t.depth == 0, WHOLE=v % t.cols == 0, PRECISION="ieee",
        PTX=tiles.has_ptx(device), FLATTEN=tma, ROWS=t.rows, COLS=t.cols, DEPTH=t.depth, **t.options,
    )  # fmt: skip
    factors = torch.empty(2, n, dtype=torch.float32, device=device)
    _finished(
        hidden, weight, e, target, bias, softcap, scale, ignore_index, z_y, softcap_grad, sums, logprob, factors,
    )  # fmt: skip
    matmul(e, weight, product)
    r = tiles.tile("rows", device)
    launch(
        _gradient_rows, triton.cdiv(n, r.rows), device,
        product, weight, target, *factors, u, n, v, d, weight.stride(0), ROWS=r.rows, COLS=r.cols, **r.options,
    )  # fmt: skip


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    method: str | None = None,
) -> tuple[Tensor, Tensor]:
    """logprob (N,) in fp32 (fp64 for fp64), and U (N, D) in hidden's dtype, (0, D) unless asked for.

    `method` is "shifted" (bf16 and fp32) or "cublas", by default the one in the table.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    hidden, weight, target = dense(hidden), dense(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    work = work_dtype(hidden)
    u = hidden.new_empty(n if with_gradient else 0, d)
    if n == 0:
        return hidden.new_empty(0, dtype=work), u
    if d == 0:
        hidden, weight = hidden.new_zeros(n, 1), weight.new_zeros(v, 1)  # the products assume a depth
        head = (target, bias, softcap, scale, ignore_index, with_gradient, method)
        return forward(hidden, weight, *head)[0], u
    if not with_gradient and hidden.dtype != torch.float64:
        options = {"bias": bias, "softcap": softcap, "scale": scale, "ignore_index": ignore_index}
        return score(hidden, weight, target, **options), u
    method = method or tiles.method(hidden.device, hidden.dtype, d)
    if method not in ("shifted", "cublas"):
        raise ValueError(f"method: got {method!r}, expected 'shifted' or 'cublas'")
    shifted = method == "shifted"
    if shifted and hidden.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"method: got 'shifted' for {hidden.dtype}, expected bfloat16 or float32; use 'cublas'")
    logprob = hidden.new_empty(n, dtype=work)
    if shifted:
        step = min(n, rows_per_chunk(n, hidden.element_size() * v + 4 * d, 1, hidden.device))
        e = hidden.new_empty(step, -(-v // 16) * 16)[:, :v]
        memory = e, torch.empty(step, d, dtype=torch.float32, device=hidden.device)
    else:
        step = rows_per_chunk(n, v, work.itemsize, hidden.device)
        memory = Logits(min(step, n), v, hidden.dtype, hidden.device)
    chunk = _shifted_chunk if shifted else _cublas_chunk
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        chunk(
            hidden[rows], weight, target[rows], bias, softcap, scale, ignore_index, logprob[rows],
            u[rows] if with_gradient else None, memory,
        )  # fmt: skip
    return logprob, u


def backward(
    grad: Tensor,  # (N,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a trainable head by recomputing the logits: hidden (N, D), weight (V, D), bias (V,)."""
    (n, d), v = hidden.shape, weight.shape[0]
    hidden, weight, target, grad = dense(hidden), dense(weight), target.contiguous(), grad.contiguous()
    bias = None if bias is None else bias.contiguous()
    work = work_dtype(hidden)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros(v, d, dtype=work, device=weight.device)
    d_bias = torch.zeros(v, dtype=work, device=weight.device)
    if n > 0:
        step = rows_per_chunk(n, v, work.itemsize, hidden.device)
        memory = Logits(min(step, n), v, hidden.dtype, hidden.device)
        unused = torch.empty(min(step, n), dtype=work, device=hidden.device)
        product = torch.empty(v, d, dtype=work, device=weight.device)
        for i in range(0, n, step):
            rows = slice(i, min(i + step, n))
            h = hidden[rows]
            z, e = memory.z[: len(h)], memory.e[: len(h)]
            matmul(h, weight.t(), z)
            epilogue(
                z, e, target[rows], unused[: len(h)],
                bias=bias, softcap=softcap, scale=scale, ignore_index=ignore_index, grad=grad[rows],
            )  # fmt: skip
            matmul(e, weight, d_hidden[rows])
            # E is 0 in an ignored row, but 0 · NaN is NaN.
            h = h.masked_fill((target[rows] == ignore_index)[:, None], 0.0)
            d_weight += matmul(e.t(), h, product)
            d_bias += e.sum(0, dtype=work)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def scale_rows(grad: Tensor, u: Tensor) -> Tensor:
    """grad (N,) times the rows of u (N, D), in u's dtype."""
    n, d = u.shape
    out = torch.empty_like(u)
    t = tiles.tile("rows", u.device)
    launch(
        _scale_rows, triton.cdiv(n, t.rows), u.device, u, grad, out, n, d, grad.stride(0),
        ROWS=t.rows, COLS=t.cols, **t.options,
    )  # fmt: skip
    return out
