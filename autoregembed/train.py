"""Both stages of AutoRegEmbed in one loop.

    stage 1   minimize −log p(output | z(context, instruction)) per token
    stage 2   minimize alignment_weight · alignment + contrastive_weight · InfoNCE + distillation_weight · score
              distillation over one forward pass

A step reads `batch_size` rows per process. `token_budget` splits its passes into ones that fit in memory. Every loss is
that of the whole step, so the update does not depend on the split.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from transformers import get_scheduler

from autoregembed import data, distributed, loading, plan, sampling
from autoregembed.build import build_models, create_optimizer, fill_optimizer, placeholder_optimizer, prompt_of
from autoregembed.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    rng_state,
    save_checkpoint,
)
from autoregembed.config import Config, ConfigError
from autoregembed.cuda_graphs import captured
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.files import (
    read_json,
    remove_stale_tmp,
    require_writable_folder,
    write_json,
)
from autoregembed.held_out import HeldOut, step_of
from autoregembed.lora_base import not_shared_because, place
from autoregembed.model_card import run_card
from autoregembed.objective import Objective, encoder_lengths, texts_of
from autoregembed.progress import Display, describe
from autoregembed.quantized import num_elements
from autoregembed.reference_scores import cached_ref_logps, ref_logps_fingerprint
from autoregembed.results import Results, hull_of
from autoregembed.runtime import (
    HALF_DTYPES,
    Interrupted,
    append_log,
    choose_precision,
    deterministic,
    exclusive_run,
    make_accelerator,
    peak_memory_gb,
    stop_on_signal,
    truncate_log,
)
from autoregembed.sharding import shard_models, shared_fingerprint
from autoregembed.teacher_scores import cached_teacher_scores
from autoregembed.training_plot import draw_training

# What a resumed run may change: places (their contents are compared), what is written when, and how the same update is
# computed. Everything else must be as it was.
FREE_FIELDS = {
    "model", "decoder", "gguf_file", "trust_remote_code", "train_data", "train_split", "output_dir", "ref_logps_file",
    "eval_data", "eval_split", "eval_steps", "num_train_epochs", "token_budget", "attention", "gradient_checkpointing",
    "compile", "deterministic", "on_nonfinite", "save_steps", "save_total_limit", "save_best", "resume_from_checkpoint",
    "log_with", "num_proc", "export_dtype", "model_name", "license", "decoder_gradient_checkpointing", "share_prefixes",
    "share_base", "eval_metric", "cuda_graphs"}  # fmt: skip

RESULT_FOLDERS = ("model", "export", "adapter", "checkpoints")
RESULT_FILES = ("config.json", "lock", "metrics.jsonl", "nonfinite.jsonl", "summary.json", "training.png")
MAX_SKIPPED = 10  # steps in a row: by then the parameters are the reason, not the rows


def train(config: Config, console: Console | None = None) -> dict:
    """Runs one stage; writes and returns the summary (`summary.json`), with the paths of model and export.

    Raises:
        ConfigError, CheckpointError, ScoresMismatch, OSError: the message says what is wrong. And the errors of `data`,
            `Encoder` and `Decoder`.
        FloatingPointError: a loss or gradient is not finite; the rows of that step are named (see `on_nonfinite`).
        Interrupted: after a Ctrl-C, with a checkpoint saved. MemoryError: the message names what needs less.
    """
    with deterministic(config.deterministic), plan.naming_ways_out(config), contextlib.ExitStack() as held:
        run = Run(config, console or Console())
        latest, damaged = distributed.broadcast_from_rank0(lambda: run.claim_output_dir(held))
        run.read_data()
        run.load_models()
        run.tokenize_data()
        run.place_models()
        if latest is None:
            run.evaluate(0)  # before init_output_rms changes the encoder
        run.init_output_rms()
        run.prepare()
        if config.resume_from_checkpoint and run.resume(latest, damaged):
            return read_json(run.out / "summary.json", "output_dir")
        distributed.broadcast_from_rank0(run.begin_logs)
        run.loop()
        return run.finish()


class Run:
    """One training run: `train` calls the methods in the order in which they stand here."""

    def __init__(self, config: Config, console: Console):
        torch.set_flush_denormal(True)
        self.config = config
        self.console = console
        self.out = Path(config.output_dir)
        self.checkpoints = self.out / "checkpoints"
        self.precision = choose_precision(config)
        self.accelerator = make_accelerator(config, self.precision)
        self.world = self.accelerator.num_processes
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        self.state = TrainState()
        set_seed(config.seed)
        console.quiet = console.quiet or not self.accelerator.is_main_process

    def claim_output_dir(self, held: contextlib.ExitStack) -> tuple[Path | None, list[str]]:
        """Locks `output_dir` until `held` closes; returns the checkpoint to resume from and why others are skipped."""
        require_writable_folder(self.out, "output_dir", folders=RESULT_FOLDERS, files=RESULT_FILES)
        held.enter_context(exclusive_run(self.out))
        remove_stale_tmp(self.out)
        remove_stale_tmp(self.checkpoints)
        if self.config.resume_from_checkpoint:
            return latest_checkpoint(self.checkpoints)
        if next(self.checkpoints.glob("step-*"), None):
            raise FileExistsError(
                f"output_dir: got checkpoints of an earlier run in {self.config.output_dir!r}, expected a folder "
                "without any, or resume_from_checkpoint: true to continue from the newest"
            )
        return None, []

    # ------------------------------------------------------------------------------------------------------------------
    # Models and data

    def read_data(self) -> None:
        """First of all: a wrong file must not wait for the model."""
        config = self.config
        self.held_out = HeldOut(config, self.console)
        # By all at once: a wrong file is then raised by all, and the cache's own lock lets one of them write.
        self.source = data.load_rows(config.train_data, config.train_split, config.streaming)
        data.check_first_row(self.source, config.stage, config.column_map)
        unpaired = config.stage == 2 and data.is_unpaired(self.source, config.column_map)
        if unpaired and config.alignment_weight + config.contrastive_weight > 0:
            raise ConfigError(
                f"train_data: got texts without pairs in {config.train_data!r}, expected pairs unless "
                "distillation_weight is the only weight above 0"
            )

    def load_models(self) -> None:
        config = self.config
        self.console.print(f"reading {config.model}", highlight=False, markup=False)
        if config.log_with:
            self.accelerator.init_trackers("autoregembed", config={k: str(v) for k, v in asdict(config).items()})
        # Sharded weights are read once they are shards.
        building = loading.in_parts() if self.sharded else contextlib.nullcontext()
        with building, distributed.naming_lost("building the models"):
            self.encoder, self.decoder, self.tokenizer, self.recipe = build_models(config)
        if reason := not_shared_because(config):
            self.console.print(f"share_base: off, {reason}", highlight=False, markup=False)
        hull = hull_of(self.encoder) if self.sharded else None
        self.results = Results(config, self.encoder, self.tokenizer, self.sharded, hull)
        distributed.broadcast_from_rank0(self.require_space)

    @property
    def models(self) -> list[Encoder | Decoder]:
        """Those in memory: a decoder goes once its scores are made, if there is no alignment."""
        return [m for m in (self.encoder, self.decoder) if m is not None]

    def require_space(self) -> None:
        """Before the training: what is certain to be written must fit onto the disk."""
        least = 4 if self.config.lora_rank else 1  # merged in fp32
        sizes = [(num_elements(p) * max(p.element_size(), least), p.requires_grad) for p in self.encoder.parameters()]
        weights, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
        # Each replaces its predecessor once it is whole; a checkpoint holds the weights and AdamW's two moments.
        results = weights * (1 if (self.out / "model").exists() else 2)
        checkpoint = 3 * trained if self.config.save_steps else 0
        require_writable_folder(self.out, "output_dir", size=results + checkpoint)

    def tokenize_data(self) -> None:
        config = self.config
        prompt = prompt_of(config, self.encoder, self.decoder)
        self.console.print(f"reading {config.train_data}", highlight=False, markup=False)
        with self.accelerator.main_process_first():
            self.rows = data.training_rows(self.source, config, prompt)
        note = data.check_negatives(self.rows, config) if config.stage == 2 else None
        if note:
            self.console.print(note)
        if not config.streaming:
            self.fit_batch_size()
            config = self.config
        self.max_steps = config.max_steps or sampling.num_steps(
            len(self.rows), config.batch_size * self.world, config.num_train_epochs
        )

    def fit_batch_size(self) -> None:
        """A step larger than the data would read rows twice."""
        config, rows = self.config, len(self.rows)
        if config.batch_size * self.world <= rows:
            return
        if rows < self.world:
            raise ValueError(f"data: got {rows} rows for {self.world} processes, expected at least one for each")
        self.config = replace(config, batch_size=rows // self.world)
        size = self.config.batch_size
        self.console.print(
            f"batch_size: reduced from {config.batch_size} to {size} per process, for {rows} rows of data"
        )

    def place_models(self) -> None:
        config, attention = self.config, self.config.attention
        device = None if self.sharded else self.accelerator.device
        place(self.encoder, self.decoder, device, HALF_DTYPES.get(self.precision))
        if self.sharded:
            if attention not in ("auto", "sdpa"):
                raise ConfigError(f"attention: got {attention!r}, expected 'auto' or 'sdpa' with FSDP")
            optimizer = placeholder_optimizer(self.encoder, config)
            self.wrapped, self.optimizer = shard_models(self.accelerator, self.encoder, self.decoder, optimizer)
            fill_optimizer(self.optimizer.optimizer, self.encoder, config)
        self.weights = shared_fingerprint(*self.models)
        if self.sharded:
            return
        with self.accelerator.autocast():
            for model in self.models:
                model.use_attention(attention)

    def evaluate(self, step: int) -> None:
        """Adds what the model of this step is worth on the evaluation data, and keeps the model if it is the best."""
        if self.held_out.metric is None:
            return
        with self.accelerator.autocast():
            found = self.held_out.evaluate(functools.partial(self.encoder.encode, shared=True), self.console)
        state = self.state
        best = state.evaluations[str(state.best_step)] if state.best_step else {}
        state.evaluations[str(step)] = found
        values = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if value is not None)
        if step and values:
            self.console.print(f"{step:>6}/{self.max_steps}  {values}", highlight=False, soft_wrap=True)
        if step and self.config.save_best and self.held_out.is_better(found, best):
            state.best_step = step
            self.write_model(step)

    def init_output_rms(self) -> None:
        if not self.config.init_output_rms or self.decoder is None or self.recipe["output_rms_initialized"]:
            return
        rows = self.rows
        few = rows.take(128) if self.config.streaming else rows.select(range(0, len(rows), -(-len(rows) // 128)))
        rms, budget = self.decoder.input_rms_per_dimension(), self.config.token_budget or 4096
        self.encoder.init_output_rms(rms, *texts_of(list(few), False), budget)
        self.recipe["output_rms_initialized"] = True

    # ------------------------------------------------------------------------------------------------------------------
    # Optimizer, reference scores, resuming

    def prepare(self) -> None:
        config, decoder = self.config, self.decoder
        fingerprint: dict[str, str] = {}
        if config.needs_ref_logps or config.needs_teacher_scores:
            assert decoder is not None
            fingerprint = ref_logps_fingerprint(self.encoder, decoder, self.tokenizer, self.rows)
        if not self.sharded:
            optimizer = create_optimizer(self.encoder, config)
            self.wrapped, self.optimizer = self.accelerator.prepare(self.encoder, optimizer)
        ref_logps = teacher_scores = None
        self.encoder.eval()
        read = self.max_steps * self.world  # batches
        with self.accelerator.autocast():
            if config.needs_ref_logps:
                assert decoder is not None
                wanted = sampling.rows_read(
                    len(self.rows), config.batch_size, read, config.seed, config.needs_teacher_scores
                )
                ref_logps = cached_ref_logps(
                    config, self.encoder, decoder, self.rows, fingerprint, wanted, self.console
                )
            if config.needs_teacher_scores:
                assert decoder is not None
                given: dict[str, Any] = {"seed": config.seed, "num_blocks": read, "console": self.console}
                given |= {n: getattr(config, f"distillation_{n}") for n in ("candidates", "marginal_texts")}
                given |= {"batch_size": config.batch_size, "fingerprint": fingerprint}
                teacher_scores = cached_teacher_scores(self.encoder, decoder, self.rows, **given)
        if not config.steps_need_decoder:
            self.decoder = None
        self.encoder.train()
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, config.warmup_steps,
            max(self.max_steps, config.warmup_steps + 1),
        )  # fmt: skip
        self.objective = Objective(config, self.wrapped, self.decoder, self.accelerator, ref_logps, teacher_scores)
        if config.cuda_graphs:
            self.objective, self.optimizer = captured(self.objective, self.optimizer)
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that wrote its checkpoint."""
        config = self.config
        settings = {
            **{name: value for name, value in asdict(config).items() if name not in FREE_FIELDS},
            "model": self.weights,
            "train_data": config.train_data if config.streaming else data.content_fingerprint(self.rows),
            "max_steps": self.max_steps,
            "precision": self.precision,
            "processes": self.world,
            "device": self.accelerator.device.type,
        }
        if config.lr_scheduler_type == "constant":
            del settings["max_steps"]  # a longer run begins like a shorter one
        return settings

    def resume(self, latest: Path | None, damaged: list[str]) -> bool:
        """Restores a checkpoint; True if the run was already finished and exported."""
        for reason in damaged:
            self.console.print(f"resume_from_checkpoint: skipped {reason}")
        if latest is None:
            self.console.print(f"resume_from_checkpoint: no checkpoint in {self.checkpoints}, starts at step 1")
            return False
        accelerator = self.accelerator
        saved = load_checkpoint(
            latest, self.encoder, self.optimizer.optimizer, run=self.settings, rank=accelerator.process_index
        )
        self.state = TrainState.restored(saved, latest)
        if self.state.best_step != distributed.broadcast_from_rank0(lambda: step_of(self.out / "model")):
            self.state.best_step = 0  # the run had got further than its checkpoint, and overwritten that model
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule runs ahead of its optimizer here
            for _ in range(self.state.step):
                self.scheduler.step()
        self.console.print(f"resume_from_checkpoint: {latest.name}")
        if accelerator.is_main_process:  # the run may have been killed before it did so itself
            prune_checkpoints(latest, self.config.save_total_limit)
        if self.state.step > self.max_steps:
            raise ConfigError(
                f"max_steps: got {self.max_steps}, expected at least {self.state.step}, those of {str(latest)!r}"
            )
        finished = self.state.step == self.max_steps and (self.out / "summary.json").is_file()
        if finished:
            self.console.print(f"resume_from_checkpoint: all {self.max_steps} steps were done and exported")
        return finished

    def begin_logs(self) -> None:
        (self.out / "summary.json").unlink(missing_ok=True)
        write_json(self.out / "config.json", asdict(self.config))
        for name in ("metrics.jsonl", "nonfinite.jsonl"):
            truncate_log(self.out / name, self.state.step)

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def loop(self) -> None:
        config, state, last = self.config, self.state, self.max_steps
        batches = sampling.batches(
            self.rows, config.batch_size, seed=config.seed, start=state.step, rank=self.accelerator.process_index,
            world=self.world, in_blocks=config.needs_teacher_scores,
        )  # fmt: skip
        with Display(self.console, f"stage {config.stage}", last, state.step) as display, stop_on_signal() as stop:
            for step in range(state.step + 1, last + 1):
                log = self.step(step, next(batches))
                state.step = step
                display.update(step, describe(log, self.held_out.last(state.evaluations)))
                if step == last or (config.eval_steps and step % config.eval_steps == 0):
                    self.evaluate(step)
                if distributed.any_rank(stop.signalled, self.accelerator.device):
                    folder = self.save_checkpoint()
                    raise Interrupted(
                        f"stopped at step {step}, checkpoint in {folder}; resume_from_checkpoint: true continues"
                    )
                if config.save_steps and (step % config.save_steps == 0 or step == last):
                    self.save_checkpoint()

    def step(self, step: int, batch: list[dict]) -> dict[str, float]:
        """One optimizer step; returns what is logged."""
        config, accelerator = self.config, self.accelerator
        start = time.perf_counter()
        found = self.objective(batch)
        found["grad_norm"] = self.objective.clip()
        # The one wait for the device in a step: whether to update is decided here.
        log = dict(zip(found, torch.stack([x.double() for x in found.values()]).tolist(), strict=True))
        norm = log.pop("grad_norm")
        rate = self.scheduler.get_last_lr()[0]
        finite = math.isfinite(log["loss"]) and math.isfinite(norm)
        if accelerator.scaler is not None:
            log["loss_scale"] = accelerator.scaler.get_scale()
        if not finite:
            self.optimizer.zero_grad()
            # With a scale above 1, a finite loss with a non-finite gradient is what the scaler waits for.
            if not math.isfinite(log["loss"]) or log.get("loss_scale", 1.0) <= 1:
                self.record_nonfinite(step, log["loss"], norm, batch)
        if finite or accelerator.scaler is not None:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        elapsed = time.perf_counter() - start
        self.state.seconds += elapsed
        tokens = sum(encoder_lengths(batch, self.encoder, config.hard_negatives)) * self.world
        log |= {"grad_norm": norm, "lr": rate, "tokens_per_second": tokens / elapsed, "memory_gb": peak_memory_gb()}
        if accelerator.is_main_process:
            append_log(self.out / "metrics.jsonl", {"step": step, "updated": finite, **log})
        if config.log_with:
            accelerator.log(log, step=step)
        return log

    def record_nonfinite(self, step: int, loss: float, norm: float, batch: list[dict]) -> None:
        """Writes down the rows of a step, and ends the run where `on_nonfinite` says so."""
        skipped = self.state.skipped
        skipped.append(step)
        rows = gather_object([r["row"] for r in batch])
        action = self.config.on_nonfinite
        if len(skipped) >= MAX_SKIPPED and skipped[-MAX_SKIPPED] == step - MAX_SKIPPED + 1:
            action = "stop"
        file = self.out / "nonfinite.jsonl"
        if self.accelerator.is_main_process:
            found = {"loss": str(loss), "grad_norm": str(norm)}
            append_log(file, {"step": step, "action": action, **found, "rows": rows})
        if action == "stop":
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}, rows {rows}; nothing was updated, and "
                f"{str(file)!r} has the rows"
            )

    def save_checkpoint(self) -> Path:
        accelerator = self.accelerator
        folder = self.checkpoints / f"step-{self.state.step:08d}"
        extra = {**asdict(self.state), "run": self.settings}
        if accelerator.scaler is not None:
            extra["scaler"] = accelerator.scaler.state_dict()
        generators = gather_object([rng_state()])
        if accelerator.is_main_process or self.sharded:
            save_checkpoint(folder, self.encoder, self.optimizer.optimizer, self.state.step, extra, generators)
        if accelerator.is_main_process:
            prune_checkpoints(folder, self.config.save_total_limit)
        return folder

    # ------------------------------------------------------------------------------------------------------------------
    # The result

    @property
    def kept_step(self) -> int:
        """The step of `save_best`, 0 where there is none."""
        return self.state.best_step if self.config.save_best else 0

    def finish(self) -> dict:
        config, out, state = self.config, self.out, self.state
        summary = {
            "stage": config.stage,
            "steps": self.max_steps,
            "train_seconds": round(state.seconds, 1),
            "eval_metric": self.held_out.metric,
            "evaluations": state.evaluations,
            "model": str(out / "model"),
            "export": str(out / "export"),
            "model_step": self.kept_step or self.max_steps,
            "device": str(self.accelerator.device),
            "processes": self.world,
            "precision": self.precision,
            "skipped_steps": len(state.skipped),
            "attention": self.encoder.attention,
        }
        if not self.kept_step:
            self.write_model(self.max_steps)

        def write_rest() -> None:
            draw_training(out, state.evaluations, self.held_out.metric, self.console)
            write_json(out / "summary.json", summary)

        distributed.broadcast_from_rank0(write_rest)
        if config.log_with:
            self.accelerator.end_training()
        return summary

    def write_model(self, step: int) -> None:
        self.recipe["step"] = step
        card = run_card(self.config, self.recipe["decoder"], self.held_out.metric, self.state.evaluations)
        self.results.write(self.out, card)
