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

import torch
from torch import Tensor

# Bytes of fp32 logits alive at once. CPU: wide enough for GEMM efficiency (W is streamed once per chunk), small
# beside the caches' reach; measured in bench/bench_head.py. GPU: thousands of rows, far above the ~300 that make the
# streaming of W compute-bound.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}

# exp(FLOOR) = 2e-35: far below eps even times V, and far above the denormals that slow a CPU's exp and GEMM tenfold.
FLOOR = -80.0


def rows_per_chunk(device: torch.device, vocabulary: int, itemsize: int) -> int:
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(1, budget // max(1, vocabulary * itemsize))


def _working_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _matmul_operand(x: Tensor) -> Tensor:
    """Only CUDA has GEMMs that read 16 bits and write fp32; elsewhere the operand is widened before the product."""
    return x if x.is_cuda or x.dtype in (torch.float32, torch.float64) else x.float()


class _Chunk:
    """Softmax of one chunk of rows, left in place of its logits: `e` (R, V), row sum `s` and `rest` (R, 1)."""

    def __init__(self, h: Tensor, w: Tensor, y: Tensor, bias: Tensor | None, softcap: float | None, scale: float,
                 out: Tensor):  # fmt: skip
        # h (R, D), w (V, D), y (R,), out (R, V) in the working dtype
        same = h.dtype == out.dtype
        z = torch.mm(h, w.t(), out=out) if same else torch.mm(h, w.t(), out_dtype=out.dtype)
        if bias is not None:
            z.add_(bias)
        if scale != 1.0:
            z.mul_(scale)
        self.slope = None
        if softcap is not None:
            z.div_(softcap).tanh_()
            self.slope = 1 - z * z
            z.mul_(softcap)
        y = y[:, None]
        z_y = z.gather(1, y)
        top = z.amax(1, keepdim=True)
        # A row of −inf alone has no distribution: its log-probability is NaN, as eager PyTorch has it.
        self.e = z.sub_(top).clamp_(min=FLOOR).exp_()
        e_y = self.e.gather(1, y)
        self.e.scatter_(1, y, 0.0)
        self.rest = self.e.sum(1, keepdim=True)
        self.s = self.rest + e_y
        log_s = self.s.log()
        self.logprob = ((z_y - top) - log_s).squeeze(1)
        self.y = y
        self.scale = scale

    def negative_gradient(self) -> Tensor:
        """d logprob / d x (R, V) without its factor per row, `row_factor`."""
        g = self.e.scatter_(1, self.y, -self.rest)
        return g if self.slope is None else g.mul_(self.slope)

    @property
    def row_factor(self) -> Tensor:
        return -self.scale / self.s  # (R, 1)


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64 in [0, V), or ignore_index
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns logprob (N,) in the working dtype, and U (N, D) in hidden's dtype, (0, D) unless asked for."""
    keep = target != ignore_index
    if not bool(keep.all()):
        kept = keep.nonzero().squeeze(1)
        some, some_u = forward(hidden[kept], weight, target[kept], bias, softcap, scale, ignore_index, with_gradient)
        logprob = some.new_zeros(len(hidden)).index_copy_(0, kept, some)
        return logprob, torch.zeros_like(hidden).index_copy_(0, kept, some_u) if with_gradient else some_u
    (n, d), v = hidden.shape, weight.shape[0]
    work = _working_dtype(hidden)
    logprob = hidden.new_empty(n, dtype=work)
    u = hidden.new_empty(n if with_gradient else 0, d)
    w = _matmul_operand(weight)
    step = rows_per_chunk(hidden.device, v, work.itemsize)
    buffer = hidden.new_empty(min(step, n), v, dtype=work)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        h = _matmul_operand(hidden[rows])
        chunk = _Chunk(h, w, target[rows], bias, softcap, scale, buffer[: len(h)])
        logprob[rows] = chunk.logprob
        if with_gradient:
            g = chunk.negative_gradient()
            if g.dtype == w.dtype:
                torch.mm(g, w, out=(out := u[rows] if u.dtype == w.dtype else h))
                torch.mul(out, chunk.row_factor, out=out)
                if out is h:
                    u[rows] = out
            else:
                # 16-bit tensor cores: the factor goes in before rounding, so that E stays within [−1, 1].
                u[rows] = torch.mm(g.mul_(chunk.row_factor).to(w.dtype), w)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a trainable head by recomputing the logits: hidden (N, D), weight (V, D), bias (V,)."""
    keep = target != ignore_index
    if not bool(keep.all()):
        kept = keep.nonzero().squeeze(1)
        some, d_weight, d_bias = backward(
            grad[kept], hidden[kept], weight, target[kept], bias, softcap, scale, ignore_index
        )
        return torch.zeros_like(hidden).index_copy_(0, kept, some), d_weight, d_bias
    n, v = len(hidden), weight.shape[0]
    work = _working_dtype(hidden)
    w = _matmul_operand(weight)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=work)
    d_bias = weight.new_zeros(v, dtype=work)
    step = rows_per_chunk(hidden.device, v, work.itemsize)
    buffer = hidden.new_empty(min(step, n), v, dtype=work)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        h = _matmul_operand(hidden[rows])
        chunk = _Chunk(h, w, target[rows], bias, softcap, scale, buffer[: len(h)])
        e = chunk.negative_gradient().mul_(chunk.row_factor * grad[rows, None].to(work))
        d_bias += e.sum(0)
        e = e.to(w.dtype)
        d_hidden[rows] = torch.mm(e, w).to(hidden.dtype)
        if e.dtype == work:
            d_weight.addmm_(e.t(), h)
        else:
            d_weight += torch.mm(e.t(), h, out_dtype=work)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)
