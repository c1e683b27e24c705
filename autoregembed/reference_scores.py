"""Reference scores of stage 2: log-probabilities under the model before the stage, computed once and cached."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn

from autoregembed import data, distributed
from autoregembed.config import Config
from autoregembed.decoder import Decoder
from autoregembed.files import require_writable_folder
from autoregembed.packing import make_microbatches
from autoregembed.prompt import tokenizer_fingerprint
from autoregembed.score_files import cached_path, load_scores, save_scores
from autoregembed.sharding import shared_fingerprint

SCORING_BUDGET = 8192  # tokens of a pass that makes scores, of reference or teacher


class RefLogps(NamedTuple):
    """Reference log-probabilities in nats, fp32; NaN where there is none."""

    positive: Tensor  # r_a (R,)
    negatives: Tensor  # r_c (R, M)


def scoring_passes(rows: Iterable[dict], token_budget: int) -> list[list[int]]:
    """The places of rows of `data.alignment_rows` in each pass that scores them, those of the longest first."""
    sizes = [len(r["query_ids"]) + sum(map(len, r["target_ids"])) + len(r["suffix_ids"]) for r in rows]
    return make_microbatches(sizes, token_budget)


@torch.no_grad()
def compute_ref_logps(
    encoder: nn.Module,
    decoder: Decoder,
    rows: Dataset,
    token_budget: int = SCORING_BUDGET,
    selected: list[int] | None = None,
) -> RefLogps:
    """Scores under the present model; NaN where a row has fewer negatives or is not `selected` (None: all are).

    Every process scores its share, and all of them get all scores.
    """
    negatives = [len(t) - 1 for t in rows["target_ids"]]
    scores = torch.zeros(len(rows), 1 + max(negatives))
    selected = list(range(len(rows))) if selected is None else selected
    passes = scoring_passes(rows.select(selected), token_budget)
    microbatches = [[selected[i] for i in microbatch] for microbatch in passes]
    for microbatch, counts in distributed.shard_microbatches(microbatches):
        batch = rows.select(microbatch).to_list()
        z = encoder([r["query_ids"] for r in batch], [r["suffix_ids"] for r in batch])
        owner = [i for i, r in enumerate(batch) for _ in r["target_ids"]]
        column = [j for r in batch for j in range(len(r["target_ids"]))]
        found = decoder.logprob(z, [t for r in batch for t in r["target_ids"]], owner).float().cpu()
        if counts:
            scores[[microbatch[i] for i in owner], column] = found
    device = next(encoder.parameters()).device
    scores = distributed.all_reduce(scores.to(device)).cpu()
    scored = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, torch.tensor(selected, dtype=torch.int64), True)
    exists = torch.arange(scores.shape[1]) <= torch.tensor(negatives)[:, None]
    scores.masked_fill_(~(exists & scored[:, None]), torch.nan)
    return RefLogps(scores[:, 0].contiguous(), scores[:, 1:].contiguous())


def ref_logps_fingerprint(encoder: nn.Module, decoder: Decoder, tokenizer: Any, rows: Dataset) -> dict[str, str]:
    """What reference scores depend on: data, weights and options of the models, tokenizer. All processes call it."""
    options = f"{decoder.z_norm}-{decoder.prefix}-{decoder.logprob_reduction}"
    weights = shared_fingerprint(encoder, decoder)
    return distributed.broadcast_from_rank0(
        lambda: {
            "data": data.content_fingerprint(rows),
            "model": f"{weights}-{options}",
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
    )


def cached_ref_logps(
    config: Config, encoder: nn.Module, decoder: Decoder, rows: Dataset, fingerprint: dict[str, str],
    wanted: list[int],
    console: Console,
) -> RefLogps:  # fmt: skip
    """Scores of the rows that a run reads, from a file of earlier runs; those that it lacks are computed and added.

    Args:
        fingerprint: `ref_logps_fingerprint`.
        wanted: the rows that the run reads.
    """
    path = _path(config, fingerprint)
    # Process 0 looks and tells: the others may not see its disk, and must not find what it is writing.
    known = distributed.broadcast_from_rank0(lambda: load_ref_logps(path, fingerprint) if path.is_file() else None)
    if known is not None:
        wanted = [i for i in wanted if bool(known.positive[i].isnan())]
        if not wanted:
            console.print(f"reference scores: {path}")
            return known
    distributed.broadcast_from_rank0(lambda: require_writable_folder(path.parent, "ref_logps_file", files=[path.name]))
    start = time.perf_counter()
    scores = compute_ref_logps(encoder, decoder, rows, selected=wanted)
    if known is not None:
        new = ~scores.positive.isnan()
        scores = RefLogps(
            torch.where(new, scores.positive, known.positive),
            torch.where(new[:, None], scores.negatives, known.negatives),
        )
    distributed.broadcast_from_rank0(lambda: save_ref_logps(path, *scores, fingerprint))
    console.print(f"reference scores: {len(wanted)} rows in {time.perf_counter() - start:.0f} s, stored in {path}")
    return scores


def _path(config: Config, fingerprint: dict[str, str]) -> Path:
    if config.ref_logps_file:
        return Path(config.ref_logps_file)
    return cached_path("ref-logps", fingerprint)


def save_ref_logps(path: Path, positive: Tensor, negatives: Tensor, fingerprint: dict[str, str]) -> None:
    """Writes r_a (R,) and r_c (R, M) with the fingerprint of what they depend on, and a checksum."""
    save_scores(path, {"positive": positive, "negatives": negatives}, fingerprint)


def load_ref_logps(path: Path, fingerprint: dict[str, str]) -> RefLogps:
    """Reads what `save_ref_logps` wrote; errors are those of `score_files.load_scores`."""
    return RefLogps(**load_scores(path, fingerprint, ("positive", "negatives"), "ref_logps"))
