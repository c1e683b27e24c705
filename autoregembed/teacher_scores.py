"""Teacher scores of a distillation: log p(d_j | z_i) of all pairs within a block of rows, under the model before the
stage, computed once and cached."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn

from autoregembed import distributed, sampling
from autoregembed.decoder import Decoder
from autoregembed.files import require_writable_folder
from autoregembed.packing import Ids
from autoregembed.progress import Display
from autoregembed.reference_scores import SCORING_BUDGET, ref_logps_fingerprint
from autoregembed.score_files import cached_path, load_scores, save_scores

_SAVE_EVERY = 300.0  # seconds between two savings of a long computation
LEAST_FOUND = 0.85  # of texts that find themselves: docs/howto/no-pairs.md has what was measured on either side


def pair_scores(
    decoder: Decoder,
    z: Tensor,
    targets: Sequence[Ids],
    token_budget: int | None = None,
    *,
    z_index: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """log p(d_j | z_i) in nats of z (B, K, D) and P targets: (B, P) float32.

    Args:
        z_index: for each target the z that score it, none twice; the other pairs are NaN, for `score_distillation`'s
            `mask`. None: all B · P pairs.

    Raises:
        ValueError: not one list for each target, or a z twice in one.
        IndexError: a z that there is not.
    """
    b, p = len(z), len(targets)
    if z_index is None:
        owner = torch.arange(b).repeat_interleave(p)
        return decoder.logprob(z, [*targets] * b, owner, token_budget).view(b, p)
    if len(z_index) != p or any(len(set(chosen)) < len(chosen) for chosen in z_index):
        raise ValueError(f"z_index: got {len(z_index)} lists, expected one of distinct z for each of the {p} targets")
    owner = torch.tensor([i for chosen in z_index for i in chosen], dtype=torch.int64)
    column = torch.arange(p).repeat_interleave(torch.tensor([len(chosen) for chosen in z_index], dtype=torch.int64))
    scores = z.new_full((b, p), torch.nan, dtype=torch.promote_types(z.dtype, torch.float32))
    if not len(owner):
        return scores
    found = decoder.logprob(z, [targets[j] for j in column.tolist()], owner, token_budget)
    return scores.index_put((owner.to(z.device), column.to(z.device)), found)


def log_marginal(scores: Tensor, teacher_temperature: float) -> Tensor:
    """How likely each of P passages is under any of R texts, τ · logsumexp_i scores_ij / τ: (R, P) to (P,) in nats.

    For `score_distillation(marginal=…)`: over more texts than the batch has, such as those of recent batches.
    """
    return teacher_temperature * (scores / teacher_temperature).logsumexp(0)


def retrieval_accuracy(scores: Tensor) -> float:
    """The share of rows i whose own passage has the highest score_ij less the block's marginal: (n, ≥ B, B) scores."""
    b = scores.shape[2]
    own = scores[:, :b] - scores[:, :b].logsumexp(1, keepdim=True)
    return float((own.argmax(2) == torch.arange(b, device=scores.device)).float().mean())


def nearest(z: Tensor, candidates: int) -> list[list[int]]:
    """For each of the texts behind z (B, K, D), itself and the `candidates` nearest others by cosine."""
    e = F.normalize(z.float().mean(1), dim=-1)
    cosines = (e @ e.T).fill_diagonal_(2.0)
    return cosines.topk(min(candidates + 1, len(z)), 0).indices.T.tolist()


@torch.no_grad()
def compute_teacher_scores(
    encoder: nn.Module, decoder: Decoder, rows: Dataset, blocks: list[list[int]], token_budget: int = SCORING_BUDGET,
    candidates: int | None = None, others: list[list[int]] | None = None,
) -> Tensor:  # fmt: skip
    """(len(blocks), B + R, B) float32: scores of the first target of every row under the query of every row of its
    block, and under those of `others`, R rows for each block.

    Every process scores its share, and all of them get all scores.

    Args:
        candidates: a target is scored under its own query and the `nearest` ones of its block; −inf elsewhere.
    """
    size = max(map(len, blocks))
    more = others or [[]] * len(blocks)
    scores = torch.zeros(len(blocks), size + len(more[0]), size)
    # The blocks are alike: one a pass, whatever their lengths.
    for mine, counts in distributed.shard_microbatches([[i] for i in range(len(blocks))]):
        b = len(blocks[mine[0]])
        batch = rows.select([*blocks[mine[0]], *more[mine[0]]]).to_list()
        z = encoder([r["query_ids"] for r in batch], [r["suffix_ids"] for r in batch])
        z_index = None
        if candidates is not None:
            z_index = [[*chosen, *range(b, len(z))] for chosen in nearest(z[:b], candidates)]
        targets = [r["target_ids"][0] for r in batch[:b]]
        found = pair_scores(decoder, z, targets, token_budget, z_index=z_index).float().cpu()
        for j, chosen in enumerate(z_index or ()):
            found[[i for i in range(b) if i not in chosen], j] = -torch.inf
        if counts:
            scores[mine[0], :b, :b], scores[mine[0], size:, :b] = found[:b], found[b:]
    return distributed.all_reduce(scores.to(next(encoder.parameters()).device)).cpu()


def cached_teacher_scores(
    encoder: Any, decoder: Decoder, rows: Dataset, batch_size: int, fingerprint: dict[str, str], *, seed: int,
    num_blocks: int | None = None, console: Console | None = None, candidates: int | None = None,
    marginal_texts: int = 0,
) -> Tensor:  # fmt: skip
    """Scores (blocks of the data, B + R, B) of the first `num_blocks` blocks that a run reads, NaN elsewhere.

    They are kept in the cache of `datasets`, by fingerprint; what is missing there is computed and added, and saved
    every few minutes.

    Args:
        encoder: gives z (B, K, D) of ids and suffixes, and says its `num_compress_tokens`.
        batch_size, seed: of `sampling.blocks`.
        fingerprint: `ref_logps_fingerprint`.
        num_blocks: how many blocks the run reads; the same block counts again in the next epoch. None: all.
        candidates: as in `compute_teacher_scores`.
        marginal_texts: R, texts of the blocks that follow, which score every passage for its marginal.

    Raises:
        ValueError: the other blocks hold fewer texts than `marginal_texts`.
    """
    console = console or Console(quiet=True)
    all_blocks = sampling.blocks(len(rows), batch_size, seed)
    blocks = f"{batch_size} rows, seed {seed}"
    blocks += "" if candidates is None else f", {candidates} candidates"
    blocks += f", {marginal_texts} texts for the marginal" if marginal_texts else ""
    fingerprint = {**fingerprint, "blocks": blocks}
    order = [row for block in all_blocks for row in block]
    if marginal_texts > (most := len(order) - batch_size):
        raise ValueError(
            f"distillation_marginal_texts: got {marginal_texts}, expected at most {most}, the texts of the other blocks"
        )
    path = cached_path("teacher-scores", fingerprint)
    known = distributed.broadcast_from_rank0(
        lambda: load_scores(path, fingerprint, ("scores",), "teacher_scores")["scores"] if path.is_file() else None
    )
    b, r = batch_size, marginal_texts
    scores = torch.full((len(all_blocks), b + r, b), torch.nan) if known is None else known
    first_read = len(all_blocks) if num_blocks is None else num_blocks
    read = sorted(set(sampling.drawn(len(all_blocks), 0, first_read, seed)))
    wanted = [i for i in read if scores[i].isnan().any()]
    if not wanted:
        console.print(f"teacher scores: {path}")
        _print_found(scores[read], console)
        return scores
    targets, k = [t[0] for t in rows["target_ids"]], encoder.num_compress_tokens
    each = b if candidates is None else min(candidates + 1, b)  # z of its block that score a target
    owners = [(i + s) % b for s in range(each) for i in range(b)] + [b + s for s in range(r) for _ in range(b)]
    tokens = sum(decoder.num_pass_tokens(k, [targets[i] for i in all_blocks[j]] * (each + r), owners) for j in wanted)
    console.print(
        f"teacher scores: {len(wanted)} blocks of {b} × {each + r} pairs, {tokens:,} decoder tokens, computed once"
    )
    distributed.broadcast_from_rank0(
        lambda: require_writable_folder(path.parent, "HF_DATASETS_CACHE", files=[path.name])
    )
    start = saved = time.perf_counter()
    step = distributed.world_size()
    with Display(console, "teacher scores", len(wanted)) as display:
        for first in range(0, len(wanted), step):
            part = wanted[first : first + step]
            others = [[order[((i + 1) * b + s) % len(order)] for s in range(r)] for i in part]
            chosen = [all_blocks[i] for i in part]
            scores[part] = compute_teacher_scores(encoder, decoder, rows, chosen, SCORING_BUDGET, candidates, others)
            now = time.perf_counter()
            last = first + step >= len(wanted)
            if distributed.broadcast_from_rank0(lambda: last or now - saved > _SAVE_EVERY):  # noqa: B023
                saved = now
                distributed.broadcast_from_rank0(lambda: save_scores(path, {"scores": scores}, fingerprint))
            display.update(min(first + step, len(wanted)))
    console.print(f"teacher scores: {len(wanted)} blocks in {time.perf_counter() - start:.0f} s, stored in {path}")
    _print_found(scores[read], console)
    return scores


def _print_found(scores: Tensor, console: Console) -> None:
    found = retrieval_accuracy(scores)
    note = "" if found >= LEAST_FOUND else ", too few to teach: train stage 1 for longer"
    console.print(f"teacher scores: {found:.0%} of the texts find their own passage{note}", highlight=False)


@torch.no_grad()
def block_scores(
    encoder: Any, decoder: Decoder, tokenizer: Any, rows: Dataset, batch_size: int, *, seed: int = 0,
    console: Console | None = None,
) -> tuple[list[list[int]], Tensor]:  # fmt: skip
    """Blocks of `batch_size` rows, and the scores (blocks, B, B) of all of them, made once and kept as in a run.

    Args:
        encoder, console: as in `cached_teacher_scores`; `encoder` is in eval mode.
        rows: of `data.text_rows` or `data.alignment_rows`.

    Raises:
        ValueError: fewer rows than a block has.
    """
    if len(rows) < batch_size:
        raise ValueError(f"batch_size: got {batch_size} for {len(rows)} rows, expected at most as many")
    fingerprint = ref_logps_fingerprint(encoder, decoder, tokenizer, rows)
    scores = cached_teacher_scores(encoder, decoder, rows, batch_size, fingerprint, seed=seed, console=console)
    return sampling.blocks(len(rows), batch_size, seed), scores


def scores_of_rows(blocks: Sequence[int], places: Sequence[int], scores: Tensor) -> Tensor:
    """The scores (B, B) of the rows of a batch, in their order, from those with their whole block.

    Args:
        blocks, places: the block of each row, and its place there.
        scores: (B, rows of the block) of each row.

    Raises:
        ValueError: rows of several blocks, which have not been scored with each other.
    """
    if len(set(blocks)) > 1 or len(set(places)) < len(places):
        raise ValueError(
            f"teacher_scores: got rows of {len(set(blocks))} blocks in a batch, expected one block: batches of the "
            "batch_size that the scores were made with, whose rows stay together (BlockBatchSampler)"
        )
    return scores[:, torch.tensor(places, device=scores.device)]
