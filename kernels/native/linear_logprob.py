"""Token log-probabilities of a linear head on a CPU: torch's GEMMs, and between them one C++ kernel per block.

The driver, its mathematics and its interface are those of kernels/torch/linear_logprob.py. What differs is the step
between the GEMMs, `_native.epilogue` (epilogue.cpp): two passes over a row in cache, where torch makes about eight over
the block. And where the processor has a matrix unit for bf16 (AMX), the first GEMM too is ours (product.cpp), since
torch's would round the logits to bf16.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from autoregembed.kernels.torch import linear_logprob as driver

try:
    from autoregembed import _native as extension
except ImportError as error:
    extension, import_error = None, str(error)
else:
    import_error = ""

# Without such instructions a bf16 product is far slower than an fp32 one, widening included.
_cpu: dict = getattr(torch.cpu, "get_capabilities", dict)()
MULTIPLIES_BF16 = bool(_cpu.get("avx512_bf16") or _cpu.get("amx_bf16"))
# At other machine code levels `_native.product` is an emulation.
PRODUCT_OF_BF16 = MULTIPLIES_BF16 and "amx_bf16" in getattr(extension, "levels", list)()


def describe() -> str:
    """Machine code level, threads and compiler of the module in use."""
    info = extension.build_info()
    return f": {info['level']}, {info['threads']}, {info['compiler']}"


def _torch_openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch itself runs on, 0 where there is none."""
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


# A module of another version may lack the function; ops/_dispatch.py refuses such a module.
if hasattr(extension, "set_gomp_parallel"):
    extension.set_gomp_parallel(_torch_openmp())


def softmax_block(
    z: Tensor,  # (R, C) float32
    y: Tensor,  # (R,) int64
    state: driver.State,
    bias: Tensor | None,  # (C,)
    softcap: float | None,
    scale: float,
    gradient: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`driver.SoftmaxBlock` in C++; e is bf16 where the product that follows is."""
    rescale = torch.empty_like(state.running_max)
    bf16 = gradient == torch.bfloat16 and MULTIPLIES_BF16
    store = "nothing" if gradient is None else "bf16" if bf16 else "fp32"
    bias = None if bias is None else bias.float().contiguous()
    extension.epilogue(z, y.contiguous(), bias, softcap, scale, store, *state, rescale, torch.get_num_threads())
    return (z.view(torch.bfloat16)[:, : z.shape[1]] if bf16 else z), rescale


class Logits(driver.Logits):
    """`driver.Logits` of bf16 operands in C++."""

    widens = False

    def __init__(self, h: Tensor):
        self.threads = torch.get_num_threads()
        self.packed = self._pack(h, "left")

    def __call__(self, w: Tensor, out: Tensor) -> Tensor:
        extension.product(self.packed, self._pack(w, "right"), out, self.threads)
        return out

    def _pack(self, x: Tensor, operand: str) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        packed = x.new_empty(extension.packed_shape(*x.shape), dtype=torch.int16)
        extension.pack(x.view(torch.int16), packed, operand, self.threads)
        return packed


def logits(h: Tensor, weight_dtype: torch.dtype) -> driver.Logits:
    """By the processor's matrix unit where it has one and the operands are bf16."""
    ours = PRODUCT_OF_BF16 and h.dtype == weight_dtype == torch.bfloat16
    return Logits(h) if ours else driver.Logits(h, weight_dtype)


# For float16, bfloat16 and float32.
forward = functools.partial(driver.forward, block=softmax_block, logits=logits)
backward = functools.partial(driver.backward, block=softmax_block)
