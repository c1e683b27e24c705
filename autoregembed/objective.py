"""Loss and gradient of one optimiser step, and the reference scores of stage 2.

A micro-batch gives its share of the step's loss; the shares add up to the loss of the whole step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from autoregembed import distributed
from autoregembed.config import Config
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder, text_embedding
from autoregembed.losses import alignment_loss, info_nce
from autoregembed.packing import make_microbatches


def lengths(rows: list[dict], encoder: Encoder, hard_negatives: bool) -> list[int]:
    """Encoder tokens of each row."""
    fixed = encoder.num_compress_tokens + (encoder.bos_token_id is not None)
    out = []
    for row in rows:
        texts, suffixes = texts_of([row], hard_negatives)
        out.append(sum(len(t) + len(s) + fixed for t, s in zip(texts, suffixes, strict=True)))
    return out


def texts_of(rows: list[dict], hard_negatives: bool) -> tuple[list, list]:
    """What the encoder reads: texts (stage 1), or queries, positives and, if asked for, negatives; and suffixes."""
    if "text_ids" in rows[0]:
        return [r["text_ids"] for r in rows], [r["suffix_ids"] for r in rows]
    texts = [r["query_ids"] for r in rows] + [r["positive_ids"] for r in rows]
    suffixes = [r["suffix_ids"] for r in rows] * 2
    if hard_negatives:
        texts += [n for r in rows for n in r["negative_ids"]]
        suffixes += [r["suffix_ids"] for r in rows for _ in r["negative_ids"]]
    return texts, suffixes


def alignment_scores(
    decoder: Decoder, z: Tensor, rows: list[dict], token_budget: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a (B,), b (B,), c (B, M), mask (B, M) in one decoder call; z (≥ 2B, K, D) holds queries, then positives."""
    b = len(rows)
    targets = [r["target_ids"][0] for r in rows] * 2 + [n for r in rows for n in r["target_ids"][1:]]
    count = torch.tensor([len(r["target_ids"]) - 1 for r in rows])
    owner = torch.arange(b).repeat_interleave(count)
    scores = decoder.logprob(z, targets, torch.cat([torch.arange(2 * b), owner]), token_budget)
    mask = torch.arange(int(count.max()))[None] < count[:, None]
    mask = mask.to(scores.device)
    c = scores.new_zeros(mask.shape).masked_scatter(mask, scores[2 * b :])
    return scores[:b], scores[b : 2 * b], c, mask


def contrastive(z: Tensor, queries: int, temperature: float) -> Tensor:
    """InfoNCE of this process' queries against the passages of all processes.

    z (R, K, D) holds `queries` queries, as many positives, then hard negatives.
    """
    embeddings = text_embedding(z.to(torch.promote_types(z.dtype, torch.float32)))
    query, passages = embeddings.tensor_split([queries])
    passages, first = distributed.gather_rows(passages)
    target = first + torch.arange(queries, device=z.device)
    return info_nce(query, passages, target, temperature=temperature)


def loss_counts(config: Config, rows: list[dict]) -> dict[str, int]:
    """How many tokens, rows, pairs the loss ("loss") and the statistics of these rows are means over."""
    if config.stage == 1:
        return {"loss": sum(len(r["target_ids"]) + 1 for r in rows), "rows": len(rows)}
    pairs = sum(len(r["target_ids"]) - 1 for r in rows)
    joint = sum(len(r["target_ids"]) > 1 for r in rows)
    return {"loss": pairs if config.negatives == "independent" else joint, "rows": len(rows), "pairs": pairs}


@dataclass
class Objective:
    """Loss and gradient of one optimiser step."""

    config: Config
    encoder: nn.Module  # perhaps wrapped by accelerate
    decoder: Decoder | None
    accelerator: Accelerator
    reference: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.accelerator.unwrap_model(self.encoder).sharded = sharded

    def __call__(self, rows: list[dict]) -> dict[str, float]:
        """Accumulates the gradient of the step over `rows`; returns what is logged."""
        config = self.config
        inner = self.accelerator.unwrap_model(self.encoder)
        # Every loss but InfoNCE is a sum over rows, and a sum needs no pass twice: it goes backward part by part.
        whole = config.stage == 2 and config.contrastive_weight > 0
        parts = make_microbatches(lengths(rows, inner, config.hard_negatives), None if whole else config.token_budget)
        if config.token_budget:
            parts = distributed.equalize_microbatches(parts, self.accelerator.device)
        micro = [[rows[i] for i in part] for part in parts]
        totals = self._totals(rows)
        log: dict[str, Tensor] = {}
        for i, part in enumerate(micro):
            last = i == len(micro) - 1
            self.accelerator.sync_gradients = last  # DeepSpeed takes its optimiser step inside of `backward`
            with contextlib.nullcontext() if last else self._no_sync():
                z = self.encoder(*texts_of(part, config.hard_negatives), config.token_budget)
                share, stats = self._share(z, part, totals)
                if whole:
                    nce = contrastive(z, len(part), config.contrastive_temperature) * (len(rows) / totals["rows"])
                    stats["nce"] = nce.detach()
                    share = share + config.contrastive_weight * nce
                stats["loss"] = share.detach()
                self.accelerator.backward(share)
            for name, value in stats.items():
                log[name] = log.get(name, 0) + value
        mean = distributed.all_reduce(torch.stack([x.float() for x in log.values()])) / distributed.world_size()
        return dict(zip(log, mean.tolist(), strict=True))

    def _no_sync(self):
        # FSDP would keep whole gradients until the last part; summing the shards of each part costs no memory.
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        return contextlib.nullcontext() if sharded else self.accelerator.no_sync(self.encoder)

    def _totals(self, rows: list[dict]) -> dict[str, float]:
        """What the loss and the statistics are means over: counts of all processes, per process (DDP averages)."""
        counts = loss_counts(self.config, rows)
        everywhere = distributed.all_reduce(torch.tensor([*counts.values()], device=self.accelerator.device))
        return {name: max(n, 1) / distributed.world_size() for name, n in zip(counts, everywhere.tolist(), strict=True)}

    def _share(self, z: Tensor, rows: list[dict], totals: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        if self.decoder is None:
            return z.sum() * 0, {}
        if config.stage == 1:
            logprob = self.decoder.logprob(z, [r["target_ids"] for r in rows], token_budget=config.token_budget)
            return -logprob.sum() / totals["loss"], {}
        a, b, c, mask = alignment_scores(self.decoder, z, rows, config.token_budget)
        r_a = r_c = None
        if self.reference is not None:
            places = torch.tensor([r["row"] for r in rows])
            r_a, r_c = self.reference[0][places].to(a.device), self.reference[1][places, : c.shape[1]].to(a.device)
        out = alignment_loss(
            a, b, c, r_a, r_c, beta=config.beta, temperature=config.temperature, ref_margin=config.ref_margin,
            negatives=config.negatives, negative_mask=mask,
        )  # fmt: skip
        share = {name: n / totals[name] for name, n in loss_counts(config, rows).items()}
        stats = {
            "align": out.loss.detach() * share["loss"],
            "s1": out.s1 * share["rows"],
            "s2": out.s2 * share["pairs"],
            "accuracy": out.accuracy * share["pairs"],
        }
        return config.alignment_weight * out.loss * share["loss"], stats
