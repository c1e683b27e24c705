"""The flags of `autoregembed train`: the fields of `Config` by group, with the help text of its docstring."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser

from autoregembed.config import Config, Stage2Options

GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        "train_data", "train_split", "columns", "streaming", "instruction", "query_instruction", "passage_instruction",
        "max_length", "max_target_length", "eval_data",
        "eval_split", "num_proc",
    ),
    "model": (
        "model", "decoder", "gguf_file", "trust_remote_code", "num_compress_tokens", "z_norm", "decoder_add_bos",
        "init_output_rms", "freeze", "lora_rank", "lora_alpha", "lora_targets", "share_base",
        "base_dtype", "attention",
    ),
    "objective": (
        "stage", "alignment_weight", "contrastive_weight", "contrastive_temperature", "beta", "temperature",
        "ref_margin", "ref_logps_file", "logprob_reduction", "negatives", "hard_negatives",
        "distillation_weight", "distillation_temperature", "teacher_temperature", "distillation_pairs",
        "distillation_mixture",
    ),
    "optimizer": (
        "max_steps", "num_train_epochs", "batch_size", "token_budget", "learning_rate", "compress_learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm", "precision",
        "gradient_checkpointing", "decoder_gradient_checkpointing", "share_prefixes", "compile",
    ),
    "run": (
        "output_dir", "eval_steps", "save_steps", "save_total_limit", "save_best", "resume_from_checkpoint", "log_with",
        "seed", "deterministic", "on_nonfinite", "license", "model_name", "export_dtype",
    ),
}  # fmt: skip


def field_help() -> dict[str, str]:
    """The help text of every field, on one line each."""
    documented = [p for owner in (Stage2Options, Config) for p in parse(owner.__doc__ or "").params]
    return {p.arg_name: " ".join((p.description or "").split()) for p in documented}


def train_parser(**options: bool) -> ArgumentParser:
    """The parser of `autoregembed train`; `options` are those of jsonargparse."""
    usage = "autoregembed train [CONFIG.yaml] [--field value ...]"
    parser = ArgumentParser(prog="autoregembed train", usage=usage, description="Train one stage.", **options)
    parser.add_argument("--config", action="config", help="a YAML file with any of the fields below")
    hints, texts = get_type_hints(Config), field_help()
    known = {f.name: f for f in fields(Config)}
    listed = {name for names in GROUPS.values() for name in names}
    for title, names in {**GROUPS, "other": [name for name in known if name not in listed]}.items():
        group = parser.add_argument_group(title)
        for name in names:
            default, factory = known[name].default, known[name].default_factory
            if factory is not MISSING:
                default = factory()
            given = {"required": True} if default is MISSING else {"default": default}
            group.add_argument(f"--{name}", type=hints[name], help=texts.get(name, ""), **given)
    return parser
