"""How every number is made: interleaved rounds, cold caches, and outputs checked in float64 before any timing.

A `Case` is one job on one input. All its variants do that job: ours, one per backend; the baselines, which are other
implementations; and `GEMM_ONLY`, the bare matrix products. Round r runs every variant once, in an order that rotates
with r, so that drift of the machine affects all variants alike. A ratio is the median over rounds of the quotient
within a round.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

GEMM_ONLY = "gemm_only"
OURS = "autoregembed"


class Unavailable(RuntimeError):
    """This machine lacks an input or a baseline; the table shows the message as the reason."""


def our_impl() -> str:
    """The backend of ours: "auto", or the one that AUTOREGEMBED_BENCH_IMPL names (`gpu_worker`: the interpreter)."""
    return os.environ.get("AUTOREGEMBED_BENCH_IMPL", "auto")


def is_ours(variant: str) -> bool:
    return variant.startswith(OURS)


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def training_dtype(device: str) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if is_gpu(device) else torch.float32


def version(distribution: str) -> str:
    """The installed version, "" where the distribution is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def require(module: str, distribution: str) -> Any:
    """Imports a baseline's module; raises Unavailable where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(str(error) if version(distribution) else f"{distribution} is not installed") from error


def require_gpu(device: str, distribution: str) -> None:
    if not is_gpu(device):
        raise Unavailable(f"{distribution} needs a GPU")


# ----------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass
class Variant:
    """`build()` returns the timed call, which returns its outputs; it raises Unavailable with the reason."""

    build: Callable[[], Callable[[], Any]]
    version: str = ""
    note: str = ""


@dataclass(kw_only=True)
class Case:
    """One job on one input.

    Args:
        op: the name of the op; `job` says what of it is timed.
        shape: sizes by letter (B, D, K, M, N, P, S, V as in the documentation).
        variants: by name. Names that begin with "autoregembed" are ours; "gemm_only" is the bare GEMMs.
        flops, bytes: the least that the job needs, counted analytically.
        inputs: describes the inputs in words.
        suite: "ops", "step" or "integrations".
        prepare: makes the inputs and sets what is known only then (`inputs`, `flops`, `bytes`, `tokens`). It may raise
            Unavailable. Before this call a case allocates nothing.
        check: (variant, outputs) to the largest error relative to the largest float64 value, and that of the gradient
            by norm (None without one); raises AssertionError for wrong outputs.
        relative_to: the variant that "speed-up" is relative to.
        curve: the letter whose scaling curve this case is a point of, or None.
        tokens: tokens of one call, for tokens per second.
        details: by variant, milliseconds by place of one call.
        cold: whether the caches are flushed before every call.
    """

    op: str
    shape: dict[str, int]
    variants: dict[str, Variant]
    flops: float
    bytes: float
    device: str
    dtype: torch.dtype = torch.float32
    inputs: str = ""
    suite: str = "ops"
    job: str = "gradient"
    prepare: Callable[[Case], None] | None = None
    check: Callable[[str, Any], tuple[float, float | None]] | None = None
    relative_to: str = "eager"
    curve: str | None = None
    rounds: int = 5
    tokens: int = 0
    details: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    cold: bool = True

    @property
    def name(self) -> str:
        shape = " ".join(f"{k}={v}" for k, v in self.shape.items())
        name = f"{self.op} {self.job} {shape} {dtype_name(self.dtype)} {self.device.split(':')[0]}"
        return f"{name}, curve over {self.curve}" if self.curve else name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Row:
    """The result of one variant of one case; times in milliseconds, memory in bytes, None where there is no value."""

    case: str
    suite: str
    op: str
    job: str
    shape: dict[str, int]
    dtype: str
    device: str
    inputs: str
    curve: str | None
    variant: str
    version: str = ""
    note: str = ""
    skipped: str | None = None
    median_ms: float | None = None
    iqr_ms: float | None = None
    samples_ms: list[float] = field(default_factory=list)
    ratio_to_gemm_only: float | None = None
    speedup: float | None = None
    relative_to: str = ""
    roofline: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    error: float | None = None
    gradient_error: float | None = None
    tokens_per_second: float | None = None
    details: dict[str, float] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a case


class Inputs(NamedTuple):
    """Arguments of a differentiable function, in the order (*leaves, *constants)."""

    leaves: list[Tensor]  # their gradients are computed
    constants: tuple[Tensor, ...] = ()
    upstream: Tensor | None = None  # the output's gradient; None for a scalar output


class ForwardBackward:
    """A differentiable job: its variants, and the check of their outputs against the specification in float64.

    Args:
        make: makes the inputs; called once, at first use.
        specification: (*leaves, *constants) to the output. Floating-point arguments are float64.
        tolerance: the largest allowed error of an output or gradient, relative to its largest float64 value.
        value_tolerance: the same for the output alone, where it differs.
    """

    def __init__(
        self,
        make: Callable[[], Inputs],
        specification: Callable[..., Tensor],
        tolerance: float,
        value_tolerance: float | None = None,
    ):
        self.inputs = functools.cache(make)
        self.specification = specification
        self.tolerances = tolerance if value_tolerance is None else value_tolerance, tolerance
        self.exact: list[Tensor] = []

    def variant(self, build: Callable[[], Callable[..., Any]], version: str = "", note: str = "") -> Variant:
        """Forward and backward of the function that `build()` returns; outputs (value, *gradients of the leaves).

        A function may return a tuple; its first element is the output.
        """

        def call() -> Callable[[], tuple[Tensor, ...]]:
            function = build()
            leaves, constants, upstream = self.inputs()

            def run():
                fresh = [x.detach().requires_grad_() for x in leaves]
                out = function(*fresh, *constants)
                out = out if isinstance(out, Tensor) else out[0]
                out.backward(None if upstream is None else upstream.to(out.dtype))
                return out.detach(), *(x.grad for x in fresh)

            return run

        return Variant(call, version, note)

    def eager(self, function: Callable[..., Any], compiled: bool = False) -> dict[str, Variant]:
        """Plain PyTorch, and the same under torch.compile."""
        variants = {"eager": self.variant(lambda: function, torch.__version__)}
        if compiled:
            variants["compiled"] = self.variant(partial(compiled_afresh, function), torch.__version__)
        return variants

    def check(self, name: str, outputs: tuple[Tensor, ...]) -> tuple[float, float]:
        if not self.exact:
            leaves, constants, upstream = self.inputs()
            leaves = [x.detach().double().requires_grad_() for x in leaves]
            out = self.specification(*leaves, *(x.double() if x.is_floating_point() else x for x in constants))
            gradients = torch.autograd.grad(out, leaves, None if upstream is None else upstream.double())
            self.exact = [out.detach(), *gradients]
        errors = [relative_error(x, y) for x, y in zip(outputs, self.exact, strict=True)]
        for error, allowed in ((errors[0], self.tolerances[0]), (max(errors[1:]), self.tolerances[1])):
            assert error <= allowed, f"relative error {error:.1e}, expected at most {allowed:.1e}"
        return max(errors), max(map(norm_error, outputs[1:], self.exact[1:]))


def compiled_afresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for static shapes. After eight shapes of one function torch would run the ninth eagerly, without a
    word, so earlier compilations are forgotten. AUTOREGEMBED_BENCH_COMPILER names another of torch's compilers."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, backend=os.environ.get("AUTOREGEMBED_BENCH_COMPILER", "inductor"))


def gemm_only(operands: Callable[[], tuple[Tensor, Tensor]], count: int) -> Variant:
    """The first `count` of the GEMMs z = a bᵀ, z b (gradient of a) and zᵀ a (gradient of b), into existing buffers."""

    def build() -> Callable[[], None]:
        a, b = operands()
        z = a.new_empty(len(a), len(b))
        products = [(a, b.T, z)]
        products += [(x, y, torch.empty_like(out)) for x, y, out in ((z, b, a), (z.T, a, b))[: count - 1]]

        def gemms() -> None:
            for x, y, out in products:
                torch.mm(x, y, out=out)

        return gemms

    return Variant(build, note=f"{count} bare GEMMs")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """max|found − exact| / max|exact|; raises AssertionError for a NaN or another shape."""
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    error = (found.double() - exact).abs().max().item() / max(exact.abs().max().item(), 1e-300)
    assert error == error, "a NaN in the output"
    return error


def norm_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖: what a filter drops adds up here, where the largest entry hides it."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-300))


# ----------------------------------------------------------------------------------------------------------------------
# Clocks, caches, memory


def synchronise(device: str) -> None:
    if is_gpu(device):
        torch.cuda.synchronize()


_flush: dict[str, Tensor] = {}


def flush_cache(device: str) -> None:
    """Writes a buffer larger than the last-level cache, so that a timed call finds its inputs in main memory."""
    kind = device.split(":")[0]
    if kind not in _flush:
        _flush[kind] = torch.empty((256 if kind == "cuda" else 64) << 18, device=device)
    _flush[kind].zero_()


def timed(call: Callable[[], Any], device: str, cold: bool = True) -> float:
    """Milliseconds of one call, by CUDA events on a GPU and by the monotonic clock elsewhere."""
    if cold:
        flush_cache(device)
    if is_gpu(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def peak_memory(call: Callable[[], Any], device: str) -> tuple[int, int | None]:
    """Peak bytes of the tensors alive during one call beyond those alive before it, and peak reserved bytes.

    On a GPU, both come from CUDA's caching allocator. On a CPU, the first is the running sum of the allocations and
    frees that torch.profiler records; it does not see memory that a library takes without torch's allocator.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line at every start and stop
    if is_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - reserved
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        alive += change
        peak = max(peak, alive)
    return peak, None


def settle_process() -> None:
    """Flushes denormals to zero and makes glibc keep freed memory, as CUDA's caching allocator does.

    By default glibc returns every large block to the kernel, and every call pays page faults for what it allocates. On
    one machine eager linear_logprob took 1.3 to 1.9 times the bare GEMMs by default, and 1.05 times with this setting.
    """
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Makes torch.empty return NaN, so that an unwritten output is detected."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Machine:
    """The measured rates of a machine: the two lines of the roofline."""

    device: str
    flops_per_second: dict[str, float] = field(default_factory=dict)
    bytes_per_second: float = 0.0

    @classmethod
    def measure(cls, device: str, dtypes: list[torch.dtype], quick: bool = False) -> Machine:
        machine = cls(device)
        size = (512 if quick else 2048) if device == "cpu" else 8192
        for dtype in dtypes:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            times = [timed(partial(torch.mm, a, b, out=out), device) for _ in range(7)]
            machine.flops_per_second[dtype_name(dtype)] = 2 * size**3 / (1e-3 * min(times))
        elements = (16 if quick else 64) << 20 if device == "cpu" else 1 << 28
        x, y = torch.zeros(elements, device=device), torch.empty(elements, device=device)
        times = [timed(partial(torch.add, x, 1.0, out=y), device) for _ in range(7)]
        machine.bytes_per_second = 8 * elements / (1e-3 * min(times))
        return machine

    def roofline(self, flops: float, data: float, dtype: str) -> float:
        """The milliseconds that `flops` FLOPs or `data` bytes take at the measured rates, whichever is longer."""
        return 1e3 * max(flops / self.flops_per_second[dtype], data / self.bytes_per_second)


# ----------------------------------------------------------------------------------------------------------------------
# Running a case


def run(
    case: Case, machine: Machine, *, rounds: int | None = None, seconds: float = 0.0, memory: bool = True
) -> list[Row]:
    """Checks every variant of a case, then measures its memory and its time.

    Args:
        rounds: replaces the case's own number of rounds.
        seconds: further rounds follow until this time has passed, up to 101 rounds in all: short calls scatter more.
        memory: whether to measure peak memory.

    Raises:
        AssertionError: an output of ours is wrong.
    """
    rows, calls = _check_variants(case)
    for name, call in calls.items():  # doubles as the warm-up
        if memory and name != GEMM_ONLY:
            rows[name].peak_bytes, rows[name].reserved_bytes = peak_memory(call, case.device)
        else:
            call()
    synchronise(case.device)
    samples = _time_interleaved(case, calls, rounds or case.rounds, seconds)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(samples[a], samples[b], strict=True))

    for name, times in samples.items():
        row = rows[name]
        row.samples_ms = [round(t, 5) for t in times]
        row.median_ms = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [0.0] * 3
        row.iqr_ms = quartiles[2] - quartiles[0]
        row.flops, row.bytes = case.flops, case.bytes
        row.roofline = machine.roofline(case.flops, case.bytes, row.dtype) / row.median_ms
        if GEMM_ONLY in samples:
            row.ratio_to_gemm_only = ratio(name, GEMM_ONLY)
        if case.relative_to in samples:
            row.speedup = ratio(case.relative_to, name)
        if case.tokens:
            row.tokens_per_second = 1e3 * case.tokens / row.median_ms
        if name in case.details:
            row.details = case.details[name]()
    return list(rows.values())


def _check_variants(case: Case) -> tuple[dict[str, Row], dict[str, Callable[[], Any]]]:
    """One row per variant, and the calls of the variants that run here with the right result."""
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    missing = None
    try:
        if case.prepare is not None:
            case.prepare(case)
    except Unavailable as reason:
        missing = reason
    for name, variant in case.variants.items():
        rows[name] = Row(
            case=case.name, suite=case.suite, op=case.op, job=case.job, shape=case.shape, dtype=dtype_name(case.dtype),
            device=case.device, inputs=case.inputs, curve=case.curve, variant=name, version=variant.version,
            note=variant.note, relative_to=case.relative_to,
        )  # fmt: skip
        try:
            if missing is not None:
                raise missing
            call = variant.build()
            # Only ours: torch.compile would compile a baseline for deterministic mode, and then again.
            with poisoned() if is_ours(name) else contextlib.nullcontext():
                outputs = call()
            synchronise(case.device)
            if case.check is not None and name != GEMM_ONLY:
                rows[name].error, rows[name].gradient_error = case.check(name, outputs)
            del outputs
            calls[name] = call
        except Unavailable as reason:
            rows[name].skipped = str(reason)
        except Exception as error:
            if is_ours(name):
                raise
            message = next(iter(str(error).splitlines()), "")
            wrong = isinstance(error, AssertionError)
            rows[name].skipped = f"wrong result: {message}" if wrong else f"failed: {type(error).__name__}: {message}"
    return rows, calls


def _time_interleaved(
    case: Case, calls: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every call of every variant, in the order of the rounds."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # a collection between rounds then visits only what the calls left behind
    begin = time.monotonic()
    try:
        i = 0
        while names and (i < rounds or (i < 101 and time.monotonic() - begin < seconds)):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(timed(calls[name], case.device, case.cold))
            gc.collect()
            i += 1
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return samples
