"""Derivatives that are not implemented raise; they are never zero.

The ops form their gradients in the forward or by hand, so that autograd sees no graph behind them: a second derivative
would silently lose the op's own part, and a tangent would be dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

INSTEAD = "impl='reference' has derivatives of any order and mode, at the cost of the full matrix in memory"


def first_order_only(name: str, instead: str = INSTEAD) -> Callable[[Callable], Callable]:
    """Decorates the backward of `name`: one that autograd would differentiate again raises NotImplementedError.

    torch's `once_differentiable` raises only where the upstream gradient requires grad. With a constant upstream (a
    gradient penalty, a Hessian) it returns gradients without a graph, and the second derivative is silently wrong. Here
    the backward runs without grad mode or not at all.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled():  # create_graph=True
                raise NotImplementedError(
                    f"{name}: got a backward with create_graph=True, expected create_graph=False: its second "
                    f"derivative is not implemented; {instead}"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


def require_reverse_mode(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError for tangents of forward-mode AD and for inputs of torch.func's transforms."""
    if torch.compiler.is_compiling():  # neither is traced
        return
    for x in tensors:
        if x is None:
            continue
        found = ""
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            found = "an input of forward-mode AD (torch.func.jvp, jacfwd or a dual number)"
        elif torch._C._functorch.is_gradtrackingtensor(x):
            found = "an input of torch.func.grad, vjp or jacrev"
        if found:
            raise NotImplementedError(f"{name}: got {found}, expected torch.autograd.grad or backward; {INSTEAD}")
