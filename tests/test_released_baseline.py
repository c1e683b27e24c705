"""The baseline that a training step is measured against computes what the authors' code computes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autoregembed import Decoder, Encoder, alignment_loss, compression_loss
from autoregembed.bench.baselines.released import Released
from autoregembed.objective import alignment_scores
from autoregembed.testing import tiny_model


def golden(folder):
    batch = json.loads((folder / "batch.json").read_text())
    models = [AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float64) for n in ("encoder", "decoder")]
    ids = {n: batch[n] for n in ("compress_token_ids", "bos_token_id", "eos_token_id")}
    rows = [
        {
            "query_ids": e["query"],
            "text_ids": e["query"],
            "positive_ids": e["positive"],
            "suffix_ids": e["suffix"],
            "target_ids": [e["positive"], *e["negatives"]],
        }
        for e in batch["examples"]
    ]
    reference = (
        torch.tensor([e["reference_positive"] for e in batch["examples"]], dtype=torch.float64),
        torch.tensor([e["reference_negatives"] for e in batch["examples"]], dtype=torch.float64),
    )
    return batch, models, ids, rows, reference


def assert_gradients(model, expected, prefix):
    named = dict(model.named_parameters())
    wanted = {n.removeprefix(prefix): g for n, g in expected.items() if n.startswith(prefix)}
    assert wanted
    for name, gradient in wanted.items():
        found = named[name.removeprefix("model.")].grad
        assert found is not None, name
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("case", ["small", "negatives3"])
def test_released_baseline_reproduces_the_golden_vectors(shared, case):
    folder = shared / "golden" / case
    expected = load_file(folder / "expected.safetensors")
    batch, (encoder, decoder), ids, rows, reference = golden(folder)
    baseline = Released(encoder.model, decoder, **ids)
    suffixes = [r["suffix_ids"] for r in rows]
    z = baseline.compress([r["query_ids"] for r in rows], suffixes)
    torch.testing.assert_close(z, expected["compressed_query"], rtol=1e-9, atol=1e-12)
    a = baseline.logprob([r["query_ids"] for r in rows], suffixes, [r["target_ids"][0] for r in rows])
    torch.testing.assert_close(a, expected["logprob_query_positive"], rtol=1e-9, atol=0)
    loss = baseline.alignment_loss(rows, *reference, beta=batch["beta"], temperature=batch["temperature"])
    torch.testing.assert_close(loss, expected["alignment_loss"], rtol=1e-9, atol=0)
    loss.backward()
    assert_gradients(encoder.model, expected, "alignment_grad.")
    assert all(p.grad is None for p in decoder.parameters())
    encoder.zero_grad()
    loss = baseline.compression_loss([{**r, "target_ids": r["target_ids"][0]} for r in rows])
    torch.testing.assert_close(loss, expected["compression_loss"], rtol=1e-9, atol=0)
    loss.backward()
    assert_gradients(encoder.model, expected, "compression_grad.")


def test_both_stages_give_the_same_loss_and_gradient_as_ours():
    generator = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    rows = []
    for i in range(5):
        query, positive, suffix = ids(3 + i), ids(9 - i), ids(2)
        targets = [positive, ids(2 + i), ids(6)]
        rows.append({"query_ids": query, "positive_ids": positive, "suffix_ids": suffix, "target_ids": targets})
    reference = torch.randn(5, generator=generator) - 20, torch.randn(5, 2, generator=generator) - 20
    options = {"compress_token_ids": [310, 311, 312], "bos_token_id": 1}
    theirs, ours = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    frozen = [tiny_model(dtype=torch.float64, initializer_range=0.3) for _ in range(2)]
    baseline = Released(theirs.model, frozen[0], eos_token_id=2, **options)
    encoder, decoder = Encoder(ours, **options), Decoder(frozen[1], eos_token_id=2)
    suffixes = [r["suffix_ids"] for r in rows]
    texts = [r["query_ids"] for r in rows]
    firsts = [r["target_ids"][0] for r in rows]

    z = encoder(texts + [r["positive_ids"] for r in rows], suffixes * 2)
    a, b, c, mask = alignment_scores(decoder, z, rows)
    align = alignment_loss(a, b, c, *reference, negative_mask=mask).loss
    compress = compression_loss(decoder.logprob(encoder(texts, suffixes), firsts), decoder.num_tokens(firsts))
    stage1 = [
        {"text_ids": r["query_ids"], "suffix_ids": r["suffix_ids"], "target_ids": r["target_ids"][0]} for r in rows
    ]
    slices = [(rows[i : i + 2], *(r[i : i + 2] for r in reference)) for i in range(0, 5, 2)]
    sliced = sum(baseline.alignment_loss(*part, batch=rows) * len(part[0]) / 5 for part in slices)
    widths = []
    baseline.encoder.register_forward_pre_hook(
        lambda _, __, kw: widths.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    for part in slices:
        baseline.alignment_loss(*part, batch=rows)
    assert widths == 3 * [13, 15, 13]  # 1 + longest query 7 or positive 9 + 2 + 3
    pairs = [
        (baseline.compression_loss(stage1), compress),
        (baseline.alignment_loss(rows, *reference), align),
        (sliced, align),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
        theirs.zero_grad()
        ours.zero_grad()
        found.backward()
        wanted.backward(retain_graph=True)
        mine = dict(ours.model.named_parameters())
        gradients = {n: p.grad for n, p in theirs.model.named_parameters()}
        assert max(g.abs().max() for g in gradients.values()) > 1e-3
        for name, gradient in gradients.items():
            largest = gradient.abs().max().item()
            torch.testing.assert_close(mine[name].grad, gradient, rtol=1e-5, atol=1e-5 * largest, msg=name)
