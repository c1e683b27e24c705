"""The ops: validated entry points, `torch.library` schemas, and the choice of an implementation.

`impl` names a route: "triton" (GPU), "cpp" (C++, CPU), "torch" (any device), "reference" (the specification, with
full logits), or "auto". A route that is asked for by name and cannot run raises `ImplUnavailable`; it is never replaced
by another.

The Triton route never waits for the device, hence reads neither targets nor `cu_seqlens` on the host: what the other
routes answer with an IndexError or ValueError is NaN there, in the rows or sequences concerned.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from autoregembed import reference as spec
from autoregembed.distributed import to_full_tensor
from autoregembed.kernels.native import linear_logprob as native_linear_logprob
from autoregembed.kernels.torch import linear_logprob as torch_linear_logprob

__all__ = [
    "AlignmentOutput",
    "ImplUnavailable",
    "alignment_loss",
    "available_impls",
    "info_nce",
    "linear_logprob",
    "pool_last_k",
    "splice",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REF_MARGINS = ("add", "subtract", "none")
NEGATIVES = ("independent", "joint")


class ImplUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


# Read once: torch.compile traces through the choice of a route, and Triton reads its variable once as well.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_state(device: torch.device) -> str:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no such device"
        if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
            return "needs compute capability 8.0 or newer"
        return "ok"
    if device.type != "cpu":
        return f"runs on CUDA and HIP devices, got {device}"
    if not _INTERPRETED:
        return "runs on CUDA and HIP devices; on a CPU in Triton's interpreter, with TRITON_INTERPRET=1 from the start"
    return "ok"


def available_impls(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Every route by name, with "ok" or why it cannot run for `dtype` on `device`.

    `auto` takes the first "ok", but never Triton's interpreter.
    """
    native = native_linear_logprob.UNAVAILABLE or "ok"
    if torch.device(device).type != "cpu":
        native = f"runs on a CPU, got {device}"
    elif native == "ok" and dtype == torch.float64:
        native = "has no float64"
    return {
        "triton": _triton_state(torch.device(device)),
        "cpp": native,
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
        interpreted = "triton" if device.type == "cpu" else ""
        return next(name for name, state in routes.items() if state == "ok" and name != interpreted)
    if impl not in routes:
        raise ValueError(f"impl: got {impl!r}, expected 'auto', {', '.join(map(repr, routes))}")
    if routes[impl] != "ok":
        raise ImplUnavailable(f"impl={impl!r} cannot run on {device}: {routes[impl]}")
    return impl


def _require_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")


def _require_float(name: str, x: Tensor) -> None:
    _require_tensor(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {', '.join(map(str, _FLOATS))}")


def _require_like(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: got on {x.device}, expected the device of {other_name}, {other.device}")
    if dtype and x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected the dtype of {other_name}, {other.dtype}")


def _require_shape(name: str, x: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    # A plain loop over the axes: torch.compile traces through it with symbolic sizes.
    good = x.ndim == len(shape)
    if good:
        for found, wanted in zip(x.shape, shape, strict=True):
            if wanted is not None and found != wanted:
                good = False
    if not good:
        wanted_text = ", ".join("*" if w is None else str(w) for w in shape)
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {meaning} = ({wanted_text})")


def _require_number(name: str, x: float, kind: type | tuple[type, ...] = (int, float)) -> None:
    if not isinstance(x, kind):
        raise TypeError(f"{name}: got {x!r}, expected {'an integer' if kind is int else 'a number'}")


def _require_positive(name: str, x: float) -> None:
    _require_number(name, x)
    if not 0 < x < math.inf:
        raise ValueError(f"{name}: got {x}, expected a positive finite number")


# No id is ignored: an `ignore_index` that is no caller's id.
NOT_IGNORED = -(2**63)

# Modules with `forward` and `backward` as in kernels/torch/linear_logprob.py; Triton's is loaded when first used.
_LINEAR_LOGPROB: dict[str, Any] = {
    "triton": None,
    "cpp": native_linear_logprob,
    "torch": torch_linear_logprob,
}


def _triton(kernel: str) -> Any:
    return importlib.import_module(f"autoregembed.kernels.triton.{kernel}")


def _linear_logprob_route(impl: str) -> Any:
    return _LINEAR_LOGPROB[impl] or _triton("linear_logprob")


def _require_target(target: Tensor, size: int, ignore_index: int) -> None:
    """Raises IndexError for an id outside [0, size). Reads the data, so on a GPU it waits for the device."""
    bad = (target < 0) | (target >= size)
    if ignore_index != NOT_IGNORED:
        bad &= target != ignore_index
    if bad.any():
        row = int(bad.nonzero()[0])
        ignored = "" if ignore_index == NOT_IGNORED else f" and {ignore_index=}"
        raise IndexError(f"target: got id {int(target[row])} at row {row}, expected 0..{size - 1}{ignored}")


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
    if impl != "triton":
        _require_target(target, weight.shape[0], ignore_index)
    route = _linear_logprob_route(impl)
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
    route = _linear_logprob_route(impl)
    with torch.autocast(hidden.device.type, enabled=False):
        return route.backward(grad, hidden, weight, target, bias, softcap, scale, ignore_index)


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
        ctx.impl = impl
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
        if ctx.impl == "triton":
            return (_scale_rows(grad, u), *none[1:])
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
    if not bounds or bounds[0] != 0 or bounds[-1] != length or any(i > j for i, j in itertools.pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens: got {bounds[:8]}{'…' if len(bounds) > 8 else ''}, expected a non-decreasing row "
            f"from 0 to N = {length}"
        )


@torch.library.custom_op("autoregembed::sequence_sum_triton", mutates_args=())
def _sequence_sum_triton(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`sequence_sum` that does not read cu_seqlens on the host; a sequence with bad bounds gives NaN."""
    return _triton("linear_logprob").sequence_sum(x, cu_seqlens)


@torch.library.custom_op("autoregembed::sequence_expand_triton", mutates_args=())
def _sequence_expand_triton(x: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """x (S,) repeated over the rows of each sequence, (N,)."""
    return _triton("linear_logprob").sequence_expand(x, cu_seqlens, length)


@torch.library.custom_op("autoregembed::scale_rows", mutates_args=())
def _scale_rows(grad: Tensor, u: Tensor) -> Tensor:
    """grad (N,) times the rows of u (N, D), in one pass."""
    return _triton("linear_logprob").scale_rows(grad, u)


_sequence_sum_triton.register_fake(lambda x, cu_seqlens: x.new_empty(cu_seqlens.shape[0] - 1))
_sequence_expand_triton.register_fake(lambda x, cu_seqlens, length: x.new_empty(length))
_scale_rows.register_fake(lambda grad, u: torch.empty_like(u))


@once_differentiable
def _sequence_sum_triton_backward(ctx, grad):
    return _sequence_expand_triton(grad, ctx.saved_tensors[0], ctx.length), None


_sequence_sum_triton.register_autograd(_sequence_sum_triton_backward, setup_context=_sequence_sum_context)


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
    """Log-probabilities of target tokens under a linear head, without the (N, V) logits.

    logprob_i = log softmax(cap(scale · (hidden_i Wᵀ + bias)))[target_i], cap(x) = softcap · tanh(x / softcap)

    With a frozen head (neither `weight` nor `bias` requires grad) forward and backward cost two GEMMs of 2·N·V·D
    FLOPs together, whatever the upstream gradient is; without gradients it costs one. A trainable head gets its
    gradients by recomputation. Extra memory: one block of logits and, when `hidden` requires grad, (N, D).

    Args:
        hidden: (N, D), float16, bfloat16, float32 or float64.
        weight: (V, D), the lm_head, same dtype and device. A frozen DTensor is gathered, and freed before this returns.
        target: (N,) int64 or int32 token ids in [0, V), or `ignore_index` for rows that give 0 and no gradient.
        bias: (V,) or None.
        softcap: positive; logits are capped to (−softcap, softcap) as in Gemma. None: no cap.
        scale: factor on the logits before the cap.
        ignore_index: the target value of rows that do not count.
        cu_seqlens: (S+1,) int32 or int64; rows cu_seqlens[i] to cu_seqlens[i+1] belong to sequence i.
        num_grad_rows: rows from this one on are scored only: they are constants, and cost one GEMM where the rows
            before them cost two. None: all rows carry gradients.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        (N,) log-probabilities in nats, or (S,) sums per sequence with `cu_seqlens`; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: wrong dtype, device or shape; the message names the argument.
        IndexError: a target id outside [0, V) that is not `ignore_index`; NaN on the Triton route.
        ImplUnavailable: `impl` names a route that cannot run here.

    Source: log p(target | z) of arXiv 2502.11401, §3; the two-GEMM form is derived in kernels/torch/linear_logprob.py.
    """
    _require_float("hidden", hidden)
    _require_float("weight", weight)
    if weight.requires_grad and hasattr(weight, "full_tensor"):
        raise TypeError("weight: got a DTensor that requires grad, expected one that is frozen, or a plain tensor")
    weight = to_full_tensor(weight)
    _require_like("weight", weight, "hidden", hidden, dtype=False)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _require_like("weight", weight, "hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected (N, D)")
    _require_shape("weight", weight, (None, hidden.shape[1]), "(V, D)")
    if weight.shape[0] == 0:
        raise ValueError("weight: got V = 0, expected at least one token")
    _require_tensor("target", target)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: got dtype {target.dtype}, expected torch.int64, torch.int32")
    _require_like("target", target, "hidden", hidden, dtype=False)
    _require_shape("target", target, (hidden.shape[0],), "(N,)")
    if bias is not None:
        _require_float("bias", bias)
        _require_like("bias", bias, "hidden", hidden)
        _require_shape("bias", bias, (weight.shape[0],), "(V,)")
    if softcap is not None:
        _require_positive("softcap", softcap)
    _require_number("scale", scale)
    _require_number("ignore_index", ignore_index, int)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a finite number")
    impl = _resolve(impl, hidden.device, hidden.dtype, (*_LINEAR_LOGPROB,))
    if cu_seqlens is not None:
        _require_tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected torch.int32, torch.int64")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (S+1,)")
        _require_like("cu_seqlens", cu_seqlens, "hidden", hidden, dtype=False)
    n = hidden.shape[0]
    if num_grad_rows is not None:
        _require_number("num_grad_rows", num_grad_rows, int)
        if not 0 <= num_grad_rows <= n:
            raise ValueError(f"num_grad_rows: got {num_grad_rows}, expected 0..{n} (N)")
    target = target.long()
    if impl == "reference":
        _require_target(target, weight.shape[0], ignore_index)
        if cu_seqlens is not None:
            _require_bounds(cu_seqlens, hidden.shape[0])
        if num_grad_rows is not None:
            hidden = torch.cat([hidden[:num_grad_rows], hidden[num_grad_rows:].detach()])
        with torch.autocast(hidden.device.type, enabled=False):
            return spec.linear_logprob(
                hidden, weight, target, bias=bias, softcap=softcap, scale=scale,
                ignore_index=ignore_index, cu_seqlens=cu_seqlens,
            )  # fmt: skip
    trainable_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    with_gradient = torch.is_grad_enabled() and hidden.requires_grad and not trainable_head

    def rows(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, gradient: bool) -> Tensor:
        return _linear_logprob(h, w, y, b, softcap, float(scale), ignore_index, gradient, impl)[0]

    if num_grad_rows is None or num_grad_rows == n or not torch.is_grad_enabled():
        logprob = rows(hidden, weight, target, bias, with_gradient)
    else:
        scored = hidden[num_grad_rows:].detach(), weight.detach(), target[num_grad_rows:]
        logprob = rows(*scored, None if bias is None else bias.detach(), False)
        if num_grad_rows > 0:
            first = rows(hidden[:num_grad_rows], weight, target[:num_grad_rows], bias, with_gradient)
            logprob = torch.cat([first, logprob])
        else:
            logprob = logprob + hidden[:0].sum(dtype=logprob.dtype)  # attached to the graph
    if cu_seqlens is None:
        return logprob
    return (_sequence_sum_triton if impl == "triton" else _sequence_sum)(logprob, cu_seqlens)


# ----------------------------------------------------------------------------------------------------------------------
# alignment_loss


class AlignmentOutput(NamedTuple):
    """`loss` () carries the gradient; the statistics () do not, and stay on the device."""

    loss: Tensor
    s1: Tensor
    s2: Tensor
    accuracy: Tensor


@torch.library.custom_op("autoregembed::alignment", mutates_args=())
def _alignment(
    query_positive: Tensor,
    positive_positive: Tensor,
    query_negatives: Tensor,
    reference_positive: Tensor | None,
    reference_negatives: Tensor | None,
    negative_mask: Tensor | None,
    beta: float,
    temperature: float,
    ref_margin: str,
    negatives: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, s1, s2, accuracy, each (), and the loss's gradients of the first three arguments."""
    return _triton("alignment").forward(
        query_positive, positive_positive, query_negatives, reference_positive, reference_negatives, negative_mask,
        beta, temperature, ref_margin, negatives,
    )  # fmt: skip


@_alignment.register_fake
def _(query_positive, positive_positive, query_negatives, *_):
    scores = (query_positive, positive_positive, query_negatives)
    return *(query_positive.new_empty(()) for _ in range(4)), *(x.new_empty(x.shape) for x in scores)


def _alignment_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _alignment_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    return *(grad * x for x in ctx.saved_tensors), *(None,) * 7


_alignment.register_autograd(_alignment_backward, setup_context=_alignment_context)


def alignment_loss(
    query_positive: Tensor,
    positive_positive: Tensor,
    query_negatives: Tensor,
    reference_positive: Tensor | None = None,
    reference_negatives: Tensor | None = None,
    *,
    beta: float = 0.1,
    temperature: float = 0.1,
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
        beta, temperature: β and τ, positive.
        ref_margin: "add" (the released code), "subtract" (the DPO form) or "none".
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
    if ref_margin not in REF_MARGINS:
        raise ValueError(f"ref_margin: got {ref_margin!r}, expected {REF_MARGINS}")
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives: got {negatives!r}, expected {NEGATIVES}")
    _require_positive("beta", beta)
    _require_positive("temperature", temperature)
    _require_shape("query_positive", query_positive, (None,), "(B,)")
    _require_shape("query_negatives", query_negatives, (None, None), "(B, M)")
    b, m = query_positive.shape[0], query_negatives.shape[1]
    given = {"reference_positive": reference_positive, "reference_negatives": reference_negatives}
    if ref_margin != "none":
        missing = [name for name, x in given.items() if x is None]
        if missing:
            raise ValueError(f"{missing[0]}: got None, expected a tensor of scores, since ref_margin={ref_margin!r}")
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
            raise TypeError(f"negative_mask: got dtype {negative_mask.dtype}, expected torch.bool")
        _require_like("negative_mask", negative_mask, "query_positive", query_positive, dtype=False)
        if negative_mask.ndim == 1:
            negative_mask = negative_mask[:, None]
        _require_shape("negative_mask", negative_mask, (b, m), "(B, M)")
    impl = _resolve(impl, query_positive.device, query_positive.dtype, ("triton", "torch"))
    # B·M numbers: the specification is the torch route. Scores are sums of hundreds of nats, hence never 16 bits.
    work = torch.float64 if query_positive.dtype == torch.float64 else torch.float32
    given_scores = (
        query_positive.to(work),
        positive_positive.to(work),
        query_negatives.to(work),
        None if reference_positive is None else reference_positive.detach().to(work),
        None if reference_negatives is None else reference_negatives.detach().to(work),
    )
    if impl == "triton":
        loss, s1, s2, accuracy, *_ = _alignment(*given_scores, negative_mask, beta, temperature, ref_margin, negatives)
        return AlignmentOutput(loss, s1.detach(), s2.detach(), accuracy.detach())
    loss, s1, s2, accuracy = spec.alignment_loss(
        *given_scores,
        beta=beta, temperature=temperature, ref_margin=ref_margin, negatives=negatives, mask=negative_mask,
    )  # fmt: skip
    return AlignmentOutput(loss, s1, s2, accuracy)


# ----------------------------------------------------------------------------------------------------------------------
# info_nce


@torch.library.custom_op("autoregembed::info_nce", mutates_args=())
def _info_nce(
    query: Tensor,
    passages: Tensor,
    target: Tensor,
    passage_ids: Tensor | None,
    temperature: float,
    query_gradient: bool,
    passage_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D) and passages (P, D), each (0, D) unless asked for."""
    forward = _triton("info_nce").forward
    with torch.autocast(query.device.type, enabled=False):
        return forward(query, passages, target, passage_ids, temperature, query_gradient, passage_gradient)


@_info_nce.register_fake
def _(query, passages, target, passage_ids, temperature, query_gradient, passage_gradient):
    (b, d), p = query.shape, passages.shape[0]
    loss = query.new_empty((), dtype=torch.promote_types(query.dtype, torch.float32))
    return loss, query.new_empty(b if query_gradient else 0, d), query.new_empty(p if passage_gradient else 0, d)


def _info_nce_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.wanted = inputs[5:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _info_nce_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    both = (grad * x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True))
    return *both, *(None,) * 5


_info_nce.register_autograd(_info_nce_backward, setup_context=_info_nce_context)


class _Product(torch.autograd.Function):
    """a @ b.T whose gradients too are taken without autocast."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (grad,) = ctx.saved_tensors, grads
        for_a, for_b = ctx.needs_input_grad
        with torch.autocast(a.device.type, enabled=False):
            return grad @ b if for_a else None, grad.T @ a if for_b else None


def _info_nce_by_rows(
    q: Tensor, p: Tensor, target: Tensor, temperature: float, passage_ids: Tensor | None, step: int
) -> Tensor:
    """The torch route by chunks of `step` rows, each recomputed in the backward unless it is the only one."""
    _require_target(target, p.shape[0], NOT_IGNORED)
    q, p, y = F.normalize(q, dim=-1), F.normalize(p, dim=-1), target.long()

    def loss_of(q: Tensor, p: Tensor, y: Tensor) -> Tensor:
        logits = _Product.apply(q, p) / temperature
        if passage_ids is not None:
            duplicate = passage_ids[None, :] == passage_ids[y][:, None]
            logits = logits.masked_fill(duplicate.scatter(1, y[:, None], False), -torch.inf)
        return F.cross_entropy(logits, y, reduction="sum")

    if step >= len(q):
        return loss_of(q, p, y) / len(q)
    chunks = zip(q.split(step), y.split(step), strict=True)
    return torch.stack([checkpoint(loss_of, rows, p, y, use_reentrant=False) for rows, y in chunks]).sum() / len(q)


def info_nce(
    query: Tensor,
    passages: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 0.05,
    passage_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Contrastive loss over cosine similarities, in-batch and hard negatives in one list of passages.

    loss = mean_i −log softmax_p(cos(query_i, passage_p) / temperature)[target_i]

    Args:
        query: (B, D), need not be normalised.
        passages: (P, D): the positives, then any hard negatives.
        target: (B,) int64 or int32, the positive's place in `passages`; by default query i belongs to passage i, P ≥ B.
        temperature: positive.
        passage_ids: (P,) int64, equal for equal passages: a passage with the id of a query's positive that is not the
            positive itself is no negative of that query.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        () float32 (float64 for float64 inputs); 0 attached to the graph for B = 0.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or target (a target out of range: NaN on the
            Triton route).
        ImplUnavailable: the route cannot run here; "cpp" cannot with `passage_ids`.

    Source: van den Oord et al., arXiv 1807.03748; the control of arXiv 2502.11401.
    """
    _require_float("query", query)
    _require_float("passages", passages)
    _require_like("passages", passages, "query", query)
    if query.ndim != 2:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected (B, D)")
    _require_shape("passages", passages, (None, query.shape[1]), "(P, D)")
    _require_positive("temperature", temperature)
    if target is None:
        if len(passages) < len(query):
            raise ValueError(f"passages: got P = {len(passages)}, expected P ≥ B = {len(query)}")
        target = torch.arange(len(query), device=query.device)
    else:
        _require_tensor("target", target)
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"target: got dtype {target.dtype}, expected torch.int64, torch.int32")
        _require_like("target", target, "query", query, dtype=False)
        _require_shape("target", target, (query.shape[0],), "(B,)")
    if passage_ids is not None:
        _require_tensor("passage_ids", passage_ids)
        if passage_ids.dtype != torch.int64:
            raise TypeError(f"passage_ids: got dtype {passage_ids.dtype}, expected torch.int64")
        _require_like("passage_ids", passage_ids, "query", query, dtype=False)
        _require_shape("passage_ids", passage_ids, (passages.shape[0],), "(P,)")
    requested, impl = impl, _resolve(impl, query.device, query.dtype, (*_LINEAR_LOGPROB,))
    if requested == "cpp" and passage_ids is not None:
        raise ImplUnavailable("impl='cpp' has no passage_ids, expected 'auto', 'triton', 'torch', 'reference'")
    if impl == "triton" and query.shape[0] > 0 and passages.shape[0] > 0:
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(query.device.type)
            query, passages = query.to(dtype), passages.to(dtype)
        grad = torch.is_grad_enabled()
        wanted = grad and query.requires_grad, grad and passages.requires_grad
        return _info_nce(query, passages, target.long(), passage_ids, float(temperature), *wanted)[0]
    work = torch.promote_types(query.dtype, torch.float32)
    query, passages = query.to(work), passages.to(work)
    if query.shape[0] == 0:
        return query.sum() + passages[:0].sum()
    if passages.shape[0] == 0:
        raise ValueError("passages: got P = 0, expected at least one passage")
    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference":
            _require_target(target, passages.shape[0], NOT_IGNORED)
            return spec.info_nce(query, passages, target.long(), temperature=temperature, passage_ids=passage_ids)
        # A matrix of scores that is one chunk anyway costs least as it stands; compiled code must serve any B and P.
        step = torch_linear_logprob.rows_per_chunk(query.device, passages.shape[0], query.element_size())
        whole = requested in ("auto", "torch") and not torch.compiler.is_compiling() and step >= len(query)
        if whole or passage_ids is not None:
            return _info_nce_by_rows(query, passages, target, temperature, passage_ids, step)
        logprob = linear_logprob(
            F.normalize(query, dim=-1),
            F.normalize(passages, dim=-1),
            target,
            scale=1 / temperature,
            ignore_index=NOT_IGNORED,
            impl=impl,
        )
        return -logprob.mean()


# ----------------------------------------------------------------------------------------------------------------------
# pool_last_k and splice


@torch.library.custom_op("autoregembed::pool_last_k", mutates_args=())
def _pool_last_k(hidden: Tensor, cu_seqlens: Tensor, k: int, index: Tensor | None) -> Tensor:
    return _triton("splice").pool_last_k(hidden, cu_seqlens, k, index)


@torch.library.custom_op("autoregembed::pool_last_k_backward", mutates_args=())
def _pool_last_k_backward(grad: Tensor, cu_seqlens: Tensor, index: Tensor | None, length: int) -> Tensor:
    return _triton("splice").pool_last_k_backward(grad, cu_seqlens, index, length)


@torch.library.custom_op("autoregembed::splice", mutates_args=())
def _splice(
    z: Tensor, embedding: Tensor, ids: Tensor, cu_seqlens: Tensor, z_index: Tensor | None, offset: int, scale: float
) -> Tensor:
    return _triton("splice").splice(z, embedding, ids, cu_seqlens, z_index, offset, scale)


@torch.library.custom_op("autoregembed::splice_backward", mutates_args=())
def _splice_backward(
    grad: Tensor, cu_seqlens: Tensor, z_index: Tensor | None, offset: int, b: int, k: int, dtype: torch.dtype
) -> Tensor:
    return _triton("splice").splice_backward(grad, cu_seqlens, z_index, offset, b, k, dtype)


@_pool_last_k.register_fake
def _(hidden, cu_seqlens, k, index):
    return hidden.new_empty(cu_seqlens.shape[0] - 1 if index is None else index.shape[0], k, hidden.shape[1])


_pool_last_k_backward.register_fake(lambda grad, cu_seqlens, index, length: grad.new_empty(length, grad.shape[2]))


@_splice.register_fake
def _(z, embedding, ids, cu_seqlens, z_index, offset, scale):
    return embedding.new_empty(ids.shape[0], embedding.shape[1])


@_splice_backward.register_fake
def _(grad, cu_seqlens, z_index, offset, b, k, dtype):
    return grad.new_empty(b, k, grad.shape[1], dtype=dtype)


def _pool_last_k_context(ctx, inputs, output):
    hidden, cu_seqlens, _, index = inputs
    ctx.save_for_backward(cu_seqlens, index)
    ctx.length = hidden.shape[0]


def _splice_context(ctx, inputs, output):
    z, _, _, cu_seqlens, z_index, offset, _ = inputs
    ctx.save_for_backward(cu_seqlens, z_index)
    ctx.place = offset, z.shape[0], z.shape[1], z.dtype


@once_differentiable
def _pool_last_k_autograd(ctx, grad):
    return _pool_last_k_backward(grad, *ctx.saved_tensors, ctx.length), None, None, None


@once_differentiable
def _splice_autograd(ctx, grad):
    return _splice_backward(grad, *ctx.saved_tensors, *ctx.place), *(None,) * 6


_pool_last_k.register_autograd(_pool_last_k_autograd, setup_context=_pool_last_k_context)
_splice.register_autograd(_splice_autograd, setup_context=_splice_context)


def _require_index(name: str, x: Tensor, size: int | None, other: Tensor) -> None:
    _require_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {x.dtype}, expected torch.int32, torch.int64")
    _require_like(name, x, "the data", other, dtype=False)
    if x.ndim != 1 or (size is not None and x.shape[0] != size):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected ({'*' if size is None else size},)")


def _require_range(name: str, x: Tensor, size: int) -> None:
    """Reads the data, so on a GPU it waits for the device."""
    bad = (x < 0) | (x >= size)
    if bad.any():
        place = int(bad.nonzero()[0])
        raise IndexError(f"{name}: got {int(x[place])} at {place}, expected 0..{size - 1}")


def _require_sequences(cu_seqlens: Tensor, length: int, least: int) -> None:
    """Bounds of sequences that have `least` rows each. Reads the data, so on a GPU it waits for the device."""
    _require_bounds(cu_seqlens, length)
    lengths = cu_seqlens.diff()
    if len(lengths) and int(lengths.min()) < least:
        place = int(lengths.argmin())
        raise ValueError(f"cu_seqlens: got {int(lengths[place])} rows in sequence {place}, expected {least} or more")


def pool_last_k(
    hidden: Tensor,
    cu_seqlens: Tensor,
    k: int,
    index: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The last K rows of packed sequences: z out of the encoder's output.

    out[i] = hidden[cu_seqlens[j + 1] − K : cu_seqlens[j + 1]], j = index[i] or i

    Args:
        hidden: (T, D), a pack of B sequences of at least K rows each.
        cu_seqlens: (B+1,) int32 or int64, from 0 to T.
        k: K, at least 1.
        index: the sequence that each output reads, int32 or int64, (B,) or any other number; `Packed.unsort_index` restores the
            caller's order. None: all in the order of the pack.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (len(index) or B, K, D). On the Triton route a sequence shorter than K or out of range gives NaN.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape or index.
    """
    _require_float("hidden", hidden)
    _require_shape("hidden", hidden, (None, None), "(T, D)")
    _require_index("cu_seqlens", cu_seqlens, None, hidden)
    _require_number("k", k, int)
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    if index is not None:
        _require_index("index", index, None, hidden)
    impl = _resolve(impl, hidden.device, hidden.dtype, ("triton", "torch"))
    if impl == "triton":
        return _pool_last_k(hidden, cu_seqlens, k, index)
    _require_sequences(cu_seqlens, hidden.shape[0], k)
    if index is not None:
        _require_range("index", index, cu_seqlens.shape[0] - 1)
    if impl == "reference":
        return spec.pool_last_k(hidden, cu_seqlens, k, index)
    ends = cu_seqlens[1:].long()
    if index is not None:
        ends = ends[index]
    return hidden[ends[:, None] - k + torch.arange(k, device=ends.device)]


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
    """The decoder's packed input: per pair K rows of z among the frozen embedding rows of bos and the target.

    At t = cu_seqlens[s] + offset + j: out[t] = z[z_index[s], j] for 0 ≤ j < K, else embedding_scale · embedding[ids[t]]

    Args:
        z: (B, K, D) compressed embeddings; the only argument that gets a gradient.
        embedding: (V, D), frozen.
        ids: (T,) int64 or int32; those in the places of z are never read.
        cu_seqlens: (S+1,) int32 or int64, from 0 to T.
        z_index: (S,) int64 or int32, the row of z that pair s reads; several may read the same. None: pair s reads s.
        offset: rows of a pair before z (1 where bos comes first).
        embedding_scale: Gemma's √D, as its embedding layer rounds it; 1 elsewhere.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (T, D) in the embedding's dtype. On the Triton route an id or z_index out of range gives rows of NaN.

    Raises:
        TypeError, ValueError, IndexError: wrong dtype, device, shape, id or z_index, or a trainable embedding.
    """
    _require_float("z", z)
    _require_float("embedding", embedding)
    _require_like("embedding", embedding, "z", z, dtype=False)
    _require_shape("z", z, (None, None, None), "(B, K, D)")
    _require_shape("embedding", embedding, (None, z.shape[2]), "(V, D)")
    if torch.is_grad_enabled() and embedding.requires_grad:
        raise ValueError("embedding: got one that requires grad, expected a frozen one")
    _require_index("ids", ids, None, z)
    _require_index("cu_seqlens", cu_seqlens, None, z)
    if z_index is not None:
        _require_index("z_index", z_index, cu_seqlens.shape[0] - 1, z)
    _require_number("offset", offset, int)
    if offset < 0:
        raise ValueError(f"offset: got {offset}, expected 0 or more")
    _require_number("embedding_scale", embedding_scale)
    if not -math.inf < embedding_scale < math.inf:
        raise ValueError(f"embedding_scale: got {embedding_scale}, expected a finite number")
    impl = _resolve(impl, z.device, z.dtype, ("triton", "torch"))
    if impl == "triton":
        return _splice(z, embedding, ids, cu_seqlens, z_index, offset, float(embedding_scale))
    _require_sequences(cu_seqlens, ids.shape[0], offset + z.shape[1])
    starts = cu_seqlens[:-1].long() + offset
    places = (starts[:, None] + torch.arange(z.shape[1], device=z.device)).flatten()
    ids = ids.index_fill(0, places, 0)
    _require_range("ids", ids, embedding.shape[0])
    if z_index is not None:
        _require_range("z_index", z_index, z.shape[0])
    elif cu_seqlens.shape[0] - 1 != z.shape[0]:
        raise ValueError(f"z: got {z.shape[0]}, expected one for each of {cu_seqlens.shape[0] - 1} pairs")
    if impl == "reference":
        return spec.splice(z, embedding, ids, cu_seqlens, z_index, offset=offset, embedding_scale=embedding_scale)
    rows = (z if z_index is None else z[z_index]).flatten(0, 1).to(embedding.dtype)
    embedded = F.embedding(ids, embedding)
    if embedding_scale != 1.0:
        embedded = embedded * embedding_scale
    return embedded.index_copy(0, places, rows)
