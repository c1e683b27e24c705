"""First contact with a GPU: one JSON line a finding, the most valuable first. `bench/gpu.sh` calls this.

    python -m bench.gpu first|all [--quick] [--out FILE] [--limit SECONDS] [--part NAME ...] [--only NAME ...]

This process imports neither torch nor the library. Units run in processes of their own (`bench/gpu_worker.py`): if one
dies or hangs, its unit gets a line that says so, and the next unit starts in a fresh process. Every unit of the plan
leaves exactly one line; its `state` is ok, failed, skipped (the machine lacks what it needs) or left out (no time).
Each finding of a unit of tests (a failed test) is a further line, of state "finding".

The exit status is the sum of the numbers of the parts in which something failed: 1 device, 2 head, 4 ops, 8 step,
16 peers, 32 tests, 64 sanitizers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("device", "head", "ops", "step", "peers", "tests", "sanitizers")
LIMITS = {"first": 120, "all": 480}  # seconds
UNIT_SECONDS = {"first": 45, "all": 120}
START_SECONDS = 30  # more for the first unit of a process, which imports torch

# (N, D, V) of Llama-3-8B, Qwen2.5-0.5B, SmolLM2-135M; then a vocabulary and a D that no tile divides.
HEAD = ((4096, 4096, 128256), (4096, 896, 151936), (8192, 576, 49152), (1000, 640, 50257), (777, 600, 50257))
HEAD_QUICK = ((20, 32, 130),)
METHODS = ("cublas", "shifted")  # of kernels/triton/linear_logprob.py
HEAD_UNITS = ("floor", *(f"method={method}" for method in METHODS), "score", "chunk", "repeat")
# Peers with the module that each needs. "liger" is its per-token mode, "sum" a mode with one gradient for all rows.
PEERS = {
    "eager": "torch", "liger": "liger_kernel", "liger sum": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy",
    "cut-cross-entropy filtered": "cut_cross_entropy", "quack sum": "quack", "trl": "trl",
    "torch linear_cross_entropy": "torch", "torch linear_cross_entropy sum": "torch", "compiled chunked": "torch",
}  # fmt: skip
OPS = ("alignment_loss", "splice", "info_nce", "pool_last_k", "segment_sum")
SANITIZERS = ("memcheck", "racecheck")
CONTRASTIVE = {"eager": "torch", "inf-cl": "inf_cl", "memeff": "memeff", "siglip-kernel": "siglip_kernel"}
# Those that need torch, Triton and pytest alone come first.
TESTS = ("gpu", "testing", "triton_linear_logprob", "triton_info_nce", "triton_alignment_loss", "triton_splice",
         "triton_pool_last_k", "segment_sum", "triton_ops", "linear_logprob", "info_nce", "alignment_loss",
         "packing", "encoder_decoder", "cuda_graphs")  # fmt: skip
TESTS_QUICK = ("testing", "gpu")


@dataclass(frozen=True)
class Unit:
    """One thing to find out. Neighbours of one `group` share a process until it dies; a peer has its own."""

    part: str
    what: str
    group: str
    needs: str = "torch"  # module

    @property
    def name(self) -> str:
        return f"{self.part}/{self.what}"


def plan(mode: str, quick: bool) -> list[Unit]:
    """Every unit, in the order of its value."""
    shapes = [" ".join(map(str, shape)) for shape in (HEAD_QUICK if quick else HEAD)]
    units = [Unit("device", "rates", "ours")]
    units += [Unit("head", f"{unit} {shape}", "ours") for shape in shapes for unit in HEAD_UNITS]
    units += [Unit("ops", op, "ours") for op in OPS]
    units += [Unit("step", f"stage{stage}{how}", "ours") for how in ("", " graphs") for stage in (2, 1)]
    for peer, module in {"autoregembed": "torch", **PEERS}.items():
        for shape in shapes[:1] if mode == "first" else shapes[:3]:
            units.append(Unit("peers", f"linear_logprob {shape} {peer}", peer, module))
    units += [Unit("peers", f"info_nce {peer}", f"info_nce {peer}", module) for peer, module in CONTRASTIVE.items()]
    units += [Unit("tests", test, test) for test in (TESTS_QUICK if quick else TESTS)]
    if mode == "all":
        units += [Unit("sanitizers", tool, tool) for tool in SANITIZERS]
    return units


class Log:
    """Lines to stdout and to files, flushed one by one; and what failed."""

    def __init__(self, *files: Path):
        self.files: list[IO[str]] = []
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.files.append(file.open("w", encoding="utf-8"))
        self.lock = threading.Lock()
        self.states: dict[str, str] = {}

    def say(self, line: dict[str, Any]) -> None:
        with self.lock:
            if line.get("state") != "finding" and line["unit"] != "summary":
                self.states[line["unit"]] = line["state"]
            text = json.dumps(line)
            for file in (sys.stdout, *self.files):
                file.write(text + "\n")
                file.flush()


@dataclass
class Runner:
    mode: str
    quick: bool
    log: Log
    errors: Path  # receives what the processes print
    end: float
    rates: dict[str, Any] | None = None  # measured in the first unit, handed to all later processes
    stopped: str = ""  # why nothing further can run

    def run(self, units: list[Unit]) -> None:
        """Runs units of one group; every unit gets its line."""
        left = list(units)
        while left:
            if not installed(left[0].needs):  # a process for nothing costs seconds
                unit = left.pop(0)
                self.log.say(line_of(unit, "skipped", reason=f"{unit.needs} is not installed"))
                continue
            if self.stopped or self.end - time.monotonic() < 3:
                self.log.say(line_of(left.pop(0), "left out", reason=self.stopped or "no time left"))
                continue
            if left[0].part == "sanitizers":
                self.log.say(self._sanitize(left.pop(0)))
                continue
            for line in self._process(left):
                if line.get("rates"):
                    self.rates = line["rates"]
                self.stopped = self.stopped or line.get("stop", "")
                self.log.say(line)
                if line["state"] != "finding":
                    left.pop(0)

    def _command(self, units: list[Unit], *options: str) -> list[str]:
        given = [*options, *(["--quick"] if self.quick else [])]
        if self.rates:
            given += ["--rates", json.dumps(self.rates)]
        return [sys.executable, "-m", "bench.gpu_worker", *given, *(unit.name for unit in units)]

    def _start(self, command: list[str], *kept: int) -> subprocess.Popen:
        with self.errors.open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, stdin=subprocess.DEVNULL, pass_fds=kept,
                start_new_session=True,
            )  # fmt: skip

    def _process(self, units: list[Unit]) -> Iterator[dict[str, Any]]:
        """Lines of one process that runs `units` in order, until it ends or is ended; one unit at least gets one."""
        reading, writing = os.pipe()
        offset = self.errors.stat().st_size
        child = self._start(self._command(units, "--fd", str(writing)), writing)
        os.close(writing)
        todo = list(units)
        try:
            for line in self._lines(reading, units[0].part):
                if line is None:
                    late = self.end - time.monotonic() < 1
                    state, reason = ("left out", "no time left") if late else ("failed", "took too long and was ended")
                    yield line_of(todo[0], state, failure=reason, output=self._output(offset))
                    return
                if line["state"] != "finding":
                    todo.pop(0)
                yield line
                if not todo or line.get("ends"):
                    return
            yield line_of(todo[0], "failed", failure=f"its process ended {_how(child.wait())}",
                          output=self._output(offset))  # fmt: skip
        finally:
            _end(child)
            os.close(reading)

    def _sanitize(self, unit: Unit) -> dict[str, Any]:
        """Our kernels at tiny sizes under a tool of CUDA's, which answers 9 where it found something."""
        tool = shutil.which("compute-sanitizer")
        tool = tool or next(map(str, sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None)
        if tool is None:
            return line_of(unit, "skipped", reason="compute-sanitizer is not installed")
        offset = self.errors.stat().st_size
        ours = [u for u in plan("first", True) if u.part in ("head", "ops")]
        child = self._start([tool, "--tool", unit.what, "--error-exitcode", "9", *self._command(ours, "--tiny")])
        try:
            status = child.wait(max(1.0, min(UNIT_SECONDS["all"], self.end - time.monotonic())))
        except subprocess.TimeoutExpired:
            return line_of(unit, "left out", reason="no time left")
        finally:
            _end(child)
        if status == 0:
            return line_of(unit, "ok")
        return line_of(unit, "failed", failure=f"ended {_how(status)}", output=self._output(offset))

    def _output(self, offset: int) -> str:
        """The end of what processes have printed since the file had this length."""
        size = self.errors.stat().st_size
        with self.errors.open("rb") as file:
            file.seek(max(offset, size - 1000))
            return file.read().decode(errors="replace")

    def _lines(self, reading: int, part: str) -> Iterator[dict[str, Any] | None]:
        """Lines as they come; None where the next one takes too long."""
        buffer, start = b"", START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            while True:
                left = self.end - time.monotonic()
                wait = left if part == "tests" else min(UNIT_SECONDS[self.mode] + start, left)
                if not selector.select(max(wait, 0.1)):
                    yield None
                    return
                data = os.read(reading, 65536)
                if not data:
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                start = 0
                yield from map(json.loads, lines)


def line_of(unit: Unit, state: str, **found: Any) -> dict[str, Any]:
    return {"unit": unit.name, "part": unit.part, "state": state, **found}


def _how(status: int) -> str:
    return f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"


def _end(child: subprocess.Popen) -> None:
    """Ends a process that we started, and what it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def grouped(units: list[Unit]) -> Iterator[list[Unit]]:
    """Neighbours of one group together."""
    group: list[Unit] = []
    for unit in units:
        if group and unit.group != group[0].group:
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=LIMITS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--out", type=Path, help="JSON lines; by default bench/results/gpu-MODE.jsonl, quick: none")
    parser.add_argument("--limit", type=float, help="seconds; by default 120 (first) or 480 (all)")
    parser.add_argument("--part", action="append", choices=PARTS, help="these parts alone")
    parser.add_argument("--only", action="append", help="units with this in their name alone, after the first unit")
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    files = [given.out or (None if given.quick else ROOT / "bench" / "results" / f"gpu-{given.mode}.jsonl")]
    if os.environ.get("OUT"):
        files.append(Path(os.environ["OUT"]) / f"gpu-{given.mode}.jsonl")
    kept = [file for file in files if file is not None]
    log = Log(*kept)
    folder = kept[-1].parent if kept else Path(tempfile.mkdtemp(prefix="autoregembed-gpu-"))
    errors = (folder / f"gpu-{given.mode}.log").absolute()
    errors.write_bytes(b"")
    units = [u for u in plan(given.mode, given.quick) if given.part is None or u.part in given.part]
    if given.only is not None:
        units = [u for u in units if u.part == "device" or any(name in u.name for name in given.only)]
    runner = Runner(given.mode, given.quick, log, errors, begin + (given.limit or LIMITS[given.mode]))
    for part in PARTS:
        groups = list(grouped([unit for unit in units if unit.part == part]))
        # Tests wait for each other's compilation, not for the GPU; what is timed runs alone.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if part == "tests" else 1) as pool:
            list(pool.map(runner.run, groups))
    failed = [name for name, state in log.states.items() if state == "failed"]
    status = sum(1 << i for i, part in enumerate(PARTS) if any(name.startswith(f"{part}/") for name in failed))
    summary = {state: [n for n, s in log.states.items() if s == state] for state in ("failed", "skipped", "left out")}
    log.say({"unit": "summary", "state": "failed" if failed else "ok", **summary, "status": status,
             "seconds": round(time.monotonic() - begin, 1)})  # fmt: skip
    return status


if __name__ == "__main__":
    sys.exit(main())
