"""Losses as pure functions and as `nn.Module` twins; the pure forms of the ops live in `ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import ops
from autoregembed import reference as spec
from autoregembed.ops import AlignmentOutput, alignment_loss, info_nce, linear_logprob

__all__ = [
    "AlignmentLoss",
    "AlignmentOutput",
    "CompressionLoss",
    "GenerativeInfoNCELoss",
    "InfoNCELoss",
    "LinearLogprob",
    "alignment_loss",
    "compression_loss",
    "generative_info_nce",
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


def generative_info_nce(
    scores: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    num_tokens: Tensor | None = None,
    mask: Tensor | None = None,
    passage_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE over likelihoods in place of cosines: which of the passages does z_i tell of?

        loss = mean_i −log softmax_j(log p(d_j | z_i) / (n_j · temperature))[target_i],   j over the scored passages

    Every scored pair is one decoder pass over d_j's tokens: all pairs of a batch of B cost B times what the pairs
    (z_i, d_i) cost, and M chosen negatives 1 + M times. `Decoder.logprob(..., token_budget)` scores as many pairs as
    are wanted in the memory of one pass:

        query, passage = chosen.nonzero(as_tuple=True)  # chosen (B, P) bool, the positives among them
        flat = decoder.logprob(z, [targets[j] for j in passage], query, token_budget)
        loss = generative_info_nce(flat.new_zeros(B, P).masked_scatter(chosen, flat), mask=chosen)

    Args:
        scores: (B, P), log p(d_j | z_i) in nats, summed over tokens.
        target: (B,) int64 or int32, the positive's column; by default query i belongs to passage i, P ≥ B.
        temperature: positive.
        num_tokens: n_j (P,), tokens of each passage with its eos: scores are compared per token, or else the shortest
            passage would often win. None: n_j = 1.
        mask: (B, P) bool, False where a pair has no score; the values there are never read. None: all have one.
        passage_ids: (P,) int64, equal for equal passages: a passage with the id of a query's positive that is not the
            positive itself is no negative of that query.

    Returns:
        () float32 (float64 for float64 scores); 0 attached to the graph for B = 0.

    Raises:
        TypeError, ValueError: wrong dtype, device or shape, or a positive without a score.
        IndexError: a target outside [0, P).
    """
    ops._require_float("scores", scores)
    ops._require_shape("scores", scores, (None, None), "(B, P)")
    ops._require_positive("temperature", temperature)
    b, p = scores.shape
    if target is None:
        if p < b:
            raise ValueError(f"scores: got P = {p}, expected P ≥ B = {b}")
        target = torch.arange(b, device=scores.device)
    given: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...], tuple[int, ...], str]] = {
        "target": (target, (torch.int64, torch.int32), (b,), "(B,)"),
        "num_tokens": (num_tokens, (torch.int64, torch.int32), (p,), "(P,)"),
        "mask": (mask, (torch.bool,), (b, p), "(B, P)"),
        "passage_ids": (passage_ids, (torch.int64,), (p,), "(P,)"),
    }
    for name, (x, dtypes, shape, meaning) in given.items():
        if x is None:
            continue
        ops._require_tensor(name, x)
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {', '.join(map(str, dtypes))}")
        ops._require_like(name, x, "scores", scores, dtype=False)
        ops._require_shape(name, x, shape, meaning)
    ops._require_target(target, p, ops.NOT_IGNORED)
    target = target.long()
    if num_tokens is not None and bool((num_tokens < 1).any()):
        raise ValueError(f"num_tokens: got {int(num_tokens.min())}, expected at least 1, the eos")
    if mask is not None and not bool(mask.gather(1, target[:, None]).all()):
        row = int((~mask.gather(1, target[:, None]).squeeze(1)).nonzero()[0])
        raise ValueError(f"mask: got False for the positive of row {row}, expected True")
    work = scores if scores.dtype == torch.float64 else scores.float()  # sums of hundreds of nats, never 16 bits
    return spec.generative_info_nce(
        work, target, temperature=temperature, num_tokens=num_tokens, mask=mask, passage_ids=passage_ids
    )


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
        num_grad_rows: int | None = None,
    ) -> Tensor:
        return ops.linear_logprob(
            hidden, weight, target, bias=bias, cu_seqlens=cu_seqlens, num_grad_rows=num_grad_rows, **self.options
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
        ref_margin: str = "add",
        negatives: str = "independent",
        impl: str = "auto",
    ):
        super().__init__()
        self.options: dict[str, Any] = {
            "beta": beta,
            "temperature": temperature,
            "ref_margin": ref_margin,
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


class GenerativeInfoNCELoss(nn.Module):
    """`generative_info_nce` with its temperature fixed."""

    def __init__(self, *, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        scores: Tensor,  # (B, P)
        target: Tensor | None = None,  # (B,)
        num_tokens: Tensor | None = None,  # (P,)
        mask: Tensor | None = None,  # (B, P)
        passage_ids: Tensor | None = None,  # (P,)
    ) -> Tensor:
        return generative_info_nce(
            scores, target, temperature=self.temperature, num_tokens=num_tokens, mask=mask, passage_ids=passage_ids
        )
