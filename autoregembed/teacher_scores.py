"""Teacher scores of a distillation: log p(d_j | z_i) of all pairs within a block of rows, under the model before the
stage, computed once and cached."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn

from autoregembed import distributed, sampling
from autoregembed.config import Config
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.files import require_writable_folder
from autoregembed.packing import Ids
from autoregembed.score_files import cached_path, load_scores, save_scores

_SAVE_EVERY = 300.0  # seconds between two savings of a long computation


def pair_scores(decoder: Decoder, z: Tensor, targets: Sequence[Ids], token_budget: int | None = None) -> Tensor:
    """log p(d_j | z_i) in nats of all B · P pairs of z (B, K, D) and P targets: (B, P) float32."""
    b, p = len(z), len(targets)
    owner = torch.arange(b).repeat_interleave(p)
    return decoder.logprob(z, [*targets] * b, owner, token_budget).view(b, p)


@torch.no_grad()
def compute_teacher_scores(
    encoder: nn.Module, decoder: Decoder, rows: Dataset, blocks: list[list[int]], token_budget: int = 8192
) -> Tensor:
    """(len(blocks), B, B) float32: scores of the first target of every row under the query of every row of its block.

    Every process scores its share, and all of them get all scores.
    """
    size = max(map(len, blocks))
    scores = torch.zeros(len(blocks), size, size)
    # The blocks are alike: one a pass, whatever their lengths.
    for mine, counts in distributed.shard_microbatches([[i] for i in range(len(blocks))]):
        batch = rows.select(blocks[mine[0]]).to_list()
        z = encoder([r["query_ids"] for r in batch], [r["suffix_ids"] for r in batch])
        found = pair_scores(decoder, z, [r["target_ids"][0] for r in batch], token_budget).float().cpu()
        if counts:
            scores[mine[0], : len(batch), : len(batch)] = found
    return distributed.all_reduce(scores.to(next(encoder.parameters()).device)).cpu()


def cached_teacher_scores(
    config: Config, encoder: Encoder, decoder: Decoder, rows: Dataset, fingerprint: dict[str, str], num_blocks: int,
    console: Console,
) -> Tensor:  # fmt: skip
    """Scores (blocks of the data, B, B) of the first `num_blocks` blocks that a run reads, NaN elsewhere.

    They are kept in the cache of `datasets`, by fingerprint; what is missing there is computed and added, and saved
    every few minutes.

    Args:
        fingerprint: `ref_logps_fingerprint`, taken before the weights are sharded.
        num_blocks: how many blocks the run reads; the same block counts again in the next epoch.
    """
    all_blocks = sampling.blocks(len(rows), config.batch_size, config.seed)
    fingerprint = {**fingerprint, "blocks": f"{config.batch_size} rows, seed {config.seed}"}
    path = cached_path("teacher-scores", fingerprint)
    known = distributed.broadcast_from_rank0(
        lambda: load_scores(path, fingerprint, ("scores",), "teacher_scores")["scores"] if path.is_file() else None
    )
    b = config.batch_size
    scores = torch.full((len(all_blocks), b, b), torch.nan) if known is None else known
    read = sorted(set(sampling.drawn(len(all_blocks), 0, num_blocks, config.seed)))
    wanted = [i for i in read if scores[i].isnan().any()]
    if not wanted:
        console.print(f"teacher scores: {path}")
        return scores
    targets, k = [t[0] for t in rows["target_ids"]], encoder.num_compress_tokens
    tokens = sum(b * decoder.num_pass_tokens(k, [targets[i] for i in all_blocks[j]], [0] * b) for j in wanted)
    console.print(f"teacher scores: {len(wanted)} blocks of {b} × {b} pairs, {tokens:,} decoder tokens, computed once")
    distributed.broadcast_from_rank0(
        lambda: require_writable_folder(path.parent, "HF_DATASETS_CACHE", files=[path.name])
    )
    start = saved = time.perf_counter()
    step = distributed.world_size()
    for first in range(0, len(wanted), step):
        part = wanted[first : first + step]
        scores[part] = compute_teacher_scores(encoder, decoder, rows, [all_blocks[i] for i in part])
        now = time.perf_counter()
        last = first + step >= len(wanted)
        if distributed.broadcast_from_rank0(lambda: last or now - saved > _SAVE_EVERY):  # noqa: B023
            saved = now
            distributed.broadcast_from_rank0(lambda: save_scores(path, {"scores": scores}, fingerprint))
    console.print(f"teacher scores: {len(wanted)} blocks in {time.perf_counter() - start:.0f} s, kept in {path}")
    return scores
