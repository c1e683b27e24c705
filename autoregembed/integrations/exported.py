"""An exported model in sentence-transformers: its compress tokens, pooling and tokenizer, and a loss that reads z."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoregembed.decoder import Decoder
from autoregembed.export import COMPRESS_TOKENS
from autoregembed.integrations.defaults import default_decoder
from autoregembed.model_card import CITATION
from autoregembed.models import read_recipe


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
class Template:
    """What the tokenizer of an exported model writes around a text."""

    head: int  # tokens before it
    tail: list[int]  # ids behind it, the compress tokens last
    num_compress_tokens: int

    @classmethod
    def of(cls, model: SentenceTransformer) -> Template:
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


def freeze_pooling(model: nn.Module) -> None:
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


class DecoderLoss(nn.Module):
    """What both stages share: z and targets out of sentence features, and a decoder that stays as it is."""

    def __init__(self, model: SentenceTransformer, decoder: Decoder | None, max_target_length: int | None):
        super().__init__()
        if not isinstance(decoder, Decoder | None):
            raise TypeError(f"decoder: got {type(decoder).__name__}, expected autoregembed.Decoder")
        self.model = model
        self._template = Template.of(model)
        if decoder is None:
            lm = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
            first = model.tokenizer("a")["input_ids"][0] if self._template.head else None
            decoder = default_decoder(
                read_recipe(lm.name_or_path), lm.name_or_path, bos_token_id=first, dtype=lm.dtype, device=lm.device
            )
        freeze_pooling(model)
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
