"""What a run will need of memory, before a weight is loaded: `autoregembed plan`."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from rich.console import Console

from autoregembed import data, dry_run, sampling
from autoregembed.attention import SDPA, VARLEN
from autoregembed.build import build_models, prompt_of
from autoregembed.config import Config
from autoregembed.loading import without_values
from autoregembed.models import base_model
from autoregembed.objective import encoder_lengths
from autoregembed.packing import make_microbatches
from autoregembed.quantized import planned
from autoregembed.reference_scores import SCORING_BUDGET, scoring_passes
from autoregembed.runtime import HALF_DTYPES, choose_precision
from autoregembed.train_flags import plan_parser

GB = 1e9
FEW_LAYERS = (4, 8)  # of larger models where an estimate is enough
STEPS = 200  # whose batches are compared
RANK = 16  # of the LoRA run that is proposed
RESULT_COPIES = 2  # of the encoder: the merged copy, and the export as it is read again; first, a plain base read anew


@dataclass(frozen=True)
class Machine:
    """Where a run is to take place."""

    device: str = "cpu"  # or cuda
    processes: int = 1
    fsdp: bool = False  # FSDP2; otherwise DDP where there are several processes
    memory: float | None = None  # bytes of the device; None: unknown

    @classmethod
    def here(
        cls, device: str | None = None, processes: int = 1, fsdp: bool = False, gb: float | None = None
    ) -> Machine:
        """This machine, where nothing else is said.

        Raises:
            ValueError: FSDP2 of one process, or on a CPU, or no such device.
        """
        found = "cuda" if torch.cuda.is_available() else "cpu"
        device = device or found
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device: got {device!r}, expected 'cpu' or 'cuda'")
        if processes < 1 or (fsdp and processes < 2):
            raise ValueError(f"processes: got {processes}, expected at least {2 if fsdp else 1}")
        if gb is not None:
            memory: float | None = gb * GB
        elif device == "cpu":
            memory = main_memory()
        else:
            memory = torch.cuda.get_device_properties(0).total_memory if found == "cuda" else None
        return cls(device, processes, fsdp, memory)


@dataclass
class Plan:
    """Bytes that one process needs."""

    model: str
    stage: int
    precision: str
    rows: int  # of the largest step
    tokens: int  # that it reads, encoder and decoder together
    step: dict[str, float]  # the largest moment of a step by use, on the device
    device: dict[str, float] = field(default_factory=dict)  # the peaks of a run's stretches, on the device
    host: dict[str, float] = field(default_factory=dict)  # the same in main memory, where that is not the device
    host_others: float | None = None  # in main memory, of each process but the first; None: as the first

    @property
    def peak(self) -> float:
        """The largest of them on the device."""
        return max(self.device.values())

    @property
    def host_peak(self) -> float:
        return max(self.host.values(), default=self.peak)


def main_memory() -> float:
    """Bytes of main memory, or of the share that the container has."""
    total = float(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, float(text))


# ----------------------------------------------------------------------------------------------------------------------
# What is there all the time


@dataclass(frozen=True)
class Weights:
    """Bytes of a run's weights, from config.json."""

    encoder: float
    trained: float
    decoder: float
    loaded: float  # of encoder and decoder as they are read, with the encoder's file, which lies in memory beside them
    results: float  # of the copies of the encoder that are written
    widened: float  # the largest layer of a quantised base, as it is multiplied by
    gathered: float  # what FSDP2 holds whole at a time: two layers, tables, gradients of a layer and a table
    trial: float  # of two layers and two tables in fp32: what process 0 tries before shards are read
    layers: int


def weights(config: Config, half: torch.dtype | None) -> Weights:
    with without_values(torch.device("meta")):
        encoder, decoder, _, _ = build_models(replace(config, compile=False))
    plain = _bytes(encoder.parameters())
    saved, largest = planned(encoder.model, config.base_dtype)
    size = plain - saved
    merged = 4 * sum(p.numel() for p in encoder.parameters()) if config.lora_rank else plain
    own = {id(p) for p in encoder.parameters()}
    decoder_size = 0.0 if decoder is None else _bytes(p for p in decoder.parameters() if id(p) not in own)
    product = 4 if half is None else half.itemsize
    names = set(getattr(base_model(encoder.model), "_no_split_modules", None) or ())
    layers = [_bytes(m.parameters()) for m in encoder.model.modules() if type(m).__name__ in names]
    layer, table = max(layers, default=0.0), _bytes([encoder.model.get_input_embeddings().weight])
    return Weights(
        encoder=size,
        trained=_bytes(p for p in encoder.parameters() if p.requires_grad),
        decoder=decoder_size * product / 4,
        loaded=size + decoder_size + plain,
        results=merged * (RESULT_COPIES + (saved > 0)),
        widened=product * largest,
        gathered=(3 * layer + 3 * table) * product / 4,
        trial=(2 * layer + 2 * table) * 4 / encoder.model.get_input_embeddings().weight.element_size(),
        layers=encoder.model.config.get_text_config().num_hidden_layers,
    )


def _bytes(parameters: Any) -> float:
    return float(sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values()))


# ----------------------------------------------------------------------------------------------------------------------
# What a step adds


def _rows(config: Config, models: dry_run.Models, processes: int) -> Iterator[list[dict]]:
    """Batches of the run's first steps, in process 0."""
    source = data.load_rows(config.train_data, config.train_split, config.streaming)
    rows = data.training_rows(source, config, prompt_of(config, models.encoder, models.decoder))
    if config.streaming:
        steps, size = config.max_steps or 1, config.batch_size
    else:
        size = min(config.batch_size, max(1, len(rows) // processes))
        steps = config.max_steps or sampling.num_steps(len(rows), size * processes, config.num_train_epochs)
    in_blocks = config.needs_teacher_scores
    found = sampling.batches(rows, size, seed=config.seed, world=processes, in_blocks=in_blocks)
    for _, batch in zip(range(min(steps, STEPS)), found, strict=False):
        yield batch


def heaviest(config: Config, models: dry_run.Models, batches: list[list[dict]]) -> tuple[list[dict], int]:
    """The batch with most tokens, and how many."""
    around = models.encoder.num_compress_tokens + (0 if models.decoder is None else len(models.decoder.prefix))

    def tokens(rows: list[dict]) -> int:
        read = sum(encoder_lengths(rows, models.encoder, config.hard_negatives))
        if not config.needs_decoder:
            return read
        if config.stage == 1:
            return read + sum(len(r["target_ids"]) + around for r in rows)
        pairs = [t for r in rows for t in (r["target_ids"][0], *r["target_ids"])]
        return read + sum(len(t) + around for t in pairs)

    return max(((rows, tokens(rows)) for rows in batches), key=lambda found: found[1])


def scored(config: Config, models: dry_run.Models, batches: list[list[dict]], batch: list[dict]) -> list[dict]:
    """Rows of a pass without gradients: `batch`, if a teacher scores it, or the longest that need reference scores."""
    if config.needs_teacher_scores:  # a block at once, and none of its passes exceeds one of reference scores
        return batch
    if config.needs_ref_logps:
        rows = list({row["row"]: row for rows in batches for row in rows}.values())
        part = scoring_passes(rows, SCORING_BUDGET)[0]
    else:
        rows = batch
        part = make_microbatches(encoder_lengths(rows, models.encoder, False), SCORING_BUDGET)[0]
    return [rows[i] for i in part]


def _extrapolated(found: list[tuple[int, dry_run.Peaks]], layers: int) -> list[Counter[str]]:
    """The peaks of a model of so many layers, from those of one or two smaller ones."""
    if len(found) == 1:
        return list(found[0][1].values())
    (few, at_few), (more, at_more) = found
    out = []
    for stretch, parts in at_more.items():
        before = at_few.get(stretch, Counter())
        slope = {use: (parts[use] - before[use]) / (more - few) for use in {*parts, *before}}
        out.append(Counter({use: max(0, round(before[use] + slope[use] * (layers - few))) for use in slope}))
    return out


def plan(config: Config, machine: Machine, *, exact: bool = True) -> Plan:
    """Bytes by use of a run of `config`; reads config.json, the tokenizer and the data.

    Without `exact`, two smaller models of as wide layers are run, and the rest is extrapolated.

    Nothing is measured but the libraries of this process. Not counted: what an allocator keeps, the context of the
    device, and the buffers of NCCL.
    """
    precision: Any = choose_precision(config) if machine.device == "cpu" or config.precision != "auto" else "bf16"
    half, config = HALF_DTYPES.get(precision), replace(config, precision=precision)
    w = weights(config, half)
    on_gpu = machine.device == "cuda" and half is not None and not machine.fsdp and config.attention != "sdpa"
    attention = VARLEN if on_gpu else SDPA
    counts = [w.layers] if exact or w.layers <= FEW_LAYERS[-1] else list(FEW_LAYERS)
    steps, scores, tokens = [], [], 0
    batch: list[dict] = []
    few: list[dict] = []
    for layers in counts:
        models = dry_run.fake_models(config, half=half, device=machine.device, attention=attention, layers=layers)
        if not batch:
            batches = list(_rows(config, models, machine.processes))
            batch, tokens = heaviest(config, models, batches)
            few = scored(config, models, batches, batch)
        steps.append((layers, dry_run.step(config, models, batch)))
        scores.append((layers, dry_run.scoring(config, models, few)))
    sharing = machine.processes if machine.fsdp else 1
    decoder_stays = w.decoder if config.steps_need_decoder else 0.0
    fixed: dict[str, float] = {
        "encoder, weights": w.encoder / sharing,
        "decoder, weights": decoder_stays / sharing,
        "optimizer": 2 * w.trained / sharing,
    }
    if w.widened:
        fixed["a layer of the base, widened"] = w.widened
    if machine.fsdp:
        fixed["gathered layers and tables"] = w.gathered
    elif machine.processes > 1:
        fixed["buckets of DDP"] = w.trained
    moments = [fixed | _shared(parts, sharing) for parts in _extrapolated(steps, w.layers)]
    step = max(moments, key=lambda parts: sum(parts.values()))
    before = max(p.total() for p in _extrapolated(scores, w.layers)) + (w.encoder + w.decoder) / sharing
    found = Plan(config.model, config.stage, precision, len(batch), tokens, step)
    found.device = {"scores before it": before, "a step": sum(step.values())}
    libraries = float(psutil.Process().memory_info().rss)
    if machine.device == "cpu":
        step["libraries"] = libraries
        stay = w.encoder + decoder_stays + 2 * w.trained
        found.device = {
            "loading": libraries + w.loaded,
            **{name: size + libraries for name, size in found.device.items()},
            "writing the results": libraries + stay + w.results,
        }
    elif machine.fsdp:  # each process reads its shards into its device
        found.host = {"loading": libraries + w.trial, "writing the results": libraries + RESULT_COPIES * w.trial}
        found.host_others = libraries
    else:
        found.host = {"loading": libraries + w.loaded, "writing the results": libraries + w.results}
    return found


def _shared(parts: Counter[str], processes: int) -> dict[str, float]:
    return {use: size / (processes if use == dry_run.GRADIENTS else 1) for use, size in parts.items() if size}


# ----------------------------------------------------------------------------------------------------------------------
# What to change


def _checkpointed(config: Config) -> list[tuple[str, str]]:
    """The fields of checkpointing that concern a run, and the model that each is about."""
    fields = [("gradient_checkpointing", "encoder"), ("decoder_gradient_checkpointing", "decoder")]
    return fields if config.needs_decoder else fields[:1]


def ways(config: Config, fsdp: bool = False) -> dict[str, str]:
    """What a config can still change to need less memory: a field and its value, and what that does."""
    found = {}
    budget = config.token_budget
    found["token_budget"] = "passes of fewer tokens, same update" if budget is None else f"below {budget}"
    for name, role in _checkpointed(config):
        if not getattr(config, name) and not config.compile:
            found[f"{name}: selective"] = f"the {role} repeats norms and activation functions, same update"
        if getattr(config, name) is not True:
            found[f"{name}: true"] = f"the {role}'s layers run twice, same update"
    if not config.lora_rank:
        found[f"lora_rank: {RANK}"] = "train adapters instead of all weights: hardly any gradients or optimizer state"
    elif config.share_base is False:
        found["share_base: auto"] = "encoder and decoder share the frozen weights"
    if not fsdp:
        found["FSDP2"] = "weights, gradients and optimizer state sharded over the processes: docs/howto/distributed.md"
    if config.stage == 2 and config.hard_negatives:
        found["hard_negatives: false"] = "negatives are not encoded"
    found["max_length, batch_size"] = "fewer tokens in a step"
    return found


@contextlib.contextmanager
def naming_ways_out(config: Config) -> Iterator[None]:
    """A run that meets the end of the memory says what would make it smaller.

    Raises:
        MemoryError: in place of torch's own errors, of which the one for main memory has no type.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
        known = "; ".join(f"{name} ({effect})" for name, effect in ways(config, fsdp).items())
        reason = str(error).strip().split("\n")[0]
        raise MemoryError(
            f"memory: got too little ({reason}), expected as much as `autoregembed plan` computes; these need less: "
            f"{known}"
        ) from error


def changes(config: Config, machine: Machine, tokens: int) -> Iterator[tuple[str, Config, Machine]]:
    """Ways that `plan` can compute, each alone, then those that keep the update the same together."""
    budget = max(256, 2 ** int(math.log2(max(2, (config.token_budget or tokens) // 4))))
    yield f"token_budget: {budget}", replace(config, token_budget=budget), machine
    both = replace(config, token_budget=budget)
    for kind in ("selective", True):
        for name, _ in _checkpointed(config):
            if getattr(config, name) in (kind, True) or (kind == "selective" and config.compile):
                continue
            change: dict[str, Any] = {name: kind}
            yield f"{name}: {str(kind).lower()}", replace(config, **change), machine
            both = replace(both, **change)
    yield "all of these", both, machine
    if not config.lora_rank:
        yield f"all and lora_rank: {RANK}", replace(both, lora_rank=RANK, freeze=[]), machine
    if machine.device == "cuda" and not machine.fsdp:
        processes = max(8, machine.processes)
        yield f"all and FSDP2, {processes} processes", both, replace(machine, processes=processes, fsdp=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def read_machine(arguments: list[str]) -> tuple[Machine, list[str]]:
    """The machine that the flags of `plan` describe, and the arguments that are those of `train`."""
    own: list[str] = []
    rest: list[str] = []
    for i, argument in enumerate(arguments):
        name = argument.split("=")[0]
        before = arguments[i - 1] if i else ""
        mine = name in ("--device", "--memory", "--processes", "--fsdp")
        (own if mine or before in ("--device", "--memory", "--processes") else rest).append(argument)
    found = plan_parser(exit_on_error=False).parse_args(own)
    return Machine.here(found.device, found.processes, found.fsdp, found.memory), rest


def chained(configs: list[Config]) -> list[Config]:
    """Configs that can be planned before the first has run: each starts from the first one's model."""
    out: list[Config] = []
    for config in configs:
        if out:
            k = config.num_compress_tokens or out[-1].num_compress_tokens
            start = out[-1]
            config = replace(config, model=start.model, gguf_file=start.gguf_file, num_compress_tokens=k)
        out.append(config)
    return out


def report(configs: list[Config], machine: Machine, console: Console) -> bool:
    """Prints a plan of every config; whether all fit."""
    fits = True
    for config in chained(configs):
        found = plan(config, machine)
        fits &= _print(found, machine, console)
        short = machine.memory is None or found.peak > machine.memory
        if short:
            console.print("\nneeds less memory with" + " " * 19 + "about, GB", highlight=False)
            for name, changed, place in changes(config, machine, found.tokens):
                console.print(f"  {name:<44}{plan(changed, place, exact=False).peak / GB:>6.2f}", highlight=False)
            console.print("  or a smaller max_length or batch_size", highlight=False)
    return fits


def _print(found: Plan, machine: Machine, console: Console) -> bool:
    sharing = f", FSDP2 of {machine.processes} processes" if machine.fsdp else ""
    ddp = f", DDP of {machine.processes} processes" if machine.processes > 1 and not machine.fsdp else ""
    console.print(
        f"\nstage {found.stage}: {found.model}, {found.rows} rows and {found.tokens} tokens per step, "
        f"{found.precision}, {machine.device}{sharing}{ddp}; computed for one process, no weights loaded\n",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip

    def line(name: str, size: float) -> None:
        console.print(f"  {name:<44}{size / GB:>6.2f}", highlight=False, markup=False)

    console.print("largest moment of a step" + " " * 24 + "GB", highlight=False)
    for name, size in found.step.items():
        line(name, size)
    console.print("\npeak while" + " " * 38 + "GB", highlight=False)
    for name, size in found.device.items():
        line(name, size)
    for name, size in found.host.items():
        line(f"{name}, in main memory", size)
    available = main_memory()
    others = found.host_peak if found.host_others is None else found.host_others
    host = found.host_peak + others * (machine.processes - 1)
    fits = host <= available
    if machine.processes > 1 or found.host:
        console.print(
            f"\nmain memory: {host / GB:.1f} GB for {machine.processes} processes, this machine has "
            f"{available / GB:.1f} GB", highlight=False,
        )  # fmt: skip
    if machine.memory is None:
        console.print(f"\n{machine.device}: needs {found.peak / GB:.1f} GB; --memory sets its size", highlight=False)
        return fits
    fits &= found.peak <= machine.memory
    if machine.device == "cpu":
        console.print(
            "\nglibc also keeps freed blocks: in one run the resident memory was a third larger. With "
            "MALLOC_MMAP_THRESHOLD_=65536 in the environment it returns them, and steps are slower",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    verdict = "fits" if found.peak <= machine.memory else "does not fit"
    console.print(
        f"\n{machine.device}: needs {found.peak / GB:.1f} GB of {machine.memory / GB:.1f} GB: {verdict}",
        highlight=False,
    )
    return fits
