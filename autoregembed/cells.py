"""Cells of rows that people wrote: each is what its column needs, or is refused by place and name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def as_text(value: Any, column: str, place: str) -> str:
    """`value`, a string; numbers, null and lists are none."""
    if not isinstance(value, str):
        raise TypeError(f"data: got {value!r} as {column!r} in {place}, expected a string")
    return value


def as_id(value: Any, column: str, place: str) -> str:
    """An id as a string; JSON may hold it as an integer."""
    if type(value) not in (str, int) or value == "":
        raise TypeError(f"data: got {value!r} as {column!r} in {place}, expected a string or an integer")
    return str(value)


def as_number(value: Any, column: str, place: str) -> float:
    """A finite number; csv and tsv hold it as text."""
    plain = type(value) in (int, float) or (isinstance(value, str) and _NUMBER.fullmatch(value.strip()))
    try:
        number = float(value) if plain else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"data: got {value!r} as {column!r} in {place}, expected a number")
    return number


def require_text(text: str, column: str, place: str) -> str:
    """`text`, which must hold more than white space."""
    if not text.strip():
        raise ValueError(f"data: got an empty {column!r} in {place}, expected a text")
    return text


def require_keys(row: Row, names: Sequence[str], place: str) -> None:
    """Raises ValueError where a row lacks one of these columns."""
    missing = [name for name in names if name not in row]
    if missing:
        wanted = ", ".join(names)
        raise ValueError(f"data: got columns {sorted(row)} in {place}, expected {{{wanted}}}; missing {missing}")


def document_text(row: Row, place: str) -> str:
    """The text of a BEIR document: its title, where it has one, stands before it."""
    require_keys(row, ("text",), place)
    title = as_text("" if row.get("title") is None else row["title"], "title", place)
    return " ".join(part for part in (title, as_text(row["text"], "text", place)) if part)
