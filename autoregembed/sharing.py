"""One copy of frozen weights for two models: the encoder's with its adapters, the decoder's without.

PEFT switches adapters off by a flag on the modules. What recomputes activations in the backward would then see the flag
of that moment and not that of its forward. So the decoder gets modules of its own over the same parameters: they know
no adapter in forward, backward or recomputation, are compiled by themselves, and keep their own mode and attention.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autoregembed.adapters import tuner_layers


class SharedBase:
    """The causal LM under the adapters of an encoder's model: `model` has the same parameters, and no adapter.

    Raises:
        ValueError: no such model can be made; the message says why.
    """

    def __init__(self, encoder: Any):
        wrapped = encoder.model
        if not hasattr(wrapped, "get_base_model") or not tuner_layers(wrapped):
            raise ValueError(
                f"encoder: got a model of type {type(wrapped).__name__} without adapters, expected a PeftModel, whose "
                "base stays as it is (lora_rank, adapter): what trains all weights needs a decoder of its own "
                "(Decoder.from_pretrained)"
            )
        if not encoder.original_base:
            raise ValueError(
                "encoder: got adapters on weights that are not the original model's (those of a trained encoder, or "
                "with compress tokens in the embedding matrix), expected own_compress_rows=True, and the original "
                "model, with adapter= to go on"
            )
        self._layers = tuner_layers(wrapped)
        self.require_unmerged()
        self.model = without_adapters(wrapped)
        self.require_frozen()
        there = {id(p): (m, name) for m in wrapped.modules() for name, p in m.named_parameters(recurse=False)}
        # Where each parameter is, as (module, name) of the decoder and of the encoder: sharding replaces parameters.
        self.places = {
            (m, name): there[id(p)] for m in self.model.modules() for name, p in m.named_parameters(recurse=False)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of an encoder or decoder has weights of its own."""

    def require_own(self, module: nn.Module, what: str) -> None:
        """Raises ValueError for a module whose parameters the decoder reads."""
        shared = {id(p) for p in self.model.parameters()}
        if any(id(p) in shared for p in module.parameters()):
            raise ValueError(f"model: got {what} that encoder and decoder share, expected one in modules_to_save")

    def require_unmerged(self) -> None:
        """Raises ValueError where adapters have been merged into the shared weights."""
        if any(layer.merged for layer in self._layers):
            raise ValueError(
                "model: got adapters merged into weights that encoder and decoder share, expected unmerged ones: call "
                "unmerge_adapter(), and merge a copy (Encoder.save_pretrained does)"
            )

    def require_frozen(self) -> None:
        """Raises ValueError naming a shared parameter that trains."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                raise ValueError(
                    f"model: got {name} trained, which encoder and decoder share, expected adapters alone to train: "
                    "freeze it, or give the decoder a model of its own (Decoder.from_pretrained)"
                )


def without_adapters(model: Any) -> Any:
    """The causal LM under a PeftModel, as modules of its own over the same parameters."""
    from peft.utils import ModulesToSaveWrapper

    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():  # bitsandbytes' tables of a 4-bit weight lie beside it
        if (state := vars(module).get("quant_state")) is not None:
            memo[id(state)] = state
    twin = copy.deepcopy(model, memo)
    for name, module in list(twin.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # `unload` would take the trained copy
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, module.original_module)
    return twin.unload().eval()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind some tensors, each storage once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def cast_parameters(model: nn.Module, dtype: torch.dtype, *, trained: bool = False) -> None:
    """Casts the floating parameters of a model in place, for all that share them: the frozen or the trained ones.

    Buffers stay as they are: `model.to(dtype)` would round the frequencies of a rope as well.
    """
    for parameter in model.parameters():
        if parameter.requires_grad is trained and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
