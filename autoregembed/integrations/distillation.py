"""Score distillation under `SentenceTransformerTrainer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor, nn

from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.embedding_losses import distillation_loss, unknown_pairs
from autoregembed.integrations.exported import DecoderLoss
from autoregembed.packing import Ids
from autoregembed.sampling import permutation
from autoregembed.teacher_scores import block_scores, scores_of_rows


class BlockBatchSampler(DefaultBatchSampler):
    """Batches of rows that `LikelihoodDistillationLoss.precompute_teacher_scores` has scored together.

    Pass the class as `batch_sampler` of the training arguments. Every epoch draws the blocks in a new order.

    Raises:
        ValueError: rows without scores, or a batch size that differs from that of the scores.
    """

    def __init__(self, dataset: Dataset, batch_size: int, *args: Any, seed: int = 0, **kwargs: Any):
        super().__init__(dataset, batch_size, *args, seed=seed, **kwargs)
        if "label" not in dataset.column_names:
            raise ValueError(
                f"dataset: got columns {dataset.column_names}, expected 'label', which "
                "LikelihoodDistillationLoss.precompute_teacher_scores adds"
            )
        self.blocks: dict[int, list[int]] = {}
        for row, label in enumerate(dataset["label"]):
            self.blocks.setdefault(int(label[0]), []).append(row)
        sizes = {len(block) for block in self.blocks.values()}
        if sizes != {batch_size}:
            raise ValueError(
                f"per_device_train_batch_size: got {batch_size} with blocks of {sorted(sizes)} rows, expected the "
                "batch_size that precompute_teacher_scores had"
            )

    def __iter__(self) -> Iterator[list[int]]:
        together = list(self.blocks.values())
        return iter([together[i] for i in permutation(len(together), self.seed, self.epoch)])

    def __len__(self) -> int:
        return len(self.blocks)


class _Reader(nn.Module):
    """The model of a loss as what `block_scores` calls an encoder."""

    def __init__(self, loss: LikelihoodDistillationLoss):
        super().__init__()
        self.lm = loss.model
        self.num_compress_tokens = loss.num_compress_tokens
        self._loss = (loss,)

    def forward(self, ids: Sequence[Ids], suffix_ids: Sequence[Ids]) -> Tensor:
        del suffix_ids  # the template's own
        return self._loss[0].z_of(ids)


class LikelihoodDistillationLoss(DecoderLoss):
    """Score distillation: the cosines learn from the likelihoods of the model before training, without labels.

    Columns: a single text, or anchor and positive. `precompute_teacher_scores` scores blocks of rows once and adds the
    scores as a column `label`; `BlockBatchSampler` keeps the blocks together:

        loss = LikelihoodDistillationLoss(model)
        dataset = loss.precompute_teacher_scores(dataset, batch_size=12)
        args = SentenceTransformerTrainingArguments(…, per_device_train_batch_size=12, batch_sampler=BlockBatchSampler)

    Args:
        model, decoder, max_target_length: as in `InformationCompressionLoss`; `model` must be a stage-1 model.
        options: only the fields `distillation_…` and `teacher_temperature` are used.

    Raises:
        TypeError, ValueError: as in `InformationCompressionLoss`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        decoder: Decoder | None = None,
        options: Stage2Options | None = None,
        *,
        max_target_length: int | None = None,
    ):
        super().__init__(model, decoder, max_target_length)
        self.options = options or Stage2Options()

    @property
    def num_compress_tokens(self) -> int:
        return self._template.num_compress_tokens

    def z_of(self, ids: Sequence[Ids]) -> Tensor:
        """z (B, K, D) of B texts without what the tokenizer writes around them."""
        head = self.model.tokenizer("a")["input_ids"][: self._template.head]
        texts = [[*head, *text, *self._template.tail] for text in ids]
        features = self.model.tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        device = next(self.model.parameters()).device
        return self._read({name: x.to(device) for name, x in features.items()})[0]

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        if len(columns) not in (1, 2):
            raise ValueError(
                f"sentence_features: got {len(columns)} columns, expected 1 or 2: a text, or anchor and positive"
            )
        texts = [self._texts(column) for column in columns]
        if labels is None or labels.ndim != 2 or len(labels) != len(texts[0]):
            shape = None if labels is None else tuple(labels.shape)
            raise ValueError(
                f"labels: got {shape}, expected the scores of {len(texts[0])} rows that precompute_teacher_scores adds "
                "to a data set as column 'label'"
            )
        blocks, places = labels[:, :2].long().T.tolist()
        scores = scores_of_rows(blocks, places, labels[:, 2:])
        embeddings = [self._read(column)[1] for column in columns]
        keys = list(zip(texts[0], texts[-1], strict=True))
        mask = unknown_pairs(self.options, keys, scores)
        return distillation_loss(self.options, embeddings[0], embeddings[-1], scores, mask)

    @torch.no_grad()
    def precompute_teacher_scores(
        self, dataset: Dataset, batch_size: int, *, seed: int = 0, console: Console | None = None
    ) -> Dataset:
        """Divides `dataset` into blocks of `batch_size` rows, with their scores under the present model as `label`.

        The scores are cached in the folder of `datasets`, by everything they depend on. Rows that do not fill a block
        are left out.

        Args:
            dataset: one column of texts, or the two columns anchor and positive.
            seed: random seed of the division into blocks.
            console: prints what is computed, and where it is stored.

        Raises:
            ValueError: another number of columns, or fewer rows than a block.
        """
        names = [n for n in dataset.column_names if n not in ("label", "dataset_name")]
        if len(names) not in (1, 2):
            raise ValueError(f"dataset: got columns {names}, expected a text alone, or anchor and positive")
        training = self.model.training
        self.model.eval()
        try:
            texts = [[ids for part in dataset.iter(1000) for ids in self._texts(self.model.preprocess(part[name]))]
                     for name in names]  # fmt: skip
            suffix = self._template.tail[: -self.num_compress_tokens]
            targets = [[ids[: self.max_target_length]] for ids in texts[-1]]
            rows = Dataset.from_dict(
                {"query_ids": texts[0], "suffix_ids": [suffix] * len(targets), "target_ids": targets}
            )
            blocks, scores = block_scores(
                _Reader(self), self.decoder, self.model.tokenizer, rows, batch_size, seed=seed, console=console
            )
        finally:
            self.model.train(training)
        labels = [
            [float(b), float(i), *row]
            for b, found in enumerate(scores.tolist()) for i, row in enumerate(found)
        ]  # fmt: skip
        kept = dataset.select([i for block in blocks for i in block])
        kept = kept.remove_columns("label") if "label" in kept.column_names else kept
        return kept.add_column("label", labels)

    def get_config_dict(self) -> dict[str, Any]:
        own = {n: x for n, x in asdict(self.options).items() if n.startswith("distillation_") or "teacher" in n}
        return {**own, **self._decoder_config()}
