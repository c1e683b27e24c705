"""The texts that a command embeds: of a file of lines, of stdin, or of a file of rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path


def read_texts(source: str, column: str | None) -> list[str]:
    """The texts of a file of lines, of stdin ("-") or of a file of rows, none of them empty."""
    from autoregembed.cells import as_text, document_text, require_keys
    from autoregembed.tables import file_kind, read_rows

    placed: Iterable[tuple[str, str]]
    if file_kind(source) not in (None, ".txt"):  # of a text file every line counts
        rows = list(read_rows([source]))
        for place, row in rows:
            require_keys(row, [column or "text"], place)
        if column is None:
            placed = [(place, document_text(row, place)) for place, row in rows]
        else:
            placed = [(place, as_text(row[column], column, place)) for place, row in rows]
    else:
        if column is not None:
            raise ValueError(f"column: got {column!r} with {source!r}, expected None for a file that has no columns")
        if Path(source).suffix.lower() == ".gz":
            raise ValueError(f"texts: got {source!r}, expected text that is not compressed, or a file of rows")
        try:
            with sys.stdin if source == "-" else open(source, encoding="utf-8") as file:
                content = file.read().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(f"texts: got {source!r}, which cannot be read as UTF-8: {error}") from error
        lines = content.split("\n")
        placed = [(f"line {i}", line) for i, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1)]
    for place, text in placed:
        if not text.strip():
            raise ValueError(f"texts: got an empty text in {place}, expected at least one token")
    if not placed:
        raise ValueError(f"texts: got no line in {source!r}, expected at least one")
    return [text for _, text in placed]
