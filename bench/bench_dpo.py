"""DPO's log-probabilities of completions: from hidden states to one number per sequence, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import linear_logprob, reference

from . import workload
from .harness import FLOOR, OURS, Case, Variant, relative_error, replay, version
from .workload import Unavailable

# (hidden (S, L, D), weight (V, D), ids (S, L), completion (S, L) bool) -> (S,)
Logps = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _ours(hidden: Tensor, weight: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
    cu_seqlens = F.pad(completion.sum(1).cumsum(0), (1, 0))
    return linear_logprob(hidden[completion], weight, ids[completion], cu_seqlens=cu_seqlens)


def _trl(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable("trl is not installed" if not version("trl") else str(error)) from error


def _trl_fused(compact: bool) -> Logps:
    """The fused head of TRL's trainers; it scores completions alone on a GPU, and every position on a CPU."""
    function = _trl("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
        rows = hidden[completion] if compact else hidden.flatten(0, 1)
        labels = ids[completion] if compact else ids.flatten()
        found = function.apply(rows, weight, None, labels, 1.0, 8192, None, 1.0, ())[0]
        if compact:
            return found.new_zeros(completion.shape).masked_scatter(completion, found).sum(1)
        return found.view(completion.shape).masked_fill(~completion, 0).sum(1)

    return logps


def _trl_logits() -> Logps:
    select = _trl("trl.trainer.utils").selective_log_softmax
    return lambda hidden, weight, ids, completion: (select(hidden @ weight.T, ids) * completion).sum(1)


def dpo_case(
    s: int, length: int, d: int, v: int, trainable: bool, device: str, dtype: torch.dtype, *, rounds: int = 3
) -> Case:
    """S sequences of L positions, about half of them completion, a fifth padding; row t scores ids[t]."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(length // 8, length // 2, (s, 1), generator=generator)
    end = torch.randint(5 * length // 8, length + 1, (s, 1), generator=generator)
    position = torch.arange(length)
    completion = ((position >= prompt) & (position < end)).to(device)
    n = int(completion.sum())
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    exact: list[Tensor] = []
    upstream = torch.randn(s, generator=generator).to(device)
    gemms = 4 if trainable else 2

    def prepare(case: Case) -> None:
        inputs = workload.head_inputs(s * length, d, v, device, dtype)
        made[:] = [(inputs.hidden.view(s, length, d), inputs.weight, inputs.target.view(s, length))]
        case.inputs = f"{inputs.describe}, {n} completion tokens of {s * length} positions"

    def call(logps: Logps) -> Callable[[], tuple[Tensor, ...]]:
        def run():
            hidden, weight, ids = made[0]
            hidden = hidden.detach().requires_grad_()
            weight = weight.detach().requires_grad_(trainable)
            out = logps(hidden, weight, ids, completion)
            out.backward(upstream.to(out.dtype))
            return out.detach(), hidden.grad, *([weight.grad] if trainable else [])

        return run

    def check(name: str, outputs: tuple[Tensor, ...]) -> float:
        if not exact:
            hidden, weight, ids = made[0]
            rows = hidden[completion].double().requires_grad_()
            w = weight.double().requires_grad_(trainable)
            bounds = F.pad(completion.sum(1).cumsum(0), (1, 0))
            out = reference.linear_logprob(rows, w, ids[completion], cu_seqlens=bounds)
            gradients = torch.autograd.grad(out, [rows, *([w] if trainable else [])], upstream.double())
            full = torch.zeros(hidden.shape, dtype=torch.float64, device=device)
            full[completion] = gradients[0]
            exact[:] = [out.detach(), full, *gradients[1:]]
        error = max(relative_error(x, y) for x, y in zip(outputs, exact, strict=True))
        room = 1e-4 if dtype == torch.float32 else 2e-2
        assert error <= room, f"relative error {error:.0e}, expected {room:.0e}"
        return error

    def floor() -> Callable[[], Any]:
        hidden, weight, _ = made[0]
        rows = hidden[completion]
        logits = torch.empty(n, v, device=device, dtype=dtype)
        d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight) if trainable else None

        def run():
            torch.mm(rows, weight.T, out=logits)
            torch.mm(logits, weight, out=d_rows)
            if trainable:
                torch.mm(logits.T, rows, out=d_weight)

        return run

    trl = version("trl")
    variants = {
        FLOOR: Variant(floor, note=f"{3 if trainable else 2} bare GEMMs over the completions"),
        OURS: Variant(lambda: call(_ours)),
        "trl": Variant(lambda: call(_trl_fused(compact=device.startswith("cuda"))), trl, "fused head of its trainers"),
        "trl selective_log_softmax": Variant(lambda: call(_trl_logits()), trl, "all logits"),
    }
    if device == "cpu":
        variants["trl, completions only"] = Variant(lambda: call(_trl_fused(compact=True)), trl)
    size = dtype.itemsize
    return Case(
        suite="head", op="dpo", job="trainable head" if trainable else "frozen head",
        shape={"S": s, "L": length, "D": d, "V": v}, dtype=str(dtype)[6:], inputs="", variants=variants,
        flops=2.0 * gemms * n * v * d, bytes=float(size * gemms * (v * d + n * d)), prepare=prepare, check=check,
        baseline="trl", rounds=rounds, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    for trainable in (False, True):
        if quick:
            yield partial(dpo_case, 4, 16, 32, 500, trainable, device, dtype)
        elif gpu:
            yield partial(dpo_case, 16, 1024, 4096, 128256, trainable, device, dtype, rounds=11)
        else:
            yield partial(dpo_case, 2, 192, 576, 49152, trainable, device, dtype, rounds=7)


def test_dpo(variant, benchmark):
    replay(variant, benchmark)
