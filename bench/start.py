"""Main memory that a sharded run needs to start, read from outside: gloo processes load a random model under FSDP2.

python bench/start.py                             # about 1.1e9 parameters, 4 processes; needs 10 GB of memory and disk
python bench/start.py --lora 8                    # encoder and decoder on one base
python bench/start.py --layers 4 --hidden 512     # a small one

Resident memory of all processes together is read every 20 ms, from the first weight on until the first step could be
made. What Python, the libraries and the data take before is printed and subtracted. accelerate offers FSDP on GPUs
only; the processes are told that a CPU is one, and gloo carries what NCCL would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9


def write_random_model(folder: Path, layers: int, hidden: int, mlp: int, vocabulary: int, dtype: str) -> int:
    """Writes a random Llama with untied matrices, a tensor at a time, and a tokenizer; its number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from autoregembed.files import write_safetensors
    from autoregembed.testing import tiny_tokenizer

    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 8), max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind = getattr(torch, dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.ones(shape, dtype=kind) if len(shape) == 1
        else (0.02 * torch.randn(shape, generator=generator)).to(kind)
        for shape in shapes.values()
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {n: (kind, shape) for n, shape in shapes.items()}, values)
    config.save_pretrained(folder)
    tiny_tokenizer(["the cat sat on a mat", "while rain fell over old stone bridges"]).save_pretrained(folder)
    return sum(shape.numel() for shape in shapes.values())


def worker(folder: Path) -> None:
    """One process: up to the first step."""
    from accelerate import DistributedType, PartialState

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "HF_HUB_OFFLINE": "1"}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    import torch
    import torch._dynamo  # fully_shard imports it
    import torch.distributed.fsdp
    from rich.console import Console

    torch.accelerator.is_available = lambda: True
    from autoregembed import distributed, train
    from autoregembed.config import Config

    rank = int(os.environ["RANK"])
    run = train.Run(Config(**json.loads((folder / "config.json").read_text())), Console(quiet=rank > 0))
    run.read_data()
    (folder / f"ready-{rank}").write_text(str(os.getpid()))
    while not (folder / "go").exists():
        time.sleep(0.01)
    run.load_models()
    size = sum({id(p): p.numel() * p.element_size() for m in run.models for p in m.parameters()}.values())
    run.tokenize_data()
    run.place_models()
    run.prepare()
    held = {}
    for model in run.models:
        shards: Any = model.parameters()
        for p in shards:
            local = p.to_local()
            held[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    distributed.all_reduce(torch.zeros(1))
    (folder / f"done-{rank}").write_text(json.dumps({"bytes": size, "held": sum(held.values())}))
    while not (folder / "end").exists():
        time.sleep(0.01)


def start(model: Path, folder: Path, world: int, lora: int, rest: dict[str, Any] | None = None) -> dict[str, float]:
    """Starts `world` processes on a model; bytes: of both roles' weights, the peak, what was there before."""
    import psutil

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"context": "the cat sat on a mat", "output": "rain fell"}] * 16
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "stage": 1, "model": str(model), "train_data": str(folder / "rows.jsonl"), "output_dir": str(folder / "out"),
        "precision": "fp32", "batch_size": 2, "max_steps": 1, "lora_rank": lora, **(rest or {}),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "HF_DATASETS_CACHE": str(folder / "datasets"),
    }  # fmt: skip
    command = [sys.executable, "-m", "autoregembed.bench.start", "--worker", str(folder)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(world)
    ]
    watched = [psutil.Process(process.pid) for process in processes]

    def resident() -> int:
        return sum(process.memory_info().rss for process in watched)

    def waits_for(stage: str) -> int:
        most = 0
        while sum((folder / f"{stage}-{i}").exists() for i in range(world)) < world:
            if any(process.poll() is not None for process in processes):
                raise RuntimeError("a process ended before all had started; its error is above")
            most = max(most, resident())
            time.sleep(0.02)
        return most

    try:
        waits_for("ready")
        before = resident()
        (folder / "go").touch()
        begin = time.perf_counter()
        peak = max(waits_for("done"), resident())
        seconds = time.perf_counter() - begin
        told = [json.loads((folder / f"done-{i}").read_text()) for i in range(world)]
    finally:
        (folder / "end").touch()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    size = float(told[0]["bytes"])
    return {
        "weights": size, "held": float(sum(t["held"] for t in told)), "before": float(before), "peak": float(peak),
        "ratio": (peak - before) / size, "seconds": seconds,
    }  # fmt: skip


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", help="of the files")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters: one base for both roles")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = options.layers, options.hidden, options.mlp, options.vocabulary, options.dtype
        count = write_random_model(Path(folder) / "model", *shape)
        found = start(Path(folder) / "model", Path(folder) / "run", options.processes, options.lora)
    print(
        "| parameters | processes | weights of both roles, GB | before, GB | peak, GB | (peak − before) / weights | s |"
    )
    print("|---|---|---|---|---|---|---|")
    sizes = " | ".join(f"{found[name] / GB:.2f}" for name in ("weights", "before", "peak"))
    print(f"| {count / 1e9:.2f}e9 | {options.processes} | {sizes} | {found['ratio']:.2f} | {found['seconds']:.0f} |")


if __name__ == "__main__":
    main()
