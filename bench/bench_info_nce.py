"""InfoNCE with in-batch and hard negatives, forward and backward of both sides."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import info_nce, reference

from .harness import FLOOR, OURS, Case, Variant, relative_error, replay, version
from .workload import Unavailable

TEMPERATURE = 0.05


def _eager(query: Tensor, passages: Tensor) -> Tensor:
    scores = F.normalize(query, dim=-1) @ F.normalize(passages, dim=-1).T / TEMPERATURE
    return F.cross_entropy(scores.float(), torch.arange(len(query), device=query.device))


class _Embedded(torch.nn.Module):
    """What sentence-transformers' losses take for a model, when the embeddings are there already."""

    def __getitem__(self, place: int) -> torch.nn.Module:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def _sentence_transformers(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of sentence-transformers, by its class' name, on embeddings that are there already."""
    try:
        losses = importlib.import_module("sentence_transformers.losses")
    except ImportError as error:
        raise Unavailable("sentence-transformers is not installed") from error
    model: Any = _Embedded()
    loss = getattr(losses, name)(model, scale=1 / TEMPERATURE)
    if name.startswith("Cached"):  # what it does between its two passes over the texts, mini_batch_size rows at a time
        return lambda q, p: loss.calculate_loss([[q], [p]])
    return lambda q, p: loss([{"sentence_embedding": q}, {"sentence_embedding": p}], None)


def _inf_cl(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    if not version("inf-cl"):
        raise Unavailable("inf-cl is not installed")
    if device == "cpu":
        raise Unavailable("inf-cl needs a GPU")
    flash = importlib.import_module("inf_cl").cal_flash_loss
    scale = torch.tensor(1 / TEMPERATURE, device=device)
    return lambda q, p: flash(F.normalize(q, dim=-1), F.normalize(p, dim=-1), scale=scale).mean()


def info_nce_case(
    b: int, d: int, device: str, dtype: torch.dtype, *, passages: int | None = None, rounds: int = 5,
    curve: str | None = None
) -> Case:  # fmt: skip
    p = passages or b
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(b, d, generator=generator).to(device, dtype)
    # Positives at cosine 0.6: a trained model's, so that the softmax is peaked.
    other = torch.randn(p, d, generator=generator).to(device, dtype)
    other[:b] = 0.6 * query + 0.8 * other[:b]

    def call(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable:
        def run():
            leaves = [x.detach().requires_grad_() for x in (query, other)]
            value = loss(*leaves)
            value.backward()
            return value.detach(), *(x.grad for x in leaves)

        return run

    exact: list[tuple[Tensor, ...]] = []

    def check(name: str, outputs: tuple[Tensor, ...]) -> float:
        if not exact:
            leaves = [x.double().requires_grad_() for x in (query, other)]
            value = reference.info_nce(*leaves, temperature=TEMPERATURE)
            exact.append((value.detach(), *torch.autograd.grad(value, leaves)))
        error = max(relative_error(x, y) for x, y in zip(outputs, exact[0], strict=True))
        room = 1e-3 if dtype == torch.float32 else 5e-2
        assert error <= room, f"relative error {error:.1e}, expected {room:.0e}"
        return error

    def floor() -> Callable[[], Any]:
        scores = torch.empty(b, p, device=device, dtype=dtype)
        left, right = torch.empty_like(query), torch.empty_like(other)

        def gemms():
            torch.mm(query, other.T, out=scores)
            torch.mm(scores, other, out=left)
            torch.mm(scores.T, query, out=right)

        return gemms

    kind, st = device.split(":")[0], version("sentence-transformers")
    variants = {
        FLOOR: Variant(floor, note="3 bare GEMMs"),
        OURS: Variant(lambda: call(lambda q, x: info_nce(q, x, temperature=TEMPERATURE))),
        "eager": Variant(lambda: call(_eager), torch.__version__),
        "compiled": Variant(lambda: call(torch.compile(_eager, dynamic=False)), torch.__version__),
        "sentence-transformers": Variant(
            lambda: call(_sentence_transformers("MultipleNegativesRankingLoss")), st, "MultipleNegativesRankingLoss"
        ),
        "sentence-transformers, cached": Variant(
            lambda: call(_sentence_transformers("CachedMultipleNegativesRankingLoss")), st, "its loss on embeddings"
        ),
        "inf-cl": Variant(lambda: call(_inf_cl(kind)), version("inf-cl")),
    }
    if p != b:
        for name in ("sentence-transformers", "sentence-transformers, cached", "inf-cl"):
            del variants[name]
    if curve:
        variants = {name: variants[name] for name in (FLOOR, OURS, "eager")}
    size = query.element_size()
    return Case(
        suite="head", op="info_nce", job="gradient", shape={"B": b, "P": p, "D": d}, dtype=str(dtype)[6:],
        inputs="Gaussian, positives at cosine 0.6", variants=variants, flops=6.0 * b * p * d,
        bytes=float(size * 2 * (b + p) * d), check=check, rounds=rounds, curve=curve, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    if quick:
        yield partial(info_nce_case, 16, 32, device, dtype, rounds=3)
        return
    if gpu:
        for b, d in ((2048, 896), (4096, 4096), (16384, 4096)):
            yield partial(info_nce_case, b, d, device, dtype, rounds=11)
    else:
        yield partial(info_nce_case, 1024, 576, device, dtype)
        yield partial(info_nce_case, 256, 576, device, dtype, passages=2048)
    b, d = (2048, 1024) if gpu else (256, 256)
    for negatives in (1, 3, 7, 15):
        yield partial(info_nce_case, b, d, device, dtype, passages=b * (1 + negatives), curve="P")


def test_info_nce(variant, benchmark):
    replay(variant, benchmark)
