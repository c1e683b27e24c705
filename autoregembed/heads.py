"""The two ends of a decoder's model: what the fused ops read of it must be all that they do."""

from __future__ import annotations

from typing import Any

import torch

from autoregembed.loading import reads_values
from autoregembed.models import base_model, describe_dtypes


@reads_values
def require_plain_embedding(model: Any, embedding_scale: float) -> None:
    """Raises ValueError for input embeddings that are not rows of their matrix times `embedding_scale`."""
    # `logprob` reads the matrix, so what a module adds to it (LoRA) or makes of it (dequantisation) would be lost.
    embedding = model.get_input_embeddings()
    weight = embedding.weight
    for ids in torch.arange(weight.shape[0], device=weight.device).split(8192):
        found = embedding(ids)
        wanted = weight[ids]
        if wanted.is_floating_point():
            wanted = wanted * torch.tensor(embedding_scale, dtype=weight.dtype, device=weight.device)
        if wanted.shape != found.shape or not torch.equal(found, wanted):
            raise ValueError(
                f"model: got input embeddings of type {type(embedding).__name__} that are not rows of its "
                "weight, expected a plain nn.Embedding: merge adapters into it (merge_and_unload)"
            )


@reads_values
def require_linear_head(model: Any, eos_token_id: int, softcap: float | None, scale: float) -> None:
    """Raises ValueError for logits that are not softcap(scale · (hidden Wᵀ + bias)), by comparison with the model's."""
    head = model.get_output_embeddings()
    ids = torch.tensor([[eos_token_id, 0]], device=head.weight.device)
    try:
        wanted = model(input_ids=ids).logits[0].double()
    except RuntimeError as error:
        raise ValueError(
            f"model: got {type(model).__name__}, whose head cannot be run ({error})"
            f"{describe_dtypes(model)}; expected a head and a base model that fit each other"
        ) from error
    hidden = base_model(model)(input_ids=ids).last_hidden_state[0]
    if hidden.shape[-1] != head.weight.shape[1] or wanted.shape[-1] != len(head.weight):
        raise ValueError(
            f"model: got hidden states of {hidden.shape[-1]} dimensions and {wanted.shape[-1]} logits for an "
            f"lm_head of shape {tuple(head.weight.shape)}, expected those of lm_head: take another model as the "
            "decoder"
        )
    found = scale * head(hidden).double()
    if softcap is not None:
        found = softcap * torch.tanh(found / softcap)
    # Some models cap and scale their logits in float32 whatever their dtype.
    eps = max(torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = 32 * eps * (1 + wanted.abs().max())
    if not (found - wanted).abs().max() <= tolerance:
        raise ValueError(
            f"model: got logits that are not softcap(scale · (hidden Wᵀ + bias)) with softcap={softcap}, "
            f"scale={scale} (difference {float((found - wanted).abs().max()):.3g}), expected such ones: this "
            "head is not supported, take another model as the decoder"
        )
