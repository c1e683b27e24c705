"""The decoder's packed input: rows of z among embedding rows.

Both directions are gathers. Several pairs may read the same z; the backward goes through the inverse of the index, so
that one program writes an output row once, in a fixed order, where scattering would need atomics.

Nothing is read on the host: an index or id out of range, or a pack that is too short, gives rows of NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import inverse_index, launch, sequence_of


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


def forward(
    z: Tensor,  # (B, K, D)
    embedding: Tensor,  # (V, D)
    ids: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S+1,)
    z_index: Tensor | None,  # (S,)
    offset: int,
    scale: float,
) -> Tensor:
    """(T, D) in the embedding's dtype"""
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


def backward(
    grad: Tensor,  # (T, D)
    cu_seqlens: Tensor,  # (S+1,)
    z_index: Tensor | None,  # (S,)
    offset: int,
    b: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """(B, K, D) in `dtype`"""
    t, d = grad.shape
    out = grad.new_empty(b, k, d, dtype=dtype)
    size = tiles.tile("rows", grad.device)
    launch(
        _splice_backward, triton.cdiv(b * k, size.rows), grad.device,
        grad.contiguous(), cu_seqlens, *inverse_index(z_index, b), out, b, t, k, offset, d,
        ROWS=size.rows, COLS=size.cols, **size.options,
    )  # fmt: skip
    return out
