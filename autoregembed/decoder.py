"""Compressed embeddings and targets to log p(target | z), through a frozen causal LM."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from autoregembed.attention import run_packed
from autoregembed.distributed import all_reduce, equalize_microbatches, to_full_tensor
from autoregembed.files import CheckpointError
from autoregembed.heads import require_linear_head, require_plain_embedding
from autoregembed.loading import fill
from autoregembed.models import (
    base_model,
    claim,
    fit_length,
    is_plain,
    load_causal_lm,
    max_positions,
    original_in,
    read_recipe,
    require_finite,
    require_loaded,
    require_no_hidden_adapters,
    split_gguf,
)
from autoregembed.ops.linear_logprob import linear_logprob
from autoregembed.ops.splice import splice
from autoregembed.packing import IGNORED, Ids, ScoredPack, check_ids, index_on, pack
from autoregembed.passes import Checkpointing, PairwiseScores, checkpoint_layers, in_order
from autoregembed.prefixes import SharedPrefixes, choose_passes, pass_tokens, select, share_prefixes
from autoregembed.probe import allow_shared_prefixes, use_packed_attention, verify_length
from autoregembed.prompt import batch_token_ids
from autoregembed.quantized import prepare_quantized
from autoregembed.sharding import gather_shared, shard_frozen
from autoregembed.sharing import SharedBase

if TYPE_CHECKING:
    from autoregembed.encoder import Encoder

Z_NORMS = ("none", "match_rms")
LOGPROB_REDUCTIONS = ("sum", "mean")


class Decoder(nn.Module):
    """A frozen causal LM that reads z as K input embeddings and scores target tokens and the closing eos.

    The model stays in eval mode and its parameters get no gradients; gradients flow through it to z.
    `from_pretrained` gives a complete decoder; the constructor takes its parts.

    Args:
        model: a Hugging Face causal LM, not the encoder's own (for that, use `sharing`).
        eos_token_id: ends every target; by default that of the model's config (the first, if it lists several).
        bos_token_id: read before z. None: z comes first, as in the released code.
        tokenizer: a fast tokenizer, for `tokenize`.
        z_norm: "none" leaves z unchanged (the released code); "match_rms" scales every compressed vector to the RMS of
            the model's input embeddings, since the last hidden states of an LM are an order of magnitude larger.
        logprob_reduction: over a target's tokens and eos: "sum" (the paper) or "mean", which does not grow with length.
        attention: "auto", "flash_attention_2", "varlen" or "sdpa".
        impl: the backend of `linear_logprob`.
        share_prefixes: targets of the same z run bos and its K rows only once; scores and gradients are the same up to
            rounding. None: where the model supports it and it saves time; True: always, where two targets share a z.
        gradient_checkpointing: recompute activations in the backward: True or "selective", as in `Config`.

    Raises:
        ValueError: no eos, NaN weights, an option that is unknown or that the model does not support; the model of an
            Encoder; adapters that PEFT has put into the model in place or that add virtual tokens; input embeddings
            that are not rows of their matrix; a head with an adapter or quantized weights; a head whose logits, by
            comparison with those of the model, are not softcap(scale · (hidden Wᵀ + bias)).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        tokenizer: Any = None,
        z_norm: str = "none",
        logprob_reduction: str = "sum",
        attention: str = "auto",
        impl: str = "auto",
        share_prefixes: bool | None = None,
        gradient_checkpointing: Checkpointing = False,
    ):
        super().__init__()
        self.shared: SharedBase | None = None
        if z_norm not in Z_NORMS:
            raise ValueError(f"z_norm: got {z_norm!r}, expected {Z_NORMS}")
        if logprob_reduction not in LOGPROB_REDUCTIONS:
            raise ValueError(f"logprob_reduction: got {logprob_reduction!r}, expected {LOGPROB_REDUCTIONS}")
        require_loaded(model)
        require_no_hidden_adapters(model)
        claim(model, self)
        self.model = model
        self._freeze()
        self.tokenizer = tokenizer
        self.z_norm = z_norm
        self.logprob_reduction = logprob_reduction
        self.sharded = False
        self.impl = impl
        self.share_prefixes = share_prefixes
        config = model.config.get_text_config()
        if eos_token_id is None:
            eos_token_id = config.eos_token_id
        if isinstance(eos_token_id, (list, tuple)):
            eos_token_id = eos_token_id[0]
        if eos_token_id is None:
            raise ValueError("eos_token_id: got None here and in the model's config, expected a token id")
        self.eos_token_id = int(eos_token_id)
        require_finite(model)
        prepare_quantized(model)
        if gradient_checkpointing:
            checkpoint_layers(model, gradient_checkpointing)
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"model: got {type(model).__name__}, which has no head, expected a causal LM with its lm_head"
            )
        if type(head) is not nn.Linear or not is_plain(head.weight):
            quantised = isinstance(head, nn.Linear) and not is_plain(head.weight)
            kind = type(head.weight.data if quantised else head).__name__
            raise ValueError(
                f"model: got an lm_head of type {kind}, expected a plain nn.Linear: merge adapters into it "
                "(merge_and_unload), leave it out of quantisation (such as llm_int8_skip_modules)"
            )
        check_ids("eos_token_id", [[self.eos_token_id]], head.weight.shape[0])
        self.prefix = [] if bos_token_id is None else [bos_token_id]
        if self.prefix:
            check_ids("bos_token_id", [self.prefix], head.weight.shape[0])
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        # Gemma's embedding module multiplies what it reads from its matrix.
        self.embedding_scale = float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))
        require_plain_embedding(model, self.embedding_scale)
        self.use_attention(attention)
        require_linear_head(model, self.eos_token_id, self.softcap, self.scale)
        self.register_buffer("input_rms", None, persistent=False)
        if z_norm == "match_rms":
            self.input_rms = self.input_rms_per_dimension().square().mean().sqrt()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        z_norm: str | None = None,
        add_bos: bool | None = None,
        logprob_reduction: str = "sum",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        attention: str = "auto",
        impl: str = "auto",
        share_prefixes: bool | None = None,
        gradient_checkpointing: Checkpointing = False,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
    ) -> Decoder:
        """A decoder with its tokenizer, from a causal LM, or from the model that a trained encoder started from.

        Args:
            name_or_path: a hub id, a folder, a GGUF file, or a folder that `Encoder.save_pretrained` or a training run
                wrote (`model/` or `export/`). Such a folder names its original model, which is loaded instead.
            z_norm: as in the constructor; by default as in the training of that folder, otherwise "none".
            add_bos: the decoder reads bos before z; by default as in that training, otherwise False.
            logprob_reduction, attention, impl, share_prefixes, gradient_checkpointing: as in the constructor.
            dtype: of the weights.
            device: of the weights; by default the CPU.
            gguf_file: the name of a GGUF file in the folder of the model that is loaded.
            trust_remote_code: run model code that a hub repository contains.

        Raises:
            CheckpointError: the model cannot be loaded, or is a trained encoder that names no original model.
            ValueError: `add_bos` with a tokenizer without bos. And the errors of the constructor.
        """
        source, gguf_file = split_gguf(name_or_path, gguf_file)
        recipe = read_recipe(source)
        if recipe:
            original, recorded = original_in(recipe, source) if recipe.get("decoder") else (None, None)
            if not original or read_recipe(original):
                raise CheckpointError(
                    f"decoder: got {source!r}, a trained encoder that started from {original!r}; expected the original "
                    "model"
                )
            source, gguf_file = original, gguf_file or recorded
        model, tokenizer, _ = load_causal_lm(
            source, gguf_file=gguf_file, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return cls.from_model(
            model if device is None else model.to(device), tokenizer,
            z_norm=recipe.get("z_norm") or "none" if z_norm is None else z_norm,
            add_bos=bool(recipe.get("decoder_add_bos")) if add_bos is None else add_bos,
            logprob_reduction=logprob_reduction, attention=attention, impl=impl, share_prefixes=share_prefixes,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: Any, *, add_bos: bool = False, **options: Any) -> Decoder:
        """Like `from_pretrained`, for a causal LM in memory, which nothing else may use.

        Args:
            model, tokenizer: as `models.load_causal_lm` returns them.
            add_bos: the decoder reads bos before z.
            options: as in the constructor.

        Raises:
            ValueError: `add_bos` with a tokenizer without bos. And the errors of the constructor.
        """
        bos = tokenizer.bos_token_id if add_bos else None
        if add_bos and bos is None:
            raise ValueError("add_bos: got True, expected False: the tokenizer has no bos token")
        return cls(model, eos_token_id=tokenizer.eos_token_id, bos_token_id=bos, tokenizer=tokenizer, **options)

    @classmethod
    def sharing(cls, encoder: Encoder, *, add_bos: bool = False, **options: Any) -> Decoder:
        """A decoder that uses the weights under an encoder's adapters, so that one copy in memory serves both.

        Create it before the encoder is wrapped (DDP) or sharded. Moving or casting one of them changes both.

        Args:
            encoder: with adapters (`lora_rank`, `adapter`, or a PeftModel) on the original model, whose compress tokens
                are `own_compress_rows`.
            add_bos: the decoder reads bos before z.
            options: as in the constructor.

        Raises:
            ValueError: no adapters, other trained parameters, adapters that are merged, or a base that is not the
                original model. And the errors of `from_model`.
        """
        shared = SharedBase(encoder)
        if encoder.tokenizer is not None:
            decoder = cls.from_model(shared.model, encoder.tokenizer, add_bos=add_bos, **options)
        else:
            decoder = cls(shared.model, bos_token_id=encoder.bos_token_id if add_bos else None, **options)
        decoder.shared = encoder.shared = shared
        return decoder

    def tokenize(
        self, texts: Sequence[str], *, max_target_length: int | None = None, num_compress_tokens: int = 5
    ) -> list[list[int]]:
        """The ids of each text as a target, without eos, truncated so that bos, K vectors and eos fit beside them.

        Args:
            texts: n strings.
            max_target_length, num_compress_tokens: as in `fit_max_target_length`.

        Raises:
            ValueError: a decoder without tokenizer, a text without a token (the row is named), a length above the
                model's positions.
            TypeError: not a list of strings.
        """
        length = self.fit_max_target_length(num_compress_tokens, max_target_length)
        return [ids[:length] for ids in batch_token_ids(self.tokenizer, texts)]

    def train(self, mode: bool = True) -> Decoder:
        """The model stays in eval mode, whatever mode its owner goes into."""
        super().train(mode)
        self.model.eval()
        return self

    def _freeze(self) -> None:
        """No dropout and no gradient of a parameter, also where somebody has asked the model itself for them."""
        if self.model.training:
            self.model.eval()
        if self.shared is not None:
            self.shared.require_unmerged()
            self.shared.require_frozen()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def use_attention(self, backend: str) -> None:
        """Sets `attention` anew, for a model that has moved to another device or dtype.

        Raises:
            ValueError: a backend that cannot run there, or prefixes that the model cannot share though it is told to.
        """
        self._verified_length = len(self.prefix) + 5 + self.fit_max_target_length(5)
        self.attention = use_packed_attention(self.model, backend, embeds=True, length=self._verified_length)
        self.shares_prefixes = allow_shared_prefixes(self.model, self._verified_length, self.share_prefixes)

    @torch.no_grad()
    def input_rms_per_dimension(self) -> Tensor:
        """RMS of the model's input embeddings over the vocabulary, (D,) float32."""
        table = self.model.get_input_embeddings().weight
        shard = table.to_local() if self.sharded else table
        scale = torch.tensor(self.embedding_scale, dtype=table.dtype, device=shard.device)
        parts = [(part * scale).double().square().sum(0) for part in shard.detach().split(8192)]
        squares = torch.stack(parts).sum(0) if len(shard) else shard.new_zeros(shard.shape[1], dtype=torch.float64)
        if not self.sharded:
            return (squares / len(table)).sqrt().float()
        # Each row as often as there are copies of the shards.
        rows = all_reduce(torch.tensor(float(len(shard)), device=shard.device, dtype=torch.float64))
        return (all_reduce(squares) / rows).sqrt().float()

    def shard(self, device: torch.device, mesh: Any = None) -> None:
        """Shards the frozen weights over the processes of the run, on `device`; a pass gathers them layer by layer.

        They lie over `mesh`, as `fully_shard` takes it, by default over all processes. Weights that an encoder shares
        must be sharded there before. The ops read embedding matrix and head, not their modules: `logprob` gathers one
        after the other and frees it.
        """
        self.sharded = True
        if self.shared is None:
            shard_frozen(self.model, device, mesh)
        else:
            gather_shared(self.model, self.shared.places, device)
        if self.input_rms is not None and not self.input_rms.is_meta:
            self.input_rms = self.input_rms.to(device)

    def verify(self, longest: int) -> None:
        """Tries the model again where a pair of `longest` tokens crosses a limit that none has crossed so far."""
        self._verified_length = verify_length(
            self.model, longest, self._verified_length, embeds=True, shares_prefixes=self.shares_prefixes,
            sharded=self.sharded,
        )  # fmt: skip

    def fill(self, device: torch.device) -> None:
        """Reads the values of a decoder that was built in parts and then sharded, those of an encoder's base aside."""
        if self.shared is None:
            fill(self.model, device)
        if self.input_rms is not None:
            self.input_rms = self.input_rms_per_dimension().square().mean().sqrt()

    def rescale(self, z: Tensor) -> Tensor:
        """z (B, K, D), scaled by `z_norm` to what the decoder reads."""
        if self.input_rms is None:
            return z
        work = torch.promote_types(z.dtype, torch.float32)
        rms = z.to(work).square().mean(-1, keepdim=True).clamp(min=torch.finfo(work).tiny).sqrt()
        return (z.to(work) * (self.input_rms.to(work) / rms)).to(z.dtype)

    def fit_max_target_length(self, num_compress_tokens: int, length: int | None = None) -> int:
        """Tokens of a target, without eos: `length`, by default 512 or what bos and K vectors leave if less.

        Raises:
            ValueError: bos, K vectors and `length` tokens are more than the model's positions.
        """
        positions = max_positions(self.model)
        room = None if positions is None else positions - len(self.prefix) - num_compress_tokens
        return fit_length("max_target_length", length, room)

    def num_tokens(self, targets: Sequence[Ids]) -> int:
        """N, the number of supervised rows: the tokens of all targets, and one eos each."""
        return sum(map(len, targets)) + len(targets)

    def num_pass_tokens(self, k: int, targets: Sequence[Ids], owners: list[int]) -> int:
        """Tokens of one pass over pairs, with bos and K vectors; `owners` are the pairs' rows of z."""
        around = len(self.prefix) + k
        return pass_tokens([around + len(target) for target in targets], owners, around, self.shares_prefixes)

    def pack(self, k: int, targets: Sequence[Ids], owners: Sequence[int], padding: int = 0) -> ScoredPack:
        """The packed input of S pairs, on the host: bos if any, K rows for z, all target tokens; eos is a label, never
        an input.

        Args:
            k: K.
            targets: S targets as token ids, without eos.
            owners: the row of z that each is scored under.
            padding: how many pairs, the last ones, score 0 and have no gradient.
        """
        packed = pack([[*self.prefix, *[0] * k, *target] for target in targets])
        unscored = len(self.prefix) + k - 1
        cu_seqlens = packed.cu_seqlens - unscored * torch.arange(len(targets) + 1, dtype=torch.int32)
        pair = torch.arange(len(targets)).repeat_interleave(cu_seqlens.diff())
        rows = torch.arange(len(pair)) + unscored * (pair + 1)
        # Row t scores token t+1; the last row of a pair scores eos.
        labels = packed.ids.roll(-1)
        labels[packed.cu_seqlens[1:].long() - 1] = self.eos_token_id
        counts = packed.sort_index < len(targets) - padding
        labels = torch.where(counts[pair], labels[rows], IGNORED)
        return ScoredPack(packed, torch.as_tensor(owners)[packed.sort_index], rows, labels, cu_seqlens)

    def logprob(
        self,
        z: Tensor,
        targets: Sequence[Ids],
        z_index: Tensor | Sequence[int] | None = None,
        token_budget: int | None = None,
    ) -> Tensor:
        """log p(target | z) in nats, summed over target tokens and eos (or their mean, by `logprob_reduction`).

        If the pairs exceed `token_budget`, memory holds the activations of only one pass, for any loss. Each pass is
        followed at once by its own backward, which costs no additional FLOPs and keeps (S, K, D) gradients. If the
        pairs of one z share at least a third of all tokens, it is cheaper to keep no graph in the forward and to repeat
        each pass in the backward, so this is done instead.

        Args:
            z: (B, K, D) compressed embeddings.
            targets: S targets as token ids, without eos.
            z_index: (S,) the row of z that each target is scored under; by default target i under row i.
            token_budget: tokens of one pass, including bos and K vectors; a longer pair gets a pass of its own. None:
                one pass.

        Returns:
            (S,) float32 (float64 for a float64 model).

        Raises:
            ValueError: wrong shapes, a target that is empty or exceeds the model's positions, or a budget below 1.
            IndexError: an id outside the vocabulary, or a z_index outside z.
        """
        return self.run(z, targets, z_index, token_budget)

    def run(self, z: Tensor, targets: Sequence[Ids], z_index: Any, token_budget: int | None, fused: Any = None) -> Any:
        """`logprob`; where one pass holds all pairs, `fused(hidden, weight, labels, packed=…, **head)` in its place."""
        self._freeze()
        weight, embedding = self.model.get_output_embeddings().weight, self.model.get_input_embeddings().weight
        if not isinstance(z, Tensor):
            raise TypeError(f"z: got {type(z).__name__}, expected torch.Tensor")
        if z.ndim != 3 or z.shape[1] == 0 or z.shape[2] != embedding.shape[1]:
            raise ValueError(
                f"z: got shape {tuple(z.shape)}, expected (B, K, D) with K > 0 and D = {embedding.shape[1]}"
            )
        if not z.is_floating_point():
            raise TypeError(f"z: got dtype {z.dtype}, expected floating-point types")
        if z.device != embedding.device:
            raise ValueError(f"z: got device {z.device}, expected the decoder's, {embedding.device}")
        check_ids("targets", targets, min(len(weight), len(embedding)))
        if z_index is None:
            if len(targets) != len(z):
                raise ValueError(f"targets: got {len(targets)}, expected one for each of {len(z)} z")
            z_index = range(len(z))
        if len(z_index) != len(targets):
            raise ValueError(f"z_index: got {len(z_index)}, expected one for each of the {len(targets)} targets")
        if len(targets) == 0:
            return z.sum(dtype=torch.promote_types(z.dtype, torch.float32)) * 0 + z.new_zeros(0)
        try:
            z_index = torch.as_tensor(z_index, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"z_index: got {z_index!r}, expected integers") from error
        if not 0 <= int(z_index.min()) <= int(z_index.max()) < len(z):
            raise IndexError(f"z_index: got {z_index.min()}..{z_index.max()}, expected 0..{len(z) - 1}")
        around = len(self.prefix) + z.shape[1]
        limit, longest = max_positions(self.model), around + max(map(len, targets))
        if limit is not None and longest > limit:
            raise ValueError(
                f"targets: got one of {longest} positions with z, expected {limit} (the model's); truncate the target"
            )
        self.verify(longest)
        owners, lengths = z_index.tolist(), [around + len(target) for target in targets]
        again, share = torch.is_grad_enabled() and z.requires_grad, self.shares_prefixes
        # Sharded weights are gathered anew for each pass, so all processes must go one way, whatever their pairs.
        together = self.sharded and again and token_budget is not None
        share = bool(share) if together else share
        passes, shared = choose_passes(lengths, owners, around, token_budget, share, with_gradient=again)
        if self.sharded and token_budget is not None:
            passes = equalize_microbatches(passes, z.device)
        if len(passes) == 1:
            return self._score(z, targets, owners, shared, fused)

        def score(rows: Tensor, part: list[int]) -> Tensor:
            return self._score(rows, [targets[i] for i in part], [*range(len(part))], False)

        if again and not (share if together else shared):
            return PairwiseScores.apply(z[index_on(z.device, z_index)], score, passes)
        run = partial(checkpoint, self._score, use_reentrant=False) if again else self._score
        parts = []
        for part in passes:
            rows, places = np.unique([owners[i] for i in part], return_inverse=True)
            parts.append(run(z[index_on(z.device, rows.tolist())], [targets[i] for i in part], places.tolist(), shared))
        return in_order(parts, passes)

    def _score(self, z: Tensor, targets: Sequence[Ids], owners: list[int], share: bool, fused: Any = None) -> Any:
        """`run` in one pass, without checks."""
        shared = None
        if share:
            around = len(self.prefix) + z.shape[1]
            shared = share_prefixes([around + len(target) for target in targets], owners, around, z.device)
        return self.score(z, self.pack(z.shape[1], targets, owners).to(z.device), shared, fused)

    def score(self, z: Tensor, pairs: ScoredPack, shared: SharedPrefixes | None = None, fused: Any = None) -> Any:
        """`run` for pairs that lie on z's device; reads nothing on the host."""
        packed, owners, rows, labels, cu_seqlens = pairs
        embedding = self.model.get_input_embeddings().weight
        table = to_full_tensor(embedding)
        inputs = splice(
            self.rescale(z), table, packed.ids, packed.cu_seqlens, owners, offset=len(self.prefix),
            embedding_scale=float(torch.tensor(self.embedding_scale, dtype=table.dtype)),
        )  # fmt: skip
        head = self.model.get_output_embeddings()
        weight = table if head.weight is embedding else head.weight
        del table
        if shared is not None:
            inputs, rows = select(inputs, shared), shared.source[rows]
        hidden = run_packed(base_model(self.model), packed, shared, inputs_embeds=inputs[None])[rows]  # (N, D)
        options: dict[str, Any] = {"bias": head.bias, "softcap": self.softcap, "scale": self.scale, "impl": self.impl}
        if fused is not None:
            return fused(hidden, weight, labels, packed=packed, cu_seqlens=cu_seqlens, **options)
        scores = linear_logprob(hidden, weight, labels, cu_seqlens=cu_seqlens, **options)
        if self.logprob_reduction == "mean":
            scores = scores / cu_seqlens.diff()
        return scores[packed.unsort_index]
