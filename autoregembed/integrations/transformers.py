"""Both stages under Hugging Face's `Trainer`.

    encoder = Encoder.from_model(AutoModel.from_pretrained(NAME), tokenizer)  # no head: the encoder never reads one
    decoder = Decoder.from_pretrained(NAME)
    rows = data.alignment_rows(data.load_rows("triplets.jsonl"), encoder.prompt)
    rows = precompute_ref_logps(rows, encoder, decoder)
    AutoRegEmbedTrainer(encoder, decoder, args, train_dataset=rows, processing_class=tokenizer).train()

`AutoRegEmbedTrainer` packs its batches and does both stages, by the columns of the data. `CompressionLossFunction` is
stage 1 as a `compute_loss_func` of the stock `Trainer`. Stage 2 is no such function: the Trainer hands it the number of
labels, while the loss is a mean over (positive, negative) pairs, whose number in the other micro-batches of a step it
cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from autoregembed.attention import run_packed
from autoregembed.config import Stage2Options
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.objective import num_loss_terms, stage1_loss, stage2_loss, texts_of
from autoregembed.ops.pool_last_k import pool_last_k
from autoregembed.packing import pack
from autoregembed.reference_scores import compute_ref_logps

__all__ = ["AutoRegEmbedTrainer", "Collator", "CompressionLossFunction", "compression_inputs", "precompute_ref_logps"]

IGNORE_INDEX = -100  # what Trainer does not count


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1 in the stock Trainer


def compression_inputs(rows: Dataset, encoder: Encoder, eos_token_id: int) -> Dataset:
    """Rows of `data.compression_rows` to {input_ids, labels}, what `DataCollatorForSeq2Seq` pads.

    Give that collator a tokenizer with `padding_side="left"` and the Trainer `label_names=["labels"]`.
    """

    def convert(row: dict) -> dict:
        (ids,) = encoder.sequences([row["text_ids"]], [row["suffix_ids"]])
        return {"input_ids": ids, "labels": [*row["target_ids"], eos_token_id]}

    return rows.map(convert, remove_columns=rows.column_names)


class CompressionLossFunction:
    """Stage 1 as `Trainer(compute_loss_func=…)` for a base model (`AutoModel`) and left-padded texts.

    The loss is Σ −log p(output | z) over the target tokens of the whole step, all micro-batches and processes.

    Args:
        decoder: the frozen decoder; moved to the device of the model's outputs.
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


def precompute_ref_logps(rows: Dataset, encoder: Encoder, decoder: Decoder, token_budget: int = 8192) -> Dataset:
    """Rows of `data.alignment_rows` with `ref_logps`: the scores of positive and negatives under the model as it is."""
    training = encoder.training
    positive, negatives = compute_ref_logps(encoder.eval(), decoder, rows, token_budget)
    encoder.train(training)
    scores = torch.cat([positive[:, None], negatives], 1).tolist()
    return rows.add_column("ref_logps", [row[: len(t)] for row, t in zip(scores, rows["target_ids"], strict=True)])


@dataclass(frozen=True)
class Rows:
    """Rows on their way through the data loader, which would otherwise walk over every single id."""

    items: list[dict]


class Collator:
    """Rows of `data.compression_rows` or `data.alignment_rows` to a batch of `AutoRegEmbedTrainer`: {labels, rows}.

    `labels` has one entry other than −100 for each term that the loss is a mean over (`objective.num_loss_terms`), so
    that the Trainer's own count is the right one.
    """

    def __init__(self, options: Stage2Options | None = None):
        self.negatives = (options or Stage2Options()).negatives

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        terms = torch.tensor([num_loss_terms(row, self.negatives) for row in rows])
        index = torch.arange(max(1, int(terms.max())))
        return {"labels": torch.where(index < terms[:, None], 0, IGNORE_INDEX), "rows": Rows(rows)}


class AutoRegEmbedTrainer(Trainer):
    """`Trainer` for stage 1 (rows of `data.compression_rows`) and stage 2 (rows of `data.alignment_rows`).

    The gradient does not depend on how a step is split into microbatches and processes. Checkpoints hold the encoder's
    model as Transformers or PEFT saves it, never the decoder.

    Args:
        encoder: around a base model (`AutoModel`) or a PeftModel of one, without `own_compress_rows`.
        decoder: the frozen decoder; None for stage 2 with `alignment_weight=0`.
        args: as for `Trainer`.
        options: weights and variants of the loss of stage 2. With `ref_margin` other than "none" the rows need a column
            `ref_logps` (`precompute_ref_logps`).
        trainer: further arguments of `Trainer`.

    Raises:
        ValueError: a model with a head, an encoder with compress rows of its own, or InfoNCE under gradient
            accumulation, where its negatives would come from one microbatch of the step.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        args: TrainingArguments | None = None,
        options: Stage2Options | None = None,
        **trainer: Any,
    ):
        options = options or Stage2Options()
        if encoder.model.get_output_embeddings() is not None:
            raise ValueError(
                f"encoder: got a {type(encoder.model).__name__} with a head, expected a base model such as "
                "AutoModel.from_pretrained gives"
            )
        if encoder.compress_rows is not None:
            raise ValueError("encoder: got own_compress_rows=True, expected False: Trainer would not save them")
        if decoder is None and options.alignment_weight:
            raise ValueError("decoder: got None, expected a Decoder, since alignment_weight > 0")
        if options.contrastive_weight and args is not None and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps: got {args.gradient_accumulation_steps}, expected 1 with "
                "contrastive_weight > 0: in-batch negatives would come from one microbatch only"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.options = options
        trainer.setdefault("data_collator", Collator(options))
        # `compute_loss_func` tells Trainer to count the labels and not to scale for accumulation; compute_loss below
        # never calls it.
        super().__init__(encoder.model, args, compute_loss_func=self._loss_terms, **trainer)
        self.label_names = ["labels"]
        if decoder is not None:
            decoder.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["text_ids", "suffix_ids", "target_ids", "query_ids", "positive_ids", "negative_ids",
                                   "passage_suffix_ids", "ref_logps"]  # fmt: skip

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
        terms, contrastive = self._loss_terms(z, rows, _on(num_items_in_batch, z.device))
        loss = world * terms
        if contrastive is not None:
            loss = loss + contrastive
        return (loss, {"z": z}) if return_outputs else loss

    def _loss_terms(self, z: Tensor, rows: list[dict], count: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """The sum over the terms that the labels count, divided by `count`, and InfoNCE, which is no such sum."""
        if "text_ids" in rows[0]:
            assert self.decoder is not None
            return stage1_loss(self.decoder, z, [row["target_ids"] for row in rows], num_tokens=count), None
        out = stage2_loss(self.options, self.decoder, z, rows, ref_logps=self._ref_logps(rows))
        if out.alignment is None:
            return z.sum() * 0, out.contrastive
        return out.alignment * (sum(num_loss_terms(r, self.options.negatives) for r in rows) / count), out.contrastive

    def _ref_logps(self, rows: list[dict]) -> tuple[Tensor, Tensor] | None:
        if not self.options.uses_ref_logps:
            return None
        if any("ref_logps" not in row or len(row["ref_logps"]) != len(row["target_ids"]) for row in rows):
            raise ValueError(
                f"ref_logps: got rows without reference scores, expected rows of `precompute_ref_logps`, since "
                f"ref_margin={self.options.ref_margin!r}"
            )
        scores = pad_sequence([torch.tensor(row["ref_logps"]) for row in rows], batch_first=True)
        return scores[:, 0], scores[:, 1:]
