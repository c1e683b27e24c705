"""Plans against runs: a run in a process of its own, with the peak of its resident memory by stretch."""

import ctypes
from pathlib import Path

import distributed_cases as cases
import pytest
from conftest import sentence, write_jsonl

from autoregembed import models
from autoregembed.testing import tiny_model, tiny_tokenizer

# The step is hundreds of MB: a process's own ups and downs are ten.
SHAPES = {
    "llama": {
        "vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    },
    "qwen3": {
        "vocab_size": 12000, "hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 7,
        "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 64, "tie_word_embeddings": False,
    },
    "gpt_neox": {
        "vocab_size": 20000, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 5,
        "num_attention_heads": 6, "tie_word_embeddings": False,
    },
}  # fmt: skip

# The stretches of a run as `plan` names them, and the methods of Run that they are made of.
STRETCHES = {"load_models": "loading", "prepare": "scores before it", "step": "a step", "finish": "writing the results"}


def resident(name: str = "VmRSS") -> int:
    """Bytes that are resident now, or at the most since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def growth(options: dict) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes by stretch beyond what was there before the run: as planned and as measured."""
    from rich.console import Console

    from autoregembed import plan, train
    from autoregembed.config import Config

    # glibc keeps freed blocks of up to 32 MB, of which steps of other lengths can use a part: what is measured here is
    # what is in use. M_MMAP_THRESHOLD is -3.
    assert ctypes.CDLL(None).mallopt(-3, 1 << 16)
    config = Config(**options)
    planned = plan.plan(config, plan.Machine.here("cpu"))
    libraries = planned.step["libraries"]
    before = resident()
    measured: dict[str, float] = {}

    def watch(name: str, stretch: str) -> None:
        method = getattr(train.Run, name)

        def run(*arguments):
            forget_peak()
            try:
                return method(*arguments)
            finally:
                measured[stretch] = max(measured.get(stretch, 0.0), resident("VmHWM") - before)

        setattr(train.Run, name, run)

    for name, stretch in STRETCHES.items():
        watch(name, stretch)
    train.train(config, Console(quiet=True))
    return {name: size - libraries for name, size in planned.device.items()}, measured


def write_data(folder: Path) -> dict[int, str]:
    """Rows of both stages."""
    first = [{"context": sentence(i, 20 + i % 15), "output": sentence(1000 + i, 8 + i % 12)} for i in range(64)]
    second = [
        {"query": sentence(i, 10 + i % 15), "pos": sentence(1000 + i, 8 + i % 12), "neg": [sentence(2000 + i, 9)]}
        for i in range(64)
    ]
    return {1: write_jsonl(folder / "1.jsonl", first), 2: write_jsonl(folder / "2.jsonl", second)}


def options_of(architecture: str, stage: int, data_file: str, folder: Path, **options) -> dict:
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    shape = {"max_position_embeddings": 512, "initializer_range": 0.02, **SHAPES[architecture]}
    models.save_model(folder / "start", tiny_model(architecture, **shape), tokenizer, {})
    return {
        "stage": stage, "model": str(folder / "start"), "train_data": data_file, "precision": "fp32",
        "output_dir": str(folder / "out"), "batch_size": 32, "max_steps": 2, "instruction": "Go.", **options,
    }  # fmt: skip


def compared(architecture: str, stage: int, data_file: str, folder: Path, **options) -> tuple[dict, dict]:
    """`growth` of a run in a process of its own."""
    case = options_of(architecture, stage, data_file, folder, **options)
    ((state, found),) = cases.finish(cases.start(growth, 1, folder / "work", case), seconds=1200)
    assert state == "done", found
    return found


def assert_planned(architecture: str, stage: int, data_file: str, folder: Path, **options) -> None:
    """A run takes what was planned, within 10 %: its largest step, and all of it."""
    planned, measured = compared(architecture, stage, data_file, folder, **options)
    assert planned["a step"] == pytest.approx(measured["a step"], rel=0.1)
    assert max(planned.values()) == pytest.approx(max(measured.values()), rel=0.1)
