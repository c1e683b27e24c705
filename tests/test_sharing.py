"""One frozen base for encoder and decoder: what two copies compute, with the weights in memory once."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from autoregembed import Decoder, Encoder, files
from autoregembed.export import merged
from autoregembed.sharing import storage_bytes, without_adapters
from autoregembed.testing import tiny_model

IDS, TARGETS = [[5, 6, 7], [8, 9, 10, 11], [12]], [[20, 21], [22], [23, 24, 25]]
COMPRESS = [317, 318, 330]  # the last one has no row in the matrix
Z_INDEX = [0, 1, 2, 0]  # the first z scores a negative too
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "embed_in", "query_key_value"]},
}


def lm(architecture: str, **options):
    return tiny_model(architecture, dtype=torch.float64, **options)


def wrap(model, norm: str | None = None, **options):
    """With an adapter that has been trained."""
    config = LoraConfig(r=2, modules_to_save=norm and [norm], **{"target_modules": "all-linear", **options})
    torch.manual_seed(3)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.double() + 0.05 * torch.randn(parameter.shape).double()
    return wrapped


def encoder_of(wrapped) -> Encoder:
    rows = 0.3 * torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Encoder(
        wrapped, compress_token_ids=COMPRESS, bos_token_id=1, attention="sdpa", own_compress_rows=rows
    ).train()


def step(encoder, decoder, token_budget=None):
    """z, scores and gradients by name of a loss that weighs its scores unevenly."""
    encoder.zero_grad(set_to_none=True)
    torch.manual_seed(7)  # of the dropout
    z = encoder(IDS, token_budget=token_budget)
    scores = decoder.logprob(z, [*TARGETS, [30, 31]], Z_INDEX, token_budget)
    (scores * torch.tensor([0.3, -1.0, 2.0, 0.7])).sum().backward()
    return z.detach(), scores.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_shared_and_separate_weights_give_the_same_scores_and_gradients(architecture, adapter):
    norm = {"gpt_neox": "gpt_neox.final_layer_norm"}.get(architecture, "model.norm")
    plain = lm(architecture)
    separate = encoder_of(wrap(copy.deepcopy(plain), norm, **ADAPTERS[adapter]))
    two = Decoder(copy.deepcopy(plain), z_norm="match_rms", bos_token_id=1, attention="sdpa")
    encoder = encoder_of(wrap(plain, norm, **ADAPTERS[adapter]))
    one = Decoder.sharing(encoder, z_norm="match_rms", add_bos=True, attention="sdpa")
    for budget in (None, 9):  # one pass of each; several, run again or pair by pair
        expected = step(separate, two, budget)
        assert len(expected[2]) > 5
        assert all(bool(g.abs().max() > 0) for g in expected[2].values())
        torch.testing.assert_close(step(encoder, one, budget), expected, rtol=1e-9, atol=1e-11)
    encoder.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(encoder, one, 9), expected, rtol=1e-9, atol=1e-11)


def test_adapters_matter_to_the_encoder_alone():
    """The other side of the test above: what it compares is neither two plain models nor two adapted ones."""
    plain = lm("llama")
    encoder = encoder_of(wrap(copy.deepcopy(plain)))
    decoder, z = Decoder.sharing(encoder), torch.randn(3, 3, 32, dtype=torch.float64)
    found = decoder.logprob(z, TARGETS)
    assert torch.equal(found, Decoder(copy.deepcopy(plain)).logprob(z, TARGETS))
    adapted = Decoder(merged(encoder)).logprob(z, TARGETS)
    assert (found - adapted).abs().min() > 1e-2
    assert (encoder(IDS) - encoder_of(wrap(copy.deepcopy(plain), init_lora_weights=False))(IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_in_memory_once_and_stay_as_they_are(tied):
    plain = lm("llama", tie_word_embeddings=tied)
    weights = storage_bytes(plain.parameters())
    before = files.weights_fingerprint(plain)
    encoder = encoder_of(wrap(plain))
    decoder = Decoder.sharing(encoder)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    everything = [*encoder.parameters(), *decoder.parameters()]
    assert storage_bytes(everything) == weights + storage_bytes(trained)
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    scores = [step(encoder, decoder)[1]]
    optimizer.step()
    scores.append(step(encoder, decoder)[1])
    assert (scores[0] - scores[1]).abs().min() > 1e-3
    assert files.weights_fingerprint(without_adapters(encoder.model)) == before
    assert storage_bytes([*encoder.parameters(), *decoder.parameters()]) == weights + storage_bytes(trained)
    decoder.to(torch.float32)  # one of them moves both
    assert {p.dtype for p in encoder.model.parameters() if not p.requires_grad} == {torch.float32}
    assert storage_bytes(everything) == weights // 2 + storage_bytes(trained)


def test_a_merged_copy_is_the_encoder_and_leaves_the_shared_weights_alone():
    encoder = encoder_of(wrap(lm("gemma2"), "model.norm", use_dora=True))
    decoder = Decoder.sharing(encoder)
    expected, before = step(encoder, decoder), files.weights_fingerprint(decoder)
    whole = merged(encoder)
    assert len(whole.get_input_embeddings().weight) == max(COMPRESS) + 1
    again = Encoder(whole, compress_token_ids=COMPRESS, bos_token_id=1)
    torch.testing.assert_close(again(IDS), expected[0], rtol=1e-9, atol=1e-11)
    assert files.weights_fingerprint(decoder) == before
    torch.testing.assert_close(step(encoder, decoder), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^model: got one that a Decoder shares, expected a copy"):
        encoder.fold_compress_rows()


def unfrozen(encoder):
    encoder.model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_(True)


def trained_elsewhere(encoder):
    encoder.original_base = False


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda e: e.model.merge_adapter(), "model: got adapters merged into weights"),
        ({}, unfrozen, r"model: got model\.layers\.1\.mlp\.up_proj\.weight trained, which encoder and decoder share"),
        ({"bias": "all"}, None, r"model: got model\.layers\.0\.self_attn\.q_proj\.bias trained"),
        ({}, trained_elsewhere, "encoder: got adapters on weights that are not the original model's"),
    ],
    ids=["merged", "unfrozen", "biases", "trained"],
)
def test_a_base_that_cannot_be_shared_is_refused(options, change, message):
    encoder = encoder_of(wrap(lm("llama", attention_bias=True), **options))
    late = change in (unfrozen,) or (not options and change is not trained_elsewhere)
    decoder = Decoder.sharing(encoder) if late else None
    if change is not None:
        change(encoder)
    with pytest.raises(ValueError, match=f"^{message}"):
        Decoder.sharing(encoder)
    if decoder is not None:  # and what has been shared before
        with pytest.raises(ValueError, match=f"^{message}"):
            step(encoder, decoder)


def test_full_fine_tuning_shares_nothing():
    encoder = encoder_of(lm("llama"))
    with pytest.raises(
        ValueError, match=r"^encoder: got a model of type LlamaForCausalLM without adapters, expected a"
    ):
        Decoder.sharing(encoder)
