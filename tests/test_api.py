"""The public signatures: `public_api.txt` lists them, and a change of it is a decision (CONTRIBUTING.md, Versions).

python tests/test_api.py > tests/public_api.txt     # after an intended change
"""

import difflib
import importlib
import inspect
import re
from pathlib import Path

import autoregembed

SNAPSHOT = Path(__file__).with_name("public_api.txt")
# Beside the names of the package: what its documentation tells people to import.
ELSEWHERE = {
    "autoregembed.config": ("Config", "Stage2Options"),
    "autoregembed.ops": ("ImplUnavailable", "available_impls", "default_impl"),
    "autoregembed.integrations.distillation": None,
    "autoregembed.integrations.sentence_transformers": None,
    "autoregembed.integrations.transformers": None,
    "autoregembed.integrations.mteb": None,
}


def public(module) -> list[str]:
    """The public classes and functions that a module defines."""
    return sorted(
        name for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    )  # fmt: skip


def signature(function) -> str:
    """Alike on every Python, and without what a class inherits from torch or Python."""
    if inspect.isclass(function):
        owner = next(c for c in function.__mro__ if "__init__" in vars(c) or "__new__" in vars(c))
        if not owner.__module__.startswith("autoregembed"):
            return "()"
    return re.sub(r"ForwardRef\('(\w+)'[^)]*\)", r"'\1'", str(inspect.signature(function)))


def describe(name: str, value) -> list[str]:
    """A line for a function; for a class, a line more for every public method or property of its own."""
    if not inspect.isclass(value):
        return [f"{name}{signature(value)}" if callable(value) else name]
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    lines = [f"{name}{signature(value)}" + (f"  [{', '.join(bases)}]" if bases else "")]
    for key, member in sorted(vars(value).items()):
        if key.startswith("_") or inspect.isclass(member):
            continue
        if isinstance(member, classmethod | staticmethod):
            lines.append(f"{name}.{key}{signature(member.__func__)}  [{type(member).__name__}]")
        elif isinstance(member, property):
            lines.append(f"{name}.{key}  [property]")
        elif inspect.isfunction(member):
            lines.append(f"{name}.{key}{signature(member)}")
    return lines


def listing() -> str:
    names = [("autoregembed", name) for name in autoregembed.__all__ if not name.startswith("_")]
    for module, chosen in ELSEWHERE.items():
        names += [(module, name) for name in chosen or public(importlib.import_module(module))]
    lines = [x for m, n in names for x in describe(f"{m}.{n}", getattr(importlib.import_module(m), n))]
    return "\n".join(lines) + "\n"


def test_the_public_signatures_are_the_recorded_ones():
    found, recorded = listing(), SNAPSHOT.read_text(encoding="utf-8")
    changes = "\n".join(difflib.unified_diff(recorded.splitlines(), found.splitlines(), "recorded", "found", n=0))
    assert found == recorded, f"{changes}\nIf this is intended: python tests/test_api.py > tests/public_api.txt"


def test_every_public_name_is_documented():
    """By a docstring, and named on the API page of the site."""
    page = (Path(__file__).parents[1] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    for name in autoregembed.__all__:
        if name.startswith("_"):
            continue
        assert getattr(autoregembed, name).__doc__, name
        assert re.search(rf"(^::: .*\.|`){name}(`|$)", page, re.MULTILINE), f"{name} is not on it"


if __name__ == "__main__":
    print(listing(), end="")
