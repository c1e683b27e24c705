"""Rows moved between packs: `pool_last_k` reads z out of the encoder's output, `splice` writes the decoder's input.

Both are gathers in either direction. A backward that would scatter (several pairs read the same z) goes through the
inverse of the index instead, so that every output row is written once, by one program, in a fixed order.

Nothing is read on the host: an index or id out of range, or a pack that is too short, gives rows of NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import launch, sequence_of


@triton.jit(do_not_specialize=["B", "T", "outputs"])
def _pool_last_k(
    hidden_ptr, cu_ptr, index_ptr, out_ptr,  # (T, D), (B+1,), (outputs,) or None, (outputs, K, D)
    B, T, outputs, K, D, stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[i, k] = hidden[cu[index[i] + 1] − K + k]"""
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = out_row < outputs * K
    s = (out_row // K).to(tl.int64)
    if index_ptr is not None:
        s = tl.load(index_ptr + s, mask=inside, other=0).to(tl.int64)
    good = (s >= 0) & (s < B)
    s = tl.where(good, s, 0)
    end = tl.load(cu_ptr + s + 1, mask=inside, other=0).to(tl.int64)
    start = tl.load(cu_ptr + s, mask=inside, other=0).to(tl.int64)
    row = end - K + out_row % K
    good = good & (start >= 0) & (end - K >= start) & (end <= T)
    for first in range(0, D, COLS):
        d = first + tl.arange(0, COLS)
        mask = inside[:, None] & (d < D)[None, :]
        x = tl.load(hidden_ptr + row[:, None] * stride + d[None, :], mask=mask & good[:, None], other=float("nan"))
        tl.store(out_ptr + out_row.to(tl.int64)[:, None] * D + d[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["B", "T", "steps"])
def _pool_last_k_backward(
    grad_ptr, cu_ptr, order_ptr, first_ptr, out_ptr,  # (outputs, K, D), (B+1,), (outputs,), (B+1,), (T, D)
    B, T, steps, K, D,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ over the outputs that read t. Those of sequence s are order[first[s] : first[s + 1]]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < T
    s, _, end = sequence_of(cu_ptr, row, B, steps)
    k = row - (end - K)
    taken = inside & (k >= 0) & (k < K)
    if order_ptr is not None:
        first = tl.load(first_ptr + s)
        count = tl.where(taken, tl.load(first_ptr + s + 1) - first, 0)
    else:
        first = s
        count = tl.where(taken, 1, 0)
    most = tl.max(count)
    for start in range(0, D, COLS):
        d = start + tl.arange(0, COLS)
        total = tl.zeros((ROWS, COLS), tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32)
        for n in range(0, most):
            i = first + n
            if order_ptr is not None:
                i = tl.load(order_ptr + i, mask=n < count, other=0)
            at = (i * K + k).to(tl.int64)[:, None] * D + d[None, :]
            mask = (n < count)[:, None] & (d < D)[None, :]
            total += tl.load(grad_ptr + at, mask=mask, other=0.0).to(total.dtype)
        at = out_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["B", "S", "T", "V", "steps", "offset"])
def _splice(
    z_ptr, embedding_ptr, id_ptr, cu_ptr, z_index_ptr, out_ptr,  # (B, K, D), (V, D), (T,), (S+1,), (S,) or None, (T, D)
    B, S, T, V, steps, K, offset, D, stride, scale: tl.float64,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Row t of pair s, j = t − cu[s] − offset: z[z_index[s], j] for 0 ≤ j < K, else scale · embedding[id[t]]."""
    WORK: tl.constexpr = tl.float64 if embedding_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < T
    s, start, end = sequence_of(cu_ptr, row, S, steps)
    placed = (row >= start) & (row < end)
    j = row - start - offset
    compress = (j >= 0) & (j < K)
    b = s
    if z_index_ptr is not None:
        b = tl.load(z_index_ptr + s)
    token = tl.load(id_ptr + row, mask=inside & ~compress, other=0).to(tl.int64)
    z_good = inside & placed & compress & (b >= 0) & (b < B)
    token_good = inside & placed & ~compress & (token >= 0) & (token < V)
    factor = tl.full((), scale, WORK)
    for first in range(0, D, COLS):
        d = first + tl.arange(0, COLS)
        cols = (d < D)[None, :]
        z_at = (b * K + j).to(tl.int64)[:, None] * D + d[None, :]
        z = tl.load(z_ptr + z_at, mask=z_good[:, None] & cols, other=float("nan")).to(WORK)
        e_at = token[:, None] * stride + d[None, :]
        e = tl.load(embedding_ptr + e_at, mask=token_good[:, None] & cols, other=float("nan")).to(WORK)
        x = tl.where(compress[:, None], z, e * factor)
        at = out_ptr + row.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside[:, None] & cols)


@triton.jit(do_not_specialize=["B", "T", "offset"])
def _splice_backward(
    grad_ptr, cu_ptr, order_ptr, first_ptr, out_ptr,  # (T, D), (S+1,), (S,), (B+1,), (B, K, D)
    B, T, K, offset, D,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out[b, k] = Σ over the pairs s that read z[b] of grad[cu[s] + offset + k], pairs in ascending order."""
    out_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = out_row < B * K
    b = tl.where(inside, out_row // K, 0)
    k = out_row % K
    if order_ptr is not None:
        first = tl.load(first_ptr + b)
        count = tl.where(inside, tl.load(first_ptr + b + 1) - first, 0)
    else:
        first = b
        count = tl.where(inside, 1, 0)
    most = tl.max(count)
    for start in range(0, D, COLS):
        d = start + tl.arange(0, COLS)
        total = tl.zeros((ROWS, COLS), tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32)
        for n in range(0, most):
            s = first + n
            if order_ptr is not None:
                s = tl.load(order_ptr + s, mask=n < count, other=0)
            row = tl.load(cu_ptr + s, mask=n < count, other=0).to(tl.int64) + offset + k
            end = tl.load(cu_ptr + s + 1, mask=n < count, other=0).to(tl.int64)
            read = (n < count) & (row >= 0) & (row < end) & (row < T)
            at = grad_ptr + row[:, None] * D + d[None, :]
            total += tl.load(at, mask=read[:, None] & (d < D)[None, :], other=0.0).to(total.dtype)
        at = out_ptr + out_row.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


def _inverse(index: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Who reads each of `size` items: order[first[i] : first[i + 1]], ascending. None stands for the identity."""
    if index is None:
        return None, None
    values, order = index.sort(stable=True)
    return order, torch.searchsorted(values, torch.arange(size + 1, device=index.device, dtype=values.dtype))


def pool_last_k(hidden: Tensor, cu_seqlens: Tensor, k: int, index: Tensor | None) -> Tensor:
    """(T, D), (B+1,), (outputs,) or None -> (outputs, K, D)"""
    b, (t, d) = len(cu_seqlens) - 1, hidden.shape
    outputs = b if index is None else len(index)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    out = hidden.new_empty(outputs, k, d)
    size = tiles.tile("rows", hidden.device)
    launch(
        _pool_last_k, triton.cdiv(outputs * k, size.rows), hidden.device,
        hidden, cu_seqlens, index, out, b, t, outputs, k, d, hidden.stride(0),
        ROWS=size.rows, COLS=size.cols, **size.options,
    )  # fmt: skip
    return out


def pool_last_k_backward(grad: Tensor, cu_seqlens: Tensor, index: Tensor | None, length: int) -> Tensor:
    """(outputs, K, D) -> (T, D)"""
    b, (_, k, d) = len(cu_seqlens) - 1, grad.shape
    out = grad.new_empty(length, d)
    if b == 0:
        return out.zero_()
    size = tiles.tile("rows", grad.device)
    launch(
        _pool_last_k_backward, triton.cdiv(length, size.rows), grad.device,
        grad.contiguous(), cu_seqlens, *_inverse(index, b), out, b, length, b.bit_length(), k, d,
        ROWS=size.rows, COLS=size.cols, **size.options,
    )  # fmt: skip
    return out


def splice(
    z: Tensor, embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, z_index: Tensor | None, offset: int, scale: float
) -> Tensor:
    """(B, K, D), (V, D), (T,), (S+1,), (S,) or None -> (T, D) in the embedding's dtype"""
    (b, k, d), v, t, s = z.shape, len(embedding), len(ids), len(cu_seqlens) - 1
    embedding = embedding if embedding.stride(1) == 1 else embedding.contiguous()
    out = embedding.new_empty(t, d)
    if s == 0:
        return out.fill_(float("nan"))
    size = tiles.tile("rows", z.device)
    launch(
        _splice, triton.cdiv(t, size.rows), z.device,
        z.contiguous(), embedding, ids, cu_seqlens, z_index, out,
        b, s, t, v, s.bit_length(), k, offset, d, embedding.stride(0), scale,
        ROWS=size.rows, COLS=size.cols, **size.options,
    )  # fmt: skip
    return out


def splice_backward(
    grad: Tensor, cu_seqlens: Tensor, z_index: Tensor | None, offset: int, b: int, k: int, dtype: torch.dtype
) -> Tensor:
    """(T, D) -> (B, K, D) in `dtype`"""
    t, d = grad.shape
    out = grad.new_empty(b, k, d, dtype=dtype)
    size = tiles.tile("rows", grad.device)
    launch(
        _splice_backward, triton.cdiv(b * k, size.rows), grad.device,
        grad.contiguous(), cu_seqlens, *_inverse(z_index, b), out, b, t, k, offset, d,
        ROWS=size.rows, COLS=size.cols, **size.options,
    )  # fmt: skip
    return out
