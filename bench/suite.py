"""Runs suites, prints the tables, writes JSON and report: what `autoregembed bench` calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autoregembed.files import write_json

from . import (
    bench_alignment_loss,
    bench_compression_loss,
    bench_conditional_alignment,
    bench_conditional_compression,
    bench_dpo,
    bench_generative_info_nce,
    bench_info_nce,
    bench_linear_logprob,
    bench_pool_last_k,
    bench_score_distillation,
    bench_segment_sum,
    bench_splice,
    custom,
)
from .harness import Case, Machine, is_gpu, run, settle_process
from .report import write_report
from .results import environment, summary, table

QUICK_ROUNDS = 3
QUICK_NOTE = (
    "--quick: tiny sizes, to see that everything runs. These are the times of calls, not of kernels; nothing follows "
    "from them, and --compare refuses them."
)
SUITES = ("ops", "step", "integrations", "all")
OPS = (
    bench_linear_logprob,
    bench_segment_sum,
    bench_alignment_loss,
    bench_compression_loss,
    bench_conditional_alignment,
    bench_conditional_compression,
    bench_pool_last_k,
    bench_splice,
    bench_info_nce,
    bench_generative_info_nce,
    bench_score_distillation,
    bench_dpo,
)


def cases(
    suite: str, device: str, quick: bool, rows: int | None = None, triplets: str | None = None
) -> Iterator[Callable[[], Case]]:
    """One function per case of a suite; it returns the case."""
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected {', '.join(map(repr, SUITES))}")
    if suite in ("ops", "all"):
        for module in OPS:
            yield from module.cases(device, quick)
    if suite in ("step", "all"):
        from . import bench_step  # needs Transformers

        yield from bench_step.cases(device, quick, rows, triplets)
    if suite in ("integrations", "all"):
        from . import bench_integrations

        yield from bench_integrations.cases(device, quick)


def measure_machine(device: str, quick: bool) -> Machine:
    """Prepares the process for timing and measures the rates of the device."""
    settle_process()
    return Machine.measure(device, [torch.bfloat16, torch.float32] if is_gpu(device) else [torch.float32], quick)


def bench(
    suite: str = "all",
    *,
    quick: bool = False,
    device: str | None = None,
    json_file: Path | None = None,
    report: Path | None = None,
    rounds: int | None = None,
    rows: int | None = None,
    triplets: str | None = None,
    limit: float | None = None,
    baseline: str | None = None,
    op: str = "linear_logprob",
    shape: str | None = None,
    dtype: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs a suite.

    Args:
        suite: "ops", "step", "integrations" or "all".
        quick: tiny sizes, to see that everything runs; the numbers mean nothing.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        json_file: receives the results (JSON).
        report: receives the report (HTML).
        rounds: of every case. By default each case has its own number, and short calls get further rounds.
        rows: triplets of a training step.
        triplets: a jsonl file of {query, pos, neg} for the steps.
        limit: seconds after which no further case starts; the cases left out are printed.
        baseline: "module:function", a function to measure beside ours at one shape; no other case is run.
        op: of the baseline, one of `custom.OPS`.
        shape: of the baseline, as "512,576,49152".
        dtype: of the baseline: bf16, fp16 or fp32; by default the device's.

    Returns:
        The environment, and under "rows" one row per case and variant.

    Raises:
        ValueError: an unknown suite or device.
        AssertionError: one of our outputs is wrong; that case is not timed.
    """
    console = console or Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"device: got {device!r}, expected 'cpu' and, where there is a GPU, 'cuda'")
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    # Curves come last: they matter least when the time runs out.
    todo = sorted(
        [custom.case(baseline, op, shape, dtype, device)] if baseline else cases(suite, device, quick, rows, triplets),
        key=lambda make: bool(make().curve),
    )
    seconds = 0.0 if quick or rounds else 0.2 if is_gpu(device) else 2.0
    rounds = rounds or (QUICK_ROUNDS if quick else None)
    begin = time.monotonic()
    left_out: list[str] = []
    found: dict[str, Any] = {"format": 1, "suite": suite, "quick": quick, "rows": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rates of this machine", total=len(todo))
        machine = measure_machine(device, quick)
        found |= environment(machine)
        for make in todo:
            case = make()
            if limit is not None and time.monotonic() - begin > limit:
                left_out.append(case.name)
                continue
            progress.update(task, description=case.name)
            measured = [asdict(row) for row in run(case, machine, rounds=rounds, seconds=seconds)]
            found["rows"] += measured
            for line in table(measured):
                progress.console.print(line)
            progress.advance(task)
            if json_file:  # after every case, so that an interrupted run keeps its results
                write_json(json_file, found)
    console.print(summary(found))
    if quick:
        console.print(QUICK_NOTE, style="yellow")
    if left_out:
        console.print(f"left out after {limit:.0f} s: {', '.join(left_out)}")
    if json_file:
        console.print(f"results: {json_file}")
    if report:
        write_report(found, report)
        console.print(f"report: {report}")
    return found
