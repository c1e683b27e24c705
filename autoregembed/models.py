"""Causal LMs: loading, compress tokens, checks of their weights, and the parts that encoder and decoder use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoregembed.files import CheckpointError, atomic_folder, read_json, write_json

RECIPE = "autoregembed.json"


@contextlib.contextmanager
def wrap_load_errors(source: str) -> Iterator[None]:
    """What Transformers, tokenizers and safetensors raise over a folder that is damaged or hostile, as CheckpointError.

    They raise whatever they stumble over (KeyError, AttributeError, a bare Exception), hence all but a lack of memory.
    """
    try:
        yield
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        short = source if len(source) < 1000 else source[:1000] + "…"
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"model: got {short!r}, which cannot be loaded: {reason[:2000]}") from error


def load_causal_lm(
    source: str,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, dict]:
    """A causal LM, its tokenizer and its recipe: `autoregembed.json` of a folder this library wrote, else {}.

    Raises:
        CheckpointError: the source cannot be loaded, or lacks weights that Transformers would then draw at random.
    """
    options = {"trust_remote_code": trust_remote_code, **({"gguf_file": gguf_file} if gguf_file else {})}
    weights: dict[str, Any] = {} if gguf_file else {"use_safetensors": True}  # never a pickle
    with wrap_load_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options, **weights
        )
    recipe = _read_recipe(Path(source) / RECIPE) if (Path(source) / RECIPE).is_file() else {}
    missing = sorted(info["missing_keys"])
    if missing and not gguf_file:
        raise CheckpointError(
            f"model: got {source!r}, which cannot be loaded: it has no {missing[0]} ({len(missing)} weights missing)"
        )
    if gguf_file:
        # Transformers marks such a model as quantised and refuses to save it.
        plain = type(model)._from_config(model.config, dtype=dtype)
        if hasattr(plain.config, "quantization_config"):
            del plain.config.quantization_config
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        model = plain
    return model, tokenizer, recipe


def _read_recipe(path: Path) -> dict:
    recipe = read_json(path, "model")
    ids, kinds = (
        recipe.get("compress_token_ids", []),
        {"decoder": str, "decoder_gguf_file": str, "output_rms_initialized": bool},
    )
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise CheckpointError(f"model: got compress_token_ids {ids!r} in {str(path)!r}, expected a list of ids")
    for name, kind in kinds.items():
        if not isinstance(recipe.get(name), kind | None):
            raise CheckpointError(
                f"model: got {name} {recipe[name]!r} in {str(path)!r}, expected a {kind.__name__} or nothing"
            )
    return recipe


def add_compress_tokens(model: Any, tokenizer, k: int) -> list[int]:
    """Makes room for K compress tokens behind the vocabulary; returns their ids.

    They are rows of the embedding matrix and no entries of the tokenizer, so no text can contain one. They start at the
    embedding of a blank, a tenth of the matrix' spread apart: what the model has read often leaves its activations
    calm, a random vector does not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 16
    if not 1 <= k < limit:
        raise ValueError(f"num_compress_tokens: got {k}, expected 1..{limit - 1}")
    used = max(tokenizer.get_vocab().values()) + 1
    ids = list(range(used, used + k))
    if ids[-1] >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        known = weight[:used].float()
        noise = torch.randn(k, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        blank = tokenizer(" ", add_special_tokens=False)["input_ids"]
        center = known[blank[0]] if blank else known.mean(0)
        weight[ids] = (center + 0.1 * known.std(0) * noise).to(weight.dtype)
    return ids


def save_model(folder: Path, model: Any, tokenizer, recipe: dict, *, overwrite: bool = True) -> Path:
    """Writes a Hugging Face folder with the recipe beside it, whole or not at all."""
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECIPE, recipe)
    return folder


def base_model(model: Any) -> Any:
    """The part of a causal LM (PEFT-wrapped or not) that maps ids to last hidden states.

    Raises:
        ValueError: a PeftModel that puts virtual tokens before a text, which lie outside that part.
    """
    if hasattr(model, "get_base_model"):
        for config in model.peft_config.values():
            if config.is_prompt_learning:
                raise ValueError(
                    f"model: got an adapter of type {config.peft_type.value}, expected those inside the layers, "
                    "such as LoRA"
                )
        model = model.get_base_model()
    return model.get_decoder() if hasattr(model, "lm_head") or hasattr(model, "get_decoder") else model


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
        raise ValueError(f"{name}: got {length}, expected at most {positions}, what the model has positions for")
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
    """Multiplies the output of a norm by `gain`, through its weight (and bias).

    Raises:
        ValueError: the norm's output is proportional neither to its weight nor to 1 + weight.
    """
    parameters: dict[str, Tensor] = dict(norm.named_parameters(recurse=False))
    weight = parameters["weight"]
    gain = gain.to(weight)
    x = torch.randn(4, len(gain), generator=torch.Generator().manual_seed(0)).to(weight)
    wanted = norm(x) * gain
    old = {name: p.clone() for name, p in parameters.items()}
    for offset in (0.0, 1.0):  # Gemma's norm multiplies by 1 + weight
        weight.copy_((old["weight"] + offset) * gain - offset)
        if "bias" in old:
            parameters["bias"].copy_(old["bias"] * gain)
        if torch.allclose(norm(x), wanted, rtol=64 * torch.finfo(weight.dtype).eps, atol=1e-6):
            return
    for name, value in old.items():
        parameters[name].copy_(value)
    raise ValueError(f"model: got a final {type(norm).__name__}, expected one that scales with its weight")


def is_plain(parameter: Tensor) -> bool:
    """Whether it is no subclass of Tensor with storage of its own kind, such as a quantised one."""
    return type(parameter.data) is Tensor


def require_finite(model: nn.Module) -> None:
    """Raises ValueError naming the first parameter that holds a NaN or an infinity; quantised ones cannot."""
    for name, parameter in model.named_parameters():
        if is_plain(parameter) and parameter.is_floating_point() and not bool(parameter.detach().isfinite().all()):
            raise ValueError(f"model: got a non-finite value in {name}, expected finite weights")


def require_gradients(model: nn.Module) -> None:
    """Raises ValueError for bitsandbytes' 4-bit layers on a CPU.

    An evaluation repacks their weights for its own kernel, and from then on their backward multiplies by garbage.
    """
    for name, module in model.named_modules():
        four_bit = any(cls.__name__ == "Linear4bit" for cls in type(module).__mro__)
        if four_bit and module.weight.device.type == "cpu":
            raise ValueError(
                f"model: got a {type(module).__name__} on a CPU in {name}, whose gradient is wrong there after an "
                "evaluation, expected a GPU, or 8 bits (torchao), or model.dequantize()"
            )
