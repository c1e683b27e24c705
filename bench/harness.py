"""How every number is made: interleaved rounds, cold caches, outputs checked in float64 before any timing.

A `Case` is one job on one input with several variants that all do it: ours by route, peers, and "floor",
the bare GEMMs. Round r runs every variant once, in an order that rotates with r, so that drift of the machine falls on
all alike; a ratio is the median over rounds of the quotient within a round.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .workload import Unavailable

FLOOR = "floor"
OURS = "autoregembed"


def is_ours(variant: str) -> bool:
    return variant.startswith(OURS)


@dataclass
class Variant:
    """`build()` returns the timed call, which returns its outputs, or raises Unavailable with the reason."""

    build: Callable[[], Callable[[], Any]]
    version: str = ""
    note: str = ""


@dataclass
class Case:
    """One job on one input.

    Args:
        suite: "head" or "step"; `op` and `job` say what within it.
        shape: the letters of the design and their sizes.
        dtype, inputs: in words.
        variants: by name; names that begin with "autoregembed" are ours, "floor" is the bare GEMMs.
        flops, bytes: the least that the job needs, counted analytically.
        prepare: makes the inputs and fills in what is known only then (`inputs`, `flops`, `bytes`, `tokens`); may raise
            Unavailable. A case is cheap to build before that.
        check: outputs to their largest error relative to the float64 result's largest value; raises AssertionError
            where they are wrong. None: checked elsewhere (say so in `note`).
        baseline: what "speed-up" is relative to.
        curve: the letter that this case is a point of a scaling curve over, or None.
        tokens: of one call, for tokens per second.
        details: by variant, milliseconds by place of one call.
    """

    suite: str
    op: str
    job: str
    shape: dict[str, int]
    dtype: str
    inputs: str
    variants: dict[str, Variant]
    flops: float
    bytes: float
    prepare: Callable[[Case], None] | None = None
    check: Callable[[str, Any], float] | None = None
    baseline: str = "eager"
    curve: str | None = None
    rounds: int = 5
    device: str = "cpu"
    tokens: int = 0
    details: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        shape = " ".join(f"{k}={v}" for k, v in self.shape.items())
        name = f"{self.op} {self.job} {shape} {self.dtype} {self.device.split(':')[0]}"
        return f"{name}, curve over {self.curve}" if self.curve else name


@dataclass
class Row:
    """One variant of one case; times in milliseconds, memory in bytes, `None` where there is none."""

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
    ratio_to_floor: float | None = None
    speedup: float | None = None
    baseline: str = ""
    roofline: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    error: float | None = None
    tokens_per_second: float | None = None
    details: dict[str, float] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------------------
# Clocks, caches, memory


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


_flush: dict[str, Tensor] = {}


def flush_cache(device: str) -> None:
    """Writes a buffer larger than the last-level cache, so that every timed call finds its inputs in main memory."""
    kind = device.split(":")[0]
    if kind not in _flush:
        _flush[kind] = torch.empty((256 if kind == "cuda" else 64) << 18, device=device)
    _flush[kind].zero_()


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call with cold caches: CUDA events on a GPU, the monotonic clock elsewhere."""
    flush_cache(device)
    if device.startswith("cuda"):
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
    """Largest number of bytes alive in tensors during one call, above what was alive before it; and reserved bytes.

    On a GPU: CUDA's caching allocator, allocated and reserved. On a CPU: the allocations and frees that
    torch.profiler records, summed in time; memory that a library takes without torch's allocator is not seen.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line at every start and stop
    if device.startswith("cuda"):
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
    """Before any timing: denormals are zero, and glibc keeps what is freed, as CUDA's caching allocator does.

    By default glibc returns every large block to the kernel, and a call pays page faults for what it allocates: eager's
    head took anything from 1.3 to 1.9 of the floor on one machine, and 1.05 with this, run after run.
    """
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose top is never given back


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty comes filled with NaN, so an output that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Machine:
    """Measured rates: the two lines of the roofline."""

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
            machine.flops_per_second[str(dtype)[6:]] = 2 * size**3 / (1e-3 * min(times))
        elements = (16 if quick else 64) << 20 if device == "cpu" else 1 << 28
        x, y = torch.zeros(elements, device=device), torch.empty(elements, device=device)
        times = [timed(partial(torch.add, x, 1.0, out=y), device) for _ in range(7)]
        machine.bytes_per_second = 8 * elements / (1e-3 * min(times))
        return machine

    def roofline(self, flops: float, data: float, dtype: str) -> float:
        """The least milliseconds that `flops` and `data` bytes take here, the slower of the two."""
        return 1e3 * max(flops / self.flops_per_second[dtype], data / self.bytes_per_second)


# ----------------------------------------------------------------------------------------------------------------------


def run(
    case: Case, machine: Machine, *, rounds: int | None = None, seconds: float = 0.0, memory: bool = True
) -> list[Row]:
    """Checks, weighs and times every variant of a case.

    `rounds` in place of the case's own number; after them further ones, up to 101, until `seconds` have passed, so that
    short calls get the rounds that their scatter needs.
    """
    rounds = rounds or case.rounds
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
            case=case.name, suite=case.suite, op=case.op, job=case.job, shape=case.shape, dtype=case.dtype,
            device=case.device, inputs=case.inputs, curve=case.curve, variant=name, version=variant.version,
            note=variant.note, baseline=case.baseline,
        )  # fmt: skip
        try:
            if missing is not None:
                raise missing
            call = variant.build()
            # Only ours: a compiled peer would be compiled for deterministic mode, and then again.
            with poisoned() if is_ours(name) else contextlib.nullcontext():
                outputs = call()
            synchronise(case.device)
            if case.check is not None and name != FLOOR:
                rows[name].error = case.check(name, outputs)
            del outputs
        except Unavailable as reason:
            rows[name].skipped = str(reason)
        except AssertionError as wrong:
            if is_ours(name):
                raise
            rows[name].skipped = f"wrong result: {wrong}"
        except Exception as error:
            if is_ours(name):
                raise
            rows[name].skipped = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            calls[name] = call
    names = list(calls)
    for name in names:  # the warm-up too
        if memory and name != FLOOR:
            rows[name].peak_bytes, rows[name].reserved_bytes = peak_memory(calls[name], case.device)
        else:
            calls[name]()
    synchronise(case.device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()  # the collections between rounds look at what the calls left, not at torch's and the compiler's objects
    begin = time.monotonic()
    try:
        i = 0
        while i < rounds or (i < 101 and time.monotonic() - begin < seconds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                samples[name].append(timed(calls[name], case.device))
            gc.collect()
            i += 1
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(samples[a], samples[b], strict=True))

    for name in names:
        row, times = rows[name], samples[name]
        row.samples_ms = [round(t, 5) for t in times]
        row.median_ms = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [0.0] * 3
        row.iqr_ms = quartiles[2] - quartiles[0]
        row.flops, row.bytes = case.flops, case.bytes
        row.roofline = machine.roofline(case.flops, case.bytes, case.dtype) / row.median_ms
        if FLOOR in samples:
            row.ratio_to_floor = ratio(name, FLOOR)
        if case.baseline in samples:
            row.speedup = ratio(case.baseline, name)
        if case.tokens:
            row.tokens_per_second = 1e3 * case.tokens / row.median_ms
        if name in case.details:
            row.details = case.details[name]()
    return list(rows.values())


# ----------------------------------------------------------------------------------------------------------------------
# pytest-benchmark


class VirtualClock:
    """A timer for pytest-benchmark that advances by recorded samples.

    pytest-benchmark times one function at a time; here variants run interleaved, on a GPU by events. So a case is
    measured as a whole, and each of its tests replays its samples: the statistics are those of the real calls.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


clock = VirtualClock()


def replay(row: Row, benchmark: Any) -> None:
    """Feeds one variant's samples to pytest-benchmark, with everything else that is known of it as extra_info."""
    import pytest

    if row.skipped is not None:
        pytest.skip(row.skipped)
    samples = iter([*row.samples_ms, 0.0])  # pytest-benchmark calls once more at the end

    def advance() -> None:
        clock.now += 1e-3 * next(samples)

    benchmark.group = row.case
    benchmark.extra_info.update({k: v for k, v in asdict(row).items() if k != "samples_ms" and v not in (None, {}, "")})
    benchmark.pedantic(advance, rounds=len(row.samples_ms))


# ----------------------------------------------------------------------------------------------------------------------
# Correctness


def relative_error(found: Tensor, exact: Tensor) -> float:
    """max|found − exact| / max|exact|; raises AssertionError for a NaN or another shape."""
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    error = (found.double() - exact).abs().max().item() / max(exact.abs().max().item(), 1e-300)
    assert error == error, "a NaN in the output"
    return error


# ----------------------------------------------------------------------------------------------------------------------
# Hardware, versions, commit


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment(machine: Machine) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    hardware: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    hardware["capability"] = torch.backends.cpu.get_cpu_capability()
    if machine.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        hardware.update(gpu=properties.name, gpu_memory=properties.total_memory, cuda=torch.version.cuda)
    packages = ("autoregembed", "torch", "triton", "transformers", "numpy", "cut-cross-entropy", "liger-kernel", "trl",
                "quack-kernels", "inf-cl", "sentence-transformers", "flash-attn")  # fmt: skip
    commit = git("rev-parse", "HEAD") if (root / "CMakeLists.txt").is_file() else ""
    return {
        "device": machine.device,
        "hardware": hardware,
        "measured": asdict(machine),
        "versions": {p: version(p) for p in packages if version(p)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit + ("+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
