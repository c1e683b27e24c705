"""conditional_compression: stage 1 from hidden states in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only
from autoregembed.ops._checks import INTEGERS, require_ids, require_integer, require_tensor
from autoregembed.ops._dispatch import load_kernel
from autoregembed.ops.linear_logprob import check_head, require_frozen_head, scale_rows

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::conditional_compression", mutates_args=())
def _conditional_compression(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    num_tokens: Tensor | None,  # ()
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (), U (N, D), (0, D) unless `with_gradient`, and the loss's gradient of every logprob, ()."""
    if impl != "triton":
        require_ids("target", target, weight.shape[0], ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        kernel = load_kernel(impl, "linear_logprob")
        logprob, u = kernel.forward(hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient)
        count = (target != ignore_index).sum() if num_tokens is None else num_tokens
        share = -1 / count.clamp(min=1).double()
        return (logprob.sum(dtype=torch.float64) * share).to(logprob.dtype), u, share.to(logprob.dtype)


@_conditional_compression.register_fake
def _conditional_compression_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    num_tokens: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = hidden.shape
    loss, share = (hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)) for _ in range(2))
    return loss, hidden.new_empty(n if with_gradient else 0, d), share


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.impl = inputs[-1]


@first_order_only("conditional_compression")
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    u, share = ctx.saved_tensors
    return scale_rows((grad * share).expand(u.shape[0]), u, ctx.impl), *(None,) * 9


_conditional_compression.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def conditional_compression(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    num_tokens: Tensor | int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Tensor:
    """Stage 1 of AutoRegEmbed from the decoder's hidden states: `linear_logprob` and `compression_loss` in one op.

    loss = −Σ_i log softmax(cap(scale · (hidden_i Wᵀ + bias)))[target_i] / num_tokens

    The forward keeps d logprob / d hidden; the backward multiplies it by one number.

    Args:
        hidden, weight, target, bias, softcap, scale, ignore_index: as in `linear_logprob`; the head is frozen.
        num_tokens: the sum is divided by this number or () int64 or int32 tensor, at least 1. None: by the number of
            targets that are not ignored. For a microbatch, pass the number of the whole step.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        () float32 (float64 for float64), nats per token; 0, attached to the graph, if there is no token.

    Raises:
        TypeError, ValueError, IndexError: as in `linear_logprob`, or a head that requires grad.
        ImplUnavailable: `impl` names a backend that cannot run here.
    """
    op = "conditional_compression"
    head = check_head(hidden, weight, target, bias, softcap, scale, ignore_index, impl, op)
    require_frozen_head("compression_loss(linear_logprob(…), …)", weight, bias)
    if isinstance(num_tokens, Tensor):
        require_tensor("num_tokens", num_tokens, INTEGERS, {}, ("hidden", hidden))
    elif num_tokens is not None:
        require_integer("num_tokens", num_tokens, 0)
        num_tokens = torch.full((), num_tokens, device=hidden.device)
    options: dict[str, Any] = {
        "bias": head.bias,
        "softcap": head.softcap,
        "scale": head.scale,
        "ignore_index": ignore_index,
    }
    if head.impl == "reference":
        y = require_ids("target", head.target, head.weight.shape[0], ignore_index)
        with torch.autocast(hidden.device.type, enabled=False):
            return spec.conditional_compression(head.hidden, head.weight, y, num_tokens=num_tokens, **options)
    with_gradient = torch.is_grad_enabled() and head.hidden.requires_grad
    given = head.hidden, head.weight, head.target, num_tokens, *options.values()
    return _conditional_compression(*given, with_gradient, head.impl)[0]


class ConditionalCompression(nn.Module):
    """`conditional_compression` with its options fixed."""

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
        num_tokens: Tensor | int | None = None,  # ()
    ) -> Tensor:
        return conditional_compression(hidden, weight, target, bias=bias, num_tokens=num_tokens, **self.options)
