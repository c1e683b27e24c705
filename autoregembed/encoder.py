"""Texts to compressed embeddings: z, the last hidden states of a causal LM at its K compress tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from autoregembed.attention import run_packed, use_packed_attention
from autoregembed.distributed import equalize_microbatches
from autoregembed.models import (
    base_model,
    final_norm,
    fit_length,
    max_positions,
    require_finite,
    require_gradients,
    scale_output,
)
from autoregembed.ops.pool_last_k import pool_last_k
from autoregembed.packing import Ids, Packed, check_ids, make_microbatches, pack


def text_embedding(z: Tensor) -> Tensor:
    """normalize(mean_k z): (B, K, D) -> (B, D), the vector that search uses."""
    return F.normalize(z.mean(1), dim=-1)


class Encoder(nn.Module):
    """`bos · text · suffix · compress tokens` through a causal LM, packed, to z.

    Args:
        model: a Hugging Face causal LM (or its base model, or a PeftModel around one). Its attention is set to a
            route that understands packs; nothing else of it is changed.
        compress_token_ids: the K ids whose embeddings the model reads last; they must lie within its embedding matrix.
        suffix_ids: ids between text and compress tokens (the instruction with its newlines), the default for all texts.
        bos_token_id: None for models without one.
        attention: "auto", "flash_attention_2", "varlen" or "sdpa".
        own_compress_rows: keep the K compress embeddings in a parameter of its own, `compress_rows` (K, D), so that
            they can have their own learning rate and be trained where the embedding matrix is frozen.
            `fold_compress_rows()` writes them into the matrix.

    Raises:
        ValueError, IndexError: ids outside the embedding matrix, an attention route that cannot run, NaN weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compress_token_ids: Ids,
        suffix_ids: Ids = (),
        bos_token_id: int | None = None,
        attention: str = "auto",
        own_compress_rows: bool = False,
    ):
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what accelerate shards one by one
        self.compress_token_ids = list(compress_token_ids)
        self.suffix_ids = list(suffix_ids)
        self.bos_token_id = bos_token_id
        embedding = model.get_input_embeddings()
        vocabulary = embedding.weight.shape[0]
        self.sharded = False  # by whoever shards the model: then all processes make the same number of passes
        self._vocabulary = vocabulary  # DeepSpeed's sharded weights have no shape outside of their module's forward
        check_ids("compress_token_ids", [self.compress_token_ids], vocabulary)
        if len(set(self.compress_token_ids)) < len(self.compress_token_ids):
            raise ValueError(f"compress_token_ids: got {self.compress_token_ids}, expected distinct ids")
        if self.suffix_ids:
            check_ids("suffix_ids", [self.suffix_ids], vocabulary)
        if bos_token_id is not None:
            check_ids("bos_token_id", [[bos_token_id]], vocabulary)
        require_finite(model)
        require_gradients(model)
        self.compress_rows = None
        if own_compress_rows:
            self.compress_rows = nn.Parameter(embedding.weight.detach()[self.compress_token_ids].clone())
        self.use_attention(attention)

    def use_attention(self, route: str) -> None:
        """Sets `attention` anew, for a model that has moved to another device or dtype.

        Raises:
            ValueError: a route that cannot run there.
        """
        self.attention = use_packed_attention(self.model, route, embeds=self.compress_rows is not None)

    @property
    def num_compress_tokens(self) -> int:
        return len(self.compress_token_ids)

    def fit_max_length(self, length: int | None = None) -> int:
        """Tokens of one text with all that surrounds it: `length`, by default 512 or the model's positions if fewer.

        Raises:
            ValueError: `length` is more than the model's positions.
        """
        return fit_length("max_length", length, max_positions(self.model))

    @torch.no_grad()
    def fold_compress_rows(self) -> None:
        """Writes `compress_rows` into the model's embedding matrix; a no-op without them."""
        if self.compress_rows is not None:
            self.model.get_input_embeddings().weight[self.compress_token_ids] = self.compress_rows

    @torch.no_grad()
    def init_output_rms(self, rms: Tensor, ids: Sequence[Ids], suffix_ids: Sequence[Ids] | None = None) -> None:
        """Scales the model's final norm so that each dimension of z has a given RMS over some texts.

        A few dimensions of an LM's last hidden states are ten times as large as the rest. A decoder reads such a z as
        noise until training has tamed them; this does so before the first step and adds nothing to the model.

        Args:
            rms: (D,) of the decoder's input embeddings (`Decoder.input_rms_per_dimension`).
            ids, suffix_ids: as in `forward`; a hundred texts are plenty.
        """
        z = self(ids, suffix_ids).double()
        gain = rms.double() / z.square().mean((0, 1)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        scale_output(final_norm(self.model), gain)

    def sequences(self, ids: Sequence[Ids], suffix_ids: Sequence[Ids] | None = None) -> list[list[int]]:
        """The token ids that the model reads for each text."""
        if suffix_ids is not None and len(suffix_ids) != len(ids):
            raise ValueError(f"suffix_ids: got {len(suffix_ids)}, expected one for each of the {len(ids)} texts")
        head = [] if self.bos_token_id is None else [self.bos_token_id]
        return [
            [*head, *text, *(self.suffix_ids if suffix_ids is None else suffix_ids[i]), *self.compress_token_ids]
            for i, text in enumerate(ids)
        ]

    def forward(
        self, ids: Sequence[Ids], suffix_ids: Sequence[Ids] | None = None, token_budget: int | None = None
    ) -> Tensor:
        """Encodes B texts, in one packed pass or in several that each fit in memory.

        With a `token_budget` that the batch exceeds, only z and one pass' activations are ever alive: the forward keeps
        no graph, and the backward runs each pass again, with the same dropout, before it goes through it. The gradient
        is that of one pass over all texts, whatever the loss does with z, for one more forward.

        Args:
            ids: B texts as token ids, without bos, suffix or compress tokens.
            suffix_ids: B suffixes that replace the default one.
            token_budget: tokens of one pass, with suffix and compress tokens; a longer text makes a pass of its own.
                None: one pass.

        Returns:
            z (B, K, D) in the model's dtype.

        Raises:
            ValueError: no text, an empty one, one longer than the model's positions, or a budget below 1.
            IndexError: an id outside the embedding matrix.

        Source: gradient caching, Gao et al., arXiv 2101.06983.
        """
        embedding = self.model.get_input_embeddings()
        check_ids("ids", ids, self._vocabulary)
        if len(ids) == 0:
            raise ValueError("ids: got no text, expected at least one")
        if suffix_ids is not None:  # each may be empty
            check_ids("suffix_ids", [[*suffix, 0] for suffix in suffix_ids], self._vocabulary)
        sequences = self.sequences(ids, suffix_ids)
        limit, longest = max_positions(self.model), max(map(len, sequences))
        if limit is not None and longest > limit:
            raise ValueError(
                f"ids: got a text of {longest} tokens with its suffix and compress tokens, expected "
                f"{limit} (the model's positions); truncate the text"
            )
        parts = make_microbatches([len(s) for s in sequences], token_budget)
        if self.sharded and token_budget is not None:
            parts = equalize_microbatches(parts, embedding.weight.device)
        if len(parts) == 1:
            packed = pack(sequences, embedding.weight.device)
            return self._run(packed.ids, packed)
        z = []
        for part in parts:
            packed = pack([sequences[i] for i in part], embedding.weight.device)
            z.append(checkpoint(self._run, packed.ids, packed, use_reentrant=False))
        places = torch.tensor([i for part in parts for i in part], device=embedding.weight.device)
        return torch.cat(z)[places.argsort()]

    def _run(self, ids: Tensor, packed: Packed) -> Tensor:
        """z (B, K, D) of one pack; `ids` are its own, since `checkpoint` keeps the random state by tensor arguments."""
        k = self.num_compress_tokens
        if self.compress_rows is None:
            hidden = run_packed(base_model(self.model), packed, input_ids=ids[None])
        else:
            embedding = self.model.get_input_embeddings()
            x = embedding(ids)
            # Gemma's embedding module multiplies what it reads from its matrix.
            own = (self.compress_rows * getattr(embedding, "embed_scale", 1.0)).to(x.dtype)
            rows = packed.cu_seqlens[1:, None].long() - k + torch.arange(k, device=x.device)  # (B, K)
            x = x.index_copy(0, rows.flatten(), own.repeat(len(rows), 1))
            hidden = run_packed(base_model(self.model), packed, inputs_embeds=x[None])
        return pool_last_k(hidden, packed.cu_seqlens, k, packed.unsort_index)
