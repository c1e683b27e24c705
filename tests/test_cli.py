import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from conftest import sentence, write_jsonl
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from autoregembed import Encoder, models
from autoregembed.cli import main
from autoregembed.config import ConfigError
from autoregembed.evaluate import load_sts, sts
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train_flags import read_config

FIELDS = {"stage": 1, "model": "m", "train_data": "d.jsonl", "output_dir": "o"}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Messages are asserted on whole, so lines must not be broken."""
    monkeypatch.setenv("COLUMNS", "1000")
    from autoregembed import cli

    monkeypatch.setattr(cli.console, "width", 1000)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, what the library itself makes of texts)"""
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    model = tiny_model(vocab_size=len(tokenizer))
    ids = models.add_compress_tokens(model, tokenizer, 3)
    suffix = tokenizer("\n")["input_ids"]
    encoder = Encoder(model, compress_token_ids=ids, suffix_ids=suffix, bos_token_id=1, tokenizer=tokenizer)
    folder = encoder.save_pretrained(tmp_path_factory.mktemp("cli") / "model")
    return str(folder), encoder.encode


def config_file(tmp_path: Path, **fields) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**FIELDS, **fields}))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# train


def test_flags_win_over_the_file(tmp_path):
    file = config_file(tmp_path, batch_size=4, learning_rate=1e-3, freeze=["embed"], z_norm="match_rms")
    flags = ["--batch_size", "16", "--output_dir=other", "--stage", "2"]
    config = read_config([file, *flags])
    assert read_config([*flags, file]) == read_config([*flags[:3], file, *flags[3:]]) == config
    with pytest.raises(ConfigError, match=r"config: got '.*', 'another.yaml', expected one YAML file"):
        read_config([file, *flags, "another.yaml"])
    assert (config.stage, config.batch_size, config.output_dir) == (2, 16, "other")
    assert (config.learning_rate, config.freeze, config.z_norm, config.temperature) == (
        1e-3,
        ["embed"],
        "match_rms",
        0.1,
    )
    alone = [x for name, value in FIELDS.items() for x in (f"--{name}", str(value))]
    assert read_config(alone).model == "m"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_numbers_may_be_written_as_people_do(text, tmp_path):
    """YAML 1.1 takes 1e-4 for a string."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(FIELDS) + f"learning_rate: {text}\n")
    assert read_config([str(path)]).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rte": 0.1}, r"^learning_rte: got an unknown field \(did you mean 'learning_rate'\?\)"),
        ({"batchsize": 1}, r"^batchsize: got an unknown field \(did you mean 'batch_size'\?\)"),
        ({"qqq": 1}, "^qqq: got an unknown field, expected stage, model, "),
        ({"batch_size": "many"}, "^batch_size: got many, expected int$"),
        ({"batch_size": 2.5}, r"^batch_size: got 2\.5, expected int$"),
        ({"max_steps": "all"}, r"^max_steps: got all, expected int \| None$"),
        ({"stage": 3}, r"^stage: got 3, expected Literal\[1, 2\]$"),
        ({"ref_margin": "plus"}, r"^ref_margin: got plus, expected Literal\['add', 'subtract', 'none'\]"),
        ({"temperature": 0}, "^temperature: got 0"),
        ({"freeze": "embed"}, r"^freeze: got embed, expected list\[str\]"),
        ({"freeze": ["("]}, r"^freeze: got '\('"),
        ({"model": None}, "required: model"),
    ],
)
def test_a_wrong_field_is_named(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_config([config_file(tmp_path, **fields)])


def test_a_wrong_flag_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"^warmup_step: got an unknown field \(did you mean 'warmup_steps'\?\)"):
        read_config([config_file(tmp_path), "--warmup_step", "3"])
    with pytest.raises(ConfigError, match=r"^batch_size: got a few, expected int$"):
        read_config([config_file(tmp_path), "--batch_size", "a few"])


@pytest.mark.parametrize(("content", "message"), [("- 1\n", "expected a mapping"), ("a: [1\n", "cannot be read")])
def test_files_that_hold_no_fields_are_refused(content, message, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"^config: got .*{message}"):
        read_config([str(tmp_path / "c.yaml")])
    with pytest.raises(ConfigError, match=r"^config: got .*cannot be read"):
        read_config([str(tmp_path / "none.yaml")])


def test_a_field_that_is_missing_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("stage: 1\n")
    with pytest.raises(ConfigError, match=r"model|train_data|output_dir"):
        read_config([str(tmp_path / "c.yaml")])


def test_train_trains_and_bad_input_exits_with_2(model_folder, compression_file, tmp_path, capsys):
    fields = {"model": model_folder, "train_data": compression_file, "output_dir": str(tmp_path / "out")}
    file = config_file(tmp_path, **fields, max_steps=1, batch_size=4, max_length=99)
    assert main(["train", file, "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 1
    assert "{" not in printed, "the summary is a file"
    assert summary["export"] in printed
    page = (Path(__file__).parents[1] / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(f"`{name}`" in page for name in {*summary, *steps[0]}), "docs/reference/files.md"
    assert Path(summary["model"], "model.safetensors").is_file()
    for arguments, message in (
        (["train", file, "--max_steps", "0"], "ConfigError: max_steps: got 0"),
        (["train", file, "--train_data", str(tmp_path / "none.jsonl")], "FileNotFoundError: data: got"),
        (["train", file, "--model", str(tmp_path)], "CheckpointError: model: got"),
        (["train", file, "--bathc_size", "1"], "did you mean 'batch_size'?"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["tensorboard", "[tensorboard]", '["tensorboard"]'])
def test_one_tracker_needs_no_brackets(value, tmp_path):
    assert read_config([config_file(tmp_path), "--log_with", value]).log_with == ["tensorboard"]
    assert read_config([config_file(tmp_path, log_with=["wandb", "trackio"])]).log_with == ["wandb", "trackio"]
    assert read_config([config_file(tmp_path), "--log_with", "wandb,trackio"]).log_with == ["wandb", "trackio"]


def test_a_tracker_that_is_not_there_is_named(model_folder, compression_file, tmp_path, capsys):
    """accelerate would leave it out without a word."""
    fields = {"model": model_folder, "train_data": compression_file, "output_dir": str(tmp_path / "out")}
    assert main(["train", config_file(tmp_path, **fields, max_steps=1, log_with="tensorbord")]) == 2
    assert "ConfigError: log_with: got 'tensorbord', expected an installed tracker" in capsys.readouterr().err


def test_help_exits_with_0(capsys):
    assert main(["train", "--help"]) == 0
    assert "--contrastive_weight" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    for arguments in ([], ["trian"], ["eval", "--stts", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


# ----------------------------------------------------------------------------------------------------------------------
# encode, eval, doctor


@pytest.mark.parametrize(
    ("name", "content", "options", "texts"),
    [
        ("a.jsonl", '{"text": "the cat"}\n{"text": "a mat", "n": 3}\n', [], ["the cat", "a mat"]),
        ("a.JSON", '[{"_id": "1", "title": "old", "text": "rain"}]', [], ["old rain"]),
        ("a.json", '[{"_id": "1", "title": "old", "text": "rain"}]', ["--column", "text"], ["rain"]),
        ("a.csv", '\ufeffid,body\n1,"the\ncat"\n', ["--column", "body"], ["the\ncat"]),
        ("a.tsv", 'text\n"the\ncat"\n', [], ['"the', 'cat"']),
    ],
)
def test_encode_reads_a_column_of_rows(name, content, options, texts, exported, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert main(["encode", exported[0], str(tmp_path / name), str(tmp_path / "out.safetensors"), *options]) == 0
    found = load_file(tmp_path / "out.safetensors")["embeddings"]
    torch.testing.assert_close(found, exported[1](texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", '{"body": "the cat"}\n', [], "line 1 of 'a.jsonl', expected {text}"),
        ("a.csv", "text\nthe\n", ["--column", "body"], "expected {body}"),
        ("a.jsonl", '{"text": "the"}\n{"text": " "}\n', [], "texts: got an empty text in line 2 of 'a.jsonl'"),
        ("a.jsonl", '{"text": 3}\n', [], "TypeError: data: got 3 as 'text' in line 1"),
        ("a.txt", "the cat\n", ["--column", "text"], "ValueError: column: got 'text'"),
        ("a.txt.gz", "the cat\n", [], "ValueError: texts: got"),
        ("a.txt", "the cat\n", ["--prompt_name", "query"], "ValueError: prompt_name: got 'query'"),
    ],
)
def test_encode_refuses_columns_that_are_not_there(name, content, options, message, exported, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert main(["encode", exported[0], str(tmp_path / name), str(tmp_path / "out.safetensors"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_home_folder_is_found(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("the cat\n")
    assert main(["encode", exported[0], "~/texts.txt", "--output", "~/out.safetensors"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"texts.txt", "out.safetensors"}
    config_file(tmp_path, model="~/m", decoder="~/d", output_dir="~/o")
    config = read_config(["~/config.yaml"])
    assert [config.model, config.decoder, config.output_dir] == [str(tmp_path / name) for name in "mdo"]


@pytest.mark.parametrize("mode", ["encode", "eval"])
def test_a_place_that_cannot_be_written_is_found_first(mode, tmp_path, sts_file, monkeypatch, capsys):
    from autoregembed import cli

    monkeypatch.setattr(cli, "_exported", lambda model: pytest.fail("computed first"))
    (tmp_path / "texts.txt").write_text("the cat\n")
    rest = (
        [str(tmp_path / "texts.txt"), "/proc/out.npy"]
        if mode == "encode"
        else ["--sts", sts_file, "--json_file", "/proc/o"]
    )
    assert main([mode, "model", *rest]) == 2
    assert "which cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("query=question,pos=answer", {"query": "question", "pos": "answer"}),
        ("{query: question}", {"query": "question"}),
    ],
)
def test_columns_are_pairs_or_a_mapping(flag, value, tmp_path):
    assert read_config([config_file(tmp_path), "--columns", flag]).column_map == value
    assert read_config([config_file(tmp_path, columns=value)]).column_map == value


def test_several_files_are_a_list_or_have_commas_between(tmp_path):
    assert read_config([config_file(tmp_path), "--train_data", "[a.jsonl, b.jsonl]"]).train_data == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert read_config([config_file(tmp_path), "--train_data", "a.jsonl,b.jsonl"]).train_data == "a.jsonl,b.jsonl"
    assert read_config([config_file(tmp_path), "--lora_targets", "q_proj,v_proj"]).lora_targets == ["q_proj", "v_proj"]
    assert read_config([config_file(tmp_path), "--lora_targets", "q_proj"]).lora_targets == ["q_proj"]
    assert read_config([config_file(tmp_path), "--lora_targets", r".*\.q_proj"]).lora_targets == r".*\.q_proj"
    assert read_config([config_file(tmp_path)]).lora_targets == "all-linear"


def test_a_byte_order_mark_is_no_part_of_a_text(exported, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat\n", encoding="utf-8-sig")
    assert main(["encode", exported[0], str(tmp_path / "texts.txt"), str(tmp_path / "out.safetensors")]) == 0
    found = load_file(tmp_path / "out.safetensors")["embeddings"]
    torch.testing.assert_close(found, exported[1](["the cat"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("command", ["encode", "eval"])
def test_the_model_of_a_run_is_not_its_export(command, model_folder, tmp_path, capsys):
    """sentence-transformers would take the mean over all tokens, without a word."""
    model, tokenizer, _ = models.load_causal_lm(model_folder)
    ids = models.add_compress_tokens(model, tokenizer, 3)
    folder = models.save_model(tmp_path / "model", model, tokenizer, {"compress_token_ids": ids})
    (tmp_path / "texts.txt").write_text("the cat\n")
    pairs = tmp_path / "sts.csv"
    pairs.write_text("sentence1,sentence2,score\nthe cat,a mat,1\nthe,a,2\n")
    rest = (
        [str(tmp_path / "texts.txt"), str(tmp_path / "out.safetensors")]
        if command == "encode"
        else ["--sts", str(pairs)]
    )
    assert main([command, str(folder), *rest]) == 2
    assert "ValueError: model: got" in "".join(capsys.readouterr().err.split("\n"))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_encode_writes_the_embeddings_of_the_lines(source, exported, tmp_path, monkeypatch, capsys):
    folder, expected = exported
    texts = ["the cat sat", "Grüße </s>", sentence(0, 300)]
    content = "\n".join(texts) + "\n"
    (tmp_path / "texts.txt").write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    output = tmp_path / "e.safetensors"
    name = "-" if source == "stdin" else str(tmp_path / "texts.txt")
    places = [name, str(output)] if source == "stdin" else ["--texts", name, "--output", str(output)]
    assert main(["encode", folder, *places]) == 0
    found = load_file(output)["embeddings"]
    torch.testing.assert_close(found, expected(texts), rtol=0, atol=1e-5)
    assert "3 embeddings of 32 numbers" in capsys.readouterr().out


def test_equal_lines_are_embedded_once_and_written_each_in_its_place(exported, tmp_path, monkeypatch):
    read, encode = [], SentenceTransformer.encode
    monkeypatch.setattr(
        SentenceTransformer, "encode", lambda self, part, **options: read.extend(part) or encode(self, part, **options)
    )
    texts = ["a mat", "the cat", "a mat", "the dog", "the cat"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert main(["encode", exported[0], str(tmp_path / "texts.txt"), str(tmp_path / "e.safetensors")]) == 0
    found = load_file(tmp_path / "e.safetensors")["embeddings"]
    torch.testing.assert_close(found, exported[1](texts), rtol=0, atol=1e-5)
    assert sorted(read) == ["a mat", "the cat", "the dog"]


def test_a_name_with_npy_gets_a_file_that_numpy_reads(exported, tmp_path):
    (tmp_path / "texts.txt").write_text("the cat\na mat\n")
    assert main(["encode", exported[0], str(tmp_path / "texts.txt"), str(tmp_path / "e.npy")]) == 0
    found = torch.from_numpy(numpy.load(tmp_path / "e.npy", allow_pickle=False))
    torch.testing.assert_close(found, exported[1](["the cat", "a mat"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("the\n\ncat\n", {}, "ValueError: texts: got an empty text in line 2"),
        ("", {}, "ValueError: texts: got no line"),
        (None, {}, "FileNotFoundError"),
        ("the\n", {"output": "none/e.safetensors"}, "FileNotFoundError: output: got"),
        ("the\n", {"output": "."}, "FileNotFoundError: output: got"),
        (
            "the\n",
            {"output": "e.pt"},
            "ValueError: output: got 'e.pt', expected a name that ends in .safetensors or .npy",
        ),
        ("the\n", {"model": "nowhere"}, "CheckpointError: model: got 'nowhere', which cannot be loaded"),
    ],
)
def test_encode_refuses_and_writes_nothing(content, options, message, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("texts.txt").write_text(content)
    fields = {"model": exported[0], "texts": "texts.txt", "output": "e.safetensors", **options}
    assert main(["encode", *(x for name, value in fields.items() for x in (f"--{name}", value))]) == 2
    assert message in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} <= {"texts.txt"}


@pytest.mark.parametrize("command", ["encode", "eval"])
def test_a_folder_without_pooling_is_no_export(command, model_folder, tmp_path, sts_file, capsys):
    """sentence-transformers would take the mean over all tokens, without a word."""
    (tmp_path / "texts.txt").write_text("the cat\n")
    rest = [str(tmp_path / "texts.txt"), str(tmp_path / "out.npy")] if command == "encode" else ["--sts", sts_file]
    assert main([command, model_folder, *rest]) == 2
    assert "which has no modules.json, expected an export" in capsys.readouterr().err
    assert main([command, "/nowhere/export", *rest]) == 2
    assert "model: got '/nowhere/export', which cannot be loaded: it does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["none/out.json", ".", "file/out.json", "pipe"])
@pytest.mark.parametrize("command", ["encode", "eval", "bench"])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(command, place, tmp_path, monkeypatch, capsys):
    """Neither the model nor the pairs exist, and yet it is the output that is named."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    Path("texts.txt").write_text("the cat\n")
    os.mkfifo("pipe")
    arguments = {
        "encode": ["encode", "/nowhere", "texts.txt", place],
        "eval": ["eval", "/nowhere", "--sts", "none.csv", "--json_file", place],
        "bench": ["bench", "--json", place],
    }
    assert main(arguments[command]) == 2
    name = {"encode": "output", "eval": "json_file", "bench": "json"}[command]
    assert f"Error: {name}: got '{place}', " in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"file", "texts.txt", "pipe"}


def test_embeddings_that_do_not_fit_onto_the_disk_are_not_computed(exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("the cat\n" * 10)
    usage = shutil.disk_usage(tmp_path)
    arguments = ["encode", exported[0], str(tmp_path / "texts.txt"), str(tmp_path / "out.npy")]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 10 * 32 - 1))
    assert main(arguments) == 2
    assert "OSError: output: got" in (error := capsys.readouterr().err)
    assert "GB free, expected" in error
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * 10 * 32))
    assert main(arguments) == 0


def test_a_tilde_is_the_home_folder(exported, sts_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported[0], tmp_path / "home export")
    (tmp_path / "texts.txt").write_text("the cat\n")
    assert main(["encode", "~/home export", "~/texts.txt", "~/out.safetensors"]) == 0
    assert main(["eval", "~/home export", "--sts", sts_file, "--json_file", "~/out.json"]) == 0
    assert (tmp_path / "out.safetensors").is_file()
    assert (tmp_path / "out.json").is_file()
    config = read_config(
        ["--stage", "1", "--model", "~/lm", "--train_data", "~/t.jsonl", "--output_dir", "~/out", "--decoder", "~user"]
    )
    assert (config.model, config.train_data) == (f"{tmp_path}/lm", f"{tmp_path}/t.jsonl")
    assert (config.output_dir, config.decoder, config.eval_data) == (f"{tmp_path}/out", "~user", None)


def beir(tmp_path) -> list[str]:
    corpus = [{"_id": str(i), "title": "", "text": sentence(i, 6)} for i in range(20)]
    queries = [{"_id": f"q{i}", "text": sentence(i, 6)} for i in range(5)]
    (tmp_path / "qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{i}\t1\n" for i in range(4)) + "q4\t9\t1\n"
    )
    names = {
        "corpus": write_jsonl(tmp_path / "corpus.jsonl", corpus),
        "queries": write_jsonl(tmp_path / "q.jsonl", queries),
    }
    return [x for name, value in {**names, "qrels": str(tmp_path / "qrels.tsv")}.items() for x in (f"--{name}", value)]


def test_eval_scores_sts_and_retrieval(exported, sts_file, tmp_path, capsys):
    folder, library = exported
    output = tmp_path / "result.json"
    assert main(["eval", folder, "--sts", sts_file, *beir(tmp_path), "--json_file", str(output)]) == 0
    found = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["spearman"] == pytest.approx(sts(library, load_sts(sts_file))["spearman"], abs=1e-6)
    assert (found["pairs"], found["queries"], found["documents"]) == (12, 5, 20)
    assert found["recall@1"] == pytest.approx(0.8)
    assert 0.8 <= found["ndcg@10"] < 1
    assert found["relevant_but_absent"] == 0
    assert main(["eval", folder, "--sts", sts_file]) == 0
    assert "ndcg@10" not in json.loads(capsys.readouterr().out)
    assert main(["eval", folder, *beir(tmp_path)]) == 0
    assert "spearman" not in json.loads(capsys.readouterr().out)


def test_eval_says_what_counts(exported, tmp_path, capsys):
    arguments = beir(tmp_path)
    with (tmp_path / "qrels.tsv").open("a") as file:
        file.write("q4\tgone\t1\nq4\tlost\t0\nnobody\t1\t1\n")
    write_jsonl(tmp_path / "q.jsonl", [{"_id": f"q{i}", "text": sentence(i, 6)} for i in range(9)])
    assert main(["eval", exported[0], *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["queries"], found["documents"], found["relevant_but_absent"]) == (5, 20, 1)


def test_an_undefined_correlation_is_null_with_its_reason(exported, tmp_path, capsys):
    rows = [{"sentence1": "the cat", "sentence2": "the cat", "score": i} for i in range(3)]
    output = tmp_path / "result.json"
    file = write_jsonl(tmp_path / "same.jsonl", rows)
    assert main(["eval", exported[0], "--sts", file, "--json_file", str(output)]) == 0
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    found = json.loads(output.read_text(), **refuse)
    assert json.loads(capsys.readouterr().out, **refuse) == found
    assert found["spearman"] is None
    assert "two different values" in found["spearman_undefined"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ValueError: sts: got None"),
        (["--corpus", "c.jsonl"], "ValueError: queries: got None"),
        (["--sts", "none.csv"], "FileNotFoundError: data: got 'none.csv', which does not exist"),
    ],
)
def test_eval_refuses(arguments, message, exported, capsys):
    assert main(["eval", exported[0], *arguments]) == 2
    assert message in capsys.readouterr().err


def test_doctor_says_what_runs_and_why_the_rest_does_not(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in printed.splitlines() if "  " in line.strip())
    assert rows["torch"] == torch.__version__
    assert rows["impl=torch"] == "ok"
    assert rows["attention=sdpa (float32)"] == "ok"
    assert "needs CUDA" in rows["attention=varlen (float32)"]
    assert rows["impl=auto"] in {name.removeprefix("impl=") for name, state in rows.items() if state[:2] == "ok"}
    if not torch.cuda.is_available():
        assert not any(name.startswith("device cuda") for name in rows)


def test_the_module_runs_as_a_command(tmp_path):
    command = [sys.executable, "-m", "autoregembed"]
    result = subprocess.run([*command, "nonsense"], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2, result.stderr
    assert "{train,plan,encode,eval,doctor,bench,init,probe,export,completion}" in result.stderr
