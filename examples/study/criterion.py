"""Which metric without labels goes with the ratings? Rank correlations over the evaluations of finished runs.

    python examples/study/criterion.py runs/study/runs/* runs/quickstart/stage1

Runs of stage 1 on rated pairs, with `eval_steps` and `eval_metric: view_separation`, have both in summary.json.
`within`: the correlation of one run's steps, mean over runs: what `save_best` needs. `kept`: the rating's metric at
the step that each would keep, mean over runs, beside that of the last step and of the best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import mean

from autoregembed.evaluate import LABEL_FREE, METRICS, spearman

Run = list[dict[str, float]]  # its evaluations after training has begun


def load(folders: list[Path]) -> list[Run]:
    runs = []
    for folder in folders:
        if not (file := folder / "summary.json").is_file():
            continue
        summary = json.loads(file.read_text("utf-8"))
        found = [values for step, values in summary["evaluations"].items() if step != "0"]
        if summary["stage"] == 1 and len(found) > 1 and all({"spearman", *LABEL_FREE} <= set(v) for v in found):
            runs.append(found)
    return runs


def table(runs: list[Run]) -> str:
    """Markdown: a row a metric."""

    def kept(value: Callable[[dict[str, float]], float]) -> str:
        return f"{mean(max(run, key=value)['spearman'] for run in runs):.3f}"

    lines = ["| keeps the step with the best | over all | within | kept |", "|---|---|---|---|"]
    for name in LABEL_FREE:
        sign = 1 if METRICS[name].higher else -1
        rated = [[values["spearman"] for values in run] for run in runs]
        found = [[sign * values[name] for values in run] for run in runs]
        over_all = spearman([*chain(*found)], [*chain(*rated)])
        within = mean(spearman(a, b) for a, b in zip(found, rated, strict=True))
        lines.append(f"| {name} | {over_all:.2f} | {within:.2f} | {kept(lambda v, n=name, s=sign: s * v[n])} |")
    last = mean(run[-1]["spearman"] for run in runs)
    lines += [f"| (the last step) | | | {last:.3f} |", f"| spearman | | | {kept(lambda v: v['spearman'])} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = load(parser.parse_args().runs)
    if not runs:
        raise SystemExit("runs: got none of stage 1 with two evaluations on rated pairs, expected at least one")
    print(f"{len(runs)} runs, {sum(map(len, runs))} evaluations\n\n{table(runs)}")


if __name__ == "__main__":
    main()
