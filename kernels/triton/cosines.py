"""Sums of exponentials of cosines over τ, their logarithms and their gradients, with no logits in memory.

Derivation. info_nce.py has the algebra of the loss, linear_logprob.py that of `shifted`. z in base 2; a row dot gives
z_iy of the positive, `_emit_cosine` is a GEMM that writes e_ip = 2^{z_ip − z_iy − margin}, 0 where p is no negative of
i, and its sums of each tile. `_finish_cosine` turns the sums r_i into

    logprob_i = −log(c + r_i / 2^{−margin})        s_i = r_i + c · 2^{−margin}

and −1/s_i, c being how often the partition function holds the positive, and writes −r_i into the positive's place of
e. The gradient of logprob with respect to z is then −e/s: the rows' gradient is −1/s · (e Ĉ), the columns' is
eᵀ (−1/s · rows). There is no pass over e, and bf16 holds it: it has the exponents of fp32.

Cosines are bounded, |z| ≤ 1/τ. So with 1024 columns or more (`margin`) only τ < 0.016 can make r_i + c · 2^{−margin}
exceed LIMIT, with fewer only τ < 0.028. `_finish_cosine` sums such a row, and writes its e, again, shifted by the row's
maximum; nothing waits for the host.

A negative is a column whose id is not the row's, or where there are no ids, one that is not the positive's; with a
limit, one whose z is not above z_y by more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.linear_logprob import LIMIT, LN_2, gemm_tile, margin, scale_rows
from autoregembed.kernels.triton.primitives import (
    LOG2_E,
    exp2,
    finite_shift,
    launch,
    log1p,
    matmul,
    multiprocessors,
    operand,
    product_tile,
    target_products,
    without,
)


@triton.jit(do_not_specialize=["N"])
def _positive_cosine(
    a_ptr, b_ptr, target_ptr, row_norm_ptr, col_norm_ptr, zy_ptr,  # (N, D), (V, D), (N,), (N,), (V,), (N,)
    N, V, D, a_stride, b_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """z_y of rows by a dot in fp32. Rows with a target outside [0, V) get that of column 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    x, y = target_products(a_ptr, b_ptr, target_ptr, row, inside, V, D, a_stride, b_stride, ROWS, COLS)
    z = x * tl.load(col_norm_ptr + y) * tl.load(row_norm_ptr + row, mask=inside, other=0.0)
    tl.store(zy_ptr + row, z, mask=inside)


@triton.jit
def _gap(x, start, row_norm, base, col_norm_ptr, V, COLS: tl.constexpr):
    """z − base of a tile of products x [ROWS, COLS], in base 2."""
    col = start + tl.arange(0, COLS)
    norm = tl.load(col_norm_ptr + col, mask=col < V, other=0.0)
    return x * norm[None, :] * row_norm[:, None] - base[:, None]


@triton.jit
def _negatives(
    x, fill,  # [ROWS, COLS] and a number
    gap, most,  # [ROWS, COLS] and (): no larger gap is a negative's
    y, own, id_ptr,  # [ROWS] column of the positive; or [ROWS] its id, with the columns' (V,)
    start, V, LIMITED: tl.constexpr, WHOLE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x where the column is a negative of the row, `fill` elsewhere."""
    if LIMITED:
        x = tl.where(gap > most, fill, x)
    if id_ptr is None:
        x = without(x, fill, y, start, V, WHOLE, COLS)
    else:
        col = start + tl.arange(0, COLS)
        x = tl.where(tl.load(id_ptr + col, mask=col < V, other=0)[None, :] == own[:, None], fill, x)
        if not WHOLE and start + COLS > V:
            x = tl.where((col < V)[None, :], x, fill)
    return x


@triton.jit(do_not_specialize=["N"])
def _emit_cosine(
    rows, columns,  # (N, D), (V, D): pointers, or descriptors with TMA
    e_out,  # (N, V), stride e_stride, as rows and columns; or None
    target_ptr, own_ptr, id_ptr,  # (N,) int64; or (N,) and (V,) int32
    row_norm_ptr, col_norm_ptr, limit_ptr,  # (N,), (V,), () or None
    zy_ptr, sum_ptr, moment_ptr,  # (N,), (V / COLS, N), the same or None
    N, V, D, a_stride, b_stride, e_stride, margin: tl.float64,
    TMA: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    FLATTEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """GEMM with e = 2^{z − z_y − margin} of the negatives as its result, its sums of a tile, and those of
    e (z − z_y)."""
    margin = tl.full((), margin, tl.float32)
    limit = margin
    if limit_ptr is not None:
        limit = tl.load(limit_ptr)
    blocks = tl.cdiv(N, ROWS)
    # Row blocks are innermost: programs that run together share one tile of the columns.
    for unit in tl.range(tl.program_id(0), blocks * tl.cdiv(V, COLS), tl.num_programs(0), flatten=FLATTEN):
        block = unit % blocks
        t = unit // blocks
        x = product_tile(
            rows, columns, block * ROWS, t * COLS, N, V, D, a_stride, b_stride,
            ROWS, COLS, DEPTH, TMA, EVEN, PRECISION,
        )  # fmt: skip
        row = block * ROWS + tl.arange(0, ROWS)
        z_y = tl.load(zy_ptr + row, mask=row < N, other=0.0)
        row_norm = tl.load(row_norm_ptr + row, mask=row < N, other=0.0)
        if id_ptr is None:
            y = tl.load(target_ptr + row, mask=row < N, other=-1)
            own = y
        else:
            own = tl.load(own_ptr + row, mask=row < N, other=-1)
            y = own
        if moment_ptr is None:
            gap = _gap(x, t * COLS, row_norm, z_y + margin, col_norm_ptr, V, COLS)
            e = exp2(gap, PTX)
            most = limit - margin
        else:
            gap = _gap(x, t * COLS, row_norm, z_y, col_norm_ptr, V, COLS)
            e = exp2(gap - margin, PTX)
            most = limit
        e = _negatives(e, 0.0, gap, most, y, own, id_ptr, t * COLS, V, limit_ptr is not None, WHOLE, COLS)
        tl.store(sum_ptr + tl.cast(t, tl.int64) * N + row, tl.sum(e, 1), mask=row < N)
        if moment_ptr is not None:
            moment = tl.sum(e * gap, 1)
            tl.store(moment_ptr + tl.cast(t, tl.int64) * N + row, moment, mask=row < N)
        if e_out is not None:
            if TMA:
                e_out.store([block * ROWS, t * COLS], e.to(e_out.dtype))
            else:
                e_at = e_out + tl.cast(block, tl.int64) * ROWS * e_stride + t * COLS
                local = tl.arange(0, ROWS)[:, None] * e_stride + tl.arange(0, COLS)[None, :]
                written = (row < N)[:, None] & (t * COLS + tl.arange(0, COLS) < V)[None, :]
                tl.store(e_at + local, e.to(e_out.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["N", "parts", "halves"])
def _finish_cosine(
    a_ptr, b_ptr, e_ptr,  # (halves · N, D), (columns, D), (halves · N, ·) or None
    target_ptr, own_ptr, id_ptr,  # (N,) int64, and (N,) and (columns,) int32 or None
    row_norm_ptr, col_norm_ptr, limit_ptr,  # (halves · N,), (columns,), () or None
    zy_ptr, sum_ptr, moment_ptr,  # (N,), (parts, N), the same or None
    logprob_ptr, elsewhere_ptr, excess_ptr,  # (N,), (N,), (N,) or None
    N, D, a_stride, b_stride, e_stride, parts, halves,
    first0, size0, first1, size1,  # columns of each half
    targets, margin: tl.float64, copies: tl.float64,  # targets lie below `targets`
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sums to log-probabilities, −1/s, and e of the positives. Rows beyond LIMIT are summed, and their e written,
    again."""
    LIMITED: tl.constexpr = limit_ptr is not None
    margin = tl.full((), margin, tl.float32)
    copies = tl.full((), copies, tl.float32)
    limit = margin
    if limit_ptr is not None:
        limit = tl.load(limit_ptr)
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < N
    y = tl.load(target_ptr + row, mask=inside, other=0)
    valid = (y >= 0) & (y < targets)
    z_y = tl.load(zy_ptr + row, mask=inside, other=0.0)
    own = y
    if id_ptr is not None:
        own = tl.load(own_ptr + row, mask=inside, other=-1)
    total = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = part.to(tl.int64)[:, None] * N + row[None, :]
        mask = (part < parts)[:, None] & inside[None, :]
        total += tl.sum(tl.load(sum_ptr + at, mask=mask, other=0.0), 0)
        if moment_ptr is not None:
            moment += tl.sum(tl.load(moment_ptr + at, mask=mask, other=0.0), 0)
    beyond = inside & valid & (total > LIMIT)
    lift = tl.where(beyond, 0.0, margin)
    if tl.max(beyond.to(tl.int32), 0) > 0:
        most = tl.full((ROWS,), -float("inf"), tl.float32)
        again = tl.zeros((ROWS,), tl.float32)
        weighted = tl.zeros((ROWS,), tl.float32)
        for walk in tl.static_range(2):  # for the maximum, then for what is shifted by it
            if walk == 1:
                lift = tl.where(beyond, finite_shift(most), lift)
            for half in range(0, halves):
                begin = tl.where(half == 0, first0, first1).to(tl.int64)
                size = tl.where(half == 0, size0, size1)
                skipped = tl.cast(half, tl.int64) * N
                row_norm = tl.load(row_norm_ptr + skipped + row, mask=inside, other=0.0)
                ids = id_ptr
                if id_ptr is not None:
                    ids = id_ptr + begin
                for t in range(0, tl.cdiv(size, COLS)):
                    x = product_tile(
                        a_ptr + skipped * a_stride, b_ptr + begin * b_stride, block * ROWS, t * COLS, N, size, D,
                        a_stride, b_stride, ROWS, COLS, DEPTH, False, EVEN, PRECISION,
                    )  # fmt: skip
                    gap = _gap(x, t * COLS, row_norm, z_y, col_norm_ptr + begin, size, COLS)
                    if walk == 0:
                        z = _negatives(
                            gap, -float("inf"), gap, limit, y, own, ids, t * COLS, size, LIMITED, False, COLS
                        )
                        most = tl.maximum(most, tl.max(z, 1))
                    else:
                        e = exp2(gap - lift[:, None], PTX)
                        e = _negatives(e, 0.0, gap, limit, y, own, ids, t * COLS, size, LIMITED, False, COLS)
                        again += tl.sum(e, 1)
                        weighted += tl.sum(e * gap, 1)
                        if e_ptr is not None:
                            e_at = e_ptr + (skipped + block * ROWS) * e_stride + t * COLS
                            local = tl.arange(0, ROWS)[:, None] * e_stride + tl.arange(0, COLS)[None, :]
                            counts = beyond[:, None] & (t * COLS + tl.arange(0, COLS) < size)[None, :]
                            tl.store(e_at + local, e.to(e_ptr.dtype.element_ty), mask=counts)
        total = tl.where(beyond, again, total)
        moment = tl.where(beyond, weighted, moment)
        tl.debug_barrier()  # a positive's place in e is written below
    e_y = copies * exp2(-lift, PTX)
    s = total + e_y
    # Relative to the positive's own weight as long as the quotient is finite: exact for p → 1.
    near = (total <= 1.0) & (beyond == 0)
    logprob = tl.where(near, -log1p(total / e_y) - tl.log(copies), -lift * LN_2 - tl.log(s))
    tl.store(logprob_ptr + row, tl.where(valid, logprob, float("nan")), mask=inside)
    if excess_ptr is not None:
        tl.store(excess_ptr + row, tl.where(valid, moment / s, float("nan")), mask=inside)
    if e_ptr is not None:
        tl.store(elsewhere_ptr + row, tl.where(valid, -1.0 / s, float("nan")), mask=inside)
        at = e_ptr + row.to(tl.int64) * e_stride + tl.where(valid, y, 0)
        tl.store(at, (-total).to(e_ptr.dtype.element_ty), mask=inside & valid)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


class Half(NamedTuple):
    rows: Tensor  # (B, D)
    inverse: Tensor  # (B,) 1 / |row|
    first: int  # of its columns
    size: int


class Problem(NamedTuple):
    halves: list[Half]
    columns: Tensor  # (C, D)
    inverse: Tensor  # (C,)
    target: Tensor  # (B,), the positive's column, below
    targets: int
    own: Tensor | None  # (B,) int32, ids of rows, and
    ids: Tensor | None  # (C,) of columns
    limit: Tensor | None  # (), above which z − z_y is no negative's
    copies: int  # of the positive in the partition function


class Found(NamedTuple):
    """logprob (B,); gradients of its sum: of the unit rows of each half, (B, D), and of the unit columns, (C, D), both
    times τ; and Σ softmax · (z − z_y), (B,)."""

    logprob: Tensor
    rows: list[Tensor]
    columns: Tensor | None
    excess: Tensor | None


def _parts(p: Problem, n: int) -> list[tuple[slice, slice, int]]:
    """(rows, columns, halves) of each launch over n rows of each half: halves with the same columns are one."""
    halves = [(half.first, half.first + half.size) for half in p.halves]
    if len(halves) == 2 and halves[0] == halves[1]:
        return [(slice(0, 2 * n), slice(*halves[0]), 2)]
    return [(slice(j * n, (j + 1) * n), slice(*half), 1) for j, half in enumerate(halves)]


def _chunk(
    p: Problem, at: slice, temperature: Tensor, e: Tensor | None, logprob: Tensor, elsewhere: Tensor,
    excess: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows of the problem, both halves one after the other; writes e (their number, ·), logprob, −1/s and excess."""
    n, device, count = at.stop - at.start, p.columns.device, len(p.halves)
    rows = torch.cat([half.rows[at] for half in p.halves]) if count > 1 else p.halves[0].rows[at]
    norm = torch.cat([half.inverse[at] for half in p.halves]) * (LOG2_E / temperature)
    y, own = p.target[at], None if p.own is None else p.own[at]
    z_y = torch.empty(n, dtype=torch.float32, device=device)
    d, t = rows.shape[1], tiles.tile("rows", device)
    launch(
        _positive_cosine, triton.cdiv(n, t.rows), device,
        rows, p.columns, y, norm, p.inverse, z_y, n, p.targets, d, rows.stride(0), p.columns.stride(0),
        ROWS=t.rows, COLS=t.cols, **t.options,
    )  # fmt: skip
    parts = _parts(p, n)
    kind = "emit_cosine" if excess is None else "emit_cosine_moments"
    found = [gemm_tile(kind, rows[part], p.columns[to]) for part, to, _ in parts]
    heights = [triton.cdiv(to.stop - to.start, t.cols) * m for (t, _), (_, to, m) in zip(found, parts, strict=True)]
    sums = torch.empty(sum(heights), n, dtype=torch.float32, device=device)
    moments = None if excess is None else torch.empty_like(sums)
    lift = margin(sum(half.size for half in p.halves))
    for (part, to, m), (t, tma), first in zip(parts, found, (0, heights[0]), strict=False):
        a, b, size = rows[part], p.columns[to], to.stop - to.start
        out = None if e is None else e[part, :size]
        of_rows = [x if x is None or m == 1 else torch.cat([x] * m) for x in (y, own, z_y)]
        launch(
            _emit_cosine,
            min(triton.cdiv(len(a), t.rows) * triton.cdiv(size, t.cols), multiprocessors(device) * t.programs), device,
            operand(a, (t.rows, t.depth), tma), operand(b, (t.cols, t.depth), tma),
            None if out is None else operand(out, (t.rows, t.cols), tma),
            *of_rows[:2], None if p.ids is None else p.ids[to], norm[part], p.inverse[to], p.limit,
            of_rows[2], sums[first:], None if moments is None else moments[first:],
            len(a), size, d, a.stride(0), b.stride(0), 0 if out is None else out.stride(0), lift,
            TMA=tma, EVEN=d % t.depth == 0, WHOLE=size % t.cols == 0, PRECISION="ieee",
            PTX=tiles.has_ptx(device), FLATTEN=tma, ROWS=t.rows, COLS=t.cols, DEPTH=t.depth, **t.options,
        )  # fmt: skip
    t, _ = gemm_tile("finish", rows, p.columns)
    launch(
        _finish_cosine, triton.cdiv(n, t.rows), device,
        rows, p.columns, e, y, own, p.ids, norm, p.inverse, p.limit, z_y, sums, moments,
        logprob, elsewhere, excess,
        n, d, rows.stride(0), p.columns.stride(0), 0 if e is None else e.stride(0), len(sums), count,
        *p.halves[0][2:], *p.halves[-1][2:], p.targets, lift, float(p.copies),
        EVEN=d % t.depth == 0, PRECISION="ieee", PTX=tiles.has_ptx(device),
        ROWS=t.rows, COLS=t.cols, DEPTH=t.depth, PARTS=min(32, triton.next_power_of_2(len(sums))), **t.options,
    )  # fmt: skip
    return rows


def solve(
    p: Problem,
    unit: Tensor | None,  # (C, D), the unit columns, for the gradient of rows
    columns_gradient: bool,
    temperature: Tensor,
    temperature_gradient: bool,
) -> Found:
    (b, d), device, count = p.halves[0].rows.shape, p.columns.device, len(p.halves)
    logprob, elsewhere, excess = torch.empty(3, b, dtype=torch.float32, device=device).unbind()
    g_rows = [torch.empty(b, d, dtype=torch.float32, device=device) for _ in p.halves if unit is not None]
    g_columns = torch.zeros(len(p.columns), d, dtype=torch.float32, device=device) if columns_gradient else None
    width = -(-max(half.size for half in p.halves) // 16) * 16
    # Twice the head's bytes: the columns' gradient is read and written once a chunk.
    step = rows_per_chunk(b, -(-count * p.columns.element_size() * width // 2), 1, device)
    e = p.columns.new_empty(count * step, width) if unit is not None or columns_gradient else None
    for i in range(0, b, step):
        at = slice(i, min(i + step, b))
        n = at.stop - i
        found = excess[at] if temperature_gradient else None
        rows = _chunk(p, at, temperature, e, logprob[at], elsewhere[at], found)
        if unit is not None:
            for j, half in enumerate(p.halves):
                product = matmul(
                    e[j * n : (j + 1) * n, : half.size], unit[half.first : half.first + half.size], g_rows[j][at]
                )
                product.mul_(elsewhere[at, None])
        if g_columns is not None:
            factors = torch.cat([elsewhere[at] * half.inverse[at] for half in p.halves])
            for place, (part, to, _) in enumerate(_parts(p, n)):
                transposed = e[part, : to.stop - to.start].t()
                scaled, into = scale_rows(factors[part], rows[part]), g_columns[to]
                if i == 0 and place == 0:
                    matmul(transposed, scaled, into)
                else:
                    into += matmul(transposed, scaled, torch.empty_like(into))
    return Found(logprob, g_rows, g_columns, excess if temperature_gradient else None)
