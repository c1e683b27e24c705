"""The last K rows of packed sequences: z out of the encoder's output.

Both directions are gathers: the backward goes through the inverse of the index, so that one program writes a row once.

Nothing is read on the host: an index out of range, or a sequence that is too short, gives rows of NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import inverse_index, launch, sequence_of


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


def forward(
    hidden: Tensor,  # (T, D)
    cu_seqlens: Tensor,  # (B+1,)
    k: int,
    index: Tensor | None,  # (outputs,)
) -> Tensor:
    """(outputs, K, D)"""
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


def backward(
    grad: Tensor,  # (outputs, K, D)
    cu_seqlens: Tensor,  # (B+1,)
    index: Tensor | None,  # (outputs,)
    length: int,
) -> Tensor:
    """(T, D) with T = `length`"""
    b, (_, k, d) = len(cu_seqlens) - 1, grad.shape
    out = grad.new_empty(length, d)
    if b == 0:
        return out.zero_()
    size = tiles.tile("rows", grad.device)
    launch(
        _pool_last_k_backward, triton.cdiv(length, size.rows), grad.device,
        grad.contiguous(), cu_seqlens, *inverse_index(index, b), out, b, length, b.bit_length(), k, d,
        ROWS=size.rows, COLS=size.cols, **size.options,
    )  # fmt: skip
    return out
