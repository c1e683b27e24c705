"""What the losses for trainers take where a user says nothing: the recommended objective, the encoder's decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.models import original_in

# As in the ready configurations, but without a reference, whose scores would have to be made before the training.
RECOMMENDED = Stage2Options(alignment_weight=0.2, contrastive_weight=1.0, ref_margin="none")


def default_decoder(
    recipe: Mapping[str, Any], source: str, *, bos_token_id: int | None, dtype: torch.dtype, device: torch.device
) -> Decoder:
    """The original model of an encoder as its decoder; it reads z as in the encoder's training, else scaled, after bos.

    Args:
        recipe: `Encoder.recipe`, or `autoregembed.json` of the encoder's folder.
        source: that folder or model, for errors.
        bos_token_id: the encoder's; None where its tokenizer has none.
        dtype, device: of the weights.

    Raises:
        ValueError: the recipe names no original model.
        CheckpointError: that model cannot be loaded.
    """
    if not recipe.get("decoder"):
        raise ValueError(
            f"decoder: got None with a model from {source!r}, which does not say what it was made from, expected "
            "Decoder.from_pretrained of that model"
        )
    original, gguf_file = original_in(dict(recipe), source)
    add_bos = recipe.get("decoder_add_bos")
    return Decoder.from_pretrained(
        original, gguf_file=gguf_file, z_norm=recipe.get("z_norm") or "match_rms",
        add_bos=bos_token_id is not None if add_bos is None else add_bos, dtype=dtype, device=device,
    )  # fmt: skip


def with_batch_negatives(rows: list[dict]) -> list[dict]:
    """Rows in which one without a negative has the positive of the next row with another one, where there is any."""
    out = []
    for i, row in enumerate(rows):
        (positive, *negatives) = row["target_ids"]
        others = (r["target_ids"][0] for r in (*rows[i + 1 :], *rows[:i]))
        found = negatives or [next((ids for ids in others if ids != positive), None)]
        out.append({**row, "target_ids": [positive, *(ids for ids in found if ids is not None)]})
    return out
