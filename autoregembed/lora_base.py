"""The frozen weights that a LoRA run stands on: which model's, in which dtype, and whether the decoder shares them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoregembed import loading
from autoregembed.adapters import save_adapter
from autoregembed.config import Config, ConfigError
from autoregembed.files import atomic_folder
from autoregembed.model_card import adapter_card
from autoregembed.models import original_in, original_of, read_recipe
from autoregembed.quantized import QUANTIZERS, loading_options
from autoregembed.runtime import HALF_DTYPES, choose_precision
from autoregembed.sharing import cast_parameters

ADAPTER = "adapter"  # in the folder of a model: the adapter on the original model that its weights were merged from
_NAMES = {"fp32": torch.float32, **HALF_DTYPES}


@dataclass(frozen=True)
class Start:
    """Where the encoder of a run starts."""

    source: str
    gguf_file: str | None
    adapter: Path | None  # that of an earlier stage, which goes on
    shared: bool  # its weights are the decoder's
    dtype: torch.dtype  # of the weights, of quantised ones: of embeddings and head
    quantization: dict[str, Any]  # options of `from_pretrained`


def lora_settings(config: Config) -> dict[str, Any]:
    """What an adapter must have in common with a run that goes on with it."""
    return {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": config.lora_targets}


def start_of(config: Config, recipe: dict[str, Any]) -> Start:
    """Where the encoder of a run starts; `recipe` is that of the folder `config.model`.

    Raises:
        ConfigError: `share_base: true` where the base cannot be shared; the message says why.
        CheckpointError: the original model, which is to be shared, is gone.
    """
    reason = _why_not(config, recipe)
    if config.share_base is True and reason is not None:
        raise ConfigError(f"share_base: got True, expected auto or False: {reason}")
    shared = config.lora_rank > 0 and reason is None and config.share_base is not False
    source, gguf_file, adapter = config.model, config.gguf_file, None
    if shared and recipe:
        source, gguf_file = original_in(recipe, config.model)
        adapter = Path(config.model) / ADAPTER
    kind = config.base_dtype
    by_precision = (shared and kind == "auto") or kind in QUANTIZERS
    dtype = _NAMES.get(choose_precision(config) if by_precision else kind, torch.float32)
    if gguf_file and kind in QUANTIZERS:
        raise ConfigError(f"base_dtype: got {kind!r}, expected 'auto', 'fp32', 'bf16' or 'fp16' for a GGUF file")
    quantization = {} if loading.absent() else loading_options(kind, dtype)
    return Start(source, gguf_file, adapter, shared, dtype, quantization)


def not_shared_because(config: Config) -> str | None:
    """Why `share_base: auto` shares nothing in a run with adapters; None where it shares."""
    automatic = config.lora_rank > 0 and config.share_base == "auto"
    return _why_not(config, read_recipe(config.model)) if automatic else None


def _why_not(config: Config, recipe: dict[str, Any]) -> str | None:
    if not config.lora_rank:
        return "lora_rank is 0, and what trains all weights needs a decoder of its own"
    if not recipe:
        if config.decoder in (None, config.model):
            return None
        return f"decoder {config.decoder!r} is another model than {config.model!r}"
    known = recipe.get("adapter")
    if known is None or not (Path(config.model) / ADAPTER).is_dir():
        return (
            f"{config.model!r} has trained weights and no adapter on those of the decoder, as a first stage with "
            "lora_rank leaves it in model/adapter"
        )
    if config.decoder and original_of(config.decoder, None)["decoder"] != recipe["decoder"]:
        return f"decoder {config.decoder!r} is another model than {recipe['decoder']!r}, which the adapter was made for"
    for name, value in lora_settings(config).items():
        if known.get(name) != value:
            return (
                f"lora_{name} is {value!r}, and {known.get(name)!r} in the adapter of {config.model!r}, with which the "
                "run would go on"
            )
    if config.init_output_rms and not recipe.get("output_rms_initialized"):
        return f"init_output_rms scales a final norm, and the adapter of {config.model!r} has none of its own"
    return None


def is_on_original(config: Config, start: Start, recipe: dict[str, Any]) -> bool:
    """Whether the adapters of a run stand on the weights of the decoder that it names, so that a next stage can share.

    `recipe` is that of `config.model`.
    """
    return config.lora_rank > 0 and (
        start.adapter is not None or (not recipe and config.decoder in (None, config.model))
    )


def write_adapter(config: Config, encoder: Any, folder: Path) -> Path:
    """Writes the adapter of a run, with a card that says how to load it, whole or not at all."""
    on_original = encoder.recipe["adapter"] is not None
    base = encoder.recipe["decoder"] if on_original else config.model
    gguf_file = encoder.recipe["decoder_gguf_file"] if on_original else config.gguf_file
    with atomic_folder(folder, overwrite=True) as temporary:
        save_adapter(encoder, temporary)
        text = adapter_card(base, config.instruction, encoder.num_compress_tokens, gguf_file)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return folder


def place(encoder: nn.Module, decoder: Any, device: torch.device | None, half: torch.dtype | None) -> None:
    """Moves the models of a run to `device`, if any; a decoder with weights of its own takes them in `half`."""
    if decoder is not None and decoder.shared is None and half is not None:
        cast_parameters(decoder, half)
    for model in (encoder, decoder):
        if model is not None and device is not None:
            model.to(device)
