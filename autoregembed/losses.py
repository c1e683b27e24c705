"""Losses as pure functions and as `nn.Module` twins; the pure forms of the ops live in `ops`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autoregembed import ops
from autoregembed.ops import AlignmentOutput, alignment_loss, info_nce, linear_logprob

__all__ = [
    "AlignmentLoss",
    "AlignmentOutput",
    "CompressionLoss",
    "InfoNCELoss",
    "LinearLogprob",
    "alignment_loss",
    "compression_loss",
    "info_nce",
    "linear_logprob",
]


def compression_loss(logprob: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Token mean of −log p(output | z): stage 1 of AutoRegEmbed (arXiv 2502.11401, §3.2).

    Args:
        logprob: (S,) log-probabilities of whole targets, nats.
        num_tokens: (S,) the tokens of each target with its eos, or their total.

    Returns:
        () nats per token; 0 attached to the graph when there is no token.
    """
    total = num_tokens.sum().clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
    return -logprob.sum() / total


class LinearLogprob(nn.Module):
    """`linear_logprob` with its options fixed."""

    def __init__(
        self, *, softcap: float | None = None, scale: float = 1.0, ignore_index: int = -100, impl: str = "auto"
    ):
        super().__init__()
        self.options: dict[str, Any] = {"softcap": softcap, "scale": scale, "ignore_index": ignore_index, "impl": impl}

    def forward(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S+1,)
        gradient_rows: int | None = None,
    ) -> Tensor:
        return ops.linear_logprob(
            hidden, weight, target, bias=bias, cu_seqlens=cu_seqlens, gradient_rows=gradient_rows, **self.options
        )


class CompressionLoss(nn.Module):
    """`compression_loss` as a module."""

    def forward(self, logprob: Tensor, num_tokens: Tensor | int) -> Tensor:  # (S,), (S,)
        return compression_loss(logprob, num_tokens)


class AlignmentLoss(nn.Module):
    """`alignment_loss` with its options fixed; returns `AlignmentOutput`."""

    def __init__(
        self,
        *,
        beta: float = 0.1,
        temperature: float = 0.1,
        reference: str = "add",
        negatives: str = "independent",
        impl: str = "auto",
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "beta": beta,
            "temperature": temperature,
            "reference": reference,
            "negatives": negatives,
            "impl": impl,
        }

    def forward(
        self,
        query_positive: Tensor,  # (B,)
        positive_positive: Tensor,  # (B,)
        query_negatives: Tensor,  # (B, M)
        reference_positive: Tensor | None = None,  # (B,)
        reference_negatives: Tensor | None = None,  # (B, M)
        negative_mask: Tensor | None = None,  # (B, M)
    ) -> AlignmentOutput:
        return ops.alignment_loss(
            query_positive,
            positive_positive,
            query_negatives,
            reference_positive,
            reference_negatives,
            negative_mask=negative_mask,
            **self.options,
        )


class InfoNCELoss(nn.Module):
    """`info_nce` with its options fixed."""

    def __init__(self, *, temperature: float = 0.05, impl: str = "auto"):
        super().__init__()
        self.options: dict[str, Any] = {"temperature": temperature, "impl": impl}

    def forward(
        self,
        query: Tensor,  # (B, D)
        passages: Tensor,  # (P, D)
        target: Tensor | None = None,  # (B,)
        passage_ids: Tensor | None = None,  # (P,)
    ) -> Tensor:
        return ops.info_nce(query, passages, target, passage_ids=passage_ids, **self.options)
