"""Causal LMs: loading, compress tokens, checks of their weights, and the parts that encoder and decoder use."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from autoregembed import distributed, loading
from autoregembed.files import CheckpointError, atomic_folder, read_json, write_json
from autoregembed.modalities import reads_more_than_text, text_model
from autoregembed.prompt import COMPRESS_INIT

RECIPE = "autoregembed.json"
RECIPE_VERSION = 2  # 1: the fields of 0.2


@contextlib.contextmanager
def wrap_load_errors(source: str, name: str = "model") -> Iterator[None]:
    """Turns what Transformers, tokenizers and safetensors raise over a damaged or hostile folder into CheckpointError.

    They raise any exception (KeyError, AttributeError, a bare Exception), hence all but MemoryError are caught.
    """
    try:
        yield
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        short = source if len(source) < 1000 else source[:1000] + "…"
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{name}: got {short!r}, which cannot be loaded: {reason[:2000]}") from error


def require_source(source: str, name: str = "model", hint: str = "a folder or a hub id") -> None:
    """Raises CheckpointError for a path that does not exist, which Transformers would take for a hub id."""
    local = source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source
    if local and not os.path.exists(source):
        raise CheckpointError(f"{name}: got {source!r}, which cannot be loaded: it does not exist; expected {hint}")


def original_in(recipe: dict, source: str) -> tuple[str, str | None]:
    """The original model that the recipe of the folder `source` names, and its GGUF file.

    Raises:
        CheckpointError: it was a folder, which is gone; the message says who names it.
    """
    original, gguf_file = recipe["decoder"], recipe.get("decoder_gguf_file")
    hint = (
        f"the model that {source!r} was trained from, as its {RECIPE} says: if it has moved, give its new place as "
        "`decoder` (autoregembed train), or to Decoder.from_pretrained, or correct that file"
    )
    require_source(original, "decoder", hint)
    return original, gguf_file


def split_gguf(name_or_path: str | Path, gguf_file: str | None = None) -> tuple[str, str | None]:
    """(hub id or folder, GGUF file in it or None): a path that ends in .gguf is taken apart.

    Raises:
        ValueError: a path to a GGUF file, and a `gguf_file` besides.
    """
    source = os.path.expanduser(str(name_or_path))
    if not source.endswith(".gguf"):
        return source, gguf_file
    if gguf_file is not None:
        raise ValueError(f"gguf_file: got {gguf_file!r}, expected None, since {source!r} is a GGUF file")
    return str(Path(source).parent), Path(source).name


def load_causal_lm(
    source: str,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> tuple[Any, Any, dict]:
    """A causal LM, its tokenizer and its recipe (the `autoregembed.json` of a folder this library wrote, else {}).

    An exported encoder has no head; its base model is returned.

    Args:
        quantization: `quantization_config` and `device_map` of `from_pretrained`; not with a GGUF file.

    Raises:
        CheckpointError: the source cannot be loaded, or lacks weights, which Transformers would initialize at random.
    """
    source = os.path.expanduser(source)
    require_source(source)
    options = {"trust_remote_code": trust_remote_code, **({"gguf_file": gguf_file} if gguf_file else {})}
    weights: dict[str, Any] = {} if gguf_file else {"use_safetensors": True}  # never a pickle
    weights |= quantization or {}
    recipe = read_recipe(source)
    loader = AutoModelForCausalLM if recipe.get("lm_head", True) else AutoModel
    with wrap_load_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        whole = functools.partial(_read_whole, loader, source, dtype, {**options, **weights})
        if loading.comes_in_parts():
            model = loading.model_in_parts(loader, source, dtype, whole, **options)
        elif loading.absent():
            model = loading.empty_model(loader, source, dtype, **options)
        else:
            model = whole()
    return text_model(model), tokenizer, recipe


def _read_whole(loader: Any, source: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """The model of `source` with its weights, of all modalities that it has."""
    model, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if "gguf_file" in options:
        # Transformers marks such a model as quantised and refuses to save it.
        plain = type(model)._from_config(model.config, dtype=dtype)
        if hasattr(plain.config, "quantization_config"):
            del plain.config.quantization_config
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        return plain
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"model: got {source!r}, which cannot be loaded: it has no {missing[0]} ({len(missing)} weights missing)"
        )
    return model


_RECIPE_TYPES: dict[str, Any] = {
    "decoder": str,
    "decoder_gguf_file": str,
    "output_rms_initialized": bool,
    "instruction": str,
    "bos_token_id": int,
    "max_length": int,
    "z_norm": str,
    "decoder_add_bos": bool,
    "lm_head": bool,
    "adapter": dict,
    "centering": dict,
}


def read_recipe(source: str) -> dict:
    """`autoregembed.json` of a folder or hub repository that this library wrote, else {}.

    Raises:
        CheckpointError: it is damaged, of another version, or a value has another type than this library writes.
    """
    try:
        found = cached_file(
            source, RECIPE,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
    except OSError:  # no such repository: loading the weights says so
        return {}
    if found is None:
        return {}
    path = Path(found)
    recipe = read_json(path, "model")
    if (version := recipe.get("version", RECIPE_VERSION)) != RECIPE_VERSION:
        raise CheckpointError(
            f"model: got version {version!r} of {str(path)!r}, expected {RECIPE_VERSION}; CHANGELOG.md has the fields "
            "that were renamed"
        )
    for name in ("compress_token_ids", "suffix_ids"):
        ids = recipe.get(name, [])
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise CheckpointError(f"model: got {name} {ids!r} in {str(path)!r}, expected a list of ids")
    prompts = recipe.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"model: got prompts {prompts!r} in {str(path)!r}, expected texts by name")
    for name, kind in _RECIPE_TYPES.items():
        value = recipe.get(name)
        if value is not None and type(value) is not kind:
            raise CheckpointError(
                f"model: got {name} {value!r} in {str(path)!r}, expected a {kind.__name__} or nothing"
            )
    return recipe


def original_of(source: str, gguf_file: str | None) -> dict[str, str | None]:
    """The part of a recipe that names the model which training starts from, and which its decoder is."""
    return {
        "decoder": str(Path(source).resolve()) if os.path.exists(source) else source,
        "decoder_gguf_file": gguf_file,
    }


def compress_embeddings(model: Any, tokenizer: Any, k: int, words: str | None = None) -> tuple[list[int], Tensor]:
    """Ids for K compress tokens, behind the vocabulary, and the embeddings (K, D) that they start from.

    The ids are rows of the embedding matrix, or would be, and not entries of the tokenizer, so no text can contain one.
    The embeddings are those of the tokens of `words` (by default " ,"), as often as it takes, plus noise of a tenth
    of the matrix' standard deviation: an LM knows how to go on after words, and reads a random vector as noise. The
    model stays as it is.

    Raises:
        ValueError: K outside 1..positions - 1; `words` without a token.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 16
    if not 1 <= k < limit:
        raise ValueError(f"num_compress_tokens: got {k}, expected 1..{limit - 1}")
    used, embedding = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings()
    tokens = tokenizer(COMPRESS_INIT if words is None else words, add_special_tokens=False)["input_ids"]
    if not tokens and words is not None:
        raise ValueError(f"compress_init: got {words!r}, expected a text of at least one token")

    def statistics() -> tuple[Tensor, Tensor]:
        n = min(used, len(embedding.weight))  # without the random rows of tokens that the model never had
        sums = [(x.double().sum(0), x.double().square().sum(0)) for x in loading.table_blocks(embedding, n)]
        total, squares = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        spread = ((squares - total.square() / n).clamp(min=0) / (n - 1)).sqrt().float()
        if not tokens:
            return (total / n).float(), spread
        return loading.table_rows(embedding, [tokens[i % len(tokens)] for i in range(k)]).float(), spread

    rows, spread = loading.once(statistics)
    noise = torch.randn(k, len(spread), generator=torch.Generator().manual_seed(0)).to(spread.device)
    return list(range(used, used + k)), (rows + 0.1 * spread * noise).to(embedding.weight.dtype)


def require_untrained(ids: list[int], words: str | None) -> None:
    """Raises CheckpointError for words that compress tokens with trained embeddings, `ids`, are to start from."""
    if ids and words is not None:
        raise CheckpointError(
            f"compress_init: got {words!r} for {len(ids)} compress tokens that are trained, expected none"
        )


def add_compress_tokens(model: Any, tokenizer: Any, k: int, words: str | None = None) -> list[int]:
    """Writes `compress_embeddings` into the embedding matrix, which grows if necessary; returns their ids."""
    ids, rows = compress_embeddings(model, tokenizer, k, words)
    write_compress_rows(model, ids, rows)
    return ids


@torch.no_grad()
def write_compress_rows(model: Any, ids: list[int], rows: Tensor) -> None:  # rows (K, D)
    """Writes rows into the embedding matrix, which grows where it has to."""
    before, head = model.get_input_embeddings().weight.shape[0], model.get_output_embeddings()
    if max(ids) >= before:
        tied = head is None or head.weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        if not tied:  # Transformers would draw rows that nothing reads
            model.get_output_embeddings().weight[before:] = 0
    weight = model.get_input_embeddings().weight
    weight[ids] = rows.to(weight)


def embed_compress_rows(model: Any, ids: Tensor, cu_seqlens: Tensor, rows: Tensor) -> Tensor:
    """Input embeddings (T, D) of a pack (T,) whose texts end in K compress tokens with rows (K, D) of their own."""
    embedding, k = model.get_input_embeddings(), len(rows)
    x = embedding(ids.clamp(max=embedding.weight.shape[0] - 1))  # a compress token may have no row in it
    # Gemma's embedding module multiplies what it reads from its matrix.
    own = (rows * getattr(embedding, "embed_scale", 1.0)).to(x.dtype)
    places = cu_seqlens[1:, None].long() - k + torch.arange(k, device=x.device)  # (B, K)
    return x.index_copy(0, places.flatten(), own.repeat(len(places), 1))


def module_name(model: nn.Module, module: nn.Module) -> str:
    """The name of a submodule, as PEFT's configurations take it."""
    return next(name for name, found in model.named_modules() if found is module)


def save_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    recipe: dict,
    *,
    adapter: Path | None = None,
    overwrite: bool = True,
    empty: bool = False,
) -> Path:
    """Writes a Hugging Face folder with the recipe beside it, and a copy of the folder `adapter` in it, whole or not
    at all; with `empty`, all but the weights."""
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        if empty:
            model.save_pretrained(temporary, state_dict={"none": torch.zeros(1)})
            (temporary / SAFE_WEIGHTS_NAME).unlink()
        else:
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if adapter is not None:
            shutil.copytree(adapter, temporary / "adapter")
        write_json(temporary / RECIPE, recipe)
    return folder


def base_model(model: Any) -> Any:
    """The part of a causal LM (PEFT-wrapped or not) that maps ids to last hidden states.

    Raises:
        ValueError: a model of several modalities, or a PeftModel that puts virtual tokens before a text, which lie
            outside that part.
    """
    if reads_more_than_text(model):
        raise ValueError(
            f"model: got {type(model).__name__}, which reads more than text, expected its text part alone: "
            "autoregembed.modalities.text_model(model)"
        )
    if hasattr(model, "get_base_model"):
        for config in model.peft_config.values():
            if config.is_prompt_learning:
                raise ValueError(
                    f"model: got an adapter of type {config.peft_type.value}, expected those inside the layers, "
                    "such as LoRA"
                )
        model = model.get_base_model()
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    # Some models call their head "decoder" (ModernBERT), others find themselves (Llama 4).
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for module in (found, *model.children()):
        parts = list(module.modules())
        if head is None or (all(m is not head for m in parts) and any(m is embedding for m in parts)):
            return module
    raise ValueError(
        f"model: got {type(model).__name__}, in which no module leads from ids to last hidden states, expected one "
        "with a base model, such as Llama, Qwen or Gemma"
    )


# Which Encoder or Decoder has a base model; a copy of the model is another one.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def claim(model: Any, owner: nn.Module) -> None:
    """Records that `owner`, an Encoder or a Decoder, has the model.

    Raises:
        ValueError: one of the other kind has it: a decoder would score with what the encoder trains, and freeze it.
    """
    owners = _owners.setdefault(base_model(model), weakref.WeakSet())
    for known in owners:
        if type(known) is not type(owner):
            raise ValueError(
                f"model: got one that the {type(known).__name__} has, expected another one for the "
                f"{type(owner).__name__}: load it again (Decoder.from_pretrained), or copy it (copy.deepcopy) before "
                "adapters are added"
            )
    owners.add(owner)


def require_no_hidden_adapters(model: Any) -> None:
    """Raises ValueError for a model whose layers PEFT has replaced in place: it would score with the adapters."""
    # A PeftModel, or a model that has loaded an adapter by itself: there the adapters are meant.
    if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
        return
    for name, module in model.named_modules():
        if any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            raise ValueError(
                f"model: got an adapter in {name}, which get_peft_model has put there in place, expected the model "
                "without adapters: load it again (Decoder.from_pretrained), or copy it before get_peft_model"
            )


def max_positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fit_length(name: str, length: int | None, positions: int | None, *, default: int = 512) -> int:
    """`length` if it fits; without one, the default or as many positions as there are.

    Raises:
        ValueError: more than `positions`.
    """
    if length is None:
        return default if positions is None else min(default, positions)
    if positions is not None and length > positions:
        raise ValueError(f"{name}: got {length}, expected at most {positions} (the model's positions)")
    return length


def final_norm(model: Any) -> nn.Module:
    """The norm that yields a causal LM's last hidden states (its active copy, when PEFT trains one).

    Raises:
        ValueError: the base model has no norm behind its layers.
    """
    base = base_model(model)
    width = base.config.get_text_config().hidden_size
    for module in reversed(list(base.children())):
        module = getattr(module, "modules_to_save", {"default": module})["default"]
        weight = getattr(module, "weight", None)
        if weight is not None and tuple(weight.shape) == (width,):
            return module
    raise ValueError(f"model: got no norm behind the layers of {type(base).__name__}, expected one")


@torch.no_grad()
def scale_output(norm: nn.Module, gain: Tensor) -> None:  # gain (D,)
    """Multiplies the output of a norm by `gain`, through its weight (and bias), whole or sharded.

    Raises:
        ValueError: the norm's output is proportional neither to its weight nor to 1 + weight.
    """
    parameters: dict[str, Tensor] = dict(norm.named_parameters(recurse=False))
    old = {name: distributed.to_full_tensor(p).clone() for name, p in parameters.items()}
    gain = gain.to(old["weight"])
    x = torch.randn(4, len(gain), generator=torch.Generator().manual_seed(0)).to(gain)
    wanted = functional_call(norm, old, (x,)) * gain
    for offset in (0.0, 1.0):  # Gemma's norm multiplies by 1 + weight
        new = {name: (p + offset) * gain - offset if name == "weight" else p * gain for name, p in old.items()}
        if torch.allclose(functional_call(norm, new, (x,)), wanted, rtol=64 * torch.finfo(gain.dtype).eps, atol=1e-6):
            for name, value in new.items():
                parameters[name].copy_(distributed.shard_like(value, parameters[name]))
            return
    raise ValueError(f"model: got a final {type(norm).__name__}, expected one that scales with its weight")


def is_plain(parameter: Tensor) -> bool:
    """Whether a parameter is a Tensor and not a subclass with its own storage, such as a quantised one."""
    return loading.absent() or type(parameter.data) is Tensor


@loading.reads_values
def require_loaded(model: nn.Module) -> None:
    """Raises ValueError naming the first parameter that is not in memory: on the meta device, or offloaded."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: got no values of {name} in memory (the meta device, or offloaded to CPU or disk by "
                "device_map), expected all weights on one device: load it without device_map, in fewer bits, or shard "
                "it over processes (docs/howto/distributed.md)"
            )


def describe_dtypes(model: nn.Module) -> str:
    """Which weights are of which dtype and what to do about it, for an error; "" where all are of one."""
    dtypes = {p.dtype: name for name, p in reversed(list(model.named_parameters())) if p.is_floating_point()}
    kinds = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in dtypes.items())
    return f", with weights of {kinds}, which model.to(dtype) makes one" if len(dtypes) > 1 else ""


def require_unadapted_head(model: Any) -> None:
    """Raises ValueError for an adapter or a trained copy in the head: an encoder never reads it, so it cannot learn."""
    head = model.get_output_embeddings()
    if head is None:
        return
    adapted = any(cls.__name__ == "BaseTunerLayer" for cls in type(head).__mro__)
    if adapted or hasattr(head, "modules_to_save"):
        raise ValueError(
            f"model: got an adapter in {module_name(model, head)}, the head, which an encoder never reads, expected "
            "adapters in its layers: leave the head out of target_modules (lora_targets) and modules_to_save"
        )


@loading.reads_values
def require_finite(model: nn.Module) -> None:
    """Raises ValueError naming the first parameter that holds a NaN or an infinity; quantised ones cannot."""
    for name, parameter in model.named_parameters():
        if is_plain(parameter) and parameter.is_floating_point() and not bool(parameter.detach().isfinite().all()):
            raise ValueError(f"model: got a non-finite value in {name}, expected finite weights")
