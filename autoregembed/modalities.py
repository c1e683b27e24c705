"""The causal LM inside a model of several modalities, such as Gemma 3 and 4: text alone is read here."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def reads_more_than_text(model: Any) -> bool:
    """Whether the text model of a causal LM is one of several parts, beside those for images or sound."""
    return model.config.get_text_config() is not model.config


def text_model(model: Any) -> Any:
    """The causal LM inside a model of several modalities, made of the same modules; any other model as it is.

    Raises:
        ValueError: Transformers has no causal LM for text of that architecture.
    """
    if not reads_more_than_text(model):
        return model
    part = model.get_decoder()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(part.config), None)
    if kind is not None:
        with torch.device("meta"):
            text = kind(part.config)  # that object, where attention is set for the whole model
        if type(getattr(text, text.base_model_prefix)) is type(part):
            setattr(text, text.base_model_prefix, part)
            text.set_output_embeddings(model.get_output_embeddings())
            text.generation_config = model.generation_config
            return text.train(model.training)
    raise ValueError(
        f"model: got {type(model).__name__}, which reads more than text, and whose {type(part).__name__} is no causal "
        "LM of Transformers, expected one for text alone, or one such as Gemma 3"
    )
