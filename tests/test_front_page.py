"""README and figures show what the committed results say, and the tutorial runs from first line to last."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import sentence

from autoregembed import cli
from autoregembed.bench import scaling

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "hooks" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) < 130


def test_the_first_lines_print_what_is_printed_below_them():
    code = BLOCK.search(README)[2]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue().strip() == code.strip().splitlines()[-1].removeprefix("# ")


def test_the_result_table_is_that_of_the_study():
    found = json.loads((ROOT / "bench" / "results" / "study-cpu.json").read_text())
    baseline = found["untrained"]["all_tokens"]["test"]
    assert f"| baseline: untrained, mean over tokens | {baseline:.3f} | |" in README
    rows = {
        "stage 1: compression": "stage1", "baseline: InfoNCE": "infonce", "**stage 1, then InfoNCE**": "stage1-infonce",
        "stage 1, then InfoNCE and": "stage1-joint", "alignment alone": "alignment",
    }  # fmt: skip
    for row, cell in rows.items():
        (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
        scores = [seed["test"] for seed in found["cells"][cell]]
        mean = sum(scores) / len(scores)
        spread = (sum((x - mean) ** 2 for x in scores) / (len(scores) - 1)) ** 0.5
        gain = f"{mean - baseline:+.2f}".replace("-", "−")
        assert re.findall(r"[+−]?\d\.\d+", line) == [f"{mean:.3f}", f"{spread:.3f}", gain], line


def test_the_committed_figures_are_those_that_the_script_draws(figures):
    assert (ROOT / "docs" / "img" / "method.svg").read_text(encoding="utf-8") == figures.method()
    # matplotlib's versions differ in coordinates; the words and numbers are these.
    words = [re.findall(r"<text[^>]*>([^<]+)</text>", svg) for svg in (
        (ROOT / "docs" / "img" / "costs.svg").read_text(encoding="utf-8"), figures.costs()
    )]  # fmt: skip
    assert words[0] == words[1]
    assert {"TRL", "eager", "cut-cross-entropy", "released algorithm"} <= set(words[0])


def test_the_papers_page_shows_what_its_command_prints():
    assert scaling.paper() in (ROOT / "docs" / "howto" / "paper.md").read_text(encoding="utf-8")


# Sizes of a test in place of the recipe's.
SMALL = {
    "train": "--max_steps 1 --batch_size 4 --precision fp32 --max_length 64 --max_target_length 32",
    "probe": "--rows 8 --block 4",
}


@pytest.fixture
def news(tmp_path, monkeypatch):
    """The files of the package gensim that the tutorial reads, with sentences that the tiny tokenizer knows."""
    folder = tmp_path / "packages" / "gensim" / "test" / "test_data"
    folder.mkdir(parents=True)
    (folder.parents[1] / "__init__.py").touch()
    (folder / "lee_background.cor").write_text(". ".join(sentence(i, 9) for i in range(40)))
    (folder / "lee.cor").write_text("\n".join(sentence(100 + i, 12) for i in range(50)))
    ratings = "\n".join(" ".join(f"{(i * j) % 5 / 4}" for j in range(50)) for i in range(50))
    (folder / "similarities0-1.txt").write_text(ratings)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))


def test_the_tutorial_runs(news, tmp_path, monkeypatch, model_folder, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    ran = []
    for language, code in BLOCK.findall(text):
        if language == "python":
            exec(code, {"__name__": "tutorial"})
            continue
        assert language == "bash"
        for line in code.replace("\\\n", "").splitlines():
            words = shlex.split(line)
            if words[0] == "pip":
                continue
            small = shlex.split(SMALL.get(words[1], ""))
            model = ["--model", model_folder] if words[1] == "train" else []
            assert words[0] == "autoregembed"
            assert cli.main([*words[1:], *small, *model]) == 0, line
            ran.append(words[1])
    assert ran == ["init", "train", "probe", "eval", "eval", "encode"]
    printed = capsys.readouterr().out
    assert len(re.findall(r"^-?\d\.\d\d  the|^-?\d\.\d\d  \w+ ", printed, re.MULTILINE)) == 3, "three texts are found"
