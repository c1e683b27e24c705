"""A frozen base of 8 or 4 bits under LoRA: loaded, shared, trained, saved, resumed, merged onto plain weights."""

import importlib.util

import distributed_cases as cases
import pytest
import torch
from conftest import sentence, stage1, stage2
from safetensors.torch import load_file
from test_resume import assert_same_run, torn
from torch import nn

from autoregembed import Decoder, Encoder, decoder, encoder, models, quantized, runtime
from autoregembed.build import build_models, on_plain_weights
from autoregembed.config import ConfigError
from autoregembed.files import tensor_fingerprint, weights_fingerprint
from autoregembed.lora_base import start_of
from autoregembed.sharing import storage_bytes
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import train

TEXTS = [sentence(i, 4 + 3 * i) for i in range(4)]
LORA = {"lora_rank": 2, "max_steps": 3, "learning_rate": 0.01}


def require(kind: str, monkeypatch) -> None:
    """Skips without the package; lets bitsandbytes run on a CPU where it computes rightly."""
    package = quantized.QUANTIZERS[kind]
    pytest.importorskip(package, reason=f"needs {package} (the extra quantized)")
    if kind == "int8" or torch.cuda.is_available():
        return
    from bitsandbytes.functional import has_avx512bf16

    if has_avx512bf16():
        pytest.skip("bitsandbytes repacks 4-bit weights on this processor; needs a GPU")
    for module in (encoder, decoder):
        monkeypatch.setattr(module, "prepare_quantized", lambda model: None)
    monkeypatch.setattr(runtime, "require_quantizer", lambda *_, **__: None)


@pytest.fixture(params=["int8", "nf4"])
def kind(request, monkeypatch) -> str:
    require(request.param, monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A causal LM whose layers have blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    shape = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    models.save_model(folder, tiny_model(vocab_size=len(tokenizer), **shape), tokenizer, {})
    (folder / models.RECIPE).unlink()
    return str(folder)


def z(encoder: Encoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder(encoder.tokenize(TEXTS))


def layers(model: nn.Module) -> list[torch.Tensor]:
    """The frozen weights of linear layers but the head's."""
    return [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name and "lm_head" not in name
    ]


def stored(tensors) -> int:
    return storage_bytes(part for t in tensors for part in parts(t))


def parts(t: torch.Tensor) -> list[torch.Tensor]:
    if hasattr(t, "__tensor_flatten__"):
        return [getattr(t, name) for name in t.__tensor_flatten__()[0]]
    return [t]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_base_of_few_bits_serves_encoder_and_decoder(kind, precision, folder):
    config = stage1(folder, "unused", "unused", lora_rank=2, base_dtype=kind, precision=precision)
    encoder, decoder, _, _ = build_models(config)
    assert decoder.shared is not None
    weights = layers(decoder.model)
    assert {id(w) for w in weights} == {id(w) for w in layers(encoder.model)}
    plain = build_models(stage1(folder, "unused", "unused", lora_rank=2, base_dtype="fp32"))[1]
    share = {"int8": 0.3, "nf4": 0.15}[kind]  # of 4 bytes a weight, with scales
    assert stored(weights) < share * stored(layers(plain.model))
    saved, _ = quantized.planned(plain.model, kind)
    assert stored(weights) == pytest.approx(stored(layers(plain.model)) - saved, rel=0.1)  # as `plan` counts
    half = runtime.HALF_DTYPES.get(precision, torch.float32)
    assert decoder.model.get_input_embeddings().weight.dtype == decoder.model.lm_head.weight.dtype == half
    assert {p.dtype for p in encoder.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", half, enabled=precision != "fp32"):
        compressed = encoder(encoder.tokenize(TEXTS))
        found = decoder.logprob(compressed, encoder.tokenize(TEXTS))
        found.sum().backward()
        wanted = plain.logprob(compressed.float(), encoder.tokenize(TEXTS))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)
    assert ((found - wanted) / wanted).abs().max() < 0.05


def test_scores_and_gradients_are_those_of_the_dequantized_weights(kind, folder):
    config = stage1(folder, "unused", "unused", lora_rank=2, base_dtype=kind)
    encoder, decoder, tokenizer, _ = build_models(config)
    targets = encoder.tokenize(TEXTS)
    whole = models.load_causal_lm(folder)[0]
    for mine, (_, module) in zip(
        layers(decoder.model), [(n, m) for n, m in whole.named_modules() if isinstance(m, nn.Linear)], strict=False
    ):
        module.weight.data = values(mine)
    plain = Decoder.from_model(whole, tokenizer)
    rows = [torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    found, wanted = decoder.logprob(rows[0], targets), plain.logprob(rows[1], targets)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(rows[0].grad, rows[1].grad, rtol=1e-3, atol=2e-4)


def values(weight: torch.Tensor) -> torch.Tensor:
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def test_no_widened_weight_is_kept_for_the_backward(kind, folder):
    encoder, decoder, _, _ = build_models(stage1(folder, "unused", "unused", lora_rank=2, base_dtype=kind))
    sizes = {w.shape for w in layers(models.load_causal_lm(folder)[0])}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.logprob(encoder(encoder.tokenize(TEXTS)), encoder.tokenize(TEXTS))
    wide = [t for t in kept if type(t) is torch.Tensor and t.is_floating_point()]
    assert len(wide) > 50
    assert not [t.shape for t in wide if {tuple(t.shape), tuple(t.T.shape) if t.ndim == 2 else ()} & sizes]


def test_stages_train_resume_and_export_onto_plain_weights(
    kind, folder, compression_file, alignment_file, tmp_path, quiet, monkeypatch
):
    options = {**LORA, "base_dtype": kind, "init_output_rms": True, "save_steps": 1}
    first = train(stage1(folder, compression_file, tmp_path / "one", **options), quiet)
    config = stage1(folder, compression_file, tmp_path / "torn", **options)
    torn(config, quiet, monkeypatch, 2)
    train(config, quiet)
    assert_same_run(tmp_path / "one", tmp_path / "torn")

    options = {**LORA, "base_dtype": kind, "share_base": True}
    encoder, decoder, _, _ = build_models(stage2(first["model"], alignment_file, "unused", **options))
    assert decoder.shared is not None
    exported, start = Encoder.from_pretrained(first["export"]), Encoder.from_pretrained(folder, instruction="Again:")
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    # The export differs from what was trained by the rounding of the base alone.
    rounding = {"int8": 0.05, "nf4": 0.4}[kind]
    assert (z(exported) - z(encoder)).norm() < rounding * (z(encoder) - z(start)).norm()

    second = train(stage2(first["model"], alignment_file, tmp_path / "two", **options), quiet)
    again = Encoder.from_pretrained(folder, instruction="Again:", adapter=tmp_path / "two" / "adapter")
    torch.testing.assert_close(z(again), z(Encoder.from_pretrained(second["export"])), rtol=1e-4, atol=1e-4)
    assert (z(again) - z(exported)).norm() > 1e-2
    model = models.load_causal_lm(second["model"])[0]
    assert not hasattr(model.config, "quantization_config")
    assert {type(p.data) for p in model.parameters()} == {torch.Tensor}


def test_processes_train_as_one_does(folder, compression_file, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao (the extra quantized)")
    options = {**LORA, "base_dtype": "int8", "max_steps": 2, "precision": "fp32", "stage": 1, "model": folder}
    found = []
    for world in (1, 2):
        case = {**options, "train_data": compression_file, "output_dir": str(tmp_path / str(world))}
        cases.run(cases.one_run, world, tmp_path / f"work{world}", {**case, "batch_size": 8 // world})
        found.append(load_file(tmp_path / str(world) / "adapter" / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=2e-4)


def test_an_encoder_with_a_plain_base_is_exported_as_it_is(folder):
    config = stage1(folder, "unused", "unused", lora_rank=2)
    encoder = build_models(config, with_decoder=False)[0]
    assert on_plain_weights(config, encoder) is encoder


def test_fingerprints_see_quantised_weights(kind, folder):
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(build_models(stage1(folder, "u", "u", lora_rank=2, base_dtype=kind), with_decoder=False)[0])
    one, other = pair
    assert weights_fingerprint(one) == weights_fingerprint(other)
    weight = parts(layers(other.model)[3].data)[0]
    weight.view(torch.uint8).view(-1)[7] ^= 1
    assert weights_fingerprint(one) != weights_fingerprint(other)
    assert tensor_fingerprint({"w": layers(one.model)[0]}) == tensor_fingerprint({"w": layers(other.model)[0]})


def test_the_disk_is_asked_for_the_values_and_not_for_the_bytes(kind, folder):
    encoder = build_models(stage1(folder, "u", "u", lora_rank=2, base_dtype=kind), with_decoder=False)[0]
    plain = build_models(stage1(folder, "u", "u", lora_rank=2), with_decoder=False)[0]
    assert sum(map(quantized.num_elements, encoder.parameters())) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_dtype": "nf4"}, "base_dtype: got 'nf4' on a CPU, expected a GPU, or 'int8'"),
        ({"base_dtype": "int8", "sharded": True}, "base_dtype: got 'int8', expected 'auto', .* with FSDP"),
        ({"base_dtype": "int8", "missing": True}, "base_dtype: got 'int8', expected an installed torchao"),
    ],
)
def test_a_base_that_cannot_be_had_is_refused(options, message, folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if options.get("missing") else object())
    config = stage1(folder, "unused", "unused", lora_rank=2, base_dtype=options["base_dtype"])
    with pytest.raises(ConfigError, match=f"^{message}"):
        quantized.require_quantizer(config, torch.device("cpu"), sharded=options.get("sharded", False))


def test_weights_that_are_quantised_already_are_refused(folder):
    config = stage1(folder, "unused", "unused", lora_rank=2, base_dtype="int8", gguf_file="x.gguf")
    with pytest.raises(ConfigError, match=r"^base_dtype: got 'int8', expected .* for a GGUF file"):
        start_of(config, {})


def test_fewer_bits_need_adapters(folder):
    with pytest.raises(ConfigError, match=r"^base_dtype: got 'int8', expected 'auto' without lora_rank"):
        stage1(folder, "unused", "unused", base_dtype="int8")
