"""The configuration of a run: every field is a line of the YAML file and a flag of `autoregembed train`."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from autoregembed.prompt import INSTRUCTION
from autoregembed.reference import (
    BETA,
    DISTILLATION_TEMPERATURE,
    INFO_NCE_TEMPERATURE,
    TEACHER_TEMPERATURE,
    TEMPERATURE,
)


class ConfigError(ValueError):
    """A field of the configuration has a wrong type or value, or contradicts another field."""


def _matches(value: object, hint: Any) -> bool:
    """Whether a value has a field's type; an int is a float too, a bool is neither."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(type(value) is type(p) and value == p for p in parts)
    if origin in (Union, UnionType):
        return any(_matches(value, part) for part in parts)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_matches(k, parts[0]) and _matches(v, parts[1]) for k, v in pairs)
    if origin is list:
        return isinstance(value, list) and all(_matches(v, parts[0]) for v in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _parse_columns(text: str) -> dict[str, str]:
    """ "query=question,pos=answer" as a mapping."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (x.strip() for x in part.partition("="))
        if not (name and equals and column) or name in found:
            raise ConfigError(f"columns: got {text!r}, expected name=column,…, such as query=question,pos=answer")
        found[name] = column
    return found


@dataclass(kw_only=True)
class Stage2Options:
    """The objective of stage 2: conditional distribution alignment, InfoNCE and score distillation, by weight.

    Args:
        alignment_weight: factor of the alignment loss. With 0 the alignment needs no decoder.
        contrastive_weight: factor of InfoNCE over the text embeddings. Equal texts are never negatives of each other.
        contrastive_temperature: temperature of InfoNCE.
        beta: β of the alignment loss.
        temperature: τ of the alignment loss.
        ref_margin: how the reference model's margin enters: add (the released code), subtract (as in DPO), or none.
        negatives: independent (one binary loss per negative) or joint (all negatives in one denominator).
        hard_negatives: also encode the negatives and use them in InfoNCE.
        distillation_weight: factor of score distillation, which teaches the cosines the scores log p(d_j | z_i) of the
            model that the stage starts from, for all pairs in a block of rows. Rows may be texts without labels.
        distillation_temperature: temperature of the cosines in score distillation.
        teacher_temperature: temperature of the scores in score distillation, in nats.
        distillation_pairs: mask leaves out a query's own passage and equal texts, so nothing is learned from which
            texts belong together; keep uses them.
        distillation_mixture: λ. The target is λ · teacher + (1 − λ) · the known pair. A value below 1 needs
            distillation_pairs=keep.

    Raises:
        ConfigError: a field has a wrong type or value; the message names it.
    """

    alignment_weight: float = 1.0
    contrastive_weight: float = 0.0
    contrastive_temperature: float = INFO_NCE_TEMPERATURE
    beta: float = BETA
    temperature: float = TEMPERATURE
    ref_margin: Literal["add", "subtract", "none"] = "add"
    negatives: Literal["independent", "joint"] = "independent"
    hard_negatives: bool = False
    distillation_weight: float = 0.0
    distillation_temperature: float = DISTILLATION_TEMPERATURE
    teacher_temperature: float = TEACHER_TEMPERATURE
    distillation_pairs: Literal["mask", "keep"] = "mask"
    distillation_mixture: float = 1.0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _matches(value, hint):
                expected = type(self).__dataclass_fields__[name].type
                kind = type(value)
                of = "" if kind.__module__ == "builtins" else f" of type {kind.__module__}.{kind.__qualname__}"
                raise ConfigError(f"{name}: got {str(value)[:200]!r}{of}, expected {expected}")
        self._require_at_least(0, "alignment_weight", "contrastive_weight", "distillation_weight")
        self._require_positive(
            "beta", "temperature", "contrastive_temperature", "distillation_temperature", "teacher_temperature"
        )
        if not (self.alignment_weight or self.contrastive_weight or self.distillation_weight):
            raise ConfigError(
                "alignment_weight: got 0 with contrastive_weight 0 and distillation_weight 0, expected one of them "
                "above 0"
            )
        if not 0 <= self.distillation_mixture <= 1:
            raise ConfigError(f"distillation_mixture: got {self.distillation_mixture}, expected 0..1")
        if self.distillation_mixture < 1 and self.distillation_pairs == "mask":
            raise ConfigError(
                f"distillation_pairs: got 'mask' with distillation_mixture {self.distillation_mixture}, expected "
                "'keep': the known pairs are a part of the target"
            )

    def _require_at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"{name}: got {value}, expected at least {least}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}: got {value}, expected a positive number")

    @property
    def uses_ref_logps(self) -> bool:
        """Whether the alignment loss reads reference log-probabilities."""
        return self.alignment_weight > 0 and self.ref_margin != "none"


@dataclass
class Config(Stage2Options):
    """One training run.

    Args:
        stage: 1 is information compression, 2 is conditional distribution alignment.
        model: the encoder to start from: the folder or hub id of a causal LM. Stage 2 normally starts from the model
            of stage 1.
        train_data: a jsonl, json, csv, tsv, txt or parquet file, several files, a folder of .txt files, a BEIR folder,
            or a hub id. Stage 1 reads the columns context, output and optionally instruction, or text. Stage 2 reads
            query, pos and optionally neg, instruction and prompt, which stands before the query. The names anchor,
            positive, negative and negative_1, negative_2 … work too.
        output_dir: receives model/, export/, checkpoints/, metrics.jsonl and summary.json.
        decoder: the frozen decoder. Default: the one that `model` was trained with, otherwise `model` itself.
        gguf_file: the file inside `model` (and `decoder`) to read, when it is a folder with a GGUF file.
        trust_remote_code: run model code that comes with a hub repository.
        columns: your names for these columns, as query=question,pos=answer or as a mapping. Every column with neither
            such a name nor one above is then ignored; without `columns`, one that holds text or labels is refused.
        instruction: stands after every text: in rows that have no instruction of their own, in evaluation and in the
            export.
        query_instruction: stage 2: stands before the text of a query, like a prompt in sentence-transformers. The
            export stores it as its prompt "query". Default: that of `model`.
        passage_instruction: stage 2: stands before positives and negatives. The export stores it as its prompt
            "document". Default: that of `model`.
        num_compress_tokens: K. Default: that of `model` if it has compress tokens, otherwise 5.
        compress_init: a text whose token embeddings the compress tokens start from, repeated to K tokens; only for a
            model without compress tokens. Default: " ,", a comma.
        max_length: tokens of one text that the encoder reads, including instruction and compress tokens. Default: 512,
            or the model's positions if they are fewer.
        max_target_length: tokens of a target that the decoder scores, without eos. Default: as for `max_length`.
        train_split: the split of a hub data set, or of the qrels of a BEIR folder. Default: train.
        streaming: stream the data. Needs `max_steps`, and works without reference scores only.
        eval_data: data to evaluate on before, during and after training: pairs with ratings (columns sentence1,
            sentence2, score), or texts alone (a column text, or a folder of .txt files), of which at most 128 are read.
        eval_split: the split of `eval_data`.
        eval_metric: the metric that is shown and that `save_best` maximises or minimises. spearman needs pairs with
            ratings; view_separation, mean_cosine, view_accuracy, effective_rank and uniformity need only texts. The
            run records all of them for texts; for rated pairs spearman, and the others where this names one of them.
            Default: spearman for rated pairs, otherwise view_separation.
        eval_steps: evaluate every this many steps; 0: only before and after training.
        max_steps: number of optimizer steps. Default: from `num_train_epochs`.
        num_train_epochs: passes over the data when `max_steps` is not given.
        batch_size: rows of a step on each process; at most the rows that the data have.
        token_budget: tokens of one pass of the encoder or the decoder, which bounds the memory and does not change the
            update. Default: the whole step in one pass.
        learning_rate: the peak learning rate.
        compress_learning_rate: the peak learning rate of the K compress-token embeddings. Default: `learning_rate`.
        lr_scheduler_type: cosine, linear or constant, after the warm-up.
        warmup_steps: steps over which the learning rate rises linearly.
        weight_decay: weight decay of AdamW.
        adam_beta2: β₂ of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0: no clipping.
        freeze: regular expressions for encoder parameters that are not trained. The compress tokens always are.
        lora_rank: above 0, train LoRA adapters and the compress tokens instead of all parameters.
        lora_alpha: scale of the adapters.
        lora_targets: names of the modules that get adapters, or all-linear.
        share_base: with LoRA, keep one copy of the frozen weights, which serves the encoder with its adapters and the
            decoder without them; the next stage continues with these adapters. auto: share where the decoder is the
            model under the adapters. true: refuse the run where it is not.
        base_dtype: dtype of the weights under LoRA adapters: fp32, bf16, fp16, or auto (that of `precision` where they
            are shared, otherwise fp32). int8 (torchao) and nf4 (bitsandbytes, GPU only) quantize the linear layers and
            keep embeddings and head in the dtype of `precision`; model/ and export/ get the adapters merged into plain
            weights.
        distillation_candidates: how many texts of its block a passage is scored under besides its own, the nearest by
            cosine. The other pairs cost no decoder pass and do not count, so blocks can be larger. Default: all.
        distillation_marginal_texts: how many texts of other blocks improve the estimate of a passage's marginal, which
            is rough over few texts. Each costs a decoder pass per passage.
        z_norm: none, or match_rms: scale z to the RMS of the decoder's input embeddings.
        decoder_add_bos: the decoder reads bos before z. Without it, as in the released code, the decoder's attention
            sink falls on one of the vectors of z, a different one for each text.
        init_output_rms: before the first step, scale the encoder's final norm so that every dimension of z has the RMS
            of the decoder's input embeddings.
        logprob_reduction: how the alignment loss reduces log p of a target over its tokens: sum (the paper), or mean,
            which does not favour short targets. With mean, multiply β by a typical text length.
        ref_logps_file: file of the reference scores. Default: a file in the cache of `datasets`, by fingerprint.
        precision: auto (bf16 where the GPU or CPU multiplies it in hardware, otherwise fp32), fp32, bf16, or fp16 with
            loss scaling (CUDA only).
        attention: auto, flash_attention_2, varlen or sdpa.
        gradient_checkpointing: recompute the encoder's activations in the backward. true: each layer runs again, and
            only its input is kept. selective: results of matrix products and attention kernels are kept and the rest
            is recomputed (norms, activation functions, `sdpa` over short texts); compiled layers select by themselves.
        decoder_gradient_checkpointing: the same for the decoder.
        share_prefixes: targets of the same z run the decoder's bos and the K rows of z only once. Default: where the
            model supports it and it saves time. true: always; models that do not support it are refused. false: never.
        compile: torch.compile the layers of encoder and decoder.
        cuda_graphs: capture a step as a CUDA graph, and replay it for batches whose padded shapes have occurred before.
            Needs one GPU and no token_budget.
        seed: seed of all random generators.
        deterministic: use torch's deterministic algorithms, so that two runs on the same machine agree in every bit.
        on_nonfinite: what happens after a step whose loss or gradient is not finite. Such a step updates nothing, and
            its rows are written to nonfinite.jsonl. stop: the run ends with FloatingPointError. skip: it continues with
            the next rows and the next learning rate, and ends after 10 such steps in a row.
        save_steps: save a checkpoint every this many steps and after the last one; 0: only on interruption.
        save_total_limit: how many checkpoints are kept. An older one is removed once the new one has been verified.
        save_best: model/ and export/ hold the weights of the best evaluation by `eval_metric` instead of those of the
            last step. Needs `eval_data` and `eval_steps`.
        resume_from_checkpoint: continue from the newest valid checkpoint in `output_dir`, if there is one; the result
            is bit-identical to that of an uninterrupted run. Without it, a folder that holds checkpoints is refused.
        log_with: trackers of accelerate, such as tensorboard, trackio or wandb; several as a list. Those that write
            files do so in `output_dir`/autoregembed.
        num_proc: number of processes that tokenize.
        export_dtype: dtype of the weights in export/: fp32, bf16, fp16, or auto (that of the trained weights).
        model_name: name of the trained model on its card: a hub id such as user/name, or any name.
        license: license of the trained model on its card: an SPDX id such as apache-2.0.
    """

    stage: Literal[1, 2]
    model: str
    train_data: list[str] | str
    output_dir: str
    decoder: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    columns: dict[str, str] | str | None = None
    instruction: str = INSTRUCTION
    query_instruction: str | None = None
    passage_instruction: str | None = None
    num_compress_tokens: int | None = None
    compress_init: str | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    train_split: str | None = None
    streaming: bool = False
    eval_data: str | None = None
    eval_split: str | None = None
    eval_metric: (
        Literal["spearman", "view_separation", "mean_cosine", "view_accuracy", "effective_rank", "uniformity"] | None
    ) = None
    eval_steps: int = 0
    max_steps: int | None = None
    num_train_epochs: float = 1.0
    batch_size: int = 32
    token_budget: int | None = None
    learning_rate: float = 5e-5
    compress_learning_rate: float | None = None
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    freeze: list[str] = field(default_factory=list)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: list[str] | str = "all-linear"
    share_base: bool | Literal["auto"] = "auto"
    base_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = "auto"
    distillation_candidates: int | None = None
    distillation_marginal_texts: int = 0
    z_norm: Literal["none", "match_rms"] = "none"
    decoder_add_bos: bool = False
    init_output_rms: bool = False
    logprob_reduction: Literal["sum", "mean"] = "sum"
    ref_logps_file: str | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa"] = "auto"
    gradient_checkpointing: bool | Literal["selective"] = False
    decoder_gradient_checkpointing: bool | Literal["selective"] = False
    share_prefixes: bool | None = None
    compile: bool = False
    cuda_graphs: bool = False
    seed: int = 0
    deterministic: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    save_steps: int = 0
    save_total_limit: int = 2
    save_best: bool = False
    resume_from_checkpoint: bool = False
    log_with: list[str] | str = field(default_factory=list)
    num_proc: int | None = None
    export_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    model_name: str | None = None
    license: str = "unknown"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.log_with, str):
            self.log_with = [name.strip() for name in self.log_with.split(",") if name.strip()]
        for name, value in vars(self).items():
            if any(isinstance(v, str) and "\0" in v for v in (value if isinstance(value, list) else [value])):
                raise ConfigError(f"{name}: got a null byte in {value!r}, expected text without one")
        # One name or several with commas; any other string is PEFT's, a regular expression of whole names.
        if isinstance(self.lora_targets, str) and re.fullmatch(r"[\w.]+(, *[\w.]+)*", self.lora_targets):
            self.lora_targets = [x.strip() for x in self.lora_targets.split(",")]
        if isinstance(self.columns, str):
            self.columns = _parse_columns(self.columns)
        if self.stage == 1:
            for name in ("query_instruction", "passage_instruction"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected None in stage 1")
        if not self.lora_rank and self.base_dtype != "auto":
            raise ConfigError(f"base_dtype: got {self.base_dtype!r}, expected 'auto' without lora_rank")
        if self.seed >= 2**31:
            raise ConfigError(f"seed: got {self.seed}, expected less than {2**31}")
        self._require_at_least(
            1, "batch_size", "max_length", "max_target_length", "max_steps", "token_budget", "num_compress_tokens",
            "save_total_limit", "distillation_candidates",
        )  # fmt: skip
        self._require_at_least(
            0, "warmup_steps", "eval_steps", "save_steps", "lora_rank", "weight_decay", "max_grad_norm", "seed",
            "distillation_marginal_texts",
        )  # fmt: skip
        self._require_positive(
            "num_train_epochs", "learning_rate", "compress_learning_rate", "lora_alpha", "adam_beta2"
        )  # fmt: skip
        for name in ("model", "decoder", "train_data", "eval_data", "output_dir", "ref_logps_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        for name in ("gradient_checkpointing", "decoder_gradient_checkpointing"):
            if self.compile and getattr(self, name) == "selective":
                raise ConfigError(f"{name}: got 'selective' with compile, which selects itself, expected True or False")
        if self.cuda_graphs:
            self._require_repeatable()
        if self.eval_metric and not self.eval_data:
            raise ConfigError(f"eval_metric: got {self.eval_metric!r}, expected None without eval_data")
        if self.ref_logps_file and not self.needs_ref_logps:
            raise ConfigError(
                f"ref_logps_file: got {self.ref_logps_file!r}, expected None with stage {self.stage}, "
                f"ref_margin={self.ref_margin!r} and alignment_weight={self.alignment_weight}"
            )
        if self.save_best and not (self.eval_data and self.eval_steps):
            raise ConfigError("save_best: got True, expected False unless eval_data and eval_steps are set")
        if self.streaming and self.max_steps is None:
            raise ConfigError("max_steps: got None, expected a number; it must be set when streaming")
        if self.streaming and self.needs_ref_logps:
            raise ConfigError(f"ref_margin: got {self.ref_margin!r}, expected 'none' when streaming")
        if self.streaming and self.needs_teacher_scores:
            raise ConfigError(f"distillation_weight: got {self.distillation_weight}, expected 0 when streaming")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"freeze: got {pattern!r}, expected regular expressions ({error})") from error

    def _require_repeatable(self) -> None:
        """What makes a step depend on more than its padded shapes, or reads numbers on the host."""
        needs = {
            "token_budget": (None, "a step in several passes has other shapes every time"),
            "gradient_checkpointing": (False, "it saves the state of the random generator on the host"),
            "precision": (("auto", "fp32", "bf16"), "the loss scale of fp16 is decided on the host"),
            "share_prefixes": ((None, False), "how many tokens are shared changes from batch to batch"),
            "attention": (("auto", "varlen", "flash_attention_2"), "sdpa makes a call for every length"),
        }
        for name, (expected, reason) in needs.items():
            value, allowed = getattr(self, name), expected if isinstance(expected, tuple) else (expected,)
            if value not in allowed:
                raise ConfigError(f"{name}: got {value!r} with cuda_graphs, expected {expected!r}: {reason}")

    @property
    def column_map(self) -> dict[str, str] | None:
        """`columns`, parsed."""
        assert not isinstance(self.columns, str)
        return self.columns

    @property
    def needs_decoder(self) -> bool:
        return self.steps_need_decoder or self.distillation_weight > 0

    @property
    def steps_need_decoder(self) -> bool:
        """Whether a step runs the decoder; otherwise all that it has to say is in scores made before the first one."""
        return self.stage == 1 or self.alignment_weight > 0

    @property
    def needs_teacher_scores(self) -> bool:
        return self.stage == 2 and self.distillation_weight > 0

    @property
    def needs_ref_logps(self) -> bool:
        return self.stage == 2 and self.uses_ref_logps
