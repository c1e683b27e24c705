"""conditional_alignment: stage 2 from hidden states in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    require_bounds,
    require_cu_seqlens,
    require_ids,
    require_option,
    require_positive,
    require_reference,
    require_tensor,
)
from autoregembed.ops._dispatch import load_kernel
from autoregembed.ops.alignment_loss import NEGATIVES, REF_MARGINS, AlignmentOutput
from autoregembed.ops.linear_logprob import check_head, require_frozen_head, scale_rows

LOGPROB_REDUCTIONS = ("sum", "mean")
NO_NEGATIVE = -1


class AlignmentPairs(NamedTuple):
    """Which sequences of a pack are positives and negatives of which row, as indices 0..S−1.

    A sequence may be used several times, or not at all.
    """

    query_positive: Tensor  # (B,)    a: the positive, scored under z of the query
    positive_positive: Tensor  # (B,)    b: the positive, scored under z of the positive
    query_negatives: Tensor  # (B, M)  c: negative j under z of the query; −1 where row i has no j-th negative

    @classmethod
    def in_order(cls, num_negatives: Sequence[int], device: torch.device | str | None = None) -> AlignmentPairs:
        """The indices for a pack in the usual order: B query–positive pairs, B positive–positive pairs, negatives.

        The negatives follow row by row, `num_negatives[i]` of row i. M is max(num_negatives). The indices are built on
        the host and copied to `device` once.
        """
        b = len(num_negatives)
        count = torch.tensor(num_negatives, dtype=torch.int64)
        first = 2 * b + count.cumsum(0) - count
        j = torch.arange(max(num_negatives, default=0))
        negatives = torch.where(j < count[:, None], first[:, None] + j, NO_NEGATIVE)
        parts = torch.arange(b), torch.arange(b, 2 * b), negatives
        return cls(*(x.to(device, non_blocking=True) for x in parts))


# ----------------------------------------------------------------------------------------------------------------------
# torch.library


def _part_scores(
    logprob: Tensor, cu_seqlens: Tensor, places: Sequence[Tensor], mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a (B,), b (B,), c (B, M), and the mask (B, M) of the negatives that there are, which alone c is of."""
    scores = torch.ops.autoregembed.segment_sum(logprob, cu_seqlens, "torch")
    scores = scores / cu_seqlens.diff() if mean else scores
    return *(scores[x.clamp(min=0)] for x in places), places[2] != NO_NEGATIVE


def _row_gradients(
    gradients: Sequence[Tensor], cu_seqlens: Tensor, places: Sequence[Tensor], mean: bool, n: int
) -> Tensor:
    """The gradient of every row (N,): Σ of the parts that its sequence plays, always in the same order."""
    values, order = torch.cat([x.flatten() for x in places]).clamp(min=0).sort(stable=True)
    bounds = torch.searchsorted(values, torch.arange(len(cu_seqlens), device=values.device))
    found = torch.cat([x.flatten() for x in gradients])[order]  # 0 of a negative that there is not
    scores = torch.ops.autoregembed.segment_sum(found, bounds, "torch")
    scores = scores / cu_seqlens.diff().clamp(min=1) if mean else scores
    return torch.ops.autoregembed.segment_sum_backward(scores, cu_seqlens, n, "torch")


@torch.library.custom_op("autoregembed::conditional_alignment", mutates_args=())
def _conditional_alignment(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    cu_seqlens: Tensor,  # (S+1,)
    query_positive: Tensor,  # (B,) int64
    positive_positive: Tensor,  # (B,) int64
    query_negatives: Tensor,  # (B, M) int64
    reference_positive: Tensor | None,  # (B,)
    reference_negatives: Tensor | None,  # (B, M)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    scale: float,
    ignore_index: int,
    logprob_reduction: str,
    beta: float,
    temperature: float,
    ref_margin: str,
    negatives: str,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, s1, s2, accuracy, each (); U (N, D), (0, D) unless `with_gradient`; the loss's gradient of logprob (N,)."""
    s, n = cu_seqlens.shape[0] - 1, hidden.shape[0]
    parts = query_positive, positive_positive, query_negatives
    if impl != "triton":
        require_ids("target", target, weight.shape[0], ignore_index)
        require_bounds(cu_seqlens, n)
        require_ids("pairs.query_positive", query_positive, s)
        require_ids("pairs.positive_positive", positive_positive, s)
        require_ids("pairs.query_negatives", query_negatives.flatten(), s, NO_NEGATIVE)
    plain = impl if impl == "triton" else "torch"
    with torch.autocast(hidden.device.type, enabled=False):
        head = load_kernel(impl, "linear_logprob")
        logprob, u = head.forward(hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient)
        mean = logprob_reduction == "mean"
        scores = load_kernel("triton", "conditional_alignment").part_scores if impl == "triton" else _part_scores
        a, b, c, mask = scores(logprob, cu_seqlens, parts, mean)
        *outputs, d_a, d_b, d_c = load_kernel(plain, "alignment_loss").forward(
            a, b, c, reference_positive, reference_negatives, mask, beta, temperature, ref_margin, negatives
        )
        if not with_gradient:
            return *outputs, u, logprob.new_empty(0)
        rows = load_kernel("triton", "conditional_alignment").row_gradients if impl == "triton" else _row_gradients
        return *outputs, u, rows((d_a, d_b, d_c), cu_seqlens, parts, mean, n)


@_conditional_alignment.register_fake
def _conditional_alignment_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    query_positive: Tensor,
    positive_positive: Tensor,
    query_negatives: Tensor,
    reference_positive: Tensor | None,
    reference_negatives: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    logprob_reduction: str,
    beta: float,
    temperature: float,
    ref_margin: str,
    negatives: str,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n, d), work = hidden.shape, torch.promote_types(hidden.dtype, torch.float32)
    rows = n if with_gradient else 0
    loss, s1, s2, accuracy = (hidden.new_empty((), dtype=work) for _ in range(4))
    return loss, s1, s2, accuracy, hidden.new_empty(rows, d), hidden.new_empty(rows, dtype=work)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.impl = inputs[-1]


@first_order_only("conditional_alignment")
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """One pass over U. Scaled by its sequence in the forward already, it would be read, written and rounded twice."""
    if grad is None:
        return (None,) * 20
    u, rows = ctx.saved_tensors
    return scale_rows(grad * rows, u, ctx.impl), *(None,) * 19


_conditional_alignment.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def conditional_alignment(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    pairs: AlignmentPairs | tuple[Tensor, Tensor, Tensor],
    reference_positive: Tensor | None = None,
    reference_negatives: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    logprob_reduction: str = "sum",
    beta: float = spec.BETA,
    temperature: float = spec.TEMPERATURE,
    ref_margin: str = "add",
    negatives: str = "independent",
    impl: str = "auto",
) -> AlignmentOutput:
    """Stage 2 of AutoRegEmbed from the decoder's hidden states: `linear_logprob` and `alignment_loss` in one op.

    The forward scores all sequences, computes the loss and its gradient with respect to every score, and keeps
    d logprob / d hidden. The backward multiplies that by one number per row. On the Triton backend the host never waits
    for the device.

    Args:
        hidden, weight, target, bias, softcap, scale, ignore_index: as in `linear_logprob`; the head is frozen.
        cu_seqlens: (S+1,) int32 or int64; rows cu_seqlens[i] to cu_seqlens[i+1] are the tokens of scored sequence i.
        pairs: which sequences are positives and negatives of which row: `AlignmentPairs` of (B,), (B,) and (B, M) int64
            or int32. `AlignmentPairs.in_order` builds them for the usual order, with any number of negatives per row.
        reference_positive: r_a (B,), the score of the positive under the stage-1 model; a constant.
        reference_negatives: r_c (B, M), the scores of the negatives under it; not read where a row has no negative.
        logprob_reduction: "sum" over a sequence's tokens (the paper) or "mean".
        beta, temperature, ref_margin, negatives: as in `alignment_loss`.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        AlignmentOutput(loss, s1, s2, accuracy), as from `alignment_loss`.

    Raises:
        TypeError, ValueError, IndexError: as in `linear_logprob` and `alignment_loss`, a head that requires grad, or an
            index outside 0..S−1 (NaN on the Triton backend).
        ImplUnavailable: `impl` names a backend that cannot run here.

    Source: arXiv 2502.11401, §3.3.
    """
    require_option("ref_margin", ref_margin, REF_MARGINS)
    require_option("negatives", negatives, NEGATIVES)
    require_option("logprob_reduction", logprob_reduction, LOGPROB_REDUCTIONS)
    variant: dict[str, Any] = {
        "logprob_reduction": logprob_reduction,
        "beta": require_positive("beta", beta),
        "temperature": require_positive("temperature", temperature),
        "ref_margin": ref_margin,
        "negatives": negatives,
    }
    op = "conditional_alignment"
    head = check_head(hidden, weight, target, bias, softcap, scale, ignore_index, impl, op)
    require_frozen_head("alignment_loss(linear_logprob(…), …)", weight, bias)
    like = ("hidden", hidden)
    require_cu_seqlens(cu_seqlens, "S", like)
    if not isinstance(pairs, tuple) or len(pairs) != 3:
        raise TypeError(f"pairs: got {type(pairs).__name__}, expected AlignmentPairs, three tensors of indices")
    require_tensor("pairs.query_positive", pairs[0], INTEGERS, {"B": None}, like)
    b = pairs[0].shape[0]
    require_tensor("pairs.positive_positive", pairs[1], INTEGERS, {"B": b}, like)
    require_tensor("pairs.query_negatives", pairs[2], INTEGERS, {"B": b, "M": None}, like)
    work = torch.promote_types(head.hidden.dtype, torch.float32)
    references = []
    for name, x, shape in (
        ("reference_positive", reference_positive, {"B": b}),
        ("reference_negatives", reference_negatives, {"B": b, "M": pairs[2].shape[1]}),
    ):
        require_reference(name, x, ref_margin)
        if x is not None:
            require_tensor(name, x, FLOATS, shape, like)
        references.append(None if x is None else x.detach().to(work))
    options: dict[str, Any] = {
        "bias": head.bias,
        "softcap": head.softcap,
        "scale": head.scale,
        "ignore_index": ignore_index,
    }
    places = [x.long() for x in pairs]
    if head.impl == "reference":
        y = require_ids("target", head.target, head.weight.shape[0], ignore_index)
        cu_seqlens = require_bounds(cu_seqlens, hidden.shape[0])
        s, names = cu_seqlens.shape[0] - 1, AlignmentPairs._fields
        places[:2] = [require_ids(f"pairs.{names[i]}", places[i], s) for i in range(2)]
        places[2] = require_ids(f"pairs.{names[2]}", places[2].flatten(), s, NO_NEGATIVE).view(places[2].shape)
        with torch.autocast(hidden.device.type, enabled=False):
            out = spec.conditional_alignment(
                head.hidden, head.weight, y, cu_seqlens, AlignmentPairs(*places), references[0], references[1],
                **options, **variant,
            )  # fmt: skip
        return AlignmentOutput(*out)
    with_gradient = torch.is_grad_enabled() and head.hidden.requires_grad
    loss, s1, s2, accuracy, *_ = _conditional_alignment(
        head.hidden, head.weight, head.target, cu_seqlens, *places, *references, *options.values(), *variant.values(),
        with_gradient, head.impl,
    )  # fmt: skip
    return AlignmentOutput(loss, s1, s2, accuracy)


class ConditionalAlignment(nn.Module):
    """`conditional_alignment` with its options fixed; returns `AlignmentOutput`."""

    def __init__(
        self,
        *,
        softcap: float | None = None,
        scale: float = 1.0,
        ignore_index: int = -100,
        logprob_reduction: str = "sum",
        beta: float = spec.BETA,
        temperature: float = spec.TEMPERATURE,
        ref_margin: str = "add",
        negatives: str = "independent",
        impl: str = "auto",
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "scale": scale,
            "ignore_index": ignore_index,
            "logprob_reduction": logprob_reduction,
            "beta": beta,
            "temperature": temperature,
            "ref_margin": ref_margin,
            "negatives": negatives,
            "impl": impl,
        }

    def forward(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,)
        cu_seqlens: Tensor,  # (S+1,)
        pairs: AlignmentPairs,
        reference_positive: Tensor | None = None,  # (B,)
        reference_negatives: Tensor | None = None,  # (B, M)
        bias: Tensor | None = None,  # (V,)
    ) -> AlignmentOutput:
        references = reference_positive, reference_negatives
        return conditional_alignment(hidden, weight, target, cu_seqlens, pairs, *references, bias=bias, **self.options)
