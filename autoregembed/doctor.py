"""What is installed, which backends run here, and why the others do not. Needs torch alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re

import torch

from autoregembed import ops
from autoregembed.kernels.native import linear_logprob as native_linear_logprob

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "sentence-transformers", "triton", "flash-attn",
            "gguf")  # fmt: skip


def installed(distribution: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_line(extra: str = "train") -> str:
    """The pip command for what is missing of an extra; "" where nothing is."""
    try:
        requirements = importlib.metadata.requires("autoregembed") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return f'pip install -e ".[{extra}]"'
    wanted = [r.split(";")[0].strip() for r in requirements if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", r)]
    missing = [r for r in wanted if installed(re.split(r"[\[<>=!~ ]", r)[0]) is None]
    return " ".join(["pip install", *(f'"{r}"' for r in missing)]) if missing else ""


def facts() -> list[tuple[str, str]]:
    """(part, state) of this machine."""
    found = [("python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")]
    found += [(name, installed(name) or "not installed") for name in PACKAGES]
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        name = torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} threads"
        found += [(f"device {device}", name), ("  impl=auto", ops.default_impl(device))]
        for impl, state in ops.available_impls(device).items():
            detail = native_linear_logprob.describe() if (impl, state) == ("cpp", "ok") else ""
            found.append((f"  impl={impl}", state + detail))
        if importlib.util.find_spec("transformers") is None:
            continue
        from autoregembed.attention import attention_backends

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        for backend, state in attention_backends(torch.device(device), dtype).items():
            found.append((f"  attention={backend} ({str(dtype)[6:]})", state))
    return found


def report() -> str:
    """The table that `autoregembed doctor` prints."""
    from autoregembed import __version__

    rows = facts()
    width = max(len(part) for part, _ in rows)
    lines = [f"autoregembed {__version__}", *(f"  {part:<{width}}  {state}" for part, state in rows)]
    if install_line():
        lines += ["", "Every command but this one needs more packages:", f"  {install_line()}"]
    return "\n".join(lines)
