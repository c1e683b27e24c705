"""Frozen weights under adapters in 8 or 4 bits: torchao's int8, and NF4 of bitsandbytes (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregembed.config import Config, ConfigError
from autoregembed.derivatives import first_order_only

QUANTIZERS = {"int8": "torchao", "nf4": "bitsandbytes"}  # values of `base_dtype`, and the package of each


def require_quantizer(config: Config, device: torch.device, *, sharded: bool) -> None:
    """Raises ConfigError for a `base_dtype` of fewer bits that a run on `device` cannot have."""
    kind = config.base_dtype
    if kind not in QUANTIZERS:
        return
    package = QUANTIZERS[kind]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"base_dtype: got {kind!r}, expected an installed {package} (the extra `quantized`)")
    if sharded:
        raise ConfigError(f"base_dtype: got {kind!r}, expected 'auto', 'fp32', 'bf16' or 'fp16' with FSDP")
    if kind == "nf4" and device.type == "cpu":
        raise ConfigError(
            "base_dtype: got 'nf4' on a CPU, expected a GPU, or 'int8': the gradient of bitsandbytes' 4-bit layers is "
            "wrong on a CPU after an evaluation"
        )


def loading_options(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise the layers as it reads them; nothing where `kind` is no quantizer.

    Embeddings and head stay in `dtype`. On a machine with a GPU the model is there at once.
    """
    if kind not in QUANTIZERS:
        return {}
    config: Any
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    place = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": place}}


def prepare_quantized(model: nn.Module) -> None:
    """Lets torchao's layers train in the memory of their bits, alone and under DDP, which wraps `model`.

    Plain layers and those of bitsandbytes stay as they are.

    Raises:
        ValueError: bitsandbytes' 4-bit layers on a CPU. An evaluation repacks their weights for its own kernel, and
            every later backward multiplies by wrong values.
    """
    for name, module in model.named_modules():
        four_bit = any(cls.__name__ == "Linear4bit" for cls in type(module).__mro__)
        if four_bit and module.weight.device.type == "cpu":
            raise ValueError(
                f"model: got a {type(module).__name__} on a CPU in {name}, whose gradient is wrong there after an "
                "evaluation, expected a GPU, or 8 bits (torchao), or model.dequantize()"
            )
        if type(module) is nn.Linear and _is_torchao(module.weight):
            module.__class__ = FrozenLinear
    # DDP would broadcast them as what they are not. Every process has read and rounded the same file.
    if known := [name for name, p in model.named_parameters() if _is_torchao(p)]:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, known)


def _is_torchao(weight: Tensor) -> bool:
    return any(cls.__name__ == "TorchAOBaseTensor" for cls in type(weight.data).__mro__)


class FrozenLinear(nn.Linear):
    """A linear layer over a frozen weight of torchao.

    torchao's own product keeps the weight for backward as it multiplies by it, in 16 or 32 bits, for every layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ; W is widened in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:  # (…, I), (O, I) -> (…, O)
        ctx.save_for_backward(weight)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.linear(x.to(dtype), weight.dequantize().to(dtype))

    @staticmethod
    @first_order_only("FrozenLinear", "model.dequantize() has them")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize().to(gradient.dtype), None


def planned(model: Any, kind: str) -> tuple[float, int]:
    """For a model whose layers are plain here: the bytes that `kind` saves, and the values of the largest layer.

    Nothing where `kind` is no quantizer.
    """
    if kind not in QUANTIZERS:
        return 0.0, 0
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weights = {id(m.weight): m.weight for m in layers if not m.weight.requires_grad}.values()
    saved = sum(w.numel() * w.element_size() - _stored_bytes(w, kind) for w in weights)
    return saved, max((w.numel() for w in weights), default=0)


def _stored_bytes(weight: Tensor, kind: str) -> float:  # (O, I)
    if kind == "int8":  # a scale for each row
        return weight.numel() + len(weight) * weight.element_size()
    return weight.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256))  # a scale in 8 bits for 64 values, and one for 256 scales


def num_elements(parameter: Tensor) -> int:
    """The number of values of a parameter, of which bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
