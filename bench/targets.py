"""Holds a result of `autoregembed bench` against the bars that the kernels were built for; prints one line each.

    python -m bench.targets bench/results/nvidia-h200.json

A line is PASS, MISS, or OPEN where the result lacks what the bar needs. Exit status 1 for a MISS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from .harness import FLOOR, is_ours
from .suite import load


def _best_ours(rows: list[dict]) -> dict | None:
    return min((r for r in rows if is_ours(r["variant"])), key=lambda r: r["median_ms"], default=None)


def targets(found: dict) -> Iterator[tuple[str, str, str]]:
    """(state, what is asked, what was found) of every bar that applies to the device of the result."""
    groups: dict[str, list[dict]] = {}
    for row in found["rows"]:
        if row["median_ms"] is not None:
            groups.setdefault(row["case"], []).append(row)
    gpu = found["device"].startswith("cuda")

    def verdict(good: bool) -> str:
        return "PASS" if good else "MISS"

    for case, rows in groups.items():
        ours = _best_ours(rows)
        if ours is None or ours["curve"]:
            continue
        peers = [r for r in rows if not is_ours(r["variant"]) and r["variant"] != FLOOR]
        kind = (ours["op"], ours["job"])
        d = ours["shape"].get("D", 0)
        ratio = ours["ratio_to_floor"]
        if gpu and kind == ("head", "gradient"):
            if d >= 4096 or d <= 896:
                limit = 1.15 if d >= 4096 else 1.4
                yield verdict(ratio <= limit), f"{case}: at most {limit} × floor", f"{ratio:.2f} ×"
            known = {"compiled chunked", "torch linear_cross_entropy", "cut-cross-entropy", "liger"}
            lean = [r for r in peers if r["variant"] in known]
            asked = f"{case}: at least 1.3 × faster than {', '.join(sorted(known))}"
            if {r["variant"] for r in lean} == known:
                gain = min(r["median_ms"] for r in lean) / ours["median_ms"]
                yield verdict(gain >= 1.3), asked, f"{gain:.2f} ×"
            else:
                yield "OPEN", asked, f"not run: {', '.join(sorted(known - {r['variant'] for r in lean}))}"
            if ours["shape"] == {"N": 8192, "D": 4096, "V": 128256}:
                peak = ours["peak_bytes"] / 1e6
                yield verdict(peak <= 600), f"{case}: at most 600 MB beyond inputs", f"{peak:.0f} MB"
        elif gpu and kind == ("head", "scalar"):
            quack = [r for r in peers if r["variant"] == "quack sum"]
            asked = f"{case}: not slower than quack"
            if quack:
                gain = quack[0]["median_ms"] / ours["median_ms"]
                yield verdict(gain >= 1), asked, f"{gain:.2f} ×"
            else:
                yield "OPEN", asked, "not run: quack sum"
        elif gpu and kind == ("head", "score") and d >= 4096:
            rate = 1 / ratio
            yield verdict(rate >= 0.85), f"{case}: at least 85% of the GEMM's rate", f"{100 * rate:.0f}%"
        elif gpu and ours["op"] == "info_nce" and ours["shape"] == {"B": 16384, "P": 16384, "D": 4096}:
            for peer, factor in (("inf-cl", 3.0), ("eager", 1.0)):
                asked = f"{case}: at least {factor} × faster than {peer}"
                other = [r for r in peers if r["variant"] == peer]
                if other:
                    gain = other[0]["median_ms"] / ours["median_ms"]
                    yield verdict(gain >= factor), asked, f"{gain:.2f} ×"
                else:
                    yield "OPEN", asked, f"not run: {peer}"
        elif not gpu and kind == ("head", "gradient") and (d, ours["shape"]["V"]) == (576, 49152):
            speedup = ours["speedup"]
            yield verdict(ratio <= 1.35), f"{case}: at most 1.35 × floor", f"{ratio:.2f} ×"
            yield verdict(speedup >= 2), f"{case}: at least 2 × faster than eager", f"{speedup:.2f} ×"
            logits = 4 * ours["shape"]["N"] * ours["shape"]["V"]
            yield (
                verdict(ours["peak_bytes"] < logits),
                f"{case}: no (N, V) tensor",
                f"{ours['peak_bytes'] / 1e6:.0f} MB",
            )
        elif not gpu and kind == ("step", "stage2"):
            yield (
                verdict(ours["speedup"] >= 2.5),
                f"{case}: at least 2.5 × faster than released",
                f"{ours['speedup']:.2f} ×",
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--any-device", action="store_true", help="exit status 0 also where no bar applies")
    options = parser.parse_args()
    lines = list(targets(load(options.result)))
    for state, asked, found in lines:
        print(f"{state}  {asked}: {found}")
    if not lines:
        print("no bar applies to this result")
        return 0 if options.any_device else 1
    return int(any(state == "MISS" for state, _, _ in lines) and not options.any_device)


if __name__ == "__main__":
    sys.exit(main())
