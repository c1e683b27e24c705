"""What a stage-1 model has learned, before a stage 2 is spent on it: who finds whose passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.embedding_losses import contrastive_loss
from autoregembed.encoder import Encoder, text_embedding
from autoregembed.ops import alignment_loss
from autoregembed.teacher_scores import pair_scores, retrieval_accuracy

MEANING = {
    "rows": "queries that find their passage by log p(d | z)",
    "rows_per_token": "by log p(d | z) per token",
    "rows_minus_mean_z": "by log p(d | z) - log p(d | mean z of the block)",
    "rows_minus_marginal": "by log p(d | z) - logsumexp over the queries: what distillation teaches",
    "columns": "passages that find their query by log p(d | z)",
    "cosine": "queries that find their passage by cosine",
    "cosine_centred": "by cosine about the mean of all",
    "cosine_whitened": "by cosine of whitened embeddings",
    "variance_of_passage": "share of the scores' variance that the passage alone explains",
    "a_below_b": "pairs with log p(p | z of q) < log p(p | z of p)",
    "gradient_in_mean": "share of the alignment's gradient that moves the mean of the K vectors",
    "gradient_with_infonce": "cosine of the alignment's gradient with InfoNCE's",
    "nats_per_token": "-log p(p | z of p) per token",
    "nats_per_token_mean_z": "under the mean z of the block: above it, z says less than nothing",
}
# Shares of rows that find their own; 1 / block by chance.
FINDS = [*MEANING][:8]


def spaces(embeddings: Tensor) -> dict[str, Tensor]:
    """Embeddings (n, D) as they are, about their mean, and whitened; rows are not normalised after that.

    Whitening keeps the directions that n texts can tell from noise, those with a variance above 1e-9. "whitened" is
    left out where n ≤ D: there whitening puts all texts at the same distance from each other.
    """
    plain = embeddings.double()
    centred = plain - plain.mean(0)
    if len(plain) <= plain.shape[1]:
        return {"plain": plain, "centred": centred}
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    kept = values > 1e-9
    return {"plain": plain, "centred": centred, "whitened": centred @ vectors[:, kept] * values[kept].rsqrt()}


def probe(
    encoder: Encoder,
    decoder: Decoder,
    queries: Sequence[str],
    passages: Sequence[str],
    *,
    block: int = 12,
    token_budget: int | None = 4096,
) -> dict[str, float]:
    """Diagnostics over n (query, passage) pairs, in blocks of which every query is scored with every passage.

    Args:
        encoder, decoder: a trained encoder and its frozen decoder.
        queries, passages: n strings each, n ≥ 2; the i-th belong together.
        block: pairs of a block; chance finds the right passage in 1/block of the rows.
        token_budget: as in `Decoder.logprob`.

    Returns:
        the numbers that `MEANING` explains, by name; without `cosine_whitened` where 2n ≤ D.

    Raises:
        ValueError: fewer than two pairs, or queries and passages of different numbers.
    """
    if len(queries) != len(passages):
        raise ValueError(f"passages: got {len(passages)}, expected one for each of {len(queries)} queries")
    if len(queries) < 2 or block < 2:
        raise ValueError(f"queries: got {len(queries)} in blocks of {block}, expected at least 2")
    training = encoder.training
    encoder.eval()
    totals: dict[str, list[tuple[float, int]]] = {}
    embeddings: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(queries), block):
        if len(queries) - first < 2:
            break
        found, vectors = _block(
            encoder, decoder, queries[first : first + block], passages[first : first + block], token_budget
        )
        embeddings.append(vectors)
        for name, value in found.items():
            totals.setdefault(name, []).append((value, len(vectors[0])))
    encoder.train(training)
    out = {name: sum(v * n for v, n in parts) / sum(n for _, n in parts) for name, parts in totals.items()}
    sizes = [len(q) for q, _ in embeddings]
    joined = spaces(torch.cat([torch.cat([q for q, _ in embeddings]), torch.cat([p for _, p in embeddings])]))
    for name, space in joined.items():
        query, passage = (F.normalize(x, dim=-1).split(sizes) for x in space.split(sum(sizes)))
        hits = [_found(q @ p.T, 1) * len(q) for q, p in zip(query, passage, strict=True)]
        out["cosine" if name == "plain" else f"cosine_{name}"] = sum(hits) / sum(sizes)
    return {name: out[name] for name in MEANING if name in out}


def _found(scores: Tensor, dim: int) -> float:
    """Share of rows (dim 1) or columns (dim 0) whose largest score stands on the diagonal."""
    return float((scores.argmax(dim) == torch.arange(len(scores), device=scores.device)).float().mean())


def _block(
    encoder: Encoder, decoder: Decoder, queries: Sequence[str], passages: Sequence[str], token_budget: int | None
) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    b = len(queries)
    targets: list[Any] = decoder.tokenize(passages, num_compress_tokens=encoder.num_compress_tokens)
    with torch.no_grad():
        z = encoder(encoder.tokenize([*queries, *passages]))  # (2B, K, D)
        scores = pair_scores(decoder, z[:b], targets, token_budget).double()  # (B, B)
        length = torch.tensor([len(t) + 1 for t in targets], device=scores.device)
        own = decoder.logprob(z[b:], targets, token_budget=token_budget).double()
        mean_z = z.mean(0, keepdim=True)
        unconditional = decoder.logprob(mean_z, targets, [0] * b, token_budget).double()
    diagonal = scores.diagonal()
    deviation = scores - scores.mean()
    by_passage = deviation.mean(0).square().mean() / deviation.square().mean()
    out = {
        "rows": _found(scores, 1),
        "rows_per_token": _found(scores / length, 1),
        "rows_minus_mean_z": _found(scores - unconditional, 1),
        "rows_minus_marginal": retrieval_accuracy(scores[None]),
        "columns": _found(scores, 0),
        "variance_of_passage": float(by_passage),
        "a_below_b": float((diagonal < own).float().mean()),
        "nats_per_token": float((-own / length).mean()),
        "nats_per_token_mean_z": float((-unconditional / length).mean()),
    }
    return out | _gradients(decoder, z, targets, token_budget), (
        z[:b].double().mean(1).cpu(),
        z[b:].double().mean(1).cpu(),
    )


def _gradients(decoder: Decoder, z: Tensor, targets: list[Any], token_budget: int | None) -> dict[str, float]:
    """Where the alignment loss pulls z (2B, K, D), each query with the next one's passage as its negative."""
    b, options = len(targets), Stage2Options()
    leaf = z.detach().requires_grad_()
    owner = torch.cat([torch.arange(2 * b), torch.arange(b)])
    scores = decoder.logprob(leaf, [*targets, *targets, *targets[1:], targets[0]], owner, token_budget)
    loss = alignment_loss(scores[:b], scores[b : 2 * b], scores[2 * b :, None], ref_margin="none").loss
    (alignment,) = torch.autograd.grad(loss, leaf)
    query, passage = text_embedding(leaf.float()).split(b)
    nce = contrastive_loss(query, passage, options.contrastive_temperature, gather=False)
    (contrastive,) = torch.autograd.grad(nce, leaf)
    k = z.shape[1]
    in_mean = alignment.mean(1).square().sum() * k / alignment.square().sum()
    cosine = F.cosine_similarity(alignment.flatten(), contrastive.flatten(), dim=0)
    return {"gradient_in_mean": float(in_mean), "gradient_with_infonce": float(cosine)}
