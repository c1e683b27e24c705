"""Reference scores of stage 2: log-probabilities under the model before the stage, computed once and cached."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoregembed import data, distributed
from autoregembed.config import Config
from autoregembed.decoder import Decoder
from autoregembed.files import CheckpointError, atomic_file, tensor_fingerprint
from autoregembed.packing import make_microbatches
from autoregembed.prompt import Prompt, tokenizer_fingerprint


class RefLogpsMismatch(CheckpointError):
    """Reference scores on disk belong to other data, another model or another tokenizer."""


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
    config: Config, encoder, decoder, model: str, rows, read: int, prompt: Prompt, console: Console
) -> tuple[Tensor, Tensor]:
    """Scores of the first `read` rows of the run, from the file beside the data; those that it lacks are added.

    `model` is the fingerprint of encoder and decoder.
    """

    def find() -> tuple[dict[str, str], Path, tuple[Tensor, Tensor] | None]:
        fingerprint = {
            "data": data.content_fingerprint(rows),
            "model": model,
            "tokenizer": tokenizer_fingerprint(prompt.tokenizer),
        }
        if config.ref_logps_file:
            path = Path(config.ref_logps_file)
        else:
            local = Path(config.train_data)
            short = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
            parent = local.parent if local.is_file() else Path(config.output_dir)
            path = parent / f"{local.name}.reference-{short}.safetensors"
        return fingerprint, path, load_ref_logps(path, fingerprint) if path.is_file() else None

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
    distributed.broadcast_from_rank0(lambda: save_ref_logps(path, *scores, fingerprint))
    console.print(f"reference scores: {len(wanted)} rows in {time.perf_counter() - start:.0f} s, kept in {path}")
    return scores


def save_ref_logps(path: Path, positive: Tensor, negatives: Tensor, fingerprint: dict[str, str]) -> None:
    """r_a (R,) and r_c (R, M), NaN where a row has fewer negatives, with the identity of what they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"positive": positive.contiguous(), "negatives": negatives.contiguous()}
    with atomic_file(path) as temporary:
        save_file(scores, temporary, metadata={**fingerprint, "checksum": tensor_fingerprint(scores)})


def load_ref_logps(path: Path, fingerprint: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Raises RefLogpsMismatch showing both fingerprints, CheckpointError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            checksum = found.pop("checksum", None)
            if found != fingerprint:
                raise RefLogpsMismatch(
                    f"ref_logps: got scores of {found} in {str(path)!r}, expected those of {fingerprint}; remove "
                    "the file to have them computed anew"
                )
            scores = {name: file.get_tensor(name) for name in ("positive", "negatives")}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"ref_logps: got a damaged file {str(path)!r}: {error}") from error
    if tensor_fingerprint(scores) != checksum:
        raise CheckpointError(f"ref_logps: got a damaged file {str(path)!r}: its scores have another checksum")
    return scores["positive"], scores["negatives"]
