"""Which models may read packs: tried on the model itself, in the lengths that it will be given."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autoregembed.attention import IMPLEMENTATIONS, attention_backends, keep_rope_per_text, rope_limit, run_packed
from autoregembed.loading import absent
from autoregembed.models import base_model, describe_dtypes, max_positions
from autoregembed.packing import Ids, pack
from autoregembed.prefixes import share_prefixes

# Fields of a config that hold a length beyond which attention or rope changes.
_LENGTHS = re.compile(r"window|chunk|original_max|block_size|index_topk|local|stride|segment|compress")
_RECURRENT = re.compile(r"linear|mamba|conv|hybrid|recurrent")  # types of layers
_STATEFUL = re.compile(r"Mamba|Rwkv|RecurrentBlock|RgLru|LSTMBlock|DeltaNet|LightningAttention|ShortConv")  # classes
_WAY_OUT = "expected one with causal attention through Transformers' AttentionInterface, such as Llama, Qwen or Gemma 3"


def use_packed_attention(
    model: PreTrainedModel, backend: str = "auto", *, embeds: bool = False, length: int | None = None
) -> str:
    """Sets the attention of `model` to a backend that understands packs; its unpacked calls still run SDPA.

    Texts are run in one pack and alone, and compared: a model that does not pass its attention and positions to
    Transformers' interfaces would silently mix the texts of a pack. The texts are as long as it takes to cross every
    window, chunk and original length of the model's config below `length`. No gradient may flow from one text to
    another, nor back from a token to a later one, however small the weights are. Which backends can run depends on the
    model's device and on its dtype, or on autocast's dtype where autocast is on.

    Args:
        model: a causal LM, its base model, or a PeftModel around one.
        backend: "auto" or a name of `attention_backends`.
        embeds: the model will be given `inputs_embeds`, not `input_ids`.
        length: tokens of the longest text that it will be given; by default 512, or the model's positions if fewer.

    Returns:
        The name of the backend taken.

    Raises:
        ValueError: an unknown backend, one that cannot run for this model, or a model that does not keep the texts of a
            pack apart, cannot be run, or reads ids beside its `inputs_embeds`. Its attention is then left as it was.
    """
    if absent():
        backend = "sdpa" if backend == "auto" else backend
        keep_rope_per_text(model)
        model.set_attn_implementation(IMPLEMENTATIONS[backend])
        return backend
    parameter = next(model.parameters())
    place, dtype = parameter.device, parameter.dtype
    if torch.is_autocast_enabled(place.type):
        dtype = torch.get_autocast_dtype(place.type)
    backends = attention_backends(place, dtype)
    config = model.config.get_text_config()
    softcap = getattr(config, "attn_logit_softcapping", None) is not None
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    for name in ("varlen", "flash_attention_2"):
        if backends[name] == "ok" and (sinks or (softcap and name == "varlen")):
            backends[name] = f"{name} has no {'attention sinks' if sinks else 'softcap'}, which this model needs"
    if backend == "auto":
        backend = next(name for name, state in backends.items() if state == "ok")
    if backend not in backends:
        raise ValueError(f"attention: got {backend!r}, expected 'auto', {', '.join(map(repr, backends))}")
    if backends[backend] != "ok":
        raise ValueError(f"attention: got {backend!r}, which cannot run here: {backends[backend]}")
    # Recurrent or convolutional layers would carry state from one packed text into the next.
    mixers = {t for t in getattr(config, "layer_types", None) or [] if _RECURRENT.search(t)}
    mixers |= {
        type(module).__name__ for module in base_model(model).modules()
        if isinstance(module, nn.Conv1d) or _STATEFUL.search(type(module).__name__)
    }  # fmt: skip
    if mixers:
        raise ValueError(
            f"model: got layers of type {sorted(mixers)}, which carry state from one text of a pack into the next, "
            "expected causal attention layers only: take a model without recurrent or convolutional layers"
        )
    keep_rope_per_text(model)
    before = config._attn_implementation
    if length is None:
        length = min(512, max_positions(model) or 512)
    with _evaluating(model):
        wanted = _attempt(model, "one text", lambda: [_hidden(model, [ids]) for ids in _texts(model, 0, length)])
        _verify_no_gradient(model, _texts(model, 0, 1)[1:], "depend on later tokens")
        if embeds:
            _verify_embeds(model, wanted)
        model.set_attn_implementation(IMPLEMENTATIONS[backend])
        try:
            _verify_pack(model, _texts(model, 0, length), wanted, embeds=embeds)
            what = "in a pack are not those of each text alone: they depend on other texts or on later tokens"
            _verify_no_gradient(model, _texts(model, 0, 1), what, packed=True, embeds=embeds)
        except BaseException:
            model.set_attn_implementation(before)
            raise
    return backend


def verify_shared_prefixes(model: PreTrainedModel, length: int) -> None:
    """That targets which share their prefix have the states that each has behind a prefix of its own.

    The pack is one that `use_packed_attention` has tried.

    Args:
        model: as there.
        length: tokens of the longest sequence.

    Raises:
        ValueError: the states differ, or rope depends on the length of a text, hence the prefix on its target.
    """
    name = type(model).__name__
    if rope_limit(model) is not None:
        raise ValueError(
            f"share_prefixes: got a {name} whose rope depends on the length of a text, expected None or False: a "
            "prefix is then not the same before every target"
        )
    if absent():
        return
    prefix = [0, 1, 2, 1]
    rows = model.get_input_embeddings().weight.shape[0]
    texts = [[i % rows for i in [*prefix, *text]][:length] for text in [*_texts(model, 0, length), [2, 2]]]
    texts = [text for text in texts if len(text) > len(prefix)]
    owners = [i // 3 for i in range(len(texts))]  # the last one may be alone
    with _evaluating(model):
        embedding = model.get_input_embeddings()
        whole = pack(texts, embedding.weight.device)
        shared = share_prefixes([*map(len, texts)], owners, len(prefix), embedding.weight.device)
        wanted = _hidden(model, texts, packed=True, embeds=True)
        inputs = embedding(whole.ids[None])
        if shared is None:  # too short for two targets
            return

        def run() -> Tensor:
            found = run_packed(base_model(model), whole, shared, inputs_embeds=inputs[:, shared.kept])
            return found[shared.source]

        found = _attempt(model, "targets behind one prefix", run)
        error = max(
            _difference(*pair)
            for pair in zip(*(x.split(whole.cu_seqlens.diff().tolist()) for x in (found, wanted)), strict=True)
        )
        if error <= 16 * _rounding(model):
            return
        carried = max(_sensitivity(model, text) for text in texts)
    if not error <= min(16 * carried, 0.25):
        raise ValueError(
            f"share_prefixes: got a {name} whose targets behind one prefix have other states than each behind its own "
            f"(relative difference {error:.2g}), expected None or False"
        )


def length_limits(model: Any, below: int, above: int = 1) -> list[int]:
    """Lengths in [above, below) beyond which attention or rope changes, as the model's config names them."""
    found = set()

    def walk(value: Any, named: bool) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, named or bool(_LENGTHS.search(str(name))))
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner, named)
        elif named and type(value) is int and above <= value < below:
            found.add(value)

    walk(model.config.get_text_config().to_dict(), False)
    return sorted(found)


def allow_shared_prefixes(model: PreTrainedModel, length: int, share: bool | None) -> bool | None:
    """`share`, or False where it is None and `verify_shared_prefixes` raises; True raises with it."""
    if share is False:
        return share
    try:
        verify_shared_prefixes(model, length)
    except ValueError:
        if share:
            raise
        return False
    return share


def verify_length(
    model: Any,
    longest: int,
    verified: int,
    *,
    embeds: bool = False,
    shares_prefixes: bool | None = False,
    sharded: bool = False,
) -> int:
    """Tries a model again when a text crosses a limit of its config that no text has crossed so far.

    Args:
        longest: tokens of the longest text at hand.
        verified: tokens of the longest text so far, or what this function gave.
        embeds: as in `use_packed_attention`.
        shares_prefixes: what `allow_shared_prefixes` gave.
        sharded: all processes make the same passes, so none can be added here.

    Returns:
        The length that holds from now on.

    Raises:
        ValueError: as `use_packed_attention` or `verify_shared_prefixes`, or such a text for a sharded model.
    """
    if longest <= verified or absent() or not length_limits(model, longest, verified):
        return max(longest, verified)
    if sharded:
        raise ValueError(
            f"max_length: got a text of {longest} tokens for a sharded model that was tried with {verified}, expected "
            f"at most {length_limits(model, longest, verified)[0]}, or a max_length of as many when the model is built"
        )
    limit = max_positions(model)
    length = longest if limit is None else min(max(longest, 2 * verified), limit)
    config = model.config.get_text_config()
    packed = config._attn_implementation
    with _evaluating(model):
        model.set_attn_implementation("eager")
        try:
            wanted = [_hidden(model, [ids]) for ids in _texts(model, verified, length)]
        finally:
            model.set_attn_implementation(packed)
        _verify_pack(model, _texts(model, verified, length), wanted, embeds=embeds)
    if shares_prefixes is not False:
        verify_shared_prefixes(model, length)
    return length


def _texts(model: Any, above: int, below: int) -> list[list[int]]:
    """Ids of a few texts, of which one is longer than every limit in that range."""
    rows = model.get_input_embeddings().weight.shape[0]
    lengths = {min(limit + 8, below) for limit in length_limits(model, below, max(above, 1))}
    generator = torch.Generator().manual_seed(0)
    short = [[0, 1, 2], [1, 0, 0, 2, 1]]
    long = [torch.randint(rows, (n,), generator=generator).tolist() for n in sorted(lengths) if n > 5]
    return [[i % rows for i in ids] for ids in short] + long


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, nothing keeps a graph or drops anything out; afterwards every module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _hidden(model: Any, texts: Sequence[Ids], *, packed: bool = False, embeds: bool = False) -> Tensor:
    """Hidden states (T, D) of texts sorted by length, in one pack or as the only text."""
    embedding = model.get_input_embeddings()
    whole = pack(texts, embedding.weight.device)
    ids = whole.ids[None]
    inputs = {"inputs_embeds": embedding(ids)} if embeds else {"input_ids": ids}
    if packed:
        return run_packed(base_model(model), whole, **inputs)
    return base_model(model)(**inputs, use_cache=False).last_hidden_state.squeeze(0)


def _attempt(model: Any, what: str, run: Any) -> Any:
    """run(), whose errors say what the model is at fault for: third-party models raise anything."""
    try:
        return run()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"model: got {type(model).__name__}, which cannot read {what} ({type(error).__name__}: "
            f"{str(error)[:300]}){describe_dtypes(model)}; {_WAY_OUT}"
        ) from error


def _rounding(model: nn.Module) -> float:
    """The unit in which states of a model are rounded; norms and softmaxes are in float32 even in float64 models."""
    parameter = next(model.parameters())
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {torch.float32}
    if torch.is_autocast_enabled(parameter.device.type):
        dtypes.add(torch.get_autocast_dtype(parameter.device.type))
    coarse = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}[torch.get_float32_matmul_precision()]
    return max(coarse, *(torch.finfo(dtype).eps for dtype in dtypes))


def _difference(found: Tensor, wanted: Tensor) -> float:
    """By how much of its norm a typical token differs, or a typical one of the last 8.

    Rounding moves single tokens far where a mixture of experts is near a tie. A window moves the tokens beyond it.
    """
    norm = wanted.norm(dim=-1).clamp_min(torch.finfo(wanted.dtype).tiny)  # the states of a padding token may be zeros
    error = (found - wanted).norm(dim=-1) / norm
    return max(float(error.median()), float(error[-8:].median()))


def _verify_embeds(model: Any, wanted: Sequence[Tensor]) -> None:
    """That the embeddings of ids say as much to the model as the ids."""
    reason = (
        "reads ids beside its embeddings (such as per-layer embeddings, Gemma 3n) or changes what its embedding module "
        "gives, while z has no ids; expected one that inputs_embeds are enough for: another model"
    )
    if _has_more_tables_of_ids(model):  # their rows may be zeros so far
        raise ValueError(f"model: got {type(model).__name__}, which {reason}")
    for ids, states in zip(_texts(model, 0, 1), wanted, strict=False):
        try:
            found = _hidden(model, [ids], embeds=True)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"model: got {type(model).__name__}, which {reason} ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        if not _difference(found, states) <= 16 * _rounding(model):
            raise ValueError(f"model: got {type(model).__name__}, which {reason}")


def _has_more_tables_of_ids(model: Any) -> bool:
    """Whether the ids of a text are looked up in an embedding module besides the one for its input."""
    ids, calls = _texts(model, 0, 1)[1], []

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if args and isinstance(args[0], Tensor) and args[0].flatten().tolist() == ids:
            calls.append((module, args, kwargs))

    own = set(model.get_input_embeddings().modules())  # of an adapter around it, too
    others = [m for m in base_model(model).modules() if isinstance(m, nn.Embedding) and m not in own]
    hooks = [m.register_forward_pre_hook(read, with_kwargs=True) for m in others]
    try:
        _hidden(model, [ids])
    finally:
        for hook in hooks:
            hook.remove()
    # Whisper gives its table of positions the ids for their number alone.
    return any(
        not torch.equal(module(*args, **kwargs), module(torch.zeros_like(args[0]), *args[1:], **kwargs))
        for module, args, kwargs in calls
    )


def _verify_pack(model: Any, texts: list[list[int]], wanted: Sequence[Tensor], *, embeds: bool) -> None:
    name = type(model).__name__
    if not all(bool(states.isfinite().all()) for states in wanted):
        dtype = next(model.parameters()).dtype
        raise ValueError(
            f"model: got {name}, whose hidden states in {dtype} are not finite, expected finite ones: load it in "
            "another dtype (float16 overflows where bfloat16 does not)"
        )
    found = _attempt(model, "a pack of texts", lambda: _hidden(model, texts, packed=True, embeds=embeds))
    for ids, states, own in zip(texts, found.split([len(ids) for ids in texts]), wanted, strict=True):
        error = _difference(states, own)
        # Rounding by one unit at the input shows how far this model carries what rounding does inside.
        if not error <= 16 * _rounding(model) and not error <= min(16 * _sensitivity(model, ids), 0.25):
            limits = length_limits(model, len(ids))
            beyond = f" in texts longer than {limits[-1]} tokens" if len(ids) > 5 and limits else ""
            raise ValueError(
                f"model: got {name}, whose hidden states in a pack are not those of each text alone{beyond} (relative "
                f"difference {error:.2g}); {_WAY_OUT}" + (f", or texts of at most {limits[-1]}" if beyond else "")
            )


def _sensitivity(model: Any, ids: Ids) -> float:
    """By how much changing the embeddings of a text by their rounding moves its states."""
    unit = _rounding(model)
    sign = torch.Generator().manual_seed(0)

    def nudge(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + unit * (2 * torch.randint(2, output.shape, generator=sign) - 1).to(output))

    plain = _hidden(model, [ids], packed=True)
    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        return _difference(_hidden(model, [ids], packed=True), plain)
    finally:
        hook.remove()


def _verify_no_gradient(model: Any, texts: list[list[int]], what: str, **how: bool) -> None:
    """That states depend on earlier tokens of their own text alone: other gradients are zero, not small."""
    leaf: list[Tensor] = []

    def read(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[-1].clone()  # some models add to it in place

    last, a = sum(map(len, texts)), len(texts[0]) if len(texts) > 1 else 0
    token = a + 2  # the third one of the last text, of five
    passes = [(slice(token, token + 1), slice(a, token + 1))] + ([(slice(0, a), slice(0, a))] if a else [])
    hook = model.get_input_embeddings().register_forward_hook(read)
    leaks = []
    try:
        with torch.enable_grad():
            states = _attempt(model, "texts with gradients", lambda: _hidden(model, texts, **how))
            upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
            for rows, allowed in passes:
                for scale in (1.0, 2.0**-6, 2.0**-12):  # the gradients of float16 may overflow
                    scalar = (states * upstream * scale)[rows].sum()
                    (gradient,) = torch.autograd.grad(scalar, leaf[-1], retain_graph=True)
                    gradient = gradient.reshape(last, -1)
                    if bool(gradient.isfinite().all()):
                        break
                outside = torch.ones(last, dtype=torch.bool, device=gradient.device)
                outside[allowed] = False
                # NaN is no sign of a leak: the root of a 0, say, has that derivative.
                leaks.append(bool(((gradient != 0) & gradient.isfinite())[outside].any()))
    except (MemoryError, torch.OutOfMemoryError, ValueError):
        raise
    except Exception:  # layers without a backward can score: the comparison is made all the same
        leaks = []
    finally:
        hook.remove()
    if any(leaks):
        raise ValueError(f"model: got {type(model).__name__}, whose hidden states {what}; {_WAY_OUT}")
