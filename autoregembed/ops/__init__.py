"""The ops: one module each, with its argument checks, `torch.library` registration, public function and module twin.

`_dispatch.py` describes the backends that `impl` names. The kernels are in kernels/<backend>/<op>.py.
"""

from autoregembed.ops._dispatch import ImplUnavailable, available_impls, default_impl
from autoregembed.ops.alignment_loss import NEGATIVES, REF_MARGINS, AlignmentLoss, AlignmentOutput, alignment_loss
from autoregembed.ops.compression_loss import CompressionLoss, compression_loss
from autoregembed.ops.conditional_alignment import AlignmentPairs, ConditionalAlignment, conditional_alignment
from autoregembed.ops.conditional_compression import ConditionalCompression, conditional_compression
from autoregembed.ops.generative_info_nce import GenerativeInfoNCELoss, generative_info_nce
from autoregembed.ops.info_nce import InfoNCELoss, info_nce
from autoregembed.ops.linear_logprob import LinearLogprob, linear_logprob
from autoregembed.ops.pool_last_k import PoolLastK, pool_last_k
from autoregembed.ops.score_distillation import ScoreDistillationLoss, score_distillation
from autoregembed.ops.segment_sum import SegmentSum, segment_sum
from autoregembed.ops.splice import Splice, splice

__all__ = [
    "NEGATIVES",
    "REF_MARGINS",
    "AlignmentLoss",
    "AlignmentOutput",
    "AlignmentPairs",
    "CompressionLoss",
    "ConditionalAlignment",
    "ConditionalCompression",
    "GenerativeInfoNCELoss",
    "ImplUnavailable",
    "InfoNCELoss",
    "LinearLogprob",
    "PoolLastK",
    "ScoreDistillationLoss",
    "SegmentSum",
    "Splice",
    "alignment_loss",
    "available_impls",
    "compression_loss",
    "conditional_alignment",
    "conditional_compression",
    "default_impl",
    "generative_info_nce",
    "info_nce",
    "linear_logprob",
    "pool_last_k",
    "score_distillation",
    "segment_sum",
    "splice",
]
