"""Folders on disk: models that the next stage loads, and checkpoints that a run resumes from.

Safetensors and JSON only. A file or folder appears under its name when it is whole and on the disk, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoregembed import distributed

RECIPE = "autoregembed.json"
_LARGEST_JSON = 1 << 26


class CheckpointError(RuntimeError):
    """A folder or file on disk is missing something, damaged, or of another model."""


class RefLogpsMismatch(CheckpointError):
    """Reference scores on disk belong to other data, another model or another tokenizer."""


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `folder` when the block ends well, and is removed when it does not.

    A process that is killed leaves the old folder or the new one, and perhaps a hidden sibling that `remove_stale_tmp` clears.

    Raises:
        FileExistsError: `folder` exists, is not empty, and `overwrite` is False.
        OSError: a write failed; what was there before is there still.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: got {str(folder)!r} in use, expected a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    old = folder.with_name(f".{folder.name}.old")
    try:
        temporary.chmod(0o755)
        with _typed_write_errors(folder):
            yield temporary
        for path in sorted(temporary.rglob("*")):
            _fsync(path)
        _fsync(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists() and old.exists():
            old.rename(folder)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling that replaces `path` when the block ends well, and is removed when it does not.

    Raises:
        OSError: a write failed, or `path` is a folder or a device; what was there before is there still.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"output: got {str(path)!r}, which is no plain file, expected a new or plain file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _typed_write_errors(path):
            yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_stale_tmp(parent: Path) -> None:
    """Clears what killed writers left in `parent`: half a folder goes, an old one without its successor returns."""
    for path in sorted(parent.glob(".*")):
        if re.fullmatch(r"\..+\.[a-z0-9_]{8}\.tmp", path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif match := re.fullmatch(r"\.(.+)\.old", path.name):
            folder = path.with_name(match[1])
            shutil.rmtree(path, ignore_errors=True) if folder.exists() else path.rename(folder)


@contextlib.contextmanager
def _typed_write_errors(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own, tokenizers as a bare Exception."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, SafetensorError) and type(error) is not Exception:
            raise
        raise OSError(f"output: got {str(path)!r}, which cannot be written: {error}") from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Writes JSON beside `path` and renames, so a reader never sees half a file."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, name: str) -> dict:
    """A JSON object.

    Raises:
        CheckpointError: `name` is in its message; no such file, no JSON, no object, or absurdly large or nested.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
        if len(content) > _LARGEST_JSON:
            raise ValueError(f"it has more than {_LARGEST_JSON} bytes")
        value = json.loads(content.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} and no object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: got {str(path)!r}, which cannot be read: {error}") from error
    return value


# ----------------------------------------------------------------------------------------------------------------------
# Models


@contextlib.contextmanager
def wrap_load_errors(source: str) -> Iterator[None]:
    """What Transformers, tokenizers and safetensors raise over a folder that is damaged or hostile, as CheckpointError.

    They raise whatever they stumble over (KeyError, AttributeError, a bare Exception), hence all but a lack of memory.
    """
    try:
        yield
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        short = source if len(source) < 1000 else source[:1000] + "…"
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"model: got {short!r}, which cannot be loaded: {reason[:2000]}") from error


def load_causal_lm(
    source: str,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, dict]:
    """A causal LM, its tokenizer and its recipe: `autoregembed.json` of a folder this library wrote, else {}.

    Raises:
        CheckpointError: the source cannot be loaded, or lacks weights that Transformers would then draw at random.
    """
    options = {"trust_remote_code": trust_remote_code, **({"gguf_file": gguf_file} if gguf_file else {})}
    weights: dict[str, Any] = {} if gguf_file else {"use_safetensors": True}  # never a pickle
    with wrap_load_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options, **weights
        )
    recipe = _read_recipe(Path(source) / RECIPE) if (Path(source) / RECIPE).is_file() else {}
    missing = sorted(info["missing_keys"])
    if missing and not gguf_file:
        raise CheckpointError(
            f"model: got {source!r}, which cannot be loaded: it has no {missing[0]} ({len(missing)} weights missing)"
        )
    if gguf_file:
        # Transformers marks such a model as quantised and refuses to save it.
        plain = type(model)._from_config(model.config, dtype=dtype)
        if hasattr(plain.config, "quantization_config"):
            del plain.config.quantization_config
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        model = plain
    return model, tokenizer, recipe


def _read_recipe(path: Path) -> dict:
    recipe = read_json(path, "model")
    ids, kinds = (
        recipe.get("compress_token_ids", []),
        {"decoder": str, "decoder_gguf_file": str, "output_rms_initialized": bool},
    )
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise CheckpointError(f"model: got compress_token_ids {ids!r} in {str(path)!r}, expected a list of ids")
    for name, kind in kinds.items():
        if not isinstance(recipe.get(name), kind | None):
            raise CheckpointError(
                f"model: got {name} {recipe[name]!r} in {str(path)!r}, expected a {kind.__name__} or nothing"
            )
    return recipe


def add_compress_tokens(model: Any, tokenizer, k: int) -> list[int]:
    """Makes room for K compress tokens behind the vocabulary; returns their ids.

    They are rows of the embedding matrix and no entries of the tokenizer, so no text can contain one. They start at the
    embedding of a blank, a tenth of the matrix' spread apart: what the model has read often leaves its activations
    calm, a random vector does not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 16
    if not 1 <= k < limit:
        raise ValueError(f"num_compress_tokens: got {k}, expected 1..{limit - 1}")
    used = max(tokenizer.get_vocab().values()) + 1
    ids = list(range(used, used + k))
    if ids[-1] >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        known = weight[:used].float()
        noise = torch.randn(k, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        blank = tokenizer(" ", add_special_tokens=False)["input_ids"]
        center = known[blank[0]] if blank else known.mean(0)
        weight[ids] = (center + 0.1 * known.std(0) * noise).to(weight.dtype)
    return ids


def save_model(folder: Path, model: Any, tokenizer, recipe: dict, *, overwrite: bool = True) -> Path:
    """Writes a Hugging Face folder with the recipe beside it, whole or not at all."""
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECIPE, recipe)
    return folder


def weights_fingerprint(*modules: nn.Module) -> str:
    """Hash of every parameter and persistent buffer, names and bytes."""
    return _tensor_hash(*(module.state_dict() for module in modules))


def _tensor_hash(*tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in (item for some in tensors for item in some.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Reference scores


def save_ref_logps(path: Path, positive: Tensor, negatives: Tensor, fingerprint: dict[str, str]) -> None:
    """r_a (R,) and r_c (R, M), NaN where a row has fewer negatives, with the identity of what they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {"positive": positive.contiguous(), "negatives": negatives.contiguous()}
    with atomic_file(path) as temporary:
        save_file(scores, temporary, metadata={**fingerprint, "checksum": _tensor_hash(scores)})


def load_ref_logps(path: Path, fingerprint: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Raises RefLogpsMismatch showing both fingerprints, CheckpointError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            checksum = found.pop("checksum", None)
            if found != fingerprint:
                raise RefLogpsMismatch(
                    f"ref_logps: got scores of {found} in {str(path)!r}, expected those of {fingerprint}; remove "
                    "the file to have them computed anew"
                )
            scores = {name: file.get_tensor(name) for name in ("positive", "negatives")}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"ref_logps: got a damaged file {str(path)!r}: {error}") from error
    if _tensor_hash(scores) != checksum:
        raise CheckpointError(f"ref_logps: got a damaged file {str(path)!r}: its scores have another checksum")
    return scores["positive"], scores["negatives"]


# ----------------------------------------------------------------------------------------------------------------------
# Training state


_STATE_FILES = ("trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def rng_state() -> dict[str, Tensor]:
    """The generators that a training step draws from, of this process. Python's and NumPy's are none of them."""
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
    """Trainable parameters, optimiser, RNG and step, as safetensors and JSON with a manifest of sizes and checksums.

    Where weights are sharded all processes call it; they are gathered, one by one, and process 0 writes.

    Args:
        folder: appears when it is whole and on the disk; named step-… for `latest_checkpoint` to find it.
        step: the last one done.
        extra: JSON that `load_checkpoint` returns.
        rng: `rng_state()` of every process, by rank; by default of this one.

    Raises:
        OSError: a write failed. CheckpointError: what is read back is not what was written.
    """
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    trainable = {n: distributed.to_full_tensor(p).cpu().contiguous() for n, p in trained.items()}
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{slot}"] = distributed.to_full_tensor(value.detach()).cpu().contiguous()
            else:
                scalars[f"{index}.{slot}"] = value
    if distributed.rank() > 0:
        return folder
    generators = {f"{i}.{n}": t for i, one in enumerate(rng or [rng_state()]) for n, t in one.items()}
    with atomic_folder(folder, overwrite=True) as temporary:
        save_file(trainable, temporary / "trainable.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(generators, temporary / "rng.safetensors")
        groups = [{k: v for k, v in g.items() if k != "foreach"} for g in state["param_groups"]]
        write_json(temporary / "state.json", {"step": step, "scalars": scalars, "param_groups": groups, **extra})
        files = {name: [(temporary / name).stat().st_size, _hash(temporary / name)] for name in _STATE_FILES}
        (temporary / "manifest.json").write_text(_manifest(files), encoding="utf-8")
    if reason := verify(folder):
        raise CheckpointError(f"output_dir: got {str(folder)!r} damaged right after it was written: {reason}")
    return folder


def _manifest(files: dict[str, list]) -> str:
    """{name: [bytes, xxh3_128]} and the checksum of that: one possible spelling, so that no bit of it is free."""
    body = json.dumps(files, sort_keys=True)
    return json.dumps({"files": files, "checksum": xxhash.xxh3_128_hexdigest(body.encode())}, sort_keys=True)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: every byte of it is covered, and nothing may be added."""
    try:
        if folder.is_symlink():
            return "it is a symbolic link"
        manifest = read_json(folder / "manifest.json", "manifest.json")
        files: Any = manifest.get("files")
        if (folder / "manifest.json").read_text(encoding="utf-8") != _manifest(files):
            return "manifest.json is damaged"
        # Exact names, so none can lead out of the folder.
        if sorted(files) != sorted(_STATE_FILES):
            return f"manifest.json names {sorted(files)}, expected {sorted(_STATE_FILES)}"
        odd = sorted({p.name for p in folder.iterdir()} ^ {*_STATE_FILES, "manifest.json"})
        if odd:
            return f"{odd[0]} is missing or does not belong there"
        for path in folder.iterdir():
            if path.is_symlink() or not path.is_file():
                return f"{path.name} is no plain file"
        for name, (size, checksum) in files.items():
            if (folder / name).stat().st_size != size or _hash(folder / name) != checksum:
                return f"{name} is damaged"
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def _states(folder: Path) -> list[Path]:
    """Training states, newest first, whole or not."""
    return sorted(folder.glob("step-*"), key=lambda p: p.name, reverse=True)


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `folder` that verifies, and what was skipped with the reason."""
    skipped: list[str] = []
    for state in _states(folder):
        reason = verify(state)
        if reason is None:
            return state, skipped
        skipped.append(f"{state.name}: {reason}")
    return None, skipped


def prune_checkpoints(newest: Path, keep: int) -> None:
    """Removes all states beside `newest`, which has been verified, but the `keep` - 1 before it."""
    known = _states(newest.parent)
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
    for name, value in (run or {}).items():
        if known.get(name, value) != value:
            raise CheckpointError(
                f"{name}: got {value!r}, expected {known[name]!r}, with which {str(folder)!r} was trained; "
                "another output_dir starts anew"
            )
    try:
        saved, tensors, generators = (load_file(folder / name) for name in _STATE_FILES[:3])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"resume_from_checkpoint: got {str(folder)!r}, which cannot be read: {error}") from error
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {n: tuple(p.shape) for n, p in trainable.items()}
    found = {n: tuple(t.shape) for n, t in saved.items()}
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
        for key, value in (*tensors.items(), *scalars.items()):
            index, slot = key.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
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
            f"resume_from_checkpoint: got {str(folder)!r} without what a state holds: {error!r}"
        ) from error
    if not good:
        raise CheckpointError(
            f"resume_from_checkpoint: got {str(folder)!r} with a step, optimiser or RNG of another kind of run"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(distributed.shard_like(saved[name], parameter))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, held in slots.items():
        for slot, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                held[slot] = distributed.shard_like(value, parameters[index])
    groups = [{**old, **new} for old, new in zip(optimizer.param_groups, groups, strict=True)]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    torch.set_rng_state(generators[f"{rank}.cpu"])
    if f"{rank}.cuda" in wanted_rng:
        torch.cuda.set_rng_state(generators[f"{rank}.cuda"])
    return state


def _same_kind(value: object, known: object) -> bool:
    if isinstance(known, list | tuple):
        return isinstance(value, list) and len(value) == len(known) and all(map(_same_kind, value, known))
    numbers = (int, float)
    return type(value) is type(known) or (type(value) in numbers and type(known) in numbers)
