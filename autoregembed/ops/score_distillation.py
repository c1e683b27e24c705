"""score_distillation: a frozen teacher's likelihoods into cosine similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    require_ids,
    require_kept,
    require_number,
    require_option,
    require_positive,
    require_same_dtype,
    require_temperature,
    require_tensor,
)
from autoregembed.ops._dispatch import load_kernel, resolve_impl

MARGINALS = ("batch", "none")  # or a tensor
NO_POSITIVE = -1

# ----------------------------------------------------------------------------------------------------------------------
# torch.library


def _require_targets(target: Tensor, mask: Tensor | None, p: int) -> Tensor:
    """Every target is −1 or a column that the mask keeps; a value check."""
    target = require_ids("target", target, p, NO_POSITIVE)
    if mask is not None:
        # A row without a positive asks for no pair: it is given one that counts.
        known = target >= 0
        require_kept(mask | ~known[:, None], target.where(known, 0))
    return target


@torch.library.custom_op("autoregembed::score_distillation", mutates_args=())
def _score_distillation(
    query: Tensor,  # (B, D)
    passages: Tensor,  # (P, D)
    scores: Tensor,  # (B, P)
    mask: Tensor | None,  # (B, P) bool
    target: Tensor | None,  # (B,) int64
    log_prior: Tensor | None,  # (P,)
    temperature: Tensor,  # ()
    teacher_temperature: float,
    mixture: float,
    batch_marginal: bool,
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ()."""
    if impl != "triton" and target is not None:
        _require_targets(target, mask, scores.shape[1])
    wanted = query_gradient, passage_gradient, temperature_gradient
    teacher = temperature, teacher_temperature, mixture, batch_marginal
    with torch.autocast(query.device.type, enabled=False):
        kernel = load_kernel(impl, "score_distillation")
        return kernel.forward(query, passages, scores, mask, target, log_prior, *teacher, *wanted)


@_score_distillation.register_fake
def _score_distillation_fake(
    query: Tensor,
    passages: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    target: Tensor | None,
    log_prior: Tensor | None,
    temperature: Tensor,
    teacher_temperature: float,
    mixture: float,
    batch_marginal: bool,
    query_gradient: bool,
    passage_gradient: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, d), p = query.shape, passages.shape[0]
    rows = b if query_gradient else 0, p if passage_gradient else 0
    d_query, d_passages = (query.new_empty(n, d) for n in rows)
    return temperature.new_empty(()), d_query, d_passages, temperature.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[10:13]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


@first_order_only("score_distillation")
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    query, passages, temperature = (
        grad * x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return query, passages, *(None,) * 4, temperature, *(None,) * 7


_score_distillation.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def score_distillation(
    query: Tensor,
    passages: Tensor,
    scores: Tensor,
    *,
    temperature: float | Tensor = spec.DISTILLATION_TEMPERATURE,
    teacher_temperature: float = spec.TEACHER_TEMPERATURE,
    mask: Tensor | None = None,
    target: Tensor | None = None,
    mixture: float = 1.0,
    marginal: str | Tensor = "batch",
    impl: str = "auto",
) -> Tensor:
    """Cosines learn to agree with a frozen teacher's scores log p(d_j | z_i), without labels.

        T_i   = softmax_j(scores_ij / τ_g − marginal_j)        which passage z_i describes
        T'_j  = softmax_i(scores_ij / τ_g)                     which z describes passage j
        loss  = ½ mean_i CE(T_i, softmax_j cos_ij / τ) + ½ mean_j CE(T'_j, softmax_i cos_ij / τ)

    All softmaxes run over the pairs that `mask` keeps, and the means over the rows and columns that have such a pair.
    Most of log p(d_j | z_i) only says how likely d_j is anyway; marginal "batch" removes this by subtracting
    logsumexp_i scores_ij / τ_g.

    Args:
        query: (B, D), of any norm; the op normalizes it, as in `info_nce`.
        passages: (P, D), same dtype and device.
        scores: (B, P) floats in nats, summed over tokens; constants, since the teacher is frozen.
        temperature: τ, positive; 0.05 by default. A floating-point tensor, () or (1,), gets its gradient.
        teacher_temperature: τ_g, positive, nats; 3 by default.
        mask: (B, P) bool, False where a pair does not count; its score is never read. None: all pairs count.
        target: (B,) int64 or int32, the column of each row's known positive, or −1 if none is known; for `mixture` < 1.
        mixture: λ in [0, 1]. In rows with a known positive, T becomes λ·T + (1 − λ)·onehot. T' changes in the same way
            in columns that are the positive of some row; if of several rows, they share the one-hot.
        marginal: "batch"; "none"; or log p(d_j), (P,) floats in nats, which are divided by τ_g like the scores.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        () float32 (float64 for float64 inputs); 0, attached to the graph, if no pair counts.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or option; scores that require grad; a target that
            is out of range or that the mask drops (on the Triton backend these two give NaN instead).
        ImplUnavailable: `impl` names a backend that cannot run here.
    """
    require_tensor("query", query, FLOATS, {"B": None, "D": None})
    (b, d), like = query.shape, ("query", query)
    require_tensor("passages", passages, FLOATS, {"P": None, "D": d}, like)
    require_same_dtype("passages", passages, like)
    p = passages.shape[0]
    require_tensor("scores", scores, FLOATS, {"B": b, "P": p}, like)
    if scores.requires_grad:
        raise ValueError("scores: got scores that require grad, expected constants of a frozen teacher; detach them")
    work = torch.promote_types(query.dtype, torch.float32)
    temperature = require_temperature(temperature, work, like)
    teacher_temperature = require_positive("teacher_temperature", teacher_temperature)
    mixture = require_number("mixture", mixture)
    if not 0 <= mixture <= 1:
        raise ValueError(f"mixture: got {mixture}, expected a number in [0, 1]")
    if mask is not None:
        require_tensor("mask", mask, (torch.bool,), {"B": b, "P": p}, like)
    if target is not None:
        require_tensor("target", target, INTEGERS, {"B": b}, like)
        target = target.long()
    elif mixture < 1:
        raise ValueError(f"target: got None, expected known positives (B,), since mixture = {mixture}")
    log_prior = None
    if isinstance(marginal, Tensor):
        require_tensor("marginal", marginal, FLOATS, {"P": p}, like)
        log_prior = marginal.detach().to(work)
    else:
        require_option("marginal", marginal, MARGINALS)
    impl = resolve_impl(impl, query.device, query.dtype, ("triton", "torch"))
    if impl != "reference":
        require_reverse_mode("score_distillation", query, passages, temperature)
    if b == 0 or p == 0:
        return query[:0].to(work).sum() + passages[:0].to(work).sum() + 0 * temperature
    if mask is not None:  # what a text without a pair holds never counts
        query = query.masked_fill(~mask.any(1)[:, None], 0.0)
        passages = passages.masked_fill(~mask.any(0)[:, None], 0.0)
    if impl != "triton":
        query, passages = query.to(work), passages.to(work)
    elif torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, passages = query.to(dtype), passages.to(dtype)
    scores = scores.to(work)
    if impl == "reference":
        if target is not None:
            target = _require_targets(target, mask, p)
        given = marginal if log_prior is None else log_prior
        with torch.autocast(query.device.type, enabled=False):
            return spec.score_distillation(
                query, passages, scores, temperature=temperature, teacher_temperature=teacher_temperature, mask=mask,
                target=target, mixture=mixture, marginal=given,
            )  # fmt: skip
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (query, passages, temperature)]
    teacher = temperature, teacher_temperature, mixture, log_prior is None and marginal == "batch"
    return _score_distillation(query, passages, scores, mask, target, log_prior, *teacher, *wanted, impl)[0]


class ScoreDistillationLoss(nn.Module):
    """`score_distillation` with its options fixed; a temperature given as an `nn.Parameter` is trained with it."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = spec.DISTILLATION_TEMPERATURE,
        teacher_temperature: float = spec.TEACHER_TEMPERATURE,
        mixture: float = 1.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.temperature = temperature
        self.options: dict[str, Any] = {
            "teacher_temperature": teacher_temperature,
            "mixture": mixture,
            "impl": impl,
        }

    def forward(
        self,
        query: Tensor,  # (B, D)
        passages: Tensor,  # (P, D)
        scores: Tensor,  # (B, P)
        mask: Tensor | None = None,  # (B, P)
        target: Tensor | None = None,  # (B,)
        marginal: str | Tensor = "batch",  # or (P,)
    ) -> Tensor:
        options: dict[str, Any] = {"temperature": self.temperature, **self.options}
        return score_distillation(query, passages, scores, mask=mask, target=target, marginal=marginal, **options)
