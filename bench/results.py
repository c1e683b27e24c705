"""The results of a run: environment, table, comparison with an earlier run."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .harness import GEMM_ONLY, Machine, Row, is_gpu, is_ours, version

if TYPE_CHECKING:
    from rich.console import Console

THRESHOLD = 1.15
PACKAGES = ("autoregembed", "torch", "triton", "transformers", "numpy", "cut-cross-entropy", "liger-kernel", "trl",
            "quack-kernels", "inf-cl", "sentence-transformers", "flash-attn")  # fmt: skip


def load(file: Path) -> dict:
    """Reads the results of an earlier run, also the lines of `bench/gpu.sh`; raises ValueError for any other file."""
    try:
        text = file.read_text(encoding="utf-8")
        found = _results_of_lines(text) if file.suffix == ".jsonl" else json.loads(text)
        found["rows"][0]["case"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"compare: got {str(file)!r}, expected results of `autoregembed bench` ({error})") from error
    return found


def refuse_quick(name: str, *found: dict) -> None:
    """Raises ValueError for results of tiny sizes, whose times say nothing about a kernel."""
    if any(f.get("quick") for f in found):
        raise ValueError(f"{name}: got results of --quick, expected those of a run at real sizes, without --quick")


def _results_of_lines(text: str) -> dict:
    """The rows among the lines of `bench/gpu.sh`, with None for what a row lacks."""
    lines = [json.loads(line) for line in text.splitlines()]
    empty: dict[str, Any] = {f.name: None for f in fields(Row)} | {"details": {}}
    rows = [empty | {k: v for k, v in line.items() if k in empty} for line in lines if "median_ms" in line]
    return {"device": lines[0]["device"], "rows": rows}


def by_case(rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups


def fastest_first(rows: list[dict]) -> list[dict]:
    """The rows that have a time."""
    return sorted((r for r in rows if r["median_ms"] is not None), key=lambda r: r["median_ms"])


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def format_time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.2f} ms" if ms >= 0.1 else f"{ms * 1e3:.1f} µs"


def format_size(count: float | None) -> str:
    """Bytes in binary multiples; "" for None."""
    if count is None:
        return ""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GB"
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} kB"


def format_number(x: float | None, style: str = ".2f") -> str:
    return "" if x is None else format(x, style)


def format_details(row: dict) -> str:
    total = sum(row["details"].values())
    places = (f"{k} {format_time(v)} ({100 * v / total:.0f}%)" for k, v in row["details"].items())
    return f"{row['variant']}: {', '.join(places)}"


def table(rows: list[dict]) -> list[Any]:
    """The table of one case, then a line for every reason why variants were skipped."""
    from rich.table import Table

    steps = any(r["tokens_per_second"] for r in rows)
    title = f"{rows[0]['case']} · {rows[0]['inputs']} · speed-up over {rows[0]['relative_to']}"
    out = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in (
        "",
        "median",
        "IQR",
        "×GEMMs",
        "speed-up",
        "roof",
        "memory",
        "error",
        "gradient",
        *(["tok/s"] if steps else []),
    ):
        out.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    done = fastest_first(rows)
    for r in done:
        cells = [
            r["variant"],
            format_time(r["median_ms"]),
            f"{100 * r['iqr_ms'] / r['median_ms']:.0f}%",
            format_number(r["ratio_to_gemm_only"]),
            format_number(r["speedup"]),
            f"{100 * r['roofline']:.0f}%",
            format_size(r["peak_bytes"]),
            format_number(r["error"], ".0e"),
            format_number(r.get("gradient_error"), ".0e"),
        ]
        if steps:
            cells.append(f"{r['tokens_per_second']:.0f}")
        out.add_row(*cells, style="bold" if is_ours(r["variant"]) else None)
    skipped: dict[str, list[str]] = {}
    for r in rows:
        if r["skipped"]:
            skipped.setdefault(r["skipped"], []).append(r["variant"])
    details = [f"  {format_details(r)}" for r in done if r["details"]]
    return [out, *details, *(f"  [dim]{', '.join(names)}: {reason}[/dim]" for reason, names in skipped.items()), ""]


def summary(found: dict) -> str:
    """One line on the machine and the versions."""
    hardware, measured = found["hardware"], found["measured"]
    rates = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in measured["flops_per_second"].items())
    return (
        f"{hardware.get('gpu') or hardware['processor']}, {hardware['threads']} threads; measured {rates}, "
        f"{measured['bytes_per_second'] / 1e9:.0f} GB/s; torch {found['versions'].get('torch')}, "
        f"python {found['python']}, "
        f"commit {found['commit'][:12] or 'unknown'}{'+changes' * found['commit'].endswith('+changes')}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def _relative_time(row: dict) -> float | None:
    """Time relative to the bare GEMMs, or else to the variant `relative_to`: the machine's speed cancels."""
    if row["ratio_to_gemm_only"] is not None:
        return row["ratio_to_gemm_only"]
    return None if not row["speedup"] else 1 / row["speedup"]


def compare(old: dict, new: dict, threshold: float = THRESHOLD, console: Console | None = None) -> list[str]:
    """Prints new / old of every row's relative time and peak memory.

    Returns:
        A line for each of our rows where one of the two is above `threshold`.

    Raises:
        ValueError: the results have no row in common, or are those of a quick run.
    """
    from rich.console import Console
    from rich.table import Table

    refuse_quick("compare", old, new)
    console = console or Console()
    before = {(r["case"], r["variant"]): r for r in old["rows"] if r["median_ms"] is not None}
    out = Table("case", "variant", "old", "new", "new / old", "memory new / old", box=None, pad_edge=False)
    slower = []
    common = 0
    for row in new["rows"]:
        former = before.get((row["case"], row["variant"]))
        if former is None or row["median_ms"] is None or row["variant"] == GEMM_ONLY:
            continue
        was, now = _relative_time(former), _relative_time(row)
        if was is None or now is None:
            continue
        common += 1
        quotient = now / was
        memory = row["peak_bytes"] / former["peak_bytes"] if row["peak_bytes"] and former["peak_bytes"] else 1.0
        bad = is_ours(row["variant"]) and (quotient > threshold or memory > threshold)
        if bad:
            slower.append(f"{row['case']}, {row['variant']}: time × {quotient:.2f}, memory × {memory:.2f}")
        style = "red" if bad else "green" if quotient < 1 / threshold else None
        out.add_row(
            row["case"], row["variant"], f"{was:.2f}", f"{now:.2f}", f"{quotient:.2f}", f"{memory:.2f}", style=style
        )
    if not common:
        raise ValueError("compare: got no case and variant in common, expected results of the same suite")
    console.print(out)
    console.print("times are relative to the bare GEMMs, or to the variant that the case names where it has none")
    for line in slower:
        console.print(f"above {threshold}: {line}", style="red")
    return slower


# ----------------------------------------------------------------------------------------------------------------------
# Environment


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, "+changes" after it where files differ; "" outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "CMakeLists.txt").is_file():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + "+changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(machine: Machine) -> dict[str, Any]:
    """Hardware, measured rates, versions, commit and time of a run."""
    hardware: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    hardware["capability"] = torch.backends.cpu.get_cpu_capability()
    if is_gpu(machine.device):
        properties = torch.cuda.get_device_properties(0)
        hardware.update(gpu=properties.name, gpu_memory=properties.total_memory, cuda=torch.version.cuda)
    return {
        "device": machine.device,
        "hardware": hardware,
        "measured": asdict(machine),
        "versions": {p: version(p) for p in PACKAGES if version(p)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
