"""linear_logprob: log-probabilities of target tokens under a linear head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.distributed import to_full_tensor
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    require_bounds,
    require_cu_seqlens,
    require_finite,
    require_ids,
    require_integer,
    require_positive,
    require_same_dtype,
    require_tensor,
)
from autoregembed.ops._dispatch import load_kernel, resolve_impl
from autoregembed.ops.segment_sum import segment_sum

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """logprob (N,) and its gradient with respect to hidden, U (N, D); U is (0, D) unless `with_gradient`."""
    if impl != "triton":
        require_ids("target", target, weight.shape[0], ignore_index)
    kernel = load_kernel(impl, "linear_logprob")
    with torch.autocast(hidden.device.type, enabled=False):
        return kernel.forward(hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient)


@_linear_logprob.register_fake
def _linear_logprob_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    n, d = hidden.shape
    logprob = hidden.new_empty(n, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return logprob, hidden.new_empty(n if with_gradient else 0, d)


@torch.library.custom_op("autoregembed::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad: Tensor,  # (N,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (N, D), weight (V, D) and bias (V,) of a trainable head; the logits are recomputed."""
    kernel = load_kernel(impl, "linear_logprob")
    with torch.autocast(hidden.device.type, enabled=False):
        return kernel.backward(grad, hidden, weight, target, bias, softcap, scale, ignore_index)


@_linear_logprob_backward.register_fake
def _linear_logprob_backward_fake(
    grad: Tensor, hidden: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(weight.shape[0])


@torch.library.custom_op("autoregembed::scale_rows", mutates_args=())
def _scale_rows(grad: Tensor, u: Tensor) -> Tensor:
    """grad (N,) times the rows of u (N, D), in one pass."""
    return load_kernel("triton", "linear_logprob").scale_rows(grad, u)


@_scale_rows.register_fake
def _scale_rows_fake(grad: Tensor, u: Tensor) -> Tensor:
    return torch.empty_like(u)


def scale_rows(grad: Tensor, u: Tensor, impl: str) -> Tensor:
    """grad (N,) times the rows of u (N, D), in u's dtype, rounded once: the backward of a frozen head."""
    return _scale_rows(grad, u) if impl == "triton" else (grad[:, None] * u).to(u.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient, impl = inputs
    ctx.with_gradient = with_gradient
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    if with_gradient:
        ctx.save_for_backward(output[1])
        ctx.impl = impl
    else:
        ctx.save_for_backward(hidden, weight, target, bias)
        ctx.head = (softcap, scale, ignore_index, impl)


@first_order_only("linear_logprob")
def _backward(ctx: Any, grad: Tensor | None, _grad_u: Any) -> tuple[Tensor | None, ...]:
    """A frozen head scales the rows of U, which the forward left behind; a trainable one recomputes the logits."""
    none = (None,) * 9
    if grad is None:
        return none
    if ctx.with_gradient:
        (u,) = ctx.saved_tensors
        return scale_rows(grad, u, ctx.impl), *none[1:]
    hidden, weight, target, bias = ctx.saved_tensors
    d_hidden, d_weight, d_bias = _linear_logprob_backward(grad, hidden, weight, target, bias, *ctx.head)
    needs = ctx.needs_input_grad
    return (
        d_hidden if needs[0] else None,
        d_weight if needs[1] else None,
        None,
        d_bias if ctx.has_bias and needs[3] else None,
        *none[4:],
    )


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


class Head(NamedTuple):
    """A linear head and what it reads, checked."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), of hidden's dtype
    target: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)
    softcap: float | None
    scale: float
    impl: str  # a backend that runs


def check_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    impl: str,
    op: str = "linear_logprob",
) -> Head:
    """The checks that all ops on a linear head share; reads no values. Casts as autocast does, gathers a DTensor."""
    require_tensor("hidden", hidden, FLOATS, {"N": None, "D": None})
    (n, d), like = hidden.shape, ("hidden", hidden)
    require_tensor("weight", weight, FLOATS, {"V": None, "D": d}, like)
    v = weight.shape[0]
    if v == 0:
        raise ValueError("weight: got V = 0, expected at least one token")
    if weight.requires_grad and hasattr(weight, "full_tensor"):
        raise TypeError("weight: got a DTensor that requires grad, expected one that is frozen, or a plain tensor")
    require_tensor("target", target, INTEGERS, {"N": n}, like)
    if bias is not None:
        require_tensor("bias", bias, FLOATS, {"V": v}, like)
    if softcap is not None:
        softcap = require_positive("softcap", softcap)
    scale = require_finite("scale", scale)
    require_integer("ignore_index", ignore_index)
    weight = to_full_tensor(weight)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    require_same_dtype("weight", weight, ("hidden", hidden))
    if bias is not None:
        require_same_dtype("bias", bias, ("hidden", hidden))
    impl = resolve_impl(impl, hidden.device, hidden.dtype, ("triton", "cpp", "torch"))
    if impl != "reference":
        require_reverse_mode(op, hidden, weight, bias)
    return Head(hidden, weight, target.long(), bias, softcap, scale, impl)


def require_frozen_head(op: str, weight: Tensor, bias: Tensor | None) -> None:
    """The loss's gradient is formed for hidden states alone."""
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(f"weight: got a head that requires grad, expected a frozen one; train it through {op}")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,
    num_grad_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probabilities of target tokens under a linear head, without storing the (N, V) logits.

    logprob_i = log softmax(cap(scale · (hidden_i Wᵀ + bias)))[target_i], cap(x) = softcap · tanh(x / softcap)

    With a frozen head (neither `weight` nor `bias` requires grad), forward and backward together cost two GEMMs of
    2·N·V·D FLOPs, for any upstream gradient; without gradients the forward costs one. With a trainable head the
    logits are recomputed in the backward. Extra memory: one block of logits and, if `hidden` requires grad, (N, D).

    Args:
        hidden: (N, D), float16, bfloat16, float32 or float64.
        weight: (V, D), the lm_head, same dtype and device. A frozen DTensor is gathered, and freed before this returns.
        target: (N,) int64 or int32 token ids in [0, V), or `ignore_index` for rows that give 0 and no gradient.
        bias: (V,) or None.
        softcap: positive; logits are capped to (−softcap, softcap) as in Gemma. None: no cap.
        scale: factor on the logits before the cap.
        ignore_index: the target value of rows that do not count.
        cu_seqlens: (S+1,) int32 or int64; rows cu_seqlens[i] to cu_seqlens[i+1] belong to sequence i.
        num_grad_rows: only the first so many rows get gradients; the others are constants, and cost one GEMM instead
            of two. None: all rows.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        (N,) log-probabilities in nats, or (S,) sums per sequence with `cu_seqlens`; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: wrong dtype, device or shape; the message names the argument.
        IndexError: a target id outside [0, V) that is not `ignore_index`; NaN on the Triton backend.
        ImplUnavailable: `impl` names a backend that cannot run here.

    Source: log p(target | z) of arXiv 2502.11401, §3; the two-GEMM form is derived in kernels/torch/linear_logprob.py.
    """
    head = check_head(hidden, weight, target, bias, softcap, scale, ignore_index, impl)
    hidden, weight, target, bias, softcap, scale, impl = head
    n, v = hidden.shape[0], weight.shape[0]
    if cu_seqlens is not None:
        require_cu_seqlens(cu_seqlens, "S", ("hidden", hidden))
    if num_grad_rows is not None:
        require_integer("num_grad_rows", num_grad_rows)
        if not 0 <= num_grad_rows <= n:
            raise ValueError(f"num_grad_rows: got {num_grad_rows}, expected 0..{n} (N)")
    options: dict[str, Any] = {"softcap": softcap, "scale": scale, "ignore_index": ignore_index}
    if impl == "reference":
        target = require_ids("target", target, v, ignore_index)
        cu_seqlens = None if cu_seqlens is None else require_bounds(cu_seqlens, n)

    def rows(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        """logprob (N,) of some rows."""
        if impl == "reference":
            with torch.autocast(hidden.device.type, enabled=False):
                return spec.linear_logprob(hidden, weight, target, bias=bias, **options)
        trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
        with_gradient = torch.is_grad_enabled() and hidden.requires_grad and not trainable_head
        return _linear_logprob(
            hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient, impl
        )[0]  # fmt: skip

    if num_grad_rows is None or num_grad_rows == n or not torch.is_grad_enabled():
        logprob = rows(hidden, weight, target, bias)
    else:
        frozen_bias = None if bias is None else bias.detach()
        scored = hidden[num_grad_rows:].detach(), weight.detach(), target[num_grad_rows:], frozen_bias
        # The first rows keep the result attached to the graph, also where there are none.
        first = hidden[:num_grad_rows], weight, target[:num_grad_rows], bias
        logprob = torch.cat([rows(*first), rows(*scored)])
    if cu_seqlens is None:
        return logprob
    if impl == "reference":
        return spec.segment_sum(logprob, cu_seqlens)
    return segment_sum(logprob, cu_seqlens, impl="triton" if impl == "triton" else "torch")


class LinearLogprob(nn.Module):
    """`linear_logprob` with its options fixed."""

    def __init__(
        self, *, softcap: float | None = None, scale: float = 1.0, ignore_index: int = -100, impl: str = "auto"
    ):
        super().__init__()
        self.options: dict[str, Any] = {"softcap": softcap, "scale": scale, "ignore_index": ignore_index, "impl": impl}

    def forward(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S+1,)
        num_grad_rows: int | None = None,
    ) -> Tensor:
        return linear_logprob(
            hidden, weight, target, bias=bias, cu_seqlens=cu_seqlens, num_grad_rows=num_grad_rows, **self.options
        )
