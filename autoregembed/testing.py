"""For tests of this package and of code that uses it: the numeric rule, and tiny models and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def assert_accurate(
    found: Tensor, eager: Tensor, exact: Tensor, *, max_logit: float = 0.0, gradient_factor: float = 1.0
) -> None:
    """Error at most twice eager fp32's, with room for rounding to the output's dtype and for the rounding of lse.

        max|found − exact| ≤ 2 · (max|eager − exact| + eps · max|exact|) + 4 · eps32 · max_logit · gradient_factor

    Args:
        found: the result under test, any shape and dtype; eps is that of its dtype.
        eager: eager PyTorch's result in fp32 on the same, upcast, inputs.
        exact: the float64 result.
        max_logit: largest |logit| that went into an lse.
        gradient_factor: for a gradient, max|upstream| · max|weight|.
    """
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    if found.numel() == 0:
        return
    error = (found.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    bound = 2 * (eager_error + torch.finfo(found.dtype).eps * largest) + 4 * EPS32 * max_logit * gradient_factor
    assert error <= bound, f"error {error:.3g} above {bound:.3g} (eager fp32: {eager_error:.3g}, max {largest:.3g})"


def tiny_model(
    architecture: str = "llama", *, vocab_size: int = 320, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A seeded random causal LM of a Hugging Face architecture: 2 layers, D = 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    config = AutoConfig.for_model(architecture, **{**sizes, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tiny_tokenizer(texts: Iterable[str] = ()) -> Any:
    """A byte-level BPE tokenizer with <unk>, <s>, </s> as ids 0, 1, 2, trained on `texts`; at most 320 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
