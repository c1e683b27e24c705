"""The ops: validated entry points, `torch.library` schemas, and the choice of an implementation.

`impl` names a route: "native" (C++, CPU), "torch" (any device), "reference" (the specification, with full logits), or
"auto". A route that is asked for by name and cannot run raises `ImplUnavailable`; it is never replaced by another.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from autoregembed import reference as spec
from autoregembed.kernels.native import linear_logprob as native_linear_logprob
from autoregembed.kernels.torch import linear_logprob as torch_linear_logprob

__all__ = ["AlignmentOutput", "ImplUnavailable", "alignment_loss", "available_impls", "info_nce", "linear_logprob"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REFERENCES = ("add", "subtract", "none")
NEGATIVES = ("independent", "joint")


class ImplUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


def available_impls(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Every route by name, with "ok" or why it cannot run for `dtype` on `device`; `auto` takes the first "ok"."""
    native = native_linear_logprob.UNAVAILABLE or "ok"
    if torch.device(device).type != "cpu":
        native = f"runs on a CPU, found {device}"
    elif native == "ok" and dtype == torch.float64:
        native = "has no float64"
    return {
        "triton": "not part of this version",
        "native": native,
        "torch": "ok",
        "reference": "ok",
    }


def _resolve(impl: str, device: torch.device, dtype: torch.dtype, has_kernel: tuple[str, ...]) -> str:
    """The route for an op that has kernels for the routes `has_kernel`; every op has its "reference"."""
    routes = {
        name: "this op has no such kernel" if state == "ok" and name not in (*has_kernel, "reference") else state
        for name, state in available_impls(device, dtype).items()
    }
    if impl == "auto":
        return next(name for name, state in routes.items() if state == "ok")
    if impl not in routes:
        raise ValueError(f"impl: found {impl!r}, allowed are 'auto', {', '.join(map(repr, routes))}")
    if routes[impl] != "ok":
        raise ImplUnavailable(f"impl={impl!r} cannot run on {device}: {routes[impl]}")
    return impl


def _require_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: found {type(x).__name__}, allowed is torch.Tensor")


def _require_float(name: str, x: Tensor) -> None:
    _require_tensor(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: found dtype {x.dtype}, allowed are {', '.join(map(str, _FLOATS))}")


def _require_like(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: found on {x.device}, allowed is the device of {other_name}, {other.device}")
    if dtype and x.dtype != other.dtype:
        raise TypeError(f"{name}: found dtype {x.dtype}, allowed is the dtype of {other_name}, {other.dtype}")


def _require_shape(name: str, x: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    # A plain loop over the axes: torch.compile traces through it with symbolic sizes.
    good = x.ndim == len(shape)
    if good:
        for found, wanted in zip(x.shape, shape, strict=True):
            if wanted is not None and found != wanted:
                good = False
    if not good:
        wanted_text = ", ".join("*" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: found shape {tuple(x.shape)}, allowed is {meaning} = ({wanted_text})")


def _require_positive(name: str, x: float) -> None:
    if not 0 < x < math.inf:
        raise ValueError(f"{name}: found {x}, allowed is a positive finite number")


# No id is ignored: an `ignore_index` that is no caller's id.
NOT_IGNORED = -(2**63)

# Modules with `forward` and `backward` as in kernels/torch/linear_logprob.py.
_LINEAR_LOGPROB = {"native": native_linear_logprob, "torch": torch_linear_logprob}


def _require_target(target: Tensor, size: int, ignore_index: int) -> None:
    """Raises IndexError for an id outside [0, size). Reads the data, so on a GPU it waits for the device."""
    bad = (target < 0) | (target >= size)
    bad &= target != ignore_index
    if bad.any():
        row = int(bad.nonzero()[0])
        ignored = "" if ignore_index == NOT_IGNORED else f" and {ignore_index=}"
        raise IndexError(f"target: found id {int(target[row])} at row {row}, allowed are 0..{size - 1}{ignored}")


# ----------------------------------------------------------------------------------------------------------------------
# linear_logprob


@torch.library.custom_op("autoregembed::linear_logprob", mutates_args=())
def _linear_logprob(
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
    """logprob (N,) and its gradient with respect to hidden, U (N, D); U is (0, D) unless `with_gradient`."""
    _require_target(target, weight.shape[0], ignore_index)
    route = _LINEAR_LOGPROB[impl]
    with torch.autocast(hidden.device.type, enabled=False):
        return route.forward(hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient)


@_linear_logprob.register_fake
def _(hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient, impl):
    n, d = hidden.shape
    logprob = hidden.new_empty(n, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return logprob, hidden.new_empty(n if with_gradient else 0, d)


@torch.library.custom_op("autoregembed::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (N, D), weight (V, D) and bias (V,) of a trainable head; the logits are recomputed."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _LINEAR_LOGPROB[impl].backward(grad, hidden, weight, target, bias, softcap, scale, ignore_index)


@_linear_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, softcap, scale, ignore_index, impl):
    return torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    hidden, weight, target, bias, softcap, scale, ignore_index, with_gradient, impl = inputs
    ctx.with_gradient = with_gradient
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    if with_gradient:
        ctx.save_for_backward(output[1])
    else:
        ctx.save_for_backward(hidden, weight, target, bias)
        ctx.head = (softcap, scale, ignore_index, impl)


@once_differentiable
def _backward(ctx, grad, _grad_u):
    none = (None,) * 9
    if grad is None:
        return none
    if ctx.with_gradient:
        (u,) = ctx.saved_tensors
        return ((grad[:, None] * u).to(u.dtype), *none[1:])
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


@torch.library.custom_op("autoregembed::sequence_sum", mutates_args=())
def _sequence_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of x (N,) over [cu_seqlens[i], cu_seqlens[i+1]), (S,): one sequence at a time, no atomics."""
    _require_bounds(cu_seqlens, x.shape[0])
    # One number after another: in float64, or the sum of a long text would drift by many times fp32's eps.
    return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0).to(x.dtype)


@_sequence_sum.register_fake
def _(x, cu_seqlens):
    return x.new_empty(cu_seqlens.shape[0] - 1)


def _sequence_sum_backward(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return torch.repeat_interleave(grad, cu_seqlens.diff(), output_size=ctx.length), None


def _sequence_sum_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.length = inputs[0].shape[0]


_sequence_sum.register_autograd(_sequence_sum_backward, setup_context=_sequence_sum_context)


def _require_bounds(cu_seqlens: Tensor, length: int) -> None:
    """Reads the data, so on a GPU it waits for the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(i > j for i, j in itertools.pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens: found {bounds[:8]}{'…' if len(bounds) > 8 else ''}, allowed is a non-decreasing row "
            f"from 0 to N = {length}"
        )


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
    impl: str = "auto",
) -> Tensor:
    """Log-probabilities of target tokens under a linear head, without the (N, V) logits.

    logprob_i = log softmax(cap(scale · (hidden_i Wᵀ + bias)))[target_i], cap(x) = softcap · tanh(x / softcap)

    With a frozen head (neither `weight` nor `bias` requires grad) forward and backward cost two GEMMs of 2·N·V·D
    FLOPs together, whatever the upstream gradient is; without gradients it costs one. A trainable head gets its
    gradients by recomputation. Extra memory: one chunk of logits and, when `hidden` requires grad, (N, D).

    Args:
        hidden: (N, D), float16, bfloat16, float32 or float64.
        weight: (V, D), the lm_head, same dtype and device.
        target: (N,) int64 or int32 token ids in [0, V), or `ignore_index` for rows that give 0 and no gradient.
        bias: (V,) or None.
        softcap: positive; logits are capped to (−softcap, softcap) as in Gemma. None: no cap.
        scale: factor on the logits before the cap.
        ignore_index: the target value of rows that do not count.
        cu_seqlens: (S+1,) int32 or int64; rows cu_seqlens[i] to cu_seqlens[i+1] belong to sequence i.
        impl: "auto", "native", "torch" or "reference".

    Returns:
        (N,) log-probabilities in nats, or (S,) sums per sequence with `cu_seqlens`; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: wrong dtype, device or shape; the message names the argument.
        IndexError: a target id outside [0, V) that is not `ignore_index`.
        ImplUnavailable: `impl` names a route that cannot run here.

    Source: log p(target | z) of arXiv 2502.11401, §3; the two-GEMM form is derived in kernels/torch/linear_logprob.py.
    """
    _require_float("hidden", hidden)
    _require_float("weight", weight)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _require_like("weight", weight, "hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden: found shape {tuple(hidden.shape)}, allowed is (N, D)")
    _require_shape("weight", weight, (None, hidden.shape[1]), "(V, D)")
    if weight.shape[0] == 0:
        raise ValueError("weight: found V = 0, allowed is at least one token")
    _require_tensor("target", target)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: found dtype {target.dtype}, allowed are torch.int64, torch.int32")
    _require_like("target", target, "hidden", hidden, dtype=False)
    _require_shape("target", target, (hidden.shape[0],), "(N,)")
    if bias is not None:
        _require_float("bias", bias)
        _require_like("bias", bias, "hidden", hidden)
        _require_shape("bias", bias, (weight.shape[0],), "(V,)")
    if softcap is not None:
        _require_positive("softcap", softcap)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: found {scale}, allowed is a finite number")
    if cu_seqlens is not None:
        _require_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens: found dtype {cu_seqlens.dtype}, allowed are torch.int32, torch.int64")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: found shape {tuple(cu_seqlens.shape)}, allowed is (S+1,)")
        _require_like("cu_seqlens", cu_seqlens, "hidden", hidden, dtype=False)
    target = target.long()
    impl = _resolve(impl, hidden.device, hidden.dtype, (*_LINEAR_LOGPROB,))
    if impl == "reference":
        _require_target(target, weight.shape[0], ignore_index)
        if cu_seqlens is not None:
            _require_bounds(cu_seqlens, hidden.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            return spec.linear_logprob(
                hidden, weight, target, bias=bias, softcap=softcap, scale=scale,
                ignore_index=ignore_index, cu_seqlens=cu_seqlens,
            )  # fmt: skip
    trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad and not trainable_head
    logprob, _ = _linear_logprob(hidden, weight, target, bias, softcap, float(scale), ignore_index, with_gradient, impl)
    return logprob if cu_seqlens is None else _sequence_sum(logprob, cu_seqlens)


# ----------------------------------------------------------------------------------------------------------------------
# alignment_loss


class AlignmentOutput(NamedTuple):
    """`loss` () carries the gradient; the statistics () do not, and stay on the device."""

    loss: Tensor
    s1: Tensor
    s2: Tensor
    accuracy: Tensor


def alignment_loss(
    query_positive: Tensor,
    positive_positive: Tensor,
    query_negatives: Tensor,
    reference_positive: Tensor | None = None,
    reference_negatives: Tensor | None = None,
    *,
    beta: float = 0.1,
    temperature: float = 0.1,
    reference: str = "add",
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
        beta, temperature: β and τ, positive.
        reference: "add" (the released code), "subtract" (the DPO form) or "none".
        negatives: "independent" (the released code for M > 1) or "joint".
        negative_mask: (B, M) bool, False where row i has no j-th negative; the values there are never read.
            "independent" averages over the negatives that exist, "joint" over the rows that have one.
        impl: "auto", "torch" or "reference".

    Returns:
        AlignmentOutput(loss, s1, s2, accuracy): the loss and the means of s1 and s2 over rows and pairs and the share
        of pairs with a > c. With no pair at all the loss is 0, attached to the graph.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape or name of a variant, or reference scores missing.

    Source: arXiv 2502.11401, §3.3, and the code released with it.
    """
    _require_float("query_positive", query_positive)
    _require_float("positive_positive", positive_positive)
    _require_float("query_negatives", query_negatives)
    if query_negatives.ndim == 1:
        query_negatives = query_negatives[:, None]
    if isinstance(reference_negatives, Tensor) and reference_negatives.ndim == 1:
        reference_negatives = reference_negatives[:, None]
    if reference not in REFERENCES:
        raise ValueError(f"reference: found {reference!r}, allowed are {REFERENCES}")
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives: found {negatives!r}, allowed are {NEGATIVES}")
    _require_positive("beta", beta)
    _require_positive("temperature", temperature)
    _require_shape("query_positive", query_positive, (None,), "(B,)")
    _require_shape("query_negatives", query_negatives, (None, None), "(B, M)")
    b, m = query_positive.shape[0], query_negatives.shape[1]
    given = {"reference_positive": reference_positive, "reference_negatives": reference_negatives}
    if reference != "none":
        missing = [name for name, x in given.items() if x is None]
        if missing:
            raise ValueError(f"{missing[0]}: found None, allowed with reference={reference!r} is a tensor of scores")
    scores = {"positive_positive": positive_positive, "query_negatives": query_negatives, **given}
    for name, x in scores.items():
        if x is None:
            continue
        _require_float(name, x)
        _require_like(name, x, "query_positive", query_positive, dtype=False)
        shape, meaning = ((b, m), "(B, M)") if name.endswith("negatives") else ((b,), "(B,)")
        _require_shape(name, x, shape, meaning)
    if negative_mask is not None:
        _require_tensor("negative_mask", negative_mask)
        if negative_mask.dtype != torch.bool:
            raise TypeError(f"negative_mask: found dtype {negative_mask.dtype}, allowed is torch.bool")
        _require_like("negative_mask", negative_mask, "query_positive", query_positive, dtype=False)
        if negative_mask.ndim == 1:
            negative_mask = negative_mask[:, None]
        _require_shape("negative_mask", negative_mask, (b, m), "(B, M)")
    _resolve(impl, query_positive.device, query_positive.dtype, ("torch",))
    # B·M numbers: the specification is the torch route. Scores are sums of hundreds of nats, hence never 16 bits.
    work = torch.float64 if query_positive.dtype == torch.float64 else torch.float32
    loss, s1, s2, accuracy = spec.alignment_loss(
        query_positive.to(work),
        positive_positive.to(work),
        query_negatives.to(work),
        None if reference_positive is None else reference_positive.detach().to(work),
        None if reference_negatives is None else reference_negatives.detach().to(work),
        beta=beta, temperature=temperature, reference=reference, negatives=negatives, mask=negative_mask,
    )  # fmt: skip
    return AlignmentOutput(loss, s1, s2, accuracy)


# ----------------------------------------------------------------------------------------------------------------------
# info_nce


def info_nce(
    query: Tensor,
    passages: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.05,
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss over cosine similarities, in-batch and hard negatives in one list of passages.

    loss = mean_i −log softmax_p(cos(query_i, passage_p) / temperature)[target_i]

    Args:
        query: (B, D), need not be normalised.
        passages: (P, D): the positives, then any hard negatives.
        target: (B,) int64 or int32, the positive's place in `passages`; by default query i belongs to passage i, P ≥ B.
        temperature: positive.
        impl: "auto", "native", "torch" or "reference".

    Returns:
        () float32 (float64 for float64 inputs); 0 attached to the graph for B = 0.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or target.

    Source: van den Oord et al., arXiv 1807.03748; the control of arXiv 2502.11401.
    """
    _require_float("query", query)
    _require_float("passages", passages)
    _require_like("passages", passages, "query", query)
    if query.ndim != 2:
        raise ValueError(f"query: found shape {tuple(query.shape)}, allowed is (B, D)")
    _require_shape("passages", passages, (None, query.shape[1]), "(P, D)")
    _require_positive("temperature", temperature)
    if target is None:
        if len(passages) < len(query):
            raise ValueError(f"passages: found P = {len(passages)}, allowed without a target is P ≥ B = {len(query)}")
        target = torch.arange(len(query), device=query.device)
    else:
        _require_tensor("target", target)
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"target: found dtype {target.dtype}, allowed are torch.int64, torch.int32")
        _require_like("target", target, "query", query, dtype=False)
        _require_shape("target", target, (query.shape[0],), "(B,)")
    impl = _resolve(impl, query.device, query.dtype, (*_LINEAR_LOGPROB,))
    work = torch.promote_types(query.dtype, torch.float32)
    query, passages = query.to(work), passages.to(work)
    if query.shape[0] == 0:
        return query.sum() + passages[:0].sum()
    if passages.shape[0] == 0:
        raise ValueError("passages: found P = 0, allowed is at least one passage")
    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference":
            _require_target(target, passages.shape[0], NOT_IGNORED)
            return spec.info_nce(query, passages, target.long(), temperature=temperature)
        logprob = linear_logprob(
            F.normalize(query, dim=-1),
            F.normalize(passages, dim=-1),
            target,
            scale=1 / temperature,
            ignore_index=NOT_IGNORED,
            impl=impl,
        )
        return -logprob.mean()
