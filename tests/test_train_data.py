"""What a run does with its data: negatives, prompts of a side, batches larger than the data, where scores are kept."""

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from conftest import sentence, stage1, stage2, write_jsonl
from rich.console import Console
from sentence_transformers import SentenceTransformer

from autoregembed import Encoder
from autoregembed.cli import main
from autoregembed.config import ConfigError
from autoregembed.train import train

FAST = {"max_steps": 1, "alignment_weight": 0.0, "contrastive_weight": 1.0}
SIDES = {"query_instruction": "green hills ", "passage_instruction": "stone "}


def pairs(path: Path, n: int, **columns) -> str:
    return write_jsonl(path, [{"query": sentence(i, 5), "pos": sentence(i + 50, 4), **columns} for i in range(n)])


def printed(config) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    train(config, console)
    return console.export_text()


def test_a_batch_is_cut_to_the_rows_of_the_data(model_folder, tmp_path):
    config = stage2(model_folder, pairs(tmp_path / "a.jsonl", 3), tmp_path / "out", **FAST, batch_size=8)
    assert "batch_size: reduced from 8 to 3 per process, for 3 rows of data" in printed(config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["batch_size"] == 3
    assert "batch_size: cut" not in printed(
        stage2(model_folder, config.train_data, tmp_path / "two", **FAST | {"batch_size": 3})
    )
    streamed = stage2(model_folder, config.train_data, tmp_path / "three", **FAST, batch_size=8, streaming=True)
    with pytest.raises(ValueError, match=r"^batch_size: got 8 on each of 1 processes, expected at most 3"):
        printed(streamed)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"hard_negatives": True}, "hard_negatives is true"),
        ({"alignment_weight": 1.0, "hard_negatives": True}, "alignment_weight > 0"),
    ],
)
def test_negatives_that_are_wanted_must_be_there(weights, expected, model_folder, tmp_path, quiet):
    config = stage2(model_folder, pairs(tmp_path / "a.jsonl", 3), tmp_path / "out", **FAST | weights)
    with pytest.raises(ValueError, match=rf"^data: got no negative in any row, expected .*{expected}"):
        train(config, quiet)


def test_a_stream_is_looked_at_for_its_negatives(model_folder, tmp_path, quiet):
    options = FAST | {"alignment_weight": 1.0, "ref_margin": "none", "streaming": True, "batch_size": 3}
    file = pairs(tmp_path / "a.jsonl", 4)
    with pytest.raises(ValueError, match=r"^data: got no negative in any of the first 4 rows, expected .*alignment_w"):
        train(stage2(model_folder, file, tmp_path / "one", **options), quiet)
    rows = [{"query": sentence(i, 5), "pos": sentence(i, 4), "neg": ["old rain"] * (i > 0)} for i in range(4)]
    file = write_jsonl(tmp_path / "b.jsonl", rows)
    said = printed(stage2(model_folder, file, tmp_path / "two", **options))
    assert "data: 1 of the first 4 rows have no negative" in said


def test_negatives_that_are_missing_or_not_read_are_told(model_folder, tmp_path):
    file = pairs(tmp_path / "a.jsonl", 3, negative_1="old rain")
    said = printed(stage2(model_folder, file, tmp_path / "one", **FAST))
    assert "data: the negatives are not read, as hard_negatives is false and alignment_weight 0" in said
    with open(file, "a") as rows:
        rows.write(json.dumps({"query": "the", "pos": "cat"}) + "\n")
    said = printed(stage2(model_folder, file, tmp_path / "two", **FAST, hard_negatives=True))
    assert "data: 1 of 4 rows have no negative" in said


def test_prompts_of_a_side_reach_training_export_encode_and_eval(model_folder, tmp_path, quiet, capsys):
    file = pairs(tmp_path / "a.jsonl", 4)
    summary = train(stage2(model_folder, file, tmp_path / "out", **FAST, **SIDES), quiet)
    plain = train(stage2(model_folder, file, tmp_path / "plain", **FAST), quiet)
    weights = [Encoder.from_pretrained(s["export"]).model.state_dict() for s in (summary, plain)]
    assert any(not torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    encoder, served = Encoder.from_pretrained(summary["export"]), SentenceTransformer(summary["export"])
    assert served.prompts == encoder.prompts == {"query": "green hills ", "document": "stone "}
    assert Encoder.from_pretrained(summary["model"]).prompts == encoder.prompts
    assert (encoder.prompt.query_instruction, encoder.prompt.passage_instruction) == tuple(SIDES.values())
    texts = ["the cat", sentence(3, 9)]
    for name, before, encode in (
        ("query", "green hills ", served.encode_query), ("document", "stone ", served.encode_document)
    ):  # fmt: skip
        expected = encoder.encode([before + text for text in texts])
        torch.testing.assert_close(encoder.encode(texts, prompt_name=name), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(encode(texts)), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^prompt_name: got 'passage'"):
        encoder.encode(texts, prompt_name="passage")
    (tmp_path / "t.txt").write_text("the cat\n")
    command = ["encode", summary["export"], str(tmp_path / "t.txt"), str(tmp_path / "e.safetensors")]
    assert main(command) == 2
    assert "prompt_name: got None" in capsys.readouterr().err
    assert [main([*command, "--prompt_name", name]) for name in ("none", "query", "document")] == [0, 0, 0]


def test_prompts_belong_to_stage_2(model_folder, compression_file, tmp_path):
    with pytest.raises(ConfigError, match=r"^query_instruction: got 'a', expected None in stage 1"):
        stage1(model_folder, compression_file, tmp_path / "out", query_instruction="a")


def test_eval_reads_queries_and_documents_with_their_prompts(model_folder, tmp_path, quiet, capsys):
    """The corpus holds what the query is with its prompt: only a query that is read with it finds that first."""
    file = pairs(tmp_path / "a.jsonl", 4)
    summary = train(stage2(model_folder, file, tmp_path / "out", **FAST, query_instruction="green hills "), quiet)
    names = ["corpus", "queries"]
    documents = [{"_id": "0", "text": "the cat"}, {"_id": "1", "text": "green hills the cat"}]
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in zip(names, (documents, documents[:1]), strict=True)
    ]
    qrels = write_jsonl(tmp_path / "qrels.jsonl", [{"query-id": "0", "corpus-id": "1", "score": 1}])
    capsys.readouterr()
    flags = [x for n, value in zip([*names, "qrels"], [*files, qrels], strict=True) for x in (f"--{n}", value)]
    assert main(["eval", summary["export"], *flags]) == 0
    assert json.loads(capsys.readouterr().out)["recall@1"] == 1


def test_wrong_training_data_is_refused_before_the_model_is_loaded(tmp_path, quiet):
    config = stage2("nowhere", write_jsonl(tmp_path / "a.jsonl", [{"query": "a", "answer": "b"}]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"^data: got columns \['answer', 'query'\]"):
        train(config, quiet)


def test_columns_of_the_configuration_are_read(model_folder, tmp_path, quiet):
    rows = [{"question": sentence(i, 5), "answer": sentence(i + 50, 4), "note": "rain"} for i in range(4)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    mapped = stage2(model_folder, file, tmp_path / "out", **FAST, columns="query=question,pos=answer")
    same = stage2(model_folder, pairs(tmp_path / "b.jsonl", 4), tmp_path / "two", **FAST)
    found = [Encoder.from_pretrained(train(c, quiet)["export"]).model.state_dict() for c in (mapped, same)]
    for one, two in zip(*(f.values() for f in found), strict=True):
        assert torch.equal(one, two)


def test_the_folder_of_the_data_is_only_read(model_folder, alignment_file, tmp_path, quiet):
    folder = tmp_path / "shared"
    folder.mkdir()
    file = folder / "rows.jsonl"
    file.write_bytes(Path(alignment_file).read_bytes())
    train(stage2(model_folder, str(file), tmp_path / "out", max_steps=1), quiet)
    assert [p.name for p in folder.iterdir()] == ["rows.jsonl"]
    kept = list((Path(datasets.config.HF_DATASETS_CACHE) / "autoregembed").glob("ref-logps-*.safetensors"))
    stamps = [p.stat().st_mtime_ns for p in kept]
    assert kept
    train(stage2(model_folder, str(file), tmp_path / "two", max_steps=1), quiet)
    assert [p.stat().st_mtime_ns for p in kept] == stamps  # another run reads what the first has computed


def test_a_place_for_scores_is_tried_before_the_computation(model_folder, alignment_file, tmp_path, quiet, monkeypatch):
    from autoregembed import reference_scores

    monkeypatch.setattr(reference_scores, "compute_ref_logps", lambda *a, **k: pytest.fail("computed first"))
    config = stage2(model_folder, alignment_file, tmp_path / "out", ref_logps_file="/proc/none/r.safetensors")
    with pytest.raises(OSError, match=r"^ref_logps_file: got '/proc/none', which cannot be written"):
        train(config, quiet)
