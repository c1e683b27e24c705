"""Other implementations of InfoNCE, each through its public API: (query (B, D), passages (P, D)) to the loss ()."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness import require, require_gpu

TEMPERATURE = 0.05
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0

Loss = Callable[[Tensor, Tensor], Tensor]


def eager(query: Tensor, passages: Tensor) -> Tensor:
    scores = F.normalize(query, dim=-1) @ F.normalize(passages, dim=-1).T / TEMPERATURE
    return F.cross_entropy(scores.float(), torch.arange(len(query), device=query.device))


class PassThrough(torch.nn.Module):
    """Stands for the model in a loss of sentence-transformers: its features already hold the embeddings."""

    def __getitem__(self, index: int) -> torch.nn.Module:
        return self

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features


def sentence_transformers(name: str) -> Loss:
    """A loss of sentence-transformers, by the name of its class."""
    model: Any = PassThrough()
    loss = getattr(require("sentence_transformers.losses", "sentence-transformers"), name)(model, scale=1 / TEMPERATURE)
    if name.startswith("Cached"):  # the part between its two passes over the texts, mini_batch_size rows at a time
        return lambda q, p: loss.calculate_loss([[q], [p]])
    return lambda q, p: loss([{"sentence_embedding": q}, {"sentence_embedding": p}], None)


def memeff(device: str) -> Loss:
    """Its loss with in-batch negatives of one direction: no margin, no q–q or d–d block, the textbook's gradient."""
    require_gpu(device, "memeff")
    return require("memeff", "memeff").MemoryEfficientQwen3Loss(temperature=TEMPERATURE, margin=2.0, stable=False)


def siglip_eager(query: Tensor, passages: Tensor) -> Tensor:
    """The sigmoid loss at siglip-kernel's initial temperature and bias: −Σ log σ(± (10 q·p − 10)) / B."""
    z = SIGLIP_SCALE * F.normalize(query, dim=-1) @ F.normalize(passages, dim=-1).T + SIGLIP_BIAS
    z = z.float() if z.dtype != torch.float64 else z
    sign = 2 * torch.eye(len(z), device=z.device, dtype=z.dtype) - 1
    return -F.logsigmoid(sign * z).sum() / len(z)


def siglip_kernel(device: str) -> Loss:
    require_gpu(device, "siglip-kernel")
    function = require("siglip_kernel", "siglip-kernel").fused_siglip_loss
    scale = torch.tensor(math.log(SIGLIP_SCALE), device=device)
    bias = torch.tensor(SIGLIP_BIAS, device=device)
    return lambda q, p: function(F.normalize(q, dim=-1), F.normalize(p, dim=-1), scale, bias)


def inf_cl(device: str) -> Loss:
    require_gpu(device, "inf-cl")
    flash = require("inf_cl", "inf-cl").cal_flash_loss
    scale = torch.tensor(1 / TEMPERATURE, device=device)
    return lambda q, p: flash(F.normalize(q, dim=-1), F.normalize(p, dim=-1), scale=scale).mean()
