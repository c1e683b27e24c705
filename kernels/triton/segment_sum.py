"""Sums over the sequences of a pack, and their gradient.

A program adds one sequence, always in the same order. Nothing is read on the host: bad bounds give NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import launch, sequence_of


@triton.jit
def segment(x_ptr, cu_ptr, i, S, N, BLOCK: tl.constexpr):
    """Σ x[cu[i] : cu[i+1]], always added in the same order, the number of terms, and whether cu is a row from 0 to N
    there."""
    first = tl.load(cu_ptr + i).to(tl.int64)
    last = tl.load(cu_ptr + i + 1).to(tl.int64)
    good = (first >= 0) & (first <= last) & (last <= N) & ((i > 0) | (first == 0)) & ((i < S - 1) | (last == N))
    count = tl.where(good, last - first, 0)
    sums = tl.zeros((BLOCK,), tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(x_ptr + first + at, mask=at < count, other=0.0).to(sums.dtype)
    return tl.sum(sums), count, good


@triton.jit(do_not_specialize=["S", "N"])
def _segment_sum(x_ptr, cu_ptr, out_ptr, S, N, BLOCK: tl.constexpr):
    """out[i] = Σ x[cu[i] : cu[i+1]]; NaN where cu is not a row from 0 to N."""
    i = tl.program_id(0)
    total, _, good = segment(x_ptr, cu_ptr, i, S, N, BLOCK)
    tl.store(out_ptr + i, tl.where(good, total, float("nan")))


@triton.jit(do_not_specialize=["S", "N", "steps"])
def _segment_sum_backward(x_ptr, cu_ptr, out_ptr, S, N, steps, BLOCK: tl.constexpr):
    """out[t] = x of the sequence that holds t; NaN where none does."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s, start, end = sequence_of(cu_ptr, row, S, steps)
    x = tl.load(x_ptr + s).to(tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    tl.store(out_ptr + row, tl.where((row >= start) & (row < end), x, float("nan")), mask=row < N)


def forward(
    x: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
) -> Tensor:
    """(S,)"""
    s = len(cu_seqlens) - 1
    out = x.new_empty(s)
    t = tiles.tile("segment_sum", x.device)
    launch(
        _segment_sum, s, x.device, x.contiguous(), cu_seqlens.contiguous(), out, s, len(x), BLOCK=t.cols, **t.options
    )
    return out


def backward(
    grad: Tensor,  # (S,)
    cu_seqlens: Tensor,  # (S+1,)
    length: int,
) -> Tensor:
    """(N,) with N = `length`"""
    s = len(grad)
    out = grad.new_empty(length)
    if s == 0:
        return out.fill_(float("nan"))
    t = tiles.tile("segment_sum", grad.device)
    launch(
        _segment_sum_backward, triton.cdiv(length, t.cols), grad.device,
        grad.contiguous(), cu_seqlens.contiguous(), out, s, length, s.bit_length(), BLOCK=t.cols, **t.options,
    )  # fmt: skip
    return out
