"""Attention and rope over a pack: no text sees another one, and none is rotated by another one's length."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autoregembed.packing import Lengths, Packed
from autoregembed.passes import unselected
from autoregembed.prefixes import SharedPrefixes, select, spread

# No "sdpa" in these names: Transformers would refuse it to models with a softcap, which torch's kernel does not have.
SDPA, VARLEN, FLASH = "autoregembed_packed", "autoregembed_varlen", "flash_attention_2"
SHORT = 128  # tokens of a text up to which attention is a small part of a layer
LENGTHS = "pack_lengths"  # the argument by which `_sdpa` gets those of a pack
IMPLEMENTATIONS = {"sdpa": SDPA, "varlen": VARLEN, "flash_attention_2": FLASH}
_packed_forward: contextvars.ContextVar[Packed | None] = contextvars.ContextVar("packed_forward", default=None)


def attention_backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Every attention backend with "ok" or the reason why it cannot run; "auto" takes the first "ok"."""
    half = dtype in (torch.float16, torch.bfloat16)
    gpu_only = "ok" if device.type == "cuda" and half else f"needs CUDA and 16 bits, got {device.type} and {dtype}"
    flash, varlen = gpu_only, gpu_only
    if gpu_only == "ok" and importlib.util.find_spec("flash_attn") is None:
        flash = "flash-attn is not installed"
    if gpu_only == "ok" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        varlen = "torch.nn.attention.varlen is not in this torch"
    return {"flash_attention_2": flash, "varlen": varlen, "sdpa": "ok"}


def run_packed(model: nn.Module, packed: Packed, shared: SharedPrefixes | None = None, **inputs: Tensor) -> Tensor:
    """Last hidden states of a base model over one pack; `inputs` is `input_ids=` or `inputs_embeds=`.

    (T, D) for the T tokens of the pack, or (U, D) for the U of them that are run where sequences share prefixes. Models
    build no attention mask inside: attention is causal within the bounds of `cu_seqlens`.
    """
    # Without a mask Transformers looks for packs in the positions, and waits for the device to see whether it found
    # one. `_mask` drops a mask; flash_attention_2 would look into it, and wait for that, and a model with an attention
    # of its own needs what Transformers finds.
    options: dict[str, Any] = packed.kwargs()
    config: Any = next(m.config for m in model.modules() if hasattr(m, "config"))  # the model may be wrapped
    if shared is not None:  # the longest sequence bounds what is run of any
        own = {"position_ids": options["position_ids"].index_select(1, shared.kept), "cu_seq_lens_q": shared.cu_seqlens}
        options |= {**own, "shared_prefixes": shared}
    implementation = config.get_text_config()._attn_implementation
    if implementation in (SDPA, VARLEN):
        options["attention_mask"] = torch.ones_like(options["position_ids"], dtype=torch.bool)
    if implementation == SDPA:
        options[LENGTHS] = packed.lengths
    token = _packed_forward.set(packed)
    try:
        return model(**inputs, **options).last_hidden_state.squeeze(0)
    finally:
        _packed_forward.reset(token)


def compile_layers(model: nn.Module, backend: Any = "inductor") -> None:
    """torch.compile for each layer of an LM, with sizes that may change: no pack is compiled anew for its lengths.

    Attention itself stays as it is: `sdpa` makes a call for every run of equal lengths, `varlen` and flash-attention
    are kernels already.

    Raises:
        ValueError: a model that does not name its layers.
    """
    kinds = {k for m in model.modules() for k in getattr(m, "_no_split_modules", None) or ()}
    layers = [m for m in model.modules() if type(m).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"compile: got True for {type(model).__name__}, which does not name its layers, expected False"
        )
    for name, function in ((SDPA, _sdpa), (VARLEN, _varlen), (FLASH, _flash)):
        AttentionInterface.register(name, torch.compiler.disable(function))
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)


def keep_rope_per_text(model: nn.Module) -> None:
    """Makes rope whose frequencies depend on the length of the input (longrope, dynamic NTK) depend on each text's own.

    Transformers takes the longest text of the input for all of them, and dynamic NTK remembers it for later inputs.
    """
    for module in _adaptive_ropes(model):
        if not hasattr(module, "_autoregembed_forward"):
            module._autoregembed_forward = module.forward
            module.forward = types.MethodType(_rope_per_text, module)


def rope_limit(model: nn.Module) -> int | None:
    """The length up to which rope is the same for all texts, whoever runs the model; None where it always is."""
    limits = [_original_length(module, kind) for module in _adaptive_ropes(model) for kind in _kinds(module)]
    return min((limit for limit in limits if limit is not None), default=None)


def _kinds(module: Any) -> list[str | None]:
    """The types of layers for which a rotary module has its own rope: [None] where all share one."""
    return list(module.rope_type) if isinstance(module.rope_type, dict) else [None]


def _adaptive_ropes(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        rotary = hasattr(module, "rope_type") and hasattr(getattr(module, "config", None), "rope_parameters")
        if rotary and any(_original_length(module, kind) is not None for kind in _kinds(module)):
            yield module


def _original_length(module: Any, layer_type: str | None) -> int | None:
    """Beyond it the frequencies of a rotary module are others; None where they depend on no length."""
    kind, parameters = module.rope_type, module.config.rope_parameters
    if layer_type is not None:
        kind, parameters = kind[layer_type], parameters[layer_type]
    if not isinstance(kind, str):
        return None
    if "dynamic" in kind:
        return module.original_max_seq_len
    return parameters["original_max_position_embeddings"] if kind == "longrope" else None


def _rope_per_text(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What a rotary module gives for each text of a pack alone, as its forward; padded batches are left alone."""
    named = {**dict(zip(("x", "position_ids", "layer_type"), args, strict=False)), **kwargs}
    x, position_ids, layer_type = (named.get(name) for name in ("x", "position_ids", "layer_type"))
    plain, original = module._autoregembed_forward, _original_length(module, layer_type)
    if original is None or x is None or position_ids is None or position_ids.ndim != 2 or len(position_ids) != 1:
        return plain(*args, **kwargs)
    packed = _packed_forward.get()
    lengths = _lengths_in(position_ids) if packed is None else packed.lengths.values
    if not lengths:
        return plain(*args, **kwargs)
    options = {} if layer_type is None else {"layer_type": layer_type}
    dynamic = "dynamic" in (module.rope_type if layer_type is None else module.rope_type[layer_type])
    # Texts of one regime are neighbours in a pack: all up to the original length, then (dynamic) those of each length.
    runs = itertools.groupby(lengths, lambda n: max(n, original) if dynamic else n > original)
    regimes, sizes = zip(*((regime, sum(run)) for regime, run in runs), strict=True)
    parts = [
        _dynamic_rope(module, regime, x, part, **options) if dynamic else plain(x, part, **options)
        for regime, part in zip(regimes, position_ids.split(sizes, 1), strict=True)
    ]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    return tuple(torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))


def _lengths_in(position_ids: Tensor) -> tuple[int, ...]:
    """Lengths of the texts whose positions (1, T) these are; none where generation goes on."""
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    return tuple(b - a for a, b in itertools.pairwise([*starts, position_ids.shape[1]])) if starts[:1] == [0] else ()


def _dynamic_rope(module: Any, length: int, x: Tensor, position_ids: Tensor, **options: str) -> Any:
    """Dynamic NTK for texts of one length. Transformers' own update waits for the device and remembers the length."""
    kind = module.rope_type[options["layer_type"]] if options else module.rope_type
    name = f"{options['layer_type']}_inv_freq" if options else "inv_freq"
    usual = getattr(module, name)
    found, _ = ROPE_INIT_FUNCTIONS[kind](module.config, "cpu", seq_len=torch.tensor(length), **options)
    setattr(module, name, found.to(x.device, non_blocking=True))
    try:
        return inspect.unwrap(type(module).forward)(module, x, position_ids, **options)
    finally:
        setattr(module, name, usual)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _packed_forward.get() is None else None


def _refuse(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ValueError("attention_mask: got one in a packed forward, expected None")
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position_bias: this model's attention needs it, packed attention has no such term")


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, dropout: float, terms: dict[str, Any]
) -> Tensor:
    """What torch's kernel lacks: a cap on the scores (Gemma 2), a sink that takes a share of every row (gpt-oss)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * (scaling or q.shape[-1] ** -0.5)
    if (softcap := terms.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The smallest number and not -inf: a padding row may see nothing at all.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if (sinks := terms.get("s_aux")) is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)[..., : k.shape[-2]]
    return F.dropout(p, dropout) @ v


def _spread_heads(x: Tensor, shared: SharedPrefixes) -> Tensor:
    """Keys, values or queries of the tokens that are run (1, H, U, d) to those of the whole pack (1, H, T, d)."""
    return spread(x.squeeze(0).transpose(0, 1), shared).transpose(0, 1)[None]


def _sdpa(
    module: nn.Module,
    query: Tensor,  # (1, H, T, d) of a pack; (B, H, T, d) otherwise, as key and value with their own number of heads
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within each sequence of a pack: one SDPA call for every run of equal lengths, no padding."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shared = kwargs.pop("shared_prefixes", None)
    if shared is not None:  # the queries of a prefix as well: so every sequence is whole
        q, k, v = (_spread_heads(x, shared) for x in (query, key, value))
        kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_k"]
        y, _ = _sdpa(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return select(y.squeeze(0), shared)[None], None
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    terms = {name: kwargs[name] for name in ("softcap", "s_aux") if kwargs.get(name) is not None}
    if cu_seqlens is None and _packed_forward.get() is not None:
        raise NotImplementedError("cu_seq_lens_q: this model does not pass it to its attention, which a pack needs")
    if cu_seqlens is None and terms:
        if attention_mask is None:
            queries, keys = query.shape[2], key.shape[2]
            attention_mask = _window_mask(keys, keys, query.device)[keys - queries :]
        return _eager(query, key, value, attention_mask, scaling, dropout, terms).transpose(1, 2), None
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse(attention_mask, kwargs)
    window = kwargs.get("sliding_window")
    if query.device.type == "cpu" and value.dtype in (torch.float16, torch.bfloat16):
        # The CPU's 16-bit attention kernel takes five times as long as its fp32 one on texts of 20 tokens.
        with torch.autocast("cpu", enabled=False):
            q, k, v = (x.float() for x in (query, key, value))
            y, _ = _sdpa(module, q, k, v, None, dropout=dropout, scaling=scaling, **kwargs)
        return y.to(value.dtype), None
    # Who brings a pack of their own (a collator without padding) waits for the device here.
    runs = (kwargs.get(LENGTHS) or Lengths(cu_seqlens.diff().tolist())).runs()
    short = max(length for length, _ in runs) <= SHORT
    with unselected() if short else contextlib.nullcontext():
        return _by_length(query, key, value, runs, dropout=dropout, scaling=scaling, window=window, terms=terms), None


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]], *, dropout: float, scaling: float | None,
    window: int | None, terms: dict[str, Any],
) -> Tensor:  # fmt: skip
    """(1, T, H, d): a call for every run of sequences of one length, given as (length, how many)."""
    sizes = [length * count for length, count in runs]
    # (1, H, T, d) -> per run (count, H, length, d). `split` and not slices: its backward is one concatenation.
    parts = [x.squeeze(0).transpose(0, 1).split(sizes) for x in (query, key, value)]
    out = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        band = _window_mask(length, window, q.device) if window is not None and length > window else None
        if terms:
            mask = _window_mask(length, length, q.device) if band is None else band
            y = _eager(q, k, v, mask, scaling, dropout, terms)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
            )
        out.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[None]


def _varlen(
    module: nn.Module,
    query: Tensor,  # as in `_sdpa`
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.attention.varlen: one kernel over the whole pack, on CUDA."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    _refuse(attention_mask, kwargs)
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("s_aux: torch.nn.attention.varlen has no attention sinks; set attention to 'sdpa'")
    if dropout:
        raise NotImplementedError("dropout: torch.nn.attention.varlen has none; set attention_dropout to 0")
    window = kwargs.get("sliding_window")
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any]
    if "window_size" in parameters:
        options = {"window_size": (-1 if window is None else window - 1, 0)}
    elif window is None:
        options = {"is_causal": True}
    else:
        raise NotImplementedError("sliding_window: torch.nn.attention.varlen of this torch has none")
    shared = kwargs.get("shared_prefixes")
    if shared is not None:  # a sequence has more keys than queries: its last query sees the last key
        key, value = (_spread_heads(x, shared) for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in parameters:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Under autocast rotary embeddings leave q and k in fp32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
    bounds, lengths = (cu_seqlens, kwargs["cu_seq_lens_k"]), (kwargs["max_length_q"], kwargs["max_length_k"])
    y: Any = varlen_attn(q, k, v, *bounds, *lengths, scale=scaling, **options)
    return y.unsqueeze(0), None


def _flash(
    module: nn.Module,
    query: Tensor,  # as in `_sdpa`
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' flash_attention_2, which takes a sequence with more keys than queries as it is."""
    from transformers.integrations.flash_attention import flash_attention_forward

    shared = kwargs.pop("shared_prefixes", None)
    if shared is not None:
        key, value = (_spread_heads(x, shared) for x in (key, value))
    return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)


for _name, _function in ((SDPA, _sdpa), (VARLEN, _varlen), (FLASH, _flash)):
    AttentionInterface.register(_name, _function)
for _name in (SDPA, VARLEN):
    AttentionMaskInterface.register(_name, _mask)
