"""The losses of `autoregembed.integrations` beside the stock ones, called as the trainers call them.

The encoder is left out: both sides receive its outputs, so the difference is that of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed import reference

from .baselines.info_nce import TEMPERATURE, PassThrough
from .harness import OURS, Case, ForwardBackward, Inputs, is_gpu, require, version

K = 5


def ranking_case(b: int, d: int, negatives: int, device: str) -> Case:
    """FusedInfoNCELoss beside MultipleNegativesRankingLoss: columns of embeddings to loss and gradients."""

    def make() -> Inputs:
        generator = torch.Generator().manual_seed(0)
        columns = [torch.randn(b, d, generator=generator).to(device) for _ in range(2 + negatives)]
        # So close that the softmax is peaked, not so close that the loss, a difference of two numbers, is near 0.
        columns[1] = 0.3 * columns[0] + 0.95 * columns[1]
        return Inputs(columns)

    def build(module: str, name: str) -> Callable[..., Tensor]:
        loss = getattr(require(module, "sentence-transformers"), name)(PassThrough(), scale=1 / TEMPERATURE)
        return lambda *columns: loss([{"sentence_embedding": x} for x in columns], None)

    def specification(query: Tensor, *passages: Tensor) -> Tensor:
        return reference.info_nce(query, torch.cat(passages), temperature=TEMPERATURE)

    job = ForwardBackward(make, specification, 1e-4)
    p, stock = b * (1 + negatives), "MultipleNegativesRankingLoss"
    ours = partial(build, "autoregembed.integrations.sentence_transformers", "FusedInfoNCELoss")
    return Case(
        suite="integrations", op="ranking", job="sentence-transformers", shape={"B": b, "P": p, "D": d},
        inputs=f"Gaussian embeddings, {negatives} hard negatives a query",
        variants={
            OURS: job.variant(ours),
            stock: job.variant(partial(build, "sentence_transformers.losses", stock), version("sentence-transformers")),
        },
        flops=6.0 * b * p * d, bytes=8.0 * (b + p) * d, check=job.check, relative_to=stock, rounds=7,
        device=device,
    )  # fmt: skip


def _logits(model: Any, num_items: int, z: Tensor, labels: Tensor) -> Tensor:
    """Stage 1 without this library: a padded batch, all logits, cross-entropy."""
    ids = labels[:, :-1].clamp(min=0)  # the last eos is a label, never an input
    inputs = torch.cat([z, model.get_input_embeddings()(ids)], 1)
    mask = torch.cat([labels.new_ones(len(labels), K), (labels[:, :-1] >= 0).long()], 1)
    logits = model(inputs_embeds=inputs, attention_mask=mask, logits_to_keep=labels.shape[1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / num_items


def _by_target(model: Any, z: Tensor, labels: Tensor) -> Tensor:
    """The specification: one target at a time."""
    total = z.new_zeros(())
    for i, row in enumerate(labels):
        target = row[row >= 0]
        inputs = torch.cat([z[i], model.get_input_embeddings()(target[:-1])])[None]
        logits = model(inputs_embeds=inputs).logits[0, K - 1 :]
        total = total + F.cross_entropy(logits, target, reduction="sum")
    return total / (labels >= 0).sum()


def compression_case(b: int, v: int, device: str) -> Case:
    """CompressionLossFunction beside logits and cross-entropy: hidden states to the gradient of z."""
    from autoregembed import Decoder
    from autoregembed.integrations.transformers import CompressionLossFunction
    from autoregembed.testing import tiny_model

    d = 256
    sizes: dict[str, Any] = {"hidden_size": d, "intermediate_size": 768, "head_dim": 64, "initializer_range": 0.02}
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 41, (b,), generator=generator).tolist()
    n = sum(lengths) + b

    def make() -> Inputs:
        labels = torch.full((b, max(lengths) + 1), -100)
        for row, length in enumerate(lengths):
            labels[row, :length] = torch.randint(3, v, (length,), generator=generator)
            labels[row, length] = 2
        return Inputs([torch.randn(b, K, d, generator=generator).to(device)], (labels.to(device),))

    def model() -> Any:
        return tiny_model(vocab_size=v, **sizes).to(device).requires_grad_(False)

    def ours() -> Callable[[Tensor, Tensor], Tensor]:
        function = CompressionLossFunction(Decoder(model(), eos_token_id=2), K)
        return lambda z, labels: function(SimpleNamespace(last_hidden_state=z), labels, n)

    job = ForwardBackward(make, lambda z, labels: _by_target(model().double(), z, labels), 1e-4)
    return Case(
        suite="integrations", op="compression", job="Trainer", shape={"B": b, "N": n, "D": d, "V": v},
        inputs="random 2-layer Llama, targets of 8 to 40 tokens",
        variants={
            OURS: job.variant(ours),
            "logits": job.variant(lambda: partial(_logits, model(), n), version("transformers")),
        },
        flops=4.0 * n * v * d, bytes=4.0 * v * d, check=job.check, relative_to="logits", rounds=7, device=device,
    )  # fmt: skip


def cases(device: str, quick: bool = False) -> Iterator[Callable[[], Case]]:
    if quick:
        yield partial(ranking_case, 16, 32, 1, device)
        yield partial(compression_case, 4, 512, device)
        return
    gpu = is_gpu(device)
    for b, negatives in ((128, 0), (512, 1), *([(4096, 1)] if gpu else [])):
        yield partial(ranking_case, b, 576, negatives, device)
    for b in (8, *([64] if gpu else [])):
        yield partial(compression_case, b, 49152, device)
