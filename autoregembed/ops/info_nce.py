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
    require_finite,
    require_ids,
    require_option,
    require_same_dtype,
    require_temperature,
    require_tensor,
)
from autoregembed.ops._dispatch import ImplUnavailable, load_kernel, resolve_impl
from autoregembed.ops.linear_logprob import linear_logprob

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")

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
    directions: str,  # joined by commas
    per_direction: bool,
    margin: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    if impl != "triton":
        require_ids("target", target, passages.shape[0])
    wanted = query_gradient, passage_gradient, temperature_gradient
    kernel = load_kernel(impl, "info_nce")
    with torch.autocast(query.device.type, enabled=False):
        return kernel.forward(
            query, passages, target, passage_ids, temperature, *wanted, directions, per_direction, margin
        )  # fmt: skip


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
        return (None,) * 12
    query, passages, temperature = (
        grad * x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return query, passages, None, None, temperature, *(None,) * 7


_info_nce.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def _ordered(directions: tuple[str, ...], partition_mode: str) -> list[str]:
    """The directions in the order of DIRECTIONS, each once."""
    if isinstance(directions, str) or not isinstance(directions, (tuple, list)):
        raise TypeError(f"directions: got {directions!r}, expected a tuple of {DIRECTIONS}")
    for direction in directions:
        require_option("directions", direction, DIRECTIONS)
    if DIRECTIONS[0] not in directions:
        raise ValueError(f"directions: got {tuple(directions)}, expected 'query_to_doc' among them, for the positive")
    require_option("partition_mode", partition_mode, PARTITION_MODES)
    if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
        raise ValueError(
            f"partition_mode: got 'per_direction' with {tuple(directions)}, expected 'joint': a softmax over queries "
            "alone or documents alone has no positive"
        )
    return [direction for direction in DIRECTIONS if direction in directions]


def info_nce(
    query: Tensor,
    passages: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = spec.INFO_NCE_TEMPERATURE,
    passage_ids: Tensor | None = None,
    directions: tuple[str, ...] = DIRECTIONS[:1],
    partition_mode: str = "joint",
    margin: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss over cosine similarities, with in-batch and hard negatives.

    loss = mean_i −log softmax_p(cos(query_i, passage_p) / temperature)[target_i]

    `directions` adds negatives to row i, with p_i = passages[target_i]:

        "query_to_doc"      query_i with the passages
        "query_to_query"    query_i with the other queries
        "doc_to_query"      p_i with the queries, its own included
        "doc_to_doc"        p_i with the other passages

    Args:
        query: (B, D), of any norm.
        passages: (P, D): the positives, then any hard negatives.
        target: (B,) int64 or int32, the positive's row in `passages`; by default query i belongs to passage i, P ≥ B.
        temperature: positive; 0.05 by default. A floating-point tensor, () or (1,), gets its gradient.
        passage_ids: (P,) int64, equal for equal passages. A passage with the id of a query's positive is not a negative
            of that query, and neither is another query with such a positive.
        directions: any of the names above, with "query_to_doc" among them. They are those of sentence-transformers'
            `MultipleNegativesRankingLoss`.
        partition_mode: "joint": one softmax over all directions, which contains the positive twice with "doc_to_query",
            as in sentence-transformers. "per_direction": the mean of one loss per direction, for "query_to_doc" and
            "doc_to_query"; both together are the symmetric loss.
        margin: a negative whose cosine is above cos(query_i, p_i) + margin counts as a false negative and is left out.
            None: no negative is. Cosines within rounding of that bound may fall on either side.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        () float32 (float64 for float64 inputs); 0, attached to the graph, for B = 0.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or target (on the Triton backend, a target out of
            range gives NaN instead).
        ImplUnavailable: `impl` names a backend that cannot run here. "cpp" supports no `passage_ids`, no further
            directions and no margin; "triton" supports the latter two in bfloat16 and float32 only.

    Source: van den Oord et al., arXiv 1807.03748; the baseline of arXiv 2502.11401. All four directions: Li et al.,
        arXiv 2308.03281. The margin (0.1 there): Zhang et al., arXiv 2506.05176.
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
    chosen = _ordered(directions, partition_mode)
    margin = None if margin is None else require_finite("margin", margin)
    requested, impl = impl, resolve_impl(impl, query.device, query.dtype, ("triton", "cpp", "torch"))
    plain = len(chosen) == 1 and margin is None
    if requested == "cpp" and not (plain and passage_ids is None):
        name = "directions and no margin" if passage_ids is None else "passage_ids"
        raise ImplUnavailable(f"impl='cpp' has no {name}, expected 'auto', 'triton', 'torch', 'reference'")
    target = target.long()
    if impl != "reference":
        require_reverse_mode("info_nce", query, passages, temperature)
    if b == 0:
        return query.to(work).sum() + passages[:0].to(work).sum() + 0 * temperature
    if p == 0:
        raise ValueError("passages: got P = 0, expected at least one passage")
    # One chunk of similarities costs least as it is; compiled code must serve any B and P.
    small = requested == "auto" and not torch.compiler.is_compiling() and torch_kernel.fits_one_chunk(query, passages)
    if impl == "cpp" and (small or passage_ids is not None or not plain):
        impl = "torch"
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
    if impl == "triton" and not plain and dtype in (torch.float16, torch.float64):
        if requested == "triton":
            raise ImplUnavailable(
                f"impl='triton' has directions and margin in bfloat16 and float32, got {dtype}, expected 'auto', "
                "'torch', 'reference'"
            )
        impl = "torch"
    dtype = dtype if impl == "triton" else work
    query, passages = query.to(dtype), passages.to(dtype)
    mode = ",".join(chosen), partition_mode == "per_direction" and len(chosen) > 1, margin
    if impl in ("triton", "torch"):
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (query, passages, temperature)]
        return _info_nce(query, passages, target, passage_ids, temperature, *wanted, *mode, impl)[0]
    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference":
            target = require_ids("target", target, p)
            return spec.info_nce(
                query, passages, target, temperature=temperature, passage_ids=passage_ids, directions=tuple(chosen),
                partition_mode=partition_mode, margin=margin,
            )  # fmt: skip
        rows = F.normalize(query, dim=-1) / temperature, F.normalize(passages, dim=-1), target
        return -linear_logprob(*rows, ignore_index=NOT_IGNORED, impl=impl).mean()


class InfoNCELoss(nn.Module):
    """`info_nce` with its options fixed; a temperature given as an `nn.Parameter` is trained with it."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = spec.INFO_NCE_TEMPERATURE,
        directions: tuple[str, ...] = DIRECTIONS[:1],
        partition_mode: str = "joint",
        margin: float | None = None,
        impl: str = "auto",
    ):
        super().__init__()
        self.temperature = temperature
        self.directions = directions
        self.partition_mode = partition_mode
        self.margin = margin
        self.impl = impl

    def forward(
        self,
        query: Tensor,  # (B, D)
        passages: Tensor,  # (P, D)
        target: Tensor | None = None,  # (B,)
        passage_ids: Tensor | None = None,  # (P,)
    ) -> Tensor:
        return info_nce(
            query, passages, target, temperature=self.temperature, passage_ids=passage_ids, directions=self.directions,
            partition_mode=self.partition_mode, margin=self.margin, impl=self.impl,
        )  # fmt: skip
