"""Fused training kernels for AutoRegEmbed text embeddings (arXiv 2502.11401)."""

import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():  # torch is all that is needed, and it warns where NumPy is not
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from autoregembed._version import __version__
from autoregembed.ops import (
    AlignmentLoss,
    AlignmentOutput,
    AlignmentPairs,
    CompressionLoss,
    ConditionalAlignment,
    ConditionalCompression,
    GenerativeInfoNCELoss,
    InfoNCELoss,
    LinearLogprob,
    PoolLastK,
    ScoreDistillationLoss,
    SegmentSum,
    Splice,
    alignment_loss,
    compression_loss,
    conditional_alignment,
    conditional_compression,
    generative_info_nce,
    info_nce,
    linear_logprob,
    pool_last_k,
    score_distillation,
    segment_sum,
    splice,
)

__all__ = [
    "AlignmentLoss",
    "AlignmentOutput",
    "AlignmentPairs",
    "CompressionLoss",
    "ConditionalAlignment",
    "ConditionalCompression",
    "Decoder",
    "Encoder",
    "GenerativeInfoNCELoss",
    "InfoNCELoss",
    "LinearLogprob",
    "PoolLastK",
    "ScoreDistillationLoss",
    "SegmentSum",
    "Splice",
    "__version__",
    "alignment_loss",
    "compression_loss",
    "conditional_alignment",
    "conditional_compression",
    "generative_info_nce",
    "info_nce",
    "linear_logprob",
    "pool_last_k",
    "score_distillation",
    "segment_sum",
    "splice",
]

if TYPE_CHECKING:
    from autoregembed.decoder import Decoder
    from autoregembed.encoder import Encoder


def __getattr__(name: str) -> Any:
    # Encoder and Decoder need Transformers; everything above runs with torch alone.
    if name in ("Decoder", "Encoder"):
        import importlib

        return getattr(importlib.import_module(f"autoregembed.{name.lower()}"), name)
    raise AttributeError(f"module 'autoregembed' has no attribute {name!r}")
