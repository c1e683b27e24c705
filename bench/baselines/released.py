"""The released AutoRegEmbed algorithm, written from its description: the baseline of a training step.

A step makes three calls: (query, positive), (positive, positive) and (query, negative_j). Each is a padded encoder pass
followed by a padded decoder pass, so a query is encoded 1 + M times. The lm_head runs on every position, compress
tokens and padding included. The (rows, positions, V) logits and their log-softmax stay in the model's dtype. Attention
masks come from lengths; the released code has `ids != pad`, with pad = eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ids = Sequence[int]


def _pad(sequences: Sequence[Ids], value: int, device: torch.device, length: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, L) and mask (B, L), L at least `length`."""
    longest = max(length, *map(len, sequences))
    ids = torch.tensor([[*s, *[value] * (longest - len(s))] for s in sequences], device=device)
    lengths = torch.tensor([len(s) for s in sequences], device=device)
    return ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


class Released(nn.Module):
    """Encoder and frozen decoder of the released code.

    Args:
        encoder: the base model (no lm_head) whose embedding matrix holds the compress tokens.
        decoder: a causal LM; the constructor freezes it and sets eval mode.
        compress_token_ids: the K ids at the end of every text.
        bos_token_id: begins every text, unless None.
        eos_token_id: ends every target, and pads.
    """

    def __init__(
        self, encoder: Any, decoder: Any, *, compress_token_ids: Ids, bos_token_id: int | None, eos_token_id: int
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder.eval().requires_grad_(False)
        self.compress_token_ids = list(compress_token_ids)
        self.bos = [] if bos_token_id is None else [bos_token_id]
        self.eos_token_id = eos_token_id

    def compress(self, texts: Sequence[Ids], suffixes: Sequence[Ids], length: int = 0) -> Tensor:
        """z (B, K, D) of texts padded to at least `length`."""
        k = len(self.compress_token_ids)
        sequences = [[*self.bos, *t, *s, *self.compress_token_ids] for t, s in zip(texts, suffixes, strict=True)]
        ids, mask = _pad(sequences, self.eos_token_id, self.encoder.get_input_embeddings().weight.device, length)
        hidden = self.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = mask.sum(1, keepdim=True) - k + torch.arange(k, device=ids.device)
        return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))

    def logits(self, z: Tensor, targets: Sequence[Ids], length: int = 0) -> tuple[Tensor, Tensor]:
        """Logits (B, K + L, V) in the model's dtype, and labels (B, K + L), -100 where nothing is scored."""
        k = z.shape[1]
        ids, mask = _pad([[*t, self.eos_token_id] for t in targets], self.eos_token_id, z.device, length)
        embedded = torch.cat([z, self.decoder.get_input_embeddings()(ids).to(z.dtype)], 1)
        mask = torch.cat([mask.new_ones(len(ids), k), mask], 1)
        labels = torch.cat([ids.new_full((len(ids), k), -100), ids], 1).masked_fill(mask == 0, -100)
        return self.decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits, labels

    def logprob(
        self,
        texts: Sequence[Ids],
        suffixes: Sequence[Ids],
        targets: Sequence[Ids],
        lengths: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """log p(target | z(text)), (B,), with encoder and decoder inputs padded to at least `lengths`."""
        logits, labels = self.logits(self.compress(texts, suffixes, lengths[0]), targets, lengths[1])
        logits, labels = logits[:, :-1], labels[:, 1:]
        scored = labels != -100
        token = logits.log_softmax(-1).gather(2, labels.where(scored, 0)[..., None]).squeeze(2)
        return (token * scored).sum(1)

    def compression_loss(self, rows: Sequence[dict]) -> Tensor:
        """Stage 1: token mean of −log p(target | z) over rows {text_ids, suffix_ids, target_ids}."""
        z = self.compress([r["text_ids"] for r in rows], [r["suffix_ids"] for r in rows])
        logits, labels = self.logits(z, [r["target_ids"] for r in rows])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def alignment_loss(
        self,
        rows: Sequence[dict],
        reference_positive: Tensor,  # (B,)
        reference_negatives: Tensor,  # (B, M)
        *,
        beta: float = 0.1,
        temperature: float = 0.1,
        batch: Sequence[dict] | None = None,
    ) -> Tensor:
        """Stage 2 over rows {query_ids, positive_ids, suffix_ids, target_ids = [positive, M negatives]}.

        `batch` holds all rows of the step when `rows` is a micro-batch of it: a row is padded to the longest of its
        batch, as in the released code.
        """
        suffixes = [r["suffix_ids"] for r in rows]
        queries, positives = [r["query_ids"] for r in rows], [r["target_ids"][0] for r in rows]
        negatives = [n for r in rows for n in r["target_ids"][1:]]
        m = len(negatives) // len(rows)
        fixed = len(self.bos) + len(self.compress_token_ids)
        query, positive = (
            max((len(r[name]) + len(r["suffix_ids"]) + fixed for r in batch or ()), default=0)
            for name in ("query_ids", "positive_ids")
        )
        scored = max((len(r["target_ids"][0]) + 1 for r in batch or ()), default=0)
        rejected = max((len(t) + 1 for r in batch or () for t in r["target_ids"][1:]), default=0)
        a = self.logprob(queries, suffixes, positives, (query, scored))[:, None]
        b = self.logprob([r["positive_ids"] for r in rows], suffixes, positives, (positive, scored))[:, None]
        again = [i for i in range(len(rows)) for _ in range(m)]
        again_suffixes = [suffixes[i] for i in again]
        c = self.logprob([queries[i] for i in again], again_suffixes, negatives, (query, rejected)).view(len(rows), m)
        s1 = torch.sigmoid(beta * (a - b).abs())
        s2 = torch.sigmoid(beta * ((a - c) + (reference_positive[:, None] - reference_negatives)))
        align, separate = torch.exp(-s1 / temperature), torch.exp(-s2 / temperature)
        return -torch.log(align / (align + separate)).mean()
