"""Loss and gradient of one optimiser step, and the reference scores of stage 2.

A micro-batch gives its share of the step's loss; the shares add up to the loss of the whole step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from rich.console import Console
from torch import Tensor, nn

from autoregembed import checkpoint, data, distributed
from autoregembed.config import Config
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder, text_embedding
from autoregembed.ops import alignment_loss, info_nce
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


def _counts(config: Config, rows: list[dict]) -> dict[str, int]:
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
        counts = _counts(self.config, rows)
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
        share = {name: n / totals[name] for name, n in _counts(config, rows).items()}
        stats = {
            "align": out.loss.detach() * share["loss"],
            "s1": out.s1 * share["rows"],
            "s2": out.s2 * share["pairs"],
            "accuracy": out.accuracy * share["pairs"],
        }
        return config.alignment_weight * out.loss * share["loss"], stats


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compute_ref_logps(
    encoder: nn.Module, decoder: Decoder, rows, token_budget: int = 8192, places: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """r_a (R,) and r_c (R, M) under the present model, NaN where a row has fewer negatives or is not in `places`.

    Every process scores its share, and all of them get all scores.
    """
    negatives = [len(t) - 1 for t in rows["target_ids"]]
    scores = torch.zeros(len(rows), 1 + max(negatives))
    places = list(range(len(rows))) if places is None else places
    sizes = [len(r["query_ids"]) + sum(map(len, r["target_ids"])) + len(r["suffix_ids"]) for r in rows.select(places)]
    for part, counts in distributed.shard_microbatches(
        [[places[i] for i in part] for part in make_microbatches(sizes, token_budget)]
    ):
        batch = rows.select(part).to_list()
        z = encoder([r["query_ids"] for r in batch], [r["suffix_ids"] for r in batch])
        owner = [i for i, r in enumerate(batch) for _ in r["target_ids"]]
        column = [j for r in batch for j in range(len(r["target_ids"]))]
        found = decoder.logprob(z, [t for r in batch for t in r["target_ids"]], owner).float().cpu()
        if counts:
            scores[[part[i] for i in owner], column] = found
    scores = distributed.all_reduce(scores.to(_device(encoder))).cpu()
    scored = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, torch.tensor(places, dtype=torch.int64), True)
    there = torch.arange(scores.shape[1]) <= torch.tensor(negatives)[:, None]
    scores.masked_fill_(~(there & scored[:, None]), torch.nan)
    return scores[:, 0].contiguous(), scores[:, 1:].contiguous()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def cached_ref_logps(
    config: Config, encoder, decoder, model: str, rows, read: int, prompt: data.Prompt, console: Console
) -> tuple[Tensor, Tensor]:
    """Scores of the first `read` rows of the run, from the file beside the data; those that it lacks are added.

    `model` is the fingerprint of encoder and decoder.
    """

    def find() -> tuple[dict[str, str], Path, tuple[Tensor, Tensor] | None]:
        fingerprint = {
            "data": data.content_fingerprint(rows),
            "model": model,
            "tokenizer": data.tokenizer_fingerprint(prompt.tokenizer),
        }
        if config.ref_logps_file:
            path = Path(config.ref_logps_file)
        else:
            local = Path(config.train_data)
            short = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
            parent = local.parent if local.is_file() else Path(config.output_dir)
            path = parent / f"{local.name}.reference-{short}.safetensors"
        return fingerprint, path, checkpoint.load_ref_logps(path, fingerprint) if path.is_file() else None

    # Process 0 looks and tells: the others may not see its disk, and must not find what it is writing.
    fingerprint, path, known = distributed.broadcast_from_rank0(find)
    wanted = sorted(set(data.drawn(len(rows), 0, read, config.seed)))
    if known is not None:
        wanted = [i for i in wanted if bool(known[0][i].isnan())]
    if known is not None and not wanted:
        console.print(f"reference scores: {path}")
        return known
    start = time.perf_counter()
    scores = compute_ref_logps(encoder, decoder, rows, places=wanted)
    if known is not None:
        new = ~scores[0].isnan()
        scores = torch.where(new, scores[0], known[0]), torch.where(new[:, None], scores[1], known[1])
    distributed.broadcast_from_rank0(lambda: checkpoint.save_ref_logps(path, *scores, fingerprint))
    console.print(f"reference scores: {len(wanted)} rows in {time.perf_counter() - start:.0f} s, kept in {path}")
    return scores
