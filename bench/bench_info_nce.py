"""info_nce with in-batch and hard negatives, forward and backward of both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from autoregembed import info_nce, reference

from .baselines.info_nce import TEMPERATURE, eager, inf_cl, sentence_transformers
from .harness import GEMM_ONLY, OURS, Case, ForwardBackward, Inputs, gemm_only, is_gpu, training_dtype, version


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
) -> Case:
    """`extra`: further baselines by name."""
    p, dtype = passages or b, dtype or training_dtype(device)

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(b, d, generator=generator).to(device, dtype)
        # A trained model's positives have a cosine of about 0.6, which makes the softmax peaked.
        other = torch.randn(p, d, generator=generator).to(device, dtype)
        other[:b] = 0.6 * query + 0.8 * other[:b]
        return Inputs([query, other])

    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        query, other = job.inputs().leaves
        return query, other

    job = ForwardBackward(
        make, partial(reference.info_nce, temperature=TEMPERATURE), 1e-3 if dtype == torch.float32 else 5e-2
    )
    st, ranking = version("sentence-transformers"), "MultipleNegativesRankingLoss"
    variants = {
        GEMM_ONLY: gemm_only(operands, 3),
        OURS: job.variant(lambda: partial(info_nce, temperature=TEMPERATURE)),
        **job.eager(eager, compiled=not curve),
    }
    if p == b and not curve:
        variants |= {
            "sentence-transformers": job.variant(lambda: sentence_transformers(ranking), st, ranking),
            "sentence-transformers, cached": job.variant(
                lambda: sentence_transformers(f"Cached{ranking}"), st, "its loss on embeddings"
            ),
            "inf-cl": job.variant(lambda: inf_cl(device), version("inf-cl")),
        }
    variants |= {name: job.variant(partial(lambda f: f, f)) for name, f in (extra or {}).items()}
    return Case(
        op="info_nce", shape={"B": b, "P": p, "D": d}, dtype=dtype, inputs="Gaussian, positives at cosine 0.6",
        variants=variants, flops=6.0 * b * p * d, bytes=float(dtype.itemsize * 2 * (b + p) * d),
        check=job.check, rounds=rounds, curve=curve, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    if quick:
        yield partial(info_nce_case, 16, 32, device)
        return
    if is_gpu(device):
        for b, d in ((2048, 896), (4096, 4096), (16384, 4096)):
            yield partial(info_nce_case, b, d, device, rounds=11)
    else:
        yield partial(info_nce_case, 1024, 576, device)
        yield partial(info_nce_case, 256, 576, device, passages=2048)
    b, d = (2048, 1024) if is_gpu(device) else (256, 256)
    for negatives in (1, 3, 7, 15):
        yield partial(info_nce_case, b, d, device, passages=b * (1 + negatives), curve="P")
