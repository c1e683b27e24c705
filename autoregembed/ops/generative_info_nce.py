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
    """InfoNCE over likelihoods in place of cosines: which of the passages does z_i describe?

        x_ij = (log p(d_j | z_i) − marginal_j) / (n_j · temperature)
        "passages":  loss = mean_i −log softmax_j(x_ij)[target_i],         j over the scored passages
        "queries":   loss = mean_i −log softmax_i'(x_i'j)[i], j = target_i, i' over the queries with a score of j

    How likely d_j is anyway dominates log p(d_j | z_i), and is the same for every query. `num_tokens` removes the
    length of d_j from that, not how common its words are; `marginal` removes all of it, and in "queries" it cancels.

    Every scored pair is one decoder pass over d_j's tokens: all pairs of a batch of B cost B times what the pairs
    (z_i, d_i) cost, and M chosen negatives 1 + M times. `Decoder.logprob(..., token_budget)` scores any number of pairs
    in the memory of one pass:

        query, passage = chosen.nonzero(as_tuple=True)  # chosen (B, P) bool, the positives among them
        flat = decoder.logprob(z, [targets[j] for j in passage], query, token_budget)
        loss = generative_info_nce(flat.new_zeros(B, P).masked_scatter(chosen, flat), mask=chosen)

    Args:
        scores: (B, P), log p(d_j | z_i) in nats, summed over tokens.
        target: (B,) int64 or int32, the positive's column; by default query i belongs to passage i, P ≥ B.
        temperature: positive; 1 by default. A floating-point tensor, () or (1,), gets its gradient.
        num_tokens: n_j (P,), tokens of each passage with its eos. Scores are then compared per token; compared by their
            sums, the shortest passage often wins. None: n_j = 1.
        mask: (B, P) bool, False where a pair has no score; the values there are never read. None: all have one.
        passage_ids: (P,) int64, equal for equal passages. A passage with the id of a query's positive is no negative of
            that query.
        direction: "passages", "queries" (another query with the same positive is no negative), or "both", their mean.
        marginal: "none"; "batch", the log of the sum over the batch's queries with a score, temperature · n_j ·
            logsumexp_i scores_ij / (temperature · n_j), through which the gradient goes; or log p(d_j), (P,) floats.

    Returns:
        () float32 (float64 for float64 scores); 0 attached to the graph for B = 0.

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
    """`generative_info_nce` with its options fixed; a temperature that is an `nn.Parameter` is one of the module's."""

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
