"""Token log-probabilities of a linear head in two GEMMs, for any torch device.

Derivation. With logits z = cap(scale · (h Wᵀ + b)), cap(x) = softcap · tanh(x / softcap) or x, and p = softmax(z),

    logprob = z_y − lse(z)                                              (1)
    d logprob / d h = [cap'(x) · scale · (onehot(y) − p)] W =: U        (2)

W is frozen and the upstream gradient is one number g per row, hence dh = g · U: the forward can leave U behind
while the logits are at hand, and the backward is a row scale. That is 2F in all (F = 2·N·V·D FLOPs).

Blocks. The logits exist in blocks of some rows and some columns: Z = H W_cᵀ, then e = exp(Z − running_max) over Z in
place, then U += e W_c while Z and W_c are still in a CPU's caches. No pass over logits in main memory is left.
`running_max` is a running bound of a row's logits and `running_sumexp` its running sum. A block that raises the bound
by more than RESCALE_THRESHOLD scales what has been summed so far (as in FlashAttention); most blocks raise none.

Exactness of the target column. 1 − p_y cancels when p_y → 1, so the target is left out of e and of U:
with running_sumexp = Σ_{v≠y} e_v, the row sum is s = running_sumexp + e_y, 1 − p_y = running_sumexp / s, and

    U = scale / s · (cap'(x_y) · running_sumexp · W[y] − Σ_{v≠y} cap'(x_v) e_v W[v])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Rows and bytes of logits of a block, and bytes of the rows of W that it meets (in fp32). CPU: all of it stays in the
# caches; measured by bench/bench_linear_logprob_cpu.py --blocks. Elsewhere: few launches, and thousands of rows, far
# above the ~300 that make the streaming of W compute-bound.
ROWS = {"cpu": 1536, "cuda": 8192}
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
WEIGHT_BYTES = {"cpu": 3 << 20, "cuda": 1 << 62}
COLUMNS = 512  # of a block: a multiple of this

# Bytes of a chunk of logits: some rows, all columns. CUDA: with V = 128256 these are 1024 rows of fp32, and U of 8192
# rows at D = 4096 still fits beside them in 600 MB.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 528_000_000}
CHUNK_ROWS = 128  # of a chunk that is large enough: a multiple of this

# exp(MIN_EXPONENT) = 2e-35: far below eps even times V, and far above the denormals that slow a CPU's exp and GEMM
# tenfold.
MIN_EXPONENT = -80.0

# A row's bound is raised by no less: exp(RESCALE_THRESHOLD) is small for fp16 and lets most bounds stay after the first
# block.
RESCALE_THRESHOLD = 8.0


def rows_per_chunk(rows: int, columns: int, itemsize: int, device: torch.device) -> int:
    """Rows of one chunk of (rows, columns) logits, cut evenly; `rows` where one chunk is enough."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    most = max(1, budget // max(1, columns * itemsize))
    if rows <= most:
        return max(rows, 1)
    most = most // CHUNK_ROWS * CHUNK_ROWS or most
    even = -(-rows // -(-rows // most))
    return min(most, -(-even // CHUNK_ROWS) * CHUNK_ROWS)


def block_shape(device: torch.device, n: int, v: int, d: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of the blocks of (n, v) logits: the rows in equal parts."""
    most, logits, weight = (budget.get(device.type, budget["cuda"]) for budget in (ROWS, BLOCK_BYTES, WEIGHT_BYTES))
    rows = -(-n // max(1, -(-n // most)))
    columns = min(logits // (itemsize * max(1, rows)), weight // (itemsize * max(1, d)))
    return max(1, rows), min(v, max(COLUMNS, columns // COLUMNS * COLUMNS))


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of logits, sums and log-probabilities."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _must_widen(x: Tensor) -> bool:
    """Only CUDA has GEMMs that read 16 bits and write fp32; elsewhere operands are widened before the product."""
    return not x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


class State(NamedTuple):
    """What is known of R rows after some of their columns, float64, updated in place."""

    running_max: Tensor  # (R,) bound: no logit so far is larger than running_max + RESCALE_THRESHOLD
    running_sumexp: Tensor  # (R,) Σ exp(z_v − running_max) over v ≠ y
    target: Tensor  # (R,) z_y

    @classmethod
    def start(cls, rows: int, device: torch.device) -> State:
        running_max, running_sumexp, target = torch.zeros(3, rows, dtype=torch.float64, device=device)
        return cls(running_max.fill_(-math.inf), running_sumexp, target)

    def finish(self, softcap: float | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """logprob, and the factors of W[y] and of Σ e W in U, all (R,).

        A row of −inf alone has no distribution: its log-probability is NaN, as eager PyTorch has it.
        """
        x_y = self.target - self.running_max
        s = self.running_sumexp + x_y.exp()
        softcap_grad = 1.0 if softcap is None else 1 - (self.target / softcap).square()
        return x_y - s.log(), scale * softcap_grad * self.running_sumexp / s, -scale / s


class SoftmaxBlock(Protocol):
    """The step between the two GEMMs on a block of C columns, the part of this backend that another one may replace."""

    def __call__(
        self,
        z: Tensor,  # (R, C) h Wᵀ in the working dtype, overwritten
        y: Tensor,  # (R,) int64 the target's column; outside [0, C) in blocks without it
        state: State,
        bias: Tensor | None,  # (C,)
        softcap: float | None,
        scale: float,
        gradient: torch.dtype | None,  # the dtype of the product that e goes into; None: e is not needed
    ) -> tuple[Tensor, Tensor]:
        """Returns e (R, C) and the factor (R,) of sums over earlier columns.

        e = cap'(x) · exp(z − running_max), 0 at the target, in the memory of z, in its dtype or in `gradient`.
        """
        ...


def softmax_block(
    z: Tensor,
    y: Tensor,
    state: State,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`SoftmaxBlock` in plain torch; e stays in the dtype of the logits."""
    if bias is not None:
        z.add_(bias)
    if scale != 1.0:
        z.mul_(scale)
    softcap_grad = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        softcap_grad = 1 - z * z if gradient is not None else None
        z.mul_(softcap)
    here = (y >= 0) & (y < z.shape[1])
    column = y.clamp(0, z.shape[1] - 1)[:, None]
    state.target.copy_(torch.where(here, z.gather(1, column).squeeze(1).double(), state.target))
    running_max = z.amax(1).double()
    raised = running_max > state.running_max + RESCALE_THRESHOLD
    rescale = torch.where(raised, (state.running_max - running_max).exp(), 1.0)
    state.running_max.copy_(torch.where(raised, running_max, state.running_max))
    # A row whose logits were all −inf so far has no bound to subtract.
    shift = torch.where(state.running_max == -math.inf, 0.0, state.running_max)
    e = z.sub_(shift[:, None].to(z.dtype)).clamp_(min=MIN_EXPONENT).exp_()
    e.scatter_(1, column, torch.where(here[:, None], 0.0, e.gather(1, column)))
    state.running_sumexp.mul_(rescale).add_(e.sum(1))
    return (e if softcap_grad is None else e.mul_(softcap_grad)), rescale


class Logits:
    """The product of rows h (R, D) with blocks of W, in the working dtype; another backend may replace it."""

    widens = True  # its callers widen W where `_must_widen` says so

    def __init__(self, h: Tensor, _weight_dtype: torch.dtype):
        self.h = h.float() if _must_widen(h) else h

    def __call__(self, w: Tensor, out: Tensor) -> Tensor:
        """h Wᵀ of w (C, D) in the dtype of out (R, C), and in its memory where that saves a copy."""
        if self.h.dtype == w.dtype == out.dtype:
            return torch.mm(self.h, w.t(), out=out)
        return torch.mm(self.h, w.t(), out_dtype=out.dtype)


def _accumulate(u: Tensor, rescale: Tensor, e: Tensor, w: Tensor, first: bool) -> None:
    """u (R, D) = rescale (R,) · u + e w in the dtype of u, of e (R, C) and w (C, D)."""
    if first:
        u.zero_()
    elif not u.is_cpu:
        u.mul_(rescale[:, None])
    elif bool((raised := rescale != 1).any()):
        rows = raised.nonzero().squeeze(1)
        u[rows] *= rescale[rows, None].to(u.dtype)
    if u.dtype == e.dtype == w.dtype:
        u.addmm_(e, w)
    elif u.is_cpu:
        u += torch.mm(e, w)
    else:
        u += torch.mm(e.to(w.dtype), w, out_dtype=u.dtype)


def _rows_that_count(target: Tensor, ignore_index: int) -> Tensor | None:
    """Places of the rows that are not ignored, ascending; None: all of them."""
    keep = target != ignore_index
    return None if bool(keep.all()) else keep.nonzero().squeeze(1)


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64 in [0, V), or ignore_index
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    block: SoftmaxBlock = softmax_block,
    logits: Callable[[Tensor, torch.dtype], Logits] = Logits,
) -> tuple[Tensor, Tensor]:
    """Returns logprob (N,) in the working dtype, and U (N, D) in hidden's dtype, (0, D) unless asked for."""
    given = hidden
    kept = _rows_that_count(target, ignore_index)
    if kept is not None:
        hidden, target = hidden[kept], target[kept]
    (n, d), v = hidden.shape, weight.shape[0]
    work = work_dtype(hidden)
    logprob = hidden.new_empty(n, dtype=work)
    u = hidden.new_empty(n if with_gradient else 0, d)
    gradient = weight.dtype if with_gradient else None
    height, width = block_shape(hidden.device, n, v, d, work.itemsize)
    buffer = hidden.new_empty(height * width, dtype=work)
    for i in range(0, n, height):
        rows = slice(i, min(i + height, n))
        product = logits(hidden[rows], weight.dtype)
        y = target[rows]
        state = State.start(len(y), y.device)
        in_place = u.dtype == work
        total = u[rows] if in_place else hidden.new_empty(len(y) if with_gradient else 0, d, dtype=work)
        for j in range(0, v, width):
            w = weight[j : j + width]
            wide = w.float() if product.widens and _must_widen(w) else w
            z = product(wide, buffer[: len(y) * len(w)].view(len(y), len(w)))
            some_bias = None if bias is None else bias[j : j + width]
            e, rescale = block(z, y - j, state, some_bias, softcap, scale, gradient)
            if with_gradient:
                _accumulate(total, rescale, e, w if e.dtype == w.dtype else wide, first=j == 0)
        logprob[rows], at_target, elsewhere = state.finish(softcap, scale)
        if with_gradient:
            total.mul_(elsewhere[:, None].to(work)).addcmul_(weight[y].to(work), at_target[:, None].to(work))
            if not in_place:
                u[rows] = total
    if kept is not None:
        logprob = logprob.new_zeros(len(given)).index_copy_(0, kept, logprob)
        u = torch.zeros_like(given).index_copy_(0, kept, u) if with_gradient else u
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
    block: SoftmaxBlock = softmax_block,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a trainable head by recomputing the logits: hidden (N, D), weight (V, D), bias (V,)."""
    given = hidden
    kept = _rows_that_count(target, ignore_index)
    if kept is not None:
        grad, hidden, target = grad[kept], hidden[kept], target[kept]
    n, v = len(hidden), weight.shape[0]
    work = work_dtype(hidden)
    w = weight.float() if _must_widen(weight) else weight
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=work)
    d_bias = weight.new_zeros(v, dtype=work)
    step = rows_per_chunk(n, v, work.itemsize, hidden.device)
    buffer = hidden.new_empty(min(step, n), v, dtype=work)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        product = Logits(hidden[rows], weight.dtype)
        y = target[rows]
        state = State.start(len(y), y.device)
        e, _ = block(product(w, buffer[: len(y)]), y, state, bias, softcap, scale, work)
        _, at_target, elsewhere = state.finish(softcap, scale)
        e.mul_((elsewhere * grad[rows]).to(work)[:, None])
        e.scatter_(1, y[:, None], (at_target * grad[rows]).to(work)[:, None])
        d_bias += e.sum(0)
        e = e.to(w.dtype)
        d_hidden[rows] = torch.mm(e, w).to(hidden.dtype)
        if e.dtype == work:
            d_weight.addmm_(e.t(), product.h)
        else:
            d_weight += torch.mm(e.t(), product.h, out_dtype=work)
    if kept is not None:
        d_hidden = torch.zeros_like(given).index_copy_(0, kept, d_hidden)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)
