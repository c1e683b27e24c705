"""What a run is evaluated on, and which of two evaluations is the better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console

from autoregembed.config import Config, ConfigError
from autoregembed.evaluate import LABEL_FREE, METRICS, Embed, label_free, load_sts, load_texts, sts
from autoregembed.files import read_json
from autoregembed.models import RECIPE
from autoregembed.tables import read_rows

MOST_TEXTS = 128  # evaluated in the time of a few steps, and always the same ones

Evaluation = Mapping[str, float | None]  # metrics by name, None where one is undefined


class HeldOut:
    """The rated pairs or the texts of `eval_data`, and the metric that stands for an evaluation on them.

    Raises:
        ConfigError: `eval_metric` is not one of this kind of data. And the errors of `load_sts` and `load_texts`.
    """

    def __init__(self, config: Config, console: Console):
        self.pairs: Dataset | None = None
        self.texts: list[str] = []
        self.metric: str | None = None  # without eval_data
        source, split = config.eval_data, config.eval_split
        if source is None:
            return
        column = (config.column_map or {}).get("text", "text")
        _, first = next(iter(read_rows(source, split)))
        known = LABEL_FREE
        if "sentence1" in first or not {column, "text"} & set(first):
            self.pairs, known = load_sts(source, split), tuple(METRICS)
            if config.eval_metric in LABEL_FREE:  # three times the texts to embed
                self.texts = list(dict.fromkeys([*self.pairs["sentence1"], *self.pairs["sentence2"]]))
        else:
            self.texts = load_texts(source, split, column)
        self.metric = config.eval_metric or known[0]
        if self.metric not in known:
            raise ConfigError(
                f"eval_metric: got {self.metric!r}, expected {', '.join(known)}: {source!r} holds texts without ratings"
            )
        if (n := len(self.texts)) > MOST_TEXTS:
            self.texts = [self.texts[i * n // MOST_TEXTS] for i in range(MOST_TEXTS)]
            if self.pairs is None:
                console.print(f"eval_data: {MOST_TEXTS} of {n:,} texts are read, spread evenly", highlight=False)

    def evaluate(self, embed: Embed, console: Console) -> dict[str, float | None]:
        """Every metric of these data; why one is undefined is printed."""
        found: dict[str, Any] = sts(embed, self.pairs) if self.pairs is not None else {}
        if len(self.texts) > 1:
            found |= label_free(embed, self.texts)
        for name in [name for name in found if name.endswith("undefined")]:
            console.print(f"evaluation: no {self.metric}, {found.pop(name)}", highlight=False)
        return found

    def last(self, evaluations: Mapping[str, Evaluation]) -> tuple[str, float] | None:
        """The metric and its latest value."""
        values = [x.get(self.metric or "") for x in evaluations.values()]
        known = [x for x in values if x is not None]
        return (self.metric, known[-1]) if self.metric and known else None

    def is_better(self, new: Evaluation, old: Evaluation) -> bool:
        """Whether `new` has a better value than `old`; none is worse than any."""
        assert self.metric is not None
        sign = 1 if METRICS[self.metric].higher else -1
        a, b = (x.get(self.metric) for x in (new, old))
        a, b = (-math.inf if x is None else sign * x for x in (a, b))
        return a > b


def step_of(model: Path) -> int | None:
    """The step of the run whose weights a folder `model` has; None where there is no such folder."""
    path = model / RECIPE
    return read_json(path, "output_dir").get("step") if path.is_file() else None
