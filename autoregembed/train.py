"""Both stages of AutoRegEmbed in one loop.

    stage 1   minimise −log p(output | z(context, instruction)) per token
    stage 2   minimise alignment_weight · alignment + contrastive_weight · InfoNCE over one forward pass

A step reads `batch_size` rows per process. `token_budget` cuts their passes into ones that fit in memory; every loss is
that of the whole step, so the update does not depend on the cut.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import signal
import time
import warnings
from dataclasses import MISSING, asdict, fields
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object, parse_flag_from_env, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import get_scheduler

from autoregembed import checkpoint, data, distributed, files, models
from autoregembed.build import build_models, create_optimizer
from autoregembed.config import Config, ConfigError
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.evaluate import load_sts, sts
from autoregembed.export import export, merged
from autoregembed.kernels.native.linear_logprob import MULTIPLIES_BF16
from autoregembed.model_card import Card
from autoregembed.objective import Objective, lengths, texts_of
from autoregembed.reference_scores import cached_ref_logps


def make_accelerator(config: Config, precision: str) -> Accelerator:
    """The processes of this run, as the launcher (accelerate, torchrun, none) set them up.

    Raises:
        ConfigError: a way of sharding that the loop does not support.
    """
    # An earlier run in this process may have had another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        # Where torch sees no device, accelerate would let each of several processes train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=config.log_with or None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # The others wait while process 0 tokenises or exports. It is the launcher that finds a dead process.
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )
    kind = accelerator.distributed_type
    if kind != DistributedType.FSDP and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ConfigError(f"use_fsdp: got true on {accelerator.device.type}, where accelerate has no FSDP")
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(f"fsdp_version: got {plugin.fsdp_version}, expected 2")
        if plugin.cpu_ram_efficient_loading:
            raise ConfigError(
                "fsdp_cpu_ram_efficient_loading: got true, expected false: every process reads the weights, from "
                "which compress tokens and frozen decoder are made before they are sharded"
            )
    if kind == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero3_init_flag:
            raise ConfigError(
                "zero3_init_flag: got true, expected false: compress tokens and frozen decoder are made from "
                "weights that are whole"
            )
        if config.save_steps or config.resume_from_checkpoint:
            raise ConfigError(
                f"save_steps: got {config.save_steps} with resume_from_checkpoint {config.resume_from_checkpoint} under DeepSpeed, expected 0 "
                "and 'none': its optimiser state is not kept"
            )
        if plugin.deepspeed_config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    if kind not in (DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED) and "MULTI" not in kind:
        raise ConfigError(f"distributed_type: got {kind.value}, expected DDP, FSDP2 and DeepSpeed")
    return accelerator


def _whole(config: Config, accelerator: Accelerator, wrapped: nn.Module, encoder: Encoder) -> Encoder:
    """The trained encoder with all of its weights, in process 0; in the others what they have."""
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return encoder
    state = accelerator.get_state_dict(wrapped)
    if not accelerator.is_main_process:
        return encoder
    # A sharded module cannot be copied; another one is made as it was, and filled.
    other = build_models(config, with_decoder=False)[0]
    other.suffix_ids, other.recipe = encoder.suffix_ids, encoder.recipe
    other.load_state_dict(state)
    return other


# What a resumed run may have otherwise: places (the contents are compared), what is written when, and how the same
# update is computed. All else must be as it was.
_FREE = {
    "model", "decoder", "gguf_file", "trust_remote_code", "train_data", "train_split", "output_dir", "ref_logps_file",
    "eval_data", "eval_split", "eval_steps", "num_train_epochs", "token_budget", "attention", "gradient_checkpointing", "compile",
    "deterministic", "on_nonfinite", "save_steps", "save_total_limit", "save_best", "resume_from_checkpoint", "log_with", "num_proc",
}  # fmt: skip


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the state is saved, and the message says how to go on."""


def train(config: Config, console: Console | None = None) -> dict:
    """Runs one stage; returns and writes the summary (`summary.json`), with paths of model and export.

    Raises:
        ConfigError, CheckpointError, RefLogpsMismatch, OSError: what the message says, as do the errors of `data`,
            `Encoder` and `Decoder`.
        FloatingPointError: a loss or gradient is not finite; the rows of that step are named (see `on_nonfinite`).
        Interrupted: after a Ctrl-C, with the state saved.
    """
    with _deterministic(config.deterministic), contextlib.ExitStack() as held:
        return _train(config, console or Console(), held)


def _train(config: Config, console: Console, held: contextlib.ExitStack) -> dict:
    out, checkpoint_folder = Path(config.output_dir), Path(config.output_dir) / "checkpoints"
    torch.set_flush_denormal(True)
    precision = _precision(config)
    accelerator = make_accelerator(config, precision)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    set_seed(config.seed)
    console.quiet = console.quiet or not accelerator.is_main_process

    def begin() -> tuple[Path | None, list[str]]:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(_sole_run(out))
        files.remove_stale_tmp(out)
        files.remove_stale_tmp(checkpoint_folder)
        if not config.resume_from_checkpoint:
            if next(checkpoint_folder.glob("step-*"), None):
                raise FileExistsError(
                    f"output_dir: got checkpoints of an earlier run in {config.output_dir!r}, expected a folder "
                    "without any, or resume_from_checkpoint: true to continue from the newest"
                )
            return None, []
        return checkpoint.latest_checkpoint(checkpoint_folder)

    newest, damaged = distributed.broadcast_from_rank0(begin)
    if config.log_with:
        accelerator.init_trackers("autoregembed", config={k: str(v) for k, v in asdict(config).items()})

    encoder, decoder, tokenizer, recipe = build_models(config)
    lms: list[Encoder | Decoder] = [encoder] if decoder is None else [encoder, decoder]
    weights = distributed.broadcast_from_rank0(lambda: files.weights_fingerprint(*lms))
    k, max_length = encoder.num_compress_tokens, encoder.fit_max_length(config.max_length)
    targets = decoder.fit_max_target_length(k, config.max_target_length) if decoder else 512
    prompt = data.Prompt(tokenizer, k, encoder.bos_token_id, config.instruction, max_length, targets)
    encoder.suffix_ids = prompt.suffix()
    rows = data.load_rows(config.train_data, config.train_split, config.streaming)
    tokenise = data.compression_rows if config.stage == 1 else data.alignment_rows
    with accelerator.main_process_first():
        rows = tokenise(rows, prompt, num_proc=config.num_proc)
    aligned = config.stage == 2 and config.alignment_weight > 0 and not config.streaming
    if aligned and all(len(t) < 2 for t in rows["target_ids"]):
        raise ValueError("data: got no negative in any row, expected at least one when alignment_weight > 0")
    pairs = load_sts(config.eval_data, config.eval_split) if config.eval_data else None

    # What will be sharded need not fit on a device whole.
    place = torch.device("cpu") if sharded else accelerator.device
    if decoder is not None:
        decoder.to(place, _HALF.get(precision))
    encoder.to(place)
    if not sharded:
        with accelerator.autocast():
            for model in lms:
                model.use_attention(config.attention)
    elif config.attention not in ("auto", "sdpa"):
        raise ConfigError(f"attention: got {config.attention!r}, expected 'auto' or 'sdpa' with FSDP")

    def evaluate() -> float | None:
        if pairs is None:
            return None
        of = functools.partial(encoder.encode, max_length=max_length, shared=True)
        with accelerator.autocast():
            return sts(of, pairs)["spearman"]

    first, seconds = 0, 0.0
    scores: dict[str, float | None] = {}
    skipped: list[int] = []
    if newest is None and not sharded:
        scores["0"] = evaluate()  # as the model comes, not calibrated
    if config.init_output_rms and decoder is not None and not recipe["output_rms_initialized"]:
        few = rows.take(128) if config.streaming else rows.select(range(0, len(rows), -(-len(rows) // 128)))
        encoder.init_output_rms(decoder.input_rms_per_dimension(), *texts_of(list(few), hard_negatives=False))
        recipe["output_rms_initialized"] = True
    world = accelerator.num_processes
    steps = config.max_steps or max(1, round(config.num_train_epochs * len(rows) / (config.batch_size * world)))
    fingerprint = ""
    if config.needs_ref_logps:
        assert decoder is not None
        fingerprint = distributed.broadcast_from_rank0(lambda: files.weights_fingerprint(encoder, decoder))
        fingerprint += f"-{decoder.z_norm}-{decoder.prefix}-{decoder.logprob_reduction}"
    wrapped, optimizer = accelerator.prepare(encoder, create_optimizer(encoder, config))
    if decoder is not None and sharded:
        decoder.shard(accelerator.device)
    reference = None
    if config.needs_ref_logps:
        encoder.eval()
        with accelerator.autocast():
            read = steps * config.batch_size * world
            reference = cached_ref_logps(config, encoder, decoder, fingerprint, rows, read, prompt, console)
    encoder.train()
    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, max(steps, config.warmup_steps + 1)
    )
    objective = Objective(config, wrapped, decoder, accelerator, reference)

    run = {
        **{name: value for name, value in asdict(config).items() if name not in _FREE},
        "model": weights,
        "train_data": config.train_data if config.streaming else data.content_fingerprint(rows),
        "max_steps": steps,
        "precision": precision,
        "processes": world,
        "device": accelerator.device.type,
    }
    if config.lr_scheduler_type == "constant":
        del run["max_steps"]  # a longer run begins like a shorter one
    if config.resume_from_checkpoint:
        for reason in damaged:
            console.print(f"resume_from_checkpoint: skipped {reason}")
        if newest is not None:
            rank = accelerator.process_index
            state = checkpoint.load_checkpoint(newest, encoder, optimizer.optimizer, run=run, rank=rank)
            first, scores, seconds, skipped = (state[name] for name in ("step", "scores", "seconds", "skipped"))
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the schedule runs ahead of its optimiser here
                for _ in range(first):
                    scheduler.step()
            console.print(f"resume_from_checkpoint: {newest.name}")
            if accelerator.is_main_process:  # as `save` would have, if it was killed before
                checkpoint.prune_checkpoints(newest, config.save_total_limit)
            if first == steps and (out / "summary.json").is_file():
                console.print(f"resume_from_checkpoint: all {steps} steps were done and exported")
                return files.read_json(out / "summary.json", "output_dir")
            if first > steps:
                raise ConfigError(f"max_steps: got {steps}, expected at least {first}, those of {str(newest)!r}")
    if not scores:
        scores["0"] = evaluate()

    def begin_logs() -> None:
        (out / "summary.json").unlink(missing_ok=True)
        files.write_json(out / "config.json", asdict(config))
        for name in ("metrics.jsonl", "nonfinite.jsonl"):
            _cut_log(out / name, first)

    distributed.broadcast_from_rank0(begin_logs)

    def save(step: int) -> Path:
        folder = checkpoint_folder / f"step-{step:08d}"
        extra = {"scores": scores, "seconds": seconds, "skipped": skipped, "run": run}
        if accelerator.scaler is not None:
            extra["scaler"] = accelerator.scaler.state_dict()
        generators = gather_object([checkpoint.rng_state()])
        if accelerator.is_main_process or sharded:
            checkpoint.save_checkpoint(folder, encoder, optimizer.optimizer, step, extra, generators)
        if accelerator.is_main_process:
            checkpoint.prune_checkpoints(folder, config.save_total_limit)
        return folder

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    stopping = _stop_on_signal()
    batches = data.batches(
        rows, config.batch_size, seed=config.seed, start=first, rank=accelerator.process_index, world=world
    )
    with Progress(
        *(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console, transient=True
    ) as bar, stopping as stop:  # fmt: skip
        task = bar.add_task(f"stage {config.stage}", total=steps, completed=first)
        for step in range(first + 1, steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            log = objective(batch)
            clipped = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm or math.inf)
            norm = float(distributed.to_full_tensor(clipped))
            rate = scheduler.get_last_lr()[0]
            healthy = math.isfinite(log["loss"]) and math.isfinite(norm)
            if accelerator.scaler is not None:
                log["loss_scale"] = accelerator.scaler.get_scale()
            if not healthy:
                optimizer.zero_grad()
                # Scaled by more than 1, a finite loss with a gradient that is not is what the scaler waits for.
                if not math.isfinite(log["loss"]) or log.get("loss_scale", 1.0) <= 1:
                    skipped.append(step)
                    _nonfinite(config, out, step, log["loss"], norm, batch, skipped, accelerator)
            if healthy or accelerator.scaler is not None:
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            elapsed = time.perf_counter() - start
            seconds += elapsed
            tokens = sum(lengths(batch, encoder, config.hard_negatives)) * world
            log |= {"grad_norm": norm, "lr": rate, "tokens_per_second": tokens / elapsed, "memory_gb": _memory_gb()}
            if accelerator.is_main_process:
                _append(out / "metrics.jsonl", {"step": step, "updated": healthy, **log})
            if config.log_with:
                accelerator.log(log, step=step)
            bar.update(task, advance=1, description=_describe(config.stage, log))
            if step % max(1, steps // 20) == 0:
                console.print(f"{step:>6}/{steps}  {_describe(config.stage, log)}", highlight=False)
            if step == steps or (config.eval_steps and step % config.eval_steps == 0):
                scores[str(step)] = evaluate()
                if scores[str(step)] is not None:
                    console.print(f"{step:>6}/{steps}  spearman {scores[str(step)]:.4f}", highlight=False)
                if config.save_best and _best(scores) == str(step):
                    best = _whole(config, accelerator, wrapped, encoder)
                    keep = functools.partial(export, best, tokenizer, out / "best", overwrite=True)
                    distributed.broadcast_from_rank0(functools.partial(keep, max_length=max_length))
            if distributed.any_rank(stop.signalled, accelerator.device):
                folder = save(step)
                raise Interrupted(
                    f"stopped at step {step}, state in {folder}; resume_from_checkpoint: true goes on from there"
                )
            if config.save_steps and (step % config.save_steps == 0 or step == steps):
                save(step)

    summary = {
        "stage": config.stage,
        "steps": steps,
        "train_seconds": round(seconds, 1),
        "spearman": scores,
        "model": str(out / "model"),
        "export": str(out / "export"),
        **({"best": str(out / "best"), "best_step": int(_best(scores))} if config.save_best else {}),
        "device": str(accelerator.device),
        "processes": world,
        "precision": precision,
        "skipped_steps": len(skipped),
        "attention": encoder.attention,
    }
    trained = _whole(config, accelerator, wrapped, encoder)

    def finish() -> None:
        if config.lora_rank:
            with files.atomic_folder(out / "adapter", overwrite=True) as folder:
                trained.model.save_pretrained(folder, save_embedding_layers=False)  # the K rows are in it
        models.save_model(out / "model", merged(trained), tokenizer, recipe)
        export(
            trained, tokenizer, out / "export", max_length=max_length, overwrite=True,
            card=_card(config, recipe["decoder"], scores),
        )  # fmt: skip
        files.write_json(out / "summary.json", summary)

    distributed.broadcast_from_rank0(finish)
    if config.log_with:
        accelerator.end_training()
    return summary


def _card(config: Config, base_model: str, scores: dict[str, float | None]) -> Card:
    """The model card's facts of this run: the options that are not the default, but not where its files lie."""
    left_out = {"model", "decoder", "train_data", "eval_data", "ref_logps_file", "output_dir"}
    left_out |= {"resume_from_checkpoint", "log_with", "num_proc", "license"}
    defaults = {f.name: [] if f.default is MISSING else f.default for f in fields(Config)}
    recipe = {k: v for k, v in asdict(config).items() if k not in left_out and v != defaults[k]}
    return Card(base_model, config.license, config.train_data, recipe, config.eval_data, scores)


def _describe(stage: int, log: dict[str, float]) -> str:
    names = ("loss",) if stage == 1 else ("loss", "align", "s1", "s2", "accuracy", "nce")
    text = "  ".join(f"{n} {log[n]:.3f}" for n in names if n in log)
    return f"stage {stage}  {text}  {log['tokens_per_second']:.0f} tok/s  {log['memory_gb']:.1f} GB"


_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _precision(config: Config) -> str:
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision: got 'fp16', expected 'auto', 'fp32' or 'bf16' without CUDA")
    if config.precision == "auto":
        return "bf16" if _multiplies_bf16() else "fp32"
    return config.precision


@contextlib.contextmanager
def _sole_run(out: Path):
    """No second run writes into this folder. A record lock goes with its process and is not inherited by a fork."""
    with open(out / "lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir: got {str(out)!r}, into which another run is writing; expected a folder of its own"
            ) from None
        yield


@contextlib.contextmanager
def _deterministic(wanted: bool):
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product on the GPU
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by Transformers' route to flash-attn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _append(path: Path, row: dict) -> None:
    """One line of JSON; numbers that are not finite are null, for JSON has none."""
    row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_log(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, which will be written again, and a half one that a kill left."""
    kept = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    if kept:
        with files.atomic_file(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    else:
        path.unlink(missing_ok=True)


MAX_SKIPPED = 10  # steps in a row: by then the parameters are the reason, not the rows


def _nonfinite(
    config: Config, out: Path, step: int, loss: float, norm: float, batch: list[dict], skipped: list[int],
    accelerator: Accelerator,
) -> None:  # fmt: skip
    """Writes down the rows of a step, and ends the run where `on_nonfinite` says so."""
    rows = gather_object([r["row"] for r in batch])
    action = config.on_nonfinite
    if len(skipped) >= MAX_SKIPPED and skipped[-MAX_SKIPPED] == step - MAX_SKIPPED + 1:
        action = "stop"
    if accelerator.is_main_process:
        found = {"loss": str(loss), "grad_norm": str(norm)}
        _append(out / "nonfinite.jsonl", {"step": step, "action": action, **found, "rows": rows})
    if action == "stop":
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}, rows {rows}; nothing was updated, and "
            f"{str(out / 'nonfinite.jsonl')!r} has the rows"
        )


def _best(scores: dict[str, float | None]) -> str:
    """The step with the highest score, the first of several; a score that is no number is none."""
    known = {step: score for step, score in scores.items() if step != "0" and score is not None and score == score}
    return max(known, key=lambda step: known[step], default="0")


def _multiplies_bf16() -> bool:
    """Whether bf16 products run in hardware here."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else MULTIPLIES_BF16


def _memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextlib.contextmanager
def _stop_on_signal():
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads between steps; a second one acts at once."""

    class Stop:
        signalled = False

    stop = Stop()

    def handler(number, frame):
        stop.signalled = True
        for n, h in previous.items():
            signal.signal(n, h)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: signals stay with whoever runs us
        previous = {}
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
