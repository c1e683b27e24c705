"""Shards of the weights: the encoder's by accelerate, the decoder's by FSDP2 or as the encoder's, whose base it shares.

Models that `loading.in_parts` has built hold no value before they are sharded. Then each process reads its own rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from autoregembed import distributed
from autoregembed.distributed import to_full_tensor
from autoregembed.files import tensor_fingerprint
from autoregembed.heads import require_linear_head, require_plain_embedding
from autoregembed.loading import fill, forget, stand_in
from autoregembed.models import base_model
from autoregembed.probe import allow_shared_prefixes, use_packed_attention


def shard_models(accelerator: Any, encoder: Any, decoder: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Shards encoder and decoder, which `loading.in_parts` has built, and reads their weights.

    Args:
        optimizer: of `encoder.compress_rows`, the one parameter that has a value (`build.placeholder_optimizer`).

    Returns:
        What accelerate makes of encoder and optimizer.

    Raises:
        ValueError: a model that Encoder or Decoder would not take, or a weight that is not finite.
        LostProcess: another process has ended.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    shares_prefixes = distributed.broadcast_from_rank0(functools.partial(_try, encoder, decoder))
    if decoder is not None:
        decoder.shares_prefixes = shares_prefixes
    models = [encoder] if decoder is None else [encoder, decoder]
    with distributed.naming_lost("reading the weights"):
        wrapped, optimizer = accelerator.prepare(encoder, optimizer)
        offloaded = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
        fill(encoder.model, torch.device("cpu") if offloaded else accelerator.device)
        mesh = getattr(accelerator, "torch_device_mesh", None)
        if decoder is not None:
            if mesh is not None:
                mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
            decoder.shard(accelerator.device, mesh)
            decoder.fill(accelerator.device)
        forget(*models)
        odd = (name for m in models for name, p in m.named_parameters() if not bool(_local(p).isfinite().all()))
        name = distributed.first_found(next(odd, None))
    if name is not None:
        raise ValueError(f"model: got a non-finite value in {name}, expected finite weights")
    return wrapped, optimizer


def _local(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _try(encoder: Any, decoder: Any) -> bool | None:
    """What Encoder and Decoder try on a model when they are made, on a small one of its kind; `shares_prefixes`."""
    model = encoder.model.get_base_model() if hasattr(encoder.model, "get_base_model") else encoder.model
    small = stand_in(model)
    use_packed_attention(small, encoder.attention, embeds=True, length=encoder.max_length)
    if decoder is None:
        return None
    if type(model) is not type(decoder.model) or decoder.shared is None:
        del small
        small = stand_in(decoder.model)
    require_plain_embedding(small, decoder.embedding_scale)
    require_linear_head(small, decoder.eos_token_id, decoder.softcap, decoder.scale)
    length = len(decoder.prefix) + 5 + decoder.fit_max_target_length(5)
    use_packed_attention(small, decoder.attention, embeds=True, length=length)
    return allow_shared_prefixes(small, length, decoder.share_prefixes)


def shared_fingerprint(*modules: nn.Module) -> str:
    """`files.weights_fingerprint` of modules that are whole or sharded, found by process 0 for all.

    All processes call it. How many shards there are makes no difference.
    """
    found = tensor_fingerprint(*(module.state_dict() for module in modules), pieces=distributed.pieces)
    return distributed.broadcast_from_rank0(lambda: found)


def shard_frozen(model: Any, device: torch.device, mesh: Any = None) -> None:
    """Shards the weights of a causal LM over the processes of the run; a pass gathers them layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if mesh is None:
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    places = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    base = base_model(model)
    readers = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {module.weight for module in readers}  # one, where they are tied
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in base.modules() if type(m).__name__ in layers]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(base, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
    shards = {w: nn.Parameter(distribute_tensor(w.detach(), mesh, places, src_data_rank=None), False) for w in tables}
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
