"""Vectors made by the authors' released code, reproduced through the public API. A case is a folder; every size and
scalar is read from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoregembed import Decoder, Encoder, alignment_loss, compression_loss

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/batch.json"))


class Golden:
    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained
        batch = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
        self.expected = load_file(folder / "expected.safetensors")
        self.batch = batch
        self.model = load(folder / "encoder", dtype=torch.float64)
        self.encoder = Encoder(
            self.model, compress_token_ids=batch["compress_token_ids"], bos_token_id=batch["bos_token_id"]
        )
        self.decoder = Decoder(load(folder / "decoder", dtype=torch.float64), eos_token_id=batch["eos_token_id"])
        examples = batch["examples"]
        self.queries = [e["query"] for e in examples]
        self.positives = [e["positive"] for e in examples]
        self.negatives = [e["negatives"] for e in examples]
        self.suffixes = [e["suffix"] for e in examples]
        self.reference = [
            torch.tensor([e[name] for e in examples], dtype=torch.float64)
            for name in ("reference_positive", "reference_negatives")
        ]

    def z(self) -> torch.Tensor:
        """(2B, K, D), queries and positives in one pass."""
        return self.encoder(self.queries + self.positives, self.suffixes * 2)

    def scores(self, z) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """a (B,), b (B,), c (B, M), in one pass."""
        b, m = len(self.queries), len(self.negatives[0])
        targets = self.positives * 2 + [n for row in self.negatives for n in row]
        z_index = [*range(2 * b), *(i for i in range(b) for _ in range(m))]
        a, b_, c = self.decoder.logprob(z, targets, z_index).split([b, b, b * m])
        return a, b_, c.view(b, m)

    def assert_gradients(self, prefix: str) -> None:
        names = [name for name in self.expected if name.startswith(prefix + ".")]
        assert names
        for name in names:
            wanted = self.expected[name]
            found = self.model.model.get_parameter(name.removeprefix(prefix + ".")).grad
            assert wanted.any()
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@pytest.fixture(params=CASES or [None], scope="module")
def golden(request, shared) -> Golden:
    if request.param is None:
        pytest.skip("needs ../shared/golden, which is not part of the product")
    return Golden(GOLDEN / request.param)


def assert_equal(found, wanted, relative=1e-9):
    torch.testing.assert_close(found, wanted, rtol=relative, atol=0)


def test_compressed_embeddings(golden):
    b = len(golden.queries)
    z = golden.z().detach()
    k = golden.batch["num_compress_tokens"]
    assert golden.encoder.num_compress_tokens == k == z.shape[1]
    for found, name in [(z[:b], "compressed_query"), (z[b:], "compressed_positive")]:
        wanted = golden.expected[name]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
    torch.testing.assert_close(z[:b].mean(1), golden.expected["embedding_query"], rtol=1e-9, atol=1e-10)


def test_scores(golden):
    with torch.no_grad():
        a, b, c = golden.scores(golden.z())
    assert_equal(a, golden.expected["logprob_query_positive"])
    assert_equal(b, golden.expected["logprob_positive_positive"])
    assert_equal(c, golden.expected["logprob_query_negatives"])


def test_alignment(golden):
    golden.model.zero_grad()
    scores = golden.scores(golden.z())
    options = {name: golden.batch[name] for name in ("beta", "temperature")}
    loss = alignment_loss(*scores, *golden.reference, **options).loss
    assert_equal(loss.detach(), golden.expected["alignment_loss"])
    loss.backward()
    golden.assert_gradients("alignment_grad")


def test_compression(golden):
    golden.model.zero_grad()
    z = golden.encoder(golden.queries, golden.suffixes)
    loss = compression_loss(golden.decoder.logprob(z, golden.positives), golden.decoder.num_tokens(golden.positives))
    assert_equal(loss.detach(), golden.expected["compression_loss"])
    loss.backward()
    golden.assert_gradients("compression_grad")


def test_decoder_stays_frozen(golden):
    assert all(p.grad is None and not p.requires_grad for p in golden.decoder.parameters())
