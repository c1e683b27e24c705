"""Files that appear whole or not at all, JSON, and fingerprints of tensors.

Safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

MAX_JSON_BYTES = 1 << 26


class CheckpointError(RuntimeError):
    """A folder or file on disk is incomplete, damaged, or belongs to another model."""


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `folder` when the block succeeds and is removed when it fails.

    A killed process leaves either the old folder or the new one, and possibly a hidden sibling that
    `remove_stale_tmp` clears.

    Raises:
        FileExistsError: `folder` exists, is not empty, and `overwrite` is False.
        OSError: a write failed; the previous content is untouched.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: got {str(folder)!r} in use, expected a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    old = folder.with_name(f".{folder.name}.old")
    try:
        with _typed_write_errors(folder):
            yield temporary
        for path in (*sorted(temporary.rglob("*")), temporary):
            _follow_umask(path)
            _fsync(path)
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
    """Yields a temporary sibling that replaces `path` when the block succeeds and is removed when it fails.

    Raises:
        OSError: a write failed, or `path` is a folder or a device; the previous content is untouched.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"output: got {str(path)!r}, which is no plain file, expected a new or plain file")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _typed_write_errors(path):
            yield temporary
        _follow_umask(temporary)
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_writable(path: Path, name: str) -> None:
    """Makes sure, before a long computation, that `path` can be written after it; `name` is what errors name.

    Raises:
        OSError: its folder cannot be made or takes no file, or `path` is a folder or a device.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{name}: got {str(path)!r}, which is no plain file, expected a new or plain file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(
            f"{name}: got {str(path)!r}, which cannot be written ({error.strerror}), expected a file in a folder of "
            "your own"
        ) from error


def remove_stale_tmp(parent: Path) -> None:
    """Removes what killed writers left in `parent`, and restores a folder that was renamed but not yet replaced."""
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


def _follow_umask(path: Path) -> None:
    """Gives a path the mode of one that open() or mkdir() makes; mkdtemp and safetensors make private ones."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Writes JSON beside `path` and renames it, so that a reader never sees half a file."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, name: str) -> dict:
    """Reads a JSON object; `name` is the argument that errors name.

    Raises:
        CheckpointError: the file is missing, is not JSON, holds no object, or is absurdly large or deeply nested.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
        value = json.loads(content.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} and no object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: got {str(path)!r}, which cannot be read: {error}") from error
    return value


def tensor_fingerprint(*tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes, dtypes and bytes, in order."""
    digest = xxhash.xxh3_128()
    for name, tensor in (item for some in tensors for item in some.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def weights_fingerprint(*modules: nn.Module) -> str:
    """`tensor_fingerprint` of every parameter and persistent buffer."""
    return tensor_fingerprint(*(module.state_dict() for module in modules))


def file_fingerprint(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
