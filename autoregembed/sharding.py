"""Shards of the decoder's weights: its own, by FSDP2, or the encoder's, whose base it shares."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from autoregembed.distributed import to_full_tensor
from autoregembed.models import base_model


def shard_frozen(model: Any, device: torch.device) -> None:
    """Shards the weights of a causal LM over the processes of the run; a pass gathers them layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    base = base_model(model)
    readers = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {module.weight for module in readers}  # one, where they are tied
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in base.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(base, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
    shards = {
        w: nn.Parameter(distribute_tensor(w.detach(), mesh, [Shard(0)], src_data_rank=None), False) for w in tables
    }
    for module in readers:
        module.weight = shards[module.weight]


def gather_shared(model: Any, places: dict[tuple[nn.Module, str], tuple[nn.Module, str]], device: torch.device) -> None:
    """Lets a causal LM read an encoder's shards; a pass gathers them layer by layer, and its backward once more.

    FSDP2 gathers for the modules that it has wrapped, which are the encoder's. Embedding matrix and head stay shards:
    the ops gather them.

    Args:
        places: where each parameter is, as (module, name), in `model` and in the encoder, whose are DTensors.
    """
    base = base_model(model)
    for (module, name), (there, key) in places.items():
        setattr(module, name, getattr(there, key))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    left = {place for place in places if place[0] not in (model.get_input_embeddings(), model.get_output_embeddings())}
    for part in [*(m for m in base.modules() if type(m).__name__ in layers), base]:
        inside = set(part.modules())
        own = [place for place in places if place in left and place[0] in inside]
        left -= set(own)
        _gather_in_forward(part, own)


def _whole(shard: Any, dtype: torch.dtype) -> Tensor:
    return to_full_tensor(shard.detach().to(dtype)).contiguous()


def _gather_in_forward(module: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
    """Inside the forward of `module` the parameters at `places` are whole; for the backward they are gathered anew."""
    forward = module.forward

    @functools.wraps(forward)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        shards = {place: getattr(*place) for place in places}
        held: dict[int, tuple[Any, torch.dtype]] = {}  # by the storage of the whole tensor

        def pack(x: Tensor) -> Any:
            found = held.get(x.untyped_storage().data_ptr())
            return x if found is None else (*found, x.size(), x.stride(), x.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            shard, dtype, size, stride, offset = packed
            return _whole(shard, dtype).as_strided(size, stride, offset)

        try:
            for (owner, name), shard in shards.items():
                dtype = shard.dtype
                if shard.ndim > 1 and torch.is_autocast_enabled(shard.device.type):  # a cast copy would be kept whole
                    dtype = torch.get_autocast_dtype(shard.device.type)
                whole = _whole(shard, dtype)
                held[whole.untyped_storage().data_ptr()] = shard, dtype
                owner.register_parameter(name, nn.Parameter(whole, requires_grad=False))
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*args, **kwargs)
        finally:
            for (owner, name), shard in shards.items():
                owner.register_parameter(name, shard)

    module.forward = gathered
