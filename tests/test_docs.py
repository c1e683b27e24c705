"""README and docs: every block of code runs, every command parses, every quoted error is the one that is raised."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sentence, write_jsonl
from sentence_transformers.losses import MatryoshkaLoss
from transformers import AutoModelForCausalLM

from autoregembed import (
    Decoder,
    Encoder,
    __version__,
    cli,
    data,
    files,
    generative_info_nce,
    info_nce,
    linear_logprob,
    loading,
    models,
    plan,
    reference_scores,
    score_distillation,
)
from autoregembed.config import Config, Stage2Options
from autoregembed.integrations.sentence_transformers import AutoRegEmbedLoss, from_causal_lm
from autoregembed.prompt import Prompt
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import train
from autoregembed.train_flags import read_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = ROOT / "docs" / "reference"
INCLUDE = re.compile(r'--8<-- "([^":]+)(?::\d+)?"')


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert all(name in ("python", "bash", "yaml", "bibtex", "") for name, _ in found), "a language that no test reads"
    return [code for name, code in found if name == language]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ----------------------------------------------------------------------------------------------------------------------
# Python


def test_the_drop_in_gives_the_numbers_and_gradients_that_it_replaces():
    before, after = (code for code in blocks(ROOT / "README.md", "python") if "score = " in code)
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4]
    names = {
        "torch": torch,
        "lengths": lengths,
        "cu_seqlens": torch.tensor([0, 3, 4, 8]),
        "weight": torch.randn(50, 16, generator=generator),
        "target": torch.randint(50, (8,), generator=generator),
    }
    hidden = torch.randn(8, 16, generator=generator)
    results = []
    for code in (before, after):
        scope = {**names, "hidden": hidden.clone().requires_grad_()}
        exec(code, scope)
        (scope["score"] * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        results.append((scope["score"].detach(), scope["hidden"].grad))
    for old, new in zip(*results, strict=True):
        assert old.abs().max() > 1
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def stage1(model_folder, tmp_path_factory) -> dict:
    """The summary of a stage 1 by the recipe of the ready configurations: `model` and `export` are its folders."""
    folder = tmp_path_factory.mktemp("stage1")
    config = Config(
        stage=1, model=model_folder, output_dir=str(folder / "out"), max_steps=1, batch_size=4, precision="fp32",
        train_data=write_jsonl(folder / "texts.jsonl", [{"text": sentence(i, 8)} for i in range(8)]),
        z_norm="match_rms", init_output_rms=True, decoder_add_bos=True, max_length=64, max_target_length=32,
    )  # fmt: skip
    return train(config, cli.Console(quiet=True))


def test_the_step_in_your_own_code(stage1, model_folder):
    (code,) = (code for code in blocks(ROOT / "docs" / "index.md", "python") if "Decoder" in code)
    scope = {"STAGE1": stage1["model"]}
    exec(code, scope)
    assert isinstance(scope["encoder"].model, type(AutoModelForCausalLM.from_pretrained(model_folder)))
    assert scope["decoder"].z_norm == "match_rms", "as in stage 1"
    assert scope["decoder"].prefix, "with bos, as in stage 1"
    assert 0 < scope["loss"].item() < 10
    gradient = scope["encoder"].model.get_input_embeddings().weight.grad
    ids = scope["encoder"].compress_token_ids
    assert gradient[ids].abs().amax(1).min() > 0, "every compress token is trained"
    assert all(p.grad is None for p in scope["decoder"].parameters())


@pytest.mark.parametrize("page", [p for p in PAGES[2:] if blocks(p, "python") and p.stem != "tutorial"], ids=named)
def test_the_blocks_of_a_page_run_one_after_the_other(page, model_folder, stage1, tmp_path, monkeypatch):
    """Included files are the examples, which have tests of their own."""
    text = page.read_text(encoding="utf-8")
    for file in INCLUDE.findall(text):
        assert (ROOT / file).is_file()
    monkeypatch.chdir(tmp_path)
    scope: dict = {"NAME": model_folder, "FOLDER": str(tmp_path)}
    scope |= {"STAGE1": stage1["model"], "EXPORT": stage1["export"]}
    for code in blocks(page, "python"):
        if INCLUDE.search(code):
            assert re.fullmatch(r'--8<-- "examples/\w+\.py"\n', code)
            continue
        exec(code, scope)
        if "loss" in scope:
            assert torch.isfinite(scope.pop("loss"))


# ----------------------------------------------------------------------------------------------------------------------
# Commands and YAML


def write_files(page: Path, folder: Path) -> None:
    """Every YAML block lies where its first line says."""
    for code in blocks(page, "yaml"):
        if INCLUDE.search(code):
            continue
        name = re.match(r"# (\S+\.yaml)\n", code)
        assert name, f"a YAML block without a name in {page.name}"
        (folder / name[1]).write_text(code)


def parse_accelerate(words: list[str]) -> list[str]:
    """Checks `accelerate launch`'s own flags; returns the program and its arguments."""
    from accelerate.commands.launch import launch_command_parser

    found = launch_command_parser().parse_args(words)
    return ["-m", found.training_script, *found.training_script_args] if found.module else [
        found.training_script, *found.training_script_args
    ]  # fmt: skip


def noted(called: list, name: str, *_, **__) -> None:
    called.append(name)


def run_command(line: str, called: list) -> None:
    words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *parse_accelerate(words[2:])]
    if words[0] == "torchrun":
        found = importlib.import_module("torch.distributed.run").get_args_parser().parse_args(words[1:])
        words = ["python", "-m", found.training_script, *found.training_script_args]
    if words[:3] == ["python", "-m", "autoregembed"]:
        words = words[2:]
    if words[:2] == ["autoregembed", "train"]:
        called.extend(cli.read_configs(words[2:]))
    elif words[:2] == ["autoregembed", "plan"]:
        called.extend(cli.read_configs(plan.read_machine(words[2:])[1]))
    elif words[:2] == ["autoregembed", "init"]:
        assert cli.main(words[1:]) == 0, line
    elif words[0] == "autoregembed":
        assert cli.main(words[1:]) == 0, line
        assert called[-1].lstrip("_").startswith(words[1]), line
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[:3] == ["pip", "install", "--no-deps"]:
        assert all(name in (ROOT / "Makefile").read_text() for name in words[3:]), line
    elif words[:2] == ["pip", "install"]:
        assert words[2] == "-e", line
        for extra in re.fullmatch(r"\.\[(.*)\]", words[3])[1].split(","):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), line
    else:
        raise AssertionError(f"a command that no test knows: {line}")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_parse(page, tmp_path, monkeypatch, capsys):
    """By the parser of the command itself, which then does nothing."""
    called: list = []
    for name in ("_encode", "_evaluate", "_doctor", "_bench", "_probe", "export_model"):
        function = getattr(cli, name)
        monkeypatch.setattr(cli, name, functools.wraps(function)(functools.partial(noted, called, name)))
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", "").splitlines():
            if line.strip():
                run_command(line, called)


def test_no_page_names_a_page_that_is_gone():
    """mkdocs checks the site's own links; this holds what README, CONTRIBUTING, configurations and code point at."""
    code = [file for folder in ("autoregembed", "kernels", "bench") for file in (ROOT / folder).rglob("*.py")]
    for page in [*PAGES[:2], *ROOT.glob("examples/configs/*/*.yaml"), *code]:
        for link in re.findall(r"(?<![/\w])docs/[\w/.-]+\.(?:md|svg|py)", page.read_text(encoding="utf-8")):
            assert (ROOT / link).is_file(), f"{page.name}: {link}"


def test_the_sites_pages_are_all_in_its_navigation():
    def listed(entries):
        for entry in entries:
            for page in entry.values():
                yield from listed(page) if isinstance(page, list) else [page]

    pages = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(pages) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))


def test_the_names_of_the_api_page_exist():
    import importlib

    names = re.findall(r"^::: ([\w.]+)\.(\w+)$", (REFERENCE / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 10
    for module, name in names:
        assert getattr(importlib.import_module(module), name).__doc__, name


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == __version__


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def raised(call) -> str:
    with pytest.raises(
        (ValueError, TypeError, IndexError, OSError, RuntimeError, ArithmeticError, MemoryError)
    ) as error:
        call()
    return str(error.value)


def triggers(tmp_path: Path, model_folder: str, compression_file: str):
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    prompt = Prompt(tokenizer, 3, 1, "Again:", 64)
    encoder = Encoder(tiny_model(), compress_token_ids=[317, 318, 319])

    def rows(*lines: dict):
        return data.load_rows(write_jsonl(tmp_path / "rows.jsonl", list(lines)))

    yield lambda: read_config(["--learning_rte", "0.1"])
    yield lambda: data.compression_rows(rows({"sentence": "a"}), prompt)
    yield lambda: data.alignment_rows(rows({"query": "a", "pos": "b", "answer": "c"}), prompt)
    (tmp_path / "cells.tsv").write_text("query\tpos\na\n")
    yield lambda: data.load_rows(str(tmp_path / "cells.tsv"))
    yield lambda: data.alignment_rows(rows({"query": "", "pos": "a", "neg": "b"}), prompt)
    common = {"stage": 1, "model": model_folder, "train_data": compression_file, "output_dir": str(tmp_path / "out")}
    wild = Config(**common, learning_rate=1e30, max_grad_norm=0, max_steps=9, batch_size=8, precision="fp32")
    yield lambda: train(wild, cli.Console(quiet=True))

    def too_large():
        with plan.naming_ways_out(Config(**common)):
            raise torch.OutOfMemoryError("CUDA out of memory")

    yield too_large
    reference_scores.save_ref_logps(tmp_path / "scores", torch.zeros(1), torch.zeros(1, 1), {"data": "one"})
    yield lambda: reference_scores.load_ref_logps(tmp_path / "scores", {"data": "another"})

    def used_folder():
        with files.atomic_folder(tmp_path):
            pass

    yield used_folder
    yield lambda: encoder.fit_max_length(257)
    yield lambda: encoder([[5] * 300])
    yield lambda: models.load_causal_lm(str(tmp_path / "nothing"))
    mixed = tiny_model()
    mixed.config.layer_types = ["full_attention", "conv"]
    yield lambda: Encoder(mixed, compress_token_ids=[3])
    yield lambda: Encoder(tiny_model(), compress_token_ids=[3], tokenizer=object())

    def cut_loss():
        start = from_causal_lm(model_folder, tmp_path / "start", num_compress_tokens=1)
        loss = AutoRegEmbedLoss(start, Decoder.from_pretrained(model_folder), Stage2Options(ref_margin="none"))
        MatryoshkaLoss(start, loss, [32, 16])([start.preprocess(["the cat"]) for _ in range(3)], None)

    yield cut_loss
    models.save_model(tmp_path / "awq", tiny_model(), tokenizer, {})
    config = files.read_json(tmp_path / "awq" / "config.json", "model")
    files.write_json(tmp_path / "awq" / "config.json", {**config, "quantization_config": {"quant_method": "awq"}})

    def read_by_rows():
        with loading.in_parts():
            models.load_causal_lm(str(tmp_path / "awq"))

    yield read_by_rows
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    yield lambda: Decoder(broken)
    adapted = tiny_model()
    adapted.lm_head = type("LoraLinear", (torch.nn.Linear,), {})(32, 320, bias=False)
    yield lambda: Decoder(adapted)
    yield lambda: Encoder(tiny_model(), compress_token_ids=[3], attention="varlen")
    h, w = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    yield lambda: linear_logprob(h, w, torch.tensor([0, 1]), impl="cpp")
    yield lambda: linear_logprob(h, w, torch.tensor([0, 5]))
    x = torch.zeros(2, 2)
    yield lambda: generative_info_nce(x, mask=torch.zeros(2, 2, dtype=torch.bool))
    yield lambda: info_nce(x, x, temperature=torch.tensor(-0.1))
    yield lambda: score_distillation(x, x, x, teacher_temperature=torch.tensor(1.0))
    yield lambda: score_distillation(x, x, x.clone().requires_grad_())


def test_the_quoted_errors_are_those_that_the_code_raises(tmp_path, model_folder, compression_file):
    quoted = re.findall(r"^### `(.*)`$", (REFERENCE / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = [raised(call) for call in triggers(tmp_path, model_folder, compression_file)]
    assert len(quoted) == len(found)
    for message, text in zip(found, quoted, strict=True):
        pattern = ".*".join(map(re.escape, text.split("…")))
        assert re.fullmatch(pattern, message, re.DOTALL), f"{message!r} is not {text!r}"
