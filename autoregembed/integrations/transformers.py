"""Both stages under Hugging Face's `Trainer`.

    encoder = Encoder.from_model(AutoModel.from_pretrained(NAME), tokenizer)  # no head: the encoder never reads one
    AutoRegEmbedTrainer(encoder, args=args, train_dataset=dataset).train()

The columns are those of `data.alignment_rows` (query or anchor, positive, negatives), or of `data.compression_rows`.
`AutoRegEmbedTrainer` packs its batches and does both stages, by the columns of the data. `CompressionLossFunction` is
stage 1 as a `compute_loss_func` of the stock `Trainer`. Stage 2 is no such function: the Trainer hands it the number of
labels, while the loss is a mean over (positive, negative) pairs, whose number in the other micro-batches of a step it
cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from autoregembed import data
from autoregembed.attention import run_packed
from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.integrations.defaults import RECOMMENDED, default_decoder, with_batch_negatives
from autoregembed.models import read_recipe
from autoregembed.objective import num_loss_terms, stage1_loss, stage2_loss, texts_of
from autoregembed.ops.pool_last_k import pool_last_k
from autoregembed.packing import pack
from autoregembed.reference_scores import SCORING_BUDGET, compute_ref_logps
from autoregembed.sampling import permutation
from autoregembed.teacher_scores import block_scores, scores_of_rows

__all__ = [
    "AutoRegEmbedTrainer",
    "Collator",
    "CompressionLossFunction",
    "compression_inputs",
    "precompute_ref_logps",
    "precompute_teacher_scores",
]

IGNORE_INDEX = -100  # what Trainer does not count


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1 in the stock Trainer


def compression_inputs(rows: Dataset, encoder: Encoder, eos_token_id: int) -> Dataset:
    """Converts rows of `data.compression_rows` to {input_ids, labels}, which `DataCollatorForSeq2Seq` pads.

    Give that collator a tokenizer with `padding_side="left"`, and the Trainer `label_names=["labels"]`.
    """

    def convert(row: dict) -> dict:
        (ids,) = encoder.sequences([row["text_ids"]], [row["suffix_ids"]])
        return {"input_ids": ids, "labels": [*row["target_ids"], eos_token_id]}

    return rows.map(convert, remove_columns=rows.column_names)


class CompressionLossFunction:
    """Stage 1 as `Trainer(compute_loss_func=…)` for a base model (`AutoModel`) and left-padded texts.

    The loss is the mean of −log p(output | z) over the target tokens of the whole step, with all its microbatches and
    processes.

    Args:
        decoder: the frozen decoder; it is moved to the device of the model's outputs.
        num_compress_tokens: K; the last K inputs of every text are its compress tokens.
    """

    def __init__(self, decoder: Decoder, num_compress_tokens: int):
        self.decoder = decoder
        self.num_compress_tokens = num_compress_tokens

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Token mean, or the share of it when `num_items_in_batch` counts the labels of the whole step.

        Args:
            outputs: with `last_hidden_state` (B, T, D).
            labels: (B, L) target ids with eos, −100 where there is none.

        Raises:
            ValueError: outputs without hidden states, or no labels.
        """
        hidden = getattr(outputs, "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"outputs: got {type(outputs).__name__} without last_hidden_state, expected what a base model "
                "(AutoModel) returns"
            )
        if labels is None:
            raise ValueError('labels: got None, expected target ids; set label_names=["labels"]')
        self.decoder.to(hidden.device)
        targets = [[i for i in row if i != IGNORE_INDEX][:-1] for row in labels.tolist()]
        count = self.decoder.num_tokens(targets) if num_items_in_batch is None else num_items_in_batch
        z = hidden[:, -self.num_compress_tokens :]
        return stage1_loss(self.decoder, z, targets, num_tokens=_on(count, z.device))


def _on(count: Tensor | int, device: torch.device) -> Tensor | int:
    """A number of terms, at least 1; the Trainer's lies on any device, as a float, and nobody waits for it."""
    if not isinstance(count, Tensor):
        return max(count, 1)
    return count.to(device, non_blocking=True).round().long().clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# Both stages


def precompute_ref_logps(
    rows: Dataset, encoder: Encoder, decoder: Decoder, token_budget: int = SCORING_BUDGET
) -> Dataset:
    """Adds `ref_logps` to rows of `data.alignment_rows`: scores of positive and negatives under the present model."""
    training = encoder.training
    positive, negatives = compute_ref_logps(encoder.eval(), decoder, rows, token_budget)
    encoder.train(training)
    scores = torch.cat([positive[:, None], negatives], 1).tolist()
    return rows.add_column("ref_logps", [row[: len(t)] for row, t in zip(scores, rows["target_ids"], strict=True)])


def precompute_teacher_scores(
    rows: Dataset, encoder: Encoder, decoder: Decoder, batch_size: int, *, seed: int = 0, console: Console | None = None
) -> Dataset:
    """Divides rows into blocks of `batch_size` for score distillation, with their scores under the present model.

    The scores (`teacher_scores`, with `block` and `place`) are cached in the folder of `datasets`, by everything they
    depend on. `AutoRegEmbedTrainer` keeps the rows of a block together; its `per_device_train_batch_size` must equal
    `batch_size`. Rows that do not fill a block are left out.

    Args:
        rows: texts or pairs, or what `data.text_rows` or `data.alignment_rows` made of them.
        seed: random seed of the division into blocks.
        console: prints what is computed, and where it is stored.

    Raises:
        ValueError: fewer rows than a block, or an encoder without tokenizer.
    """
    if "target_ids" not in rows.column_names:
        rows = (data.text_rows if data.is_unpaired(rows) else data.alignment_rows)(rows, encoder.prompt)
    if encoder.tokenizer is None:
        raise ValueError("encoder: got one without its tokenizer, which the scores depend on, expected one with it")
    training = encoder.training
    blocks, scores = block_scores(
        encoder.eval(), decoder, encoder.tokenizer, rows, batch_size, seed=seed, console=console
    )
    encoder.train(training)
    added = {
        "teacher_scores": scores.flatten(0, 1).tolist(),
        "block": [b for b, block in enumerate(blocks) for _ in block],
        "place": [i for block in blocks for i in range(len(block))],
    }
    kept = rows.select([i for block in blocks for i in block])
    for name, values in added.items():
        kept = kept.add_column(name, values)
    return kept


class BlockSampler(Sampler):
    """Rows of `precompute_teacher_scores`, block by block; an epoch draws all blocks in a new order."""

    def __init__(self, blocks: list[int], seed: int):
        self.blocks: dict[int, list[int]] = {}
        for row, block in enumerate(blocks):
            self.blocks.setdefault(block, []).append(row)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        together = list(self.blocks.values())
        return iter([row for i in permutation(len(together), self.seed, self.epoch) for row in together[i]])

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values()))


@dataclass(frozen=True)
class Rows:
    """Rows on their way through the data loader, which would otherwise walk over every single id."""

    items: list[dict]


class Collator:
    """Rows of `data.compression_rows` or `data.alignment_rows` to a batch of `AutoRegEmbedTrainer`: {labels, rows}.

    `labels` has one entry other than −100 for each term that the loss is a mean over (`objective.num_loss_terms`), so
    that the Trainer's own count is the right one.

    Args:
        options: those of the loss.
        batch_negatives: a row without a negative gets the positive of the next row as one.
    """

    def __init__(self, options: Stage2Options | None = None, batch_negatives: bool = False):
        self.negatives = (options or RECOMMENDED).negatives
        self.batch_negatives = batch_negatives

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        if self.batch_negatives:
            rows = with_batch_negatives(rows)
        terms = torch.tensor([num_loss_terms(row, self.negatives) for row in rows])
        index = torch.arange(max(1, int(terms.max())))
        return {"labels": torch.where(index < terms[:, None], 0, IGNORE_INDEX), "rows": Rows(rows)}


def _tokenized(rows: Dataset | IterableDataset, encoder: Encoder, distilled: bool) -> Dataset | IterableDataset:
    """Ids of texts; rows that have them already, and what is no data set of `datasets`, stay as they are."""
    if not isinstance(rows, Dataset | IterableDataset):
        return rows
    names = rows.column_names or list(next(iter(rows)))
    if "target_ids" in names:
        return rows
    if distilled and data.is_unpaired(rows):
        return data.text_rows(rows, encoder.prompt)
    stage1 = {"context", "output"} <= set(names) or data.is_unpaired(rows)
    return (data.compression_rows if stage1 else data.alignment_rows)(rows, encoder.prompt)


def _kind(rows: Any) -> tuple[int | None, bool]:
    """The stage that rows are of (None without any), and whether none of them has a negative."""
    if rows is None:
        return None, False
    first = next(iter(rows))
    if "text_ids" in first:
        return 1, False
    found = rows["target_ids"] if isinstance(rows, Dataset) else [first["target_ids"]]
    return 2, all(len(targets) < 2 for targets in found)


def _decoder_of(encoder: Encoder) -> Decoder:
    source = encoder.model.name_or_path
    recipe = encoder.recipe or (read_recipe(source) or {"decoder": source} if source else {})
    weight = encoder.model.get_input_embeddings().weight
    return default_decoder(recipe, source, bos_token_id=encoder.bos_token_id, dtype=weight.dtype, device=weight.device)


class AutoRegEmbedTrainer(Trainer):
    """`Trainer` for stage 1 and stage 2.

    The gradient does not depend on how a step is split into microbatches and processes. Checkpoints hold the encoder's
    model as Transformers or PEFT saves it, never the decoder.

    Data sets hold texts, in the columns of `data.compression_rows` for stage 1 or `data.alignment_rows` for stage 2, or
    what these functions made of them. If no row has a negative, InfoNCE compares a query with the positives of all
    other rows, and the alignment uses the positive of the next row.

    Args:
        encoder: an encoder of a base model (`AutoModel`) or a PeftModel of one, without `own_compress_rows`.
        decoder: the frozen decoder; by default, if the loss needs one, the model that the encoder was made from.
        args: as for `Trainer`.
        options: weights and variants of the loss of stage 2; by default 0.2 · alignment without a reference + InfoNCE.
            With `ref_margin` other than "none", the rows need a column `ref_logps` (`precompute_ref_logps`); with
            `distillation_weight` > 0, the columns that `precompute_teacher_scores` adds.
        trainer: further arguments of `Trainer`.

    Raises:
        ValueError: a model with a head; an encoder with `own_compress_rows`; an encoder that names no original model,
            if `decoder` is None; in-batch negatives with gradient accumulation, since they would come from a single
            microbatch of the step.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None = None,
        args: TrainingArguments | None = None,
        options: Stage2Options | None = None,
        **trainer: Any,
    ):
        options = options or RECOMMENDED
        if encoder.model.get_output_embeddings() is not None:
            raise ValueError(
                f"encoder: got a {type(encoder.model).__name__} with a head, expected a base model such as "
                "AutoModel.from_pretrained gives"
            )
        if encoder.compress_rows is not None:
            raise ValueError("encoder: got own_compress_rows=True, expected False: Trainer would not save them")
        self.encoder, self.options = encoder, options
        distilled = options.distillation_weight > 0
        for name in ("train_dataset", "eval_dataset"):
            if isinstance(trainer.get(name), dict):
                trainer[name] = {key: _tokenized(rows, encoder, distilled) for key, rows in trainer[name].items()}
            elif trainer.get(name) is not None:
                trainer[name] = _tokenized(trainer[name], encoder, distilled)
        stage, pairs = _kind(trainer.get("train_dataset"))
        if decoder is None and (stage == 1 or options.alignment_weight):
            decoder = _decoder_of(encoder)
        batch_negatives = stage == 2 and pairs and options.alignment_weight > 0
        weights = {n: getattr(options, n) for n in ("contrastive_weight", "distillation_weight")}
        in_batch = [name for name, weight in weights.items() if weight > 0 and stage != 1]
        if (in_batch or batch_negatives) and args is not None and args.gradient_accumulation_steps > 1:
            cause = f"{in_batch[0]} > 0" if in_batch else "rows without negatives"
            raise ValueError(
                f"gradient_accumulation_steps: got {args.gradient_accumulation_steps}, expected 1 with {cause}: "
                "the other texts of the batch would be those of one microbatch only"
            )
        self.decoder = decoder
        trainer.setdefault("data_collator", Collator(options, batch_negatives))
        # `compute_loss_func` tells Trainer to count the labels and not to scale for accumulation; compute_loss below
        # never calls it.
        super().__init__(encoder.model, args, compute_loss_func=self._loss_terms, **trainer)
        self.label_names = ["labels"]
        if decoder is not None:
            decoder.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["text_ids", "suffix_ids", "target_ids", "query_ids", "positive_ids", "negative_ids",
                                   "passage_suffix_ids", "ref_logps", "teacher_scores", "block", "place"]  # fmt: skip

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.options.distillation_weight and "block" in (getattr(rows, "column_names", None) or ()):
            return BlockSampler(rows["block"], self.args.data_seed or self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows = inputs["rows"].items
        # Through `model`, which may be wrapped for several processes, and not through the encoder's own.
        packed = pack(self.encoder.sequences(*texts_of(rows, self.options.hard_negatives)), self.args.device)
        hidden = run_packed(model, packed, input_ids=packed.ids[None])
        z = pool_last_k(hidden, packed.cu_seqlens, self.encoder.num_compress_tokens, packed.unsort_index)
        world = 1
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"] != IGNORE_INDEX).sum()
        elif self.args.average_tokens_across_devices:
            world = self.accelerator.num_processes  # DDP averages gradients, and the count is that of all processes
        terms, others = self._loss_terms(z, rows, _on(num_items_in_batch, z.device))
        loss = world * terms
        if others is not None:
            loss = loss + others
        return (loss, {"z": z}) if return_outputs else loss

    def _loss_terms(self, z: Tensor, rows: list[dict], count: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """The sum over the terms that the labels count, divided by `count`, and the losses that are no such sum."""
        if "text_ids" in rows[0]:
            assert self.decoder is not None
            return stage1_loss(self.decoder, z, [row["target_ids"] for row in rows], num_tokens=count), None
        out = stage2_loss(
            self.options, self.decoder, z, rows, ref_logps=self._ref_logps(rows), teacher_scores=self._scores(rows)
        )
        parts = [part for part in (out.contrastive, out.distillation) if part is not None]
        others = torch.stack(parts).sum() if parts else None
        if out.alignment is None:
            return z.sum() * 0, others
        return out.alignment * (sum(num_loss_terms(r, self.options.negatives) for r in rows) / count), others

    def _scores(self, rows: list[dict]) -> Tensor | None:
        if not self.options.distillation_weight:
            return None
        if any("teacher_scores" not in row for row in rows):
            raise ValueError(
                "teacher_scores: got rows without them, expected rows of `precompute_teacher_scores`, since "
                f"distillation_weight={self.options.distillation_weight}"
            )
        scores = torch.tensor([row["teacher_scores"] for row in rows])
        return scores_of_rows([row["block"] for row in rows], [row["place"] for row in rows], scores)

    def _ref_logps(self, rows: list[dict]) -> tuple[Tensor, Tensor] | None:
        if not self.options.uses_ref_logps:
            if any("ref_logps" in row for row in rows):
                raise ValueError(
                    f"ref_logps: got rows with reference scores, expected none, since "
                    f"ref_margin={self.options.ref_margin!r} and alignment_weight={self.options.alignment_weight}"
                )
            return None
        if any("ref_logps" not in row or len(row["ref_logps"]) != len(row["target_ids"]) for row in rows):
            raise ValueError(
                f"ref_logps: got rows without reference scores, expected rows of `precompute_ref_logps`, since "
                f"ref_margin={self.options.ref_margin!r}"
            )
        scores = pad_sequence([torch.tensor(row["ref_logps"]) for row in rows], batch_first=True)
        return scores[:, 0], scores[:, 1:]
