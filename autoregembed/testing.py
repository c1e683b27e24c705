"""For tests of this package and of code that uses it: the numeric rule, and tiny models and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def tensor_core_depth(x: Tensor) -> int:
    """`depth` for `assert_accurate`: D of x (N, D) where its GEMM runs on tensor cores in 16 bits, else 0."""
    return x.shape[-1] if x.is_cuda and x.element_size() == 2 else 0


def assert_accurate(
    found: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    max_logit: float = 0.0,
    gradient_factor: float = 1.0,
    depth: int = 0,
) -> None:
    """Error at most twice eager fp32's, with room for rounding to the output's dtype and for the rounding of lse.

        max|found − exact| ≤ 2 · (max|eager − exact| + eps · max|exact|)
                             + (4 · eps32 + depth / 16 · 2⁻²⁴) · max_logit · gradient_factor

    The term in `depth` is for tensor cores. They add 16 products of 16-bit operands exactly and cut the fp32 sum off
    where other units round: D / 16 cuts, each smaller than 2⁻²³ of the sum so far, all towards zero. The sums so far
    of a logit are half of it on average where they grow evenly, as they do for a row that points at its target; so a
    logit loses less than D / 16 · 2⁻²⁴ of itself. The cuts share a sign and do not cancel: 1.5e-5 at D = 4,096, beside
    4 · eps32 = 4.8e-7 for lse. The GEMM of the gradient, of depth V, needs no such term: it loses at most V / 16 · 2⁻²⁴
    (6e-4 for V = 151,936), less than the eps of the 16-bit gradient that it is rounded to.

    Args:
        found: the result under test, any shape and dtype; eps is that of its dtype.
        eager: eager PyTorch's result in fp32 on the same, upcast, inputs.
        exact: the float64 result.
        max_logit: largest |logit| that went into an lse.
        gradient_factor: for a gradient, max|upstream| · max|weight|.
        depth: D of logits from 16-bit operands on a GPU (`tensor_core_depth`); 0 elsewhere.
    """
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    if found.numel() == 0:
        return
    error = (found.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    logits = (4 * EPS32 + depth / 16 * 2**-24) * max_logit * gradient_factor
    bound = 2 * (eager_error + torch.finfo(found.dtype).eps * largest) + logits
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
