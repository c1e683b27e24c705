"""Builds what a run trains: encoder, frozen decoder and optimizer, from a `Config`."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch

from autoregembed.config import Config, ConfigError
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.files import CheckpointError
from autoregembed.models import add_compress_tokens, final_norm, load_causal_lm


def build_models(config: Config, *, with_decoder: bool = True) -> tuple[Encoder, Decoder | None, Any, dict]:
    """Encoder, frozen decoder (None where no objective needs it), tokenizer, and the recipe to save with the model.

    All on the CPU, where attention has one route; `config.attention` is for where they will run.
    """
    options: dict[str, Any] = {"gguf_file": config.gguf_file, "trust_remote_code": config.trust_remote_code}
    model, tokenizer, recipe = load_causal_lm(config.model, **options)
    known = len(recipe.get("compress_token_ids", []))
    k = config.num_compress_tokens or known or 5
    if known and k != known:
        raise CheckpointError(
            f"num_compress_tokens: got {k}, expected {known}, the number {config.model!r} was trained with"
        )
    source = config.decoder or recipe.get("decoder") or config.model
    decoder = None
    if config.needs_decoder and with_decoder:
        frozen = copy.deepcopy(model) if source == config.model and not recipe else None
        if frozen is None:
            gguf = config.gguf_file if config.decoder else recipe.get("decoder_gguf_file")
            frozen, _, decoder_recipe = load_causal_lm(source, **{**options, "gguf_file": gguf})
            if decoder_recipe:
                raise ConfigError(f"decoder: got {source!r}, a trained encoder; expected the original model")
        bos_token_id = tokenizer.bos_token_id if config.decoder_add_bos else None
        if config.decoder_add_bos and bos_token_id is None:
            raise ConfigError(f"decoder_add_bos: got True, expected False: the tokenizer of {source!r} has no bos")
        decoder = Decoder(
            frozen, eos_token_id=tokenizer.eos_token_id, bos_token_id=bos_token_id, z_norm=config.z_norm,
            logprob_reduction=config.logprob_reduction if config.stage == 2 else "sum", attention="sdpa",
        )  # fmt: skip
    ids = recipe.get("compress_token_ids") or add_compress_tokens(model, tokenizer, k)
    if config.gradient_checkpointing:
        # The older name is deprecated in Transformers 5.24.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        names = {module: name for name, module in model.named_modules()}
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=config.lora_targets,
            trainable_token_indices={names[model.get_input_embeddings()]: ids},
            # The whole name: PEFT compares ends, and "norm" is the end of every layer's norms.
            modules_to_save=[names[final_norm(model)]] if config.init_output_rms else None,
        )
        model = get_peft_model(model, lora)
    bos = tokenizer.bos_token_id
    encoder = Encoder(
        model,
        compress_token_ids=ids,
        bos_token_id=bos,
        attention="sdpa",
        own_compress_rows=not config.lora_rank,
    )
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in config.freeze) and "trainable_tokens" not in name:
            parameter.requires_grad_(False)
    if not config.lora_rank and model.get_output_embeddings() is not None:
        head = model.get_output_embeddings().weight
        if head is not model.get_input_embeddings().weight:
            head.requires_grad_(False)  # the encoder never reads it
    if config.compile:
        for lm in (model, decoder.model if decoder is not None else None):
            for layer in getattr(getattr(lm, "model", None), "layers", []):
                layer.compile(dynamic=True)
    saved = {
        "version": 1,
        "compress_token_ids": ids,
        "instruction": config.instruction,
        "z_norm": config.z_norm,
        "decoder_add_bos": config.decoder_add_bos,
        "output_rms_initialized": recipe.get("output_rms_initialized", False),
        "stage": config.stage,
        "decoder": str(Path(source).resolve()) if Path(source).exists() else source,
        "decoder_gguf_file": config.gguf_file if (config.decoder or not recipe) else recipe.get("decoder_gguf_file"),
    }
    return encoder, decoder, tokenizer, saved


def create_optimizer(encoder: Encoder, config: Config) -> torch.optim.Optimizer:
    """AdamW with the compress-token embeddings in a group of their own."""
    compress = [p for n, p in encoder.named_parameters() if p.requires_grad and is_compress_parameter(n)]
    others = [p for n, p in encoder.named_parameters() if p.requires_grad and not is_compress_parameter(n)]
    groups = [
        {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": compress, "lr": config.compress_learning_rate or config.learning_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, config.adam_beta2), fused=True)


def is_compress_parameter(name: str) -> bool:
    return name == "compress_rows" or "trainable_tokens" in name
