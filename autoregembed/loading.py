"""Models whose weights come later, or never: built from config.json, on the meta device.

`dry_run` never gives them values. A sharded run does: `in_parts` builds, `sharding` shards, `fill` reads.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoregembed import distributed
from autoregembed.files import CheckpointError
from autoregembed.weight_files import WeightFiles, WholeWeights, find_weights

F = TypeVar("F", bound=Callable[..., None])
T = TypeVar("T")

_place: contextvars.ContextVar[Any] = contextvars.ContextVar("autoregembed_place_of_empty_weights", default=None)
_parts: contextvars.ContextVar[bool] = contextvars.ContextVar("autoregembed_weights_come_in_parts", default=False)
_STORED = "autoregembed_stored"  # attribute of a module: where its weights are. A copy of the module has it, too.
_BLOCK = 1 << 25  # bytes in float32 of the rows that are read at a time


@contextlib.contextmanager
def without_values(place: Any, layers: int | None = None) -> Iterator[None]:
    """Inside, models are built from their config inside the context manager `place`, and no value of one is read.

    What checks values (finite weights, packs against single texts) passes; whoever fills the weights calls it then.

    Args:
        place: torch.device("meta"), say; entered anew for every model.
        layers: how many of a model's layers are built; None: all.
    """
    token = _place.set((place, layers))
    try:
        yield
    finally:
        _place.reset(token)


def absent() -> bool:
    """Whether the weights of the models at hand have no values (yet)."""
    return _place.get() is not None


def reads_values(check: F) -> F:
    """A check of a model's values, made without gradients, and not at all where there are none."""

    @functools.wraps(check)
    def run(*args: Any, **kwargs: Any) -> None:
        if not absent():
            with torch.no_grad():
                check(*args, **kwargs)

    return run  # type: ignore[return-value]


def empty_model(loader: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """The causal LM (or base model) of `source` as its config alone describes it.

    Args:
        loader: AutoModelForCausalLM or AutoModel.
        options: `trust_remote_code` and `gguf_file`, as for `from_pretrained`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, **options)
    place, layers = _place.get()
    if layers is not None:
        _cut(config.get_text_config(), range(layers))
    with place:
        model = loader.from_config(config, dtype=dtype, trust_remote_code=options.get("trust_remote_code", False))
    return model.eval()


def _cut(config: Any, kept: Iterable[int]) -> None:
    """Leaves some layers, and of every list with an entry a layer their entries."""
    kept, before = list(kept), config.num_hidden_layers
    config.num_hidden_layers = len(kept)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[i] for i in kept])


def stand_in(model: Any) -> Any:
    """A small model of a causal LM's kind with random weights in float32: two layers, or one of each kind that it has.

    What a model's code does, and not its weights, can be tried on it.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == text.num_hidden_layers]
    kinds: dict[str, int] = {}
    for i in range(text.num_hidden_layers):
        kinds.setdefault(repr([v[i] for v in lists]), i)
    _cut(text, sorted({*range(min(2, text.num_hidden_layers)), *kinds.values()}))
    config._attn_implementation = None  # that of the model reads packs
    with _with_values(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)._from_config(config, dtype=torch.float32).eval()


@contextlib.contextmanager
def in_parts() -> Iterator[None]:
    """Inside, models are built without values, each with the knowledge where its own are; `fill` reads them later."""
    token = _parts.set(True)
    try:
        with without_values(torch.device("meta")):
            yield
    finally:
        _parts.reset(token)


def comes_in_parts() -> bool:
    """Whether the models at hand will be filled."""
    return _parts.get()


@contextlib.contextmanager
def _with_values() -> Iterator[None]:
    tokens = _parts.set(False), _place.set(None)
    try:
        yield
    finally:
        _parts.reset(tokens[0])
        _place.reset(tokens[1])


def model_in_parts(loader: Any, source: str, dtype: torch.dtype, read: Callable[[], Any], **options: Any) -> Any:
    """`empty_model` that knows where its weights are; its buffers have their values.

    Args:
        read: loads the model whole, where it cannot be read by rows: in process 0 alone.

    Raises:
        CheckpointError: weights in 8 or 4 bits, or a buffer that neither the files nor the model's own init has.
    """
    model = empty_model(loader, source, dtype, **options)
    if (kind := getattr(model.config, "quantization_config", None)) is not None and "gguf_file" not in options:
        method = kind.get("quant_method") if isinstance(kind, dict) else type(kind).__name__
        raise CheckpointError(
            f"model: got {source!r}, whose weights are quantised ({method}), expected plain ones under FSDP2: shards "
            "are read from them by rows; start without FSDP, or from the model that it was made of"
        )
    _compute_buffers(model)

    def whole() -> Any:
        with _with_values():
            return read()

    weights, keys = find_weights(model, source, "gguf_file" in options, whole)
    for name, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
        module.__dict__[_STORED] = weights, {n: keys[f"{name}.{n}" if name else n] for n in own}
    for name, buffer in model.named_buffers():
        if name in keys:
            buffer.copy_(weights.whole(keys[name], buffer))
    odd = [n for n, b in model.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]
    if odd:
        raise CheckpointError(
            f"model: got a buffer {odd[0]} of {type(model).__name__} that is not in its files, expected one that its "
            "_init_weights makes: start without FSDP"
        )
    return model


def _compute_buffers(model: Any) -> None:
    """Gives buffers such as a rope's `inv_freq` their values, as from_pretrained does: by the model's own init."""
    for module in model.modules():
        names = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in names:
            buffer = module._buffers[name]
            real = torch.zeros_like(buffer, device="cpu")
            module._buffers[name] = real.fill_(torch.nan) if real.is_floating_point() else real
            # Some have the same tensor under a second name outside of their buffers.
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, torch.full_like(value, torch.nan, device="cpu"))
        module._is_hf_initialized = not names
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True
    model.initialize_weights()


def stored(module: nn.Module) -> tuple[WeightFiles | WholeWeights, dict[str, str]] | None:
    """Where the weights of a module are, and the key of each; None for one that has not been built in parts."""
    return vars(module).get(_STORED)


def table_blocks(module: nn.Module, rows: int) -> Iterator[Tensor]:
    """The first rows of an embedding matrix in float32, some at a time, from memory or from its file."""
    weight: Any = module.weight
    size = max(1, _BLOCK // (4 * weight.shape[1]))
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield table_rows(module, range(start, stop)).float()


def table_rows(module: nn.Module, rows: Any) -> Tensor:
    """Some rows (len(rows), D) of an embedding matrix, from memory or from its file."""
    weight: Any = module.weight
    found = stored(module) if comes_in_parts() else None
    if found is None:
        return weight.detach()[rows.start : rows.stop] if isinstance(rows, range) else weight.detach()[rows]
    weights, keys = found
    key = keys["weight"]
    if isinstance(rows, range):
        return weights.rows(key, rows.start, rows.stop).to(weight.dtype)
    return torch.cat([weights.rows(key, row, row + 1) for row in rows]).to(weight.dtype)


def place_of_rows(module: nn.Module) -> torch.device:
    """Where rows besides an embedding matrix belong: its device, or the CPU as long as it has no values."""
    weight: Any = module.weight
    return torch.device("cpu") if comes_in_parts() else weight.device


def once(function: Callable[[], T]) -> T:
    """function(), by process 0 for all where weights come in parts: they are read once."""
    return distributed.broadcast_from_rank0(function) if comes_in_parts() else function()


@contextlib.contextmanager
def hollow(model: nn.Module) -> Iterator[None]:
    """Inside, weights without values look as if they were on the CPU: PEFT puts adapters where the weights are.

    They are NaN, and one number large.
    """
    if not comes_in_parts():
        yield
        return
    _replace(model, lambda p: torch.full((), torch.nan, dtype=p.dtype).expand(p.shape) if p.is_meta else None)
    try:
        yield
    finally:

        def emptied(p: nn.Parameter) -> Tensor | None:  # a copy that has been trained before has its values
            nothing = p.numel() > 0 and not p.is_meta and bool(p.detach().flatten()[0].isnan())
            return torch.empty_like(p, device="meta", memory_format=torch.contiguous_format) if nothing else None

        _replace(model, emptied)


def _replace(model: nn.Module, new: Callable[[nn.Parameter], Tensor | None]) -> None:
    """Puts new(parameter) in place of each stored parameter where it is not None; tied ones stay tied."""
    made: dict[int, nn.Parameter | None] = {}
    held = []  # an id is that of one parameter as long as it lives
    for module in model.modules():
        for name in (stored(module) or ({}, {}))[1]:
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            if id(parameter) not in made:
                value = new(parameter)
                held.append(parameter)
                made[id(parameter)] = None if value is None else nn.Parameter(value, parameter.requires_grad)
            if (found := made[id(parameter)]) is not None:
                module._parameters[name] = found


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> None:
    """Reads the values of a model that was built in parts and then sharded: each process its own rows, on `device`."""

    def values(parameter: Any) -> Tensor | None:
        if not parameter.is_meta:
            return None
        weights, key = places[id(parameter)]
        return weights.shard(key, parameter, device, _BLOCK)

    places: dict[int, Any] = {}
    for module in model.modules():
        weights, keys = stored(module) or (None, {})
        for name, key in keys.items():
            if module._parameters.get(name) is not None:
                places[id(module._parameters[name])] = weights, key
    _replace(model, values)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, left


def forget(*models: nn.Module) -> None:
    """Lets go of what a model's values were read from."""
    for module in (m for model in models for m in model.modules()):
        module.__dict__.pop(_STORED, None)
