import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

# `make sanitize`: a build of the native module beside the installed one.
if _module := os.environ.get("AUTOREGEMBED_NATIVE_MODULE"):
    _spec = importlib.util.spec_from_file_location("autoregembed._native", _module)
    sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "over",
    "old",
    "stone",
    "bridges",
    "and",
    "boats",
    "drifted",
    "past",
    "green",
    "hills",
    "at",
    "dusk",
]


def sentence(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not part of the product")
    return SHARED


@pytest.fixture(autouse=True)
def gradual_underflow():
    """Training flushes denormals in the process that it runs in."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory, monkeypatch):
    if importlib.util.find_spec("datasets") is None:  # bench/gpu.sh runs tests where nothing but torch is installed
        return
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """A Hugging Face folder of a tiny random Llama with its tokenizer."""
    from autoregembed import models
    from autoregembed.testing import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    models.save_model(folder, tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True), tokenizer, {})
    (folder / models.RECIPE).unlink()
    return str(folder)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def compression_file(tmp_path) -> str:
    rows = [{"context": sentence(i, 4 + i % 7), "output": sentence(i, 4 + i % 7)} for i in range(24)]
    return write_jsonl(tmp_path / "stage1.jsonl", rows)


@pytest.fixture
def alignment_file(tmp_path) -> str:
    rows = [
        {
            "query": sentence(i, 5),
            "pos": sentence(i + 100, 3 + i % 5),
            "neg": [sentence(j, 4) for j in range(200 + i, 201 + i + i % 3)],
            "instruction": "Find it." if i % 2 else "Match.",
        }
        for i in range(24)
    ]
    return write_jsonl(tmp_path / "stage2.jsonl", rows)


@pytest.fixture
def sts_file(tmp_path) -> str:
    rows = [{"sentence1": sentence(i, 5), "sentence2": sentence(i % 4, 6), "score": i % 6} for i in range(12)]
    return write_jsonl(tmp_path / "sts.jsonl", rows)


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(quiet=True)


COMMON = {"batch_size": 8, "learning_rate": 1e-3, "instruction": "Again:", "precision": "fp32"}


def stage1(model_folder, compression_file, out, **options):
    from autoregembed.config import Config

    fields = {"stage": 1, "model": model_folder, "train_data": compression_file, "output_dir": str(out), "max_steps": 4}
    return Config(**{**fields, **COMMON, **options})


def stage2(model, alignment_file, out, **options):
    from autoregembed.config import Config

    fields = {"stage": 2, "model": model, "train_data": alignment_file, "output_dir": str(out), "max_steps": 3}
    return Config(**{**fields, **COMMON, **options})
