"""alignment_loss: conditional distribution alignment, stage 2 of AutoRegEmbed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.derivatives import first_order_only, require_reverse_mode
from autoregembed.ops._checks import FLOATS, require_option, require_positive, require_reference, require_tensor
from autoregembed.ops._dispatch import load_kernel, resolve_impl

REF_MARGINS = ("add", "subtract", "none")
NEGATIVES = ("independent", "joint")


class AlignmentOutput(NamedTuple):
    """The loss and statistics of the alignment, each a () tensor on the device. Only `loss` carries a gradient."""

    loss: Tensor
    s1: Tensor
    s2: Tensor
    accuracy: Tensor


# ----------------------------------------------------------------------------------------------------------------------
# torch.library


@torch.library.custom_op("autoregembed::alignment_loss", mutates_args=())
def _alignment_loss(
    query_positive: Tensor,  # (B,)
    positive_positive: Tensor,  # (B,)
    query_negatives: Tensor,  # (B, M)
    reference_positive: Tensor | None,  # (B,)
    reference_negatives: Tensor | None,  # (B, M)
    negative_mask: Tensor | None,  # (B, M)
    beta: float,
    temperature: float,
    ref_margin: str,
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, s1, s2, accuracy, each (), and the loss's gradients of the first three arguments."""
    return load_kernel("triton", "alignment_loss").forward(
        query_positive, positive_positive, query_negatives, reference_positive, reference_negatives, negative_mask,
        beta, temperature, ref_margin, negatives,
    )  # fmt: skip


@_alignment_loss.register_fake
def _alignment_loss_fake(
    query_positive: Tensor, positive_positive: Tensor, query_negatives: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, s1, s2, accuracy = (query_positive.new_empty(()) for _ in range(4))
    a, b, c = (x.new_empty(x.shape) for x in (query_positive, positive_positive, query_negatives))
    return loss, s1, s2, accuracy, a, b, c


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])


@first_order_only("alignment_loss")
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    return *(grad * x for x in ctx.saved_tensors), *(None,) * 7


_alignment_loss.register_autograd(_backward, setup_context=_setup_context)

# ----------------------------------------------------------------------------------------------------------------------
# Public


def _as_columns(x: Any) -> Any:
    """(B,) as (B, 1): one negative for each query."""
    return x[:, None] if isinstance(x, Tensor) and x.ndim == 1 else x


def alignment_loss(
    query_positive: Tensor,
    positive_positive: Tensor,
    query_negatives: Tensor,
    reference_positive: Tensor | None = None,
    reference_negatives: Tensor | None = None,
    *,
    beta: float = spec.BETA,
    temperature: float = spec.TEMPERATURE,
    ref_margin: str = "add",
    negatives: str = "independent",
    negative_mask: Tensor | None = None,
    impl: str = "auto",
) -> AlignmentOutput:
    """Conditional distribution alignment: stage 2 of AutoRegEmbed.

        s1_i   = σ(β |a_i − b_i|)
        s2_ij  = σ(β ((a_i − c_ij) ± (r_a,i − r_c,ij)))
        "independent":  loss = mean_ij softplus((s1_i − s2_ij) / τ)
        "joint":        loss = mean_i −log( e^{−s1_i/τ} / (e^{−s1_i/τ} + Σ_j e^{−s2_ij/τ}) )

    Args:
        query_positive: a (B,), log p(positive | z of the query), nats, summed over tokens.
        positive_positive: b (B,), log p(positive | z of the positive).
        query_negatives: c (B, M), log p(negative_j | z of the query); (B,) is read as M = 1.
        reference_positive: r_a (B,), `query_positive` under the stage-1 model; a constant.
        reference_negatives: r_c (B, M), `query_negatives` under the stage-1 model; a constant.
        beta, temperature: β and τ, positive; 0.1 each by default.
        ref_margin: the sign of the reference scores: "add" (the released code), "subtract" (as in DPO) or "none".
        negatives: "independent" (the released code for M > 1) or "joint".
        negative_mask: (B, M) bool, False where row i has no j-th negative; the values there are never read.
            "independent" averages over the existing negatives, "joint" over the rows that have one.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        AlignmentOutput(loss, s1, s2, accuracy): the loss, the mean of s1 over rows, the mean of s2 over pairs, and the
        share of pairs with a > c. If there is no pair, the loss is 0, attached to the graph.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape or option; reference scores that are missing, or that are
            given with `ref_margin="none"`.
        ImplUnavailable: `impl` names a backend that cannot run here.

    Source: arXiv 2502.11401, §3.3, and the code released with it.
    """
    require_option("ref_margin", ref_margin, REF_MARGINS)
    require_option("negatives", negatives, NEGATIVES)
    beta, temperature = require_positive("beta", beta), require_positive("temperature", temperature)
    query_negatives, reference_negatives = _as_columns(query_negatives), _as_columns(reference_negatives)
    negative_mask = _as_columns(negative_mask)
    require_tensor("query_positive", query_positive, FLOATS, {"B": None})
    b, like = query_positive.shape[0], ("query_positive", query_positive)
    require_tensor("positive_positive", positive_positive, FLOATS, {"B": b}, like)
    require_tensor("query_negatives", query_negatives, FLOATS, {"B": b, "M": None}, like)
    pairs = {"B": b, "M": query_negatives.shape[1]}
    references = (
        ("reference_positive", reference_positive, {"B": b}),
        ("reference_negatives", reference_negatives, pairs),
    )
    for name, x, axes in references:
        require_reference(name, x, ref_margin)
        if x is not None:
            require_tensor(name, x, FLOATS, axes, like)
    if negative_mask is not None:
        require_tensor("negative_mask", negative_mask, (torch.bool,), pairs, like)
    impl = resolve_impl(impl, query_positive.device, query_positive.dtype, ("triton", "torch"))
    # Scores are sums of hundreds of nats, hence never 16 bits.
    work = torch.float64 if query_positive.dtype == torch.float64 else torch.float32
    scores = (
        query_positive.to(work),
        positive_positive.to(work),
        query_negatives.to(work),
        None if reference_positive is None else reference_positive.detach().to(work),
        None if reference_negatives is None else reference_negatives.detach().to(work),
    )
    if impl == "triton":
        require_reverse_mode("alignment_loss", query_positive, positive_positive, query_negatives)
        loss, s1, s2, accuracy, *_ = _alignment_loss(*scores, negative_mask, beta, temperature, ref_margin, negatives)
        return AlignmentOutput(loss, s1.detach(), s2.detach(), accuracy.detach())
    # B·M numbers are few: the specification is the torch backend.
    options: dict[str, Any] = {"ref_margin": ref_margin, "negatives": negatives, "mask": negative_mask}
    return AlignmentOutput(*spec.alignment_loss(*scores, beta=beta, temperature=temperature, **options))


class AlignmentLoss(nn.Module):
    """`alignment_loss` with its options fixed; returns `AlignmentOutput`."""

    def __init__(
        self,
        *,
        beta: float = spec.BETA,
        temperature: float = spec.TEMPERATURE,
        ref_margin: str = "add",
        negatives: str = "independent",
        impl: str = "auto",
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "beta": beta,
            "temperature": temperature,
            "ref_margin": ref_margin,
            "negatives": negatives,
            "impl": impl,
        }

    def forward(
        self,
        query_positive: Tensor,  # (B,)
        positive_positive: Tensor,  # (B,)
        query_negatives: Tensor,  # (B, M)
        reference_positive: Tensor | None = None,  # (B,)
        reference_negatives: Tensor | None = None,  # (B, M)
        negative_mask: Tensor | None = None,  # (B, M)
    ) -> AlignmentOutput:
        scores = query_positive, positive_positive, query_negatives, reference_positive, reference_negatives
        return alignment_loss(*scores, negative_mask=negative_mask, **self.options)
