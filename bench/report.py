"""One self-contained HTML file: tables, and plots as embedded SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import GEMM_ONLY, is_ours
from .results import by_case, fastest_first, format_details, format_number, format_size, format_time, summary

# Colours
OURS, BASELINE, GEMMS = "#0b6e4f", "#9aa5b1", "#e0a100"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1c2330 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem } figure { margin: 1rem 0 }
figcaption, .note { color: #5b6675; font-size: 0.9rem }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #e5e8ec }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr.ours { font-weight: 600; color: #0b6e4f }
svg { max-width: 100%; height: auto }
"""


def _svg(draw: Callable[[Any], None], width: float, height: float, columns: int = 1) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "0"}):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
        for a in axes if columns > 1 else [axes]:
            a.spines[["top", "right"]].set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _colour(variant: str) -> str:
    return OURS if is_ours(variant) else GEMMS if variant == GEMM_ONLY else BASELINE


def _bars(rows: list[dict]) -> str:
    """Time (left) and peak memory (right) of every variant of a case, fastest first."""
    done = fastest_first(rows)[::-1]  # the axis points upwards

    def draw(axes: Any) -> None:
        left, right = axes
        places = range(len(done))
        colours = [_colour(r["variant"]) for r in done]
        left.barh(places, [r["median_ms"] for r in done], color=colours, height=0.7,
                  xerr=[r["iqr_ms"] / 2 for r in done], error_kw={"elinewidth": 1, "ecolor": "#1c2330"})  # fmt: skip
        left.set_yticks(places, [r["variant"] for r in done])
        left.set_xlim(0, 1.22 * max(r["median_ms"] + r["iqr_ms"] / 2 for r in done))
        for i, r in enumerate(done):
            label = format_time(r["median_ms"])
            if r["ratio_to_gemm_only"] is not None:
                label += f"  {r['ratio_to_gemm_only']:.2f}×" * (r["variant"] != GEMM_ONLY)
            elif r["speedup"] is not None and r["variant"] != r["relative_to"]:
                label += f"  speed-up {r['speedup']:.2f}"
            left.annotate(label, (r["median_ms"] + r["iqr_ms"] / 2, i), (4, 0), textcoords="offset points", va="center")
        left.set(title="time (line: IQR; ×: of the bare GEMMs)", xlabel="ms")
        sizes = [(r["peak_bytes"] or 0) / 2**20 for r in done]
        right.barh(places, sizes, color=colours, height=0.7)
        right.set_yticks(places, [])
        right.set_xlim(0, 1.25 * max(*sizes, 1e-9))
        for i, (r, size) in enumerate(zip(done, sizes, strict=True)):
            if r["peak_bytes"]:
                right.annotate(format_size(r["peak_bytes"]), (size, i), (4, 0), textcoords="offset points", va="center")
        right.set(title="peak memory of the call", xlabel="MB")

    return _svg(draw, 10.5, 0.9 + 0.32 * len(done), 2)


def _curve(rows: list[dict], letter: str) -> str:
    """Time and peak memory against one letter of the shape, both axes logarithmic."""
    from matplotlib.ticker import LogLocator

    def draw(axes: Any) -> None:
        variants = list(dict.fromkeys(r["variant"] for r in rows))
        for axis, key, scale, label in zip(
            axes, ("median_ms", "peak_bytes"), (1.0, 2.0**-20), ("ms", "MB"), strict=True
        ):
            drawn: list[str] = []
            for v in variants:
                points = sorted((r["shape"][letter], r[key] * scale) for r in rows if r["variant"] == v and r[key])
                if points:
                    style = ("o-", "s--", "^:")[drawn.count(_colour(v)) % 3]  # several share a colour
                    axis.plot(*zip(*points, strict=True), style, color=_colour(v), label=v, markersize=4)
                    drawn.append(_colour(v))
            ticks = sorted({r["shape"][letter] for r in rows})
            axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=label)
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axis.grid(True, color="#e5e8ec", linewidth=0.7)
        axes[0].set_title("time")
        axes[1].set_title("peak memory")
        axes[0].legend(frameon=False)

    return _svg(draw, 9.0, 3.2, 2)


def _roofline(found: dict, device_dtype: str) -> str:
    """FLOP/s of every variant against FLOPs per byte, below the two measured lines."""
    peak, bandwidth = found["measured"]["flops_per_second"][device_dtype], found["measured"]["bytes_per_second"]
    rows = [
        r
        for r in found["rows"]
        if r["median_ms"] is not None and r["dtype"] == device_dtype and r["bytes"] and r["flops"]
    ]

    def draw(axis: Any) -> None:
        intensities = [r["flops"] / r["bytes"] for r in rows]
        low, high = min(*intensities, peak / bandwidth) / 2, max(*intensities, peak / bandwidth) * 2
        line = [low, peak / bandwidth, high]
        axis.plot(line, [min(peak, x * bandwidth) / 1e9 for x in line], color="#1c2330", linewidth=1)
        for kind, name in ((BASELINE, "baselines"), (GEMMS, "bare GEMMs"), (OURS, "ours")):
            points = [(x, r["flops"] / r["median_ms"] / 1e6) for x, r in zip(intensities, rows, strict=True)
                      if _colour(r["variant"]) == kind]  # fmt: skip
            if points:
                axis.scatter(*zip(*points, strict=True), s=22, color=kind, label=name, alpha=0.85, edgecolors="white")
        axis.set(xscale="log", yscale="log", xlabel="least FLOPs per least byte", ylabel="GFLOP/s of useful work")
        axis.legend(frameon=False)
        axis.grid(True, color="#e5e8ec", linewidth=0.7)

    return _svg(draw, 7.0, 3.6)


def _table(rows: list[dict]) -> str:
    speedup = f"× faster than {rows[0]['relative_to']}"
    head = ["", "median", "IQR", "× GEMMs", speedup, "roofline", "peak memory", "error", "gradient", "version"]
    lines = []
    for r in fastest_first(rows):
        cells = [
            r["variant"], format_time(r["median_ms"]), format_time(r["iqr_ms"]),
            format_number(r["ratio_to_gemm_only"]), format_number(r["speedup"]), f"{100 * r['roofline']:.0f}%",
            format_size(r["peak_bytes"]), format_number(r["error"], ".0e"),
            format_number(r.get("gradient_error"), ".0e"), r["version"],
        ]  # fmt: skip
        lines.append((cells, is_ours(r["variant"])))
    notes = [f"{r['variant']}: {r['skipped']}" for r in rows if r["skipped"]]
    notes += [format_details(r) for r in rows if r["details"]]
    return "\n".join([_html_table(head, lines), *(f'<div class="note">{html.escape(note)}</div>' for note in notes)])


def _html_table(head: list[str], lines: list[tuple[list[str], bool]]) -> str:
    """`lines`: cells, and whether the line is emphasised."""
    rows = ["<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    for cells, emphasised in lines:
        style = ' class="ours"' if emphasised else ""
        rows.append(f"<tr{style}>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "\n".join([*rows, "</table>"])


def _overview(groups: dict[str, list[dict]]) -> str:
    """One line a case: our default backend beside the fastest baseline."""
    head = ["ours", "× GEMMs", "× faster", "than the fastest baseline", "memory, ours", "baseline’s"]
    lines = []
    for name, rows in groups.items():
        done = [r for r in rows if r["median_ms"] is not None]
        ours = next((r for r in done if is_ours(r["variant"])), None)
        baseline = next((r for r in fastest_first(rows) if _colour(r["variant"]) == BASELINE), None)
        if ours is None:
            lines.append(([f"{name}: not run", *[""] * 5], False))
            continue
        gain = [f"{baseline['median_ms'] / ours['median_ms']:.2f}", baseline["variant"]] if baseline else ["", ""]
        sizes = [format_size(r["peak_bytes"]) if r else "" for r in (ours, baseline)]
        lines.append(([name, format_number(ours["ratio_to_gemm_only"]), *gain, *sizes], False))
    return _html_table(head, lines)


def write_report(found: dict, path: Path) -> None:
    """Writes the report of `suite.bench`'s results."""
    groups = by_case([row for row in found["rows"] if not row["curve"]])
    curves: dict[str, list[dict]] = {}
    for row in found["rows"]:
        if row["curve"]:
            fixed = " ".join(f"{k}={v}" for k, v in row["shape"].items() if k != row["curve"])
            title = f"{row['op']} {row['job']} against {row['curve']} ({fixed}, {row['dtype']})"
            curves.setdefault(title, []).append(row)
    sections = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>autoregembed benchmarks</title>',
        f"<style>{STYLE}</style><h1>autoregembed benchmarks</h1>",
        f"<p>{html.escape(summary(found))}<br>{html.escape(found['time'])}"
        + (" · <b>quick run: tiny sizes, the numbers mean nothing</b>" if found["quick"] else "")
        + "</p>",
        '<p class="note">The outputs of all variants are checked in float64. Then the variants of a case run '
        "interleaved, with cold caches. “gemm_only” is the bare matrix products of the job. Roofline is the time that "
        "the least FLOPs and bytes of the job take at this machine’s measured rates, over the median. Memory is the "
        "peak of the call.</p>",
        _overview(groups),
    ]
    for name, rows in groups.items():
        sections.append(f"<h2>{html.escape(name)}</h2><p class=note>{html.escape(rows[0]['inputs'])}</p>")
        if any(r["median_ms"] is not None for r in rows):
            sections.append(f"<figure>{_bars(rows)}</figure>")
        sections.append(_table(rows))
    if curves:
        sections.append("<h2>Scaling curves</h2>")
    for name, rows in curves.items():
        if len({r["shape"][rows[0]["curve"]] for r in rows}) > 1:
            plot = _curve(rows, rows[0]["curve"])
            sections.append(f"<figure>{plot}<figcaption>{html.escape(name)}</figcaption></figure>")
    sections.append("<h2>Roofline</h2>")
    for dtype in found["measured"]["flops_per_second"]:
        if any(r["dtype"] == dtype and r["median_ms"] is not None for r in found["rows"]):
            sections.append(f"<figure>{_roofline(found, dtype)}<figcaption>{dtype}</figcaption></figure>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sections) + "</html>\n", encoding="utf-8")
