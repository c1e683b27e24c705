"""info_nce: contrastive loss over cosine similarities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.kernels.torch import info_nce as torch_kernel
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    NOT_IGNORED,
    require_ids,
    require_same_dtype,
    require_temperature,
    require_tensor,
)
from autoregembed.ops._dispatch import ImplUnavailable, load_kernel, resolve_impl
from autoregembed.ops.linear_logprob import linear_logprob

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::info_nce", mutates_args=())
def _info_nce(
    query: Tensor,  # (B, D)
    passages: Tensor,  # (P, D)
    target: Tensor,  # (B,) int64
    passage_ids: Tensor | None,  # (P,) int64
    temperature: Tensor,  # ()
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    if impl != "triton":
        require_ids("target", target, passages.shape[0])
    wanted = query_gradient, passage_gradient, temperature_gradient
    with torch.autocast(query.device.type, enabled=False):
        return load_kernel(impl, "info_nce").forward(query, passages, target, passage_ids, temperature, *wanted)


@_info_nce.register_fake
def _info_nce_fake(
    query: Tensor,
    passages: Tensor,
    target: Tensor,
    passage_ids: Tensor | None,
    temperature: Tensor,
    query_gradient: bool,
    passage_gradient: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, d), p = query.shape, passages.shape[0]
    loss, d_temperature = temperature.new_empty(()), temperature.new_empty(())
    rows = b if query_gradient else 0, p if passage_gradient else 0
    return loss, query.new_empty(rows[0], d), query.new_empty(rows[1], d), d_temperature


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[5:8]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


@first_order_only("info_nce")
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    query, passages, temperature = (
        grad * x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return query, passages, None, None, temperature, *(None,) * 4


_info_nce.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def info_nce(
    query: Tensor,
    passages: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = spec.INFO_NCE_TEMPERATURE,
    passage_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss over cosine similarities, in-batch and hard negatives in one list of passages.

    loss = mean_i −log softmax_p(cos(query_i, passage_p) / temperature)[target_i]

    Args:
        query: (B, D), of any norm.
        passages: (P, D): the positives, then any hard negatives.
        target: (B,) int64 or int32, the positive's row in `passages`; by default query i belongs to passage i, P ≥ B.
        temperature: positive; 0.05 by default. A floating-point tensor, () or (1,), gets its gradient.
        passage_ids: (P,) int64, equal for equal passages. A passage with the id of a query's positive is no negative of
            that query.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        () float32 (float64 for float64 inputs); 0 attached to the graph for B = 0.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or target (a target out of range: NaN on the
            Triton backend).
        ImplUnavailable: the backend cannot run here; "cpp" cannot with `passage_ids`.

    Source: van den Oord et al., arXiv 1807.03748; the control of arXiv 2502.11401.
    """
    require_tensor("query", query, FLOATS, {"B": None, "D": None})
    (b, d), like = query.shape, ("query", query)
    require_tensor("passages", passages, FLOATS, {"P": None, "D": d}, like)
    require_same_dtype("passages", passages, like)
    p = passages.shape[0]
    work = torch.promote_types(query.dtype, torch.float32)
    temperature = require_temperature(temperature, work, like)
    if target is None:
        if p < b:
            raise ValueError(f"passages: got P = {p}, expected P ≥ B = {b}")
        target = torch.arange(b, device=query.device)
    else:
        require_tensor("target", target, INTEGERS, {"B": b}, like)
    if passage_ids is not None:
        require_tensor("passage_ids", passage_ids, (torch.int64,), {"P": p}, like)
    requested, impl = impl, resolve_impl(impl, query.device, query.dtype, ("triton", "cpp", "torch"))
    if requested == "cpp" and passage_ids is not None:
        raise ImplUnavailable("impl='cpp' has no passage_ids, expected 'auto', 'triton', 'torch', 'reference'")
    target = target.long()
    if impl != "reference":
        require_reverse_mode("info_nce", query, passages, temperature)
    if b == 0:
        return query.to(work).sum() + passages[:0].to(work).sum() + 0 * temperature
    if p == 0:
        raise ValueError("passages: got P = 0, expected at least one passage")
    # One chunk of similarities costs least as it is; compiled code must serve any B and P.
    small = requested == "auto" and not torch.compiler.is_compiling() and torch_kernel.fits_one_chunk(query, passages)
    if impl == "cpp" and (small or passage_ids is not None):
        impl = "torch"
    if impl != "triton":
        query, passages = query.to(work), passages.to(work)
    elif torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, passages = query.to(dtype), passages.to(dtype)
    if impl in ("triton", "torch"):
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (query, passages, temperature)]
        return _info_nce(query, passages, target, passage_ids, temperature, *wanted, impl)[0]
    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference":
            target = require_ids("target", target, p)
            return spec.info_nce(query, passages, target, temperature=temperature, passage_ids=passage_ids)
        rows = F.normalize(query, dim=-1) / temperature, F.normalize(passages, dim=-1), target
        return -linear_logprob(*rows, ignore_index=NOT_IGNORED, impl=impl).mean()


class InfoNCELoss(nn.Module):
    """`info_nce` with its options fixed; a temperature that is an `nn.Parameter` is one of the module's."""

    def __init__(self, *, temperature: float | Tensor = spec.INFO_NCE_TEMPERATURE, impl: str = "auto"):
        super().__init__()
        self.temperature = temperature
        self.impl = impl

    def forward(
        self,
        query: Tensor,  # (B, D)
        passages: Tensor,  # (P, D)
        target: Tensor | None = None,  # (B,)
        passage_ids: Tensor | None = None,  # (P,)
    ) -> Tensor:
        options: dict[str, Any] = {"temperature": self.temperature, "impl": self.impl}
        return info_nce(query, passages, target, passage_ids=passage_ids, **options)
