"""Rows to token ids, done once, and the batches of each step, a pure function of seed and step."""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from autoregembed.prompt import Prompt

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_DEEPEST = 64  # nested lists and objects of a row

Rows: TypeAlias = Dataset | IterableDataset


def load_rows(source: str, split: str | None = None, streaming: bool = False) -> Rows:
    """Loads a local jsonl, json, csv, tsv or parquet file (text formats may be gzipped), or a data set of the hub.

    Raises:
        FileNotFoundError: `source` looks like a file and there is none.
        ValueError: an empty data set, an unknown file type, or a file that cannot be parsed.
    """
    path = Path(source)
    suffixes = [s for s in path.suffixes[-2:] if s != ".gz"]
    builder = _BUILDERS.get(suffixes[-1].lower()) if suffixes else None
    if path.is_file():
        if builder is None:
            raise ValueError(f"data: got {source!r}, expected files ending in {', '.join(_BUILDERS)} (or .gz)")
        # "NA", "null" and "None" are ordinary texts.
        options: dict[str, Any] = {"keep_default_na": False} if builder == "csv" else {}
        if suffixes[-1].lower() == ".tsv":
            options["delimiter"] = "\t"
        try:
            if builder == "json" and not streaming:
                _require_readable(path)
            rows = load_dataset(builder, data_files=str(path), split="train", streaming=streaming, **options)
        except (DatasetGenerationError, ValueError, StopIteration, gzip.BadGzipFile, EOFError, zlib.error) as error:
            reason = error.__cause__ or error
            if isinstance(error, StopIteration) or "no data" in str(error):
                reason = ValueError("it has no rows")
            raise ValueError(f"data: got {source!r}, which cannot be read: {reason}") from error
    elif builder is not None:
        raise FileNotFoundError(f"data: got {source!r}, which does not exist, expected a file")
    else:
        rows = load_dataset(source, split=split or "train", streaming=streaming)
    if not streaming and len(rows) == 0:
        raise ValueError(f"data: got no rows in {source!r}, expected at least one")
    return rows


def _require_readable(path: Path) -> None:
    """Refuses what Arrow's JSON reader misses: bytes that are not UTF-8, and nesting that overflows its stack."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            if line.count(b"[") + line.count(b"{") > _DEEPEST:
                bare = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line, flags=re.DOTALL), dtype=np.uint8)
                opening, closing = np.isin(bare, list(b"[{")), np.isin(bare, list(b"]}"))
                if (opening.cumsum() - closing.cumsum()).max() > _DEEPEST:
                    raise ValueError(f"line {number} is nested more than {_DEEPEST} deep")


def _columns(rows: Rows) -> list[str]:
    if rows.column_names is not None:
        return rows.column_names
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("data: got no rows in the stream, expected at least one")
    return list(first)


def require_columns(rows: Rows, *alternatives: tuple[str, ...]) -> tuple[str, ...]:
    """The first of several sets of column names that `rows` has.

    Raises:
        ValueError: it has none of them; the missing columns of the first set are named.
    """
    columns = _columns(rows)
    for names in alternatives:
        if set(names) <= set(columns):
            return names
    wanted = " or ".join("{" + ", ".join(names) + "}" for names in alternatives)
    missing = sorted(set(alternatives[0]) - set(columns))
    raise ValueError(f"data: got columns {sorted(columns)}, expected {wanted}; missing {missing}")


def _nonempty(ids: list, column: str, row: int) -> list:
    if not ids:
        raise ValueError(f"data: got an empty {column!r} in row {row}, expected at least one token")
    return ids


def _text(value: Any, column: str, row: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"data: got {value!r} as {column!r} in row {row}, expected a string")
    return value


def _texts(value: Any, column: str, row: int) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"data: got {value!r} as {column!r} in row {row}, expected a string or a list of strings")
    return values


def _instruction(batch: dict, i: int, row: int) -> str | None:
    value = batch["instruction"][i] if "instruction" in batch else None
    return value if value is None else _text(value, "instruction", row)


def _map(rows: Rows, function: Callable, prompt: Prompt, version: str, num_proc: int | None) -> Rows:
    options = {"batched": True, "with_indices": True, "remove_columns": _columns(rows)}
    if isinstance(rows, IterableDataset):
        return rows.map(function, **options)
    # Our own fingerprint: that of the function's closure would change with the tokenizer's state.
    fingerprint = hashlib.sha256(f"{rows._fingerprint}|{prompt.fingerprint()}|{version}".encode()).hexdigest()[:16]
    num_proc = num_proc if num_proc and num_proc > 1 and len(rows) >= 1000 * num_proc else None
    try:
        return rows.map(function, **options, num_proc=num_proc, new_fingerprint=fingerprint, desc="tokenize")
    except UnicodeDecodeError as error:  # of a parquet file
        raise ValueError(f"data: got a text that is no UTF-8, expected UTF-8 texts: {error}") from error


def compression_rows(rows: Rows, prompt: Prompt, *, num_proc: int | None = None) -> Rows:
    """Stage 1: {context, output, instruction?} to {text_ids, suffix_ids, target_ids}, truncated.

    A column {text} stands for both: the text is written from its own embedding.
    """
    names = require_columns(rows, ("context", "output"), ("text",))
    source, output_of = names[0], names[-1]

    def tokenize(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {"text_ids": [], "suffix_ids": [], "target_ids": []}
        for i, row in enumerate(indices):
            suffix = prompt.suffix(_instruction(batch, i, row))
            context = _nonempty(prompt.ids(_text(batch[source][i], source, row)), source, row)
            output = _nonempty(prompt.ids(_text(batch[output_of][i], output_of, row)), output_of, row)
            out["text_ids"].append(prompt.text(context, suffix, row))
            out["suffix_ids"].append(suffix)
            out["target_ids"].append(output[: prompt.max_target_length])
        return out

    return _map(rows, tokenize, prompt, "compression-1", num_proc)


def is_unpaired(rows: Rows) -> bool:
    """Whether rows are texts alone."""
    return "text" in _columns(rows) and not {"pos", "positive"} & set(_columns(rows))


def text_rows(rows: Rows, prompt: Prompt, *, num_proc: int | None = None) -> Rows:
    """Stage 2 without pairs: {text, instruction?} to {query_ids, suffix_ids, target_ids}; the target is the text."""
    require_columns(rows, ("text",))

    def tokenize(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {"query_ids": [], "suffix_ids": [], "target_ids": []}
        for i, row in enumerate(indices):
            suffix = prompt.suffix(_instruction(batch, i, row))
            ids = _nonempty(prompt.ids(_text(batch["text"][i], "text", row)), "text", row)
            out["query_ids"].append(prompt.text(ids, suffix, row))
            out["suffix_ids"].append(suffix)
            out["target_ids"].append([ids[: prompt.max_target_length]])
        return out

    return _map(rows, tokenize, prompt, "text-1", num_proc)


def alignment_rows(rows: Rows, prompt: Prompt, *, num_proc: int | None = None) -> Rows:
    """Stage 2: one row per (query, positive) to {query_ids, positive_ids, negative_ids, suffix_ids, target_ids}.

    `target_ids` is [positive, *negatives] as the decoder scores them; the others are as the encoder reads them.
    Columns: {query, pos, neg} with strings or lists (BGE; several positives make several rows), MEDI's
    [instruction, text] pairs, or {anchor, positive, negative}. Negatives and an `instruction` column are optional.
    """
    names = require_columns(rows, ("query", "pos"), ("anchor", "positive"))
    negative = {"pos": "neg", "positive": "negative"}[names[1]]

    def tokenize(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {
            "query_ids": [],
            "positive_ids": [],
            "negative_ids": [],
            "suffix_ids": [],
            "target_ids": [],
        }
        for i, row in enumerate(indices):
            query, positives = batch[names[0]][i], batch[names[1]][i]
            negatives = batch[negative][i] if negative in batch and batch[negative][i] is not None else []
            instruction = _instruction(batch, i, row)
            if isinstance(query, list):  # MEDI: every text is an [instruction, text] pair
                for column, pair in ((names[0], query), (names[1], positives), (negative, negatives)):
                    if not isinstance(pair, list) or (len(pair) != 2 and (pair or column != negative)):
                        raise ValueError(
                            f"data: got {pair!r} as {column!r} in row {row}, expected an [instruction, text] pair, "
                            f"since {names[0]!r} is a list"
                        )
                instruction, query = _texts(query, names[0], row)
                positives, negatives = positives[1:], negatives[1:]
            suffix = prompt.suffix(instruction)
            query_ids = _nonempty(prompt.ids(_text(query, names[0], row)), names[0], row)
            negative_ids = [_nonempty(prompt.ids(t), negative, row) for t in _texts(negatives, negative, row)]
            for positive in _nonempty(_texts(positives, names[1], row), names[1], row):
                positive_ids = _nonempty(prompt.ids(positive), names[1], row)
                out["query_ids"].append(prompt.text(query_ids, suffix, row))
                out["positive_ids"].append(prompt.text(positive_ids, suffix, row))
                out["negative_ids"].append([prompt.text(t, suffix, row) for t in negative_ids])
                out["suffix_ids"].append(suffix)
                out["target_ids"].append([t[: prompt.max_target_length] for t in (positive_ids, *negative_ids)])
        return out

    return _map(rows, tokenize, prompt, "alignment-1", num_proc)


def content_fingerprint(rows: Dataset) -> str:
    """Hash of every id in the tokenized rows, in order: the data that reference scores and checkpoints belong to."""
    digest = xxhash.xxh3_128()
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        for column in sorted(batch.column_names):
            values = batch[column].combine_chunks()
            digest.update(column.encode())
            while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                digest.update(pc.list_value_length(values).to_numpy(zero_copy_only=False))
                values = values.flatten()
            digest.update(values.to_numpy(zero_copy_only=False))
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------


def batches(
    rows: Rows,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    in_blocks: bool = False,
) -> Iterator[list[dict]]:
    """Endless batches of `batch_size` rows for this rank, from optimiser step `start` on.

    A map-style data set is permuted anew every epoch (by seed and epoch) and read without a break between epochs, so
    the rows of a step depend on the seed and the step alone. Each row carries its index as "row".

    in_blocks: rows that were together once stay together (`blocks`), and each row carries the index of its block as
        "block" and its place there as "place"; an epoch draws blocks in place of rows.
    """
    if isinstance(rows, IterableDataset):
        yield from _streamed(rows, batch_size, seed=seed, start=start, rank=rank, world=world)
        return
    together = blocks(len(rows), batch_size, seed) if in_blocks else []
    for step in itertools.count(start):
        if in_blocks:
            (block,) = drawn(len(together), step * world + rank, 1, seed)
            found = zip(rows.select(together[block]).to_list(), together[block], strict=True)
            yield [{**row, "row": i, "block": block, "place": place} for place, (row, i) in enumerate(found)]
            continue
        first = (step * world + rank) * batch_size
        indices = drawn(len(rows), first, batch_size, seed)
        yield [{**row, "row": i} for row, i in zip(rows.select(indices).to_list(), indices, strict=True)]


def blocks(n: int, size: int, seed: int) -> list[list[int]]:
    """n rows cut into blocks of `size` rows; n % size rows are in none."""
    order = permutation(n, seed, 0)
    return [order[i : i + size] for i in range(0, n - size + 1, size)]


def drawn(n: int, first: int, count: int, seed: int) -> list[int]:
    """Indices, of n rows, of the `count` rows that training reads from its `first`-th on."""
    return [permutation(n, seed, place // n)[place % n] for place in range(first, first + count)]


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def _streamed(
    rows: IterableDataset, batch_size: int, *, seed: int, start: int, rank: int, world: int
) -> Iterator[list[dict]]:
    epoch, skip = 0, start * world * batch_size + rank * batch_size
    batch: list[dict] = []
    place = 0
    while True:
        shuffled = rows.shuffle(seed=seed + epoch, buffer_size=10_000)
        found = False
        for row in shuffled:
            found = True
            mine = place >= skip and (place // batch_size - rank) % world == 0
            place += 1
            if mine:
                batch.append({**row, "row": place - 1})
                if len(batch) == batch_size:
                    yield batch
                    batch = []
        if not found:
            raise ValueError("data: got no rows in the stream, expected at least one")
        epoch += 1
