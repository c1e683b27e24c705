"""What a run shows: in a terminal one line that changes in place, in a log file a plain line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from torch import Tensor

_LINES = 20  # of a log file, for all steps alike
_EVERY = 600.0  # seconds after which a slow run says something all the same
_PART = 512  # texts between two looks at the clock


def describe(log: dict[str, float], measured: tuple[str, float] | None = None) -> str:
    """The numbers of a step, the most wanted first, since a narrow terminal cuts the end; `measured` is a metric."""
    parts = ("loss", "align", "nce", "distill", "accuracy", "s1", "s2")
    found = [f"{n} {log[n]:.3f}" for n in parts if n in log]
    if measured is not None:
        found.insert(1, f"{measured[0]} {measured[1]:.4f}")
    return "  ".join([*found, f"{log['tokens_per_second']:.0f} tok/s", f"{log['memory_gb']:.1f} GB"])


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Progress through `total` pieces of work, some of which an earlier run may have done.

    Args:
        console: where it is no terminal, a line is written at the first piece, at the last, 20 times between them, and
            after ten minutes without one.
        title: stands before everything.
    """

    def __init__(self, console: Console, title: str, total: int, done: int = 0):
        self.console, self.title, self.total = console, title, total
        self.first = self.done = done
        self.start = self.written = time.monotonic()
        # No column may wrap, or the line becomes two; the last one, which is cut first, has what the others leave.
        fixed, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self.bar = Progress(
            TextColumn("{task.fields[title]}", table_column=fixed), BarColumn(12),
            MofNCompleteColumn(table_column=fixed.copy()),
            TextColumn("ETA {task.fields[eta]}", table_column=fixed.copy()),
            TextColumn("{task.description}", table_column=rest, markup=False), console=console, expand=True,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total, completed=done, title=title, eta="-:--")

    def __enter__(self) -> Display:
        self.start = self.written = time.monotonic()
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """Shows that `done` pieces are done, and `text`."""
        before, self.done = self.done, done
        now = time.monotonic()
        eta = clock((now - self.start) / max(done - self.first, 1) * (self.total - done))
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, description=text, eta=eta)
            return
        share = max(1, self.total // _LINES)
        due = before == self.first or done == self.total or done // share > before // share
        if due or now - self.written > _EVERY:
            self.written = now
            line = f"{self.title}  {done:>{len(str(self.total))}}/{self.total}  ETA {eta}  {text}".rstrip()
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def in_parts(console: Console, title: str, encode: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """`encode` of texts in parts of 512, with progress where there are several."""
    if len(texts) <= _PART:
        return encode(list(texts))
    # Of like lengths together, as sentence-transformers itself has them, or every part would hold a longest text.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = []
    with Display(console, title, len(texts)) as display:
        for i in range(0, len(texts), _PART):
            out.append(encode([texts[j] for j in order[i : i + _PART]]))
            display.update(min(i + _PART, len(texts)))
    found = torch.cat(out)
    return found[torch.tensor(order).argsort()]
