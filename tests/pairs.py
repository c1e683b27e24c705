"""The kernels' tests, in the interpreter and compiled for parts that are not here, on pairs of torch and Triton.

    python tests/pairs.py                      every pair of TORCH and TRITON: a nightly run
    python tests/pairs.py 2.13.0+3.9.0 ...     these pairs
    python tests/pairs.py 2.13.0 ...           these torch versions, each with every Triton

A package of another version than the installed one goes into build/pairs, without dependencies, and comes first on
the path. torch has to be a CPU build (its CUDA builds need gigabytes of packages): let pip's own variables name an
index that has them. Prints one line a pair; the exit status is the number of pairs that failed, also to install.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FOLDER = ROOT / "build" / "pairs"
TORCH = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
TRITON = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# Triton 3.6's interpreter fails with a newer NumPy on a range whose end is known at run time only.
BESIDE = {("triton", "3.6.0"): ("numpy==2.3.5",)}


def installed(package: str, version: str) -> bool:
    return importlib.metadata.version(package).split("+")[0] == version and (package, version) not in BESIDE


def provide(package: str, version: str) -> Path | None:
    """The folder that holds a version, or None for the installed one; raises CalledProcessError."""
    if installed(package, version):
        return None
    folder = FOLDER / f"{package}-{version}"
    if not (folder / "complete").exists():
        wanted = [f"{package}=={version}", *BESIDE.get((package, version), ())]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*pip, *wanted], check=True, capture_output=True, text=True)
        (folder / "complete").touch()
    return folder


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")[:200]


def run(torch: str, triton: str) -> tuple[bool, str]:
    """Whether a pair passes, and the last line of its tests."""
    try:
        folders = [provide("torch", torch), provide("triton", triton)]
    except subprocess.CalledProcessError as error:
        return False, f"not installed: {last_line(error.stderr)}"
    path = [*(str(folder) for folder in folders if folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    check = "import torch, triton; print(torch.__version__.split('+')[0], triton.__version__)"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", check], env=environment, capture_output=True, text=True
    )
    if found.stdout.split() != [torch, triton]:
        return False, f"does not start: {last_line(found.stdout + found.stderr)}"
    files = [f for f in sorted(TESTS.glob("test_triton_*.py")) if f.stem != "test_triton_compile"]
    files += [TESTS / name for name in ("compiled.py", "test_gpu.py", "test_segment_sum.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n  ".join([last_line(done.stdout + done.stderr), *failed])


def main() -> int:
    wanted = [argument.partition("+") for argument in sys.argv[1:] or TORCH]
    pairs = [(torch, b) for torch, _, triton in wanted for b in ([triton] if triton else TRITON)]
    failures = 0
    for torch, triton in pairs:
        begin = time.monotonic()
        passed, what = run(torch, triton)
        what = f"{time.monotonic() - begin:.0f} s  {what}"
        failures += not passed
        print(f"{'ok' if passed else 'FAILED':6} torch {torch} triton {triton}  {what}", flush=True)
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
