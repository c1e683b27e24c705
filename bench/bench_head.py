"""The linear head: per-token log-probabilities with gradient, the scalar-loss job, and scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoregembed import linear_logprob, ops, reference
from autoregembed.testing import assert_accurate

from . import workload
from .baselines import head as baselines
from .harness import FLOOR, OURS, Case, Variant, is_ours, relative_error, replay

GEMMS = {"gradient": 2, "scalar": 2, "score": 1}
# (D, V) of SmolLM2, Qwen2.5-0.5B, a 1B Llama 3, Llama-2-7B, Llama-3-8B; and the numbers of rows measured on a GPU.
GPU_SHAPES = [(576, 49152), (896, 151936), (2048, 128256), (4096, 32000), (4096, 128256)]
GPU_ROWS = [2048, 8192]


def _reference(inputs: workload.HeadInputs, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Log-probabilities of some rows and their d logprob / d hidden by the specification, and the largest |logit|."""
    h, w = inputs.hidden[rows].to(dtype).requires_grad_(), inputs.weight.to(dtype)
    logprob = reference.linear_logprob(h, w, inputs.target[rows])
    (u,) = torch.autograd.grad(logprob.sum(), h)
    return logprob.detach(), u, float((h.detach() @ w.T).abs().max())


def head_case(
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
) -> Case:
    """One job at one shape: SmolLM2's own activations at its (D, V) where its package is there, synthetic ones else.

    Our outputs are held to the numeric rule of the tests; a peer to a hundredth of its largest value in 16 bits and to
    a ten-thousandth in fp32, and its error is reported. Rows are independent, so a sample of them is checked.
    """
    made: list[workload.HeadInputs] = []
    known: list[tuple[Tensor, Tensor, float]] = []
    rows = torch.unique(torch.linspace(0, n - 1, min(n, 48)).long()).to(device)

    def prepare(case: Case) -> None:
        inputs = workload.head_inputs(n, d, v, device, dtype)
        made[:] = [inputs]
        case.inputs = inputs.describe
        known[:] = [_reference(inputs, rows, dtype) for dtype in (torch.float64, torch.float32)]

    def check(name: str, outputs: tuple[Tensor, Tensor | None]) -> float:
        (logprob, u, top), (eager_logprob, eager_u, _) = known
        upstream = made[0].upstream[rows, None] if job == "gradient" else torch.ones(1, 1, device=device)
        pairs = [(outputs[0][rows], eager_logprob, logprob, 1.0)] if outputs[0].ndim else []
        if not outputs[0].ndim:
            assert bool(outputs[0].isfinite()), "a NaN in the sum"
        if outputs[1] is not None:
            factor = float(upstream.abs().max() * made[0].weight.abs().max())
            pairs.append((outputs[1][rows], upstream * eager_u, upstream.double() * u, factor))
        errors = [relative_error(found, exact) for found, _, exact, _ in pairs]
        if is_ours(name):
            for found, eager, exact, factor in pairs:
                assert_accurate(found, eager, exact, max_logit=top, gradient_factor=factor)
        room = 1e-4 if dtype == torch.float32 else 1e-2
        assert max(errors, default=0.0) <= room, f"relative error {max(errors):.0e}, expected {room:.0e}"
        return max(errors, default=0.0)

    def floor() -> Callable[[], Any]:
        logits = torch.empty(n, v, device=device, dtype=dtype)
        out = torch.empty(n, d, device=device, dtype=dtype)

        def gemms():
            torch.mm(made[0].hidden, made[0].weight.T, out=logits)
            if GEMMS[job] == 2:
                torch.mm(logits, made[0].weight, out=out)

        return gemms

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return made[0].hidden, made[0].weight, made[0].target, made[0].upstream

    def route(impl: str) -> Variant:
        function = partial(linear_logprob, impl=impl)
        return Variant(lambda: baselines.job_call(function, job, *data()), note="auto" if impl == "auto" else "")

    # Not the specification, which is the eager row, and on a CPU not Triton's interpreter.
    apart = {"reference", "triton" if device == "cpu" else ""}
    able = [name for name, state in ops.available_impls(device, dtype).items() if state == "ok" and name not in apart]
    variants = {FLOOR: Variant(floor, note=f"{GEMMS[job]} bare GEMMs")}
    variants |= {f"{OURS} ({name})": route("auto" if name == able[0] else name) for name in able}
    variants |= baselines.variants(job, device.split(":")[0], data)
    if only is not None:
        variants = {name: x for name, x in variants.items() if name in only or is_ours(name)}
    size = dtype.itemsize
    return Case(
        suite="head", op="head", job=job, shape={"N": n, "D": d, "V": v}, dtype=str(dtype)[6:], inputs="",
        variants=variants, flops=2.0 * GEMMS[job] * n * v * d,
        # The weight once per GEMM, hidden once, the results once; no logits.
        bytes=float(size * GEMMS[job] * (v * d + n * d) + 4 * n),
        prepare=prepare, check=check, rounds=rounds, curve=curve, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    gpu = device.startswith("cuda")
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if gpu else torch.float32}
    lean = {**options, "job": "gradient", "only": {FLOOR, "eager"}}
    if quick:
        for job in GEMMS:
            yield partial(head_case, 64, 32, 500, job, rounds=3, **options)
        for n in (16, 32):
            yield partial(head_case, n, 32, 500, curve="N", rounds=3, **lean)
        return
    if gpu:
        for d, v in GPU_SHAPES:
            for n in GPU_ROWS:
                for job in GEMMS:
                    yield partial(head_case, n, d, v, job, rounds=11, **options)
    else:
        for job in ("gradient", "score"):  # the peers that offer a scalar loss alone need a GPU
            yield partial(head_case, 512, 576, 49152, job, rounds=5, **options)
        yield partial(head_case, 256, 896, 151936, rounds=3, **lean)
    d, v = (2048, 65536) if gpu else (256, 16384)
    for n in [1024, 2048, 4096, 8192] if gpu else [256, 512, 1024, 2048]:
        yield partial(head_case, n, d, v, curve="N", **lean)
    n = 4096 if gpu else 512
    for v in [16384, 32768, 65536, 131072] if gpu else [4096, 8192, 16384, 32768]:
        yield partial(head_case, n, d, v, curve="V", **lean)


def test_head(variant, benchmark):
    replay(variant, benchmark)
