"""`autoregembed probe`: what a stage-1 model has learned."""

import json

import pytest
import torch
from conftest import sentence, stage1, write_jsonl

from autoregembed import Decoder, Encoder, cli
from autoregembed.diagnostics import FINDS, MEANING, probe, spaces
from autoregembed.train import train


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """The model/ of a run that has learned to write a text from its embedding."""
    from rich.console import Console

    folder = tmp_path_factory.mktemp("probe")
    rows = [{"text": sentence(i, 4 + i % 7)} for i in range(24)]
    file = write_jsonl(folder / "texts.jsonl", rows)
    train(stage1(model_folder, file, folder / "run", max_steps=40, learning_rate=3e-3), Console(quiet=True))
    return str(folder / "run" / "model")


def test_the_shares_are_those_of_a_loop_over_pairs(trained):
    queries, passages = [sentence(i, 5) for i in range(7)], [sentence(50 + i, 4) for i in range(7)]
    encoder, decoder = Encoder.from_pretrained(trained), Decoder.from_pretrained(trained)
    found = probe(encoder, decoder, queries, passages, block=4)
    assert [*found] == [name for name in MEANING if name != "cosine_whitened"]  # 14 texts
    with torch.no_grad():
        z, own_z = encoder(encoder.tokenize(queries)), encoder(encoder.tokenize(passages))
        targets = decoder.tokenize(passages)
        rows = columns = marginal = below = 0
        for block in (range(4), range(4, 7)):
            scores = {(i, j): float(decoder.logprob(z[i : i + 1], [targets[j]])) for i in block for j in block}
            lse = {j: torch.tensor([scores[i, j] for i in block]).logsumexp(0).item() for j in block}
            rows += sum(max(block, key=lambda j: scores[i, j]) == i for i in block)
            columns += sum(max(block, key=lambda i: scores[i, j]) == j for j in block)
            marginal += sum(max(block, key=lambda j: scores[i, j] - lse[j]) == i for i in block)
            below += sum(scores[i, i] < float(decoder.logprob(own_z[i : i + 1], [targets[i]])) for i in block)
    wanted = {"rows": rows / 7, "columns": columns / 7, "rows_minus_marginal": marginal / 7, "a_below_b": below / 7}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    shares = {*FINDS, "variance_of_passage", "gradient_in_mean"} & {*found}
    assert all(0 <= found[name] <= 1 for name in shares)


def test_a_model_that_has_learned_knows_its_own_texts(trained, model_folder):
    texts = [sentence(i, 4 + i % 7) for i in range(12)]
    learned, raw = (
        probe(Encoder.from_pretrained(name), Decoder.from_pretrained(name), texts, texts)
        for name in (trained, model_folder)
    )
    assert learned["columns"] > raw["columns"] + 0.3
    assert learned["nats_per_token"] < learned["nats_per_token_mean_z"] - 0.3
    assert abs(raw["nats_per_token"] - raw["nats_per_token_mean_z"]) < 0.3
    assert learned["cosine"] == 1.0


def test_spaces_are_centred_and_white():
    x = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 3
    found = spaces(x)
    assert found["centred"].mean(0).abs().max() < 1e-12
    white = found["whitened"]
    torch.testing.assert_close(white.T @ white / 50, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_no_whitening_by_fewer_texts_than_directions():
    """All cosines would be -1 / (n - 1): Spearman's correlation and the nearest neighbour would be rounding errors."""
    x = torch.randn(5, 4, dtype=torch.float64)
    assert [*spaces(x)] == ["plain", "centred", "whitened"]
    assert [*spaces(x[:4])] == ["plain", "centred"]


def test_the_command_prints_and_writes(trained, tmp_path, capsys):
    rows = [{"query": sentence(i, 5), "pos": sentence(50 + i, 4), "neg": sentence(90 + i, 4)} for i in range(9)]
    file = write_jsonl(tmp_path / "triplets.jsonl", rows)
    out = tmp_path / "probe.json"
    assert cli.main(["probe", trained, file, "--rows", "8", "--block", "4", "--json_file", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert kept["pairs"] == 8
    assert set(MEANING) - {"cosine_whitened"} < set(kept)
    shown = capsys.readouterr().out
    assert "rows_minus_marginal" in shown
    assert "8 pairs in blocks of 4" in shown


def test_too_few_pairs_are_refused(trained):
    encoder, decoder = Encoder.from_pretrained(trained), Decoder.from_pretrained(trained)
    with pytest.raises(ValueError, match="queries: got 1 in blocks of 12, expected at least 2"):
        probe(encoder, decoder, ["the cat"], ["the mat"])
    with pytest.raises(ValueError, match="passages: got 1, expected one for each of 2 queries"):
        probe(encoder, decoder, ["the cat", "a mat"], ["the mat"])
