"""The decoder's packed input, rows of z among embedding rows, for any torch device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def z_rows(cu_seqlens: Tensor, offset: int, k: int) -> Tensor:
    """The rows of the pack that hold z, pair by pair: cu_seqlens (S+1,) -> (S·K,)"""
    starts = cu_seqlens[:-1].long() + offset
    return (starts[:, None] + torch.arange(k, device=cu_seqlens.device)).flatten()


def forward(
    z: Tensor,  # (B, K, D)
    embedding: Tensor,  # (V, D)
    ids: Tensor,  # (T,) in [0, V), in the places of z as well
    rows: Tensor,  # (S·K,) the places of z, from `z_rows`
    z_index: Tensor | None,  # (S,)
    scale: float,
) -> Tensor:
    """(T, D) in the embedding's dtype"""
    source = (z if z_index is None else z[z_index]).flatten(0, 1).to(embedding.dtype)
    embedded = F.embedding(ids, embedding)
    if scale != 1.0:
        embedded = embedded * scale
    return embedded.index_copy(0, rows, source)
