"""Token log-probabilities of a linear head in two GEMMs, for any torch device.

Derivation. With logits z = cap(scale · (h Wᵀ + b)), cap(x) = softcap · tanh(x / softcap) or x, and p = softmax(z),

    logprob = z_y − lse(z)                                              (1)
    d logprob / d h = [cap'(x) · scale · (onehot(y) − p)] W =: E W =: U    (2)

W is frozen and the upstream gradient is one number g per row, hence dh = g · U: the forward can leave U behind
while the logits are at hand, and the backward is a row scale. Per chunk of rows: Z = H Wᵀ, E over Z in place,
U = E W. That is 2F in all (F = 2·N·V·D FLOPs), and one chunk of logits is the only tensor with a V in it.

Exactness of the target column. 1 − p_y cancels when p_y → 1, so the target is taken out of the row first:
with e = exp(z − max z) and rest = Σ_{v≠y} e_v, the row sum is s = rest + e_y and 1 − p_y = rest / s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Bytes of fp32 logits alive at once. CPU: wide enough for GEMM efficiency (W is streamed once per chunk), small
# beside the caches' reach; measured in bench/bench_head.py. GPU: thousands of rows, far above the ~300 that make the
# streaming of W compute-bound.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}

# Bytes of logits that the passes of `softmax_chunk` take at a time: every pass but the first finds them in a CPU's L2.
# Elsewhere one launch over the whole chunk beats several.
BLOCK_BYTES = {"cpu": 1 << 20}

# Bytes of W widened to fp32 at a time.
WIDEN_BYTES = 8 << 20

# exp(FLOOR) = 2e-35: far below eps even times V, and far above the denormals that slow a CPU's exp and GEMM tenfold.
FLOOR = -80.0


def rows_per_chunk(device: torch.device, vocabulary: int, itemsize: int) -> int:
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(1, budget // max(1, vocabulary * itemsize))


def _working_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _must_widen(x: Tensor) -> bool:
    """Only CUDA has GEMMs that read 16 bits and write fp32; elsewhere operands are widened before the product."""
    return not x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _widened(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """W in blocks of rows of fp32: the copy of one block stays in cache, a copy of all of W would double the memory."""
    step = max(1, WIDEN_BYTES // (4 * max(1, weight.shape[1])))
    for i in range(0, len(weight), step):
        rows = slice(i, i + step)
        yield rows, weight[rows].float()


class Chunk(NamedTuple):
    """What the middle step leaves of one chunk of R rows."""

    logprob: Tensor  # (R,)
    e: Tensor  # (R, V), in the memory of the logits, in their dtype or in that asked for; undefined without a gradient
    factor: Tensor  # (R,): d logprob / d (h Wᵀ + b) = factor · e


class Middle(Protocol):
    """The step between the two GEMMs, the part of this route that another one may replace."""

    def __call__(
        self,
        z: Tensor,  # (R, V) h Wᵀ in the working dtype, overwritten
        y: Tensor,  # (R,) int64 in [0, V)
        bias: Tensor | None,  # (V,)
        softcap: float | None,
        scale: float,
        gradient: torch.dtype | None,  # the dtype of the product that e goes into; None: e is not needed
    ) -> Chunk: ...


def softmax_chunk(
    z: Tensor, y: Tensor, bias: Tensor | None, softcap: float | None, scale: float, gradient: torch.dtype | None
) -> Chunk:
    """`Middle` in plain torch; e stays in the dtype of the logits."""
    budget = BLOCK_BYTES.get(z.device.type)
    block = len(z) if budget is None else max(1, budget // (z.shape[1] * z.itemsize))
    parts = [
        _softmax_block(rows, y_rows, bias, softcap, scale, gradient is not None)
        for rows, y_rows in zip(z.split(block), y.split(block), strict=True)
    ]
    logprob, factor = (torch.cat(column) for column in zip(*parts, strict=True))
    return Chunk(logprob, z, factor)


def _softmax_block(
    z: Tensor, y: Tensor, bias: Tensor | None, softcap: float | None, scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """`Middle` for some rows: their log-probabilities and factors; z becomes e."""
    if bias is not None:
        z.add_(bias)
    if scale != 1.0:
        z.mul_(scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z if with_gradient else None
        z.mul_(softcap)
    y = y[:, None]
    z_y = z.gather(1, y)
    top = z.amax(1, keepdim=True)
    # A row of −inf alone has no distribution: its log-probability is NaN, as eager PyTorch has it.
    e = z.sub_(top).clamp_(min=FLOOR).exp_()
    e_y = e.gather(1, y)
    e.scatter_(1, y, 0.0)
    rest = e.sum(1, keepdim=True)
    s = rest + e_y
    logprob = (z_y - top) - s.log()
    if with_gradient:
        e.scatter_(1, y, -rest)
        if slope is not None:
            e.mul_(slope)
    return logprob.squeeze(1), (-scale / s).squeeze(1)


def _logits(h: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """h Wᵀ of h (R, D) and w (V, D) in out (R, V)."""
    if h.dtype == w.dtype == out.dtype:
        return torch.mm(h, w.t(), out=out)
    if not _must_widen(w):
        return torch.mm(h, w.t(), out_dtype=out.dtype)
    for columns, part in _widened(w):
        torch.mm(h, part.t(), out=out[:, columns])
    return out


def _times_weight(e: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """e W of e (R, V) and w (V, D) in out (R, D) of e's dtype."""
    if e.dtype == w.dtype:
        return torch.mm(e, w, out=out)
    out.zero_()
    for columns, part in _widened(w):
        out.addmm_(e[:, columns], part)
    return out


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64 in [0, V), or ignore_index
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    middle: Middle = softmax_chunk,
) -> tuple[Tensor, Tensor]:
    """Returns logprob (N,) in the working dtype, and U (N, D) in hidden's dtype, (0, D) unless asked for."""
    keep = target != ignore_index
    if not bool(keep.all()):
        kept = keep.nonzero().squeeze(1)
        some, some_u = forward(
            hidden[kept], weight, target[kept], bias, softcap, scale, ignore_index, with_gradient, middle
        )
        logprob = some.new_zeros(len(hidden)).index_copy_(0, kept, some)
        return logprob, torch.zeros_like(hidden).index_copy_(0, kept, some_u) if with_gradient else some_u
    (n, d), v = hidden.shape, weight.shape[0]
    work = _working_dtype(hidden)
    logprob = hidden.new_empty(n, dtype=work)
    u = hidden.new_empty(n if with_gradient else 0, d)
    gradient = weight.dtype if with_gradient else None
    step = rows_per_chunk(hidden.device, v, work.itemsize)
    buffer = hidden.new_empty(min(step, n), v, dtype=work)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        h = hidden[rows].float() if _must_widen(hidden) else hidden[rows]
        z = _logits(h, weight, buffer[: len(h)])
        logprob[rows], e, factor = middle(z, target[rows], bias, softcap, scale, gradient)
        if with_gradient:
            if e.dtype == weight.dtype or _must_widen(weight):
                out = u[rows] if u.dtype == e.dtype else h
                torch.mul(_times_weight(e, weight, out), factor[:, None], out=out)
                if out is h:
                    u[rows] = out
            else:
                # 16-bit tensor cores: the factor goes in before rounding, so that E stays within [−1, 1].
                u[rows] = torch.mm(e.mul_(factor[:, None]).to(weight.dtype), weight)
    return logprob, u


def backward(
    grad: Tensor,  # (N,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64 in [0, V), or ignore_index
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    middle: Middle = softmax_chunk,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a trainable head by recomputing the logits: hidden (N, D), weight (V, D), bias (V,)."""
    keep = target != ignore_index
    if not bool(keep.all()):
        kept = keep.nonzero().squeeze(1)
        some, d_weight, d_bias = backward(
            grad[kept], hidden[kept], weight, target[kept], bias, softcap, scale, ignore_index, middle
        )
        return torch.zeros_like(hidden).index_copy_(0, kept, some), d_weight, d_bias
    n, v = len(hidden), weight.shape[0]
    work = _working_dtype(hidden)
    w = weight.float() if _must_widen(weight) else weight
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=work)
    d_bias = weight.new_zeros(v, dtype=work)
    step = rows_per_chunk(hidden.device, v, work.itemsize)
    buffer = hidden.new_empty(min(step, n), v, dtype=work)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        h = hidden[rows].float() if _must_widen(hidden) else hidden[rows]
        _, e, factor = middle(_logits(h, w, buffer[: len(h)]), target[rows], bias, softcap, scale, work)
        e.mul_((factor * grad[rows].to(work))[:, None])
        d_bias += e.sum(0)
        e = e.to(w.dtype)
        d_hidden[rows] = torch.mm(e, w).to(hidden.dtype)
        if e.dtype == work:
            d_weight.addmm_(e.t(), h)
        else:
            d_weight += torch.mm(e.t(), h, out_dtype=work)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)
