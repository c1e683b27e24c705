"""The flags of `autoregembed train`: the fields of `Config` by group, with the help text of its docstring.

And a `Config` from them and YAML files.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from docstring_parser import parse
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from autoregembed.config import Config, ConfigError, Stage2Options

GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        "train_data", "train_split", "columns", "streaming", "instruction", "query_instruction", "passage_instruction",
        "max_length", "max_target_length", "eval_data",
        "eval_split", "eval_metric", "num_proc",
    ),
    "model": (
        "model", "decoder", "gguf_file", "trust_remote_code", "num_compress_tokens", "compress_init", "z_norm",
        "decoder_add_bos", "init_output_rms", "freeze", "lora_rank", "lora_alpha", "lora_targets", "share_base",
        "base_dtype", "attention",
    ),
    "objective": (
        "stage", "alignment_weight", "contrastive_weight", "contrastive_temperature", "beta", "temperature",
        "ref_margin", "ref_logps_file", "logprob_reduction", "negatives", "hard_negatives",
        "distillation_weight", "distillation_temperature", "teacher_temperature", "distillation_pairs",
        "distillation_mixture", "distillation_candidates", "distillation_marginal_texts",
    ),
    "optimizer": (
        "max_steps", "num_train_epochs", "batch_size", "token_budget", "learning_rate", "compress_learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm", "precision",
        "gradient_checkpointing", "decoder_gradient_checkpointing", "share_prefixes", "compile", "cuda_graphs",
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


def plan_parser(**options: Any) -> ArgumentParser:
    """The parser of what `autoregembed plan` takes besides the flags of `train`."""
    parser = ArgumentParser(
        prog="autoregembed plan",
        usage="autoregembed plan CONFIG.yaml [CONFIG.yaml ...] [--device cpu|cuda] [--field value ...]",
        description="Compute the memory of a run before any weight is loaded. Also takes all flags of train.",
        **options,
    )
    parser.add_argument("--device", type=str | None, help="cpu or cuda: where the run will be; by default as here")
    parser.add_argument("--memory", type=float | None, help="memory of that device in GB; by default as here")
    parser.add_argument("--processes", type=int, default=1, help="number of processes on one machine")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights over them with FSDP2; otherwise DDP")
    return parser


def _split_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The values that belong to no flag, and the rest."""
    takes_value = [a.startswith("-") and "=" not in a for a in arguments]
    alone = [i for i, a in enumerate(arguments) if not a.startswith("-") and not (i and takes_value[i - 1])]
    return [arguments[i] for i in alone], [a for i, a in enumerate(arguments) if i not in alone]


def read_configs(arguments: list[str]) -> list[Any]:
    """`read_config` for stages that run one after the other, from one YAML file each.

    Flags override all files. Each stage starts from the model of the one before it; an `output_dir` that all have in
    common receives a folder for each, with the name of its file.
    """
    files, flags = _split_configs(arguments)
    if len(files) < 2:
        return [read_config(arguments)]
    configs: list[Any] = []
    for file in files:
        start = ["--model", str(Path(configs[-1].output_dir) / "model")] if configs else []
        configs.append(read_config([file, *flags, *start]))
    if len({c.output_dir for c in configs}) == 1:
        stems = [Path(file).stem for file in files]
        if len(set(stems)) < len(stems):
            raise ValueError(f"config: got files named {stems}, expected different names, which name their folders")
        for config, stem in zip(configs, stems, strict=True):
            config.output_dir = str(Path(config.output_dir) / stem)
    for before, config in itertools.pairwise(configs):
        config.model, config.gguf_file = str(Path(before.output_dir) / "model"), None  # no GGUF folder any more
    return configs


def read_config(arguments: list[str]) -> Any:
    """Reads `[CONFIG.yaml] [--field value ...]`, in any order, into a validated `Config`; flags override the file.

    Raises:
        ConfigError: more than one file, an unknown field (the nearest valid one is named), or a value of the wrong
            type or range.
    """
    alone, flags = _split_configs(arguments)
    if len(alone) > 1:
        found = ", ".join(map(repr, alone))
        raise ConfigError(f"config: got {found}, expected one YAML file, and one value for each flag")
    if alone:  # first, so that flags override it wherever it stands
        arguments = ["--config", *alone, *flags]
    fields = list(inspect.signature(Config).parameters)
    names = [a[2:].split("=")[0] for a in arguments if a.startswith("--")]
    if "--config" in arguments:
        if arguments[-1] == "--config":
            raise ConfigError("config: got no value, expected a YAML file")
        path = Path(arguments[arguments.index("--config") + 1]).expanduser()
        arguments = [str(path) if i and arguments[i - 1] == "--config" else a for i, a in enumerate(arguments)]
        try:
            text = path.read_text(encoding="utf-8")
            if len(text) > 1 << 20 or text.count("[") + text.count("{") > 1000:
                raise ValueError("it is too large or too deeply nested for a config")
            # Aliases of aliases make a few lines into gigabytes, and a flat config needs none.
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
                raise ValueError("it holds a YAML alias")
            values = yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"config: got {str(path)!r}, which cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config: got {type(values).__name__} in {str(path)!r}, expected a mapping of fields")
        names += map(str, values)
    for name in names:
        if name not in (*fields, "config", "help", "print_config"):
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{name}: got an unknown field{hint}, expected {', '.join(fields)}")
    try:
        parsed: Namespace = train_parser(exit_on_error=False).parse_args(arguments)
    except ArgumentError as error:
        wrong = re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)', str(error), re.DOTALL)
        if wrong is None or wrong[1] not in fields:
            raise ConfigError(f"config: got fields that cannot be parsed: {error}") from error
        allowed = Config.__dataclass_fields__[wrong[1]].type
        raise ConfigError(f"{wrong[1]}: got {wrong[2].strip()}, expected {allowed}") from error
    return Config(**{name: parsed[name] for name in fields})
