"""What a run leaves: its adapter, `model/` to go on from, and `export/`, from whole weights or from shards.

Sharded weights go to the disk tensor by tensor: process 0 has one of them at a time, and no model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from autoregembed import distributed
from autoregembed.adapters import tuner_layers
from autoregembed.build import on_plain_weights
from autoregembed.config import Config
from autoregembed.encoder import Encoder
from autoregembed.export import EXPORT_DTYPES, merged, name_compress_tokens, require_representable
from autoregembed.files import atomic_folder, read_json, write_json, write_safetensors
from autoregembed.loading import stand_in
from autoregembed.lora_base import write_adapter
from autoregembed.model_card import Card
from autoregembed.models import base_model, save_model, write_compress_rows
from autoregembed.weight_files import together

FILE_BYTES = 5 * 10**9  # of one safetensors file of a model


def hull_of(encoder: Encoder) -> Encoder | None:
    """In process 0 a copy of an encoder whose weights have not come yet: they never come to the copy."""
    if distributed.rank() > 0:
        return None
    return copy.deepcopy(encoder, {id(encoder.tokenizer): encoder.tokenizer})


class Results:
    """Writes the results of a run; all processes call each method.

    Args:
        encoder: whole, or sharded.
        hull: `hull_of` a sharded encoder, in process 0.
    """

    def __init__(self, config: Config, encoder: Encoder, tokenizer: Any, sharded: bool, hull: Encoder | None = None):
        self.config = config
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.sharded = sharded
        self.hull = hull

    def write(self, out: Path, card: Card) -> None:
        """`adapter/`, where there is one, `model/` and `export/`, with `card` as its README."""
        plain = shards = None
        if self.sharded:
            shards = _Shards(self.encoder, self.hull, self.config.lora_rank > 0)
        else:
            plain = on_plain_weights(self.config, self.encoder)
        self._write_model(out, plain, shards)
        self._export(out / "export", plain, shards, card)

    def _write_model(self, out: Path, plain: Encoder | None, shards: _Shards | None) -> None:
        config, recipe = self.config, self.encoder.recipe

        def write_small() -> Path | None:
            return write_adapter(config, plain or self.hull, out / "adapter") if config.lora_rank else None

        adapter = distributed.broadcast_from_rank0(write_small)
        inside = adapter if recipe["adapter"] else None  # on the original model: a next stage may share it
        if shards is None:
            assert plain is not None
            distributed.broadcast_from_rank0(
                lambda: save_model(out / "model", merged(plain), self.tokenizer, recipe, adapter=inside)
            )
            return
        with _folder(out / "model") as folder:
            distributed.broadcast_from_rank0(
                lambda: save_model(folder / "model", shards.model, self.tokenizer, recipe, adapter=inside, empty=True)
            )
            shards.write(folder / "model", shards.model)
            distributed.broadcast_from_rank0(lambda: _move_up(folder / "model"))

    def _export(self, folder: Path, plain: Encoder | None, shards: _Shards | None, card: Card) -> None:
        """A folder as `export.export` writes it.

        Where weights are sharded, that runs on a small model of the same kind: all but the weights is compared there.
        """
        dtype = EXPORT_DTYPES.get(self.config.export_dtype)
        if shards is None:
            assert plain is not None
            distributed.broadcast_from_rank0(
                lambda: plain.save_pretrained(folder, dtype=dtype, overwrite=True, card=card)
            )
            return
        with _folder(folder) as temporary:
            inner = temporary / folder.name

            def write_all_but_weights() -> None:
                small = self._small()
                small.save_pretrained(inner, dtype=dtype, card=card)
                for path in inner.glob("*.safetensors"):
                    path.unlink()
                config = base_model(shards.model).config.to_dict()
                layers = config["num_hidden_layers"]
                deep = {n: v for n, v in config.items() if isinstance(v, list) and len(v) == layers}
                written = read_json(inner / "config.json", "folder")
                write_json(inner / "config.json", {**written, **deep, "num_hidden_layers": layers})

            distributed.broadcast_from_rank0(write_all_but_weights)
            shards.write(inner, shards.model and base_model(shards.model), dtype)
            distributed.broadcast_from_rank0(lambda: _move_up(inner))

    def _small(self) -> Encoder:
        """An encoder like the one trained, around a small model of the same kind."""
        encoder = self.encoder
        assert self.hull is not None
        assert self.hull.compress_rows is not None
        wrapped: Any = self.hull.model
        small = Encoder(
            stand_in(wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped),
            compress_token_ids=encoder.compress_token_ids, suffix_ids=encoder.suffix_ids, tokenizer=encoder.tokenizer,
            bos_token_id=encoder.bos_token_id, instruction=encoder.instruction, max_length=encoder.max_length,
            prompts=encoder.prompts, attention="sdpa",
            own_compress_rows=self.hull.get_parameter("compress_rows").detach().float(),
        )  # fmt: skip
        small.recipe = encoder.recipe
        return small


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """A temporary folder of process 0, known to all, that becomes `folder`."""
    with contextlib.ExitStack() as held:
        yield distributed.broadcast_from_rank0(lambda: held.enter_context(atomic_folder(folder, overwrite=True)))
        distributed.broadcast_from_rank0(held.close)


def _move_up(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(folder.parent / path.name)
    folder.rmdir()


class _Shards:
    """The weights of a sharded encoder, with adapters merged and compress rows in the embedding matrix.

    `model` is the causal LM to be saved, in process 0, without values.
    """

    def __init__(self, encoder: Encoder, hull: Encoder | None, adapted: bool):
        self.parameters = dict(encoder.named_parameters())
        self.hull = hull
        self.model: Any = None
        self.sources: dict[int, str] = {}  # the name in the encoder, by the parameter in `model`
        small = [n for n, p in encoder.named_parameters() if (adapted and p.requires_grad) or n == "compress_rows"]
        values = {name: [*distributed.pieces(self.parameters[name])] for name in small}
        if hull is None:
            return
        hull.recipe = encoder.recipe
        for name, parts in values.items():
            owner, _, last = name.rpartition(".")
            parameter = hull.get_parameter(name)
            hull.get_submodule(owner)._parameters[last] = nn.Parameter(torch.cat(parts), parameter.requires_grad)
        copied: Any = copy.deepcopy(hull, {id(hull.tokenizer): hull.tokenizer})
        self.sources = {id(p): name for name, p in copied.named_parameters()}
        self.kept = copied  # an id is that of one parameter as long as it lives
        if tuner_layers(copied.model):
            copied.model = copied.model.unload()
        self.model = copied.model
        self.adapted = adapted
        names = {name: self.sources[id(p)] for name, p in self.model.named_parameters()}
        write_compress_rows(self.model, hull.compress_token_ids, hull.get_parameter("compress_rows"))
        self.sources = {id(p): names[name] for name, p in self.model.named_parameters()}
        for parameter in self.model.parameters() if adapted else ():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        name_compress_tokens(self.model.config, None, None)

    def write(self, folder: Path, model: Any, dtype: torch.dtype | None = None) -> None:
        """Writes the weights of `model`, which is `self.model` or its base model, into a folder that exists."""
        entries: dict[str, Tensor] = {}
        if model is not None:
            tied: set[int] = set()
            for name, tensor in model.state_dict(keep_vars=True).items():
                if id(tensor) not in tied:
                    entries[name] = tensor
                tied.add(id(tensor))
        kinds = {name: (dtype or tensor.dtype, tensor.shape) for name, tensor in entries.items()}
        # The sizes of elements do not grow within a file.
        names = sorted(entries, key=lambda name: -kinds[name][0].itemsize)
        order = [(name, self.sources.get(id(entries[name]))) for name in names]
        order = distributed.broadcast_from_rank0(lambda: order)

        def values() -> Iterator[Tensor]:
            for name, source in order:
                parts = [] if source is None else [*distributed.pieces(self.parameters[source])]
                if self.hull is None:
                    continue
                value = entries[name] if source is None else self._value(source, torch.cat(parts), entries[name].shape)
                if dtype is not None:
                    value = require_representable(name, value, dtype)
                yield value
                del parts, value

        together(lambda parts: _write_files(folder, {name: kinds[name] for name in names}, parts), values())

    def _value(self, source: str, whole: Tensor, shape: torch.Size) -> Tensor:
        """A weight as it is saved, on the CPU."""
        assert self.hull is not None
        value = whole.to(torch.promote_types(whole.dtype, torch.float32)) if self.adapted else whole  # as `merged` does
        owner, _, last = source.rpartition(".base_layer.")
        if last == "weight":
            layer: Any = self.hull.get_submodule(owner)
            empty, layer.base_layer.weight = layer.base_layer.weight, nn.Parameter(value, requires_grad=False)
            layer.merge()
            value, layer.base_layer.weight = layer.base_layer.weight.detach(), empty
            layer.merged_adapters.clear()
        embedding: Any = self.hull.model.get_input_embeddings()
        if self.hull.get_parameter(source) is embedding.weight:
            value = torch.cat([value, value.new_zeros(shape[0] - len(value), *shape[1:])])
            value[self.hull.compress_token_ids] = self.hull.get_parameter("compress_rows").detach().to(value)
        elif len(value) < shape[0]:  # rows of a head for the compress tokens, which nothing reads
            value = torch.cat([value, value.new_zeros(shape[0] - len(value), *shape[1:])])
        return value


def _write_files(folder: Path, kinds: dict[str, tuple[torch.dtype, Any]], values: Iterator[Tensor]) -> None:
    """One safetensors file, or several with their index, as Transformers names them."""
    files: list[dict[str, Any]] = [{}]
    size = 0
    for name, (dtype, shape) in kinds.items():
        more = shape.numel() * dtype.itemsize
        if files[-1] and size + more > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = dtype, shape
        size += more
    names = [SAFE_WEIGHTS_NAME]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        total = sum(shape.numel() * dtype.itemsize for dtype, shape in kinds.values())
        places = {key: name for name, some in zip(names, files, strict=True) for key in some}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})
    for name, some in zip(names, files, strict=True):
        write_safetensors(folder / name, some, islice(values, len(some)))
