"""Token log-probabilities of a linear head on a GPU, and their gradients in two GEMMs.

Derivation. kernels/torch/linear_logprob.py has the algebra. With p = softmax(z), m the maximum of a row and the target
taken out of its sum, r = Σ_{v≠y} e^{z_v − m} (`running_sumexp`), and c_v the softcap's slope (`softcap_grad`):

    logprob = (z_y − m) − log(r + e^{z_y − m})                             (1)
    E_v = −c_v p_v,   E_y = c_y · r / (r + e^{z_y − m})                    (2)
    U = scale · E W = d logprob / d hidden                                 (3)

`cublas`. Per chunk of rows: Z = H Wᵀ (library GEMM, 16-bit operands, fp32 result), `_epilogue` over Z in place, then
U = E W. `_epilogue` reads Z from memory once. On its way along a row it writes e^{z − m'} in the dtype of E, m' being
the maximum so far, over the bytes of the fp32 logits that it has read. Once it knows the row's m and its sum s, it
multiplies by e^{m' − m} / s. What it reads again is half a row of 16-bit numbers a multiprocessor, which comes from L2.

`tiled`. `_tiled_forward` is a GEMM whose own epilogue writes e^{z − m'}, m' being the maximum of a tile's row, and the
sums of each tile; `_tiled_backward` multiplies by e^{m' − lse} while it loads, so that E is written once.

`_score` keeps no logits: every program streams a part of the vocabulary past a block of rows with an online
log-sum-exp; `_combine` puts the parts together in a fixed order. Sums depend on the split, which depends on N, so the
same row scored in a batch of another size may differ in its last bits; no sum depends on timing.

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
    capped,
    dense,
    finite_shift,
    launch,
    matmul,
    multiprocessors,
    operand,
    product_tile,
    split_count,
    tma_ready,
)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _epilogue(
    z_ptr,  # (rows, V), stride z_stride, which is at least V and readable to its end
    e_ptr,  # (rows, V), stride e_stride; may be the bytes of z
    target_ptr,  # (rows,) int64
    bias_ptr,  # (V,)
    grad_ptr,  # (rows,) factor of a row of E
    row_norm_ptr,  # (rows,) factors of the logits, with
    col_norm_ptr,  # (V,)
    id_ptr,  # (V,) int64: a column other than the target's with the target's id does not count
    logprob_ptr,  # (rows,)
    rows, V, z_stride, e_stride,
    softcap: tl.float64, scale: tl.float64, gradient_scale: tl.float64, ignore_index,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """logprob, and with GRADIENT E (2) times gradient_scale and grad."""
    WORK: tl.constexpr = logprob_ptr.dtype.element_ty
    E: tl.constexpr = e_ptr.dtype.element_ty
    cap = tl.full((), softcap, WORK)
    factor = tl.full((), scale, WORK)
    lanes = tl.arange(0, BLOCK)
    places = tl.arange(0, BLOCKS)
    blocks = tl.cdiv(V, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        y = tl.load(target_ptr + row)
        z_row = z_ptr + tl.cast(row, tl.int64) * z_stride
        e_row = e_ptr + tl.cast(row, tl.int64) * e_stride
        if y == ignore_index:
            tl.store(logprob_ptr + row, 0.0)
            if GRADIENT:
                for block in range(0, blocks):
                    col = block * BLOCK + lanes
                    tl.store(e_row + col, tl.zeros((BLOCK,), E), mask=col < z_stride)
        else:
            valid = (y >= 0) & (y < V)
            at = tl.where(valid, y, 0)
            row_norm = tl.full((), 1.0, WORK)
            if row_norm_ptr is not None:
                row_norm = tl.load(row_norm_ptr + row).to(WORK)
            own = y
            if id_ptr is not None:
                own = tl.load(id_ptr + at)
            running_max = tl.full((), -float("inf"), WORK)
            running_sumexp = tl.full((), 0.0, WORK)
            z_y = tl.full((), 0.0, WORK)
            softcap_grad_y = tl.full((), 1.0, WORK)
            shifts = tl.zeros((BLOCKS,), WORK)
            x_next = tl.load(z_row + lanes, mask=lanes < z_stride)
            for block in range(0, blocks):
                col = block * BLOCK + lanes
                x = x_next.to(WORK)
                x_next = tl.load(z_row + col + BLOCK, mask=col + BLOCK < z_stride)
                if bias_ptr is not None:
                    x += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(WORK)
                if row_norm_ptr is not None:
                    x = x * row_norm * tl.load(col_norm_ptr + col, mask=col < V, other=0.0).to(WORK)
                z, softcap_grad = capped(x, factor, cap, SOFTCAP)
                hit = col == y
                z = tl.where(col < V, z, -float("inf"))
                if id_ptr is not None:
                    same = tl.load(id_ptr + col, mask=col < V, other=0) == own
                    z = tl.where(same & (col != y), -float("inf"), z)
                z_y += tl.sum(tl.where(hit, z, 0.0))
                new_max = tl.maximum(running_max, tl.max(z))
                shift = finite_shift(new_max)
                e = tl.where(hit, 0.0, tl.exp(z - shift))
                running_sumexp = running_sumexp * tl.exp(running_max - shift) + tl.sum(e)
                running_max = new_max
                if GRADIENT:
                    if SOFTCAP:
                        softcap_grad_y += tl.sum(tl.where(hit, softcap_grad - 1.0, 0.0))
                        e = e * softcap_grad
                    shifts = tl.where(places == block, shift, shifts)
                    # The maximum above made every warp wait for all loads of this block, the only one whose bytes
                    # the narrower e can reach.
                    tl.store(e_row + col, e.to(E), mask=col < z_stride)
            shift = finite_shift(running_max)
            s = running_sumexp + tl.exp(z_y - shift)
            logprob = (z_y - shift) - tl.log(s)
            tl.store(logprob_ptr + row, tl.where(valid, logprob, float("nan")))
            if GRADIENT:
                g = tl.full((), gradient_scale, WORK)
                if grad_ptr is not None:
                    g = g * tl.load(grad_ptr + row).to(WORK)
                g = tl.where(valid, g, float("nan"))
                e_y = g * softcap_grad_y * (running_sumexp / s)
                tl.debug_barrier()  # what a thread reads below another one may have written
                for block in range(0, blocks):
                    col = block * BLOCK + lanes
                    e = tl.load(e_row + col, mask=col < z_stride, other=0.0).to(WORK)
                    m = tl.sum(tl.where(places == block, shifts, 0.0))
                    e = e * (-g * (tl.exp(m - shift) / s))
                    e = tl.where(col == y, e_y, e)
                    tl.store(e_row + col, e.to(E), mask=col < z_stride)


@triton.jit(do_not_specialize=["N", "splits"])
def _score(
    hidden, weight,  # (N, D), (V, D): pointers, or descriptors with TMA
    target_ptr, bias_ptr,  # (N,) int64, (V,)
    row_norm_ptr, col_norm_ptr, id_ptr,  # as in _epilogue
    max_ptr, sumexp_ptr, zy_ptr,  # (splits, N) each
    N, V, D, h_stride, w_stride, splits,
    softcap: tl.float64, scale: tl.float64,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Per row and part of the vocabulary: maximum, Σ e^{z − maximum} without the target, and z_y (−inf elsewhere)."""
    cap = tl.full((), softcap, tl.float32)
    factor = tl.full((), scale, tl.float32)
    blocks = tl.cdiv(N, ROWS)
    tiles_v = tl.cdiv(V, COLS)
    for unit in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        block = unit % blocks
        split = unit // blocks
        first = split * tiles_v // splits
        last = (split + 1) * tiles_v // splits
        row = block * ROWS + tl.arange(0, ROWS)
        y = tl.load(target_ptr + row, mask=row < N, other=-1)
        if row_norm_ptr is not None:
            row_norm = tl.load(row_norm_ptr + row, mask=row < N, other=0.0).to(tl.float32)
        if id_ptr is not None:
            own = tl.load(id_ptr + tl.where((y >= 0) & (y < V), y, 0))
        running_max = tl.full((ROWS,), -float("inf"), tl.float32)
        running_sumexp = tl.zeros((ROWS,), tl.float32)
        z_y = tl.full((ROWS,), -float("inf"), tl.float32)
        for t in range(first, last):
            x = product_tile(
                hidden, weight, block * ROWS, t * COLS, N, V, D, h_stride, w_stride,
                ROWS, COLS, DEPTH, TMA, EVEN, PRECISION,
            )  # fmt: skip
            col = t * COLS + tl.arange(0, COLS)
            if bias_ptr is not None:
                x += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
            if row_norm_ptr is not None:
                x = x * row_norm[:, None] * tl.load(col_norm_ptr + col, mask=col < V, other=0.0)[None, :]
            z, _ = capped(x, factor, cap, SOFTCAP)
            hit = col[None, :] == y[:, None]
            z = tl.where((col < V)[None, :], z, -float("inf"))
            if id_ptr is not None:
                same = tl.load(id_ptr + col, mask=col < V, other=0)[None, :] == own[:, None]
                z = tl.where(same & (col[None, :] != y[:, None]), -float("inf"), z)
            z_y = tl.maximum(z_y, tl.max(tl.where(hit, z, -float("inf")), 1))
            new_max = tl.maximum(running_max, tl.max(z, 1))
            shift = finite_shift(new_max)
            e = tl.where(hit, 0.0, tl.exp(z - shift[:, None]))
            running_sumexp = running_sumexp * tl.exp(running_max - shift) + tl.sum(e, 1)
            running_max = new_max
        at = tl.cast(split, tl.int64) * N + row
        tl.store(max_ptr + at, running_max, mask=row < N)
        tl.store(sumexp_ptr + at, running_sumexp, mask=row < N)
        tl.store(zy_ptr + at, z_y, mask=row < N)


@triton.jit(do_not_specialize=["N", "parts", "ignore_index"])
def _combine(
    max_ptr, sumexp_ptr, zy_ptr,  # (parts, N) each
    target_ptr, logprob_ptr,  # (N,)
    factor_ptr, e_y_ptr,  # (parts, N), (N,) or None: what turns a part's e^{z − m} into E, and E of the target
    softcap_grad_ptr,  # (N,) softcap_grad of the target, or None
    N, V, parts, scale: tl.float64, ignore_index, ROWS: tl.constexpr,
):  # fmt: skip
    """Parts of rows to log-probabilities (1), in the order of the parts."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    y = tl.load(target_ptr + row, mask=inside, other=0)
    running_max = tl.full((ROWS,), -float("inf"), tl.float32)
    running_sumexp = tl.zeros((ROWS,), tl.float32)
    z_y = tl.full((ROWS,), -float("inf"), tl.float32)
    for part in range(0, parts):
        at = tl.cast(part, tl.int64) * N + row
        m = tl.load(max_ptr + at, mask=inside, other=0.0)
        new_max = tl.maximum(running_max, m)
        shift = finite_shift(new_max)
        part_sumexp = tl.load(sumexp_ptr + at, mask=inside, other=0.0)
        running_sumexp = running_sumexp * tl.exp(running_max - shift) + part_sumexp * tl.exp(m - shift)
        z_y = tl.maximum(z_y, tl.load(zy_ptr + at, mask=inside, other=0.0))
        running_max = new_max
    shift = finite_shift(running_max)
    s = running_sumexp + tl.exp(z_y - shift)
    valid = (y >= 0) & (y < V)
    logprob = tl.where(valid, (z_y - shift) - tl.log(s), float("nan"))
    ignored = y == ignore_index
    tl.store(logprob_ptr + row, tl.where(ignored, 0.0, logprob), mask=inside)
    if factor_ptr is not None:
        g = tl.where(ignored, 0.0, tl.where(valid, 1.0, float("nan"))) * tl.full((), scale, tl.float32)
        e_y = g * (running_sumexp / s)
        if softcap_grad_ptr is not None:
            e_y = e_y * tl.load(softcap_grad_ptr + row, mask=inside, other=0.0)
        tl.store(e_y_ptr + row, tl.where(ignored, 0.0, e_y), mask=inside)
        for part in range(0, parts):
            at = tl.cast(part, tl.int64) * N + row
            m = finite_shift(tl.load(max_ptr + at, mask=inside, other=0.0))
            f = -g * (tl.exp(m - shift) / s)
            tl.store(factor_ptr + at, tl.where(ignored, 0.0, f), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _tiled_forward(
    hidden, weight,  # (N, D), (V, D): pointers, or descriptors with TMA
    e_out,  # (N, V), stride e_stride: as hidden and weight
    target_ptr, bias_ptr,  # (N,) int64, (V,)
    max_ptr, sumexp_ptr, zy_ptr,  # (V / COLS, N) each
    softcap_grad_ptr,  # (N,) softcap_grad of the target, or None
    N, V, D, h_stride, w_stride, e_stride,
    softcap: tl.float64, scale: tl.float64,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """GEMM with softcap_grad · e^{z − m} as its result, m the maximum of the tile's row; and the parts for _combine."""
    cap = tl.full((), softcap, tl.float32)
    factor = tl.full((), scale, tl.float32)
    blocks = tl.cdiv(N, ROWS)
    # Row blocks are innermost: programs that run together share one tile of W.
    for unit in range(tl.program_id(0), blocks * tl.cdiv(V, COLS), tl.num_programs(0)):
        block = unit % blocks
        t = unit // blocks
        row = block * ROWS + tl.arange(0, ROWS)
        col = t * COLS + tl.arange(0, COLS)
        x = product_tile(
            hidden, weight, block * ROWS, t * COLS, N, V, D, h_stride, w_stride,
            ROWS, COLS, DEPTH, TMA, EVEN, PRECISION,
        )  # fmt: skip
        y = tl.load(target_ptr + row, mask=row < N, other=-1)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]
        z, softcap_grad = capped(x, factor, cap, SOFTCAP)
        hit = col[None, :] == y[:, None]
        z = tl.where((col < V)[None, :], z, -float("inf"))
        running_max = tl.max(z, 1)
        shift = finite_shift(running_max)
        e = tl.where(hit, 0.0, tl.exp(z - shift[:, None]))
        at = tl.cast(t, tl.int64) * N + row
        tl.store(max_ptr + at, running_max, mask=row < N)
        tl.store(sumexp_ptr + at, tl.sum(e, 1), mask=row < N)
        tl.store(zy_ptr + at, tl.max(tl.where(hit, z, -float("inf")), 1), mask=row < N)
        if SOFTCAP:
            here = (y >= t * COLS) & (y < (t + 1) * COLS)
            tl.store(softcap_grad_ptr + row, tl.sum(tl.where(hit, softcap_grad, 0.0), 1), mask=(row < N) & here)
            e = e * softcap_grad
        if TMA:
            e_out.store([block * ROWS, t * COLS], e.to(e_out.dtype))
        else:
            e_at = e_out + tl.cast(block, tl.int64) * ROWS * e_stride + t * COLS
            local = tl.arange(0, ROWS)[:, None] * e_stride + tl.arange(0, COLS)[None, :]
            tl.store(e_at + local, e.to(e_out.dtype.element_ty), mask=(row < N)[:, None] & (col < V)[None, :])


@triton.jit(do_not_specialize=["N", "splits"])
def _tiled_backward(
    e, weight,  # (N, V), (V, D): pointers, or descriptors with TMA
    target_ptr, factor_ptr, e_y_ptr,  # (N,), (V / COLS, N), (N,)
    u_ptr,  # (splits, N, D) fp32
    N, V, D, e_stride, w_stride, splits,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """U = E W (3) over parts of the vocabulary; PART is COLS of the first GEMM, a multiple of DEPTH."""
    blocks = tl.cdiv(N, ROWS)
    d_tiles = tl.cdiv(D, COLS)
    steps = tl.cdiv(V, DEPTH)
    for unit in range(tl.program_id(0), blocks * d_tiles * splits, tl.num_programs(0)):
        block = unit % blocks
        d_tile = unit // blocks % d_tiles
        split = unit // (blocks * d_tiles)
        row = block * ROWS + tl.arange(0, ROWS)
        safe_row = tl.minimum(row, N - 1)
        d = d_tile * COLS + tl.arange(0, COLS)
        y = tl.load(target_ptr + safe_row)
        e_y = tl.load(e_y_ptr + safe_row)
        acc = tl.zeros((ROWS, COLS), tl.float32)
        for step in range(split * steps // splits, (split + 1) * steps // splits):
            k = step * DEPTH
            col = k + tl.arange(0, DEPTH)
            f = tl.load(factor_ptr + tl.cast(k // PART, tl.int64) * N + safe_row)
            if TMA:
                x = e.load([block * ROWS, k])
                w = weight.load([k, d_tile * COLS])
            else:
                e_at = e + tl.cast(block, tl.int64) * ROWS * e_stride + k
                local = (safe_row - block * ROWS)[:, None] * e_stride + tl.arange(0, DEPTH)[None, :]
                x = tl.load(e_at + local, mask=(col < V)[None, :], other=0.0)
                w_at = weight + tl.cast(k, tl.int64) * w_stride
                local = tl.arange(0, DEPTH)[:, None] * w_stride + d[None, :]
                w = tl.load(w_at + local, mask=(col < V)[:, None] & (d < D)[None, :], other=0.0)
            # f = 0 marks rows and tiles that do not count, whatever e holds there
            x = tl.where(f[:, None] == 0.0, 0.0, x.to(tl.float32) * f[:, None])
            x = tl.where(col[None, :] == y[:, None], e_y[:, None], x)
            acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
        u_at = u_ptr + (tl.cast(split, tl.int64) * N + block * ROWS) * D + d_tile * COLS
        local = tl.arange(0, ROWS)[:, None] * D + tl.arange(0, COLS)[None, :]
        tl.store(u_at + local, acc, mask=(row < N)[:, None] & (d < D)[None, :])


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
    t = tiles.tile("epilogue" if softcap is None else "epilogue_softcap", z.device, z.dtype)
    launch(
        _epilogue, min(rows, t.programs * multiprocessors(z.device)), z.device,
        z, e, target, bias, grad, *(norms or (None, None)), ids, logprob,
        rows, v, z.stride(0), e.stride(0),
        softcap or 1.0, scale, scale if gradient_scale is None else gradient_scale, ignore_index,
        SOFTCAP=softcap is not None, GRADIENT=with_gradient, BLOCK=t.cols,
        BLOCKS=triton.next_power_of_2(triton.cdiv(v, t.cols)), **t.options,
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
    norms: tuple[Tensor, Tensor] | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """logprob (N,) fp32 with no logits in memory: hidden and weight in 16 or 32 bits."""
    (n, d), v = hidden.shape, weight.shape[0]
    device = hidden.device
    hidden, weight = dense(hidden), dense(weight)
    t, tma = _gemm_tile("score" if norms is None else "score_cosine", hidden, weight, softcap)
    blocks = triton.cdiv(n, t.rows)
    processors = multiprocessors(device) * t.programs
    splits = split_count(blocks, triton.cdiv(v, t.cols), processors)
    parts = torch.empty(3, splits, n, dtype=torch.float32, device=device)
    launch(
        _score, min(blocks * splits, processors), device,
        operand(hidden, (t.rows, t.depth), tma), operand(weight, (t.cols, t.depth), tma), target, bias,
        *(norms or (None, None)), ids, *parts.unbind(),
        n, v, d, hidden.stride(0), weight.stride(0), splits, softcap or 1.0, scale,
        SOFTCAP=softcap is not None, TMA=tma, EVEN=d % t.depth == 0, PRECISION="ieee",
        ROWS=t.rows, COLS=t.cols, DEPTH=t.depth, **t.options,
    )  # fmt: skip
    return _combined(parts, target, v, scale, ignore_index)


def _gemm_tile(kernel: str, a: Tensor, b: Tensor, softcap: float | None) -> tuple[tiles.Tile, bool]:
    """The tile, and whether to load it through tensor descriptors. "general" ones leave registers for a softcap, or
    for the addresses and masks of rows that are not whole 16-byte words."""
    t = tiles.tile(kernel, a.device, a.dtype, b.shape[1])
    words = tma_ready(a, b)
    if softcap is not None or not words or (a.shape[1] % t.depth and not t.tma):
        t = tiles.tile(f"{kernel}_general", a.device, a.dtype)
    return t, t.tma and words


def _combined(
    parts: Tensor,  # (3, P, N)
    target: Tensor,
    v: int,
    scale: float,
    ignore_index: int,
    factor: Tensor | None = None,
    e_y: Tensor | None = None,
    softcap_grad: Tensor | None = None,
) -> Tensor:
    n = parts.shape[2]
    c = tiles.tile("combine", parts.device)
    logprob = torch.empty(n, dtype=torch.float32, device=parts.device)
    launch(
        _combine, triton.cdiv(n, c.rows), parts.device,
        *parts.unbind(), target, logprob, factor, e_y, softcap_grad, n, v, parts.shape[1], scale, ignore_index,
        ROWS=c.rows, **c.options,
    )  # fmt: skip
    return logprob


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


def _tiled_chunk(hidden, weight, target, bias, softcap, scale, ignore_index, logprob, u) -> None:
    (n, d), v = hidden.shape, weight.shape[0]
    device, dtype = hidden.device, hidden.dtype
    f, tma = _gemm_tile("tiled_forward", hidden, weight, softcap)
    processors = multiprocessors(device)
    v_tiles, blocks = triton.cdiv(v, f.cols), triton.cdiv(n, f.rows)
    e = torch.empty(n, -(-v // 16) * 16, dtype=dtype, device=device)
    parts = torch.empty(3, v_tiles, n, dtype=torch.float32, device=device)
    softcap_grad = None if softcap is None else torch.empty(n, dtype=torch.float32, device=device)
    launch(
        _tiled_forward, min(blocks * v_tiles, processors * f.programs), device,
        operand(hidden, (f.rows, f.depth), tma), operand(weight, (f.cols, f.depth), tma),
        operand(e[:, :v], (f.rows, f.cols), tma), target, bias,
        *parts.unbind(), softcap_grad, n, v, d, hidden.stride(0), weight.stride(0), e.stride(0), softcap or 1.0, scale,
        SOFTCAP=softcap is not None, TMA=tma, EVEN=d % f.depth == 0, PRECISION="ieee",
        ROWS=f.rows, COLS=f.cols, DEPTH=f.depth, **f.options,
    )  # fmt: skip
    factor = torch.empty(v_tiles, n, dtype=torch.float32, device=device)
    e_y = torch.empty(n, dtype=torch.float32, device=device)
    logprob.copy_(_combined(parts, target, v, scale, ignore_index, factor, e_y, softcap_grad))
    b, tma = _gemm_tile("tiled_backward", e, weight, None)
    units = triton.cdiv(n, b.rows) * triton.cdiv(d, b.cols)
    splits = split_count(units, triton.cdiv(v, b.depth), processors * b.programs)
    u_parts = torch.empty(splits, n, d, dtype=torch.float32, device=device)
    launch(
        _tiled_backward, min(units * splits, processors * b.programs), device,
        operand(e[:, :v], (b.rows, b.depth), tma), operand(weight, (b.depth, b.cols), tma), target, factor, e_y,
        u_parts, n, v, d, e.stride(0), weight.stride(0), splits,
        TMA=tma, PRECISION="ieee", ROWS=b.rows, COLS=b.cols, DEPTH=b.depth, PART=f.cols, **b.options,
    )  # fmt: skip
    u.copy_(u_parts[0] if splits == 1 else u_parts.sum(0))


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

    `method` is "cublas" or "tiled", by default the one in the table.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    hidden, weight, target = dense(hidden), dense(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    work = work_dtype(hidden)
    u = hidden.new_empty(n if with_gradient else 0, d)
    if n == 0:
        return hidden.new_empty(0, dtype=work), u
    if not with_gradient and hidden.dtype != torch.float64:
        options = {"bias": bias, "softcap": softcap, "scale": scale, "ignore_index": ignore_index}
        return score(hidden, weight, target, **options), u
    method = method or tiles.method(hidden.device, hidden.dtype, d)
    logprob = hidden.new_empty(n, dtype=work)
    head = (weight, target, bias, softcap, scale, ignore_index)
    tiled = method == "tiled" and work != torch.float64
    step = rows_per_chunk(n, v, hidden.element_size() if tiled else work.itemsize, hidden.device)
    memory = None if tiled else Logits(min(step, n), v, hidden.dtype, hidden.device)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        part = (hidden[rows], weight, target[rows], *head[2:], logprob[rows], u[rows] if with_gradient else None)
        if memory is None:
            _tiled_chunk(*part)
        else:
            _cublas_chunk(*part, memory)
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
