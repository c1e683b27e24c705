"""The losses of stage 2 that read embeddings alone: InfoNCE and score distillation."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from autoregembed import distributed
from autoregembed.config import Stage2Options
from autoregembed.ops import info_nce, score_distillation
from autoregembed.packing import Ids, index_on
from autoregembed.teacher_scores import log_marginal


def text_keys(texts: Sequence[Ids]) -> list[int]:
    """An integer of 63 bits for each text, equal where the texts are."""
    return [xxhash.xxh3_64_intdigest(array("q", ids).tobytes()) >> 1 for ids in texts]


def contrastive_loss(
    query: Tensor,
    passages: Tensor,
    temperature: float,
    *,
    texts: Sequence[Ids] | None = None,
    gather: bool = True,
    **options: Any,
) -> Tensor:
    """InfoNCE of this process's queries.

    Args:
        query: (B, D).
        passages: (P, D), the positives in the order of the queries, then any hard negatives.
        temperature: positive.
        texts: the token ids of the P passages: one that equals a query's positive is no negative of that query. None:
            all are.
        gather: score against the passages of all processes, with gradient.
        options: further ones of `info_nce`.
    """
    first, passage_ids = 0, None
    gather = gather and distributed.world_size() > 1
    keys = text_keys(texts or ())
    # Only where texts repeat: without ids every backend can run. Other processes may have what this one has.
    if texts is not None and (gather or len(set(keys)) < len(keys)):
        passage_ids = index_on(query.device, keys)
    if gather:
        passages, first = distributed.gather_rows(passages)
        passage_ids = None if passage_ids is None else distributed.gather_rows(passage_ids)[0]
    target = first + torch.arange(len(query), device=query.device)
    return info_nce(query, passages, target, temperature=temperature, passage_ids=passage_ids, **options)


def unknown_pairs(
    options: Stage2Options, keys: Sequence[tuple[Ids, Ids]], scores: Tensor | None = None
) -> Tensor | None:
    """The pairs of a query and a passage (B, B) that score distillation reads, on the host; None: all.

    Args:
        options: whether a query's own passage counts.
        keys: the token ids of query i and passage i, which tell equal texts.
        scores: (≥ B, B), −inf where the teacher has scored no pair; only on the host are they looked at.
    """
    chosen = None
    if scores is not None and scores.device.type == "cpu" and bool(scores.isneginf().any()):
        chosen = ~scores[: len(keys)].isneginf()
    if options.distillation_pairs != "mask":
        return chosen
    # A text that is the query, or its passage, by another index is what the pair is: known.
    unknown = ~torch.tensor([[d in (own, x) for _, d in keys] for x, own in keys])
    return unknown if chosen is None else unknown & chosen


def distillation_loss(
    options: Stage2Options, query: Tensor, passages: Tensor, scores: Tensor, mask: Tensor | None
) -> Tensor:
    """Score distillation of B queries and their B passages.

    Args:
        options: temperatures, mixture.
        query, passages: (B, D).
        scores: (≥ B, B), the teacher's log p(d_j | z_i). Rows beyond B, of other texts' z, enter the marginal alone.
        mask: (B, B), from `unknown_pairs`.
    """
    scores, others = scores.to(query.device, non_blocking=True).tensor_split([len(query)])
    mask = None if mask is None else mask.to(query.device, non_blocking=True)
    marginal: str | Tensor = "batch"
    if len(others):
        kept = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        marginal = log_marginal(torch.cat([kept, others]), options.teacher_temperature)
    target = None
    if options.distillation_mixture < 1:
        target = torch.arange(len(query), device=query.device)
    return score_distillation(
        query, passages, scores, temperature=options.distillation_temperature,
        teacher_temperature=options.teacher_temperature, target=target, mixture=options.distillation_mixture,
        mask=mask, marginal=marginal,
    )  # fmt: skip


def keys_of(rows: list[dict]) -> list[tuple[Ids, Ids]]:
    """The token ids of each row's query and passage; of rows that are no pairs, of their one text."""
    return [(r["query_ids"], r.get("positive_ids", r["query_ids"])) for r in rows]


def paired(embeddings: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """B queries and B passages of embeddings (R, D) in the order of `texts_of`."""
    return embeddings[:b], embeddings[b : 2 * b] if len(embeddings) > b else embeddings
