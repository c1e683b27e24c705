"""The specification: every op in plain PyTorch, one formula a line, in whatever precision its inputs have.

These are the oracles of the test-suite and of `impl="reference"`. They keep the (N, V) logits and let autograd do
the rest. Equations are those of Deng et al., "Following the Autoregressive Nature of LLM Embeddings via
Compression and Alignment", EMNLP 2025 (arXiv 2502.11401).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Defaults of the ops, the config and the trainers.
BETA = 0.1  # β of alignment_loss
TEMPERATURE = 0.1  # τ of alignment_loss
INFO_NCE_TEMPERATURE = 0.05
GENERATIVE_TEMPERATURE = 1.0  # nats
DISTILLATION_TEMPERATURE = 0.05  # τ of score_distillation
TEACHER_TEMPERATURE = 3.0  # τ_g of score_distillation, nats


def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> Tensor:
    """log softmax(softcap(scale · (hidden Wᵀ + bias)))[target], (N,), or its sums over sequences, (S,)."""
    if hidden.dtype in (torch.float16, torch.bfloat16):
        hidden, weight = hidden.float(), weight.float()
    hidden = torch.where((target != ignore_index)[:, None], hidden, 0.0)  # what an ignored row holds never counts
    logits = scale * F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = target != ignore_index
    z_y = logits.gather(1, target.where(valid, 0)[:, None]).squeeze(1)
    logprob = torch.where(valid, z_y - logits.logsumexp(1), 0.0)
    if cu_seqlens is None:
        return logprob
    return segment_sum(logprob, cu_seqlens)


def segment_sum(
    x: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
) -> Tensor:
    """Σ x[cu_seqlens[i] : cu_seqlens[i + 1]] for every sequence i, (S,)."""
    sums = x.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)
    return sums.index_add(0, sequence_of_row(x.shape[0], cu_seqlens), x.double()).to(x.dtype)


def sequence_of_row(
    n: int,
    cu_seqlens: Tensor,  # (S+1,)
) -> Tensor:
    """The sequence that each of n rows belongs to, (n,)."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(n, device=cu_seqlens.device).to(cu_seqlens), right=True)


def compression_loss(
    logprob: Tensor,  # (S,)   log p(output | z)
    num_tokens: Tensor | int,  # (S,) or their total
) -> Tensor:
    """−Σ logprob / Σ num_tokens, nats per token."""
    total = num_tokens.sum().clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
    return -logprob.sum() / total


def alignment_loss(
    query_positive: Tensor,  # (B,)    a = log p(p | z_q)
    positive_positive: Tensor,  # (B,)    b = log p(p | z_p)
    query_negatives: Tensor,  # (B, M)  c_j = log p(n_j | z_q)
    reference_positive: Tensor | None = None,  # (B,)    r_a
    reference_negatives: Tensor | None = None,  # (B, M)  r_c
    *,
    beta: float = BETA,
    temperature: float = TEMPERATURE,
    ref_margin: str = "add",
    negatives: str = "independent",
    mask: Tensor | None = None,  # (B, M) bool, False where there is no negative
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, mean s1, mean s2, share of pairs with a > c), each ()."""
    a, b, c = query_positive, positive_positive, query_negatives
    pairs: Tensor | int = max(c.numel(), 1)
    rows: Tensor | int = max(a.shape[0], 1)
    if mask is not None:
        pairs, rows = mask.sum().clamp(min=1), mask.any(1).sum().clamp(min=1)

    def kept(x: Tensor, fill: float = 0.0) -> Tensor:
        return x if mask is None else torch.where(mask, x, fill)

    margin = a[:, None] - kept(c)
    signed: Tensor | float = 0.0
    if ref_margin != "none":
        assert reference_positive is not None
        assert reference_negatives is not None
        reference_margin = reference_positive[:, None] - kept(reference_negatives)
        signed = reference_margin if ref_margin == "add" else -reference_margin
    s1 = torch.sigmoid(beta * (a - b).abs())
    s2 = torch.sigmoid(beta * (margin + signed))
    x = (s1[:, None] - s2) / temperature
    if negatives == "independent":
        softplus = torch.logaddexp(x, torch.zeros_like(x))  # F.softplus drops e^−x above x = 20
        loss = kept(softplus).sum() / pairs
    else:
        joint = torch.cat([x.new_zeros(x.shape[0], 1), kept(x, -torch.inf)], 1).logsumexp(1)
        loss = joint.sum() / rows
    with torch.no_grad():
        mean_s1 = s1.sum() / max(a.shape[0], 1)
        mean_s2 = kept(s2).sum() / pairs
        accuracy = kept((margin > 0).to(loss.dtype)).sum() / pairs
    return loss, mean_s1, mean_s2, accuracy


def conditional_compression(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    num_tokens: Tensor | int | None = None,  # () or a number; None: the targets that are not ignored
    ignore_index: int = -100,
    **head: Any,
) -> Tensor:
    """`compression_loss` of `linear_logprob`."""
    logprob = linear_logprob(hidden, weight, target, ignore_index=ignore_index, **head)
    return compression_loss(logprob, (target != ignore_index).sum() if num_tokens is None else num_tokens)


def conditional_alignment(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S+1,)
    pairs: tuple[Tensor, Tensor, Tensor],  # sequences of a (B,), b (B,), c (B, M), −1 where there is no negative
    reference_positive: Tensor | None = None,  # (B,)    r_a
    reference_negatives: Tensor | None = None,  # (B, M)  r_c
    *,
    logprob_reduction: str = "sum",
    beta: float = BETA,
    temperature: float = TEMPERATURE,
    ref_margin: str = "add",
    negatives: str = "independent",
    **head: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`alignment_loss` of the scores that `linear_logprob` gives."""
    scores = linear_logprob(hidden, weight, target, cu_seqlens=cu_seqlens, **head)
    if logprob_reduction == "mean":
        scores = scores / cu_seqlens.diff()
    a, b, c = (scores[index.clamp(min=0)] for index in pairs)
    return alignment_loss(
        a, b, c, reference_positive, reference_negatives, mask=pairs[2] >= 0, beta=beta, temperature=temperature,
        ref_margin=ref_margin, negatives=negatives,
    )  # fmt: skip


def info_nce(
    query: Tensor,  # (B, D)
    passages: Tensor,  # (P, D)
    target: Tensor | None = None,  # (B,)
    *,
    temperature: float | Tensor = INFO_NCE_TEMPERATURE,
    passage_ids: Tensor | None = None,  # (P,)
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    margin: float | None = None,
) -> Tensor:
    """Mean over queries of log Z_i − cos(q_i, p_i) / temperature; p_i is passage target_i, passage i by default.

    Z_i = Σ exp(cos / temperature) over the texts of all `directions`; "per_direction": the mean of each one's log Z_i.
    What has the id of p_i is no negative (a query has that of its positive), nor what has cos > cos(q_i, p_i) + margin.
    """
    if target is None:
        target = torch.arange(len(query), device=query.device)
    if len(query) == 0:
        return query.sum() + passages[:0].sum()
    q, p = F.normalize(query, dim=-1), F.normalize(passages, dim=-1)
    ids = torch.arange(len(p), device=q.device) if passage_ids is None else passage_ids
    at, own = target[:, None], ids[target]
    column = torch.arange(max(len(q), len(p)), device=q.device)
    cos_y = (q @ p.T).gather(1, at)
    logits = []
    for direction in directions:
        left = q if direction.startswith("query") else p[target]
        right, right_ids = (p, ids) if direction.endswith("doc") else (q, own)
        cos = left @ right.T
        negative = right_ids[None, :] != own[:, None]
        if margin is not None:
            negative = negative & (cos <= cos_y + margin)
        kept = negative
        if direction in ("query_to_doc", "doc_to_query"):
            positive = at if direction == "query_to_doc" else column[: len(q), None]
            kept = negative | (column[None, : len(right)] == positive)
        logits.append((cos / temperature).masked_fill(~kept, -torch.inf))
    sums = [torch.cat(logits, 1)] if partition_mode == "joint" else logits
    log_z = torch.stack([x.logsumexp(1) for x in sums]).mean(0)
    return (log_z - cos_y.squeeze(1) / temperature).mean()


def kept_logsumexp(x: Tensor, mask: Tensor, dim: int) -> Tensor:
    """logsumexp over what the mask keeps, 0 where that is nothing; `dim` stays. Nothing else of x is read."""
    some = mask.any(dim, keepdim=True)
    lse = torch.where(mask, x, torch.where(some, -torch.inf, 0.0)).logsumexp(dim, keepdim=True)
    return torch.where(some, lse, 0.0)


def generative_info_nce(
    scores: Tensor,  # (B, P)  log p(d_j | z_i)
    target: Tensor | None = None,  # (B,)
    *,
    temperature: float | Tensor = GENERATIVE_TEMPERATURE,
    num_tokens: Tensor | None = None,  # (P,)
    mask: Tensor | None = None,  # (B, P) bool, False where the pair has no score
    passage_ids: Tensor | None = None,  # (P,)
    direction: str = "passages",
    marginal: str | Tensor = "none",  # or log p(d_j), (P,)
) -> Tensor:
    """With x_ij = (scores_ij − marginal_j) / (n_j · temperature), the mean over queries i with the positive j of
    −log softmax_j'(x_ij')[j] ("passages"), of −log softmax_i'(x_i'j)[i] ("queries"), or half of each ("both")."""
    if target is None:
        target = torch.arange(scores.shape[0], device=scores.device)
    if scores.shape[0] == 0:
        return scores.sum()
    positive = torch.arange(scores.shape[1], device=scores.device)[None, :] == target[:, None]
    same = positive if passage_ids is None else passage_ids[target][:, None] == passage_ids[None, :]
    mask = torch.ones_like(positive) if mask is None else mask
    x = torch.where(mask, scores, 0.0)
    if isinstance(marginal, Tensor):
        x = x - marginal[None, :]
    x = x / temperature
    if num_tokens is not None:
        x = x / num_tokens[None, :]
    if isinstance(marginal, str) and marginal == "batch":
        x = x - kept_logsumexp(x, mask, 0)
    own = x.gather(1, target[:, None]).squeeze(1)
    loss: Tensor = x.new_zeros(())
    if direction in ("passages", "both"):
        loss = loss + (kept_logsumexp(x, mask & (positive | ~same), 1).squeeze(1) - own).mean()
    if direction in ("queries", "both"):
        # Column i: what every query gives the positive of query i. Another query with that positive is no negative.
        others = ~same[:, target] | torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
        loss = loss + (kept_logsumexp(x[:, target], mask[:, target] & others, 0).squeeze(0) - own).mean()
    return loss / 2 if direction == "both" else loss


def score_distillation(
    query: Tensor,  # (B, D)
    passages: Tensor,  # (P, D)
    scores: Tensor,  # (B, P)  log p(d_j | z_i) of a frozen teacher
    *,
    temperature: float | Tensor = DISTILLATION_TEMPERATURE,
    teacher_temperature: float = TEACHER_TEMPERATURE,
    mask: Tensor | None = None,  # (B, P) bool, False where the pair does not count
    target: Tensor | None = None,  # (B,), −1 where no positive is known
    mixture: float = 1.0,
    marginal: str | Tensor = "batch",  # or log p(d_j), (P,)
) -> Tensor:
    """½ mean_i CE(T_i, softmax_j cos_ij/τ) + ½ mean_j CE(T'_j, softmax_i cos_ij/τ), over rows and columns with a pair.

    T_i = softmax_j(scores_ij/τ_g − marginal_j) and T'_j = softmax_i(scores_ij/τ_g), mixed with known positives.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    x = F.normalize(query, dim=-1) @ F.normalize(passages, dim=-1).T / temperature
    s = torch.where(mask, scores, 0.0) / teacher_temperature
    by_column = s - kept_logsumexp(s, mask, 0)  # log T'
    if isinstance(marginal, Tensor):
        s = s - marginal[None, :] / teacher_temperature
    elif marginal == "batch":
        s = by_column
    rows = torch.where(mask, s - kept_logsumexp(s, mask, 1), -torch.inf).exp()  # T
    columns = torch.where(mask, by_column, -torch.inf).exp()  # T'
    if target is not None:
        positive = (target[:, None] == torch.arange(scores.shape[1], device=scores.device)[None, :]).to(s.dtype)
        owners = positive.sum(0)
        rows = torch.where(target[:, None] >= 0, mixture * rows + (1 - mixture) * positive, rows)
        shared = positive / owners.clamp(min=1)
        columns = torch.where(owners > 0, mixture * columns + (1 - mixture) * shared, columns)

    def mean(weights: Tensor, dim: int) -> Tensor:
        """The mean of −Σ weights · log softmax(x) over those that the mask leaves a pair."""
        terms = torch.where(mask, weights * (kept_logsumexp(x, mask, dim) - x), 0.0)
        return terms.sum() / mask.any(dim).sum().clamp(min=1)

    return (mean(rows, 1) + mean(columns, 0)) / 2


def pool_last_k(
    hidden: Tensor,  # (T, D)
    cu_seqlens: Tensor,  # (B+1,)
    k: int,
    index: Tensor | None = None,  # any number of sequences
) -> Tensor:
    """The last K rows of the sequences `index` (all, in order, by default), (len(index), K, D)."""
    ends = cu_seqlens[1:] if index is None else cu_seqlens[1:][index]
    return hidden[ends[:, None] + torch.arange(-k, 0, device=ends.device)]


def splice(
    z: Tensor,  # (B, K, D)
    embedding: Tensor,  # (V, D)
    ids: Tensor,  # (T,)
    cu_seqlens: Tensor,  # (S+1,)
    z_index: Tensor | None = None,  # (S,)
    *,
    offset: int = 0,
    embedding_scale: float = 1.0,
) -> Tensor:
    """Per pair s: embedding rows of `offset` ids, the K rows of z[z_index[s]], embedding rows of the rest; (T, D)."""
    s = sequence_of_row(ids.shape[0], cu_seqlens)
    j = torch.arange(ids.shape[0], device=ids.device) - cu_seqlens[s] - offset
    of_z = (j >= 0) & (j < z.shape[1])
    rows = z[s if z_index is None else z_index[s], j.where(of_z, 0)].to(embedding.dtype)
    return torch.where(of_z[:, None], rows, embedding[ids.where(~of_z, 0)] * embedding_scale)
