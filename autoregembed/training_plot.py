"""training.png: the losses of a run and its evaluations, from `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from autoregembed.evaluate import METRICS
from autoregembed.files import atomic_file

_PARTS = ("loss", "align", "nce", "distill")


def draw_training(
    folder: Path, evaluations: Mapping[str, Mapping[str, float | None]], eval_metric: str | None, console: Console
) -> None:
    """Writes `folder`/training.png; without matplotlib, which the training does not need, it says so.

    Args:
        folder: has `metrics.jsonl`.
        evaluations: metrics by step; None where one is undefined.
        eval_metric: the metric that is drawn; None: none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("training.png: not drawn, matplotlib is not installed (pip install matplotlib)", highlight=False)
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {int(step): values.get(eval_metric or "") for step, values in evaluations.items()}
    scores = {step: value for step, value in found.items() if value is not None}
    # No pyplot: it would choose a backend for the whole process.
    width = 9 if scores else 5
    figure = Figure(figsize=(width, 3.6), dpi=120)
    figure.subplots_adjust(0.65 / width, 0.14, 1 - 0.15 / width, 0.9, 0.2)  # `constrained` takes as long as the drawing
    axes = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    names = [name for name in _PARTS if any(row.get(name) is not None for row in rows)]
    for name in names if len(names) != 2 else names[:1]:  # a single part is the loss itself, but for its weight
        found = {row["step"]: row[name] for row in rows if row.get(name) is not None}
        axes[0].plot(list(found), list(found.values()), label=name, linewidth=1.8 if name == "loss" else 0.9)
    axes[0].set(
        xlabel="step", title="loss" if len(names) < 3 else "loss, and its parts before their weights", xmargin=0.02
    )
    if len(names) > 2:
        axes[0].legend(frameon=False)
    if scores:
        axes[1].plot(list(scores), list(scores.values()), marker="o", markersize=4)
        assert eval_metric is not None
        metric = METRICS[eval_metric]
        axes[1].set(xlabel="step", title=metric.title)
        axes[1].set_ylabel("more is better" if metric.higher else "less is better")
    for axis in axes:
        axis.title.set_fontsize("medium")  # the longest title is as wide as its axes
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_file(folder / "training.png") as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
