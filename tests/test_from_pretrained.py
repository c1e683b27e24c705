"""Encoder and Decoder from everything that from_pretrained reads, and save_pretrained as its inverse."""

import json
import shutil

import pytest
import torch
from conftest import sentence, stage1, stage2
from sentence_transformers import SentenceTransformer

from autoregembed import Decoder, Encoder, data, models
from autoregembed.files import CheckpointError
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import train

TEXTS = [sentence(1, 5), sentence(2, 9), "<s> </s> is text", "  two  spaces\n", "Grüße, 東京"]


def ids_of(encoder: Encoder) -> list[list[int]]:
    return [encoder.tokenizer(t, add_special_tokens=False)["input_ids"] for t in TEXTS]


def moved(encoder: Encoder) -> Encoder:
    """The encoder after a step that changes everything it trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder.eval()


@torch.no_grad()
def assert_same(found: Encoder, expected: Encoder, *, atol: float = 1e-5) -> None:
    ids = expected.tokenize(TEXTS)
    assert found.tokenize(TEXTS) == ids
    for name in ("compress_token_ids", "suffix_ids", "bos_token_id", "instruction", "max_length"):
        assert getattr(found, name) == getattr(expected, name), name
    z = expected.eval()(ids)
    assert z.std(0).min() > 0
    torch.testing.assert_close(found.eval()(ids), z, rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# What is read


def test_a_causal_lm_gets_compress_tokens_an_instruction_and_its_tokenizer(model_folder):
    encoder, decoder = Encoder.from_pretrained(model_folder), Decoder.from_pretrained(model_folder)
    vocabulary = len(encoder.tokenizer)
    assert encoder.compress_token_ids == list(range(vocabulary, vocabulary + 5))
    assert encoder.instruction == "Keywords:"
    assert encoder.suffix_ids == encoder.tokenizer("\nKeywords:\n")["input_ids"]
    assert (encoder.bos_token_id, encoder.max_length) == (1, 256)
    assert encoder.tokenize(TEXTS) == decoder.tokenize(TEXTS) == ids_of(encoder)
    assert encoder.prompt.suffix() == encoder.suffix_ids
    assert (decoder.eos_token_id, decoder.prefix, decoder.z_norm) == (2, [], "none")
    assert decoder.model.get_input_embeddings().weight.shape[0] == vocabulary
    assert not any(p.requires_grad for p in decoder.parameters())
    other = Encoder.from_pretrained(model_folder, num_compress_tokens=3, instruction="Again:", max_length=40)
    assert other(other.tokenize(TEXTS)).shape == (5, 3, 32)
    assert (other.prompt.suffix(), other.max_length) == (other.tokenizer("\nAgain:\n")["input_ids"], 40)


def test_texts_are_cut_so_that_all_that_surrounds_them_fits(model_folder):
    encoder, decoder = Encoder.from_pretrained(model_folder), Decoder.from_pretrained(model_folder, add_bos=True)
    around = len(encoder.sequences([[]])[0])
    long = [sentence(0, 400)]
    whole = encoder.tokenizer(long)["input_ids"]
    assert encoder.tokenize(long) == [whole[0][: 256 - around]]
    assert encoder.tokenize(long, max_length=60) == [whole[0][: 60 - around]]
    assert encoder.tokenize(long, instruction="") == [whole[0][: 256 - 6 - len(encoder.tokenizer("\n\n")["input_ids"])]]
    assert decoder.tokenize(long) == [whole[0][: 256 - 6]]
    assert decoder.tokenize(long, max_target_length=9) == [whole[0][:9]]
    encoder(encoder.tokenize(long))
    z = torch.randn(1, 5, 32)
    decoder.logprob(z, decoder.tokenize(long))


def test_encode_reads_an_instruction(model_folder):
    encoder = Encoder.from_pretrained(model_folder, instruction="Again:")
    other = Encoder.from_pretrained(model_folder, instruction="Find it.")
    torch.testing.assert_close(encoder.encode(TEXTS, instruction="Find it."), other.encode(TEXTS), rtol=0, atol=1e-6)
    assert (encoder.encode(TEXTS) - other.encode(TEXTS)).abs().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_leaves_a_model_and_an_export_that_read_alike(
    model_folder, compression_file, alignment_file, tmp_path, quiet, lora_rank
):
    options = {"z_norm": "match_rms", "decoder_add_bos": True, "num_compress_tokens": 3, "lora_rank": lora_rank}
    first = train(stage1(model_folder, compression_file, tmp_path / "one", **options), quiet)
    summary = train(stage2(first["export"], alignment_file, tmp_path / "two", max_length=64), quiet)
    for made, length in ((first, 256), (summary, 64)):
        encoder = Encoder.from_pretrained(made["model"])
        assert (encoder.instruction, encoder.num_compress_tokens, encoder.max_length) == ("Again:", 3, length)
        assert_same(Encoder.from_pretrained(made["export"]), encoder)
        found = SentenceTransformer(made["export"], device="cpu").encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(found, encoder.encode(TEXTS), rtol=0, atol=1e-5)
    original = models.load_causal_lm(model_folder)[0].state_dict()
    for folder in (first["model"], first["export"], summary["model"], summary["export"]):
        decoder = Decoder.from_pretrained(folder)
        expected = ("match_rms", [1]) if "one" in folder else ("none", [])
        assert (decoder.z_norm, decoder.prefix) == expected
        assert all(torch.equal(w, original[name]) for name, w in decoder.model.state_dict().items())
    chosen = Decoder.from_pretrained(first["export"], z_norm="none", add_bos=False, logprob_reduction="mean")
    assert (chosen.z_norm, chosen.prefix, chosen.logprob_reduction) == ("none", [], "mean")
    if lora_rank:
        again = Encoder.from_pretrained(model_folder, adapter=tmp_path / "one" / "adapter", instruction="Again:")
        assert_same(again, Encoder.from_pretrained(first["model"]))
        trained = {n for n, p in again.named_parameters() if p.requires_grad}
        assert all("lora" in n or "trainable_tokens" in n for n in trained)
        assert any("lora" in n for n in trained)
        readme = (tmp_path / "one" / "adapter" / "README.md").read_text(encoding="utf-8")
        code = readme.split("```python\n")[1].split("```")[0]
        assert len(code.strip().splitlines()) == 3
        scope: dict = {}
        exec(code.replace('"adapter"', repr(str(tmp_path / "one" / "adapter"))), scope)
        found = scope["encoder"].encode(TEXTS)
        torch.testing.assert_close(found, Encoder.from_pretrained(first["model"]).encode(TEXTS), rtol=0, atol=1e-5)


def write_gguf(path, model, tokenizer) -> None:
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    body = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(body["vocab"], key=body["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(body["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in body["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path):
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    model = tiny_model(vocab_size=len(tokenizer))
    (tmp_path / "lm").mkdir()
    file = tmp_path / "lm" / "tiny.gguf"
    write_gguf(file, model, tokenizer)
    encoder = Encoder.from_pretrained(file)
    assert_same(Encoder.from_pretrained(tmp_path / "lm", gguf_file="tiny.gguf"), encoder)
    used = len(tokenizer)
    assert torch.equal(encoder.model.get_input_embeddings().weight[:used], model.get_input_embeddings().weight)
    folder = moved(encoder).save_pretrained(tmp_path / "out")
    assert_same(Encoder.from_pretrained(folder), encoder)
    for decoder in (Decoder.from_pretrained(file), Decoder.from_pretrained(folder)):
        assert torch.equal(decoder.model.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match=r"^gguf_file: got 'other.gguf', expected None"):
        Encoder.from_pretrained(file, gguf_file="other.gguf")


def test_a_hub_repository_is_read_with_its_recipe(model_folder, tmp_path, monkeypatch):
    """From the hub's cache, as it lies on the disk after a download."""
    from huggingface_hub import constants

    encoder = moved(Encoder.from_pretrained(model_folder, instruction="Again:", num_compress_tokens=3))
    repository, commit = tmp_path / "models--me--mine", "0" * 40
    folder = encoder.save_pretrained(repository / "snapshots" / commit, max_length=50)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_same(Encoder.from_pretrained("me/mine"), Encoder.from_pretrained(folder))
    original = models.load_causal_lm(model_folder)[0].state_dict()
    assert all(torch.equal(w, original[n]) for n, w in Decoder.from_pretrained("me/mine").model.state_dict().items())


def test_dtype_and_attention_are_passed_on(model_folder):
    options = {"dtype": torch.bfloat16, "device": "cpu", "attention": "sdpa"}
    for model in (Encoder.from_pretrained(model_folder, **options), Decoder.from_pretrained(model_folder, **options)):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.attention == "sdpa"
    with pytest.raises(ValueError, match=r"^attention: got 'varlen'"):
        Encoder.from_pretrained(model_folder, attention="varlen")


# ----------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("kind", ["whole", "lora", "own rows", "lora and own rows", "bfloat16", "no bos", "suffix ids"])
def test_a_saved_encoder_comes_back_and_sentence_transformers_reads_it_too(kind, model_folder, tmp_path):
    options = {
        "lora": {"lora_rank": 2},
        "own rows": {"own_compress_rows": True},
        "lora and own rows": {"lora_rank": 2, "own_compress_rows": True},
        "bfloat16": {"dtype": torch.bfloat16},
    }.get(kind, {})
    encoder = Encoder.from_pretrained(
        model_folder, instruction="Again:", num_compress_tokens=3, max_length=100, **options
    )
    if kind == "no bos":
        encoder.bos_token_id = None
    if kind == "suffix ids":
        encoder.suffix_ids, encoder.instruction = [7, 9, 11], None
    before = encoder(encoder.tokenize(TEXTS))
    moved(encoder)
    assert (encoder(encoder.tokenize(TEXTS)) - before).abs().amax((0, 2)).min() > 1e-2, (
        "every compress token is trained"
    )
    folder = encoder.save_pretrained(tmp_path / "out")
    dtype = options.get("dtype", torch.float32)
    again = Encoder.from_pretrained(folder, dtype=dtype)
    assert_same(again, encoder, atol=1e-5 if dtype == torch.float32 else 0.0)
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 2e-2}
    found = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True).float()
    torch.testing.assert_close(found, encoder.encode(TEXTS), **tolerance)
    second = again.save_pretrained(tmp_path / "again")
    assert_same(Encoder.from_pretrained(second, dtype=dtype), encoder, atol=tolerance["atol"])


def test_compress_ids_of_an_export_are_not_handed_out_again(model_folder, tmp_path):
    encoder = moved(Encoder.from_pretrained(model_folder, num_compress_tokens=3))
    rows = encoder.model.get_input_embeddings().weight
    folder = encoder.save_pretrained(tmp_path / "out")
    again = Encoder.from_pretrained(folder)
    assert again.compress_token_ids == encoder.compress_token_ids
    assert torch.equal(again.model.get_input_embeddings().weight, rows)
    # What the tokenizer writes around a text is no part of the text, also where a text names it.
    tail = [*encoder.suffix_ids, *encoder.compress_token_ids]
    assert again.tokenizer("the cat")["input_ids"][-len(tail) :] == tail
    assert again.tokenize(["the cat", "<tail> <head>"]) == encoder.tokenize(["the cat", "<tail> <head>"])
    assert not {i for ids in again.tokenize(TEXTS) for i in ids} & set(again.compress_token_ids)


def test_a_saved_encoder_trains_on(model_folder, alignment_file, tmp_path):
    folder = moved(Encoder.from_pretrained(model_folder)).save_pretrained(tmp_path / "out", max_length=128)
    encoder, decoder = Encoder.from_pretrained(folder, lora_rank=2), Decoder.from_pretrained(folder)
    (row, *_) = data.alignment_rows(data.load_rows(alignment_file), encoder.prompt).to_list()
    decoder.logprob(encoder([row["query_ids"]]), row["target_ids"][:1]).sum().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
    assert any("trainable_tokens" in n and g is not None and g.abs().max() > 0 for n, g in gradients.items())


def test_an_adapter_goes_on(model_folder, tmp_path):
    encoder = moved(Encoder.from_pretrained(model_folder, lora_rank=2, num_compress_tokens=3))
    encoder.model.save_pretrained(tmp_path / "adapter")
    again = Encoder.from_pretrained(model_folder, adapter=tmp_path / "adapter")
    assert_same(again, encoder)
    before = again(again.tokenize(TEXTS))
    assert (moved(again)(again.tokenize(TEXTS)) - before).abs().amax((0, 2)).min() > 1e-3
    with pytest.raises(CheckpointError, match=r"^num_compress_tokens: got 5, expected 3, the number that the adapter"):
        Encoder.from_pretrained(model_folder, adapter=tmp_path / "adapter", num_compress_tokens=5)
    other = Encoder.from_pretrained(model_folder, num_compress_tokens=5).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"^adapter: got one that trains the embeddings of .* another model"):
        Encoder.from_pretrained(other, adapter=tmp_path / "adapter")


def test_an_adapter_without_compress_tokens_needs_rows_of_their_own(model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    lm = models.load_causal_lm(model_folder)[0]
    get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"^adapter: got '.*plain', which has no compress tokens"):
        Encoder.from_pretrained(model_folder, adapter=tmp_path / "plain")
    encoder = Encoder.from_pretrained(model_folder, adapter=tmp_path / "plain", own_compress_rows=True)
    assert encoder.compress_rows.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_an_encoder_without_tokenizer_says_so(model_folder, tmp_path):
    encoder = Encoder(tiny_model(), compress_token_ids=[317, 318])
    decoder = Decoder(tiny_model())
    for call in (encoder.tokenize, encoder.encode, decoder.tokenize):
        with pytest.raises(ValueError, match=r"^tokenizer: got None, expected one: use from_pretrained"):
            call(["the cat"])
    with pytest.raises(ValueError, match=r"^tokenizer: got None, expected a fast tokenizer"):
        encoder.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"^tokenizer: got None"):
        Encoder(tiny_model(), compress_token_ids=[317, 318], instruction="Again:")
    with pytest.raises(ValueError, match=r"^tokenizer: got None"):
        _ = encoder.prompt
    tokenizer = Encoder.from_pretrained(model_folder).tokenizer
    with pytest.raises(ValueError, match=r"^instruction: got None"):
        _ = Encoder(tiny_model(), compress_token_ids=[317, 318], tokenizer=tokenizer).prompt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("the cat", TypeError, "texts: got the string 'the cat', expected a list"),
        (["the", 3], TypeError, "texts: got int in row 1"),
        (["the", ""], ValueError, "texts: got an empty text in row 1"),
    ],
)
def test_texts_are_a_list_of_strings(texts, error, message, model_folder):
    encoder, decoder = Encoder.from_pretrained(model_folder), Decoder.from_pretrained(model_folder)
    for call in (encoder.tokenize, encoder.encode, decoder.tokenize):
        with pytest.raises(error, match=f"^{message}"):
            call(texts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lora_rank": 2, "adapter": "a"}, ValueError, "lora_rank: got 2 together with an adapter"),
        ({"adapter": "nowhere"}, CheckpointError, "adapter: got 'nowhere', expected a folder with adapter_model"),
        ({"num_compress_tokens": 0}, ValueError, "num_compress_tokens: got 0, expected 1..255"),
        ({"max_length": 257}, ValueError, "max_length: got 257, expected at most 256"),
    ],
)
def test_options_that_an_encoder_refuses(options, error, message, model_folder):
    with pytest.raises(error, match=f"^{message}"):
        Encoder.from_pretrained(model_folder, **options)


def test_another_number_of_compress_tokens_is_refused(model_folder, tmp_path):
    folder = Encoder.from_pretrained(model_folder, num_compress_tokens=3).save_pretrained(tmp_path / "out")
    assert Encoder.from_pretrained(folder, num_compress_tokens=3).num_compress_tokens == 3
    with pytest.raises(CheckpointError, match=r"^num_compress_tokens: got 5, expected 3, the number that the model"):
        Encoder.from_pretrained(folder, num_compress_tokens=5)


def test_bos_is_refused_where_the_tokenizer_has_none(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "lm")
    settings = json.loads((tmp_path / "lm" / "tokenizer_config.json").read_text())
    settings.pop("bos_token")
    (tmp_path / "lm" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Encoder.from_pretrained(tmp_path / "lm").bos_token_id is None
    with pytest.raises(ValueError, match=r"^add_bos: got True, expected False: the tokenizer has no bos"):
        Decoder.from_pretrained(tmp_path / "lm", add_bos=True)


def test_a_decoder_needs_an_original(model_folder, tmp_path):
    encoder = Encoder.from_pretrained(model_folder)
    folder = encoder.save_pretrained(tmp_path / "one")
    encoder.recipe = {}
    unknown = encoder.save_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"^decoder: got '.*two', a trained encoder that started from None"):
        Decoder.from_pretrained(unknown)
    encoder.recipe = {"decoder": str(folder)}
    chained = encoder.save_pretrained(tmp_path / "three")
    with pytest.raises(CheckpointError, match=r"^decoder: got '.*three', a trained encoder that started from '.*one'"):
        Decoder.from_pretrained(chained)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 1),
        ("suffix_ids", "abc"),
        ("instruction", 3),
        ("bos_token_id", True),
        ("max_length", 9.5),
        ("z_norm", 1),
        ("lm_head", 0),
    ],
)
def test_a_damaged_recipe_is_refused(name, value, model_folder, tmp_path):
    folder = Encoder.from_pretrained(model_folder).save_pretrained(tmp_path / "out")
    recipe = json.loads((folder / models.RECIPE).read_text())
    (folder / models.RECIPE).write_text(json.dumps({**recipe, name: value}))
    for door in (Encoder, Decoder):
        with pytest.raises(CheckpointError, match=f"^model: got {name} "):
            door.from_pretrained(folder)
