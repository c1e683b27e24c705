"""One process of `bench/gpu.py`: runs units in order, a JSON line for each. It needs torch, Triton and pytest."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Without a GPU, Triton's kernels run in its interpreter, which needs NumPy.
TRITON = GPU or (importlib.util.find_spec("triton") and importlib.util.find_spec("numpy")) is not None
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
IMPL = "triton" if TRITON else "torch"
os.environ["AUTOREGEMBED_BENCH_IMPL"] = IMPL

from autoregembed import reference
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.testing import assert_accurate, tensor_core_depth

from . import (  # fmt: skip
    bench_alignment_loss,
    bench_info_nce,
    bench_linear_logprob,
    bench_pool_last_k,
    bench_segment_sum,
    bench_splice,
    harness,
)
from .gpu import METHODS, PEERS
from .harness import GEMM_ONLY, OURS, Case, Machine, Unavailable, is_ours, norm_error, peak_memory, timed, version

DTYPE = torch.bfloat16 if GPU else torch.float32
ROUNDS = 7
PACKAGES = ("triton", "transformers", "numpy", "cut-cross-entropy", "liger-kernel", "trl", "quack-kernels", "inf-cl",
            "memeff", "siglip-kernel", "flash-attn")  # fmt: skip
Found = dict[str, Any]


def triton_head() -> Any:
    if not TRITON:
        raise Unavailable("Triton's interpreter needs NumPy")
    return importlib.import_module("autoregembed.kernels.triton.linear_logprob")


def medians(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of each call, interleaved; and of each the ratio to the first, by round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds if GPU else 1):
        for name, call in calls.items():
            samples[name].append(timed(call, DEVICE))
    first = next(iter(samples.values()))
    found = {f"{name}_ms": round(statistics.median(times), 4) for name, times in samples.items()}
    for name, times in list(samples.items())[1:]:
        found[f"{name}_ratio"] = round(statistics.median(a / b for a, b in zip(times, first, strict=True)), 4)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Device


def device_rates(what: str, context: Context) -> Found:
    if not GPU and not context.quick:
        return {"stop": "no GPU found", "failure": "no GPU found; --quick runs everything at tiny sizes on a CPU"}
    found: Found = {"torch": torch.__version__, "python": platform.python_version(), "device": DEVICE, "impl": IMPL}
    found["versions"] = {name: version(name) for name in PACKAGES if version(name)}
    if GPU:
        p = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu": p.name, "processors": p.multi_processor_count, "l2": p.L2_cache_size, "free": free,
                  "total": total, "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda,
                  "shared_memory": getattr(p, "shared_memory_per_block_optin", None)}  # fmt: skip
    machine = Machine.measure(DEVICE, [DTYPE, torch.float32] if GPU else [DTYPE], context.quick)
    rates = {"flops_per_second": machine.flops_per_second, "bytes_per_second": machine.bytes_per_second}
    return {**found, "rates": rates}


# ----------------------------------------------------------------------------------------------------------------------
# The head, kernel by kernel


@functools.lru_cache(maxsize=1)
def head_inputs(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) with logits of standard deviation 4, target (N,), one row of it ignored."""
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, d, device=DEVICE, generator=g).to(DTYPE)
    weight = (torch.randn(v, d, device=DEVICE, generator=g) * 4 / d**0.5).to(DTYPE)
    target = torch.randint(v, (n,), device=DEVICE, generator=g)
    target[1] = -100
    return hidden, weight, target


@functools.lru_cache(maxsize=1)
def head_oracle(n: int, d: int, v: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]], float]:
    """Some rows, their log-probabilities and U in float64 and in eager fp32, and their largest |logit|."""
    hidden, weight, target = head_inputs(n, d, v)
    rows = torch.unique(torch.linspace(0, n - 1, 32, device=DEVICE).long())
    rows = rows[target[rows] >= 0]
    found = []
    for dtype in (torch.float64, torch.float32):
        h, w = hidden[rows].to(dtype).requires_grad_(), weight.to(dtype)
        logprob = reference.linear_logprob(h, w, target[rows])
        found.append((logprob.detach(), torch.autograd.grad(logprob.sum(), h)[0]))
    top = float((hidden[rows].float() @ weight.float().T).abs().max())
    return rows, found, top


def head_check(shape: tuple[int, int, int], logprob: Tensor, u: Tensor | None) -> Found:
    """Errors on some rows; raises AssertionError where they break the numeric rule."""
    hidden, weight, target = head_inputs(*shape)
    rows, (exact, eager), top = head_oracle(*shape)
    depth = tensor_core_depth(hidden)
    found: Found = {
        "logprob_error": float((logprob[rows].double() - exact[0]).abs().max()),
        "eager_error": float((eager[0].double() - exact[0]).abs().max()),
        "max_logit": round(top, 2),
    }
    assert logprob[1] == 0, "an ignored row has a log-probability"
    assert_accurate(logprob[rows], eager[0], exact[0], max_logit=top, depth=depth)
    if u is not None:
        found["gradient_error"] = norm_error(u[rows], exact[1])
        assert bool((u[1] == 0).all()), "an ignored row has a gradient"
        factor = float(weight.abs().max())
        assert_accurate(u[rows], eager[1], exact[1], max_logit=top, gradient_factor=factor, depth=depth)
    return found


def gemms(shape: tuple[int, int, int], count: int) -> Callable[[], None]:
    """The bare GEMMs of the head with operands of 16 bits: the floor."""
    hidden, weight, _ = head_inputs(*shape)
    z, out = hidden.new_empty(shape[0], shape[2]), torch.empty_like(hidden)

    def call() -> None:
        torch.mm(hidden, weight.T, out=z)
        if count > 1:
            torch.mm(z, weight, out=out)

    return call


def head(what: str, context: Context) -> Found:
    unit, *numbers = what.split()
    n, d, v = map(int, numbers)
    shape = n, d, v
    hidden, weight, target = head_inputs(*shape)
    if unit == "floor":
        found = medians({"gemm1": gemms(shape, 1), "gemms": gemms(shape, 2)})
        return {**found, "tflops": round(4e-9 * n * d * v / found["gemms_ms"], 1)}
    if unit == "chunk":
        return head_chunk(shape)
    if unit.startswith("method="):
        name = unit.removeprefix("method=")
        if IMPL == "triton":
            call = partial(triton_head().forward, hidden, weight, target, None, None, 1.0, -100, True, name)
        elif name == METHODS[0]:
            call = partial(torch_kernels.forward, hidden, weight, target, None, None, 1.0, -100, True)
        else:
            triton_head()
        with harness.poisoned():
            found = head_check(shape, *call())
        found["peak_bytes"] = peak_memory(call, DEVICE)[0]
        return {**found, **medians({"floor": gemms(shape, 2), "ours": call})}
    if unit == "score":
        kernels = triton_head() if TRITON else torch_kernels
        call = partial(kernels.forward, hidden, weight, target, None, None, 1.0, -100, False)
        with harness.poisoned():
            found = head_check(shape, call()[0], None)
        found["peak_bytes"] = peak_memory(call, DEVICE)[0]
        return {**found, **medians({"floor": gemms(shape, 1), "ours": call})}
    kernels = triton_head() if TRITON else torch_kernels
    for gradient in (True, False):
        first, again = (kernels.forward(hidden, weight, target, None, None, 1.0, -100, gradient) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "two runs differ"
    return {"equal": True}


def head_chunk(shape: tuple[int, int, int]) -> Found:
    """The parts of the first method: GEMM 1 with an fp32 result, and the epilogue."""
    from autoregembed.kernels.torch.linear_logprob import rows_per_chunk

    kernels = triton_head()
    primitives = importlib.import_module("autoregembed.kernels.triton.primitives")
    hidden, weight, target = head_inputs(*shape)
    n, _, v = shape
    rows = min(rows_per_chunk(n, v, 4, hidden.device), n)
    memory = primitives.Logits(rows, v, DTYPE, hidden.device)
    logprob = torch.empty(rows, device=DEVICE)
    found = medians({
        "gemm1": partial(primitives.matmul, hidden[:rows], weight.T, memory.z),
        "epilogue": lambda: kernels.epilogue(memory.z, memory.e, target[:rows], logprob),
    })  # fmt: skip
    return {"rows": rows, **found, "epilogue_gb_s": round(6e-6 * rows * v / found["epilogue_ms"], 1)}


# ----------------------------------------------------------------------------------------------------------------------
# Cases of the benchmark


def measure(case: Case, names: tuple[str, ...], context: Context) -> Found:
    """The row of the last of `names`; the others run beside it."""
    case.variants = {name: case.variants[name] for name in names if name in case.variants}
    rounds = 2 if context.quick else ROUNDS
    rows = {row.variant: row for row in harness.run(case, context.machine, rounds=rounds)}
    row = next(row for name, row in rows.items() if name == names[-1])
    if row.skipped:
        if row.skipped.startswith(("failed", "wrong")):
            raise RuntimeError(row.skipped)
        raise Unavailable(row.skipped)
    return {k: x for k, x in dataclasses.asdict(row).items() if k != "samples_ms" and x not in (None, "", {})}


def ops(what: str, context: Context) -> Found:
    modules = {"alignment_loss": bench_alignment_loss, "splice": bench_splice, "info_nce": bench_info_nce,
               "pool_last_k": bench_pool_last_k, "segment_sum": bench_segment_sum}  # fmt: skip
    make = next(iter(modules[what].cases(DEVICE, context.quick)))
    return {"impl": IMPL, **measure(make(), (GEMM_ONLY, "eager", OURS), context)}


def step(what: str, context: Context) -> Found:
    for module in ("transformers", "tokenizers", "accelerate", "xxhash"):
        harness.require(module, module)
    # Nothing refuses a Transformers below the floor of pyproject.toml: the line says which one ran.
    context.say = functools.partial(_with, context.say, transformers=version("transformers"))
    bench_step = importlib.import_module(".bench_step", __package__)
    if what.endswith(" graphs"):
        return graphed_step(bench_step, int(what.removeprefix("stage").removesuffix(" graphs")), context)
    case = bench_step.random_case(int(what.removeprefix("stage")), DEVICE, context.quick)
    return measure(case, ("released", OURS), context)


def graphed_step(bench_step: Any, stage: int, context: Context) -> Found:
    """A whole step of the loop, the optimiser's update in it, by launches and as a CUDA graph, which pads its batch."""
    calls = {"eager": bench_step.whole_step(stage, DEVICE, context.quick, False)}
    if not GPU:
        calls["eager"]()
        raise Unavailable("CUDA graphs need a GPU")
    calls["graphs"] = bench_step.whole_step(stage, DEVICE, context.quick, True)
    losses = [[float(call()) for _ in range(3)] for call in calls.values()]  # the graph's: eager, captured, replayed
    for eager, graphed in zip(*losses, strict=True):
        assert abs(graphed - eager) <= 1e-2 * abs(eager), losses
    return medians(calls)


def _with(say: Callable[[Found], None], line: Found, **more: Any) -> None:
    say({**line, **more})


def peers(what: str, context: Context) -> Found:
    op, _, rest = what.partition(" ")
    if op == "info_nce":
        if rest == "siglip-kernel":
            make: Any = partial(bench_info_nce.siglip_case, *((16, 32) if context.quick else (16384, 896)), DEVICE)
        else:
            make = partial(bench_info_nce.info_nce_case, *((16, 32) if context.quick else (16384, 896)), DEVICE)
        return measure(make(), (GEMM_ONLY, rest), context)
    n, d, v, peer = rest.split(" ", 3)
    job = "scalar" if peer.endswith(" sum") else "gradient"
    case = bench_linear_logprob.linear_logprob_case(int(n), int(d), int(v), job, DEVICE, DTYPE)
    if peer == OURS:
        peer = next(name for name in case.variants if is_ours(name))
    else:
        assert peer in PEERS
    return measure(case, (GEMM_ONLY, peer), context)


# ----------------------------------------------------------------------------------------------------------------------
# Tests


class Findings:
    """A plugin of pytest: a line for every failed test, and the counts."""

    def __init__(self, say: Callable[[Found], None]):
        self.say = say
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.reasons: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.count(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.count(report)

    def count(self, report: Any) -> None:
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.say({"state": "finding", "test": report.nodeid, "failure": str(report.longrepr)[-1500:]})
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.reasons.add(report.longrepr[2][:200])


def tests(what: str, context: Context) -> Found:
    import pytest

    root = Path(__file__).resolve().parents[1]
    file = root / "tests" / f"test_{what}.py"
    text = file.read_text(encoding="utf-8")
    for module in ("hypothesis", "transformers", "numpy"):
        if f"import {module}" in text or f"from {module}" in text:
            harness.require(module, module)
    findings = Findings(context.say)
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "--rootdir", str(root), "-o", "addopts="]
    if context.quick:  # one of several shapes and dtypes
        options += ["-k", "not shape1 and not dtype1 and not dtype2"]
    status = pytest.main([*options, str(file)], plugins=[findings])
    reasons = sorted(findings.reasons)
    counts: Found = {**findings.counts, "reasons": reasons}
    if status not in (0, 1, 5) or findings.counts["failed"]:
        return {"failure": f"pytest answered {int(status)}", **counts}
    if not findings.counts["passed"]:
        raise Unavailable("; ".join(reasons) or "no test was run")
    return counts


# ----------------------------------------------------------------------------------------------------------------------
# The process


@dataclasses.dataclass
class Context:
    quick: bool
    machine: Machine
    say: Callable[[Found], None] = print


RUN: dict[str, Callable[[str, Context], Found]] = {
    "device": device_rates, "head": head, "ops": ops, "step": step, "peers": peers, "tests": tests,
}  # fmt: skip


def run(name: str, context: Context, say: Callable[[Found], None]) -> bool:
    """Writes the line of a unit; False where this process is of no further use."""
    part, _, what = name.partition("/")
    begin = time.monotonic()
    context.say = lambda line: say({"unit": name, "part": part, **line})
    line: Found
    try:
        found = RUN[part](what, context)
        harness.synchronise(DEVICE)  # an error of the device belongs to the unit that caused it
        line = {"state": "failed" if "failure" in found else "ok", **found}
    except Unavailable as reason:
        line = {"state": "skipped", "reason": str(reason)}
    except BaseException as error:
        line = {"state": "failed", "failure": f"{type(error).__name__}: {error}"[:1000],
                "at": traceback.format_exc(limit=-3)[-1200:]}  # fmt: skip
    try:
        harness.synchronise(DEVICE)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    except Exception as error:  # the context is gone, and with it every later unit of this process
        line |= {"ends": f"the device: {error}"[:300]}
    context.say({**line, "seconds": round(time.monotonic() - begin, 2)})
    return "ends" not in line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("units", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the exit status says whether all went well")
    parser.add_argument("--fd", type=int, help="receives the lines; by default stdout")
    parser.add_argument("--rates", type=json.loads, help="what the first unit measured")
    given = parser.parse_args()
    harness.settle_process()
    if given.quick or given.tiny:
        os.environ["AUTOREGEMBED_BENCH_COMPILER"] = "eager"  # inductor takes half a minute a shape
    states = []

    def say(line: Found) -> None:
        states.append(line["state"])
        os.write(given.fd or sys.stdout.fileno(), (json.dumps(line) + "\n").encode())

    unknown = {"flops_per_second": dict.fromkeys(("bfloat16", "float32"), math.inf), "bytes_per_second": math.inf}
    context = Context(given.quick or given.tiny, Machine(DEVICE, **(given.rates or unknown)))
    for unit in given.units:
        if not run(unit, context, say):
            break
    return int(given.tiny and "failed" in states)


if __name__ == "__main__":
    sys.exit(main())
