"""linear_logprob: per-token log-probabilities with gradient, the scalar loss, and scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoregembed import linear_logprob, ops, reference
from autoregembed.testing import assert_accurate, tensor_core_depth

from . import workload
from .baselines.linear_logprob import job_call
from .baselines.linear_logprob import variants as baselines
from .harness import (
    GEMM_ONLY,
    OURS,
    Case,
    Variant,
    gemm_only,
    is_gpu,
    is_ours,
    norm_error,
    relative_error,
    training_dtype,
)

GEMMS = {"gradient": 2, "scalar": 2, "score": 1}
# (D, V) of SmolLM2, Qwen2.5-0.5B, a 1B Llama 3, Llama-2-7B, Llama-3-8B; and the numbers of rows measured on a GPU.
GPU_SHAPES = [(576, 49152), (896, 151936), (2048, 128256), (4096, 32000), (4096, 128256)]
GPU_ROWS = [2048, 8192]


def _reference(inputs: workload.LinearLogprobInputs, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Log-probabilities of some rows and their d logprob / d hidden by the specification, and the largest |logit|."""
    h, w = inputs.hidden[rows].to(dtype).requires_grad_(), inputs.weight.to(dtype)
    logprob = reference.linear_logprob(h, w, inputs.target[rows])
    (u,) = torch.autograd.grad(logprob.sum(), h)
    return logprob.detach(), u, float((h.detach() @ w.T).abs().max())


def linear_logprob_case(
    n: int,
    d: int,
    v: int,
    job: str,
    device: str,
    dtype: torch.dtype,
    *,
    rounds: int = 5,
    curve: str | None = None,
    only: set[str] | None = None,
    extra: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] | None = None,
) -> Case:
    """One job at one shape, on SmolLM2's own hidden states at its (D, V), else on synthetic ones.

    Our outputs satisfy the numeric rule of the tests. A baseline's are within 1e-4 (fp32) or 1e-2 (16 bits) of the
    largest value, its gradient within ten times that: the table shows by how much it is off. Rows are independent, so
    the check takes a sample of them. `extra`: further baselines by name.
    """
    made: list[workload.LinearLogprobInputs] = []
    known: list[tuple[Tensor, Tensor, float]] = []
    rows = torch.unique(torch.linspace(0, n - 1, min(n, 48)).long()).to(device)

    def prepare(case: Case) -> None:
        inputs = workload.linear_logprob_inputs(n, d, v, device, dtype)
        made[:] = [inputs]
        case.inputs = inputs.describe
        known[:] = [_reference(inputs, rows, dtype) for dtype in (torch.float64, torch.float32)]

    def check(name: str, outputs: tuple[Tensor, Tensor | None]) -> tuple[float, float | None]:
        (logprob, u, top), (eager_logprob, eager_u, _) = known
        upstream = made[0].upstream[rows, None] if job == "gradient" else torch.ones(1, 1, device=device)
        off = None
        pairs = [(outputs[0][rows], eager_logprob, logprob, 1.0)] if outputs[0].ndim else []
        if not outputs[0].ndim:
            assert bool(outputs[0].isfinite()), "a NaN in the sum"
        if outputs[1] is not None:
            factor = float(upstream.abs().max() * made[0].weight.abs().max())
            pairs.append((outputs[1][rows], upstream * eager_u, upstream.double() * u, factor))
            off = norm_error(*pairs[-1][::2])
        errors = [relative_error(found, exact) for found, _, exact, _ in pairs]
        if is_ours(name):
            for found, eager, exact, factor in pairs:
                assert_accurate(
                    found, eager, exact, max_logit=top, gradient_factor=factor, depth=tensor_core_depth(made[0].hidden)
                )
        for (*_, factor), error in zip(pairs, errors, strict=True):
            allowed = (1e-4 if dtype == torch.float32 else 1e-2) * (1 if factor == 1.0 or is_ours(name) else 10)
            assert error <= allowed, f"relative error {error:.0e}, expected {allowed:.0e}"
        return max(errors, default=0.0), off

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return made[0].hidden, made[0].weight, made[0].target, made[0].upstream

    def backend(impl: str) -> Variant:
        function = partial(linear_logprob, impl=impl)
        return Variant(lambda: job_call(function, job, *data()), note="auto" if impl == "auto" else "")

    # The specification is what the eager variant runs. On a CPU, "triton" is the interpreter.
    apart = {"reference", "" if is_gpu(device) else "triton"}
    able = [name for name, state in ops.available_impls(device, dtype).items() if state == "ok" and name not in apart]
    variants = {GEMM_ONLY: gemm_only(lambda: data()[:2], GEMMS[job])}
    variants |= {f"{OURS} ({name})": backend("auto" if name == able[0] else name) for name in able}
    variants |= baselines(job, device, data)
    if only is not None:
        variants = {name: x for name, x in variants.items() if name in only or is_ours(name)}
    variants |= {name: Variant(partial(lambda f: job_call(f, job, *data()), f)) for name, f in (extra or {}).items()}
    return Case(
        op="linear_logprob", job=job, shape={"N": n, "D": d, "V": v}, dtype=dtype, variants=variants,
        flops=2.0 * GEMMS[job] * n * v * d,
        # The weight once per GEMM, hidden once, the results once; no logits.
        bytes=float(dtype.itemsize * GEMMS[job] * (v * d + n * d) + 4 * n),
        prepare=prepare, check=check, rounds=rounds, curve=curve, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    gpu = is_gpu(device)
    options: dict[str, Any] = {"device": device, "dtype": training_dtype(device)}
    lean = {**options, "job": "gradient", "only": {GEMM_ONLY, "eager"}}
    if quick:
        for job in GEMMS:
            yield partial(linear_logprob_case, 64, 32, 500, job, **options)
        for n in (16, 32):
            yield partial(linear_logprob_case, n, 32, 500, curve="N", **lean)
        return
    if gpu:
        for d, v in GPU_SHAPES:
            for n in GPU_ROWS:
                for job in GEMMS:
                    yield partial(linear_logprob_case, n, d, v, job, rounds=11, **options)
    else:
        for job in ("gradient", "score"):  # the baselines with a scalar loss alone need a GPU
            yield partial(linear_logprob_case, 512, 576, 49152, job, rounds=5, **options)
        yield partial(linear_logprob_case, 256, 896, 151936, rounds=3, **lean)
    d, v = (2048, 65536) if gpu else (256, 16384)
    for n in [1024, 2048, 4096, 8192] if gpu else [256, 512, 1024, 2048]:
        yield partial(linear_logprob_case, n, d, v, curve="N", **lean)
    n = 4096 if gpu else 512
    for v in [16384, 32768, 65536, 131072] if gpu else [4096, 8192, 16384, 32768]:
        yield partial(linear_logprob_case, n, d, v, curve="V", **lean)
