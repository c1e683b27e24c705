"""10,000 random shapes of linear_logprob and info_nce against float64, and the worst error of each backend and dtype.

    python tests/random_shapes.py --count 10000 --json shapes.json

The error is given as a share of what the numeric rule allows (`autoregembed.testing.assert_accurate`). Above 1 it
breaks the rule, and the exit status is 1. The seed of a shape is its number, so `--first N --count 1` repeats one.
Triton's kernels run in its interpreter, hence on smaller shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from autoregembed import info_nce, linear_logprob, ops, reference

# Edges of tiles and vectors, and what lies between them.
SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 257]
VOCABULARIES = [2, 3, 17, 64, 100, 257, 1000, 1024, 4099]


def share(found: Tensor, eager: Tensor, exact: Tensor, slack: float) -> float:
    """max|found − exact| over what the rule allows; inf for a NaN."""
    eps = torch.finfo(found.dtype).eps
    allowed = 2 * ((eager.double() - exact).abs().max() + eps * exact.abs().max()) + slack
    result = float((found.double() - exact).abs().max() / allowed.clamp(min=1e-300))
    return result if result == result else float("inf")


def gradients(function, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def draw(choices: list[int], generator: torch.Generator, impl: str) -> int:
    choices = [x for x in choices if impl != "triton" or x <= 129]
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def head(generator: torch.Generator, impl: str, dtype: torch.dtype) -> tuple[dict, float]:
    n, d, v = (draw(x, generator, impl) for x in (SIZES, SIZES, VOCABULARIES))
    width = 10 ** float(torch.empty(()).uniform_(-2, 2, generator=generator))  # of the logits
    h = (width * torch.randn(n, d, generator=generator) / d**0.5).to(dtype)
    w = torch.randn(v, d, generator=generator).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < 0.1] = -100
    upstream = torch.randn(n, generator=generator)
    found = gradients(lambda x: linear_logprob(x, w, target, impl=impl), [h], upstream)
    eager, exact = (
        gradients(lambda x, t=t: reference.linear_logprob(x, w.to(t), target), [h.to(t)], upstream)
        for t in (torch.float32, torch.float64)
    )
    top = 4 * torch.finfo(torch.float32).eps * float((h.double() @ w.double().T).abs().max())
    slacks = top, top * float(upstream.abs().max() * w.abs().max())
    worst = max(share(*parts, slack) for *parts, slack in zip(found, eager, exact, slacks, strict=True))
    return {"N": n, "D": d, "V": v}, worst


def contrastive(generator: torch.Generator, impl: str, dtype: torch.dtype) -> tuple[dict, float]:
    b, d, more = (draw(x, generator, impl) for x in (SIZES, SIZES[1:], SIZES))
    p = b + more
    temperature = 10 ** float(torch.empty(()).uniform_(-2, 0, generator=generator))
    leaves = [torch.randn(rows, d, generator=generator).to(dtype) for rows in (b, p)]
    found = gradients(lambda q, x: info_nce(q, x, temperature=temperature, impl=impl), leaves, torch.ones(()))
    eager, exact = (
        gradients(
            lambda q, x: reference.info_nce(q, x, temperature=temperature), [x.to(t) for x in leaves], torch.ones(())
        )
        for t in (torch.float32, torch.float64)
    )
    # Similarities are rounded before they are divided by the temperature; a gradient passes through 1 / |x| as well.
    top = 4 * torch.finfo(torch.float32).eps / temperature
    factors = [1.0, *(1 / (temperature * float(x.double().norm(dim=1).min())) for x in leaves)]
    parts = zip(found, eager, exact, factors, strict=True)
    return {"B": b, "P": p, "D": d}, max(share(x, y, z, top * f) for x, y, z, f in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds = [
        (op, impl, dtype)
        for op, impls in (("linear_logprob", ("cpp", "torch", "triton")), ("info_nce", ("torch", "triton")))
        for impl in impls
        for dtype in (torch.float32, torch.bfloat16)
        # Triton's interpreter multiplies bf16 wrongly.
        if ops.available_impls("cpu", dtype)[impl] == "ok" and (impl, dtype) != ("triton", torch.bfloat16)
    ]
    worst: dict[str, dict] = {}
    begin = time.monotonic()
    for number in range(options.first, options.first + options.count):
        op, impl, dtype = kinds[number % len(kinds)]
        generator = torch.Generator().manual_seed(number)
        shape, error = (head if op == "linear_logprob" else contrastive)(generator, impl, dtype)
        name = f"{op} {impl} {str(dtype).removeprefix('torch.')}"
        entry = worst.setdefault(name, {"shapes": 0, "broken": [], "worst": -1.0})
        entry["shapes"] += 1
        if not error <= 1:
            entry["broken"].append(number)
        if error > entry["worst"]:
            entry |= {"worst": error, "number": number, "shape": shape}
    for name, entry in worst.items():
        print(
            f"{name:32}  {entry['shapes']:>6} shapes, worst error {entry['worst']:.2f} of the allowed, {entry['shape']}"
        )
    print(f"{options.count} shapes in {time.monotonic() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(worst, indent=1) + "\n", encoding="utf-8")
    broken = [number for entry in worst.values() for number in entry["broken"]]
    if broken:
        print(f"the rule is broken by shapes {broken[:20]}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
