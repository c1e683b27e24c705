"""pool_last_k: the last K rows of packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    require_cu_seqlens,
    require_ids,
    require_integer,
    require_sequences,
    require_tensor,
)
from autoregembed.ops._dispatch import load_kernel, resolve_impl

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::pool_last_k", mutates_args=())
def _pool_last_k(hidden: Tensor, cu_seqlens: Tensor, k: int, index: Tensor | None) -> Tensor:
    """(T, D), (B+1,), (outputs,) or None -> (outputs, K, D)"""
    return load_kernel("triton", "pool_last_k").forward(hidden, cu_seqlens, k, index)


@_pool_last_k.register_fake
def _pool_last_k_fake(hidden: Tensor, cu_seqlens: Tensor, k: int, index: Tensor | None) -> Tensor:
    return hidden.new_empty(cu_seqlens.shape[0] - 1 if index is None else index.shape[0], k, hidden.shape[1])


@torch.library.custom_op("autoregembed::pool_last_k_backward", mutates_args=())
def _pool_last_k_backward(grad: Tensor, cu_seqlens: Tensor, index: Tensor | None, length: int) -> Tensor:
    """(outputs, K, D) -> (T, D) with T = `length`"""
    return load_kernel("triton", "pool_last_k").backward(grad, cu_seqlens, index, length)


@_pool_last_k_backward.register_fake
def _pool_last_k_backward_fake(grad: Tensor, cu_seqlens: Tensor, index: Tensor | None, length: int) -> Tensor:
    return grad.new_empty(length, grad.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, cu_seqlens, _, index = inputs
    ctx.save_for_backward(cu_seqlens, index)
    ctx.length = hidden.shape[0]


@first_order_only("pool_last_k")
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _pool_last_k_backward(grad, *ctx.saved_tensors, ctx.length), None, None, None


_pool_last_k.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def pool_last_k(
    hidden: Tensor,
    cu_seqlens: Tensor,
    k: int,
    index: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The last K rows of every packed sequence: takes z out of the encoder's output.

    out[i] = hidden[cu_seqlens[j + 1] − K : cu_seqlens[j + 1]], j = index[i] or i

    Args:
        hidden: (T, D), a pack of B sequences of at least K rows each.
        cu_seqlens: (B+1,) int32 or int64, from 0 to T.
        k: K, at least 1.
        index: int32 or int64, the sequence that each output reads; of any length. None: all sequences in the order of
            the pack.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (len(index) or B, K, D). On the Triton backend a sequence shorter than K or out of range gives NaN.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or index.
        ImplUnavailable: `impl` names a backend that cannot run here.
    """
    require_tensor("hidden", hidden, FLOATS, {"T": None, "D": None})
    like = ("hidden", hidden)
    require_cu_seqlens(cu_seqlens, "B", like)
    require_integer("k", k, 1)
    if index is not None:
        require_tensor("index", index, INTEGERS, {"outputs": None}, like)
    impl = resolve_impl(impl, hidden.device, hidden.dtype, ("triton", "torch"))
    if impl == "triton":
        require_reverse_mode("pool_last_k", hidden)
        return _pool_last_k(hidden, cu_seqlens, k, index)
    cu_seqlens = require_sequences(cu_seqlens, hidden.shape[0], k)
    index = None if index is None else require_ids("index", index, cu_seqlens.shape[0] - 1)
    return spec.pool_last_k(hidden, cu_seqlens, k, index)  # one gather: the specification is the torch backend


class PoolLastK(nn.Module):
    """`pool_last_k` with K and its backend fixed."""

    def __init__(self, k: int, *, impl: str = "auto"):
        super().__init__()
        self.k = k
        self.impl = impl

    def forward(
        self,
        hidden: Tensor,  # (T, D)
        cu_seqlens: Tensor,  # (B+1,)
        index: Tensor | None = None,  # (outputs,)
    ) -> Tensor:
        return pool_last_k(hidden, cu_seqlens, self.k, index, impl=self.impl)
