"""Texts to compressed embeddings: z, the last hidden states of a causal LM at its K compress tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from autoregembed import distributed
from autoregembed.adapters import adapter_rows, adapter_token_ids, add_lora, load_adapter, num_trained_tokens
from autoregembed.attention import run_packed
from autoregembed.centering import Centering, read_centering
from autoregembed.export import export
from autoregembed.files import CheckpointError
from autoregembed.loading import place_of_rows, table_rows
from autoregembed.model_card import Card
from autoregembed.models import (
    add_compress_tokens,
    base_model,
    claim,
    compress_embeddings,
    embed_compress_rows,
    final_norm,
    fit_length,
    load_causal_lm,
    max_positions,
    original_of,
    require_finite,
    require_loaded,
    require_unadapted_head,
    require_untrained,
    scale_output,
    split_gguf,
    write_compress_rows,
)
from autoregembed.ops.pool_last_k import pool_last_k
from autoregembed.packing import Ids, Packed, check_ids, make_microbatches, order_of, pack
from autoregembed.probe import use_packed_attention, verify_length
from autoregembed.prompt import INSTRUCTION, Prompt, batch_token_ids, instruction_ids, require_fast
from autoregembed.quantized import prepare_quantized


def text_embedding(z: Tensor) -> Tensor:
    """normalize(mean_k z): (B, K, D) -> (B, D), the vector that search uses."""
    return F.normalize(z.mean(1), dim=-1)


class Encoder(nn.Module):
    """Reads `bos · text · suffix · compress tokens` of packed texts with a causal LM, and returns z.

    `from_pretrained` gives a complete encoder; the constructor takes its parts.

    Args:
        model: a Hugging Face causal LM (or its base model, or a PeftModel around one). Its attention is set to a
            backend that reads packs; nothing else in it is changed.
        compress_token_ids: ids of the K compress tokens, which the model reads last; inside its embedding matrix.
        suffix_ids: ids between text and compress tokens; by default those of `instruction`.
        bos_token_id: None for models without one.
        tokenizer: a fast tokenizer, for `tokenize`, `encode` and `save_pretrained`.
        instruction: the text that `suffix_ids` stand for.
        max_length: tokens of one text that this encoder tokenizes, including bos, instruction and compress tokens; by
            default 512, or the model's positions if they are fewer.
        prompts: text before queries and documents, {"query": …, "document": …}, as in sentence-transformers.
        attention: "auto", "flash_attention_2", "varlen" or "sdpa".
        own_compress_rows: keep the K compress embeddings in a separate parameter, `compress_rows` (K, D). They can then
            have their own learning rate, and be trained while the embedding matrix is frozen. They start as the rows of
            the matrix, or as a tensor (K, D) given here; its ids may be beyond the end of the matrix.
            `fold_compress_rows()` writes them into the matrix.

    Raises:
        ValueError, IndexError: ids outside the embedding matrix, an attention backend that cannot run, NaN weights, a
            `max_length` above the model's positions, a slow tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compress_token_ids: Ids,
        suffix_ids: Ids | None = None,
        bos_token_id: int | None = None,
        tokenizer: Any = None,
        instruction: str | None = None,
        max_length: int | None = None,
        prompts: Mapping[str, str] | None = None,
        attention: str = "auto",
        own_compress_rows: bool | Tensor = False,
    ):
        super().__init__()
        if tokenizer is not None:
            require_fast(tokenizer)
        require_loaded(model)
        require_unadapted_head(model)
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what accelerate shards one by one
        self.compress_token_ids = list(compress_token_ids)
        self.bos_token_id = bos_token_id
        self.tokenizer, self.instruction = tokenizer, instruction
        if suffix_ids is None:
            suffix_ids = [] if instruction is None else instruction_ids(tokenizer, instruction)
        self.suffix_ids = list(suffix_ids)
        self.prompts = dict(prompts or {})
        self.max_length = fit_length("max_length", max_length, max_positions(model))
        self.recipe: dict[str, Any] = {}  # what a saved folder says of its training besides
        self.centering: Centering | None = None  # of what `encode` gives; z knows nothing of it
        embedding = model.get_input_embeddings()
        self.original_base = True  # the weights under its adapters are those of the original model
        self.shared: Any = None  # with a Decoder (`Decoder.sharing`)
        self.sharded = False  # by whoever shards the model: then all processes make the same number of passes
        vocabulary, inside = len(embedding.weight), not isinstance(own_compress_rows, Tensor)
        check_ids("compress_token_ids", [self.compress_token_ids], vocabulary if inside else 1 << 31)
        if len(set(self.compress_token_ids)) < len(self.compress_token_ids):
            raise ValueError(f"compress_token_ids: got {self.compress_token_ids}, expected distinct ids")
        if self.suffix_ids:
            check_ids("suffix_ids", [self.suffix_ids], vocabulary)
        if bos_token_id is not None:
            check_ids("bos_token_id", [[bos_token_id]], vocabulary)
        require_finite(model)
        prepare_quantized(self)
        claim(model, self)
        self.compress_rows = None
        if own_compress_rows is not False:
            rows: Any = table_rows(embedding, self.compress_token_ids) if inside else own_compress_rows
            self.compress_rows = nn.Parameter(rows.detach().to(place_of_rows(embedding), copy=True))
        self.use_attention(attention)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        num_compress_tokens: int | None = None,
        compress_init: str | None = None,
        instruction: str | None = None,
        max_length: int | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: str | list[str] = "all-linear",
        adapter: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        attention: str = "auto",
        own_compress_rows: bool = False,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
    ) -> Encoder:
        """An encoder with its tokenizer, from a causal LM or from a model that this library has trained.

        Args:
            name_or_path: a hub id, a folder, a GGUF file, or a folder that `save_pretrained` or a training run wrote
                (`model/` or `export/`), which stores its own K, instruction and max_length as defaults.
            num_compress_tokens: K; by default 5. A model that has no compress tokens gets K of them.
            compress_init: text whose token embeddings the new compress tokens start from; by default " ,".
            instruction: text between the input and the compress tokens; by default "Keywords:".
            max_length: as in the constructor.
            lora_rank: above 0, train LoRA adapters and the compress tokens instead of all parameters (needs `peft`).
            lora_alpha, lora_targets: `lora_alpha` and `target_modules` of `peft.LoraConfig`.
            adapter: folder of a PEFT adapter that was trained on this model, to continue with.
            dtype: of the weights.
            device: of the weights; by default the CPU.
            attention, own_compress_rows: as in the constructor.
            gguf_file: the name of a GGUF file in `name_or_path`.
            trust_remote_code: run model code that a hub repository contains.

        Raises:
            CheckpointError: model or adapter cannot be loaded, or the model was trained with another K.
            ValueError: `lora_rank` together with `adapter`. And the errors of the constructor.
        """
        source, gguf_file = split_gguf(name_or_path, gguf_file)
        model, tokenizer, recipe = load_causal_lm(
            source, gguf_file=gguf_file, dtype=dtype, trust_remote_code=trust_remote_code
        )
        encoder = cls.from_model(
            model if device is None else model.to(device), tokenizer, recipe=recipe or original_of(source, gguf_file),
            num_compress_tokens=num_compress_tokens, compress_init=compress_init, instruction=instruction,
            max_length=max_length, lora_rank=lora_rank, lora_alpha=lora_alpha, lora_targets=lora_targets,
            adapter=adapter, attention=attention, own_compress_rows=own_compress_rows,
        )  # fmt: skip
        encoder.centering = read_centering(source, recipe)
        return encoder

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        recipe: Mapping[str, Any] | None = None,
        num_compress_tokens: int | None = None,
        compress_init: str | None = None,
        instruction: str | None = None,
        max_length: int | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: str | list[str] = "all-linear",
        lora_modules_to_save: list[str] | None = None,
        adapter: str | Path | None = None,
        attention: str = "auto",
        own_compress_rows: bool = False,
    ) -> Encoder:
        """Like `from_pretrained`, for a causal LM (or its base model) in memory, which is changed in place.

        Args:
            model, tokenizer, recipe: as `models.load_causal_lm` returns them.
            lora_modules_to_save: `modules_to_save` of `peft.LoraConfig`.

        The other arguments and errors are those of `from_pretrained`.
        """
        if lora_rank and adapter is not None:
            raise ValueError(f"lora_rank: got {lora_rank} together with an adapter, expected 0 or no adapter")
        recipe = dict(recipe or {})
        ids = list(recipe.get("compress_token_ids") or ())
        adapted = [] if adapter is None else adapter_token_ids(adapter)
        require_untrained(ids or adapted, compress_init)
        known = num_trained_tokens(ids, adapted, adapter, num_compress_tokens, own_compress_rows)
        rows: bool | Tensor = own_compress_rows
        if not ids:
            if own_compress_rows:  # the model stays as it is
                ids, rows = compress_embeddings(model, tokenizer, known, compress_init)
            else:
                ids = add_compress_tokens(model, tokenizer, known, compress_init)
        if adapted and sorted(adapted) != sorted(ids):
            raise CheckpointError(
                f"adapter: got one that trains the embeddings of {adapted}, expected those of the model's compress "
                f"tokens, {ids}; it belongs to another model"
            )
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.requires_grad_(False)  # the encoder never reads it
        wrapped: Any = model
        if adapter is not None:
            wrapped = load_adapter(model, adapter, compress_tokens=not own_compress_rows)
            if adapted and own_compress_rows:
                rows = adapter_rows(adapter)[[adapted.index(i) for i in ids]]
        elif lora_rank:
            wrapped = add_lora(
                model, None if own_compress_rows else ids, rank=lora_rank, alpha=lora_alpha, targets=lora_targets,
                modules_to_save=lora_modules_to_save,
            )  # fmt: skip
        suffix = None if instruction is not None else recipe.get("suffix_ids")
        if instruction is None and suffix is None:
            instruction = recipe.get("instruction", INSTRUCTION)
        encoder = cls(
            wrapped,
            compress_token_ids=ids,
            suffix_ids=suffix,
            bos_token_id=recipe.get("bos_token_id", tokenizer.bos_token_id),
            tokenizer=tokenizer,
            instruction=recipe.get("instruction") if instruction is None else instruction,
            max_length=recipe.get("max_length") if max_length is None else max_length,
            prompts=recipe.get("prompts"),
            attention=attention,
            own_compress_rows=rows,
        )
        encoder.recipe, encoder.original_base = recipe, own_compress_rows and not recipe.get("compress_token_ids")
        return encoder

    def save_pretrained(
        self,
        path: str | Path,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        card: Card | None = None,
    ) -> Path:
        """Writes a folder that `Encoder.from_pretrained` and `SentenceTransformer` read; see `export.export`.

        Raises:
            ValueError: this encoder has no tokenizer. And the other errors of `export.export`.
        """
        folder = Path(path).expanduser()
        return export(
            self, folder, max_length=max_length, dtype=dtype, overwrite=overwrite, card=card, centering=self.centering
        )

    def center(self, texts: Sequence[str], *, whiten: bool = False, **options: Any) -> Centering:
        """Makes `encode` and saved folders subtract the mean embedding of unlabelled texts, and optionally whiten.

        Raises:
            ValueError: fewer than two texts, or not more than D for whitening. And the errors of `encode`.
        """
        self.centering = None
        self.centering = Centering.fit(self.encode(texts, **options), whiten=whiten)
        return self.centering

    def use_attention(self, backend: str) -> None:
        """Sets `attention` anew, for a model that has moved to another device or dtype.

        Raises:
            ValueError: a backend that cannot run there.
        """
        self._verified_length = self.max_length
        self.attention = use_packed_attention(
            self.model, backend, embeds=self.compress_rows is not None, length=self.max_length
        )

    @property
    def num_compress_tokens(self) -> int:
        return len(self.compress_token_ids)

    @property
    def prompt(self) -> Prompt:
        """How texts become ids, for `data.compression_rows` and `data.alignment_rows`.

        Raises:
            ValueError: this encoder has no tokenizer or no instruction.
        """
        if self.tokenizer is None or self.instruction is None:
            name = "tokenizer" if self.tokenizer is None else "instruction"
            raise ValueError(f"{name}: got None, expected one: use from_pretrained, or give the constructor one")
        k, bos, before = self.num_compress_tokens, self.bos_token_id, self.prompts.get
        return Prompt(
            self.tokenizer, k, bos, self.instruction, self.max_length,
            query_instruction=before("query", ""), passage_instruction=before("document", ""),
        )  # fmt: skip

    def fit_max_length(self, length: int | None = None) -> int:
        """`length`, or by default the encoder's own `max_length`, checked against the model's positions.

        Raises:
            ValueError: `length` is more than the model's positions.
        """
        return fit_length("max_length", self.max_length if length is None else length, max_positions(self.model))

    def tokenize(
        self, texts: Sequence[str], *, instruction: str | None = None, max_length: int | None = None
    ) -> list[list[int]]:
        """The ids of each text, truncated so that bos, instruction and compress tokens fit beside them.

        Args:
            texts: n strings.
            instruction: the instruction that will follow the texts; by default the encoder's own.
            max_length: tokens of one text, including all that surrounds it; by default the encoder's own.

        Raises:
            ValueError: an encoder without tokenizer, a text without a token (the row is named), a `max_length` above
                the model's positions or without room for text.
            TypeError: not a list of strings.
        """
        ids, suffix = batch_token_ids(self.tokenizer, texts), self._suffix(instruction)
        whole = Prompt(self.tokenizer, self.num_compress_tokens, self.bos_token_id, "", self.fit_max_length(max_length))
        return [whole.text(text, suffix) for text in ids]

    def _suffix(self, instruction: str | None) -> list[int]:
        return self.suffix_ids if instruction is None else instruction_ids(self.tokenizer, instruction)

    @torch.no_grad()  # FSDP keeps what it gathers first, which must be no inference tensor
    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str | None = None,
        max_length: int | None = None,
        token_budget: int = 4096,
        shared: bool = False,
        prompt_name: str | None = None,
    ) -> Tensor:
        """The embedding normalize(mean_k z) of each text, centred if `centering` is set; no dropout, no gradient.

        Args:
            texts: n strings, tokenized as in training.
            instruction, max_length: as in `tokenize`.
            token_budget: tokens of one pass.
            shared: call this in all processes with the same texts; each embeds a part and gets all embeddings.
            prompt_name: "query" or "document", the entry of `prompts` to put before each text; by default none.

        Returns:
            (n, D) float32 on the CPU, in the order of `texts`.

        Raises:
            ValueError: no text, or an unknown `prompt_name`. And the errors of `tokenize`.
        """
        if prompt_name is not None:
            if prompt_name not in self.prompts:
                raise ValueError(f"prompt_name: got {prompt_name!r}, expected None or one of {sorted(self.prompts)}")
            batch_token_ids(self.tokenizer, texts)  # a prompt would hide an empty text
            texts = [self.prompts[prompt_name] + text for text in texts]
        ids = self.tokenize(texts, instruction=instruction, max_length=max_length)
        if not ids:
            raise ValueError("texts: got none, expected at least one")
        suffix = self._suffix(instruction)
        weight, training = self.model.get_input_embeddings().weight, self.training
        out = torch.zeros(len(ids), weight.shape[1])
        self.eval()
        try:
            microbatches = make_microbatches([len(s) for s in self.sequences(ids, [suffix] * len(ids))], token_budget)
            mine = distributed.shard_microbatches(microbatches) if shared else ((m, True) for m in microbatches)
            for microbatch, counts in mine:
                z = self([ids[i] for i in microbatch], [suffix] * len(microbatch))
                if counts:
                    out[microbatch] = text_embedding(z.float()).cpu()
        finally:
            self.train(training)
        out = distributed.all_reduce(out.to(weight.device)).cpu() if shared else out
        return out if self.centering is None else self.centering(out)

    def fold_compress_rows(self) -> None:
        """Writes `compress_rows` into the model's embedding matrix, which grows where it has to; a no-op without."""
        if self.shared is not None:
            raise ValueError("model: got one that a Decoder shares, expected a copy (save_pretrained makes one)")
        if self.compress_rows is not None:
            write_compress_rows(self.model, self.compress_token_ids, self.compress_rows)

    @torch.no_grad()
    def init_output_rms(
        self, rms: Tensor, ids: Sequence[Ids], suffix_ids: Sequence[Ids] | None = None, token_budget: int | None = None
    ) -> None:
        """Scales the model's final norm so that each dimension of z has a given RMS over some texts.

        A few dimensions of an LM's last hidden states are ten times the others, so a decoder cannot read such a z.

        Args:
            rms: (D,) of the decoder's input embeddings (`Decoder.input_rms_per_dimension`).
            ids, suffix_ids, token_budget: as in `forward`; a hundred texts are plenty.
        """
        z = self(ids, suffix_ids, token_budget).double()
        gain = rms.double() / z.square().mean((0, 1)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        if self.shared is not None:
            self.shared.require_own(final_norm(self.model), "a final norm")
        scale_output(final_norm(distributed.reshard(self).model), gain)

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
        self, ids: Sequence[Ids] | Packed, suffix_ids: Sequence[Ids] | None = None, token_budget: int | None = None
    ) -> Tensor:
        """Encodes B texts in one packed pass, or in several passes that fit into memory.

        If the batch exceeds `token_budget`, memory holds only z and the activations of one pass: the forward keeps no
        graph, and the backward repeats the forward of each pass with the same dropout. For any loss, the gradient
        equals that of a single pass. The cost is one more forward.

        Args:
            ids: B texts as token ids, without bos, suffix or compress tokens; or a pack of `sequences`, unchecked.
            suffix_ids: B suffixes that replace the default one.
            token_budget: tokens of one pass, including suffix and compress tokens; a longer text gets a pass of its
                own. None: one pass.

        Returns:
            z (B, K, D) in the model's dtype.

        Raises:
            ValueError: no text, an empty text, a text longer than the model's positions or than what the model reads
                correctly in a pack, or a budget below 1.
            IndexError: an id outside the embedding matrix.

        Source: gradient caching, Gao et al., arXiv 2101.06983.
        """
        if isinstance(ids, Packed):
            return self._run(ids.ids, ids)
        weight = self.model.get_input_embeddings().weight
        check_ids("ids", ids, len(weight))
        if len(ids) == 0:
            raise ValueError("ids: got no text, expected at least one")
        if suffix_ids is not None:  # each may be empty
            check_ids("suffix_ids", [[*suffix, 0] for suffix in suffix_ids], len(weight))
        sequences = self.sequences(ids, suffix_ids)
        limit, longest = max_positions(self.model), max(map(len, sequences))
        if limit is not None and longest > limit:
            raise ValueError(
                f"ids: got a text of {longest} tokens with its suffix and compress tokens, expected "
                f"{limit} (the model's positions); truncate the text"
            )
        self._verified_length = verify_length(
            self.model, longest, self._verified_length, embeds=self.compress_rows is not None, sharded=self.sharded
        )
        microbatches = make_microbatches([len(s) for s in sequences], token_budget)
        if self.sharded and token_budget is not None:
            microbatches = distributed.equalize_microbatches(microbatches, weight.device)
        if len(microbatches) == 1:  # not by `forward` again: the autocast that accelerate puts around it cannot nest
            return self._run((packed := pack(sequences, weight.device)).ids, packed)
        z = []
        for microbatch in microbatches:
            packed = pack([sequences[i] for i in microbatch], weight.device)
            z.append(checkpoint(self._run, packed.ids, packed, use_reentrant=False))
        return torch.cat(z)[order_of(microbatches, weight.device)]

    def _run(self, ids: Tensor, packed: Packed) -> Tensor:
        """z (B, K, D) of one pack; `ids` are its own, since `checkpoint` keeps the random state by tensor arguments."""
        if self.compress_rows is None:
            hidden = run_packed(base_model(self.model), packed, input_ids=ids[None])
        else:
            x = embed_compress_rows(self.model, ids, packed.cu_seqlens, self.compress_rows)
            hidden = run_packed(base_model(self.model), packed, inputs_embeds=x[None])
        return pool_last_k(hidden, packed.cu_seqlens, self.num_compress_tokens, packed.unsort_index)
