"""Measures tile candidates on the GPU at hand and prints the lines of kernels/triton/tiles.py that won.

    python -m bench.sweep_tiles [--kernel score] > tiles.txt

Every candidate's result is compared with the table's before it is timed (median of CUDA events, warm). Candidates that
do not fit or spill are skipped with a note on stderr. It ends with the METHODS lines: shifted or cublas for each D.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch

SIZES = {1024: (896, 151936), 0: (4096, 128256)}  # bucket of D: (D, V)
N = 8192


def candidates(kernel: str) -> Iterator:
    from autoregembed.kernels.triton.tiles import Tile

    tma = torch.cuda.get_device_capability()[0] >= 9 and torch.version.hip is None
    if kernel == "epilogue":
        for cols, warps, programs in itertools.product((4096, 8192, 16384), (8, 16, 32), (1, 2)):
            yield Tile(1, cols, warps=warps, programs=programs, registers=0 if torch.version.hip else 2048 // warps)
    else:
        for rows, cols, depth in itertools.product((64, 128, 256), (128, 256), (32, 64, 128)):
            for warps, stages in itertools.product((4, 8), (2, 3, 4, 5)):
                yield Tile(rows, cols, depth, warps, stages, tma)


def jobs(d: int, v: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """One call for each kernel that has tiles worth sweeping; each returns what must not change."""
    from autoregembed.kernels.triton import linear_logprob as head

    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, d, device="cuda", dtype=dtype, generator=generator)
    # Peaked like a language model's: the target's logit stands about 10 above the rest.
    weight = torch.randn(v, d, device="cuda", dtype=dtype, generator=generator) / d**0.5
    target = torch.randint(v, (N,), device="cuda", generator=generator)
    weight[target] += 10 * hidden / d
    logits = torch.empty(1024, v, device="cuda").normal_(generator=generator)
    e = torch.empty(1024, v, device="cuda", dtype=dtype)
    logprob = torch.empty(1024, device="cuda")

    def epilogue() -> torch.Tensor:
        head.epilogue(logits, e, target[:1024], logprob)  # the targets' logits are −inf from the second call on
        return e

    def gradient(method: str) -> torch.Tensor:
        return head.forward(hidden, weight, target, None, None, 1.0, -100, True, method)[1]

    return {
        "epilogue": epilogue,
        "score": lambda: head.score(hidden, weight, target),
        "emit": lambda: gradient("shifted"),
        "cublas": lambda: gradient("cublas"),
    }


def main() -> None:
    from triton.testing import do_bench

    from autoregembed.kernels.triton import tiles

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", choices=["epilogue", "score", "emit"])
    given = parser.parse_args()
    part = tiles.architecture(torch.device("cuda"))
    best: dict[str, float] = {}
    for bucket, (d, v) in SIZES.items():
        calls = jobs(d, v, torch.bfloat16)
        for kernel in given.kernel or ["epilogue", "score", "emit"]:
            bits = 32 if kernel == "epilogue" else 16
            key = (kernel, part, bits, 0 if kernel == "epilogue" else bucket)
            if kernel == "epilogue" and bucket:
                continue
            calls[kernel]()
            expected = calls[kernel]().float()
            start = tiles.TABLE.get(key)
            winner, least = None, float("inf")
            for tile in candidates(kernel):
                tiles.TABLE[key] = tile
                try:
                    found = calls[kernel]().float()
                    error = ((found - expected).norm() / expected.norm()).item()
                    assert error < 1e-2, f"wrong result: {error}"
                    time = do_bench(calls[kernel], warmup=20, rep=100, return_mode="median")
                except Exception as reason:
                    print(f"{key} {tuple(tile)}: {str(reason)[:120]}", file=sys.stderr)
                    continue
                print(f"{key} {tuple(tile)}: {time:.3f} ms", file=sys.stderr)
                if time < least:
                    winner, least = tile, time
            if winner is not None:
                tiles.TABLE[key] = winner
                print(f"    {key}: {winner!r},  # {least:.3f} ms, {torch.cuda.get_device_name()}", flush=True)
            elif start is not None:
                tiles.TABLE[key] = start
        best = {m: do_bench(calls[c], return_mode="median") for m, c in (("cublas", "cublas"), ("shifted", "emit"))}
        print(f"METHODS {(part, 16, bucket)}: {min(best, key=best.__getitem__)!r}  # {best}", flush=True)


if __name__ == "__main__":
    main()
