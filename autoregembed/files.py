"""Files that appear whole or not at all, JSON, and fingerprints of tensors.

Safetensors and JSON only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    folder = Path(folder).expanduser()
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: got {str(folder)!r} in use, expected a new or empty folder")
    with _named_os_errors("folder", str(folder)):
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


def require_writable_file(path: str | Path, name: str, size: int = 0) -> None:
    """Makes sure, before the work is done, that its result can be written to `path`; `name` is the argument.

    Args:
        size: bytes that will be written, where they are known.

    Raises:
        OSError: no such folder, `path` is no plain file, or the file system takes no file or not as many bytes.
    """
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise FileNotFoundError(f"{name}: got {str(path)!r}, expected a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{name}: got {str(path)!r}, which is no plain file, expected a new or plain file")
    _try_to_write(path.parent, name, str(path), size)


def require_writable_folder(
    folder: str | Path, name: str, *, folders: Sequence[str] = (), files: Sequence[str] = (), size: int = 0
) -> None:
    """Makes `folder` if it is missing, and makes sure that the named results can be written into it.

    Args:
        folders, files: what will be written there; what bears such a name must be of that kind.
        size: bytes that will be written, where they are known.

    Raises:
        OSError: what stands in the way.
    """
    folder = Path(folder)
    with _named_os_errors(name, str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    for entry in (*folders, *files):
        path, kind = folder / entry, "folder" if entry in folders else "file"
        if os.path.lexists(path) and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise FileExistsError(f"{name}: got {str(path)!r}, which is no {kind}, expected a {kind} or nothing there")
    _try_to_write(folder, name, str(folder), size)


def _try_to_write(folder: Path, name: str, shown: str, size: int) -> None:
    with _named_os_errors(name, shown), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))
        file.flush()
    disk = shutil.disk_usage(folder)
    if disk.total and size > disk.free:  # some network file systems say 0 of 0
        raise OSError(f"{name}: got {shown!r} with {disk.free / 1e9:.3f} GB free, expected {size / 1e9:.3f} GB")


@contextlib.contextmanager
def _named_os_errors(name: str, shown: str) -> Iterator[None]:
    """The argument stands before the system's reason, which may speak of a temporary file."""
    try:
        yield
    except OSError as error:
        taken = isinstance(error, FileExistsError)
        reason = f"{error.filename!r} is no folder" if taken else error.strerror or str(error)
        named = type(error)(f"{name}: got {shown!r}, which cannot be written: {reason}")
        named.errno = error.errno
        raise named from error


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
    inherited = path.stat().st_mode & stat.S_ISGID  # of a folder that a group shares
    path.chmod((0o777 | inherited if path.is_dir() else 0o666) & ~mask)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_text(value: object, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity.

    Raises:
        ValueError: `value` holds one of them.
    """
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: object) -> None:
    """Writes JSON beside `path` and renames it, so that a reader never sees half a file; errors of `json_text`."""
    with atomic_file(path) as temporary:
        temporary.write_text(json_text(value, indent=2) + "\n", encoding="utf-8")


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


def tensor_fingerprint(
    *tensors: dict[str, Tensor], pieces: Callable[[Tensor], Iterable[Tensor]] = lambda tensor: [tensor.detach().cpu()]
) -> str:
    """Hash of names, shapes, dtypes and bytes, in order; `pieces` gives the bytes of a tensor, on the CPU."""
    digest = xxhash.xxh3_128()
    for name, tensor in (item for some in tensors for item in some.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for part in _parts(tensor):
            for piece in pieces(part):
                digest.update(_bytes(piece))
    return digest.hexdigest()[:16]


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor consists of: itself, also where it is sharded, or the parts of a quantised one."""
    if hasattr(tensor, "full_tensor") or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def weights_fingerprint(*modules: nn.Module) -> str:
    """`tensor_fingerprint` of every parameter and persistent buffer."""
    return tensor_fingerprint(*(module.state_dict() for module in modules))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(
    path: Path, kinds: Mapping[str, tuple[torch.dtype, Sequence[int]]], pieces: Iterable[Tensor]
) -> None:
    """Writes a safetensors file piece by piece: no more than one piece need be in memory.

    Args:
        kinds: dtype and shape of each tensor, in the order in which they are written; sizes of elements do not grow.
        pieces: their rows, on the CPU, tensor after tensor.

    Raises:
        OSError: a write failed. ValueError: pieces of another size in all.

    Source: the format, github.com/huggingface/safetensors (8 bytes for the length of the header, JSON, the data).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, _named_os_errors("output", str(path)):
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(_bytes(piece))
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"pieces: got {file.tell() - 8 - len(text)} bytes for {str(path)!r}, expected {end}")


def file_fingerprint(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
