"""Centring and whitening of an export: what plain sentence-transformers gives, and what everything else makes of it."""

import json

import pytest
import torch
from conftest import sentence, stage2, write_jsonl
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_export import TEXTS, encoder_of
from test_serving import SERVERS

from autoregembed import Encoder
from autoregembed.centering import Centering
from autoregembed.cli import main
from autoregembed.config import ConfigError
from autoregembed.files import CheckpointError
from autoregembed.train import train

FIT = [sentence(i, 3 + i % 9) for i in range(60)]


def transformed(e: torch.Tensor, fitted: torch.Tensor, whiten: bool) -> torch.Tensor:
    """In float64, by the singular vectors of the centred texts."""
    e, fitted = e.double(), fitted.double()
    centred = fitted - fitted.mean(0)
    out = e - fitted.mean(0)
    if whiten:
        _, s, v = torch.linalg.svd(centred, full_matrices=False)
        out = ((out @ v.T) / (s / len(fitted) ** 0.5)) @ v
    return (out / out.norm(dim=-1, keepdim=True)).float()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("whiten", [False, True])
def test_sentence_transformers_alone_gives_the_centred_vectors(whiten, k, tmp_path):
    encoder = encoder_of(k=k)
    plain, fitted = encoder.encode(TEXTS), encoder.encode(FIT)
    encoder.center(FIT, whiten=whiten)
    wanted = transformed(plain, fitted, whiten)
    torch.testing.assert_close(encoder.encode(TEXTS), wanted, rtol=0, atol=1e-4)
    assert (wanted - plain).abs().max() > 0.1
    folder = encoder.save_pretrained(tmp_path / "out")
    kinds = [m["type"].rsplit(".", 1)[1] for m in json.loads((folder / "modules.json").read_text())]
    assert kinds[-4:] == ["Pooling", "Normalize", "Dense", "Normalize"]
    found = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    recipe = json.loads((folder / "autoregembed.json").read_text())
    assert recipe["centering"] == {"kind": "whiten" if whiten else "center", "texts": 60}
    again = Encoder.from_pretrained(folder)
    torch.testing.assert_close(again.encode(TEXTS), wanted, rtol=0, atol=1e-4)
    twice = SentenceTransformer(str(again.save_pretrained(tmp_path / "twice")), device="cpu")
    torch.testing.assert_close(twice.encode(TEXTS, convert_to_tensor=True), wanted, rtol=0, atol=1e-4)
    again.centering = None
    bare = again.save_pretrained(tmp_path / "bare")
    assert "centering" not in json.loads((bare / "autoregembed.json").read_text())
    torch.testing.assert_close(Encoder.from_pretrained(bare).encode(TEXTS), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("k", [1, 3])
def test_servers_that_know_no_dense_layer_refuse_it(k, server, saved_again, tmp_path):
    encoder = encoder_of(k=k)
    encoder.center(FIT)
    folder = encoder.save_pretrained(tmp_path / "out")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "centred by a layer behind the pooling" in card
    assert "both refuse this folder" in card
    if saved_again:
        SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "again"))
        folder = tmp_path / "again"
    with pytest.raises(ValueError, match=r"^(Unknown quantization|Pooling config|The `--pooling` arg|missing field)"):
        SERVERS[server](folder)


@pytest.mark.parametrize("flag", ["center", "whiten"])
def test_the_command_centres_on_a_file(flag, model_folder, tmp_path, capsys):
    file = write_jsonl(tmp_path / "texts.jsonl", [{"body": text} for text in FIT])
    arguments = ["export", model_folder, str(tmp_path / "out"), f"--{flag}", file, "--column", "body"]
    assert main(arguments) == 0
    assert "on 60 texts" in capsys.readouterr().out
    encoder = Encoder.from_pretrained(model_folder)
    wanted = transformed(encoder.encode(TEXTS), encoder.encode(FIT), flag == "whiten")
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain")]) == 0
    assert "centred" not in capsys.readouterr().out
    assert Encoder.from_pretrained(tmp_path / "plain").centering is not None, "an export stays what it is"


def test_what_would_be_wrong_is_refused(model_folder, alignment_file, tmp_path, quiet, capsys):
    encoder = encoder_of()
    with pytest.raises(ValueError, match="texts: got 1, expected at least 2"):
        encoder.center(FIT[:1])
    with pytest.raises(ValueError, match="texts: got 32, expected at least 33: one for each of the D dimensions"):
        encoder.center(FIT[:32], whiten=True)
    with pytest.raises(ValueError, match="texts: got 2 with the same embedding"):
        encoder.center(["the cat", "the cat"])
    assert encoder.centering is None
    encoder.center(FIT)
    with pytest.raises(ValueError, match=r"dtype: got torch.bfloat16 with a centring, expected torch.float32"):
        encoder.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    half = encoder_of(dtype=torch.bfloat16)
    half.center(FIT)
    with pytest.raises(ValueError, match=r"dtype: got torch.bfloat16 with a centring"):
        half.save_pretrained(tmp_path / "half")
    half.save_pretrained(tmp_path / "half", dtype=torch.float32)
    folder = encoder.save_pretrained(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model: got .*, an export with a centring"):
        train(
            stage2(str(folder), alignment_file, tmp_path / "run", alignment_weight=0.0, contrastive_weight=1.0), quiet
        )
    weights = next(folder.glob("*_Dense/model.safetensors"))
    save_file({"linear.weight": load_file(weights)["linear.weight"][:5].clone()}, weights)
    with pytest.raises(
        CheckpointError, match=r"model: got .*, whose recipe names a centring, expected its Dense layer"
    ):
        Encoder.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="whose recipe names a centring"):
        Encoder.from_pretrained(folder)
    texts = tmp_path / "texts.txt"
    texts.write_text("a\nb\n")
    for flags, message in (
        (["--center", str(texts), "--whiten", str(texts)], "whiten: got"),
        (["--column", "text"], "column: got 'text', expected None without center or whiten"),
        (["--dtype", "fp8"], "dtype: got 'fp8', expected one of fp32, bf16, fp16"),
    ):
        assert main(["export", model_folder, str(tmp_path / "new"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_whitening_gives_every_direction_the_same_variance():
    e = torch.nn.functional.normalize(torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) + 2, dim=-1)
    centering = Centering.fit(e, whiten=True)
    out = e.double() @ centering.weight.double().T + centering.bias.double()
    torch.testing.assert_close(out.T @ out / 400, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
