"""DPO's log-probabilities of completions: from hidden states to one number per sequence, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import linear_logprob, reference

from . import workload
from .baselines.linear_logprob import trl as trl_logprob
from .harness import (
    GEMM_ONLY,
    OURS,
    Case,
    ForwardBackward,
    Inputs,
    gemm_only,
    is_gpu,
    require,
    training_dtype,
    version,
)

# (hidden (S, L, D), weight (V, D), ids (S, L), completion (S, L) bool) -> (S,)
Logps = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _packed(function: Callable[..., Tensor]) -> Logps:
    """`linear_logprob`, or its specification, on the completion tokens."""

    def logps(hidden: Tensor, weight: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
        cu_seqlens = F.pad(completion.sum(1).cumsum(0), (1, 0))
        return function(hidden[completion], weight, ids[completion], cu_seqlens=cu_seqlens)

    return logps


def _trl_fused(device: str, compact: bool) -> Logps:
    """The fused head of TRL's trainers. They score completions alone on a GPU, and every position on a CPU."""
    function = trl_logprob(device)

    def all_positions(hidden: Tensor, weight: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
        found = function(hidden.flatten(0, 1), weight, ids.flatten()).view(completion.shape)
        return found.masked_fill(~completion, 0).sum(1)

    def completions(hidden: Tensor, weight: Tensor, ids: Tensor, completion: Tensor) -> Tensor:
        found = function(hidden[completion], weight, ids[completion])
        return found.new_zeros(completion.shape).masked_scatter(completion, found).sum(1)

    return completions if compact else all_positions


def _trl_logits() -> Logps:
    select = require("trl.trainer.utils", "trl").selective_log_softmax
    return lambda hidden, weight, ids, completion: (select(hidden @ weight.T, ids) * completion).sum(1)


def dpo_case(s: int, length: int, d: int, v: int, trainable: bool, device: str) -> Case:
    """S sequences of L positions, about half of them completion, a fifth padding; row t scores ids[t]."""
    dtype, gpu = training_dtype(device), is_gpu(device)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(length // 8, length // 2, (s, 1), generator=generator)
    end = torch.randint(5 * length // 8, length + 1, (s, 1), generator=generator)
    position = torch.arange(length)
    completion = ((position >= prompt) & (position < end)).to(device)
    n = int(completion.sum())
    upstream = torch.randn(s, generator=generator).to(device)
    gemms = 4 if trainable else 2
    described: list[str] = []

    def make() -> Inputs:
        made = workload.linear_logprob_inputs(s * length, d, v, device, dtype)
        described[:] = [made.describe]
        hidden, ids = made.hidden.view(s, length, d), made.target.view(s, length)
        if trainable:
            return Inputs([hidden, made.weight], (ids, completion), upstream)
        return Inputs([hidden], (made.weight, ids, completion), upstream)

    def prepare(case: Case) -> None:
        job.inputs()
        case.inputs = f"{described[0]}, {n} completion tokens of {s * length} positions"

    def operands() -> tuple[Tensor, Tensor]:
        leaves, constants, _ = job.inputs()
        return leaves[0][completion], leaves[1] if trainable else constants[0]

    job = ForwardBackward(make, _packed(reference.linear_logprob), 1e-4 if dtype == torch.float32 else 2e-2)
    trl = version("trl")
    variants = {
        GEMM_ONLY: gemm_only(operands, 3 if trainable else 2),
        OURS: job.variant(lambda: _packed(linear_logprob)),
        "trl": job.variant(lambda: _trl_fused(device, compact=gpu), trl, "fused head of its trainers"),
        "trl selective_log_softmax": job.variant(_trl_logits, trl, "all logits"),
    }
    if not gpu:
        variants["trl, completions only"] = job.variant(lambda: _trl_fused(device, compact=True), trl)
    return Case(
        op="dpo", job="trainable head" if trainable else "frozen head",
        shape={"S": s, "L": length, "D": d, "V": v}, dtype=dtype, variants=variants,
        flops=2.0 * gemms * n * v * d, bytes=float(dtype.itemsize * gemms * (v * d + n * d)),
        prepare=prepare, check=job.check, relative_to="trl", rounds=11 if gpu else 7, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    shape = (16, 1024, 4096, 128256) if is_gpu(device) else (2, 192, 576, 49152)
    for trainable in (False, True):
        yield partial(dpo_case, *((4, 16, 32, 500) if quick else shape), trainable, device)
