"""LoRA runs: which frozen weights they stand on, whether the decoder shares them, and how stages go on."""

import shutil

import pytest
import torch
from conftest import sentence, stage1, stage2, write_jsonl
from rich.console import Console
from safetensors.torch import load_file

from autoregembed import Decoder, Encoder, models
from autoregembed.build import build_models
from autoregembed.config import ConfigError
from autoregembed.export import merged
from autoregembed.files import tensor_fingerprint
from autoregembed.lora_base import place
from autoregembed.sharing import storage_bytes
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import train

LORA = {"lora_rank": 2, "max_steps": 2, "learning_rate": 0.01}
TEXTS = [sentence(i, 4 + 3 * i) for i in range(4)]


def weights(model) -> str:
    return tensor_fingerprint(dict(model.named_parameters()))


def assert_same(found: Encoder, wanted: Encoder) -> None:
    ids = wanted.tokenize(TEXTS)
    torch.testing.assert_close(found(ids), wanted(ids), rtol=1e-4, atol=1e-4)


def test_stages_stand_on_one_base_and_go_on_with_the_adapters(
    model_folder, compression_file, alignment_file, tmp_path, quiet
):
    original = models.load_causal_lm(model_folder)[0]
    first = train(
        stage1(model_folder, compression_file, tmp_path / "one", **LORA, init_output_rms=True, share_base=True), quiet
    )
    options = {**LORA, "ref_logps_file": str(tmp_path / "shared.safetensors")}
    config = stage2(first["model"], alignment_file, tmp_path / "two", **options, share_base=True)
    encoder, decoder, _, _ = build_models(config)
    assert decoder.shared is not None
    assert weights(decoder) == weights(Decoder(original))
    everything = [*encoder.parameters(), *decoder.parameters()]
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert storage_bytes(everything) == storage_bytes(original.parameters()) + storage_bytes(trained)
    exported = Encoder.from_pretrained(first["export"])
    assert_same(encoder, exported)
    assert (
        exported(exported.tokenize(TEXTS)) - Encoder.from_pretrained(model_folder)(exported.tokenize(TEXTS))
    ).norm() > 1
    second = train(config, quiet)
    options["ref_logps_file"] = str(tmp_path / "separate.safetensors")
    train(stage2(first["model"], alignment_file, tmp_path / "three", **options, share_base=False), quiet)
    found, wanted = (load_file(tmp_path / f"{name}.safetensors") for name in ("shared", "separate"))
    for name in ("positive", "negatives"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-3, equal_nan=True)
    # The adapter of the second stage is that of both, on the original model.
    result = Encoder.from_pretrained(second["export"])
    for folder in ("two/adapter", "two/model/adapter"):
        again = Encoder.from_pretrained(model_folder, instruction="Again:", adapter=tmp_path / folder)
        assert_same(again, result)
    assert (result(result.tokenize(TEXTS)) - exported(result.tokenize(TEXTS))).abs().max() > 1e-3
    assert Decoder.from_pretrained(second["model"])
    assert build_models(stage2(second["model"], alignment_file, "unused", lora_rank=2))[1].shared is not None
    # A run with other weights under its adapters leaves none that a next stage could take for those of the decoder.
    assert not (tmp_path / "three" / "model" / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"decoder": "other"}, "decoder '.*other' is another model than"),
        ({"model": "merged"}, "has trained weights and no adapter on those of the decoder"),
        ({"model": "adapted", "lora_rank": 3}, "lora_rank is 3, and 2 in the adapter of"),
        ({"model": "adapted", "lora_alpha": 8.0}, r"lora_alpha is 8\.0, and 16\.0 in the adapter of"),
        ({"model": "adapted", "lora_targets": ["q_proj"]}, r"lora_targets is \['q_proj'\], and 'all-linear' in"),
        ({"model": "adapted", "decoder": "other"}, "decoder '.*other' is another model than '.*', which the adapter"),
        ({"model": "adapted", "init_output_rms": True}, "init_output_rms scales a final norm, and the adapter of"),
    ],
)
def test_a_base_that_is_not_the_decoders_is_not_shared(stages, options, reason):
    model = str(stages / options.get("model", "lm"))
    fields = {"lora_rank": 2, **options} | {"model": model}
    if "decoder" in options:
        fields["decoder"] = str(stages / options["decoder"])
    with pytest.raises(ConfigError, match=f"^share_base: got True, expected auto or False: .*{reason}"):
        build_models(stage1(model, "unused", "unused", **fields, share_base=True))
    assert build_models(stage1(model, "unused", "unused", **fields))[1].shared is None


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A causal LM, another one, and what a first stage with LoRA leaves, with and without its adapter."""
    folder = tmp_path_factory.mktemp("stages")
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    for name, options in (("lm", {}), ("other", {"initializer_range": 0.1})):
        models.save_model(folder / name, tiny_model(vocab_size=len(tokenizer), **options), tokenizer, {})
        (folder / name / models.RECIPE).unlink()
    rows = [{"context": sentence(i, 6), "output": sentence(i, 4)} for i in range(8)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    train(stage1(str(folder / "lm"), data, folder / "run", lora_rank=2, max_steps=1), Console(quiet=True))
    shutil.copytree(folder / "run" / "model", folder / "adapted")
    shutil.copytree(folder / "run" / "model", folder / "merged", ignore=lambda *_: ["adapter"])
    return folder


@pytest.mark.parametrize("start", ["lm", "adapted"])
def test_the_norm_of_an_own_base_is_scaled_and_the_decoders_is_not(stages, start, tmp_path, quiet):
    options = {"lora_rank": 2, "share_base": False, "init_output_rms": True, "max_steps": 1, "learning_rate": 1e-12}
    config = stage1(str(stages / start), str(stages / "rows.jsonl"), tmp_path / "run", **options)
    encoder, decoder, _, _ = build_models(config)
    before, rms = weights(decoder), decoder.input_rms_per_dimension()
    ids = encoder.tokenize([sentence(i, 6) for i in range(8)])  # those of the data
    encoder.init_output_rms(rms, ids)
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).square().mean((0, 1)).sqrt(), rms, rtol=1e-4, atol=1e-6)
    assert weights(decoder) == before
    summary = train(config, quiet)
    exported = Encoder.from_pretrained(summary["export"])
    assert_same(exported, encoder)
    assert_same(
        Encoder.from_pretrained(stages / start, instruction="Again:", adapter=tmp_path / "run/adapter"), exported
    )
    second = stage1(summary["model"], str(stages / "rows.jsonl"), tmp_path / "next", lora_rank=2, init_output_rms=True)
    again, decoder, _, recipe = build_models(second)
    assert (decoder.shared is None) is (start == "adapted")  # whose adapter of before is in the base now
    assert recipe["output_rms_initialized"]
    assert weights(decoder) == before
    assert_same(again, exported)


def test_a_base_in_16_bits_leaves_adapters_and_ropes_in_32(stages):
    for options in ({"precision": "bf16"}, {"precision": "fp32", "base_dtype": "bf16"}):
        config = stage1(str(stages / "lm"), "unused", "unused", lora_rank=2, **options)
        encoder, decoder, _, _ = build_models(config)
        place(encoder, decoder, torch.device("cpu"), torch.bfloat16)
        assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in encoder.parameters() if p.requires_grad} == {torch.float32}
        assert decoder.model.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    whole = merged(encoder)  # nothing that was learnt is rounded
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    again = Encoder(whole, compress_token_ids=encoder.compress_token_ids, suffix_ids=encoder.suffix_ids, bos_token_id=1)
    ids = encoder.tokenize(TEXTS)
    torch.testing.assert_close(again(ids), encoder(ids).float(), rtol=0.1, atol=0.1)
    wide = build_models(
        stage1(str(stages / "lm"), "unused", "unused", lora_rank=2, precision="bf16", base_dtype="fp32")
    )
    assert {p.dtype for p in wide[1].parameters()} == {torch.float32}
    separate = build_models(stage1(str(stages / "lm"), "unused", "unused", precision="bf16"))
    place(*separate[:2], torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in separate[1].parameters()} == {torch.bfloat16}
    assert separate[1].model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_layers_under_adapters_are_compiled(stages):
    config = stage1(str(stages / "lm"), "unused", "unused", lora_rank=2, compile=True)
    encoder, decoder, _, _ = build_models(config)
    for layers in (encoder.model.get_base_model().model.layers, decoder.model.model.layers):
        assert all(layer._compiled_call_impl is not None for layer in layers)
