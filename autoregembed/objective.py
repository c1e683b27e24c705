"""The losses of both stages over rows of token ids, and loss and gradient of one optimizer step.

`stage1_loss` and `stage2_loss` are the one place where a stage is put together; the loop and the trainers of
`integrations/` call them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from autoregembed import distributed
from autoregembed.config import Config, Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.embedding_losses import contrastive_loss, distillation_loss, keys_of, paired, unknown_pairs
from autoregembed.encoder import Encoder, text_embedding
from autoregembed.ops import (
    AlignmentOutput,
    AlignmentPairs,
    alignment_loss,
    conditional_alignment,
    conditional_compression,
)
from autoregembed.packing import Ids, Packed, index_on, make_microbatches
from autoregembed.passes import sum_of_passes


def texts_of(rows: list[dict], hard_negatives: bool) -> tuple[list, list]:
    """What the encoder reads of rows: texts and their suffixes, as lists of ids.

    Stage 1: the contexts. Stage 2: the queries, then the positives, then with `hard_negatives` all negatives; the
    queries alone of rows that are no pairs.
    """
    if "text_ids" in rows[0]:
        return [r["text_ids"] for r in rows], [r["suffix_ids"] for r in rows]
    if "positive_ids" not in rows[0]:
        return [r["query_ids"] for r in rows], [r["suffix_ids"] for r in rows]
    texts = [r["query_ids"] for r in rows] + [r["positive_ids"] for r in rows]
    suffixes = [r["suffix_ids"] for r in rows] + [r["passage_suffix_ids"][0] for r in rows]
    if hard_negatives:
        texts += [n for r in rows for n in r["negative_ids"]]
        suffixes += [s for r in rows for s in r["passage_suffix_ids"][1:]]
    return texts, suffixes


def encoder_lengths(rows: list[dict], encoder: Encoder, hard_negatives: bool) -> list[int]:
    """Encoder tokens of each row."""
    fixed = encoder.num_compress_tokens + (encoder.bos_token_id is not None)
    out = []
    for row in rows:
        texts, suffixes = texts_of([row], hard_negatives)
        out.append(sum(len(t) + len(s) + fixed for t, s in zip(texts, suffixes, strict=True)))
    return out


def num_loss_terms(row: dict, negatives: str) -> int:
    """How many terms a row adds to the mean that the loss is: target tokens with eos in stage 1; in stage 2 its pairs
    (negatives "independent"), or 1 where it has a negative ("joint")."""
    if "text_ids" in row:
        return len(row["target_ids"]) + 1
    pairs = len(row["target_ids"]) - 1
    return pairs if negatives == "independent" else min(pairs, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1


def stage1_loss(
    decoder: Decoder, z: Tensor, targets: Sequence[Ids], *, num_tokens: int | Tensor, token_budget: int | None = None
) -> Tensor:
    """−Σ log p(target | z) / num_tokens, (); in one op where one pass holds all targets.

    Args:
        decoder: the frozen decoder.
        z: (B, K, D).
        targets: B targets as token ids, without eos.
        num_tokens: of the whole step, with eos, at least 1: a number, or () int64 on z's device.
        token_budget: as in `Decoder.logprob`.

    Source: arXiv 2502.11401, §3.2.
    """

    def run(fused: Any) -> Tensor:
        return decoder.run(z, targets, None, token_budget, fused)

    return compression_of(run, decoder.logprob_reduction, num_tokens)


def compression_of(run: Callable[[Any], Tensor], logprob_reduction: str, num_tokens: int | Tensor) -> Tensor:
    """`stage1_loss` of the pairs that `run(fused)` scores, as `Decoder.run` does."""

    def fused(
        hidden: Tensor, weight: Tensor, labels: Tensor, *, packed: Packed, cu_seqlens: Tensor, **head: Any
    ) -> Any:
        return conditional_compression(hidden, weight, labels, num_tokens=num_tokens, **head)

    out = run(fused if logprob_reduction == "sum" else None)
    return -out.sum() / num_tokens if out.ndim else out


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2


class PairScores(NamedTuple):
    """Log-probabilities of stage 2 in nats."""

    a: Tensor  # (B,) log p(positive | z of the query)
    b: Tensor  # (B,) log p(positive | z of the positive)
    c: Tensor  # (B, M) log p(negative_j | z of the query), 0 where there is none
    mask: Tensor  # (B, M) bool, False where a row has no j-th negative


def alignment_pairs(rows: list[dict]) -> tuple[list[Ids], Tensor, AlignmentPairs]:
    """The targets of all pairs, the z that each is scored under, and which plays which part; all on the host."""
    targets = [r["target_ids"][0] for r in rows] * 2 + [n for r in rows for n in r["target_ids"][1:]]
    count = [len(r["target_ids"]) - 1 for r in rows]
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(count))
    return targets, torch.cat([torch.arange(2 * len(rows)), owner]), AlignmentPairs.in_order(count)


def _parts(scores: Tensor, rows: list[dict]) -> PairScores:
    b, count = len(rows), torch.tensor([len(r["target_ids"]) - 1 for r in rows])
    mask = torch.arange(int(count.max()))[None] < count[:, None]
    # Places from the host: the backward of masked_scatter waits for the device to count them.
    places = index_on(scores.device, mask.flatten().nonzero().squeeze(1))
    c = scores.new_zeros(mask.numel()).index_copy(0, places, scores[2 * b :]).view(mask.shape)
    return PairScores(scores[:b], scores[b : 2 * b], c, mask.to(scores.device, non_blocking=True))


def alignment_scores(decoder: Decoder, z: Tensor, rows: list[dict], token_budget: int | None = None) -> PairScores:
    """Scores of all pairs in one decoder call; z (≥ 2B, K, D) holds the queries, then the positives."""
    targets, z_index, _ = alignment_pairs(rows)
    return _parts(decoder.logprob(z, targets, z_index, token_budget), rows)


def _alignment(
    options: Stage2Options,
    decoder: Decoder,
    z: Tensor,
    rows: list[dict],
    ref_logps: tuple[Tensor, Tensor] | None,
    token_budget: int | None,
) -> AlignmentOutput:
    """`alignment_loss` of `alignment_scores`; in one op where one pass holds all pairs.

    It is a mean over rows, whose pairs need no other row's. So passes hold whole rows where the budget can: each goes
    backward at once with its own loss, and what is kept does not grow with the number of negatives.
    """
    b = len(rows)
    parts, budgets = _whole_rows(decoder, z, rows, token_budget)
    if len(parts) == 1:
        return _alignment_in_one(options, decoder, z, rows, ref_logps, budgets[0])
    totals = [max(sum(x), 1) for x in zip(*(_alignment_terms(options, r) for r in rows), strict=True)]

    def run(z_part: Tensor, i: int) -> list[Tensor]:
        chosen = [rows[j] for j in parts[i]]
        scores = None
        if ref_logps is not None:
            scores = ref_logps[0][parts[i]], ref_logps[1][parts[i]]
        out = _alignment_in_one(options, decoder, z_part, chosen, scores, budgets[i])
        counts = [sum(x) for x in zip(*(_alignment_terms(options, r) for r in chosen), strict=True)]
        return [x * n for x, n in zip(out, counts, strict=True)]

    sums = sum_of_passes(z, run, [[*part, *(b + j for j in part)] for part in parts])
    return AlignmentOutput(*(x / n for x, n in zip(sums, totals, strict=True)))


def _alignment_terms(options: Stage2Options, row: dict) -> tuple[int, int, int, int]:
    """How many terms of loss, s1, s2 and accuracy a row has."""
    pairs = len(row["target_ids"]) - 1
    return num_loss_terms(row, options.negatives), 1, pairs, pairs


def _whole_rows(
    decoder: Decoder, z: Tensor, rows: list[dict], token_budget: int | None
) -> tuple[list[list[int]], list[int | None]]:
    """The rows of each pass, and the budget by which their pairs are parted: None where they fit."""
    whole = [[*range(len(rows))]], [token_budget]
    if token_budget is None:
        return whole
    tokens = [
        decoder.num_pass_tokens(z.shape[1], [*r["target_ids"], r["target_ids"][0]], [0] * len(r["target_ids"]) + [1])
        for r in rows
    ]
    parts = make_microbatches(tokens, token_budget)
    if decoder.sharded:
        # All processes make as many passes of their rows, or part the pairs of all rows.
        counts = torch.tensor([len(parts), -len(rows), max(tokens)], device=z.device)
        most, fewest, longest = distributed.all_reduce(counts, "MAX").tolist()
        if most > -fewest or longest > token_budget:
            return whole
        parts = distributed.equalize_microbatches(parts, z.device)
    return parts, [None if sum(tokens[i] for i in part) <= token_budget else token_budget for part in parts]


def _alignment_in_one(
    options: Stage2Options,
    decoder: Decoder,
    z: Tensor,
    rows: list[dict],
    ref_logps: tuple[Tensor, Tensor] | None,
    token_budget: int | None,
) -> AlignmentOutput:
    """`_alignment` of rows that are not parted further; z (≥ 2B, K, D)."""
    targets, z_index, pairs = alignment_pairs(rows)
    references: tuple[Tensor | None, Tensor | None] = (None, None)
    if ref_logps is not None:
        r_a, r_c = ref_logps
        r_c = r_c[:, : pairs.query_negatives.shape[1]]
        references = r_a.to(z.device, non_blocking=True), r_c.to(z.device, non_blocking=True)

    def fused(*head: Tensor, packed: Packed, **more: Any) -> AlignmentOutput:
        on_host = torch.cat([x.flatten() for x in places_in(packed, pairs)])
        a, b, c = index_on(z.device, on_host).split([x.numel() for x in pairs])  # one copy
        places = AlignmentPairs(a, b, c.view(pairs.query_negatives.shape))
        reduction = decoder.logprob_reduction
        return alignment_of(options, reduction, places, references)(*head, packed=packed, **more)

    out = decoder.run(z, targets, z_index, token_budget, fused)
    if isinstance(out, AlignmentOutput):
        return out
    a, b, c, mask = _parts(out, rows)
    return alignment_loss(a, b, c, *references, negative_mask=mask, **_variant(options))


def _variant(options: Stage2Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("beta", "temperature", "ref_margin", "negatives")}


def places_in(packed: Packed, pairs: AlignmentPairs) -> AlignmentPairs:
    """Places among a pack's sequences for those of the caller's; on the host."""
    order = packed.host_unsort_index
    return AlignmentPairs(*(torch.where(x < 0, -1, order[x.clamp(min=0)]) for x in pairs))


def alignment_of(
    options: Stage2Options, reduction: str, places: AlignmentPairs, references: Sequence[Tensor | None]
) -> Callable[..., AlignmentOutput]:
    """The `fused` of `Decoder.run` whose result is the alignment loss; all tensors lie on the decoder's device."""

    def fused(hidden: Tensor, weight: Tensor, y: Tensor, *, packed: Packed, cu_seqlens: Tensor, **head: Any) -> Any:
        given = {"logprob_reduction": reduction, **_variant(options), **head}
        return conditional_alignment(hidden, weight, y, cu_seqlens, places, *references, **given)

    return fused


class Stage2Loss(NamedTuple):
    """The parts of the loss, weighted, each () or None where its weight is 0; `stats` is detached."""

    alignment: Tensor | None  # mean over the terms of these rows
    contrastive: Tensor | None  # mean over these queries
    distillation: Tensor | None  # mean over these queries
    stats: dict[str, Tensor]  # align, s1, s2, accuracy, nce, distill: means over rows, pairs or queries


def stage2_loss(
    options: Stage2Options,
    decoder: Decoder | None,
    z: Tensor,
    rows: list[dict],
    *,
    ref_logps: tuple[Tensor, Tensor] | None = None,
    teacher_scores: Tensor | None = None,
    embeddings: Tensor | None = None,
    passages: Sequence[Ids] | None = None,
    token_budget: int | None = None,
    gather: bool = True,
) -> Stage2Loss:
    """The loss of stage 2 over B rows: alignment_weight · alignment, contrastive_weight · InfoNCE and
    distillation_weight · score distillation.

    Args:
        options: weights and variants.
        decoder: the frozen decoder; None where `alignment_weight` is 0.
        z: (R, K, D): the queries, the positives and, for hard negatives, all negatives (`texts_of`).
        rows: B rows with `target_ids`, [positive, *negatives] as the decoder scores them.
        ref_logps: r_a (B,), r_c (B, ≥ M), where `options.uses_ref_logps`, and only there.
        teacher_scores: (≥ B, B), log p(positive_j | z of query i) by the model before the stage, for distillation; more
            rows are for the marginal (`distillation_loss`).
        embeddings: (R, D), in the order of z, what InfoNCE compares; by default normalize(mean_k z).
        passages: the token ids of the texts behind the queries' embeddings, which tell equal passages; by default those
            of the rows.
        token_budget: as in `Decoder.logprob`.
        gather: InfoNCE takes the passages of all processes.

    Source: arXiv 2502.11401, §3.3.
    """
    if ref_logps is not None and not options.uses_ref_logps:
        raise ValueError(
            f"ref_logps: got scores, expected None, since ref_margin={options.ref_margin!r} and "
            f"alignment_weight={options.alignment_weight}"
        )
    alignment = nce = distilled = None
    if options.alignment_weight:
        assert decoder is not None
        alignment = _alignment(options, decoder, z, rows, ref_logps, token_budget)
    if embeddings is None and (options.contrastive_weight or options.distillation_weight):
        embeddings = text_embedding(z.to(torch.promote_types(z.dtype, torch.float32)))
    if options.contrastive_weight:
        assert embeddings is not None
        if passages is None:
            passages = texts_of(rows, options.hard_negatives)[0][len(rows) :]
        query, others = embeddings.tensor_split([len(rows)])
        nce = contrastive_loss(query, others, options.contrastive_temperature, texts=passages, gather=gather)
    if options.distillation_weight:
        assert embeddings is not None
        assert teacher_scores is not None
        mask = unknown_pairs(options, keys_of(rows), teacher_scores)
        distilled = distillation_loss(options, *paired(embeddings, len(rows)), teacher_scores, mask)
    return weighted(options, alignment, nce, distilled)


def weighted(
    options: Stage2Options, alignment: AlignmentOutput | None, nce: Tensor | None, distilled: Tensor | None
) -> Stage2Loss:
    """Stage 2's loss from its parts."""
    stats: dict[str, Tensor] = {}
    if alignment is not None:
        stats |= {"align": alignment.loss.detach(), "s1": alignment.s1, "s2": alignment.s2}
        stats["accuracy"] = alignment.accuracy
    parts = {"nce": nce, "distill": distilled}
    stats |= {name: x.detach() for name, x in parts.items() if x is not None}
    return Stage2Loss(
        None if alignment is None else options.alignment_weight * alignment.loss,
        None if nce is None else options.contrastive_weight * nce,
        None if distilled is None else options.distillation_weight * distilled,
        stats,
    )


# ----------------------------------------------------------------------------------------------------------------------
# One optimizer step of the loop


def loss_counts(config: Config, rows: list[dict]) -> dict[str, int]:
    """How many terms, rows and pairs the loss ("loss") and the statistics of these rows are means over."""
    counts = {"loss": sum(num_loss_terms(r, config.negatives) for r in rows), "rows": len(rows)}
    if config.stage == 2:
        counts["pairs"] = sum(len(r["target_ids"]) - 1 for r in rows)
    return counts


# What each logged statistic is a mean over.
_MEAN_OVER = {"align": "loss", "s1": "rows", "s2": "pairs", "accuracy": "pairs", "nce": "rows", "distill": "rows"}


@dataclass
class Objective:
    """Loss and gradient of one optimizer step; a microbatch gives its share of the step's loss."""

    config: Config
    encoder: nn.Module  # perhaps wrapped by accelerate
    decoder: Decoder | None
    accelerator: Accelerator
    ref_logps: tuple[Tensor, Tensor] | None = None  # r_a (rows of the data,), r_c (rows of the data, M)
    teacher_scores: Tensor | None = None  # (blocks of the data, ≥ B, B)

    def __post_init__(self) -> None:
        self.accelerator.unwrap_model(self.encoder).sharded = self._is_sharded

    @property
    def _is_sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Accumulates the gradient of the step over `rows`; returns what is logged, each () on the device."""
        microbatches = self._microbatches(rows)
        totals = self._totals(rows)
        log: dict[str, Tensor] = {}
        for i, microbatch in enumerate(microbatches):
            last = i == len(microbatches) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                loss, stats = self._share([rows[j] for j in microbatch], totals)
                self.accelerator.backward(loss)
            for name, value in {**stats, "loss": loss.detach()}.items():
                log[name] = log.get(name, 0) + value
        mean = distributed.all_reduce(torch.stack([x.float() for x in log.values()])) / distributed.world_size()
        return dict(zip(log, mean.unbind(), strict=True))

    def clip(self) -> Tensor:
        """Clips that gradient by `max_grad_norm`; returns its norm before, ()."""
        most = self.config.max_grad_norm or math.inf
        return distributed.to_full_tensor(self.accelerator.clip_grad_norm_(self.encoder.parameters(), most))

    def _microbatches(self, rows: list[dict]) -> list[list[int]]:
        config = self.config
        # InfoNCE and distillation need all embeddings of the step at once (the encoder then caches gradients). Every
        # other loss is a sum over rows, and goes backward one microbatch at a time.
        whole = config.stage == 2 and config.contrastive_weight + config.distillation_weight > 0
        budget = None if whole else config.token_budget
        inner = self.accelerator.unwrap_model(self.encoder)
        microbatches = make_microbatches(encoder_lengths(rows, inner, config.hard_negatives), budget)
        if config.token_budget:
            microbatches = distributed.equalize_microbatches(microbatches, self.accelerator.device)
        return microbatches

    def _no_sync(self) -> contextlib.AbstractContextManager:
        # FSDP would keep whole gradients until the last microbatch; reducing each one's costs no memory.
        return contextlib.nullcontext() if self._is_sharded else self.accelerator.no_sync(self.encoder)

    def _totals(self, rows: list[dict]) -> dict[str, float]:
        """What loss and statistics are means over: counts of all processes, per process (DDP averages)."""
        counts = loss_counts(self.config, rows)
        if distributed.world_size() > 1:  # alone, no tensor and no wait
            summed = distributed.all_reduce(torch.tensor([*counts.values()], device=self.accelerator.device))
            counts = dict(zip(counts, summed.tolist(), strict=True))
        return {name: max(n, 1) / distributed.world_size() for name, n in counts.items()}

    def scores_of(self, rows: list[dict]) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """`ref_logps` and `teacher_scores` of `stage2_loss`, on the host."""
        ref_logps = teacher_scores = None
        if self.ref_logps is not None:
            index = torch.tensor([r["row"] for r in rows])
            ref_logps = self.ref_logps[0][index], self.ref_logps[1][index]
        if self.teacher_scores is not None:
            place = torch.tensor([r["place"] for r in rows])
            found = self.teacher_scores[rows[0]["block"]]
            teacher_scores = torch.cat([found[place], found[found.shape[1] :]])[:, place]
        return ref_logps, teacher_scores

    def _share(self, rows: list[dict], totals: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """These rows' share of the step's loss, and of its statistics."""
        config = self.config
        z = self.encoder(*texts_of(rows, config.hard_negatives), config.token_budget)
        if config.stage == 1:
            assert self.decoder is not None
            targets, world = [r["target_ids"] for r in rows], distributed.world_size()
            count = round(totals["loss"] * world)
            loss = stage1_loss(self.decoder, z, targets, num_tokens=count, token_budget=config.token_budget)
            return loss * world, {}
        ref_logps, teacher_scores = self.scores_of(rows)
        out = stage2_loss(
            config, self.decoder, z, rows, ref_logps=ref_logps, teacher_scores=teacher_scores,
            token_budget=config.token_budget,
        )  # fmt: skip
        share = {name: n / totals[name] for name, n in loss_counts(config, rows).items()}
        loss = z.sum() * 0 if out.alignment is None else out.alignment * share["loss"]
        for part in (out.contrastive, out.distillation):
            if part is not None:
                loss = loss + part * share["rows"]
        return loss, {name: value * share[_MEAN_OVER[name]] for name, value in out.stats.items()}
