"""Losses for `SentenceTransformerTrainer`, on models that `Encoder.save_pretrained` wrote.

    model = from_causal_lm("HuggingFaceTB/SmolLM2-135M", "start")
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

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn

from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.embedding_losses import contrastive_loss
from autoregembed.encoder import Encoder
from autoregembed.integrations.defaults import RECOMMENDED, with_batch_negatives
from autoregembed.integrations.distillation import BlockBatchSampler, LikelihoodDistillationLoss
from autoregembed.integrations.exported import DecoderLoss, Template, freeze_pooling
from autoregembed.objective import stage1_loss, stage2_loss
from autoregembed.ops import info_nce

__all__ = [
    "AutoRegEmbedLoss",
    "BlockBatchSampler",
    "FusedInfoNCELoss",
    "InformationCompressionLoss",
    "LikelihoodDistillationLoss",
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
    """A model to start training from: adds compress tokens to a causal LM, writes it to `folder` and loads it.

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
    freeze_pooling(model)
    return model


# ----------------------------------------------------------------------------------------------------------------------


def compress_token_ids(model: SentenceTransformer) -> list[int]:
    """The ids of the K compress tokens of an exported model, for PEFT's `trainable_token_indices`.

    Raises:
        ValueError: a model without compress tokens.
    """
    template = Template.of(model)
    return template.tail[-template.num_compress_tokens :]


class InformationCompressionLoss(DecoderLoss):
    """Stage 1 of AutoRegEmbed: −log p(output | z(context)) per target token, for columns (context, output).

    Args:
        model: written by `Encoder.save_pretrained` or `from_causal_lm`.
        decoder: the frozen causal LM that `model` was made from; it follows the device of the loss. By default, the one
            that the folder of `model` names is loaded.
        max_target_length: tokens of a target that are scored, without eos; by default 512, or fewer if the decoder has
            fewer positions. The model's tokenizer truncates targets like any other text.

    Raises:
        TypeError, ValueError: `decoder` is not a `Decoder`, the model has no compress tokens, or `decoder` is None and
            the model names no original model.
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
        return stage1_loss(self.decoder, z, targets, num_tokens=self.decoder.num_tokens(targets))

    def get_config_dict(self) -> dict[str, Any]:
        return self._decoder_config()


class AutoRegEmbedLoss(DecoderLoss):
    """Stage 2 of AutoRegEmbed: conditional distribution alignment, and optionally InfoNCE on the same forward pass.

    Columns: anchor, positive and any number of negatives. Without negatives, InfoNCE compares an anchor with the
    positives of all other rows, and the alignment uses the positive of the next row. With `ref_margin` "add" or
    "subtract", a column `label` must hold M + 1 reference scores: the log-probabilities, in nats, of the positive and
    each negative given the anchor, under the model before this stage. `precompute_ref_logps` computes it.

    Args:
        model, decoder, max_target_length: as in `InformationCompressionLoss`.
        options: weights and variants of the loss; by default 0.2 · alignment without a reference + InfoNCE. With
            `contrastive_weight` > 0, `forward` returns both parts by name.
        gather_across_devices: InfoNCE uses negatives from all processes.

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
            if labels is not None:
                raise ValueError(
                    f"labels: got {tuple(labels.shape)}, expected None, as ref_margin={self.options.ref_margin!r} and "
                    f"alignment_weight={self.options.alignment_weight} read no scores: leave out the column 'label'"
                )
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
        """Adds a column `label` to `dataset`: the reference scores under the model in its present state.

        Args:
            dataset: a `datasets.Dataset` with columns anchor, positive and negatives, in this order.
            batch_size: number of rows that are scored together.

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

    It has the same columns (anchor, positive, any number of negatives), value and gradient, and works with any model.
    It saves memory if that matrix is larger than the embeddings; for small batches on a CPU the stock loss is as fast
    or faster (`autoregembed bench --suite integrations`). In a model that `Encoder.save_pretrained` wrote, it keeps the
    pooling weights as they are.

    Args:
        model: any SentenceTransformer.
        scale: factor on the cosine similarities, 1 / temperature.
        gather_across_devices: use negatives from all processes, with gradients; with "query_to_doc" only.
        directions, partition_mode: as in `MultipleNegativesRankingLoss`. "doc_to_doc" allows only anchor and positive.
        margin: a negative whose cosine exceeds the positive's by more than this is left out, as in `info_nce`. (In
            `GISTEmbedLoss` with the model as its guide, the sign is the opposite.) None: no negative is left out.

    Raises:
        TypeError, ValueError: as in `info_nce`, or a combination of options that the fused op does not support.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        margin: float | None = None,
    ):
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale: got {scale}, expected a positive finite number")
        self.options: dict[str, Any] = {"directions": directions, "partition_mode": partition_mode, "margin": margin}
        info_nce(torch.ones(1, 1), torch.ones(1, 1), **self.options)  # refuses an unknown one now
        if gather_across_devices and len(directions) > 1:
            raise ValueError(
                f"gather_across_devices: got True with directions {tuple(directions)}, expected 'query_to_doc' alone, "
                "or False"
            )
        self.model = model
        self.scale = scale
        self.gather_across_devices = gather_across_devices
        freeze_pooling(model)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"sentence_features: got {len(embeddings)} columns, expected at least 2")
        if len(embeddings) > 2 and "doc_to_doc" in self.options["directions"]:
            raise ValueError(
                f"sentence_features: got {len(embeddings)} columns with 'doc_to_doc', expected anchor and positive: "
                "there a query's own negatives are none of its positive"
            )
        gather = self.gather_across_devices
        return contrastive_loss(
            embeddings[0], torch.cat(embeddings[1:]), self.temperature, gather=gather, **self.options
        )

    def get_config_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "gather_across_devices": self.gather_across_devices, **self.options}

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
