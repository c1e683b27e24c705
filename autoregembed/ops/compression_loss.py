"""compression_loss: information compression, stage 1 of AutoRegEmbed."""

from __future__ import annotations

from torch import Tensor, nn

from autoregembed import reference as spec
from autoregembed.ops._checks import FLOATS, require_number, require_tensor


def compression_loss(logprob: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Token mean of −log p(output | z): stage 1 of AutoRegEmbed (arXiv 2502.11401, §3.2).

    Args:
        logprob: (S,) log-probabilities of whole targets, nats.
        num_tokens: (S,) tokens of each target, including its eos, or their total.

    Returns:
        () nats per token; 0, attached to the graph, if there is no token.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    require_tensor("logprob", logprob, FLOATS, {"S": None})
    if not isinstance(num_tokens, Tensor):
        require_number("num_tokens", num_tokens)
    return spec.compression_loss(logprob, num_tokens)


class CompressionLoss(nn.Module):
    """`compression_loss` as a module."""

    def forward(self, logprob: Tensor, num_tokens: Tensor | int) -> Tensor:  # (S,), (S,)
        return compression_loss(logprob, num_tokens)
