"""Which backend runs an op.

`impl` names a backend: "triton" (GPU), "cpp" (C++, CPU), "torch" (any device), "reference" (the specification, with
full logits), or "auto". A backend that is asked for by name and cannot run raises `ImplUnavailable`; it is never
replaced by another.

The Triton backend never waits for the device, so it reads neither targets nor `cu_seqlens` on the host. Where the other
backends raise IndexError or ValueError, it gives NaN in the rows or sequences concerned.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from autoregembed._version import __version__
from autoregembed.kernels.native import linear_logprob as native

# The folder of kernels/ that holds a backend's kernels, one module an op.
_FOLDERS = {"triton": "triton", "cpp": "native", "torch": "torch"}

# Read once: torch.compile traces through the choice of a backend, and Triton reads its variable once as well.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class ImplUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def _state_of_native() -> str:
    """ "ok", or why the native module cannot be used."""
    if native.extension is None:
        report = Path(__file__).parents[1] / "_native.txt"  # left by setup.py when a build failed
        if report.is_file():
            return report.read_text(encoding="utf-8").strip()
        if "_native" in native.import_error:
            return "not built: it needs CMake, a C++17 compiler and AUTOREGEMBED_NATIVE other than 0 at installation"
        return f"does not load: {native.import_error}"
    found = getattr(native.extension, "__version__", "without a version")
    return "ok" if found == __version__ else f"is version {found} in a package of version {__version__}; install again"


_NATIVE = _state_of_native()


def _state_of_triton(device: torch.device) -> str:
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no such device"
        if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
            return "needs compute capability 8.0 or newer"
        return "ok"
    if device.type != "cpu":
        return f"runs on CUDA and HIP devices, got {device}"
    if not _INTERPRETED:
        return "runs on CUDA and HIP devices; on a CPU in Triton's interpreter, with TRITON_INTERPRET=1 from the start"
    return "ok"


def available_impls(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Every backend by name, with "ok" or the reason why it cannot run for `dtype` on `device`.

    impl="auto" takes the first that is "ok", but never Triton's interpreter.
    """
    device = torch.device(device)
    cpp = _NATIVE
    if device.type != "cpu":
        cpp = f"runs on a CPU, got {device}"
    elif cpp == "ok" and dtype == torch.float64:
        cpp = "has no float64"
    return {"triton": _state_of_triton(device), "cpp": cpp, "torch": "ok", "reference": "ok"}


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype, kernels: tuple[str, ...]) -> str:
    """The backend that runs an op which has kernels for the backends `kernels`; every op has its "reference"."""
    states = {
        name: "this op has no such kernel" if state == "ok" and name not in (*kernels, "reference") else state
        for name, state in available_impls(device, dtype).items()
    }
    if impl == "auto":
        interpreted = "triton" if device.type == "cpu" else ""
        return next(name for name, state in states.items() if state == "ok" and name != interpreted)
    if impl not in states:
        raise ValueError(f"impl: got {impl!r}, expected 'auto', {', '.join(map(repr, states))}")
    if states[impl] != "ok":
        raise ImplUnavailable(f"impl={impl!r} cannot run on {device}: {states[impl]}")
    return impl


def default_impl(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that impl="auto" selects in `linear_logprob`, the op that has a kernel for every backend."""
    return resolve_impl("auto", torch.device(device), dtype, tuple(_FOLDERS))


def load_kernel(impl: str, op: str) -> Any:
    """The module of an op's kernels, kernels/<backend>/<op>.py; imported when first used."""
    return importlib.import_module(f"autoregembed.kernels.{_FOLDERS[impl]}.{op}")
