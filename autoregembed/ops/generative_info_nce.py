"""generative_info_nce: contrastive loss over likelihoods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.ops._checks import FLOATS, INTEGERS, require_ids, require_positive, require_tensor


def generative_info_nce(
    scores: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = spec.GENERATIVE_TEMPERATURE,
    num_tokens: Tensor | None = None,
    mask: Tensor | None = None,
    passage_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE over likelihoods in place of cosines: which of the passages does z_i describe?

        loss = mean_i −log softmax_j(log p(d_j | z_i) / (n_j · temperature))[target_i],   j over the scored passages

    Every scored pair is one decoder pass over d_j's tokens: all pairs of a batch of B cost B times what the pairs
    (z_i, d_i) cost, and M chosen negatives 1 + M times. `Decoder.logprob(..., token_budget)` scores any number of pairs
    in the memory of one pass:

        query, passage = chosen.nonzero(as_tuple=True)  # chosen (B, P) bool, the positives among them
        flat = decoder.logprob(z, [targets[j] for j in passage], query, token_budget)
        loss = generative_info_nce(flat.new_zeros(B, P).masked_scatter(chosen, flat), mask=chosen)

    Args:
        scores: (B, P), log p(d_j | z_i) in nats, summed over tokens.
        target: (B,) int64 or int32, the positive's column; by default query i belongs to passage i, P ≥ B.
        temperature: positive; 1 by default.
        num_tokens: n_j (P,), tokens of each passage with its eos. Scores are then compared per token; compared by their
            sums, the shortest passage often wins. None: n_j = 1.
        mask: (B, P) bool, False where a pair has no score; the values there are never read. None: all have one.
        passage_ids: (P,) int64, equal for equal passages. A passage with the id of a query's positive is no negative of
            that query.

    Returns:
        () float32 (float64 for float64 scores); 0 attached to the graph for B = 0.

    Raises:
        TypeError, ValueError: wrong dtype, device or shape, or a positive without a score.
        IndexError: a target outside [0, P).
    """
    require_tensor("scores", scores, FLOATS, {"B": None, "P": None})
    require_positive("temperature", temperature)
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
    require_ids("target", target, p)
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


class GenerativeInfoNCELoss(nn.Module):
    """`generative_info_nce` with its temperature fixed."""

    def __init__(self, *, temperature: float = spec.GENERATIVE_TEMPERATURE):
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
