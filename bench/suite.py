"""Runs suites, prints the table, writes JSON and report, compares two results: what `autoregembed bench` calls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import bench_alignment, bench_dpo, bench_head, bench_info_nce, bench_splice, harness

SUITES = ("head", "step", "integrations", "all")
THRESHOLD = 1.15


def cases(
    suite: str, device: str, quick: bool, rows: int | None = None, triplets: str | None = None
) -> Iterator[Callable[[], harness.Case]]:
    """One function per case of a suite; it makes the inputs when it is called."""
    if suite not in SUITES:
        raise ValueError(f"suite: got {suite!r}, expected {', '.join(map(repr, SUITES))}")
    if suite in ("head", "all"):
        for module in (bench_head, bench_alignment, bench_splice, bench_info_nce, bench_dpo):
            yield from module.cases(device, quick)
    if suite in ("step", "all"):
        from . import bench_step  # needs Transformers

        yield from bench_step.cases(device, quick, rows, triplets)
    if suite in ("integrations", "all"):
        from . import bench_integrations

        yield from bench_integrations.cases(device, quick)


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
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs a suite; returns, and writes where asked, the environment and one row per case and variant.

    Args:
        suite: "head", "step", "integrations" or "all".
        quick: tiny sizes: whether everything runs, and no more than that.
        device: "cpu" or "cuda"; by default a GPU where there is one.
        json_file, report: where the results (JSON) and the report (HTML) go; None: not written.
        rounds: of every case, in place of its own number and of further ones for short calls.
        rows: triplets of a training step.
        triplets: a jsonl file of {query, pos, neg} for the steps.
        limit: seconds after which no further case is begun; what was left out is named.

    Raises:
        ValueError: an unknown suite or device.
        AssertionError: one of our outputs is wrong; nothing was timed.
    """
    console = console or Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"device: got {device!r}, expected 'cpu' and, where there is a GPU, 'cuda'")
    harness.settle_process()
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    # Curves last: they are what may be left out for want of time.
    todo = sorted(cases(suite, device, quick, rows, triplets), key=lambda make: bool(make().curve))
    seconds = 0.0 if quick or rounds else 2.0 if device == "cpu" else 0.2
    begin = time.monotonic()
    left_out: list[str] = []
    found: dict[str, Any] = {"format": 1, "suite": suite, "quick": quick, "rows": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rates of this machine", total=len(todo))
        dtypes = [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]
        machine = harness.Machine.measure(device, dtypes, quick)
        found |= harness.environment(machine)
        for make in todo:
            case = make()
            if limit is not None and time.monotonic() - begin > limit:
                left_out.append(case.name)
                continue
            progress.update(task, description=case.name)
            measured = [asdict(row) for row in harness.run(case, machine, rounds=rounds, seconds=seconds)]
            found["rows"] += measured
            for line in table(measured):
                progress.console.print(line)
            progress.advance(task)
            if json_file:  # after every case: a run that is cut short leaves what it had
                temporary = json_file.with_name(f".{json_file.name}.tmp")
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                temporary.replace(json_file)
    console.print(summary(found))
    if left_out:
        console.print(f"left out after {limit:.0f} s: {', '.join(left_out)}")
    if json_file:
        console.print(f"results: {json_file}")
    if report:
        from .report import write_report

        write_report(found, report)
        console.print(f"report: {report}")
    return found


# ----------------------------------------------------------------------------------------------------------------------


def _time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.2f} ms" if ms >= 0.1 else f"{ms * 1e3:.1f} µs"


def _size(count: float) -> str:
    """Binary multiples."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GB"
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} kB"


def table(rows: list[dict]) -> list[Any]:
    """The table of one case; with the reasons of what was skipped in one line each."""
    steps = any(r["tokens_per_second"] for r in rows)
    title = f"{rows[0]['case']} · {rows[0]['inputs']} · speed-up over {rows[0]['baseline']}"
    out = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("", "median", "IQR", "×floor", "speed-up", "roof", "memory", "error", *(["tok/s"] if steps else [])):
        out.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    done = sorted((r for r in rows if r["median_ms"] is not None), key=lambda r: r["median_ms"])
    for r in done:
        cells = [
            r["variant"],
            _time(r["median_ms"]),
            f"{100 * r['iqr_ms'] / r['median_ms']:.0f}%",
            "" if r["ratio_to_floor"] is None else f"{r['ratio_to_floor']:.2f}",
            "" if r["speedup"] is None else f"{r['speedup']:.2f}",
            f"{100 * r['roofline']:.0f}%",
            "" if r["peak_bytes"] is None else _size(r["peak_bytes"]),
            "" if r["error"] is None else f"{r['error']:.0e}",
        ]
        if steps:
            cells.append(f"{r['tokens_per_second']:.0f}")
        out.add_row(*cells, style="bold" if harness.is_ours(r["variant"]) else None)
    lines: list[Any] = [out]
    for r in done:
        if r["details"]:
            total = sum(r["details"].values())
            places = ", ".join(f"{k} {_time(v)} ({100 * v / total:.0f}%)" for k, v in r["details"].items())
            lines.append(f"  {r['variant']}: {places}")
    skipped: dict[str, list[str]] = {}
    for r in rows:
        if r["skipped"]:
            skipped.setdefault(r["skipped"], []).append(r["variant"])
    lines += [f"  [dim]{', '.join(names)}: {reason}[/dim]" for reason, names in skipped.items()]
    return [*lines, ""]


def summary(found: dict) -> str:
    hardware, measured = found["hardware"], found["measured"]
    rates = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in measured["flops_per_second"].items())
    return (
        f"{hardware.get('gpu') or hardware['processor']}, {hardware['threads']} threads; measured {rates}, "
        f"{measured['bytes_per_second'] / 1e9:.0f} GB/s; torch {found['versions'].get('torch')}, "
        f"python {found['python']}, "
        f"commit {found['commit'][:12] or 'unknown'}{'+changes' * found['commit'].endswith('+changes')}"
    )


# ----------------------------------------------------------------------------------------------------------------------


def _relative(row: dict) -> float | None:
    """What is compared: time relative to the floor, or else to the baseline; the machine's speed cancels in it."""
    if row["ratio_to_floor"] is not None:
        return row["ratio_to_floor"]
    return None if not row["speedup"] else 1 / row["speedup"]


def compare(old: dict, new: dict, threshold: float = THRESHOLD, console: Console | None = None) -> list[str]:
    """Prints new / old of every row's relative time and peak memory; returns our rows that grew beyond `threshold`.

    Raises:
        ValueError: no row in common.
    """
    console = console or Console()
    before = {(r["case"], r["variant"]): r for r in old["rows"] if r["median_ms"] is not None}
    out = Table("case", "variant", "old", "new", "new / old", "memory new / old", box=None, pad_edge=False)
    slower = []
    common = 0
    for row in new["rows"]:
        former = before.get((row["case"], row["variant"]))
        if former is None or row["median_ms"] is None or row["variant"] == harness.FLOOR:
            continue
        was, now = _relative(former), _relative(row)
        if was is None or now is None:
            continue
        common += 1
        quotient = now / was
        memory = row["peak_bytes"] / former["peak_bytes"] if row["peak_bytes"] and former["peak_bytes"] else 1.0
        bad = harness.is_ours(row["variant"]) and (quotient > threshold or memory > threshold)
        if bad:
            slower.append(f"{row['case']}, {row['variant']}: time × {quotient:.2f}, memory × {memory:.2f}")
        style = "red" if bad else "green" if quotient < 1 / threshold else None
        out.add_row(
            row["case"], row["variant"], f"{was:.2f}", f"{now:.2f}", f"{quotient:.2f}", f"{memory:.2f}", style=style
        )
    if not common:
        raise ValueError("compare: got no case and variant in common, expected results of the same suite")
    console.print(out)
    console.print("times are relative to the floor, or to the baseline where a case has no floor")
    for line in slower:
        console.print(f"above {threshold}: {line}", style="red")
    return slower


def load(file: Path) -> dict:
    """Results that `bench` wrote; ValueError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found["rows"][0]["case"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"compare: got {str(file)!r}, which is no result of this command: {error}") from error
    return found
