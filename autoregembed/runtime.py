"""What a run needs from its surroundings: processes, precision, signals, locks, logs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from autoregembed.config import Config, ConfigError
from autoregembed.cpu import bound_primitive_caches
from autoregembed.files import atomic_file, json_text
from autoregembed.kernels.native.linear_logprob import MULTIPLIES_BF16
from autoregembed.quantized import require_quantizer

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: a checkpoint is saved, and the message says how to continue."""


def make_accelerator(config: Config, precision: str) -> Accelerator:
    """The processes of this run, as the launcher (accelerate, torchrun or none) set them up.

    Raises:
        ConfigError: a kind of distribution that the loop does not support, or a tracker that is not installed, which
            accelerate would leave out without a word.
    """
    installed = sorted(str(tracker.value) for tracker in get_available_trackers())
    for name in config.log_with:
        if name not in (*installed, "all"):
            raise ConfigError(
                f"log_with: got {name!r}, expected an installed tracker ({', '.join(installed) or 'none is'})"
            )
    bound_primitive_caches()
    # An earlier run in this process may have had another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        # Where torch sees no device, accelerate would let each of several processes train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.log_with or None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # The others wait while process 0 tokenizes or exports. The launcher finds a dead process, not a timeout.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(f"fsdp_version: got {plugin.fsdp_version}, expected 2")
        # accelerate's would have process 0 hold the model whole, and Transformers build without weights in the others.
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError(
            f"use_fsdp: got true on {accelerator.device.type}, expected false: accelerate supports FSDP on GPUs only"
        )
    elif kind != DistributedType.NO and "MULTI" not in kind:
        raise ConfigError(f"distributed_type: got {kind.value}, expected DDP or FSDP2")
    require_quantizer(config, accelerator.device, sharded=kind == DistributedType.FSDP)
    return accelerator


def choose_precision(config: Config) -> str:
    """fp32, bf16 or fp16.

    Raises:
        ConfigError: fp16 without CUDA.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision: got 'fp16', expected 'auto', 'fp32' or 'bf16' without CUDA")
    if config.precision == "auto":
        return "bf16" if multiplies_bf16() else "fp32"
    return config.precision


def multiplies_bf16() -> bool:
    """Whether bf16 products run in hardware here."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else MULTIPLIES_BF16


def peak_memory_gb() -> float:
    """The largest amount of memory used so far: CUDA's allocator, or this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextlib.contextmanager
def exclusive_run(folder: Path) -> Iterator[None]:
    """Lets no second run write into a folder. A record lock ends with its process, and a fork does not inherit it.

    Raises:
        ConfigError: another run holds the folder.
    """
    with open(folder / "lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir: got {str(folder)!r}, into which another run is writing, expected a folder of its own"
            ) from None
        yield


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms where `wanted`."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product on the GPU
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read when Transformers calls flash-attn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class StopFlag:
    """Set by the first SIGINT or SIGTERM, read by the loop between steps."""

    signalled = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts at once."""
    stop = StopFlag()

    def handler(number: int, frame: Any) -> None:
        stop.signalled = True
        for n, h in previous.items():
            signal.signal(n, h)

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals stay with the caller
        previous = {}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def append_log(path: Path, row: dict) -> None:
    """Adds one line of JSON; numbers that are not finite become null, since JSON has none."""
    row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(row) + "\n")


def truncate_log(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, which will be written again, and a partial line that a kill left."""
    kept = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    if kept:
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    else:
        path.unlink(missing_ok=True)
