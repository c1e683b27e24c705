"""Other implementations of the linear head's log-probability, each through its public API, on the same job.

"gradient" is per-token log-probabilities, then a backward with one upstream number per sequence, the weight frozen;
"scalar" is the summed loss and its backward; "score" is the forward alone under no_grad.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import Variant, version
from ..workload import Unavailable

# (hidden, weight, target) -> token log-probabilities (N,), or their sum () where only that is on offer
Logprob = Callable[[Tensor, Tensor, Tensor], Tensor]


def _eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(1).gather(1, target[:, None]).squeeze(1)


def _chunk(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


@functools.cache
def _compiled_chunk() -> Logprob:
    return torch.compile(_chunk, dynamic=False)


def compiled_chunked(device: str) -> Logprob:
    """The usual lean form: torch.compile of one chunk, recomputed in backward, so that no (N, V) tensor lives on."""
    from torch.utils.checkpoint import checkpoint

    compiled = _compiled_chunk()
    rows = 512 if device == "cpu" else 2048

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        parts = zip(hidden.split(rows), target.split(rows), strict=True)
        if not hidden.requires_grad:
            return torch.cat([compiled(h, weight, y) for h, y in parts])
        return torch.cat([checkpoint(compiled, h, weight, y, use_reentrant=False) for h, y in parts])

    return logprob


def torch_linear_cross_entropy(device: str) -> Logprob:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    return lambda h, w, y: -function(h, w, y, reduction="none", options=options())


def torch_linear_cross_entropy_sum(device: str) -> Logprob:
    torch_linear_cross_entropy(device)
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="sum", options=options)  # type: ignore[attr-defined]


def _import(module: str, distribution: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{distribution} is not installed" if not version(distribution) else str(error)) from error


def cut_cross_entropy(device: str) -> Logprob:
    function = _import("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    impl = "torch_compile" if device == "cpu" else "cce"
    exact = {} if device == "cpu" else {"filter_eps": None}
    return lambda h, w, y: -function(h, w, y, reduction="none", impl=impl, **exact)


def cut_cross_entropy_filtered(device: str) -> Logprob:
    if device == "cpu":
        raise Unavailable("its gradient filter is in its CUDA kernels only")
    function = _import("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return lambda h, w, y: -function(h, w, y, reduction="none", impl="cce")


def _needs_gpu(device: str, name: str) -> None:
    if device == "cpu":
        raise Unavailable(f"{name} needs a GPU")


def liger(device: str) -> Logprob:
    functional = _import("liger_kernel.transformers.functional", "liger-kernel")
    _needs_gpu(device, "liger-kernel")
    return lambda h, w, y: -functional.liger_fused_linear_cross_entropy(h, w, y, reduction="none")


def liger_sum(device: str) -> Logprob:
    functional = _import("liger_kernel.transformers.functional", "liger-kernel")
    _needs_gpu(device, "liger-kernel")
    return lambda h, w, y: -functional.liger_fused_linear_cross_entropy(h, w, y, reduction="sum")


def quack_sum(device: str) -> Logprob:
    if not version("quack-kernels"):
        raise Unavailable("quack-kernels is not installed")
    _needs_gpu(device, "quack-kernels")
    function = _import("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy
    return lambda h, w, y: -function(h, w, y, reduction="sum")


def trl(device: str) -> Logprob:
    module = _import("trl.kernels.chunked_logprob", "trl")
    function = module.ChunkedLogProbFunction
    return lambda h, w, y: function.apply(h, w, None, y, 1.0, 8192, None, 1.0, ())[0]


PEERS: dict[str, tuple[str, Callable[[str], Logprob], str]] = {
    "eager": ("gradient scalar score", lambda device: _eager, "torch"),
    "compiled chunked": ("gradient score", compiled_chunked, "torch"),
    "torch linear_cross_entropy": ("gradient score", torch_linear_cross_entropy, "torch"),
    "torch linear_cross_entropy sum": ("scalar", torch_linear_cross_entropy_sum, "torch"),
    "cut-cross-entropy": ("gradient score", cut_cross_entropy, "cut-cross-entropy"),
    "cut-cross-entropy filtered": ("gradient", cut_cross_entropy_filtered, "cut-cross-entropy"),
    "liger": ("gradient score", liger, "liger-kernel"),
    "liger sum": ("scalar", liger_sum, "liger-kernel"),
    "quack sum": ("scalar", quack_sum, "quack-kernels"),
    "trl": ("gradient score", trl, "trl"),
}


def job_call(logprob: Logprob, job: str, hidden: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> Callable:
    """The timed call of one job; returns (log-probabilities or their sum, gradient of hidden or None)."""

    def gradient():
        h = hidden.detach().requires_grad_()
        out = logprob(h, weight, target)
        out.backward(upstream if job == "gradient" else None)
        return out.detach(), h.grad

    def scalar():
        h = hidden.detach().requires_grad_()
        out = logprob(h, weight, target).sum()
        out.backward()
        return out.detach(), h.grad

    def score():
        with torch.no_grad():
            return logprob(hidden, weight, target), None

    return {"gradient": gradient, "scalar": scalar, "score": score}[job]


def _build(make: Callable[[str], Logprob], device: str, job: str, inputs: Callable) -> Callable:
    return job_call(make(device), job, *inputs())


def variants(job: str, device: str, inputs: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]) -> dict[str, Variant]:
    """Every peer that does `job`; `inputs()` gives hidden, weight, target, upstream."""
    return {
        name: Variant(
            partial(_build, make, device, job, inputs),
            version(distribution),
        )
        for name, (jobs, make, distribution) in PEERS.items()
        if job in jobs.split()
    }
