"""segment_sum: sums over the sequences of a pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.ops._checks import FLOATS, require_bounds, require_cu_seqlens, require_tensor
from autoregembed.ops._dispatch import load_kernel, resolve_impl

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::segment_sum", mutates_args=())
def _segment_sum(x: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    """Sums (S,) of x (N,): one sequence at a time, without atomics."""
    if impl == "triton":
        return load_kernel(impl, "segment_sum").forward(x, cu_seqlens)
    require_bounds(cu_seqlens, x.shape[0])
    # segment_reduce adds one number after another: in fp32 the sum of a long text drifts by many times its eps.
    return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0).to(x.dtype)


@_segment_sum.register_fake
def _segment_sum_fake(x: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.custom_op("autoregembed::segment_sum_backward", mutates_args=())
def _segment_sum_backward(grad: Tensor, cu_seqlens: Tensor, length: int, impl: str) -> Tensor:
    """grad (S,) repeated over the rows of each sequence, (N,) with N = `length`."""
    if impl == "triton":
        return load_kernel(impl, "segment_sum").backward(grad, cu_seqlens, length)
    return torch.repeat_interleave(grad, cu_seqlens.diff(), output_size=length)


@_segment_sum_backward.register_fake
def _segment_sum_backward_fake(grad: Tensor, cu_seqlens: Tensor, length: int, impl: str) -> Tensor:
    return grad.new_empty(length)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, cu_seqlens, impl = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.options = x.shape[0], impl


@first_order_only("segment_sum")
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _segment_sum_backward(grad, *ctx.saved_tensors, *ctx.options), None, None


_segment_sum.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def segment_sum(x: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """Sums over each sequence of a pack: turns token log-probabilities into scores.

    out[i] = Σ x[cu_seqlens[i] : cu_seqlens[i + 1]]

    Sums are added in a fixed order, so a sequence gives the same bits alone and in any pack.

    Args:
        x: (N,), float16, bfloat16, float32 or float64.
        cu_seqlens: (S+1,) int32 or int64, from 0 to N.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (S,) in the dtype of x; 0 for a sequence without rows. On the Triton backend bad bounds give NaN.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape or bounds.
        ImplUnavailable: `impl` names a backend that cannot run here.
    """
    require_tensor("x", x, FLOATS, {"N": None})
    require_cu_seqlens(cu_seqlens, "S", ("x", x))
    impl = resolve_impl(impl, x.device, x.dtype, ("triton", "torch"))
    if impl == "reference":
        return spec.segment_sum(x, require_bounds(cu_seqlens, x.shape[0]))
    require_reverse_mode("segment_sum", x)
    return _segment_sum(x, cu_seqlens, impl)


class SegmentSum(nn.Module):
    """`segment_sum` with its backend fixed."""

    def __init__(self, *, impl: str = "auto"):
        super().__init__()
        self.impl = impl

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:  # (N,), (S+1,)
        return segment_sum(x, cu_seqlens, impl=self.impl)
