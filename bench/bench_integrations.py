"""The losses of `autoregembed.integrations` beside the stock ones, called as the trainers call them.

The encoder is left out: both sides get its outputs, so what differs is what the loss itself takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import reference

from .bench_info_nce import TEMPERATURE, _Embedded
from .harness import OURS, Case, Variant, relative_error, replay, version
from .workload import Unavailable


def _close(error: float) -> float:
    assert error <= 1e-4, f"relative error {error:.1e}, expected 1e-4"
    return error


def ranking_case(b: int, d: int, negatives: int, device: str, *, rounds: int = 7) -> Case:
    """FusedInfoNCELoss beside MultipleNegativesRankingLoss: columns of embeddings to loss and gradients."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randn(b, d, generator=generator).to(device) for _ in range(2 + negatives)]
    # So close that the softmax is peaked, not so close that the loss, a difference of two numbers, is near 0.
    columns[1] = 0.3 * columns[0] + 0.95 * columns[1]

    def build(name: str) -> Callable[[], Any]:
        try:
            if name == OURS:
                make = importlib.import_module("autoregembed.integrations.sentence_transformers").FusedInfoNCELoss
            else:
                make = importlib.import_module("sentence_transformers.losses").MultipleNegativesRankingLoss
        except ImportError as error:
            raise Unavailable("sentence-transformers is not installed") from error
        loss = make(_Embedded(), scale=1 / TEMPERATURE)

        def run():
            leaves = [x.detach().requires_grad_() for x in columns]
            value = loss([{"sentence_embedding": x} for x in leaves], None)
            value.backward()
            return value.detach(), *(x.grad for x in leaves)

        return run

    def check(name: str, outputs: tuple[Tensor, ...]) -> float:
        leaves = [x.double().requires_grad_() for x in columns]
        value = reference.info_nce(leaves[0], torch.cat(leaves[1:]), temperature=TEMPERATURE)
        exact = (value.detach(), *torch.autograd.grad(value, leaves))
        return _close(max(relative_error(x, y) for x, y in zip(outputs, exact, strict=True)))

    p = b * (1 + negatives)
    stock = "MultipleNegativesRankingLoss"
    return Case(
        suite="integrations", op="ranking", job="sentence-transformers", shape={"B": b, "P": p, "D": d},
        dtype="float32", inputs=f"Gaussian embeddings, {negatives} hard negatives a query",
        variants={
            OURS: Variant(partial(build, OURS)),
            stock: Variant(partial(build, stock), version("sentence-transformers")),
        },
        flops=6.0 * b * p * d, bytes=8.0 * (b + p) * d, check=check, baseline=stock, rounds=rounds, device=device,
    )  # fmt: skip


class _Logits:
    """Stage 1 as it is written without this library: a padded batch, all logits, cross-entropy."""

    def __init__(self, model: Any, k: int):
        self.model, self.k = model, k

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        model = self.model
        z = outputs.last_hidden_state[:, -self.k :]
        ids = labels[:, :-1].clamp(min=0)  # the last eos is a label, never an input
        inputs = torch.cat([z, model.get_input_embeddings()(ids)], 1)
        mask = torch.cat([labels.new_ones(len(labels), self.k), (labels[:, :-1] >= 0).long()], 1)
        hidden = model(inputs_embeds=inputs, attention_mask=mask, logits_to_keep=labels.shape[1]).logits
        total = F.cross_entropy(hidden.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return total / num_items_in_batch


def compression_case(b: int, v: int, device: str, *, rounds: int = 7, longest: int = 40) -> Case:
    """CompressionLossFunction beside logits and cross-entropy: hidden states to the gradient of z."""
    from autoregembed import Decoder
    from autoregembed.integrations.transformers import CompressionLossFunction
    from autoregembed.testing import tiny_model

    k, d = 5, 256
    sizes: dict[str, Any] = {"hidden_size": d, "intermediate_size": 768, "head_dim": 64, "initializer_range": 0.02}
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, longest + 1, (b,), generator=generator).tolist()
    labels = torch.full((b, longest + 1), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.randint(3, v, (length,), generator=generator)
        labels[row, length] = 2
    labels = labels[:, : max(lengths) + 1].to(device)
    n = sum(lengths) + b
    z = torch.randn(b, k, d, generator=generator).to(device)

    def model() -> Any:
        return tiny_model(vocab_size=v, **sizes).to(device).requires_grad_(False)

    def call(function: Any, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
        def run():
            hidden = z.to(dtype).detach().requires_grad_()
            value = function(SimpleNamespace(last_hidden_state=hidden), labels, n)
            value.backward()
            return value.detach(), hidden.grad

        return run

    exact: list[Any] = []

    def check(name: str, outputs: tuple[Tensor, ...]) -> float:
        if not exact:
            lm = model().double()
            exact.extend(_in_double(lm, z.double(), labels, k))
        return _close(max(relative_error(x, y) for x, y in zip(outputs, exact, strict=True)))

    return Case(
        suite="integrations", op="compression", job="Trainer", shape={"B": b, "N": n, "D": d, "V": v},
        dtype="float32", inputs="random 2-layer Llama, targets of 8 to 40 tokens",
        variants={
            OURS: Variant(lambda: call(CompressionLossFunction(Decoder(model(), eos_token_id=2), k))),
            "logits": Variant(lambda: call(_Logits(model(), k)), version("transformers")),
        },
        flops=4.0 * n * v * d, bytes=4.0 * v * d, check=check, baseline="logits", rounds=rounds, device=device,
    )  # fmt: skip


def _in_double(model: Any, z: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of z in float64, one target at a time."""
    z = z.requires_grad_()
    total = z.new_zeros(())
    for i, row in enumerate(labels):
        target = row[row >= 0]
        inputs = torch.cat([z[i], model.get_input_embeddings()(target[:-1])])[None]
        logits = model(inputs_embeds=inputs).logits[0, k - 1 :]
        total = total + F.cross_entropy(logits, target, reduction="sum")
    loss = total / int((labels >= 0).sum())
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    if quick:
        yield partial(ranking_case, 16, 32, 1, device, rounds=3)
        yield partial(compression_case, 4, 512, device, rounds=3)
        return
    gpu = device.startswith("cuda")
    for b, negatives in ((128, 0), (512, 1), *([(4096, 1)] if gpu else [])):
        yield partial(ranking_case, b, 576, negatives, device)
    for b in (8, *([64] if gpu else [])):
        yield partial(compression_case, b, 49152, device)


def test_integrations(variant, benchmark):
    replay(variant, benchmark)
