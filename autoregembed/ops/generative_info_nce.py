"""generative_info_nce: contrastive loss over likelihoods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.ops._checks import (
    FLOATS,
    INTEGERS,
    require_counts,
    require_ids,
    require_kept,
    require_option,
    require_temperature,
    require_tensor,
)

DIRECTIONS = ("passages", "queries", "both")
MARGINALS = ("none", "batch")  # or a tensor


def generative_info_nce(
    scores: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = spec.GENERATIVE_TEMPERATURE,
    num_tokens: Tensor | None = None,
    mask: Tensor | None = None,
    passage_ids: Tensor | None = None,
    direction: str = "passages",
    marginal: str | Tensor = "none",
) -> Tensor:
    """InfoNCE over likelihoods instead of cosines: which of the passages does z_i describe?

        x_ij = (log p(d_j | z_i) − marginal_j) / (n_j · temperature)
        "passages":  loss = mean_i −log softmax_j(x_ij)[target_i],         j over the scored passages
        "queries":   loss = mean_i −log softmax_i'(x_i'j)[i], j = target_i, i' over the queries with a score of j

    Most of log p(d_j | z_i) only says how likely d_j is anyway, which is the same for every query. `num_tokens` removes
    the effect of d_j's length, but not that of how common its words are. `marginal` removes all of it; with direction
    "queries" it cancels.

    Every scored pair costs a decoder pass over d_j's tokens. Compared with the pairs (z_i, d_i) alone, all pairs of a
    batch of B cost B times as much, and M chosen negatives 1 + M times. `Decoder.logprob(..., token_budget)` scores any
    number of pairs in the memory of one pass:

        query, passage = chosen.nonzero(as_tuple=True)  # chosen (B, P) bool, the positives among them
        flat = decoder.logprob(z, [targets[j] for j in passage], query, token_budget)
        loss = generative_info_nce(flat.new_zeros(B, P).masked_scatter(chosen, flat), mask=chosen)

    Args:
        scores: (B, P), log p(d_j | z_i) in nats, summed over tokens.
        target: (B,) int64 or int32, the positive's column; by default query i belongs to passage i, P ≥ B.
        temperature: positive; 1 by default. A floating-point tensor, () or (1,), gets its gradient.
        num_tokens: n_j (P,), tokens of each passage, including its eos. Scores are then compared per token; as sums,
            they often favour the shortest passage. None: n_j = 1.
        mask: (B, P) bool, False where a pair has no score; the values there are never read. None: all pairs have one.
        passage_ids: (P,) int64, equal for equal passages. A passage with the id of a query's positive is not a negative
            of that query.
        direction: "passages", "queries" (another query with the same positive is not a negative), or "both", the mean.
        marginal: "none"; "batch", which is temperature · n_j · logsumexp_i scores_ij / (temperature · n_j) over the
            batch's scored queries and passes gradients; or log p(d_j), (P,) floats.

    Returns:
        () float32 (float64 for float64 scores); 0, attached to the graph, for B = 0.

    Raises:
        TypeError, ValueError: wrong dtype, device, shape or name, or a positive without a score.
        IndexError: a target outside [0, P).
    """
    require_tensor("scores", scores, FLOATS, {"B": None, "P": None})
    require_option("direction", direction, DIRECTIONS)
    (b, p), like = scores.shape, ("scores", scores)
    if target is None:
        if p < b:
            raise ValueError(f"scores: got P = {p}, expected P ≥ B = {b}")
        target = torch.arange(b, device=scores.device)
    require_tensor("target", target, INTEGERS, {"B": b}, like)
    if num_tokens is not None:
        require_tensor("num_tokens", num_tokens, INTEGERS, {"P": p}, like)
    if mask is not None:
        require_tensor("mask", mask, (torch.bool,), {"B": b, "P": p}, like)
    if passage_ids is not None:
        require_tensor("passage_ids", passage_ids, (torch.int64,), {"P": p}, like)
    if isinstance(marginal, Tensor):
        require_tensor("marginal", marginal, FLOATS, {"P": p}, like)
    else:
        require_option("marginal", marginal, MARGINALS)
    work = torch.promote_types(scores.dtype, torch.float32)  # sums of hundreds of nats, never 16 bits
    temperature = require_temperature(temperature, work, like)
    target = require_ids("target", target, p).long()
    if num_tokens is not None:
        num_tokens = require_counts("num_tokens", num_tokens, 1, "the eos")
    if mask is not None:
        mask = require_kept(mask, target)
    if isinstance(marginal, Tensor):
        marginal = marginal.to(work)
    return spec.generative_info_nce(
        scores.to(work), target, temperature=temperature, num_tokens=num_tokens, mask=mask, passage_ids=passage_ids,
        direction=direction, marginal=marginal,
    )  # fmt: skip


class GenerativeInfoNCELoss(nn.Module):
    """`generative_info_nce` with its options fixed; a temperature given as an `nn.Parameter` is trained with it."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = spec.GENERATIVE_TEMPERATURE,
        direction: str = "passages",
    ):
        super().__init__()
        self.temperature = temperature
        self.direction = direction

    def forward(
        self,
        scores: Tensor,  # (B, P)
        target: Tensor | None = None,  # (B,)
        num_tokens: Tensor | None = None,  # (P,)
        mask: Tensor | None = None,  # (B, P)
        passage_ids: Tensor | None = None,  # (P,)
        marginal: str | Tensor = "none",  # or (P,)
    ) -> Tensor:
        return generative_info_nce(
            scores, target, temperature=self.temperature, num_tokens=num_tokens, mask=mask, passage_ids=passage_ids,
            direction=self.direction, marginal=marginal,
        )  # fmt: skip
