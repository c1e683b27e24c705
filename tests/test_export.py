import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import sentence
from safetensors.torch import load_file

from autoregembed import Encoder, files, models
from autoregembed.export import merged
from autoregembed.model_card import Card, model_card
from autoregembed.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
TEXTS = [
    "the cat sat",
    sentence(0, 9),
    sentence(1, 700),
    "dusk",
    "rain </s> fell <s> over <unk> <EMBED0> <tail> <head> <317> stone",
    "</s>",
    "  two  spaces\tand\n\nlines \n",
    "Grüße, 東京 🙂",
]


def encoder_of(
    tokenizer=TOKENIZER, architecture="llama", bos_token_id=1, dtype=torch.float32, k=3, **options
) -> Encoder:
    model = tiny_model(architecture, vocab_size=len(tokenizer), dtype=dtype)
    ids = models.add_compress_tokens(model, tokenizer, k)
    with torch.no_grad():  # far apart, so that a lost or swapped compress token shows
        rows = torch.randn(k, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
        model.get_input_embeddings().weight[ids] += 0.2 * rows
    suffix = tokenizer("\nAgain:\n", add_special_tokens=False)["input_ids"]
    fixed = {"compress_token_ids": ids, "suffix_ids": suffix, "bos_token_id": bos_token_id, "tokenizer": tokenizer}
    return Encoder(model, **fixed, **options)


def load(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def assert_same_ids(exported, encoder, tokenizer, texts, length):
    around = len(encoder.sequences([[]])[0])
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"][: length - around] for t in texts]
    assert exported.tokenizer(texts, truncation=True)["input_ids"] == encoder.sequences(ids)


def test_a_fresh_process_loads_the_folder_and_embeds_the_same(tmp_path):
    encoder = encoder_of()
    folder = encoder.save_pretrained(tmp_path / "out")
    code = """
import json, sys, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
assert "autoregembed" not in sys.modules
texts = json.load(open(sys.argv[2]))
torch.save(model.encode(texts, convert_to_tensor=True, batch_size=len(texts)), sys.argv[3])
"""
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    arguments = [folder, tmp_path / "texts.json", tmp_path / "found.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, timeout=300)
    found = torch.load(tmp_path / "found.pt")
    expected = encoder.encode(TEXTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.pdist(expected).min() > 1e-2
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.rglob("*.py"))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_padding_within_a_batch_is_immaterial(batch_size, tmp_path):
    encoder = encoder_of()
    exported = load(encoder.save_pretrained(tmp_path / "out", max_length=60))
    found = exported.encode(TEXTS, convert_to_tensor=True, batch_size=batch_size)
    expected = encoder.encode(TEXTS, max_length=60)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_same_ids(exported, encoder, TOKENIZER, TEXTS, 60)
    assert exported.max_seq_length == 60


def family(name: str):
    """A model family's own tokenizer class, whose post-processor some of them write anew on loading."""
    import transformers

    vocabulary = TOKENIZER.get_vocab()
    merges = [tuple(m) for m in json.loads(TOKENIZER.backend_tokenizer.to_str())["model"]["merges"]]
    cls = getattr(transformers, name)
    return cls(vocab=vocabulary, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("name", "architecture", "bos"),
    [
        ("LlamaTokenizer", "llama", 1),
        ("Qwen2Tokenizer", "qwen2", None),
        ("GemmaTokenizer", "gemma2", 1),
        ("GPTNeoXTokenizer", "gpt_neox", None),
        ("GPT2Tokenizer", "gpt2", None),
    ],
)
def test_every_family_of_tokenizers_gives_the_ids_of_training(name, architecture, bos, tmp_path):
    tokenizer = family(name)
    encoder = encoder_of(tokenizer, architecture, bos)
    exported = load(encoder.save_pretrained(tmp_path / "out"))
    assert_same_ids(exported, encoder, tokenizer, TEXTS, 256)
    found = exported.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_adapters_are_merged_and_compress_rows_folded_and_the_encoder_stays(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = encoder_of()
    name = {"embed_tokens": plain.compress_token_ids}
    wrapped = get_peft_model(plain.model, LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=name))
    options = {"compress_token_ids": plain.compress_token_ids, "suffix_ids": plain.suffix_ids, "bos_token_id": 1}
    lora = Encoder(wrapped, tokenizer=TOKENIZER, **options)
    own = encoder_of(own_compress_rows=True)
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05
        own.compress_rows += torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    untrained = encoder_of().encode(TEXTS)
    for i, encoder in enumerate((lora, own)):
        before = files.weights_fingerprint(encoder)
        expected = encoder.encode(TEXTS)
        assert (expected - untrained).abs().max() > 1e-2
        exported = load(encoder.save_pretrained(tmp_path / str(i)))
        found = exported.encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert files.weights_fingerprint(encoder) == before
        assert not any("lora" in name for name in merged(encoder).state_dict())


def test_bfloat16_stays_bfloat16(tmp_path):
    encoder = encoder_of(dtype=torch.bfloat16)
    folder = encoder.save_pretrained(tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    found = load(folder).encode(TEXTS, convert_to_tensor=True).float()
    torch.testing.assert_close(found, encoder.encode(TEXTS), rtol=0, atol=2e-2)


def test_a_used_folder_is_kept_unless_told_otherwise(tmp_path):
    encoder = encoder_of()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match=r"^folder: got .*out' in use"):
        encoder.save_pretrained(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    encoder.save_pretrained(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    load(tmp_path / "out")


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        encoder_of().save_pretrained(tmp_path / "file" / "out")
    if os.geteuid() != 0:
        (tmp_path / "sealed").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            encoder_of().save_pretrained(tmp_path / "sealed" / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 257}, "max_length: got 257, expected at most 256"),
        ({"max_length": 5}, "max_length: got 5, expected more than"),
    ],
)
def test_lengths_that_leave_no_room_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^{message}"):
        encoder_of().save_pretrained(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_slow_tokenizers_are_refused_before_anything_else(model_folder, tmp_path):
    from transformers import ByT5Tokenizer

    encoder = encoder_of()
    encoder.tokenizer = ByT5Tokenizer()
    with pytest.raises(ValueError, match=r"^tokenizer: got ByT5Tokenizer, which is slow, expected a fast tokenizer"):
        encoder.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    slow = ByT5Tokenizer(bos_token="<s>")
    with pytest.raises(ValueError, match=r"^tokenizer: got ByT5Tokenizer, which is slow"):
        Encoder.from_model(tiny_model(vocab_size=len(slow)), slow)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
def test_the_dtype_of_an_export_is_a_choice(dtype, bound, tmp_path):
    encoder = encoder_of()
    folder = encoder.save_pretrained(tmp_path / "out", dtype=dtype)
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {dtype}
    assert encoder.model.dtype == torch.float32
    found = load(folder).encode(TEXTS, convert_to_tensor=True).float()
    torch.testing.assert_close(found, encoder.encode(TEXTS), rtol=0, atol=bound)


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path):
    encoder = encoder_of()
    with pytest.raises(ValueError, match=r"^dtype: got torch.int8, expected"):
        encoder.save_pretrained(tmp_path / "out", dtype=torch.int8)
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[5, 5] = 1e5
    with pytest.raises(ValueError, match=r"^dtype: got torch.float16, which embed_tokens.weight overflows"):
        encoder.save_pretrained(tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("k", [1, 3])
def test_an_export_whose_embeddings_differ_is_not_written(k, tmp_path, monkeypatch):
    from sentence_transformers.sentence_transformer import modules as stock

    from autoregembed import export

    monkeypatch.setattr(export, "_pooling", lambda *_: [stock.Pooling(32, "max"), stock.Normalize()])
    with pytest.raises(files.CheckpointError, match=r"^folder: got embeddings at a distance of"):
        encoder_of(k=k).save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_real_tokenizer_and_model(shared, tmp_path):
    encoder = Encoder.from_pretrained(shared / "data" / "stories260K", instruction="Tell it again.")
    exported = load(encoder.save_pretrained(tmp_path / "out"))
    found = exported.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, encoder.encode(TEXTS), rtol=0, atol=1e-5)
    assert_same_ids(exported, encoder, encoder.tokenizer, TEXTS, encoder.fit_max_length())


# ----------------------------------------------------------------------------------------------------------------------
# The model card


def test_the_card_is_valid_metadata_with_three_lines_that_run(tmp_path):
    from huggingface_hub import ModelCard

    (tmp_path / "base").mkdir()
    known = Card(
        base_model=str(tmp_path / "base"),
        license="apache-2.0",
        train_data=str(tmp_path / "pairs.jsonl"),
        recipe={"stage": 2, "learning_rate": 1e-4},
        eval_data="mteb/stsbenchmark-sts",
        evaluations={"20": {"spearman": 0.61}, "0": {"spearman": 0.2345678}, "10": {"spearman": None}},
    )
    folder = encoder_of().save_pretrained(tmp_path / "out", card=known)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "sentence-transformers"
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data, "a name without owner is none on the hub"
    assert card.content.split("---")[2].startswith("\n\n# base-autoregembed\n")
    assert "made from base by" in card.content
    assert "Fill in before pushing to a hub:** base_model. " in card.content
    assert {"sentence-transformers", "autoregembed"} <= set(data["tags"])
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("mteb/stsbenchmark-sts", 0.61)
    assert str(tmp_path) not in card.content, "nobody else's disk has these folders"
    for part in ("Data: pairs.jsonl.", "learning_rate: 0.0001", "| before | 0.2346 |", "| after step 20 | 0.6100 |"):
        assert part in card.content
    assert "@inproceedings{deng2025following" in card.content
    code = card.content.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) == 3
    scope: dict = {}
    exec(code.replace('"base-autoregembed"', repr(str(folder))), scope)
    assert scope["embeddings"].shape == (2, 32)


def test_a_card_shows_what_needs_no_label_as_no_score_of_the_hub(tmp_path):
    from huggingface_hub import ModelCard

    card = Card(eval_data="texts", evaluations={"5": {"mean_cosine": 0.5}}, eval_metric="mean_cosine")
    card = ModelCard.load(encoder_of().save_pretrained(tmp_path / "out", card=card) / "README.md")
    assert card.data.eval_results is None
    assert "Mean cosine of different texts, texts:\n\n| | |\n|---|---|\n| after step 5 | 0.5000 |" in card.content


def test_a_card_without_facts_guesses_none(tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(encoder_of().save_pretrained(tmp_path / "out") / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "unknown"
    assert "base_model" not in data
    assert "Data: not stated." in card.content
    assert "## Scores" not in card.content
    assert "Fill in before pushing to a hub:** license, base_model, the training data." in card.content


@pytest.mark.parametrize(
    ("source", "hub_id", "title"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M-autoregembed"),
        ("gpt2", "gpt2", "gpt2-autoregembed"),
        ("/c/models--Qwen--Qwen3-0.6B/snapshots/0a1b", "Qwen/Qwen3-0.6B", "Qwen3-0.6B-autoregembed"),
        ("/data/models/mine", None, "mine-autoregembed"),
    ],
)
def test_the_card_names_a_base_model_that_the_hub_knows(source, hub_id, title):
    text = model_card(Card(base_model=source), name="export", width=8, max_length=9, num_compress_tokens=1)
    assert f"\n# {title}\n" in text
    assert (f"base_model: {hub_id}\n" in text) == (hub_id is not None)
    named = Card(base_model=source, model_name="me/mine", license="mit", train_data="x.jsonl")
    text = model_card(named, name="export", width=8, max_length=9, num_compress_tokens=5)
    assert "\n# me/mine\n" in text
    assert 'SentenceTransformer("me/mine")' in text
    assert ("Fill in" in text) == (hub_id is None)
    assert "both refuse this folder" in text


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                             "long_factor": [5.0] * 4, "original_max_position_embeddings": 40, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 40},
    ],
    ids=["longrope", "dynamic"],
)  # fmt: skip
def test_a_length_at_which_texts_would_rotate_each_other_is_refused(rope, tmp_path):
    """sentence-transformers pads: the longest text of a batch would decide how the short ones are rotated."""
    model = tiny_model(vocab_size=len(TOKENIZER), **rope)
    ids = models.add_compress_tokens(model, TOKENIZER, 3)
    fixed = {"compress_token_ids": ids, "bos_token_id": 1, "tokenizer": TOKENIZER, "max_length": 40}
    encoder = Encoder(model, suffix_ids=[9, 8], **fixed)
    if rope["rope_parameters"]["rope_type"] == "longrope":
        with pytest.raises(ValueError, match="max_length: got 41, expected at most 40: sentence-transformers rotates"):
            encoder.save_pretrained(tmp_path / "out", max_length=41)
        assert not (tmp_path / "out").exists()
    exported = load(encoder.save_pretrained(tmp_path / "out", max_length=40))
    texts = ["the cat sat", sentence(1, 700), "dusk"]
    found = exported.encode(texts, convert_to_tensor=True, batch_size=3)
    torch.testing.assert_close(found, encoder.encode(texts, max_length=40), rtol=0, atol=1e-5)
