"""Checks a result of `autoregembed bench` against the performance targets of the kernels; prints one line for each.

    python -m bench.targets bench/results/gpu-all.jsonl

A line is PASS, MISS, or OPEN where the result lacks what the target needs. Exit status 1 for a MISS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from .harness import GEMM_ONLY, is_gpu, is_ours
from .results import by_case, fastest_first, load

MEMORY_LEAN = ("compiled chunked", "cut-cross-entropy", "liger", "torch linear_cross_entropy")
Line = tuple[str, str, str]


def targets(found: dict) -> Iterator[Line]:
    """(state, target, measurement) of every target that applies to the device of the result."""
    for case, rows in by_case(found["rows"]).items():
        done = fastest_first(rows)
        ours = next((r for r in done if is_ours(r["variant"])), None)
        if ours is None or ours["curve"]:
            continue
        baselines = {
            r["variant"]: r["median_ms"] for r in done if not is_ours(r["variant"]) and r["variant"] != GEMM_ONLY
        }
        lines = _gpu_targets(ours, baselines) if is_gpu(found["device"]) else _cpu_targets(ours)
        for state, target, measurement in lines:
            yield state, f"{case}: {target}", measurement


def _verdict(good: bool, target: str, measurement: str) -> Line:
    return "PASS" if good else "MISS", target, measurement


def _faster(ours: dict, baselines: dict[str, float], names: tuple[str, ...], factor: float, target: str = "") -> Line:
    """At least `factor` times faster than every one of `names`."""
    target = target or f"at least {factor} × faster than {', '.join(names)}"
    missing = [name for name in names if name not in baselines]
    if missing:
        return "OPEN", target, f"not run: {', '.join(missing)}"
    gain = min(baselines[name] for name in names) / ours["median_ms"]
    return _verdict(gain >= factor, target, f"{gain:.2f} ×")


def _gpu_targets(ours: dict, baselines: dict[str, float]) -> Iterator[Line]:
    kind, shape, ratio = (ours["op"], ours["job"]), ours["shape"], ours["ratio_to_gemm_only"]
    d = shape.get("D", 0)
    if kind == ("linear_logprob", "gradient"):
        if d >= 4096 or d <= 896:
            limit = 1.15 if d >= 4096 else 1.4
            yield _verdict(ratio <= limit, f"at most {limit} × the bare GEMMs", f"{ratio:.2f} ×")
        yield _faster(ours, baselines, MEMORY_LEAN, 1.3)
        if shape == {"N": 8192, "D": 4096, "V": 128256}:
            peak = ours["peak_bytes"] / 1e6
            yield _verdict(peak <= 600, "at most 600 MB beyond inputs", f"{peak:.0f} MB")
    elif kind == ("linear_logprob", "scalar"):
        yield _faster(ours, baselines, ("quack sum",), 1.0, "not slower than quack")
    elif kind == ("linear_logprob", "score") and d >= 4096:
        yield _verdict(1 / ratio >= 0.85, "at least 85% of the GEMM's rate", f"{100 / ratio:.0f}%")
    elif kind == ("info_nce", "gradient") and shape == {"B": 16384, "P": 16384, "D": 4096}:
        yield _faster(ours, baselines, ("inf-cl",), 3.0)
        yield _faster(ours, baselines, ("eager",), 1.0)


def _cpu_targets(ours: dict) -> Iterator[Line]:
    kind, shape, ratio, speedup = (ours["op"], ours["job"]), ours["shape"], ours["ratio_to_gemm_only"], ours["speedup"]
    if kind == ("linear_logprob", "gradient") and (shape["D"], shape["V"]) == (576, 49152):
        yield _verdict(ratio <= 1.35, "at most 1.35 × the bare GEMMs", f"{ratio:.2f} ×")
        yield _verdict(speedup >= 2, "at least 2 × faster than eager", f"{speedup:.2f} ×")
        logits, peak = 4 * shape["N"] * shape["V"], ours["peak_bytes"]
        yield _verdict(peak < logits, "no (N, V) tensor", f"{peak / 1e6:.0f} MB")
    elif kind == ("step", "stage2"):
        yield _verdict(speedup >= 2.5, "at least 2.5 × faster than released", f"{speedup:.2f} ×")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--any-device", action="store_true", help="exit status 0 also for a MISS or without any target")
    options = parser.parse_args()
    lines = list(targets(load(options.result)))
    for line in lines:
        print("{}  {}: {}".format(*line))
    if not lines:
        print("no target applies to this result")
    missed = not lines or any(state == "MISS" for state, _, _ in lines)
    return int(missed and not options.any_device)


if __name__ == "__main__":
    sys.exit(main())
