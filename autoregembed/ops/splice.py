"""splice: the decoder's packed input, rows of z among embedding rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.kernels.torch import splice as torch_kernel
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    require_cu_seqlens,
    require_finite,
    require_ids,
    require_integer,
    require_sequences,
    require_tensor,
)
from autoregembed.ops._dispatch import load_kernel, resolve_impl

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::splice", mutates_args=())
def _splice(
    z: Tensor,  # (B, K, D)
    embedding: Tensor,  # (V, D)
    ids: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S+1,)
    z_index: Tensor | None,  # (S,)
    offset: int,
    scale: float,
) -> Tensor:
    """(T, D) in the embedding's dtype"""
    return load_kernel("triton", "splice").forward(z, embedding, ids, cu_seqlens, z_index, offset, scale)


@_splice.register_fake
def _splice_fake(z: Tensor, embedding: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return embedding.new_empty(ids.shape[0], embedding.shape[1])


@torch.library.custom_op("autoregembed::splice_backward", mutates_args=())
def _splice_backward(
    grad: Tensor,  # (T, D)
    cu_seqlens: Tensor,  # (S+1,)
    z_index: Tensor | None,  # (S,)
    offset: int,
    b: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """(B, K, D) in `dtype`"""
    return load_kernel("triton", "splice").backward(grad, cu_seqlens, z_index, offset, b, k, dtype)


@_splice_backward.register_fake
def _splice_backward_fake(
    grad: Tensor, cu_seqlens: Tensor, z_index: Tensor | None, offset: int, b: int, k: int, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(b, k, grad.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, _, _, cu_seqlens, z_index, offset, _ = inputs
    ctx.save_for_backward(cu_seqlens, z_index)
    ctx.options = offset, z.shape[0], z.shape[1], z.dtype


@first_order_only("splice")
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _splice_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 6


_splice.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def splice(
    z: Tensor,
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    z_index: Tensor | None = None,
    *,
    offset: int = 0,
    embedding_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """The decoder's packed input: for each pair, the K rows of z between the frozen embeddings of bos and the target.

    At t = cu_seqlens[s] + offset + j: out[t] = z[z_index[s], j] for 0 ≤ j < K, else embedding_scale · embedding[ids[t]]

    Args:
        z: (B, K, D) compressed embeddings; the only argument that gets a gradient.
        embedding: (V, D), frozen.
        ids: (T,) int64 or int32 token ids; those at the positions of z are never read.
        cu_seqlens: (S+1,) int32 or int64, from 0 to T.
        z_index: (S,) int64 or int32, the row of z that pair s reads; pairs may share one. None: pair s reads row s.
        offset: number of rows of a pair before z (1 if bos comes first).
        embedding_scale: factor on the embedding rows: Gemma's √D, as its embedding layer rounds it, or 1.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (T, D) in the embedding's dtype. On the Triton backend an id or z_index out of range gives rows of NaN.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape, id or z_index, or a trainable embedding.
        ImplUnavailable: `impl` names a backend that cannot run here.
    """
    require_tensor("z", z, FLOATS, {"B": None, "K": None, "D": None})
    (b, k, d), like = z.shape, ("z", z)
    require_tensor("embedding", embedding, FLOATS, {"V": None, "D": d}, like)
    if torch.is_grad_enabled() and embedding.requires_grad:
        raise ValueError("embedding: got one that requires grad, expected a frozen one")
    require_tensor("ids", ids, INTEGERS, {"T": None}, like)
    require_cu_seqlens(cu_seqlens, "S", like)
    s = cu_seqlens.shape[0] - 1
    if z_index is not None:
        require_tensor("z_index", z_index, INTEGERS, {"S": s}, like)
    require_integer("offset", offset, 0)
    embedding_scale = require_finite("embedding_scale", embedding_scale)
    impl = resolve_impl(impl, z.device, z.dtype, ("triton", "torch"))
    if impl == "triton":
        require_reverse_mode("splice", z)
        return _splice(z, embedding, ids, cu_seqlens, z_index, offset, embedding_scale)
    cu_seqlens = require_sequences(cu_seqlens, ids.shape[0], offset + k)
    rows = torch_kernel.z_rows(cu_seqlens, offset, k)
    ids = require_ids("ids", ids.index_fill(0, rows, 0), embedding.shape[0])
    if z_index is not None:
        z_index = require_ids("z_index", z_index, b)
    elif s != b:
        raise ValueError(f"z: got {b}, expected one for each of {s} pairs")
    if impl == "reference":
        return spec.splice(z, embedding, ids, cu_seqlens, z_index, offset=offset, embedding_scale=embedding_scale)
    return torch_kernel.forward(z, embedding, ids, rows, z_index, embedding_scale)


class Splice(nn.Module):
    """`splice` with its options fixed."""

    def __init__(self, *, offset: int = 0, embedding_scale: float = 1.0, impl: str = "auto"):
        super().__init__()
        self.options: dict[str, Any] = {"offset": offset, "embedding_scale": embedding_scale, "impl": impl}

    def forward(
        self,
        z: Tensor,  # (B, K, D)
        embedding: Tensor,  # (V, D)
        ids: Tensor,  # (T,)
        cu_seqlens: Tensor,  # (S+1,)
        z_index: Tensor | None = None,  # (S,)
    ) -> Tensor:
        return splice(z, embedding, ids, cu_seqlens, z_index, **self.options)
