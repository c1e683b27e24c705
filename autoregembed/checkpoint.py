"""Folders on disk: models that the next stage loads, and training states that a run resumes from.

Safetensors and JSON only. A folder appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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


class CheckpointError(RuntimeError):
    """A folder or file on disk is missing something, damaged, or of another model."""


class ReferenceMismatch(CheckpointError):
    """Reference scores on disk belong to other data, another model or another tokenizer."""


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `folder` when the block ends well, and is removed when it does not.

    Raises:
        FileExistsError: `folder` exists, is not empty, and `overwrite` is False.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: found {str(folder)!r} in use, allowed is a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _fsync(path)
        old = temporary.with_name(temporary.name + ".old")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Writes JSON beside `path` and renames, so a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _fsync(temporary)
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------------------
# Models


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
        path = Path(source) / RECIPE
        recipe = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"model: found {source!r}, which cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and not gguf_file:
        raise CheckpointError(
            f"model: found {source!r}, which cannot be loaded: it has no {missing[0]} ({len(missing)} weights missing)"
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


def add_compress_tokens(model: Any, tokenizer, k: int) -> list[int]:
    """Makes room for K compress tokens behind the vocabulary; returns their ids.

    They are rows of the embedding matrix and no entries of the tokenizer, so no text can contain one. They start at the
    embedding of a blank, a tenth of the matrix' spread apart: what the model has read often leaves its activations
    calm, a random vector does not.
    """
    if k < 1:
        raise ValueError(f"num_compress_tokens: found {k}, allowed is at least 1")
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
    digest = xxhash.xxh3_128()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------
# Reference scores


def save_reference(path: Path, positive: Tensor, negatives: Tensor, fingerprint: dict[str, str]) -> None:
    """r_a (R,) and r_c (R, M), NaN where a row has fewer negatives, with the identity of what they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"positive": positive, "negatives": negatives.contiguous()}, temporary, metadata=fingerprint)
    temporary.replace(path)


def load_reference(path: Path, fingerprint: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Raises ReferenceMismatch showing both fingerprints, CheckpointError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            if found != fingerprint:
                raise ReferenceMismatch(
                    f"reference: found scores of {found} in {str(path)!r}, allowed are those of {fingerprint}; remove "
                    "the file to have them computed anew"
                )
            return file.get_tensor("positive"), file.get_tensor("negatives")
    except SafetensorError as error:
        raise CheckpointError(f"reference: found a damaged file {str(path)!r}: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Training state


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: dict) -> Path:
    """Trainable parameters, optimiser, RNG and step of one process, as safetensors and JSON.

    Where weights are sharded all processes call it; they are gathered, one by one, and process 0 writes.
    """
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    trainable = {n: distributed.whole(p).cpu().contiguous() for n, p in trained.items()}
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, slots in state["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{slot}"] = distributed.whole(value.detach()).cpu().contiguous()
            else:
                scalars[f"{index}.{slot}"] = value
    if distributed.rank() > 0:
        return folder
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    with atomic_folder(folder, overwrite=True) as temporary:
        save_file(trainable, temporary / "trainable.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(rng, temporary / "rng.safetensors")
        groups = [{k: v for k, v in g.items() if k != "foreach"} for g in state["param_groups"]]
        write_json(temporary / "state.json", {"step": step, "scalars": scalars, "param_groups": groups, **extra})
        files = sorted(temporary.iterdir())
        write_json(temporary / "manifest.json", {p.name: [p.stat().st_size, _sha256(p)] for p in files})
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_old(file)


def _sha256_old(file) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def verify(folder: Path) -> str | None:
    """Why a training state cannot be trusted, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or _sha256(path) != checksum:
                return f"{name} is missing or damaged"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def newest_state(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest training state under `folder` that verifies, and what was skipped with the reason."""
    skipped: list[str] = []
    for state in sorted(folder.glob("step-*"), key=lambda p: p.name, reverse=True):
        reason = verify(state)
        if reason is None:
            return state, skipped
        skipped.append(f"{state.name}: {reason}")
    return None, skipped


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Restores what `save_state` wrote; returns its JSON, with "step".

    Raises:
        CheckpointError: parameters that differ in name or shape (another K, rank or model).
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    saved = load_file(folder / "trainable.safetensors")
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {n: tuple(p.shape) for n, p in trainable.items()}
    found = {n: tuple(t.shape) for n, t in saved.items()}
    if shapes != found:
        odd = sorted(n for n in shapes.keys() | found.keys() if shapes.get(n) != found.get(n))
        raise CheckpointError(
            f"resume: found {odd[0]} with shape {found.get(odd[0])} in {str(folder)!r}, allowed is "
            f"{shapes.get(odd[0])}; {len(odd)} parameters differ"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(distributed.part(saved[name], parameter))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict] = {}
    for key, value in (*load_file(folder / "optimizer.safetensors").items(), *state["scalars"].items()):
        index, slot = key.split(".", 1)
        like = parameters[int(index)]
        held = isinstance(value, Tensor) and value.shape == like.shape
        slots.setdefault(int(index), {})[slot] = distributed.part(value, like) if held else value
    groups = [{**old, **new} for old, new in zip(optimizer.param_groups, state["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    rng = load_file(folder / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    return state
