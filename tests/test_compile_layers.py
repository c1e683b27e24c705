"""torch.compile of a model's layers: compiled once for all packs, whatever their lengths, with the same numbers."""

import copy

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from autoregembed import Decoder, Encoder
from autoregembed.adapters import add_lora
from autoregembed.attention import compile_layers
from autoregembed.models import base_model
from autoregembed.testing import tiny_model

SIZES = [(3, 9, 9), (4, 4), (17, 2, 3, 5, 8)]


def batch(sizes):
    return [[3 + (7 * i + j) % 90 for j in range(n)] for i, n in enumerate(sizes)]


def step(encoder, decoder, sizes):
    encoder.zero_grad()
    texts = batch(sizes)
    loss = decoder.logprob(encoder(texts), texts).sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]


@pytest.fixture
def compiled():
    """Number of graphs compiled so far, and the backend that counts them."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    # Beyond the limit torch would go on in eager mode without a word.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs, backend
    torch.compiler.reset()


@pytest.mark.parametrize("lora", [False, True])
def test_no_pack_is_compiled_anew(compiled, lora):
    graphs, backend = compiled
    model = tiny_model(vocab_size=128)
    if lora:
        model = add_lora(model, [120, 121], rank=2, alpha=4.0, targets="all-linear")
    plain = Encoder(model, compress_token_ids=[120, 121], bos_token_id=1, suffix_ids=[5])
    frozen = Decoder(tiny_model(vocab_size=128), bos_token_id=1)
    wanted = [step(plain, frozen, sizes) for sizes in SIZES]
    encoder, decoder = copy.deepcopy(plain), copy.deepcopy(frozen)
    for lm in (encoder, decoder):
        compile_layers(lm.model, backend)
    counts = []
    for sizes, expected in zip(SIZES, wanted, strict=True):
        found = step(encoder, decoder, sizes)
        assert len(found) == len(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(x.abs().max() for x in expected).item())
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts[0] == counts[-1], counts


def sharing(checkpointing: bool):
    """An encoder with trained adapters, and the decoder on the same base."""
    torch.manual_seed(0)
    model = tiny_model(vocab_size=128)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model = add_lora(model, None, rank=2, alpha=4.0, targets="all-linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    encoder = Encoder(model, compress_token_ids=[120, 121], bos_token_id=1, suffix_ids=[5], own_compress_rows=True)
    return encoder, Decoder.sharing(encoder, add_bos=True, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_shared_base_is_compiled_for_encoder_and_decoder(compiled, checkpointing):
    graphs, backend = compiled
    plain, pair = sharing(checkpointing), sharing(checkpointing)
    for lm in pair:
        compile_layers(lm.model, backend)
    counts = []
    for sizes in SIZES:
        found, expected = step(*pair, sizes), step(*plain, sizes)
        assert len(found) == len(expected) > 10
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(x.abs().max() for x in expected).item())
        counts.append(len(graphs))
        with torch.no_grad():  # as an optimizer does
            for encoder in (plain[0], pair[0]):
                for parameter in encoder.parameters():
                    parameter -= 1e-3 * parameter.grad if parameter.grad is not None else 0
    assert counts[0] > 0
    assert counts[0] == counts[-1], counts


def test_layers_under_lora_are_compiled():
    model = add_lora(tiny_model(vocab_size=128), [120, 121], rank=2, alpha=4.0, targets="all-linear")
    compile_layers(model, "eager")
    assert all(layer._compiled_call_impl is not None for layer in base_model(model).layers)


def test_a_model_without_named_layers_is_refused():
    with pytest.raises(ValueError, match=r"^compile: got True for Linear, which does not name its layers"):
        compile_layers(torch.nn.Linear(2, 2))
