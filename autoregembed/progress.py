"""What a run shows in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def describe(stage: int, log: dict[str, float]) -> str:
    names = ("loss",) if stage == 1 else ("loss", "align", "s1", "s2", "accuracy", "nce", "distill")
    text = "  ".join(f"{n} {log[n]:.3f}" for n in names if n in log)
    return f"stage {stage}  {text}  {log['tokens_per_second']:.0f} tok/s  {log['memory_gb']:.1f} GB"


def progress_bar(console: Console) -> Progress:
    description = TextColumn("{task.description}")
    return Progress(
        description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
