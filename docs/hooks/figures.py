"""The figures of README and site: `python docs/hooks/figures.py` writes them to docs/img.

method.svg is drawn by hand, costs.svg by matplotlib from results in bench/results.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "img"
RESULTS = ROOT / "bench" / "results"

# ----------------------------------------------------------------------------------------------------------------------
# The method

# A card of its own keeps it legible where a page's scheme is not the reader's system's.
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1c2330 }
.name { font-weight: 600; font-size: 14px } .small { font-size: 12px; fill: #4d5867 } .middle { text-anchor: middle }
.card { fill: #ffffff; stroke: #d5dae1 } .group { fill: #f4f6f8; stroke: #d5dae1 }
.data { fill: #ffffff; stroke: #8592a3 } .trained { fill: #dbe8fb; stroke: #2f6fd0; stroke-width: 1.5 }
.frozen { fill: #e9ecf0; stroke: #6b7685; stroke-width: 1.5; stroke-dasharray: 5 3 }
.fused { fill: #d8f0e4; stroke: #0b6e4f; stroke-width: 1.5 }
.arrow { fill: none; stroke: #4d5867; stroke-width: 1.5 } .head { fill: #4d5867 }
@media (prefers-color-scheme: dark) {
  text { fill: #e8ebf0 } .small { fill: #b3bcc8 } .card { fill: #161b22; stroke: #3a4452 }
  .group { fill: #1f2630; stroke: #3a4452 } .data { fill: #161b22; stroke: #7c8899 }
  .trained { fill: #17305a; stroke: #6aa2f5 } .frozen { fill: #2b323c; stroke: #97a3b3 }
  .fused { fill: #0f3d2e; stroke: #4cc295 } .arrow { stroke: #b3bcc8 } .head { fill: #b3bcc8 }
}
"""


def box(kind: str, x: int, y: int, width: int, name: str, *lines: str, height: int = 64) -> str:
    top = y + height / 2 - 8 * len(lines) + 5
    texts = [f'<text class="name middle" x="{x + width / 2:g}" y="{top:g}">{escape(name)}</text>']
    for i, line in enumerate(lines, 1):
        texts.append(f'<text class="small middle" x="{x + width / 2:g}" y="{top + 17 * i:g}">{escape(line)}</text>')
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>' + "".join(texts)


def arrow(*points: tuple[int, int]) -> str:
    path = " L".join(f"{x} {y}" for x, y in points)
    return f'<path class="arrow" d="M{path}" marker-end="url(#head)"/>'


def text(x: int, y: int, line: str, kind: str = "small") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(line)}</text>'


def method() -> str:
    """The SVG of the method: encoder, z, frozen decoder, losses, and which parts are fused."""
    parts = [
        box("data", 20, 24, 190, "text · instruction", "<EMBED0> … <EMBED4>"),
        box("trained", 240, 24, 130, "encoder", "causal LM, trained"),
        box("fused", 400, 24, 110, "pool_last_k", "last K states"),
        box("data", 540, 24, 76, "z", "K × D"),
        box("data", 646, 24, 134, "mean over K", "and normalize"),
        box("data", 810, 24, 150, "text embedding", "what search compares"),
        box("data", 330, 142, 140, "target tokens", "and their eos"),
        box("fused", 514, 142, 128, "splice", "z, then the target"),
        box("frozen", 672, 142, 118, "decoder", "same LM, frozen"),
        box("fused", 820, 142, 140, "linear_logprob", "log p(target | z)", "2 GEMMs, no logits"),
        arrow((210, 56), (240, 56)),
        arrow((370, 56), (400, 56)),
        arrow((510, 56), (540, 56)),
        arrow((616, 56), (646, 56)),
        arrow((780, 56), (810, 56)),
        arrow((578, 88), (578, 142)),
        arrow((470, 174), (514, 174)),
        arrow((642, 174), (672, 174)),
        arrow((790, 174), (820, 174)),
        text(20, 164, "The gradient passes through the decoder"),
        text(20, 182, "to z and the encoder. The decoder's"),
        text(20, 200, "weights receive none."),
        '<rect class="group" x="20" y="252" width="920" height="116" rx="9"/>',
        text(36, 274, "Losses", "name"),
        box("fused", 36, 286, 208, "compression", "stage 1: −log p(output | z)"),
        box("fused", 262, 286, 232, "alignment", "stage 2: p and n, given z_q and z_p"),
        box("fused", 512, 286, 226, "score distillation", "stage 2: log p teaches cosines"),
        box("fused", 756, 286, 168, "InfoNCE", "stage 2: cosines"),
        arrow((890, 206), (890, 252)),
        arrow((960, 56), (976, 56), (976, 310), (940, 310)),
        '<rect class="fused" x="20" y="386" width="18" height="14" rx="3"/>',
        text(46, 398, "fused op of this library"),
        '<rect class="trained" x="226" y="386" width="18" height="14" rx="3"/>',
        text(252, 398, "trained"),
        '<rect class="frozen" x="330" y="386" width="18" height="14" rx="3"/>',
        text(356, 398, "frozen"),
    ]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 Z"/></marker>'
    )
    title = "AutoRegEmbed: an encoder compresses a text into z, from which a frozen decoder scores target texts"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 416" width="990" height="416" role="img">'
        f"<title>{title}</title><style>{STYLE}</style><defs>{head}</defs>"
        '<rect class="card" x="1" y="1" width="988" height="414" rx="12"/>' + "\n".join(parts) + "</svg>\n"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Time and memory

OURS, OTHER = "#0b6e4f", "#9aa5b1"
HEAD = "linear_logprob gradient N=512 D=576 V=49152 float32 cpu"
HEAD_NAMES = {
    "autoregembed (cpp)": "autoregembed", "eager": "eager", "cut-cross-entropy": "cut-cross-entropy", "trl": "TRL",
}  # fmt: skip
STEP_NAMES = {"autoregembed": "autoregembed", "released": "released algorithm"}


def bars(file: str, case: str, names: dict[str, str]) -> list[tuple[str, float, float]]:
    """(name, seconds, bytes) of every variant in `names`, ours first."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    found = {r["variant"]: r for r in rows if r["case"] == case}
    return [(name, found[v]["median_ms"] / 1e3, found[v]["peak_bytes"]) for v, name in names.items()]


def costs() -> str:
    """The SVG of time and peak memory beside other implementations, on a CPU."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = "step stage2 B=64 micro=16 K=5 M=1 float32 cpu"
    panels = [
        ("LM head, forward + backward", 1e3, "ms", 2**20, "MB", bars("bench-cpu.json", HEAD, HEAD_NAMES)),
        ("Stage-2 step, 64 triplets", 1, "s", 2**30, "GB", bars("step-nli-64-cpu.json", step, STEP_NAMES)),
    ]
    options = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "0"}
    with plt.rc_context(options):
        figure, axes = plt.subplots(
            2, 2, figsize=(9.4, 3.2), layout="constrained", gridspec_kw={"height_ratios": [4, 2.4]}
        )
        for (left, right), (title, per_second, time_unit, per_size, size_unit, rows) in zip(axes, panels, strict=True):
            for axis, column, scale, unit in ((left, 1, per_second, time_unit), (right, 2, 1 / per_size, size_unit)):
                values = [row[column] * scale for row in rows][::-1]
                colours = [OTHER] * (len(rows) - 1) + [OURS]
                drawn = axis.barh(range(len(rows)), values, color=colours, height=0.68)
                axis.bar_label(drawn, [f"{v:.3g} {unit}" for v in values], padding=3)
                axis.set_yticks(range(len(rows)), [row[0] for row in rows][::-1] if column == 1 else [""] * len(rows))
                axis.tick_params(axis="y", length=0)
                axis.set_xticks([])
                axis.set_xlim(0, 1.2 * max(values))
                axis.spines[["top", "right", "bottom"]].set_visible(False)
                axis.set_title(f"{title}: {'time' if column == 1 else 'peak memory'}", fontsize=9, loc="left")
        figure.supxlabel("Measured on a CPU, two cores of an AMD EPYC, fp32; not on a GPU.", fontsize=9)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    drawn = out.getvalue()
    return "\n".join(line.rstrip() for line in drawn[drawn.index("<svg") :].splitlines()) + "\n"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, draw in (("method.svg", method), ("costs.svg", costs)):
        (IMAGES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
