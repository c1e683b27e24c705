"""Main memory of a LoRA step on a CPU: one frozen base for encoder and decoder, beside a base of each.

python bench/memory.py            # SmolLM2-135M's shape, the table of docs/howto/lora-7b.md

The weights are random: memory does not depend on their values. Every number comes from
a process of its own: the resident memory (VmHWM) beyond that of the imported libraries, with blocks that are freed
returned to the system (M_MMAP_THRESHOLD = 64 kB), as `autoregembed plan` counts. Linux and glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = [(stage, shared) for stage in (1, 2) for shared in (False, True)]
GB = 1e9


def write_inputs(folder: Path, rows: int, quick: bool) -> dict[str, Any]:
    """A model and rows of about NLI's lengths; what they have in common of a `Config`."""
    import torch

    from autoregembed import models
    from autoregembed.bench.bench_step import CURVE, SMOLLM2
    from autoregembed.testing import tiny_model, tiny_tokenizer

    shape: dict[str, Any] = CURVE if quick else SMOLLM2
    shape = {**shape, "tie_word_embeddings": True, "initializer_range": 0.02, "max_position_embeddings": 2048}
    models.save_model(folder / "lm", tiny_model(**shape), tiny_tokenizer(), {})
    (folder / "lm" / models.RECIPE).unlink()  # an original model
    generator = torch.Generator().manual_seed(0)

    def text(seed: int) -> str:
        return "".join(chr(97 + int(i)) for i in torch.randint(26, (12 + seed % 12,), generator=generator))

    first = [{"context": text(i), "output": text(i + 5)} for i in range(4 * rows)]
    second = [{"query": text(i), "pos": text(i + 5), "neg": [text(i + 7)]} for i in range(4 * rows)]
    for name, made in (("1", first), ("2", second)):
        lines = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {"model": str(folder / "lm"), "batch_size": rows, "max_steps": 2, "lora_rank": 8, "precision": "fp32"}


def resident(name: str = "VmRSS") -> int:
    """Bytes that are resident now, or at most since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(fields: dict[str, Any]) -> dict[str, float]:
    """Bytes of a run's weights, once each, and its resident memory after loading and at the peak of a step."""
    from rich.console import Console

    from autoregembed import train
    from autoregembed.config import Config
    from autoregembed.sharing import storage_bytes

    if not ctypes.CDLL(None).mallopt(-3, 1 << 16):  # M_MMAP_THRESHOLD
        raise OSError("mallopt: got 0, expected 1 from glibc")
    found: dict[str, float] = {}
    before = resident()
    inner = train.Run.step

    def step(run: Any, *arguments: Any) -> dict[str, float]:
        if "weights" not in found:
            found["weights"] = storage_bytes(p for m in run.models for p in m.parameters())
            found["loaded"] = resident() - before
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        log = inner(run, *arguments)
        found["step"] = max(found.get("step", 0), resident("VmHWM") - before)
        return log

    train.Run.step = step  # type: ignore[assignment, method-assign]
    train.train(Config(**fields), Console(quiet=True))
    return found


def run(folder: Path, rows: int, quick: bool) -> list[str]:
    """Lines of the table; each case in a process of its own."""
    common = write_inputs(folder, rows, quick)
    lines = [
        "| stage | frozen base | weights, GB | resident after loading, GB | peak of a step, GB |",
        "|---|---|---|---|---|",
    ]
    peaks: dict[tuple[int, bool], dict[str, float]] = {}
    for stage, shared in CASES:
        out = folder / f"out-{stage}-{shared}"
        fields = {"stage": stage, "train_data": str(folder / f"{stage}.jsonl"), "output_dir": str(out), **common}
        fields["share_base"] = shared
        command = [sys.executable, __file__, "--fields", json.dumps(fields)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = peaks[stage, shared] = json.loads(done.stdout.splitlines()[-1])
        cells = " | ".join(f"{found[name] / GB:.2f}" for name in ("weights", "loaded", "step"))
        lines.append(f"| {stage} | {'one' if shared else 'two'} | {cells} |")
    for stage in (1, 2):
        ratios = [peaks[stage, True][name] / peaks[stage, False][name] for name in ("weights", "loaded", "step")]
        lines.append(f"| {stage} | one / two | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--quick", action="store_true", help="a small model, to try the command")
    parser.add_argument("--fields", help=argparse.SUPPRESS)  # of the one run that this process measures
    options = parser.parse_args()
    if options.fields:
        print(json.dumps(measure(json.loads(options.fields))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(run(Path(folder), options.rows, options.quick)))


if __name__ == "__main__":
    main()
