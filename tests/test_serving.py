"""What vLLM and TEI make of an exported folder, by their own rules in a few lines: the right vectors, or a refusal.

vLLM, main branch of 2026: `get_pooling_config`, `parse_pooling_type` and `get_sentence_transformer_tokenizer_config` in
vllm/transformers_utils/config.py, `_parse_quant_hf_config` and `_verify_quantization` in vllm/config/model.py. Versions
before 0.2x know the names sentence_transformers.models.* alone. Default pooling of a causal LM: last token.

TEI 1.9: `get_backend_model_type`, `PoolConfig`, `STConfig` in router/src/lib.rs.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import sentence
from sentence_transformers import SentenceTransformer
from test_export import TEXTS, encoder_of
from transformers import AutoModel, AutoTokenizer

OLD_NAMES = {
    "Pooling": {"sentence_transformers.models.Pooling"},
    "Normalize": {"sentence_transformers.models.Normalize"},
}
NEW_NAMES = {
    "Pooling": {*OLD_NAMES["Pooling"], "sentence_transformers.sentence_transformer.modules.pooling.Pooling"},
    "Normalize": {
        *OLD_NAMES["Normalize"],
        "sentence_transformers.base.modules.normalize.Normalize",
        "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
    },
}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def vllm(folder: Path, names: dict) -> dict:
    config = read(folder / "config.json")
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        raise ValueError(f"Unknown quantization method: {quantization['quant_method']}.")
    modules = read(folder / "modules.json")
    found = {"pooling": "LAST", "normalize": True, "max_length": config["max_position_embeddings"]}
    pooling = next((m for m in modules if m["type"] in names["Pooling"]), None)
    if pooling is not None:
        found["normalize"] = any(m["type"] in names["Normalize"] for m in modules)
        for key, value in read(folder / pooling["path"] / "config.json").items():
            if (key == "pooling_mode" and isinstance(value, str)) or value is True:
                name = value if isinstance(value, str) else key
                name = name.replace("pooling_mode_", "").split("_", 1)[0]
                name = "LAST" if "lasttoken" in name else name.upper()
                if name in ("CLS", "LAST", "MEAN"):
                    found["pooling"] = name
    settings = read(folder / "sentence_bert_config.json")
    if "max_seq_length" in settings and "do_lower_case" in settings:
        found["max_length"] = settings["max_seq_length"]
    return found


def tei(folder: Path) -> dict:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        raise ValueError("The `--pooling` arg is not set and we could not find a pooling configuration")
    pooling, settings = read(path), read(folder / "sentence_bert_config.json")
    for found, required in (
        (pooling, ["pooling_mode_cls_token", "pooling_mode_mean_tokens"]),
        (settings, ["max_seq_length"]),
    ):
        if missing := [key for key in required if key not in found]:
            raise ValueError(f"missing field {missing[0]}")
    flags = {"CLS": "cls_token", "MEAN": "mean_tokens", "LAST": "lasttoken"}
    chosen = next((n for n, flag in flags.items() if pooling.get(f"pooling_mode_{flag}")), None)
    if chosen is None:
        raise ValueError("Pooling config is not supported")
    return {"pooling": chosen, "normalize": True, "max_length": settings["max_seq_length"]}


@torch.no_grad()
def vectors(folder: Path, rules: dict) -> torch.Tensor:
    """What a server computes by `rules`, one text at a time."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=rules["max_length"], return_tensors="pt")
        hidden = model(**ids).last_hidden_state[0]
        pooled = {"LAST": hidden[-1], "CLS": hidden[0], "MEAN": hidden.mean(0)}[rules["pooling"]]
        rows.append(torch.nn.functional.normalize(pooled, dim=-1) if rules["normalize"] else pooled)
    return torch.stack(rows)


SERVERS = {
    "vllm": lambda folder: vllm(folder, NEW_NAMES),
    "vllm, older": lambda folder: vllm(folder, OLD_NAMES),
    "tei": tei,
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_one_compress_token_is_served_exactly(server, architecture, tmp_path):
    encoder = encoder_of(architecture=architecture, k=1)
    folder = encoder.save_pretrained(tmp_path / "out", max_length=60)
    found = vectors(folder, SERVERS[server](folder))
    torch.testing.assert_close(found, encoder.encode(TEXTS, max_length=60), rtol=0, atol=1e-5)
    exported = SentenceTransformer(str(folder), device="cpu")
    for encode in (exported.encode, exported.encode_query, exported.encode_document):
        torch.testing.assert_close(found, encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("server", SERVERS)
def test_several_compress_tokens_are_refused(server, saved_again, tmp_path):
    encoder = encoder_of(k=3)
    folder = encoder.save_pretrained(tmp_path / "out")
    if saved_again:
        SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"))
        folder = tmp_path / "again"
    with pytest.raises(ValueError, match=r"^(Unknown quantization|Pooling config|The `--pooling` arg)"):
        SERVERS[server](folder)


@pytest.mark.parametrize("k", [1, 3])
def test_a_folder_that_sentence_transformers_has_saved_again_is_the_same(k, tmp_path):
    encoder = encoder_of(k=k)
    exported = SentenceTransformer(str(encoder.save_pretrained(tmp_path / "out")), device="cpu")
    exported.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), encoder.encode(TEXTS), rtol=0, atol=1e-5)
    rules = []
    for server in SERVERS.values():  # right or refused, never another vector
        try:
            rules.append(server(tmp_path / "again"))
        except ValueError:
            continue
    assert len(rules) == (2 if k == 1 else 0)
    for found in rules:
        torch.testing.assert_close(vectors(tmp_path / "again", found), encoder.encode(TEXTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_the_vocabulary_fills_neither_screen_nor_card(k, tmp_path):
    encoder = encoder_of(k=k)
    rows = encoder.model.get_input_embeddings().weight.shape[0]
    exported = SentenceTransformer(str(encoder.save_pretrained(tmp_path / "out")), device="cpu")
    allowed = rows if k > 1 else 0  # a character for each
    assert len(str(exported)) < allowed + 1000
    exported.save_pretrained(str(tmp_path / "again"))
    assert len((tmp_path / "again" / "README.md").read_text(encoding="utf-8")) < allowed + 8000


def test_the_models_of_our_losses_print_short(tmp_path, model_folder):
    from autoregembed.integrations.sentence_transformers import FusedInfoNCELoss, from_causal_lm

    start = from_causal_lm(model_folder, tmp_path / "start", instruction="Again:")
    assert " rows>" in str(start)
    assert len(str(start)) < 1000
    start.save_pretrained(str(tmp_path / "again"))
    assert len((tmp_path / "again" / "README.md").read_text(encoding="utf-8")) < 8000
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    text = [sentence(3, 9)]
    torch.testing.assert_close(*(m.encode(text, convert_to_tensor=True) for m in (start, again)), rtol=0, atol=1e-6)
    assert " rows>" not in str(again)
    FusedInfoNCELoss(again)
    assert " rows>" in str(again)


def test_a_new_export_forgets_what_an_earlier_one_was(tmp_path):
    from autoregembed import Encoder

    folder = encoder_of(k=3).save_pretrained(tmp_path / "out")
    lm = encoder_of(k=1)
    again = Encoder.from_pretrained(folder)
    lm.model.config.update({n: getattr(again.model.config, n) for n in ("compress_token_ids", "compression_config")})
    other = lm.save_pretrained(tmp_path / "other")
    assert "compression_config" not in read(other / "config.json")
    assert read(other / "config.json")["compress_token_ids"] == lm.compress_token_ids
