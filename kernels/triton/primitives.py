"""What two or more kernels share: launching, chunking, and the pieces of an exact log-softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret

_recorder: Callable[..., None] | None = None


@contextlib.contextmanager
def recording(callback: Callable[..., None]) -> Iterator[None]:
    """Inside, `launch` hands (kernel, programs, args, options) to `callback` and runs nothing: how kernels are compiled
    for other parts (bench/compile_report.py), with tensors on the meta device."""
    global _recorder
    _recorder = callback
    try:
        yield
    finally:
        _recorder = None


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Runs `programs` programs of a kernel on `device` and its current stream, whatever the current device is."""
    if _recorder is not None:
        _recorder(kernel, programs, args, options)
    elif programs > 0:
        if device.type == "cpu" and not INTERPRETED:
            raise RuntimeError("TRITON_INTERPRET=1 was not set when Triton was imported: its kernels need a GPU")
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            kernel[(programs,)](*args, **options)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3


def split_count(blocks: int, limit: int, processors: int) -> int:
    """Into how many parts to cut the long axis so that blocks · parts programs fill the processors; at most `limit`.

    The smallest count that keeps at least 95% of them busy, else the one that keeps most.
    """
    best, best_fill = 1, 0.0
    for parts in range(1, max(1, min(limit, 16, 4 * processors // max(1, blocks) + 1)) + 1):
        units = blocks * parts
        fill = units / (-(-units // processors) * processors)
        if fill >= 0.95:
            return parts
        if fill > best_fill:
            best, best_fill = parts, fill
    return best


def dense(x: Tensor) -> Tensor:
    """x (rows, columns) with columns next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def inverse_index(index: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Who reads each of `size` items: order[first[i] : first[i + 1]], ascending. None stands for the identity."""
    if index is None:
        return None, None
    values, order = index.sort(stable=True)
    return order, torch.searchsorted(values, torch.arange(size + 1, device=index.device, dtype=values.dtype))


class Logits:
    """The memory of one chunk of logits, as fp32 (or fp64) rows and, over the same bytes, as rows of `dtype`.

    Rows are padded to a multiple of 16 columns, so that loads are vectors for any V; the padding is never used.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        work = torch.float64 if dtype == torch.float64 else torch.float32
        padded = -(-columns // 16) * 16
        flat = torch.empty(rows * padded, dtype=work, device=device)
        self.z = flat.view(rows, padded)[:, :columns]
        narrow = flat.view(dtype)
        self.e = narrow.view(rows, narrow.numel() // max(rows, 1))[:, :columns]


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b with fp32 accumulation, rounded once, to out's dtype."""
    if a.dtype == out.dtype and (a.is_cuda or a.dtype in (torch.float32, torch.float64) or a.is_meta):
        return torch.mm(a, b, out=out)
    if a.is_cuda or a.is_meta:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())  # no 16-bit GEMM that writes fp32 outside CUDA


LOG2_E = 1.4426950408889634


def base2_factors(softcap: float | None, scale: float) -> tuple[float, float]:
    """(inner, outer) with z · log2 e = outer · tanh(inner · x), or inner · x without a softcap."""
    return (scale * LOG2_E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


@triton.jit
def tanh_and_grad(x):
    """tanh(x) and 1 − tanh(x)², to fp32 rounding for any x (1e-11 in fp64).

    (1 − t)/(1 + t) with t = exp(−2|x|) cancels for small x, where seven terms of the series take over.
    """
    t = tl.exp(-2.0 * tl.abs(x))
    big = (1.0 - t) / (1.0 + t)
    big = tl.where(x < 0, -big, big)
    v = tl.minimum(tl.abs(x), 0.25)
    u = v * v
    p = 1.0 + u * (
        -0.3333333333333333
        + u
        * (
            0.13333333333333333
            + u
            * (
                -0.05396825396825397
                + u * (0.021869488536155203 + u * (-0.008863235529902197 + u * 0.003592128036572481))
            )
        )
    )
    y = tl.where(tl.abs(x) < 0.25, x * p, big)
    softcap_grad = 4.0 * t / ((1.0 + t) * (1.0 + t))
    return y, softcap_grad


@triton.jit
def log1p(t):
    """log(1 + t) for t ≥ 0 to rounding: log(u) · t / (u − 1) with u = 1 + t rounded (Kahan)."""
    u = 1.0 + t
    exact = u == 1.0
    return tl.where(exact, t, tl.log(u) * (t / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def sequence_of(cu_ptr, row, count, steps):
    """The sequence that holds each of `row` by binary search in cu (count + 1,), with its bounds; steps ≥ log2 count.

    Rows before the first or after the last sequence get one of these, and lie outside its bounds.
    """
    low = tl.zeros_like(row)
    high = low + count
    for _ in range(0, steps):
        middle = (low + high) // 2
        right = tl.load(cu_ptr + middle) <= row
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low, tl.load(cu_ptr + low), tl.load(cu_ptr + low + 1)


@triton.jit
def exp2(x, PTX: tl.constexpr):
    """2^x. Results below 2^−126 may be 0: as PTX one instruction, where the exact denormals of tl.exp2 take four."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def capped(x, inner, outer, SOFTCAP: tl.constexpr):
    """Logits in base 2, z · log2 e, and dz/dx / scale, which is 1 without a softcap: `base2_factors` for the rest."""
    softcap_grad = 1.0
    if SOFTCAP:
        x, softcap_grad = tanh_and_grad(x * inner)
        x = x * outer
    else:
        x = x * inner
    return x, softcap_grad


@triton.jit
def finite_shift(running_max):
    """The maximum to subtract before exp: 0 where every entry so far is −inf, since −inf − (−inf) is NaN."""
    return tl.where(running_max == -float("inf"), 0.0, running_max)


@triton.jit
def without(x, fill, y, start, V, WHOLE: tl.constexpr, COLS: tl.constexpr):
    """x [ROWS, COLS] of the columns from `start`, `fill` in the targets' and past V: most tiles hold neither. WHOLE
    says that COLS divides V."""
    col = tl.arange(0, COLS)
    at = tl.where((y >= start) & (y < start + COLS), y - start, -1).to(tl.int32)
    if tl.max(at, 0) >= 0:
        x = tl.where(col[None, :] == at[:, None], fill, x)
    if not WHOLE and start + COLS > V:
        x = tl.where((col < V - start)[None, :], x, fill)
    return x


@triton.jit
def product_tile(
    a, b, row, col, a_rows, b_rows, depth, a_stride, b_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[row : row + ROWS] · b[col : col + COLS]ᵀ in fp32. a (a_rows, depth), b (b_rows, depth): pointers, or tensor
    descriptors with TMA. Rows past the end hold garbage; EVEN says that DEPTH divides depth."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    tl.assume(depth > 0)
    if TMA:
        for k in range(0, depth, DEPTH):
            acc = tl.dot(a.load([row, k]), b.load([col, k]).T, acc, input_precision=PRECISION)
    else:
        ks = tl.arange(0, DEPTH)
        # One 64-bit origin and 32-bit offsets from it: half the registers of 64-bit addresses.
        a_row = tl.minimum(tl.arange(0, ROWS), a_rows - 1 - row)
        b_row = tl.minimum(tl.arange(0, COLS), b_rows - 1 - col)
        a_at = a + tl.cast(row, tl.int64) * a_stride + (a_row[:, None] * a_stride + ks[None, :])  # [ROWS, DEPTH]
        b_at = b + tl.cast(col, tl.int64) * b_stride + (b_row[None, :] * b_stride + ks[:, None])  # [DEPTH, COLS]
        for k in range(0, depth, DEPTH):
            if EVEN:
                x = tl.load(a_at + k)
                y = tl.load(b_at + k)
            else:
                x = tl.load(a_at + k, mask=(ks < depth - k)[None, :], other=0.0)
                y = tl.load(b_at + k, mask=(ks < depth - k)[:, None], other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def target_products(
    a_ptr, b_ptr, target_ptr, row, inside, b_rows, depth, a_stride, b_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """a[row] · b[target] in fp32, and the target; 0 stands for one outside [0, b_rows). a (·, depth), b (b_rows,
    depth); `row` [ROWS] counts where `inside`."""
    y = tl.load(target_ptr + row, mask=inside, other=0)
    y = tl.where((y >= 0) & (y < b_rows), y, 0)
    a_at = a_ptr + row.to(tl.int64) * a_stride
    b_at = b_ptr + y * b_stride
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, depth, COLS):
        d = start + tl.arange(0, COLS)
        mask = inside[:, None] & (d < depth)[None, :]
        a = tl.load(a_at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += a * tl.load(b_at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(acc, 1), y


def operand(x: Tensor, block: tuple[int, int], tma: bool) -> Any:
    """x (rows, columns) as the tensor-memory unit takes it, or x itself."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def tma_ready(*tensors: Tensor) -> bool:
    """Whether the tensor-memory unit can address these: rows of a multiple of 16 bytes, 16-byte aligned."""
    return all(
        x.stride(-1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0
        for x in tensors
    )
