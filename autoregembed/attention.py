"""Attention over a pack, through Transformers' AttentionInterface: no text of a pack sees another one."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from autoregembed.models import base_model
from autoregembed.packing import Ids, Packed, pack

# No "sdpa" in these names: Transformers would refuse it to models with a softcap, which torch's kernel does not have.
SDPA, VARLEN, FLASH = "autoregembed_packed", "autoregembed_varlen", "flash_attention_2"
_IMPLEMENTATIONS = {"sdpa": SDPA, "varlen": VARLEN, "flash_attention_2": FLASH}
_packed_forward = contextvars.ContextVar("autoregembed_packed_forward", default=False)


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


def use_packed_attention(model: PreTrainedModel, backend: str = "auto", *, embeds: bool = False) -> str:
    """Sets the attention of `model` to a backend that understands packs; its unpacked calls still run SDPA.

    Two short sequences are run in one pack and alone, and compared: a model that does not pass its attention and
    positions to Transformers' interfaces would silently mix the texts of a pack. Which backends can run depends on the
    model's device and on its dtype, or on autocast's dtype where autocast is on.

    Args:
        model: a causal LM, its base model, or a PeftModel around one.
        backend: "auto" or a name of `attention_backends`.
        embeds: the model will be given `inputs_embeds`, not `input_ids`.

    Returns:
        The name of the backend taken.

    Raises:
        ValueError: an unknown backend, one that cannot run for this model, or a model that does not keep the texts of a
            pack apart. Its attention is then left as it was.
    """
    parameter = next(model.parameters())
    place, dtype = parameter.device, parameter.dtype
    if torch.is_autocast_enabled(place.type):
        dtype = torch.get_autocast_dtype(place.type)
    backends = attention_backends(place, dtype)
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None and backends["varlen"] == "ok":
        backends["varlen"] = "torch.nn.attention.varlen has no softcap, which this model needs"
    if backend == "auto":
        backend = next(name for name, state in backends.items() if state == "ok")
    if backend not in backends:
        raise ValueError(f"attention: got {backend!r}, expected 'auto', {', '.join(map(repr, backends))}")
    if backends[backend] != "ok":
        raise ValueError(f"attention: got {backend!r}, which cannot run here: {backends[backend]}")
    # Recurrent or convolutional layers would carry state from one packed text into the next.
    mixers = {t for t in getattr(config, "layer_types", None) or [] if "attention" not in t}
    if mixers:
        raise ValueError(f"model: got layers of type {sorted(mixers)}, expected causal attention layers only")
    before = config._attn_implementation
    wanted = torch.cat([_hidden(model, [ids], alone=True) for ids in _PROBE])
    model.set_attn_implementation(_IMPLEMENTATIONS[backend])
    try:
        found = _hidden(model, _PROBE, embeds=embeds)
        # Leaked context or wrong positions change every token of the second sequence by a large part of its norm;
        # rounding changes them by a few eps, or some tokens by more where a mixture of experts is near a tie.
        error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        if not error[len(_PROBE[0]) :].median() <= max(1e-3, 16 * torch.finfo(dtype).eps):
            raise ValueError(
                f"model: got {type(model).__name__}, whose hidden states in a pack are not those of each text alone "
                f"(relative difference {error.max():.2g}); expected models with causal attention through "
                "Transformers' AttentionInterface"
            )
    except BaseException:
        model.set_attn_implementation(before)
        raise
    return backend


_PROBE = [[0, 1, 2], [1, 0, 0, 2, 1]]


@torch.no_grad()
def _hidden(model: Any, sequences: Sequence[Ids], *, alone: bool = False, embeds: bool = False) -> Tensor:
    """Hidden states (T, D) of sequences sorted by length, in one pack or as the only text, without dropout."""
    embedding = model.get_input_embeddings()
    packed = pack(sequences, embedding.weight.device)
    ids = packed.ids[None] % embedding.weight.shape[0]
    inputs = {"inputs_embeds": embedding(ids)} if embeds else {"input_ids": ids}
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        if alone:
            return base_model(model)(**inputs, use_cache=False).last_hidden_state.squeeze(0)
        return run_packed(base_model(model), packed, **inputs)
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """Inside, models build no attention mask: attention is causal within the bounds of `cu_seqlens`."""
    token = _packed_forward.set(True)
    try:
        yield
    finally:
        _packed_forward.reset(token)


def run_packed(model: nn.Module, packed: Packed, **inputs: Tensor) -> Tensor:
    """Last hidden states (T, D) of a base model over one pack; `inputs` is `input_ids=` or `inputs_embeds=`."""
    # Without a mask Transformers looks for packs in the positions, and waits for the device to see whether it found
    # one. `_mask` drops a mask; flash_attention_2 would look into it, and wait for that.
    config: Any = next(m.config for m in model.modules() if hasattr(m, "config"))  # the model may be wrapped
    if config.get_text_config()._attn_implementation != FLASH:
        inputs["attention_mask"] = torch.ones_like(packed.ids[None], dtype=torch.bool)
    with packed_forward():
        return model(**inputs, **packed.kwargs()).last_hidden_state.squeeze(0)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed_forward.get() else sdpa_mask(*args, **kwargs)


def _refuse(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ValueError("attention_mask: got one in a packed forward, expected None")
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: this model's attention needs it, packed attention has no such term")


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float, mask: Tensor, dropout: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)) * scaling / softcap)
    # The smallest number and not -inf: a padding row may see nothing at all.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(p, dropout) @ v


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

    cu_seqlens, softcap = kwargs.get("cu_seq_lens_q"), kwargs.get("softcap")
    if cu_seqlens is None and softcap is not None:
        if attention_mask is None:
            queries, keys = query.shape[2], key.shape[2]
            attention_mask = _window_mask(keys, keys, query.device)[keys - queries :]
        scaling = scaling or query.shape[-1] ** -0.5
        return _softcapped(query, key, value, scaling, softcap, attention_mask, dropout).transpose(1, 2), None
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
    runs = [(length, len(list(run))) for length, run in itertools.groupby(cu_seqlens.diff().tolist())]
    sizes = [length * count for length, count in runs]
    # (1, H, T, d) -> per run (count, H, length, d). `split` and not slices: its backward is one concatenation.
    parts = [x.squeeze(0).transpose(0, 1).split(sizes) for x in (query, key, value)]
    out = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        band = _window_mask(length, window, q.device) if window is not None and length > window else None
        if softcap is not None:
            mask = _window_mask(length, length, q.device) if band is None else band
            y = _softcapped(q, k, v, scaling or q.shape[-1] ** -0.5, softcap, mask, dropout)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=True
            )
        out.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[None], None  # (1, T, H, d)


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
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    _refuse(attention_mask, kwargs)
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
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in parameters:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Under autocast rotary embeddings leave q and k in fp32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
    length = kwargs["max_length_q"]
    y: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, length, length, scale=scaling, **options)
    return y.unsqueeze(0), None


for _name, _function in ((SDPA, _sdpa), (VARLEN, _varlen)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)
