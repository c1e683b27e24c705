"""Other implementations of linear_logprob, each through its public API."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import Unavailable, Variant, compiled_afresh, is_gpu, require, require_gpu, version

# (hidden (N, D), weight (V, D), target (N,)) -> token log-probabilities (N,), or their sum () with reduction="sum"
Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(1).gather(1, target[:, None]).squeeze(1)


def _chunk(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


def compiled_chunked(device: str) -> Logprob:
    """torch.compile of one chunk of rows, recomputed in backward, so that no (N, V) tensor stays alive."""
    from torch.utils.checkpoint import checkpoint

    compiled = compiled_afresh(_chunk)
    rows = 2048 if is_gpu(device) else 512

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        chunks = zip(hidden.split(rows), target.split(rows), strict=True)
        if not hidden.requires_grad:
            return torch.cat([compiled(h, weight, y) for h, y in chunks])
        return torch.cat([checkpoint(compiled, h, weight, y, use_reentrant=False) for h, y in chunks])

    return logprob


def torch_linear_cross_entropy(device: str, reduction: str = "none") -> Logprob:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    return lambda h, w, y: -function(h, w, y, reduction=reduction, options=options())


def cut_cross_entropy(device: str, filtered: bool = False) -> Logprob:
    if filtered and not is_gpu(device):
        raise Unavailable("its gradient filter is in its CUDA kernels only")
    function = require("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    options: dict[str, Any] = {"impl": "cce" if is_gpu(device) else "torch_compile"}
    if is_gpu(device) and not filtered:
        options["filter_eps"] = None
    return lambda h, w, y: -function(h, w, y, reduction="none", **options)


def liger(device: str, reduction: str = "none") -> Logprob:
    require_gpu(device, "liger-kernel")
    functional = require("liger_kernel.transformers.functional", "liger-kernel")
    return lambda h, w, y: -functional.liger_fused_linear_cross_entropy(h, w, y, reduction=reduction)


def quack_sum(device: str) -> Logprob:
    require_gpu(device, "quack-kernels")
    function = require("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    return lambda h, w, y: -function(h, w, y, reduction="sum")


def trl(device: str) -> Logprob:
    function = require("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction
    return lambda h, w, y: function.apply(h, w, None, y, 1.0, 8192, None, 1.0, ())[0]


# By name: the jobs, device to function, the distribution.
BASELINES: dict[str, tuple[str, Callable[[str], Logprob], str]] = {
    "eager": ("gradient scalar score", lambda device: eager, "torch"),
    "compiled chunked": ("gradient score", compiled_chunked, "torch"),
    "torch linear_cross_entropy": ("gradient score", torch_linear_cross_entropy, "torch"),
    "torch linear_cross_entropy sum": ("scalar", partial(torch_linear_cross_entropy, reduction="sum"), "torch"),
    "cut-cross-entropy": ("gradient score", cut_cross_entropy, "cut-cross-entropy"),
    "cut-cross-entropy filtered": ("gradient", partial(cut_cross_entropy, filtered=True), "cut-cross-entropy"),
    "liger": ("gradient score", liger, "liger-kernel"),
    "liger sum": ("scalar", partial(liger, reduction="sum"), "liger-kernel"),
    "quack sum": ("scalar", quack_sum, "quack-kernels"),
    "trl": ("gradient score", trl, "trl"),
}


def job_call(logprob: Logprob, job: str, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Callable:
    """The timed call of one job; returns (log-probabilities or their sum, gradient of hidden or None).

    "gradient" is per-token log-probabilities and a backward with `upstream` (N,), the weight frozen; "scalar" is the
    summed loss and its backward; "score" is the forward alone under no_grad.
    """

    def backward() -> tuple[Tensor, Tensor | None]:
        h = hidden.detach().requires_grad_()
        out = logprob(h, weight, target)
        if job == "scalar":
            out = out.sum()
        out.backward(upstream if job == "gradient" else None)
        return out.detach(), h.grad

    @torch.no_grad()
    def score() -> tuple[Tensor, None]:
        return logprob(hidden, weight, target), None

    return score if job == "score" else backward


def variants(job: str, device: str, inputs: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, Variant]:
    """Every baseline that does `job`; `inputs()` returns hidden, weight, target, upstream."""

    def build(make: Callable[[str], Logprob]) -> Callable:
        return job_call(make(device), job, *inputs())

    return {
        name: Variant(partial(build, make), version(distribution))
        for name, (jobs, make, distribution) in BASELINES.items()
        if job in jobs.split()
    }
