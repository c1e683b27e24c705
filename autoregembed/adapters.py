"""PEFT adapters of an encoder: added, loaded to go on, saved with the embeddings of the compress tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoregembed import loading
from autoregembed.files import CheckpointError, write_json
from autoregembed.models import module_name, wrap_load_errors

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name for trained rows of an embedding matrix


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has wrapped in `model`."""
    return [m for m in model.modules() if any(cls.__name__ == "BaseTunerLayer" for cls in type(m).__mro__)]


def add_lora(
    model: Any,
    compress_token_ids: list[int] | None,
    *,
    rank: int,
    alpha: float = 16.0,
    targets: str | list[str] = "all-linear",
    modules_to_save: list[str] | None = None,
) -> Any:
    """A PeftModel around `model` whose LoRA adapters train, and the rows of `compress_token_ids` with them.

    Args:
        compress_token_ids: None where the rows are trained elsewhere.
        rank, alpha, targets, modules_to_save: `r`, `lora_alpha`, `target_modules` and `modules_to_save` of
            `peft.LoraConfig`.
    """
    from peft import LoraConfig, get_peft_model

    embedding = module_name(model, model.get_input_embeddings())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        trainable_token_indices=None if compress_token_ids is None else {embedding: compress_token_ids},
        modules_to_save=modules_to_save,
    )
    with loading.hollow(model):
        return get_peft_model(model, config)


def load_adapter(model: Any, folder: str | Path, *, compress_tokens: bool = True) -> Any:
    """A PeftModel around `model` that goes on training the adapter in `folder`.

    Args:
        compress_tokens: with the embeddings that it has for them; False leaves them out (`adapter_rows` has them).

    Raises:
        CheckpointError: the adapter cannot be loaded, is a pickle, or does not fit the model.
    """
    from peft import PeftModel

    config = adapter_config(folder)
    if not compress_tokens:
        config.trainable_token_indices = None
    with wrap_load_errors(str(folder), "adapter"), loading.hollow(model):
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)


def adapter_config(folder: str | Path) -> Any:
    """PEFT's configuration of the adapter in `folder`.

    Raises:
        CheckpointError: `folder` holds no adapter.
    """
    from peft import PeftConfig

    if not (Path(folder) / _WEIGHTS).is_file():  # PEFT would read a pickle in its place
        raise CheckpointError(f"adapter: got {str(folder)!r}, expected a folder with adapter_model.safetensors")
    with wrap_load_errors(str(folder), "adapter"):
        return PeftConfig.from_pretrained(str(folder))


def adapter_token_ids(folder: str | Path) -> list[int]:
    """The rows of the embedding matrix that the adapter in `folder` has trained.

    Raises:
        CheckpointError: `folder` holds no adapter.
    """
    rows = getattr(adapter_config(folder), "trainable_token_indices", None) or []
    return [i for ids in rows.values() for i in ids] if isinstance(rows, dict) else list(rows)


def adapter_rows(folder: str | Path) -> Tensor:
    """The trained embeddings (K, D) of `adapter_token_ids`, in their order.

    Raises:
        CheckpointError: the adapter has none.
    """
    with wrap_load_errors(str(folder), "adapter"):
        found = [rows for name, rows in load_file(Path(folder) / _WEIGHTS).items() if name.endswith(_ROWS)]
    if len(found) != 1:
        raise CheckpointError(f"adapter: got {len(found)} tables of token embeddings in {str(folder)!r}, expected one")
    return found[0]


def save_adapter(encoder: Any, folder: Path) -> None:
    """Writes the encoder's adapter as PEFT does, its compress rows as PEFT's trained tokens, into a folder.

    Raises:
        ValueError: the encoder has compress rows of its own, and an adapter in its embedding matrix besides: PEFT
            cannot have both.
    """
    model = encoder.model
    model.save_pretrained(folder, save_embedding_layers=False)  # the K rows alone are trained in it
    if encoder.compress_rows is None:
        return
    name = embedding_name(model)
    weights = load_file(folder / _WEIGHTS)
    weights[f"base_model.model.{name}.{_ROWS}"] = encoder.compress_rows.detach().cpu().contiguous()
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    write_json(folder / _CONFIG, {**config, "trainable_token_indices": {name: encoder.compress_token_ids}})


def copy_adapter(source: Any, target: Any) -> None:
    """Gives a PeftModel the trained weights of another one with the same adapter, on a base of another dtype."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    set_peft_model_state_dict(target, get_peft_model_state_dict(source, save_embedding_layers=False))


def embedding_name(model: Any) -> str:
    """The name of the embedding matrix' module in the model under a PeftModel.

    Raises:
        ValueError: there is an adapter in it, or a copy that trains.
    """
    base = model.get_base_model()
    name = module_name(base, base.get_input_embeddings())
    module = base.get_submodule(name)
    if tuner_layers(module) or hasattr(module, "modules_to_save"):
        raise ValueError(
            f"model: got an adapter in {name}, the embedding matrix, whose rows for the compress tokens train by "
            "themselves, expected adapters in the layers: leave it out of target_modules (lora_targets)"
        )
    return name


def num_trained_tokens(
    ids: list[int], adapted: list[int], adapter: str | Path | None, wanted: int | None, own_rows: bool
) -> int:
    """K as the model (`ids`) or else its adapter (`adapted`) was trained with, or as `wanted`, or 5 where nobody says.

    Raises:
        CheckpointError: an adapter without compress tokens for a model without any, or another number than `wanted`.
    """
    known = len(ids or adapted)
    if adapter is not None and not known and not own_rows:
        raise CheckpointError(
            f"adapter: got {str(adapter)!r}, which has no compress tokens, for a model without any; expected the "
            "model that it was trained on, or own_compress_rows=True"
        )
    if known and wanted not in (None, known):
        raise CheckpointError(
            f"num_compress_tokens: got {wanted}, expected {known}, the number that the "
            f"{'model' if ids else 'adapter'} was trained with"
        )
    return known or (5 if wanted is None else wanted)
