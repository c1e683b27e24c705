"""Both stages under Hugging Face's `Trainer`.

    model = AutoModel.from_pretrained(NAME)  # no head: the encoder never reads one
    ids = checkpoint.add_compress_tokens(model, tokenizer, 5)
    encoder = Encoder(model, compress_token_ids=ids, suffix_ids=prompt.suffix(), bos_token_id=tokenizer.bos_token_id)
    rows = data.alignment_rows(data.load_rows("triplets.jsonl"), prompt)
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
from transformers import Trainer, TrainingArguments

from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.ops import alignment_loss
from autoregembed.objective import alignment_scores, compute_ref_logps, contrastive, texts_of
from autoregembed.ops import NEGATIVES, REF_MARGINS, pool_last_k
from autoregembed.packing import pack, run_packed

__all__ = ["AutoRegEmbedTrainer", "Collator", "CompressionLossFunction", "compression_inputs", "precompute_ref_logps"]

IGNORED = -100  # what Trainer does not count


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1 in the stock Trainer


def compression_inputs(rows, encoder: Encoder, eos_token_id: int):
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
        targets = [[i for i in row if i != IGNORED][:-1] for row in labels.tolist()]
        logprob = self.decoder.logprob(hidden[:, -self.num_compress_tokens :], targets)
        return -logprob.sum() / (self.decoder.num_tokens(targets) if num_items_in_batch is None else num_items_in_batch)


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

    `labels` has one entry other than −100 for each term that the loss is a mean over, so that the Trainer's own count
    is the right one: target tokens with eos in stage 1, pairs in stage 2 (rows with a negative, if those are joint).
    """

    def __init__(self, negatives: str = "independent"):
        if negatives not in NEGATIVES:
            raise ValueError(f"negatives: got {negatives!r}, expected {NEGATIVES}")
        self.negatives = negatives

    def _terms(self, row: dict) -> int:
        if "text_ids" in row:
            return len(row["target_ids"]) + 1
        pairs = len(row["target_ids"]) - 1
        return pairs if self.negatives == "independent" else min(pairs, 1)

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        terms = torch.tensor([self._terms(row) for row in rows])
        places = torch.arange(max(1, int(terms.max())))
        return {"labels": torch.where(places < terms[:, None], 0, IGNORED), "rows": Rows(rows)}


class AutoRegEmbedTrainer(Trainer):
    """`Trainer` for stage 1 (rows of `data.compression_rows`) and stage 2 (rows of `data.alignment_rows`).

    The gradient does not depend on how a step is cut into micro-batches and processes. Checkpoints hold the encoder's
    model as Transformers or PEFT saves it, never the decoder.

    Args:
        encoder: around a base model (`AutoModel`) or a PeftModel of one, without `own_compress_rows`.
        decoder: the frozen decoder; None for stage 2 with `alignment_weight=0`.
        args: as for `Trainer`.
        beta, temperature, ref_margin, negatives: of stage 2, as in `autoregembed.alignment_loss`; with `ref_margin`
            other than "none" the rows need a column `ref_logps` (`precompute_ref_logps`).
        alignment_weight, contrastive_weight: factors of the two losses of stage 2.
        contrastive_temperature: of InfoNCE.
        hard_negatives: encode the negatives too, and give them to InfoNCE.
        trainer: further arguments of `Trainer`.

    Raises:
        ValueError: a model with a head, an encoder with compress rows of its own, an unknown option, or InfoNCE under
            gradient accumulation, where its negatives would come from a part of the step.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder | None,
        args: TrainingArguments | None = None,
        *,
        beta: float = 0.1,
        temperature: float = 0.1,
        ref_margin: str = "add",
        negatives: str = "independent",
        alignment_weight: float = 1.0,
        contrastive_weight: float = 0.0,
        contrastive_temperature: float = 0.05,
        hard_negatives: bool = False,
        **trainer: Any,
    ):
        if encoder.model.get_output_embeddings() is not None:
            raise ValueError(
                f"encoder: got a {type(encoder.model).__name__} with a head, expected a base model such as "
                "AutoModel.from_pretrained gives"
            )
        if encoder.compress_rows is not None:
            raise ValueError("encoder: got own_compress_rows=True, expected False: Trainer would not save them")
        if ref_margin not in REF_MARGINS:
            raise ValueError(f"ref_margin: got {ref_margin!r}, expected {REF_MARGINS}")
        if decoder is None and alignment_weight:
            raise ValueError("decoder: got None, expected a Decoder, since alignment_weight > 0")
        if contrastive_weight and args is not None and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps: got {args.gradient_accumulation_steps}, expected 1 with "
                "contrastive_weight > 0: in-batch negatives would come from one micro-batch only"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.alignment: dict[str, Any] = {
            "beta": beta, "temperature": temperature, "ref_margin": ref_margin, "negatives": negatives,
        }  # fmt: skip
        self.alignment_weight = alignment_weight
        self.contrastive_weight = contrastive_weight
        self.contrastive_temperature = contrastive_temperature
        self.hard_negatives = hard_negatives
        trainer.setdefault("data_collator", Collator(negatives))
        # `compute_loss_func` tells Trainer to count the labels and not to scale for accumulation.
        super().__init__(encoder.model, args, compute_loss_func=self._share, **trainer)
        self.label_names = ["labels"]
        if decoder is not None:
            decoder.to(self.args.device)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["text_ids", "suffix_ids", "target_ids", "query_ids", "positive_ids", "negative_ids",
                                   "ref_logps"]  # fmt: skip

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows = inputs["rows"].items
        k = self.encoder.num_compress_tokens
        # Through `model`, which may be wrapped for several processes, and not through the encoder's own.
        packed = pack(self.encoder.sequences(*texts_of(rows, self.hard_negatives)), self.args.device)
        z = pool_last_k(
            run_packed(model, packed, input_ids=packed.ids[None]), packed.cu_seqlens, k, packed.unsort_index
        )
        own = (inputs["labels"] != IGNORED).sum()
        world = 1
        if num_items_in_batch is None:
            num_items_in_batch = own
        elif self.args.average_tokens_across_devices:
            world = self.accelerator.num_processes  # DDP averages gradients, and the count is that of all processes
        loss = world * self._share(z, rows, num_items_in_batch)
        if self.contrastive_weight and "text_ids" not in rows[0]:
            loss = loss + self.contrastive_weight * contrastive(z, len(rows), self.contrastive_temperature)
        return (loss, {"z": z}) if return_outputs else loss

    def _share(self, z: Tensor, rows: list[dict], num_items_in_batch: Tensor | int) -> Tensor:
        """These rows' share of a mean over `num_items_in_batch` target tokens or pairs."""
        if "text_ids" in rows[0]:
            assert self.decoder is not None
            return -self.decoder.logprob(z, [row["target_ids"] for row in rows]).sum() / num_items_in_batch
        if self.decoder is None or not self.alignment_weight:
            return z.sum() * 0
        a, b, c, mask = alignment_scores(self.decoder, z, rows)
        r_a = r_c = None
        if self.alignment["ref_margin"] != "none":
            if any("ref_logps" not in row or len(row["ref_logps"]) != len(row["target_ids"]) for row in rows):
                raise ValueError(
                    f"ref_logps: got rows without reference scores, expected with ref_margin {self.alignment['ref_margin']!r} are "
                    "rows of `precompute_ref_logps`"
                )
            r_a = a.new_tensor([row["ref_logps"][0] for row in rows])
            flat = a.new_tensor([score for row in rows for score in row["ref_logps"][1:]])
            r_c = torch.zeros_like(c).masked_scatter(mask, flat)
        loss = alignment_loss(a, b, c, r_a, r_c, negative_mask=mask, **self.alignment).loss
        terms = mask.sum() if self.alignment["negatives"] == "independent" else mask.any(1).sum()
        return self.alignment_weight * loss * terms / max(num_items_in_batch, 1)
