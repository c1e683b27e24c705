"""Checkpoints that a run resumes from: trainable weights, optimiser, random generators, step and settings.

Nothing is read that is not covered by a checksum.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoregembed import distributed
from autoregembed.files import CheckpointError, atomic_folder, file_fingerprint, read_json, write_json
from autoregembed.weight_files import WeightFiles, save_tensors

CHECKPOINT_FILES = ("trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


@dataclass
class TrainState:
    """What a checkpoint keeps besides tensors."""

    step: int = 0  # the last one done
    evaluations: dict[str, dict[str, float | None]] = field(default_factory=dict)  # by step, every metric by name
    best_step: int = 0  # whose model the run has written; 0: none yet
    seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)  # steps that were not finite

    @classmethod
    def restored(cls, saved: dict, folder: Path) -> TrainState:
        """From what `load_checkpoint` returns; raises CheckpointError where an earlier version wrote it."""
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in saved]:
            raise CheckpointError(
                f"resume_from_checkpoint: got {str(folder)!r} without {missing[0]!r}, expected a checkpoint of this "
                "version"
            )
        return cls(**{name: saved[name] for name in names})


def rng_state() -> dict[str, Tensor]:
    """The states of this process's random generators that a training step draws from (not Python's or NumPy's)."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    extra: dict,
    rng: Sequence[dict[str, Tensor]] | None = None,
) -> Path:
    """Writes trainable parameters, optimizer, RNG and step as safetensors and JSON, with a manifest of checksums.

    With sharded weights all processes call it: shards are sent one by one to process 0, which writes.

    Args:
        folder: appears when it is whole and on the disk; named step-… for `latest_checkpoint` to find it.
        step: the last one done.
        extra: JSON that `load_checkpoint` returns.
        rng: `rng_state()` of every process, by rank; by default of this one.

    Raises:
        OSError: a write failed. CheckpointError: what is read back is not what was written.
    """
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    tensors: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{slot}"] = value
    generators = {f"{i}.{n}": t for i, one in enumerate(rng or [rng_state()]) for n, t in one.items()}
    main = distributed.rank() == 0
    with atomic_folder(folder, overwrite=True) if main else contextlib.nullcontext() as temporary:
        save_tensors(temporary and temporary / "trainable.safetensors", trained)
        save_tensors(temporary and temporary / "optimizer.safetensors", tensors)
        if temporary is None:
            return folder
        save_file(generators, temporary / "rng.safetensors")
        groups = [{k: v for k, v in g.items() if k != "foreach"} for g in state["param_groups"]]
        write_json(temporary / "state.json", {"step": step, "scalars": scalars, "param_groups": groups, **extra})
        files = {
            name: [(temporary / name).stat().st_size, file_fingerprint(temporary / name)] for name in CHECKPOINT_FILES
        }
        (temporary / "manifest.json").write_text(manifest_text(files), encoding="utf-8")
    if reason := verify(folder):
        raise CheckpointError(f"output_dir: got {str(folder)!r} damaged right after it was written: {reason}")
    return folder


def manifest_text(files: dict[str, list]) -> str:
    """manifest.json: {name: [bytes, xxh3_128]} and their checksum, in the one spelling that `verify` accepts."""
    body = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "checksum": xxhash.xxh3_128_hexdigest(body.encode())}, sort_keys=True)


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None. Every byte of it is covered, and no file may be added."""
    try:
        if folder.is_symlink():
            return "it is a symbolic link"
        manifest = read_json(folder / "manifest.json", "manifest.json")
        files: Any = manifest.get("files")
        if (folder / "manifest.json").read_text(encoding="utf-8") != manifest_text(files):
            return "manifest.json is damaged"
        # Exact names, so none can lead out of the folder.
        if sorted(files) != sorted(CHECKPOINT_FILES):
            return f"manifest.json names {sorted(files)}, expected {sorted(CHECKPOINT_FILES)}"
        odd = sorted({p.name for p in folder.iterdir()} ^ {*CHECKPOINT_FILES, "manifest.json"})
        if odd:
            return f"{odd[0]} is missing or does not belong there"
        for path in folder.iterdir():
            if path.is_symlink() or not path.is_file():
                return f"{path.name} is no plain file"
        for name, (size, checksum) in files.items():
            if (folder / name).stat().st_size != size or file_fingerprint(folder / name) != checksum:
                return f"{name} is damaged"
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints under `folder`, newest first, whole or not."""
    return sorted(folder.glob("step-*"), key=lambda p: p.name, reverse=True)


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `folder` that verifies, and what was skipped with the reason."""
    skipped: list[str] = []
    for state in checkpoints_in(folder):
        reason = verify(state)
        if reason is None:
            return state, skipped
        skipped.append(f"{state.name}: {reason}")
    return None, skipped


def prune_checkpoints(newest: Path, keep: int) -> None:
    """Keeps `newest`, which has been verified, and the `keep` - 1 before it; removes the others."""
    known = checkpoints_in(newest.parent)
    place = known.index(newest)
    for state in (*known[:place], *known[place + keep :]):  # those that claim to be newer did not verify
        # Under its name a state is whole: half of it must not be left there by a kill.
        doomed = state.with_name(f".{state.name}.outdated.tmp")
        state.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, run: dict | None = None, rank: int = 0
) -> dict:
    """Restores what `save_checkpoint` wrote; returns its JSON, with "step". Nothing is changed unless all of it fits.

    Args:
        run: the settings of the run that resumes, compared with "run" of the state.
        rank: the process whose generators are restored.

    Raises:
        CheckpointError: another run (the setting is named), parameters that differ in name or shape (another K, rank
            or model), or contents that no `save_checkpoint` writes.
    """
    state = read_json(folder / "state.json", "resume_from_checkpoint")
    known = state.get("run", {})
    if not isinstance(known, dict):
        raise CheckpointError(f"resume_from_checkpoint: got settings {known!r} in {str(folder)!r}, expected an object")
    causes = [*_DERIVED]  # last, and of them what follows from the others
    for name, value in sorted((run or {}).items(), key=lambda item: causes.index(item[0]) if item[0] in causes else -1):
        if known.get(name, value) != value:
            raise CheckpointError(_another_run(folder, name, value, known[name]))
    try:
        saved, tensors = (WeightFiles.of(folder / name) for name in CHECKPOINT_FILES[:2])
        generators = load_file(folder / CHECKPOINT_FILES[2])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"resume_from_checkpoint: got {str(folder)!r}, which cannot be read: {error}") from error
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {n: tuple(p.shape) for n, p in trainable.items()}
    found = {n: shape for n, (shape, _) in saved.kinds.items()}
    if shapes != found:
        odd = sorted(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n))
        raise CheckpointError(
            f"resume_from_checkpoint: got {odd[0]} with shape {found.get(odd[0])} in {str(folder)!r}, expected "
            f"{shapes.get(odd[0])}; {len(odd)} parameters differ"
        )
    slots: dict[int, dict] = {}
    sizes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    wanted_rng = {f"{rank}.{name}": t for name, t in rng_state().items()}
    try:
        step, scalars, groups = state["step"], state["scalars"], state["param_groups"]
        good = type(step) is int and step >= 0
        for key, value in (*((key, key) for key in tensors.kinds), *scalars.items()):
            index, slot = key.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
            shape = tensors.kinds[key][0] if key in tensors.kinds else ()
            good &= 0 <= int(index) < len(sizes) and shape in (sizes[int(index)], ())
        expected = optimizer.state_dict()["param_groups"]
        good &= [g["params"] for g in groups] == [g["params"] for g in expected]
        good &= all(n in e and _same_kind(v, e[n]) for g, e in zip(groups, expected, strict=True) for n, v in g.items())
        good &= all(_same_kind(value, 0.0) for value in scalars.values())
        good &= all(
            n in generators and generators[n].dtype == t.dtype and generators[n].shape == t.shape
            for n, t in wanted_rng.items()
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"resume_from_checkpoint: got {str(folder)!r} with a missing or malformed entry ({error!r}), expected a "
            "checkpoint of this version"
        ) from error
    if not good:
        raise CheckpointError(
            f"resume_from_checkpoint: got {str(folder)!r} with a step, optimizer or RNG of another kind, expected "
            "a checkpoint of this run"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved.shard(name, parameter, parameter.device))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, (shape, _) in tensors.kinds.items():
        index, slot = key.split(".", 1)
        like = parameters[int(index)]
        like = like if shape == tuple(like.shape) else torch.zeros(shape)
        slots[int(index)][slot] = tensors.shard(key, like, like.device)
    groups = [{**old, **new} for old, new in zip(optimizer.param_groups, groups, strict=True)]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    torch.set_rng_state(generators[f"{rank}.cpu"])
    if f"{rank}.cuda" in wanted_rng:
        torch.cuda.set_rng_state(generators[f"{rank}.cuda"])
    return state


# Settings of a run that are not what the user wrote.
_DERIVED = {
    "model": "other weights of encoder or decoder",
    "train_data": "other rows",
    "processes": "the number of processes",
    "max_steps": "the number of steps, from max_steps or from num_train_epochs, batch_size and rows",
}


def _another_run(folder: Path, name: str, value: object, known: object) -> str:
    """Why a checkpoint is not that of this run, and how to go on: `folder` is OUTPUT_DIR/checkpoints/step-…."""
    out = folder.parent.parent
    said = f" ({_DERIVED[name]})" if name in _DERIVED else ""
    way = "lr_scheduler_type constant would have allowed it; " if name == "max_steps" else ""
    result = out / "model"
    ended = (
        f"its result, model: {str(result)!r}," if result.is_dir() else f"its result, {str(result)!r} once it is done,"
    )
    return (
        f"{name}: got {value!r}, expected {known!r}{said}, with which {str(folder)!r} was trained; {way}"
        f"{str(out / 'config.json')!r} has the settings that resume this run; to go on with others, start from {ended} "
        "in another output_dir"
    )


def _same_kind(value: object, known: object) -> bool:
    if isinstance(known, list | tuple):
        return isinstance(value, list) and len(value) == len(known) and all(map(_same_kind, value, known))
    numbers = (int, float)
    return type(value) is type(known) or (type(value) in numbers and type(known) in numbers)
