"""Take (the K compress rows out of the packed encoder output) and splice (z into the decoder's packed input)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoregembed import ops

from .harness import OURS, Case, Variant, relative_error, replay

K = 5


def _pack(sequences: int, length: int, device: str) -> Tensor:
    """cu_seqlens of ragged sequences of `length` tokens on average, K at least."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(K + 1, 2 * length - K, (sequences,), generator=generator)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)


def _case(op: str, shape: dict[str, int], device: str, dtype: torch.dtype, rounds: int) -> Case:
    made: dict[str, Any] = {}

    def prepare(case: Case) -> None:
        s, d = shape["S"], shape["D"]
        cu = _pack(s, shape["L"], device)
        t = int(cu[-1])
        z_index = torch.arange(s, device=device) // 2
        ids = torch.arange(t, device=device) % 1000
        x = torch.randn(*((t, d) if op == "pool_last_k" else (s // 2 + 1, K, d)), device=device).to(dtype)
        upstream = torch.randn(*((s, K, d) if op == "pool_last_k" else (t, d)), device=device).to(dtype)
        embedding = torch.randn(1000, d, device=device).to(dtype)
        rows = cu[1:].long()[:, None] - K if op == "pool_last_k" else cu[:-1].long()[:, None]
        rows = rows + torch.arange(K, device=device)
        made.update(cu=cu, z_index=z_index, ids=ids, x=x, upstream=upstream, embedding=embedding, rows=rows)
        moved = 2 * s * K * d if op == "pool_last_k" else 2 * t * d
        case.bytes = float(dtype.itemsize * (moved + x.numel() + s * K * d))

    def ours(x: Tensor) -> Tensor:
        if op == "pool_last_k":
            return ops.pool_last_k(x, made["cu"], K)
        return ops.splice(x, made["embedding"], made["ids"], made["cu"], made["z_index"])

    def eager(x: Tensor) -> Tensor:
        if op == "pool_last_k":
            return x[made["rows"]]
        values = x[made["z_index"]].flatten(0, 1)
        return made["embedding"][made["ids"]].index_copy(0, made["rows"].flatten(), values)

    def call(function: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor | None]]:
        def run() -> tuple[Tensor, Tensor | None]:
            x = made["x"].detach().requires_grad_()
            out = function(x)
            out.backward(made["upstream"])
            return out.detach(), x.grad

        return run

    def check(name: str, outputs: tuple[Tensor, Tensor]) -> float:
        x = made["x"].double().requires_grad_()
        made["embedding"], kept = made["embedding"].double(), made["embedding"]
        exact = eager(x)
        made["embedding"] = kept
        (gradient,) = torch.autograd.grad(exact, x, made["upstream"].double())
        assert relative_error(outputs[0], exact.detach()) == 0, "rows are copied, they cannot differ"
        error = relative_error(outputs[1], gradient)
        assert error <= 4 * torch.finfo(dtype).eps, f"relative error {error:.0e}"
        return error

    variants = {OURS: Variant(lambda: call(ours)), "eager": Variant(lambda: call(eager), torch.__version__)}
    return Case(
        suite="head", op=op, job="gradient", shape={**shape, "K": K}, dtype=str(dtype)[6:], inputs="ragged pack",
        variants=variants, flops=0.0, bytes=0.0, prepare=prepare, check=check, rounds=rounds, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    shape = {"S": 8, "L": 12, "D": 32} if quick else {"S": 768, "L": 32, "D": 4096 if gpu else 576}
    for op in ("pool_last_k", "splice"):
        yield partial(_case, op, shape, device, dtype, 3 if quick else 21)


def test_splice(variant, benchmark):
    replay(variant, benchmark)
