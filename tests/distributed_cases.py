"""What the processes of test_distributed.py run: functions of a module, since each process imports them by name."""

import math
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

# Workers are forked from a process that has imported everything once and has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["autoregembed.train", "sentence_transformers"])


def _enter(connection, function, rank: int, world: int, folder: str, arguments) -> None:
    if world > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import datasets

    datasets.config.HF_DATASETS_CACHE = f"{folder}/datasets"
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        connection.send(("done", function(*arguments)))
    except BaseException as error:
        connection.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    connection.close()
    os._exit(0)


def start(function, world: int, folder: Path, *arguments) -> list:
    """[(process, connection)] of `world` processes that run function(*arguments), joined by gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(world):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_enter, args=(there, function, rank, world, str(folder), arguments), daemon=True
        )
        process.start()
        there.close()
        started.append((process, here))
    return started


def finish(started: list, seconds: float = 120) -> list:
    """What each process returned, or the text of its error; those that are not done in time are killed."""
    end = time.monotonic() + seconds
    results: list = []
    for process, connection in started:
        try:
            state = connection.recv() if connection.poll(max(0.0, end - time.monotonic())) else ("hung", "no answer")
        except EOFError:
            state = ("dead", f"exit status {process.exitcode}")
        results.append(state)
    for process, _ in started:
        process.kill()
        process.join()
    return results


def run(function, world: int, folder: Path, *arguments) -> list:
    """What each of `world` processes returns from function(*arguments); fails where one fails or hangs."""
    results = finish(start(function, world, folder, *arguments))
    bad = [f"process {rank} {state}: {text}" for rank, (state, text) in enumerate(results) if state != "done"]
    assert not bad, "\n".join(bad)
    return [value for _, value in results]


# ----------------------------------------------------------------------------------------------------------------------


def _numpy(tensors: dict) -> dict:
    from autoregembed.distributed import whole

    return {name: whole(x.detach()).clone().numpy() for name, x in tensors.items()}


def fsdp_on_cpu() -> None:
    """Lets accelerate run FSDP2 on CPUs, which it does not offer: all but the choice of the backend is its own path."""
    from accelerate import DistributedType, PartialState

    PartialState._reset_state()
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    torch.accelerator.is_available = lambda: True  # what `cpu=` of Accelerator depends on


def fsdp(function, *arguments):
    fsdp_on_cpu()
    return function(*arguments)


def one_run(case: dict) -> tuple[dict, list[str]]:
    """The summary of a training run, and the files that this process opened for writing."""
    from rich.console import Console

    from autoregembed import train

    written: list[str] = []
    out = str(Path(case["output_dir"]))

    def audit(event: str, arguments) -> None:
        if event == "open" and str(arguments[0]).startswith(out) and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                written.append(str(arguments[0]))

    sys.addaudithook(audit)
    return train.train(train.Config(**case), Console(quiet=True)), written


def one_step(cases: list[dict]) -> list[dict]:
    """One optimiser step in float64 for each case, its batch cut into equal shares of consecutive rows."""
    from autoregembed import data, distributed, train

    found = []
    for case in cases:
        config = train.Config(**case)
        accelerator = train.processes(config, False)
        assert accelerator.num_processes == distributed.world() == int(os.environ.get("WORLD_SIZE", "1"))
        encoder, decoder, tokenizer, _ = train.build(config)
        prompt = data.Prompt(tokenizer, encoder.num_compress_tokens, encoder.bos_token_id, config.instruction)
        rows = (data.compression_rows if config.stage == 1 else data.alignment_rows)(
            data.load_rows(config.train_data), prompt
        )
        encoder.double()
        if decoder is not None:
            decoder.double()
        wrapped, optimizer = accelerator.prepare(encoder, train.optimiser(encoder, config))
        if decoder is not None and accelerator.is_fsdp2:
            decoder.shard(accelerator.device)
        reference = train.reference_scores(encoder.eval(), decoder, rows, 64) if config.needs_reference else None
        encoder.train()
        objective = train.Objective(config, wrapped, decoder, accelerator, reference)
        size = config.batch_size // distributed.world()
        first = distributed.rank() * size
        batch = [{**rows[i], "row": i} for i in range(first, first + size)]
        log = objective(batch)
        gradients = _numpy({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm or math.inf)
        optimizer.step()
        found.append(
            {
                "log": log,
                "gradients": gradients,
                "norm": float(distributed.whole(norm)),
                "parameters": _numpy(dict(encoder.named_parameters())),
                "parts": len(data.cut(train.lengths(batch, encoder, config.hard_negatives), config.token_budget)),
                "counts": train._counts(config, batch),
                "reference": None if reference is None else [r.numpy() for r in reference],
            }
        )
    return found
