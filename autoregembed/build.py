"""Builds what a run trains: encoder, frozen decoder and optimizer, from a `Config`."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autoregembed import distributed
from autoregembed.adapters import copy_adapter, embedding_name
from autoregembed.attention import compile_layers
from autoregembed.config import Config, ConfigError
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.lora_base import is_on_original, lora_settings, start_of
from autoregembed.models import (
    RECIPE_VERSION,
    final_norm,
    fit_length,
    load_causal_lm,
    max_positions,
    module_name,
    original_in,
    original_of,
    read_recipe,
    require_source,
)
from autoregembed.passes import checkpoint_options
from autoregembed.prompt import Prompt
from autoregembed.quantized import QUANTIZERS
from autoregembed.sharing import cast_parameters


def build_models(config: Config, *, with_decoder: bool = True) -> tuple[Encoder, Decoder | None, Any, dict]:
    """Encoder, frozen decoder (None where no objective needs it), tokenizer, and the recipe to save with the model.

    The models are on the CPU with SDPA attention; `config.attention` applies after they move to their device.
    """
    require_source(config.model)
    recipe = read_recipe(config.model)
    start = start_of(config, recipe)
    model, tokenizer, _ = load_causal_lm(
        start.source, gguf_file=start.gguf_file, dtype=start.dtype, trust_remote_code=config.trust_remote_code,
        quantization=start.quantization,
    )  # fmt: skip
    if recipe.get("centering"):
        raise ConfigError(
            f"model: got {config.model!r}, an export with a centring, which training would make wrong; expected the "
            "model/ of its run, or an export without"
        )
    original = original_of(config.model, config.gguf_file)
    if config.decoder and start.adapter is None:
        original = original_of(config.decoder, config.gguf_file)
    elif recipe.get("decoder"):
        original = {name: recipe.get(name) for name in original}
        if config.needs_decoder and with_decoder:
            original_in(recipe, config.model)
    decoder = None
    if config.needs_decoder and with_decoder and not start.shared:
        own = not recipe and config.decoder in (None, config.model) and not start.quantization
        decoder = _decoder(config, original, copy.deepcopy(model).float() if own else None, tokenizer)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(checkpoint_options(config.gradient_checkpointing))
    # An adapter on the original model brings its compress tokens along.
    known = recipe if start.adapter is None else {k: v for k, v in recipe.items() if k != "compress_token_ids"}
    encoder = Encoder.from_model(
        model, tokenizer, recipe=known, num_compress_tokens=config.num_compress_tokens, attention="sdpa",
        compress_init=config.compress_init, instruction=config.instruction,
        max_length=fit_length("max_length", config.max_length, max_positions(model)),
        lora_rank=0 if start.adapter else config.lora_rank, lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets, adapter=start.adapter,
        # The whole name: PEFT compares ends, and "norm" is the end of every layer's norms.
        lora_modules_to_save=[module_name(model, final_norm(model))] if config.init_output_rms else None,
        own_compress_rows=True,
    )  # fmt: skip
    if config.lora_rank:
        embedding_name(encoder.model)
    given = {"query": config.query_instruction, "document": config.passage_instruction}
    encoder.prompts |= {name: text for name, text in given.items() if text is not None}
    for name, parameter in encoder.model.named_parameters():
        if any(re.search(pattern, name) for pattern in config.freeze) and "trainable_tokens" not in name:
            parameter.requires_grad_(False)
    if config.needs_decoder and with_decoder and start.shared:
        options = _decoder_options(config, tokenizer)
        decoder = Decoder.sharing(encoder, **options)
    if start.dtype != torch.float32:
        cast_parameters(encoder, torch.float32, trained=True)
    if config.compile:
        for lm in (encoder, decoder):
            if lm is not None:
                compile_layers(lm.model)
    encoder.recipe = {
        "version": RECIPE_VERSION,
        "compress_token_ids": encoder.compress_token_ids,
        "instruction": config.instruction,
        "prompts": encoder.prompts,
        "bos_token_id": encoder.bos_token_id,
        "max_length": encoder.max_length,
        "z_norm": config.z_norm,
        "decoder_add_bos": config.decoder_add_bos,
        "output_rms_initialized": recipe.get("output_rms_initialized", False),
        "stage": config.stage,
        "adapter": lora_settings(config) if is_on_original(config, start, recipe) else None,
        **({} if recipe.get("lm_head", True) else {"lm_head": False}),  # an export has none to go on with
        **original,
    }
    return encoder, decoder, tokenizer, encoder.recipe


def prompt_of(config: Config, encoder: Encoder, decoder: Decoder | None) -> Prompt:
    """What the encoder reads around a text, with targets as long as `config` and the decoder allow."""
    if decoder is None:
        return encoder.prompt
    length = decoder.fit_max_target_length(encoder.num_compress_tokens, config.max_target_length)
    return replace(encoder.prompt, max_target_length=length)


def on_plain_weights(config: Config, encoder: Encoder) -> Encoder:
    """A trained encoder as it is; in process 0, with a quantised base, its adapter on weights read anew, in fp32."""
    if config.base_dtype not in QUANTIZERS or distributed.rank() > 0:
        return encoder
    whole = build_models(replace(config, base_dtype="fp32", compile=False), with_decoder=False)[0]
    copy_adapter(encoder.model, whole.model)
    assert whole.compress_rows is not None
    assert encoder.compress_rows is not None
    with torch.no_grad():
        whole.compress_rows.copy_(encoder.compress_rows)
    whole.suffix_ids, whole.recipe = encoder.suffix_ids, encoder.recipe
    return whole


def _decoder_options(config: Config, tokenizer: Any) -> dict[str, Any]:
    if config.decoder_add_bos and tokenizer.bos_token_id is None:
        raise ConfigError(f"decoder_add_bos: got True, expected False: the tokenizer of {config.model!r} has no bos")
    return {
        "z_norm": config.z_norm,
        "add_bos": config.decoder_add_bos,
        "logprob_reduction": config.logprob_reduction if config.stage == 2 else "sum",
        "attention": "sdpa",
        "share_prefixes": config.share_prefixes,
        "gradient_checkpointing": config.decoder_gradient_checkpointing,
    }


def _decoder(config: Config, original: dict[str, Any], model: Any, tokenizer: Any) -> Decoder:
    """The frozen decoder; `model` is None where it is not the encoder's own start."""
    source, gguf_file = original["decoder"], original["decoder_gguf_file"]
    options = _decoder_options(config, tokenizer)
    if model is not None:
        return Decoder.from_model(model, tokenizer, **options)
    if config.decoder is None and Path(source).is_absolute() and not Path(source).exists():
        raise ConfigError(
            f"decoder: got None, and {source!r}, the model that {config.model!r} was trained from, no longer exists; "
            "expected the path where it is now"
        )
    if read_recipe(source):
        raise ConfigError(f"decoder: got {source!r}, a trained encoder; expected the original model")
    return Decoder.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=config.trust_remote_code, **options)


def create_optimizer(encoder: Encoder, config: Config) -> torch.optim.Optimizer:
    """AdamW with the compress-token embeddings in a group of their own."""
    return _adamw(_groups(encoder, config), config)


def placeholder_optimizer(encoder: Encoder, config: Config) -> torch.optim.Optimizer:
    """The optimizer of an encoder whose other parameters are not there yet; `fill_optimizer` makes it whole."""
    return _adamw([{"params": [encoder.compress_rows]}], config)


def fill_optimizer(optimizer: torch.optim.Optimizer, encoder: Encoder, config: Config) -> None:
    """Gives an optimizer the groups of `create_optimizer` in place of those that it has."""
    optimizer.param_groups.clear()
    for group in _groups(encoder, config):
        optimizer.add_param_group(group)


def _adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, config.adam_beta2), fused=True)


def _groups(encoder: Encoder, config: Config) -> list[dict[str, Any]]:
    compress = [p for n, p in encoder.named_parameters() if p.requires_grad and is_compress_parameter(n)]
    others = [p for n, p in encoder.named_parameters() if p.requires_grad and not is_compress_parameter(n)]
    groups = [
        {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": compress, "lr": config.compress_learning_rate or config.learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def is_compress_parameter(name: str) -> bool:
    return name == "compress_rows" or "trainable_tokens" in name
