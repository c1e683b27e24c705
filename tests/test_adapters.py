"""PEFT adapters and quantised layers in encoder and decoder: used, or refused, never ignored."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from autoregembed import Decoder, Encoder, models
from autoregembed.encoder import text_embedding
from autoregembed.export import merged
from autoregembed.testing import tiny_model, tiny_tokenizer

TARGETS = [[5, 6, 7], [8, 9]]


def lm(**options):
    return tiny_model(hidden_size=64, head_dim=16, **options)


def adapted(model, **options):
    """With an adapter that has been trained."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def quantised(model, head: bool = False):
    quantization = pytest.importorskip("torchao.quantization")

    def wanted(module, name):
        return isinstance(module, nn.Linear) and (head or "lm_head" not in name)

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=wanted)
    return model


def four_bits(model):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    model.model.layers[1].self_attn.q_proj = layer.to("cpu")
    return model


def virtual_tokens(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def z_of(n: int = 2, k: int = 3) -> torch.Tensor:
    return torch.randn(n, k, 64, generator=torch.Generator().manual_seed(0))


def scores(model, z: torch.Tensor) -> torch.Tensor:
    """log p(target | z) from the model's own modules and logits, one pair at a time."""
    out = []
    for i, target in enumerate(TARGETS):
        inputs = torch.cat([z[i : i + 1], model.get_input_embeddings()(torch.tensor([target]))], 1)
        logits = model(inputs_embeds=inputs).logits[0, z.shape[1] - 1 :].log_softmax(-1)
        out.append(logits.gather(1, torch.tensor([*target, 2])[:, None]).sum())
    return torch.stack(out)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(lm(), target_modules=["q_proj", "down_proj"]),
        lambda: adapted(lm(), target_modules=["q_proj"], bias="all"),
        lambda: adapted(lm(), target_modules=["q_proj"], trainable_token_indices=[5, 6, 8]),
        lambda: adapted(lm(), target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        lambda: adapted(lm(), target_modules=["lm_head", "embed_tokens"]).merge_and_unload(),
        lambda: quantised(lm()),
    ],
    ids=["lora", "bias", "tokens", "embeddings", "merged", "int8"],
)
def test_a_decoder_scores_with_what_it_was_given(make):
    decoder, model = Decoder(make()), make()
    found, expected = z_of().requires_grad_(), z_of().requires_grad_()
    value = decoder.logprob(found, TARGETS)
    torch.testing.assert_close(value, scores(model, expected), rtol=1e-5, atol=1e-4)
    assert (value - Decoder(lm()).logprob(z_of(), TARGETS)).abs().max() > 1e-2
    value.sum().backward()
    scores(model, expected).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted(lm(), target_modules=["lm_head"]), "got an lm_head of type Linear, .*merge_and_unload"),
        (
            lambda: adapted(lm(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "got an lm_head of type ModulesToSaveWrapper",
        ),
        (
            lambda: adapted(lm(tie_word_embeddings=True), target_modules=["q_proj"], trainable_token_indices=[5]),
            "got an lm_head of type TrainableTokensWrapper",
        ),
        (lambda: adapted(lm(), target_modules=["embed_tokens"]), "got input embeddings of type Embedding that are"),
        (lambda: quantised(lm(), head=True), "got an lm_head of type Int8Tensor"),
        (lambda: four_bits(lm()), "got a Linear4bit on a CPU in model.layers.1.self_attn.q_proj"),
        (
            lambda: virtual_tokens(lm()),
            "got an adapter of type PROMPT_TUNING",
        ),
    ],
    ids=["lora head", "saved head", "tied tokens", "lora embeddings", "int8 head", "4 bits", "prompt tuning"],
)
def test_what_a_decoder_would_ignore_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^model: {message}"):
        Decoder(make())


@pytest.mark.parametrize("make", [four_bits, virtual_tokens])
def test_what_an_encoder_would_ignore_is_refused(make):
    with pytest.raises(ValueError, match=r"^model: got a(n adapter of type PROMPT_TUNING| Linear4bit on a CPU)"):
        Encoder(make(lm()), compress_token_ids=[5, 6])


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_and_compress_tokens_train_and_tied_embeddings_stay_tied(tied, quantise, tmp_path):
    """LoRA, and LoRA over 8-bit layers, through a step of training, merging and saving."""
    tokenizer = tiny_tokenizer()
    model = lm(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    ids = models.add_compress_tokens(model, tokenizer, 2)
    if quantise:
        model = quantised(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], trainable_token_indices={"embed_tokens": ids})
    encoder = Encoder(get_peft_model(model, config), compress_token_ids=ids, bos_token_id=1)
    before = {n: p.detach().clone() for n, p in encoder.named_parameters() if p.requires_grad}
    first = encoder([[5, 6, 7], [8, 9]])
    decoder = Decoder(lm(vocab_size=len(tokenizer)))
    optimiser = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # an adapter's A has no gradient before its B has left zero
        (-decoder.logprob(encoder([[5, 6, 7], [8, 9]]), TARGETS).sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert all(not torch.equal(p, before[n]) for n, p in encoder.named_parameters() if n in before)
    assert sum("trainable_tokens" in n for n in before) == 1
    z = encoder([[5, 6, 7], [8, 9]])
    assert (text_embedding(z) - text_embedding(first)).abs().max() > 1e-3
    if quantise:
        with pytest.raises(ValueError, match=r"^model: got quantised weights in"):
            merged(encoder)
        model = lm(vocab_size=len(tokenizer), tie_word_embeddings=tied)
        models.add_compress_tokens(model, tokenizer, 2)
        unquantised = get_peft_model(model, config)
        set_peft_model_state_dict(unquantised, get_peft_model_state_dict(encoder.model, save_embedding_layers=False))
        again = Encoder(unquantised, compress_token_ids=ids, bos_token_id=1)
        found = Encoder(merged(again), compress_token_ids=ids, bos_token_id=1)([[5, 6, 7], [8, 9]])
        assert (found - z).norm() < 0.3 * (first - z).norm(), "int8 rounds less than training moves"
        return
    whole = merged(encoder)
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) is tied
    models.save_model(tmp_path / "model", whole, tokenizer, {})
    again, _, _ = models.load_causal_lm(str(tmp_path / "model"))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    found = Encoder(again, compress_token_ids=ids, bos_token_id=1)([[5, 6, 7], [8, 9]])
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: copy.deepcopy(m)], ids=["in place", "copied afterwards"])
def test_a_decoder_does_not_score_with_the_adapters_of_an_encoder(wrap):
    base = lm()
    wrapped = adapted(base, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"^model: got an adapter in model\.layers\.0\.\S+q_proj.*load it again"):
        Decoder(wrap(base))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained, "and nothing was frozen"
