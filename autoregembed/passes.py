"""A model's activations: those of one pass at a time, or of one layer."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from autoregembed.derivatives import first_order_only
from autoregembed.packing import index_on, order_of


class PairwiseScores(torch.autograd.Function):
    """Scores of S pairs, one micro-batch after another, with d score / d z of every pair in place of a graph.

    The decoder is frozen, a pair's score depends on that pair's copy of z alone, and the upstream gradient is one
    number a pair. So the gradient is formed up to that number before any loss is known, and nothing runs twice.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, score: Callable[[Tensor, list[int]], Tensor], microbatches: list[list[int]]
    ) -> Tensor:
        u = torch.empty_like(z)  # (S, K, D)
        scores = []
        for microbatch in microbatches:
            index = index_on(z.device, microbatch)
            rows = z[index].detach().requires_grad_()
            with torch.enable_grad():
                found = score(rows, microbatch)
                (u[index],) = torch.autograd.grad(found.sum(), rows)
            scores.append(found.detach())
        ctx.save_for_backward(u)
        return in_order(scores, microbatches)

    @staticmethod
    @first_order_only("Decoder.logprob", "token_budget=None with impl='reference' has derivatives of any order")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return (grad[:, None, None] * u).to(u.dtype), None, None


def in_order(scores: list[Tensor], microbatches: list[list[int]]) -> Tensor:
    """The scores of all passes, in the order of the caller's pairs."""
    return torch.cat(scores)[order_of(microbatches, scores[0].device)]


class _SumOfPasses(torch.autograd.Function):
    """Σ over passes of a loss that needs no other pass, with its gradient of z in place of a graph."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, run: Callable[[Tensor, int], Sequence[Tensor]], passes: list[list[int]]
    ) -> tuple[Tensor, ...]:
        gradient = torch.zeros_like(z)  # (B, K, D)
        found = []
        for i, places in enumerate(passes):
            index = index_on(z.device, places)
            rows = z[index].detach().requires_grad_()
            with torch.enable_grad():
                out = run(rows, i)
                (gradient[index],) = torch.autograd.grad(out[0], rows)
            found.append([x.detach() for x in out])
        ctx.save_for_backward(gradient)
        loss, *others = (torch.stack(x).sum(0) for x in zip(*found, strict=True))
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @first_order_only(
        "a loss in several passes", "token_budget=None with impl='reference' has derivatives of any order"
    )
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad * gradient).to(gradient.dtype), None, None


def sum_of_passes(
    z: Tensor, run: Callable[[Tensor, int], Sequence[Tensor]], passes: list[list[int]]
) -> tuple[Tensor, ...]:
    """Sums of what `run(rows of z, i)` gives for each pass, of which the first, a loss, has a gradient.

    Each pass is followed at once by its own backward: one pass' activations are ever alive, and (B, K, D) gradients.

    Args:
        z: (B, K, D).
        run: a loss () and statistics () of pass i.
        passes: the rows of z that each reads, none in two of them.
    """
    if torch.is_grad_enabled() and z.requires_grad:
        return _SumOfPasses.apply(z, run, passes)
    found = [run(z[index_on(z.device, places)], i) for i, places in enumerate(passes)]
    return tuple(torch.stack(x).sum(0) for x in zip(*found, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Layers


_aten = torch.ops.aten
PRODUCTS = {
    op.default: place  # of the right matrix among the arguments
    for name, place in (("mm", 1), ("addmm", 2), ("_grouped_mm", 1), ("_scaled_mm", 1), ("_int_mm", 1))
    if (op := getattr(_aten, name, None)) is not None
}
ATTENTION = ("_scaled_dot_product_", "_flash_attention_forward", "_varlen_attn", "_flash_attn_")
MIN_TERMS = 128  # a product of fewer, like an adapter's second one, is cheaper to repeat than to keep

Checkpointing: TypeAlias = 'bool | Literal["selective"]'


def checkpoint_options(kind: Checkpointing) -> dict[str, Any]:
    """Arguments of `torch.utils.checkpoint.checkpoint` for a layer: keep its input alone, or also what costs most.

    "selective" keeps the results of matrix products and of attention kernels, which take nearly all of a layer's time,
    and repeats the rest: norms, rope, activation functions, `sdpa` over short texts.

    Raises:
        ValueError: another kind.
    """
    if kind not in (True, "selective"):
        raise ValueError(f"gradient_checkpointing: got {kind!r}, expected True, False or 'selective'")
    return {"use_reentrant": False} | ({} if kind is True else {"context_fn": _Selection().contexts})


class _Selection:
    """Which results of a layer are kept. The last product's is not, since no gradient needs it."""

    def __init__(self) -> None:
        self.products: int | None = None  # in the layer before

    def contexts(self) -> Any:
        last, seen = self.products, {False: 0, True: 0}  # torch 2.10 asks again where it recomputes

        def policy(ctx: Any, op: Any, *args: Any, **_: Any) -> CheckpointPolicy:
            if op in PRODUCTS:
                seen[ctx.is_recompute] += 1
                if not ctx.is_recompute:
                    self.products = seen[False]
                keep = seen[ctx.is_recompute] != last and args[PRODUCTS[op]].shape[-2] >= MIN_TERMS
            else:
                keep = _is_attention(op)
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)


@contextlib.contextmanager
def unselected() -> Iterator[None]:
    """Ops inside are repeated whatever they are. To ask about each takes longer than to run it, where it is small."""
    if isinstance(_get_current_dispatch_mode(), _CachingTorchDispatchMode | _CachedTorchDispatchMode):
        with _pop_mode_temporarily():
            yield
    else:
        yield


@cache
def _is_attention(op: Any) -> bool:
    name = op.name().partition("::")[2]
    return name.startswith(ATTENTION) and "backward" not in name


def checkpoint_layers(model: Any, kind: Checkpointing = True) -> None:
    """Makes a frozen model keep of each layer what `checkpoint_options` says, and repeat the rest in the backward.

    Transformers' own checkpointing wants a model in training mode, with its dropout.

    Raises:
        ValueError: the model does not say which modules are its layers; an unknown kind.
    """
    options = checkpoint_options(kind)
    names = set(getattr(model, "_no_split_modules", None) or ())
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not (isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names):
            continue
        inside.update(module.modules())
        if not hasattr(module, "_forward_once"):
            module._forward_once = module.forward
        module.forward = types.MethodType(partial(_recomputed, options), module)
    if not inside:
        raise ValueError(
            f"gradient_checkpointing: got {kind!r} for a {type(model).__name__}, which names no layers, expected False"
        )


def _recomputed(options: dict[str, Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer._forward_once(*args, **kwargs)
    return checkpoint(layer._forward_once, *args, preserve_rng_state=False, **options, **kwargs)
