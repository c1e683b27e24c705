"""info_nce with in-batch and hard negatives, forward and backward of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from autoregembed import info_nce, reference

from .baselines.info_nce import TEMPERATURE, eager, inf_cl, memeff, sentence_transformers, siglip_eager, siglip_kernel
from .harness import (
    GEMM_ONLY,
    OURS,
    Case,
    ForwardBackward,
    Inputs,
    gemm_only,
    is_gpu,
    our_impl,
    training_dtype,
    version,
)

EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
JOBS: dict[str, dict[str, Any]] = {
    "symmetric": {"directions": EVERY[::2], "partition_mode": "per_direction"},
    "four directions, margin 0.1": {"directions": EVERY, "margin": 0.1},
}


def info_nce_case(
    b: int,
    d: int,
    device: str,
    *,
    passages: int | None = None,
    rounds: int = 5,
    curve: str | None = None,
    dtype: torch.dtype | None = None,
    extra: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None,
    job: str = "gradient",
) -> Case:
    """`extra`: further baselines by name. `job`: "gradient", or a name of JOBS for further directions and a margin."""
    p, dtype = passages or b, dtype or training_dtype(device)
    options = {"temperature": TEMPERATURE, **JOBS.get(job, {})}
    plain = job == "gradient"

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(b, d, generator=generator).to(device, dtype)
        # A trained model's positives have a cosine of about 0.6, which makes the softmax peaked.
        other = torch.randn(p, d, generator=generator).to(device, dtype)
        other[:b] = 0.6 * query + 0.8 * other[:b]
        return Inputs([query, other])

    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        query, other = run.inputs().leaves
        return query, other

    # Float64 logits of the specification at once only where they fit; tests hold the torch backend to it.
    specification = reference.info_nce if b * p <= 2**30 else partial(info_nce, impl="torch")
    run = ForwardBackward(make, partial(specification, **options), 1e-3 if dtype == torch.float32 else 5e-2)
    st, ranking = version("sentence-transformers"), "MultipleNegativesRankingLoss"
    variants = {
        OURS: run.variant(lambda: partial(info_nce, impl=our_impl() if plain else "auto", **options)),
        **run.eager(eager if plain else partial(reference.info_nce, **options), compiled=plain and not curve),
    }
    if plain:
        variants[GEMM_ONLY] = gemm_only(operands, 3)
    if p == b and not curve and plain:
        variants |= {
            "sentence-transformers": run.variant(lambda: sentence_transformers(ranking), st, ranking),
            "sentence-transformers, cached": run.variant(
                lambda: sentence_transformers(f"Cached{ranking}"), st, "its loss on embeddings"
            ),
            "inf-cl": run.variant(lambda: inf_cl(device), version("inf-cl")),
            "memeff": run.variant(lambda: memeff(device), version("memeff")),
        }
    variants |= {name: run.variant(partial(lambda f: f, f)) for name, f in (extra or {}).items()}
    pairs = b * (p + sum(p if x.endswith("doc") else b for x in options.get("directions", ())[1:]))
    return Case(
        op="info_nce", shape={"B": b, "P": p, "D": d}, dtype=dtype, inputs="Gaussian, positives at cosine 0.6",
        variants=variants, flops=6.0 * pairs * d, bytes=float(dtype.itemsize * 2 * (b + p) * d), job=job,
        check=run.check, rounds=rounds, curve=curve, device=device,
    )  # fmt: skip


def siglip_case(b: int, d: int, device: str, *, rounds: int = 5) -> Case:
    """siglip-kernel at its own loss, whose three GEMMs are those of InfoNCE; we have no such loss."""
    dtype = training_dtype(device)

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        query, other = (torch.randn(b, d, generator=generator) for _ in range(2))
        return Inputs([query.to(device, dtype), (0.6 * query + 0.8 * other).to(device, dtype)])

    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        query, other = job.inputs().leaves
        return query, other

    job = ForwardBackward(make, siglip_eager, 1e-3 if dtype == torch.float32 else 5e-2)
    variants = {
        GEMM_ONLY: gemm_only(operands, 3),
        **job.eager(siglip_eager),
        "siglip-kernel": job.variant(lambda: siglip_kernel(device), version("siglip-kernel")),
    }
    return Case(
        op="siglip", shape={"B": b, "D": d}, dtype=dtype, inputs="Gaussian, positives at cosine 0.6",
        variants=variants, flops=6.0 * b * b * d, bytes=float(dtype.itemsize * 4 * b * d),
        check=job.check, rounds=rounds, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    if quick:
        yield partial(info_nce_case, 16, 32, device)
        for job in JOBS:
            yield partial(info_nce_case, 16, 32, device, job=job)
        yield partial(siglip_case, 16, 32, device)
        return
    if is_gpu(device):
        for b, d in ((2048, 896), (4096, 4096), (16384, 4096), (65536, 768)):
            yield partial(info_nce_case, b, d, device, rounds=11)
        for job in JOBS:
            yield partial(info_nce_case, 16384, 768, device, rounds=11, job=job)
        yield partial(siglip_case, 16384, 896, device, rounds=11)
    else:
        yield partial(info_nce_case, 1024, 576, device)
        yield partial(info_nce_case, 256, 576, device, passages=2048)
        for job in JOBS:
            yield partial(info_nce_case, 1024, 576, device, job=job)
    b, d = (2048, 1024) if is_gpu(device) else (256, 256)
    for negatives in (1, 3, 7, 15):
        yield partial(info_nce_case, b, d, device, passages=b * (1 + negatives), curve="P")
