"""For mkdocs: lists the fields of a run and the commands on their pages, from the code that defines them."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any

from docstring_parser import parse

from autoregembed import cli
from autoregembed.config import Config
from autoregembed.train_flags import GROUPS, field_help

TITLES = {
    "data": "Data", "model": "Model", "objective": "Objective", "optimizer": "Optimizer", "run": "Run"
}  # fmt: skip


def cell(text: str) -> str:
    """Text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def shown(hint: str) -> str:
    """A type as a reader of YAML would put it."""
    hint = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace('"', "").replace("'", "").replace(", ", " | "), hint)
    names = {"str": "text", "bool": "true | false", "int": "integer", "float": "number", "None": "null"}
    hint = re.sub(r"list\[str\]", "list of texts", re.sub(r"dict\[str, str\]", "mapping", hint))
    return cell(" | ".join(names.get(part.strip(), part.strip()) for part in hint.split("|"))).replace(" \\| ", ", ")


def default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value not in ("", []) else "none"


def config_tables() -> str:
    """Markdown: every field of `Config` by group, with its default, its type and its meaning."""
    known, texts = {f.name: f for f in fields(Config)}, field_help()
    listed = [name for names in GROUPS.values() for name in names]
    groups = {**GROUPS, "other": tuple(name for name in known if name not in listed)}
    parts = []
    for group, names in groups.items():
        if not names:
            continue
        parts += [
            f"## {TITLES.get(group, group.capitalize())}",
            "",
            "| field | default | type | meaning |",
            "|---|---|---|---|",
        ]
        for name in names:
            field = known[name]
            value = field.default if field.default_factory is MISSING else field.default_factory()
            parts.append(f"| `{name}` | {default(value)} | {shown(str(field.type))} | {cell(texts[name])} |")
        parts.append("")
    return "\n".join(parts)


def commands() -> str:
    """Markdown: every command but `train`, with its arguments, their defaults and meanings."""
    parts = []
    for name, function in cli._functions().items():
        described = parse(function.__doc__ or "")
        meaning = {p.arg_name: p.description or "" for p in described.params}
        parameters = inspect.signature(function).parameters
        given = " ".join(n.upper() for n, p in parameters.items() if p.default is p.empty)
        parts += [f"## autoregembed {name}", "", f"`autoregembed {name}{' ' + given if given else ''}`", ""]
        parts += [cell(described.short_description or ""), ""]
        if not parameters:
            continue
        parts += ["| argument | default | meaning |", "|---|---|---|"]
        for n, p in parameters.items():
            required = p.default is p.empty
            flag = f"`{n.upper()}` or `--{n}`" if required else f"`--{n}`"
            text = meaning.get(n) or ("tiny sizes, to see that everything runs" if p.default is False else "")
            parts.append(f"| {flag} | {default(MISSING if required else p.default)} | {cell(text)} |")
        parts.append("")
    return "\n".join(parts)


TABLES = {"<!-- config -->": config_tables, "<!-- commands -->": commands}


def on_page_markdown(markdown: str, **_: Any) -> str:
    for marker, table in TABLES.items():
        if marker in markdown:
            markdown = markdown.replace(marker, table())
    return markdown
