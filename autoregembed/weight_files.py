"""The weights of a model on disk: rows of them for the process that needs them, from safetensors files.

What has to be converted on the way (GGUF, experts that a model keeps in one tensor) is read whole, by process 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autoregembed import distributed
from autoregembed.files import CheckpointError, write_safetensors

_PLAIN = {"F64", "F32", "F16", "BF16"}


class WeightFiles:
    """Tensors in safetensors files.

    Args:
        files: the file of each tensor.
    """

    def __init__(self, files: dict[str, Path]):
        self.files = files
        self.kinds: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in dict.fromkeys(files.values()):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    self.kinds[key] = tuple(part.get_shape()), part.get_dtype()

    @classmethod
    def of(cls, path: Path) -> WeightFiles:
        """The tensors of one file."""
        with safe_open(path, framework="pt") as file:
            return cls(dict.fromkeys(file.keys(), path))

    def __deepcopy__(self, memo: Any) -> WeightFiles:
        return self

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor. The file is opened anew: what has been read of it counts as memory so long."""
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_slice(key)[start:stop].clone()

    def whole(self, key: str, like: Tensor) -> Tensor:
        """A whole tensor, for small ones."""
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key).to(like.dtype, copy=True)

    def shard(self, key: str, like: Any, device: torch.device, block: int = 1 << 25) -> Tensor:
        """This process's shard of a tensor, in the layout of the DTensor `like`; all of it where `like` is none.

        Args:
            block: bytes in float32 that are read at a time.
        """
        if not hasattr(like, "placements"):
            return self.whole(key, like)
        local = torch.empty(like.to_local().shape, dtype=like.dtype, device=device)
        first = _first_row(like)
        size = max(1, block // (4 * max(1, local[:1].numel())))
        for start in range(0, len(local), size):
            stop = min(start + size, len(local))
            local[start:stop].copy_(self.rows(key, first + start, first + stop))
        return _with_layout(local, like)


class WholeWeights:
    """A model that process 0 holds whole, until `close`; the others get their rows from it, one tensor at a time."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors  # none in the other processes

    def __deepcopy__(self, memo: Any) -> WholeWeights:
        return self

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor, in process 0."""
        return self.tensors[key][start:stop]

    def whole(self, key: str, like: Tensor) -> Tensor:
        """A whole tensor, from process 0."""
        return distributed.broadcast_from_rank0(lambda: self.tensors[key].to(like.dtype))

    def shard(self, key: str, like: Any, device: torch.device, block: int) -> Tensor:
        """This process's shard of a tensor, in the layout of the DTensor `like`; `block` is not used."""
        from torch.distributed.tensor import distribute_tensor

        given = self.tensors.get(key)  # None in the others
        whole = torch.empty(like.shape, dtype=like.dtype, device=like.device_mesh.device_type)
        if given is not None:
            whole.copy_(given)
        found: Any = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=0)
        return _with_layout(found.to_local().to(device, copy=True), like)

    def close(self) -> None:
        self.tensors.clear()


def together(write: Callable[[Iterator[Tensor]], None], parts: Iterator[Tensor]) -> None:
    """write(parts) in process 0, while the others run through `parts`, which sends; all raise what it raises."""
    error = None
    if distributed.rank() == 0:
        try:
            write(parts)
        except Exception as raised:
            error = raised
    for _ in parts:
        pass

    def finish() -> None:
        if error is not None:
            raise error

    distributed.broadcast_from_rank0(finish)


def save_tensors(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, whole or sharded, to a safetensors file in process 0, shard after shard.

    Where one is sharded all processes call it.

    Args:
        path: None in the other processes.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    kinds = {name: (tensors[name].dtype, tensors[name].shape) for name in order}
    parts = (piece for name in order for piece in distributed.pieces(tensors[name]))

    def write(parts: Iterator[Tensor]) -> None:
        assert path is not None
        write_safetensors(path, kinds, parts)

    if any(hasattr(tensor, "placements") for tensor in tensors.values()):
        together(write, parts)
    else:
        write(parts)


def _first_row(like: Any) -> int:
    """The first row of this process's shard."""
    for dim, placement in enumerate(like.placements):
        if placement.is_shard():
            if placement.dim != 0:
                raise ValueError(f"weights: got shards along dimension {placement.dim}, expected 0")
            size = -(-like.shape[0] // like.device_mesh.size(dim))
            return min(size * like.device_mesh.get_local_rank(dim), like.shape[0])
    return 0


def _with_layout(local: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def find_weights(
    model: Any, source: str, gguf: bool, read: Callable[[], Any]
) -> tuple[WeightFiles | WholeWeights, dict[str, str]]:
    """The weights of an empty model, and the key of each parameter and persistent buffer by its name in the model.

    Args:
        read: loads the model whole; for process 0.
    """
    reason: str | None = "they are a GGUF file"
    files, keys = None, dict[str, str]()
    if not gguf:
        files = _files_of(source)
        reason, keys = ("they are no safetensors files", {}) if files is None else _match(model, files)
    if files is not None and reason is None:
        return files, keys
    # All processes have looked at the same files, so all are here.
    names = [name for name, _ in _entries(model)]
    found = distributed.broadcast_from_rank0(lambda: _Unsent(read()))
    tensors = {} if found.model is None else dict(found.model.state_dict())
    if distributed.rank() == 0:
        print(f"model: the weights of {source} are read whole by process 0, since {reason}")
    tied = model.all_tied_weights_keys
    return WholeWeights(tensors), {name: tied.get(name, name) for name in names}


class _Unsent:
    """A model that stays in its process."""

    def __init__(self, model: Any = None):
        self.model = model

    def __reduce__(self) -> Any:
        return _Unsent, ()


def _entries(model: Any) -> list[tuple[str, Tensor]]:
    return list(model.state_dict(keep_vars=True).items())


def _files_of(source: str) -> WeightFiles | None:
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    missing = {
        "_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }  # fmt: skip
    single = cached_file(source, SAFE_WEIGHTS_NAME, **missing)
    if single is not None:
        return WeightFiles.of(Path(single))
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **missing)
    if index is None:
        return None
    places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    paths = {name: Path(cached_file(source, name)) for name in sorted(set(places.values()))}
    return WeightFiles({key: paths[name] for key, name in places.items()})


def _match(model: Any, files: WeightFiles) -> tuple[str | None, dict[str, str]]:
    """Why the files cannot be read by rows, or None; and the key of every entry of the model's state dict."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    renamings = get_model_conversion_mapping(model)
    if any(isinstance(renaming, WeightConverter) for renaming in renamings):
        return f"Transformers converts those of a {type(model).__name__}", {}
    entries = _entries(model)
    same: dict[int, list[str]] = {}
    for name, tensor in entries:
        same.setdefault(id(tensor), []).append(name)
    known = dict(entries)
    found = {rename_source_key(key, renamings, [], model.base_model_prefix, known)[0]: key for key in files.kinds}
    keys = {}
    for name, tensor in entries:
        key = next((found[alias] for alias in same[id(tensor)] if alias in found), None)
        if key is None and isinstance(tensor, torch.nn.Parameter):
            return f"they have no {name}", {}
        if key is None:  # a buffer that is made anew
            continue
        shape, kind = files.kinds[key]
        if shape != tuple(tensor.shape):
            return f"their {key} has shape {shape}, and the model's {tuple(tensor.shape)}", {}
        if tensor.is_floating_point() and kind not in _PLAIN:
            raise CheckpointError(
                f"model: got {key} of type {kind} in {str(files.files[key])!r}, expected one of {sorted(_PLAIN)} under "
                "FSDP2, whose shards are read by rows"
            )
        keys[name] = key
    return None, keys
