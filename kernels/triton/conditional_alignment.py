"""What stands between the head and stage 2's loss: scores of the parts that sequences play, and gradients of tokens.

Parts are numbered a (B,), b (B,), then c (B·M,); each names its sequence by its place in the pack. A program sums one
part's sequence, and one finds the gradient of some rows from all parts that their sequences play: both in a fixed
order, without sorting. Nothing is read on the host: a place outside the pack gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import launch, sequence_of
from autoregembed.kernels.triton.segment_sum import segment


@triton.jit
def _of_parts(a_ptr, b_ptr, c_ptr, part, B, C, other):
    """What a (B,), b (B,) and c (C,) hold for each part; `other` past the last."""
    a = tl.load(a_ptr + part, mask=part < B, other=0)
    b = tl.load(b_ptr + part - B, mask=(part >= B) & (part < 2 * B), other=0)
    c = tl.load(c_ptr + part - 2 * B, mask=(part >= 2 * B) & (part < 2 * B + C), other=0)
    return tl.where(part < 2 * B + C, a + b + c, other)


@triton.jit(do_not_specialize=["S", "N", "B", "C"])
def _part_scores(
    x_ptr, cu_ptr,  # (N,), (S+1,)
    a_ptr, b_ptr, c_ptr,  # (B,), (B,), (C,) places
    score_ptr, there_ptr,  # (2 B + C,), (C,)
    S, N, B, C, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part's score, the sum or mean of its sequence; and whether there is such a negative."""
    part = tl.program_id(0)
    place = _of_parts(a_ptr, b_ptr, c_ptr, part, B, C, 0)
    negative = part >= 2 * B
    absent = negative & (place == -1)
    inside = (place >= 0) & (place < S)
    total, count, good = segment(x_ptr, cu_ptr, tl.where(inside, place, 0), S, N, BLOCK)
    if MEAN:
        total = total / count.to(total.dtype)
    score = tl.where(inside & good, total, float("nan"))
    tl.store(score_ptr + part, tl.where(absent, 0.0, score))
    tl.store(there_ptr + part - 2 * B, tl.where(absent, 0, 1).to(tl.int8), mask=negative)


@triton.jit(do_not_specialize=["S", "N", "B", "C", "steps"])
def _row_gradients(
    a_ptr, b_ptr, c_ptr,  # (B,), (B,), (C,) places
    da_ptr, db_ptr, dc_ptr,  # (B,), (B,), (C,) gradients of scores
    cu_ptr, out_ptr,  # (S+1,), (N,)
    S, N, B, C, steps, MEAN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The loss's gradient of a token's log-probability; NaN where no sequence holds the token."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s, start, end = sequence_of(cu_ptr, row, S, steps)
    total = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    for first in range(0, 2 * B + C, PARTS):
        part = first + tl.arange(0, PARTS)
        place = _of_parts(a_ptr, b_ptr, c_ptr, part, B, C, -1)
        gradient = _of_parts(da_ptr, db_ptr, dc_ptr, part, B, C, 0.0)
        total += tl.sum(tl.where(place[None, :] == s[:, None], gradient[None, :], 0.0), 1)
    if MEAN:
        total = total / tl.maximum(end - start, 1).to(total.dtype)
    tl.store(out_ptr + row, tl.where((row >= start) & (row < end), total, float("nan")), mask=row < N)


def part_scores(
    logprob: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    places: tuple[Tensor, Tensor, Tensor],  # (B,), (B,), (B, M) int64; −1 for a negative that there is not
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a (B,), b (B,), c (B, M), and the mask (B, M) of the negatives that there are."""
    b, c = len(places[0]), places[2].numel()
    scores = logprob.new_empty(2 * b + c)
    there = torch.empty(places[2].shape, dtype=torch.bool, device=logprob.device)
    t = tiles.tile("segment_sum", logprob.device)
    launch(
        _part_scores, 2 * b + c, logprob.device, logprob, cu_seqlens.contiguous(), *(x.contiguous() for x in places),
        scores, there.view(torch.int8), len(cu_seqlens) - 1, len(logprob), b, c, MEAN=mean, BLOCK=t.cols, **t.options,
    )  # fmt: skip
    return scores[:b], scores[b : 2 * b], scores[2 * b :].view(there.shape), there


def row_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],  # (B,), (B,), (B, M) of the scores
    cu_seqlens: Tensor,  # (S+1,)
    places: tuple[Tensor, Tensor, Tensor],  # (B,), (B,), (B, M)
    mean: bool,
    length: int,
) -> Tensor:
    """(N,) with N = `length`"""
    s, b, c = len(cu_seqlens) - 1, len(places[0]), places[2].numel()
    out = gradients[0].new_empty(length)
    if s == 0:
        return out.fill_(float("nan"))
    t = tiles.tile("row_gradients", out.device)
    launch(
        _row_gradients, triton.cdiv(length, t.rows), out.device, *(x.contiguous() for x in (*places, *gradients)),
        cu_seqlens.contiguous(), out, s, length, b, c, s.bit_length(), MEAN=mean, BLOCK=t.rows,
        PARTS=t.cols, **t.options,
    )  # fmt: skip
    return out
