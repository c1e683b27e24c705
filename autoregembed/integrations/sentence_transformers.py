"""Losses for `SentenceTransformerTrainer`, on models that `Encoder.save_pretrained` wrote.

    model = from_causal_lm("HuggingFaceTB/SmolLM2-135M", "start", instruction="Represent the text.")
    SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=AutoRegEmbedLoss(model)).train()

The columns are anchor and positive, or anchor, positive and negatives.

z are the model's token embeddings at the compress tokens, from the same forward pass as the sentence embedding. Targets
are the token ids of a column without what the tokenizer writes around a text. A prompt that the training arguments put
before a column becomes part of its texts and of its targets.

With LoRA, wrap the LM inside the first module by `peft.get_peft_model`, with `trainable_token_indices` (see
`compress_token_ids`), and put `merge_and_unload()` of it back before saving: Transformers before 5.24 loads an adapter
without its trained tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.export import COMPRESS_TOKENS
from autoregembed.integrations.defaults import RECOMMENDED, default_decoder
from autoregembed.model_card import CITATION
from autoregembed.models import read_recipe
from autoregembed.objective import contrastive_loss, stage2_loss, with_batch_negatives
from autoregembed.ops import compression_loss

__all__ = [
    "AutoRegEmbedLoss",
    "FusedInfoNCELoss",
    "InformationCompressionLoss",
    "compress_token_ids",
    "from_causal_lm",
]


def from_causal_lm(
    source: str,
    folder: str | Path,
    *,
    instruction: str | None = None,
    num_compress_tokens: int | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> SentenceTransformer:
    """A model to start training from: a causal LM with compress tokens, written to `folder` and loaded from there.

    Args:
        source, instruction, num_compress_tokens, max_length: as in `Encoder.from_pretrained`.
        folder, overwrite: as in `Encoder.save_pretrained`.
        options: other arguments of `Encoder.from_pretrained`, such as `gguf_file`.

    Raises:
        CheckpointError: `source` cannot be loaded. And the errors of `Encoder.from_pretrained` and `save_pretrained`.
    """
    encoder = Encoder.from_pretrained(
        source, instruction=instruction, num_compress_tokens=num_compress_tokens, max_length=max_length, **options
    )
    model = SentenceTransformer(str(encoder.save_pretrained(folder, overwrite=overwrite)))
    _freeze_pooling(model)
    return model


# ----------------------------------------------------------------------------------------------------------------------


class _Vocabulary(str):
    """What WordWeights holds for every row of the vocabulary, without filling the screen where a model is printed."""

    def __repr__(self) -> str:
        return f"<{len(self)} rows>"


def _compress_tokens(model: nn.Module) -> list[int]:
    """The ids of the compress tokens of a model that `export` made; none of another."""
    lm = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    return list(getattr(lm.config, COMPRESS_TOKENS, None) or ()) if lm is not None else []


def _pooling(model: nn.Module) -> Any:
    """The module that takes the mean over compress tokens: of several the WordWeights, of one the Pooling, or None."""
    ids = _compress_tokens(model)
    for module in model.modules():
        if len(ids) > 1 and isinstance(module, WordWeights):
            return module
        if len(ids) == 1 and isinstance(module, Pooling) and module.pooling_mode == "lasttoken":
            return module
    return None


@dataclass(frozen=True)
class _Template:
    """What the tokenizer of an exported model writes around a text."""

    head: int  # tokens before it
    tail: list[int]  # ids behind it, the compress tokens last
    num_compress_tokens: int

    @classmethod
    def of(cls, model: SentenceTransformer) -> _Template:
        pooling = _pooling(model)
        if pooling is None:
            raise ValueError(
                "model: got no compress tokens, expected one that Encoder.save_pretrained or from_causal_lm wrote"
            )
        compress = _compress_tokens(model)
        if len(compress) > 1:
            weight = pooling.emb_layer.weight.detach().flatten()
            if weight.count_nonzero() != len(compress) or not bool((weight[compress] == 1).all()):
                raise ValueError(
                    "model: got WordWeights other than 1 at the compress tokens and 0 elsewhere (another loss has "
                    "trained them), expected the model as it was exported"
                )
        found = model.tokenizer("a", return_special_tokens_mask=True)
        text = [i for i, special in enumerate(found["special_tokens_mask"]) if not special]
        tail = found["input_ids"][text[-1] + 1 :]
        if tail[-len(compress) :] != compress:
            raise ValueError(
                f"model: got a tokenizer that ends a text with ids {tail}, expected one that ends it with the "
                f"compress tokens {compress}"
            )
        return cls(text[0], tail, len(compress))


def compress_token_ids(model: SentenceTransformer) -> list[int]:
    """The ids of the K compress tokens of an exported model, for PEFT's `trainable_token_indices`.

    Raises:
        ValueError: a model without compress tokens.
    """
    template = _Template.of(model)
    return template.tail[-template.num_compress_tokens :]


def _freeze_pooling(model: nn.Module) -> None:
    # WordWeights is an nn.Embedding: an optimiser would move the pooling away from the mean over compress tokens.
    pooling = _pooling(model)
    if pooling is not None:
        pooling.requires_grad_(False)
    if isinstance(pooling, WordWeights):
        pooling.vocab = _Vocabulary(pooling.vocab)


def _require_unwrapped(model: nn.Module, loss: str) -> None:
    """Refuses a loss around this one that cuts embeddings or layers: log p(target | z) would be what it was."""
    # They replace the forward of the model, and of its first module, by objects of their own for the time of the call.
    kinds = {type(vars(module).get("forward")).__module__ for module in model.modules()}
    cuts = {name for name in ("matryoshka", "adaptive_layer") if any(kind.endswith(f".{name}") for kind in kinds)}
    if cuts:
        wrapper = {"matryoshka": "MatryoshkaLoss", "adaptive_layer": "AdaptiveLayerLoss"}[min(cuts, key=len)]
        raise TypeError(
            f"loss: got {loss} inside {'Matryoshka2dLoss' if len(cuts) == 2 else wrapper}, which cuts what its loss "
            f"does not read, expected {loss} alone; FusedInfoNCELoss may be wrapped"
        )


class _DecoderLoss(nn.Module):
    """What both stages share: z and targets out of sentence features, and a decoder that stays as it is."""

    def __init__(self, model: SentenceTransformer, decoder: Decoder | None, max_target_length: int | None):
        super().__init__()
        if not isinstance(decoder, Decoder | None):
            raise TypeError(f"decoder: got {type(decoder).__name__}, expected autoregembed.Decoder")
        self.model = model
        self._template = _Template.of(model)
        if decoder is None:
            lm = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
            first = model.tokenizer("a")["input_ids"][0] if self._template.head else None
            decoder = default_decoder(
                read_recipe(lm.name_or_path), lm.name_or_path, bos_token_id=first, dtype=lm.dtype, device=lm.device
            )
        _freeze_pooling(model)
        # In a tuple and so no submodule: nobody saves it, puts it into an optimiser or into training mode.
        self._decoder = (decoder,)
        self.max_target_length = decoder.fit_max_target_length(self._template.num_compress_tokens, max_target_length)
        self._checked = False

    @property
    def decoder(self) -> Decoder:
        return self._decoder[0]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.decoder._apply(fn, *args, **kwargs)  # `to(device)` and the like
        return super()._apply(fn, *args, **kwargs)

    def _read(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """z (B, K, D) and the sentence embedding (B, D) of a column."""
        if self.training and torch.is_grad_enabled() and not self._checked:
            self._check_compress_tokens()
        _require_unwrapped(self.model, type(self).__name__)
        out = self.model(features)
        hidden, mask = out["token_embeddings"], out["attention_mask"]
        steps = torch.arange(mask.shape[1], device=mask.device)
        last = (mask.bool() * steps).argmax(1, keepdim=True)  # of either padding side
        places = last + 1 - self._template.num_compress_tokens + steps[: self._template.num_compress_tokens]
        return hidden.take_along_dim(places[..., None], 1), out["sentence_embedding"]

    def _targets(self, features: dict[str, Tensor]) -> list[list[int]]:
        """The ids of a column's texts, as the decoder scores them."""
        return [ids[: self.max_target_length] for ids in self._texts(features)]

    def _texts(self, features: dict[str, Tensor]) -> list[list[int]]:
        """The ids of a column's texts, without what the tokenizer writes around them."""
        head, tail = self._template.head, self._template.tail
        texts = []
        for row, (ids, mask) in enumerate(
            zip(features["input_ids"].tolist(), features["attention_mask"].tolist(), strict=True)
        ):
            text = [token for token, real in zip(ids, mask, strict=True) if real]
            if text[-len(tail) :] != tail:
                raise ValueError(
                    f"sentence_features: got a text that ends with ids {text[-len(tail) :]} in row {row}, expected "
                    f"texts that the model's own tokenizer has ended with {tail}"
                )
            texts.append(text[head : -len(tail)])
        return texts

    def _check_compress_tokens(self) -> None:
        self._checked = True
        lm = next(m for m in self.model.modules() if isinstance(m, PreTrainedModel))
        trained = any(p.requires_grad for p in lm.get_input_embeddings().parameters())
        if not trained and any(p.requires_grad for p in self.model.parameters()):
            warnings.warn(
                "The compress tokens are not trained. With a LoRA adapter, give its LoraConfig "
                "trainable_token_indices={name of the embedding module: compress_token_ids(model)}.",
                stacklevel=3,
            )

    def _decoder_config(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder.model.config.name_or_path or type(self.decoder.model).__name__,
            "z_norm": self.decoder.z_norm,
            "decoder_add_bos": bool(self.decoder.prefix),
            "max_target_length": self.max_target_length,
        }

    @property
    def citation(self) -> str:
        return CITATION


class InformationCompressionLoss(_DecoderLoss):
    """Stage 1 of AutoRegEmbed: −log p(output | z(context)) per target token, for columns (context, output).

    Args:
        model: written by `Encoder.save_pretrained` or `from_causal_lm`.
        decoder: the frozen causal LM that `model` was made of; it follows the loss' device. By default the one that the
            folder of `model` names is loaded.
        max_target_length: tokens of a target that are scored, without eos; by default 512, or what the decoder has
            positions for. The model's tokenizer truncates a target as it does any text.

    Raises:
        TypeError, ValueError: no `Decoder`, a model without compress tokens, or one that names no original model where
            `decoder` is None.
    """

    def __init__(
        self, model: SentenceTransformer, decoder: Decoder | None = None, max_target_length: int | None = None
    ):
        super().__init__(model, decoder, max_target_length)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ValueError(f"sentence_features: got {len(columns)} columns, expected 2: context, output")
        targets = self._targets(columns[1])
        z, _ = self._read(columns[0])
        return compression_loss(self.decoder.logprob(z, targets), self.decoder.num_tokens(targets))

    def get_config_dict(self) -> dict[str, Any]:
        return self._decoder_config()


class AutoRegEmbedLoss(_DecoderLoss):
    """Stage 2 of AutoRegEmbed: conditional distribution alignment, and InfoNCE on the same forward pass if wanted.

    Columns: anchor, positive and any number of negatives. Without one, the batch has them: InfoNCE compares an anchor
    with the positives of all others, and the alignment takes the positive of the next row. With `ref_margin` "add" or
    "subtract" the reference scores (log-probabilities in nats of the positive and of each negative given the anchor,
    under the model before this stage) are a `label` column of M + 1 floats; `precompute_ref_logps` computes it.

    Args:
        model, decoder, max_target_length: as in `InformationCompressionLoss`.
        options: weights and variants of the loss; by default 0.2 · alignment without a reference + InfoNCE. With
            `contrastive_weight` > 0 `forward` returns both parts by name.
        gather_across_devices: InfoNCE takes negatives from all processes.

    Raises:
        TypeError, ValueError: as in `InformationCompressionLoss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        decoder: Decoder | None = None,
        options: Stage2Options | None = None,
        *,
        gather_across_devices: bool = False,
        max_target_length: int | None = None,
    ):
        super().__init__(model, decoder, max_target_length)
        self.options = options or RECOMMENDED
        if self.options.distillation_weight:
            raise ValueError(
                f"distillation_weight: got {self.options.distillation_weight}, expected 0 in AutoRegEmbedLoss; "
                "LikelihoodDistillationLoss is a loss of its own"
            )
        self.gather_across_devices = gather_across_devices

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        columns = list(sentence_features)
        least = 3 if self.options.uses_ref_logps else 2
        if len(columns) < least:
            raise ValueError(
                f"sentence_features: got {len(columns)} columns, expected at least {least}: anchor, positive"
                + (f" and a negative, since ref_margin={self.options.ref_margin!r}" if least == 3 else "")
            )
        ref_logps = self._ref_logps(labels, len(columns) - 1, columns[0]["input_ids"])
        rows = self._rows(columns)
        if len(columns) == 2 and self.options.alignment_weight:
            rows = with_batch_negatives(rows)
        (z_query, query), (z_positive, positive) = map(self._read, columns[:2])
        embeddings, passages = [query, positive], [columns[1]]
        if self.options.hard_negatives and self.options.contrastive_weight:
            passages += columns[2:]
            embeddings += [self.model(column)["sentence_embedding"] for column in columns[2:]]
        out = stage2_loss(
            self.options, self.decoder, torch.cat([z_query, z_positive]), rows, ref_logps=ref_logps,
            embeddings=torch.cat(embeddings), gather=self.gather_across_devices,
            passages=[ids for column in passages for ids in self._texts(column)],
        )  # fmt: skip
        parts = {"alignment": out.alignment, "contrastive": out.contrastive}
        given = {name: part for name, part in parts.items() if part is not None}
        return given if self.options.contrastive_weight else given["alignment"]

    def _rows(self, columns: list[dict[str, Tensor]]) -> list[dict]:
        targets = [self._targets(column) for column in columns[1:]]
        return [{"target_ids": list(row)} for row in zip(*targets, strict=True)]

    def _ref_logps(self, labels: Tensor | None, width: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.options.uses_ref_logps:
            return None
        expected = (len(like), width)
        if labels is None or tuple(labels.shape) != expected:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"labels: got {found}, expected the reference scores {expected} that "
                f"ref_margin={self.options.ref_margin!r} needs: of the positive, then of each negative; "
                "`precompute_ref_logps` adds them to a dataset as column 'label'"
            )
        scores = labels.to(like.device, torch.float32)
        return scores[:, 0], scores[:, 1:]

    @torch.no_grad()
    def precompute_ref_logps(self, dataset: Any, batch_size: int = 32) -> Any:
        """`dataset` with the reference scores under the model as it is now in a column `label`.

        Args:
            dataset: a `datasets.Dataset` with columns anchor, positive and negatives, in this order.
            batch_size: rows that are scored together.

        Raises:
            ValueError: fewer than three columns, or options that read no reference scores.
        """
        if not self.options.uses_ref_logps:
            raise ValueError(
                f"ref_margin: got {self.options.ref_margin!r} with alignment_weight {self.options.alignment_weight}, "
                "expected 'add' or 'subtract' and a weight above 0: other options read no reference scores"
            )
        names = [n for n in dataset.column_names if n not in ("label", "dataset_name")]
        if len(names) < 3:
            raise ValueError(f"dataset: got columns {names}, expected anchor, positive and at least one negative")
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        scores: list[list[float]] = []
        try:
            for batch in dataset.iter(batch_size=batch_size):
                columns = [
                    {
                        k: v.to(device) if isinstance(v, Tensor) else v
                        for k, v in self.model.preprocess(batch[name]).items()
                    }
                    for name in names
                ]
                targets = [t for row in self._rows(columns) for t in row["target_ids"]]
                z, _ = self._read(columns[0])
                source = torch.arange(len(z)).repeat_interleave(len(names) - 1)
                scores += self.decoder.logprob(z, targets, source).view(len(z), -1).tolist()
        finally:
            self.model.train(training)
        return dataset.add_column("label", scores)

    def get_config_dict(self) -> dict[str, Any]:
        own = {**asdict(self.options), "gather_across_devices": self.gather_across_devices}
        return {**own, **self._decoder_config()}


class FusedInfoNCELoss(nn.Module):
    """`MultipleNegativesRankingLoss` over cosine similarities, without the (B, P) matrix of scores in memory.

    Same columns (anchor, positive, any number of negatives), same value, same gradient. It saves memory where that
    matrix is larger than the embeddings; for small batches on a CPU the stock loss is as fast or faster
    (`autoregembed bench --suite integrations`). For any model; in one of `Encoder.save_pretrained` it keeps the pooling
    weights as they are.

    Args:
        model: any SentenceTransformer.
        scale: factor on the cosine similarities, 1 / temperature.
        gather_across_devices: negatives from all processes, with gradients.
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0, gather_across_devices: bool = False):
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale: got {scale}, expected a positive finite number")
        self.model = model
        self.scale = scale
        self.gather_across_devices = gather_across_devices
        _freeze_pooling(model)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"sentence_features: got {len(embeddings)} columns, expected at least 2")
        return contrastive_loss(
            embeddings[0], torch.cat(embeddings[1:]), self.temperature, gather=self.gather_across_devices
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "gather_across_devices": self.gather_across_devices}

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    @property
    def citation(self) -> str:
        return """
@misc{oord2018representation,
  title  = {Representation Learning with Contrastive Predictive Coding},
  author = {van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol},
  year   = {2018},
  note   = {arXiv:1807.03748}
}
"""
