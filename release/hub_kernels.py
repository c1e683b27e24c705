"""Writes the Triton kernels as a folder in the format of Hugging Face's `kernels` package: `make hub-kernels`.

The folder holds the project as kernel-builder reads it (`build.toml`, `torch-ext/`, `CARD.md`) and its build variants
(`build/torch-<backend>/`), which `kernels.get_local_kernel` and `kernels.get_kernel` load. Such a package lies at any
path under any name, so its imports are relative, and it registers no op in torch's global namespace.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "autoregembed"
MAJOR = 1  # of the public functions in hub/__init__.py; the hub serves it as the branch v1
BACKENDS = ("cuda", "rocm")
BUILD_TOML = """\
[general]
edition = 5
name = "{name}"
version = {major}
license = "apache-2.0"
backends = [{backends}]

[torch-noarch]
"""


def relative(source: str) -> str:
    """A kernel's source with relative imports; `_torch`, since a subpackage `torch` would stand for torch itself."""
    return re.sub(r"from autoregembed\.kernels\.(\w+(?:\.\w+)*) import", r"from .._\1 import", source)


def package() -> dict[str, str]:
    """The package's files by their place in it; _torch/ is there for what the Triton kernels import of it."""
    files = {"__init__.py": (ROOT / "release" / "hub" / "__init__.py").read_text(encoding="utf-8")}
    todo = [f"triton/{p.name}" for p in sorted((ROOT / "kernels" / "triton").glob("*.py"))]
    while todo:
        place = todo.pop()
        source = (ROOT / "kernels" / place).read_text(encoding="utf-8")
        files[f"_{place}"] = relative(source)
        for folder, module in re.findall(r"from autoregembed\.kernels\.(\w+)\.(\w+) import", source):
            if f"{folder}/{module}.py" not in {*todo} and f"_{folder}/{module}.py" not in files:
                todo.append(f"{folder}/{module}.py")
    for folder in {place.split("/")[0] for place in files if "/" in place}:
        files[f"{folder}/__init__.py"] = ""
    for place, source in files.items():
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == NAME for name in names):
                raise ValueError(f"{place}: got an import of {names}, expected kernels that import no other package")
    return files


def write(folder: Path) -> None:
    """Writes the folder, in place of an earlier one."""
    if folder.exists() and not (folder / "build.toml").is_file():
        raise FileExistsError(f"folder: got {str(folder)!r}, which holds something else, expected a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    files = package()
    digest = hashlib.sha256("".join(f"{k}\0{v}\0" for k, v in sorted(files.items())).encode()).hexdigest()[:12]
    places = {f"torch-ext/{NAME}/{place}": source for place, source in files.items()}
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        places |= {f"{variant}/{place}": source for place, source in files.items()}
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{digest}",
            "version": MAJOR,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        places[f"{variant}/metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    quoted = ", ".join(f'"{b}"' for b in BACKENDS)
    places["build.toml"] = BUILD_TOML.format(name=NAME, major=MAJOR, backends=quoted)
    places["CARD.md"] = (ROOT / "release" / "hub" / "CARD.md").read_text(encoding="utf-8")
    places["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for place, text in places.items():
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "hub-kernels")
    target = parser.parse_args().folder
    write(target)
    print(f"kernels.get_local_kernel(Path({str(target)!r})) loads it")
