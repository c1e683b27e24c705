"""Rows to token ids, done once."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, IterableDataset, List, Value

from autoregembed.cells import Row, as_text, require_keys, require_text
from autoregembed.config import Config, Stage2Options
from autoregembed.prompt import Prompt
from autoregembed.tables import Rows, Table, load_rows, read_rows

__all__ = [
    "Rows", "alignment_rows", "check_first_row", "check_negatives", "compression_rows", "content_fingerprint",
    "is_unpaired", "load_rows", "text_pairs", "text_rows", "training_rows",
]  # fmt: skip

Columns = Mapping[str, str]  # a name that this library reads -> the column of the data

_IDS = List(Value("int64"))
_COMPRESSION = Features(dict.fromkeys(("text_ids", "suffix_ids", "target_ids"), _IDS))
_TEXT = Features({"query_ids": _IDS, "suffix_ids": _IDS, "target_ids": List(_IDS)})
_ALIGNMENT = Features(
    {
        **dict.fromkeys(("query_ids", "positive_ids", "suffix_ids"), _IDS),
        **{name: List(_IDS) for name in ("negative_ids", "passage_suffix_ids", "target_ids")},
    }
)


# ----------------------------------------------------------------------------------------------------------------------
# What a row says

_QUERY, _POSITIVE = ("query", "anchor"), ("pos", "positive")
_NEGATIVE = re.compile(r"(?:hard_?)?neg(?:ative)?s?(?:_?(\d+))?")  # neg, negative_1, neg2, hard_negative_3
_STAGE_1, _STAGE_2 = ("context", "output", "instruction"), (*_QUERY, *_POSITIVE, "instruction", "prompt")
_ALONE = ("text", "instruction")  # of either stage: a text that is written from its own embedding

# What says where a row comes from, and scores of teachers: training without them is training on the same texts.
_PROVENANCE = re.compile(
    r"(?:.*[_-])?(?:ids?|idx|index|split|url|source|lang|language|licen[cs]e|date|timestamp)|.+_scores?|[qpd]id|docid"
    r"|uuid|guid|origin|dataset(?:_name)?|subset|domain|category|topic|task(?:_name|_type)?|type|meta(?:data)?"
    r"|__index_level_\d+__|Unnamed: \d+|"
)
_LABELS = ("label", "labels", "score", "scores")  # a pair with a label of 0 is no positive


class _Text(NamedTuple):
    instruction: str | None  # its own, None where it has none
    text: str


class _Triplet(NamedTuple):
    query: _Text
    prompt: str | None  # the row's own, before the query
    positives: list[_Text]
    negatives: list[_Text]


def _map_columns(row: Row, columns: Columns, place: str) -> Row:
    missing = sorted({c for c in columns.values() if c not in row})
    if missing:
        raise ValueError(
            f"data: got columns {sorted(row)} in {place}, expected {missing} too, as `columns` says; null where a row "
            "has none"
        )
    taken = set(columns.values())
    rest = {name: value for name, value in row.items() if name not in taken}
    return {**rest, **{name: row[column] for name, column in columns.items()}}


def _bears_text(value: Any) -> bool:
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return any(c.isalpha() for c in value) and value.lower() not in ("true", "false")
        return False
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(map(_bears_text, value))


def _require_known(row: Row, known: tuple[str, ...], place: str) -> None:
    """Refuses columns that hold data and that nothing reads; those of the other stage may stand beside them."""
    unknown = [
        name
        for name, value in row.items()
        if name not in {*_STAGE_1, *_STAGE_2} | ({"text"} & set(known))
        and not _NEGATIVE.fullmatch(name)
        and not _PROVENANCE.fullmatch(name)
        and (value is not None if name in _LABELS else _bears_text(value))
    ]
    if "prompt" in row and "prompt" not in known and row["prompt"] is not None:
        unknown.append("prompt")
    if unknown:
        raise ValueError(
            f"data: got the unknown columns {unknown} in {place}, expected {', '.join(known)}; map them with the "
            f"option columns ({known[0]}={unknown[0]}), or ignore them: with that option ({known[0]}={known[0]}), "
            "unknown columns are not read"
        )


def _one_of(row: Row, names: tuple[str, ...], place: str) -> str:
    found = [name for name in names if row.get(name) is not None] or [name for name in names if name in row]
    if len(found) > 1:
        raise ValueError(f"data: got the columns {found} in {place}, expected one of them")
    if not found:
        wanted = f"{{{_QUERY[0]}, {_POSITIVE[0]}}} or {{{_QUERY[1]}, {_POSITIVE[1]}}}, or others by the option columns"
        raise ValueError(f"data: got columns {sorted(row)} in {place}, expected {wanted}; missing {[names[0]]}")
    return found[0]


def _texts(value: Any, column: str, place: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"data: got {value!r} as {column!r} in {place}, expected a string or a list of strings")
    return values


def _pair(value: Any, column: str, place: str, query: str) -> _Text:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(
            f"data: got {value!r} as {column!r} in {place}, expected an [instruction, text] pair, since {query!r} is "
            "a list"
        )
    return _Text(*_texts(value, column, place))


def _optional(row: Row, column: str, place: str) -> str | None:
    value = row.get(column)
    return None if value is None else as_text(value, column, place)


def _compression_texts(row: Row, columns: Columns | None, place: str) -> tuple[str, str, str | None]:
    """context, output, instruction."""
    row = _map_columns(row, columns or {}, place)
    if _is_alone(row):
        text, instruction = _single_text(row, columns, place)
        return text, text, instruction
    require_keys(row, _STAGE_1[:2], place)
    if columns is None:
        _require_known(row, _STAGE_1, place)
    context, output = (as_text(row[name], name, place) for name in _STAGE_1[:2])
    return context, output, _optional(row, "instruction", place)


def _is_alone(row: Row) -> bool:
    """Whether a row is a text and nothing that it goes with."""
    return "text" in row and not {*_STAGE_1[:2], *_QUERY, *_POSITIVE} & set(row)


def _single_text(row: Row, columns: Columns | None, place: str) -> tuple[str, str | None]:
    """text, instruction of a row that `_map_columns` has named."""
    if columns is None:
        _require_known(row, _ALONE, place)
    return as_text(row["text"], "text", place), _optional(row, "instruction", place)


def _alignment_texts(row: Row, columns: Columns | None, place: str) -> _Triplet:
    row = _map_columns(row, columns or {}, place)
    query, positive = (_one_of(row, names, place) for names in (_QUERY, _POSITIVE))
    if columns is None:
        _require_known(row, (query, positive, "neg", "negative_1 …", "instruction", "prompt"), place)
    matches = sorted((int(m[1] or 0), m[0]) for m in map(_NEGATIVE.fullmatch, row) if m)
    # A csv has no null: there an empty cell is what a row with fewer negatives has.
    negatives = {name: row[name] for _, name in matches if row[name] is not None and row[name] != ""}
    instruction, prompt = (_optional(row, name, place) for name in ("instruction", "prompt"))
    if isinstance(row[query], list):  # MEDI: every text is an [instruction, text] pair
        return _Triplet(
            _pair(row[query], query, place, query),
            prompt,
            [_pair(row[positive], positive, place, query)],
            [_pair(value, name, place, query) for name, value in negatives.items() if value != []],
        )
    return _Triplet(
        _Text(instruction, as_text(row[query], query, place)),
        prompt,
        [_Text(instruction, text) for text in _nonempty(_texts(row[positive], positive, place), positive, place)],
        [_Text(instruction, text) for name, value in negatives.items() for text in _texts(value, name, place)],
    )


# ----------------------------------------------------------------------------------------------------------------------
# Rows to ids

_LOOKED_AT = 1000  # rows of a stream, of which nobody knows how many there are


def _nonempty(ids: list, column: str, place: str) -> list:
    if not ids:
        raise ValueError(f"data: got an empty {column!r} in {place}, expected at least one token")
    return ids


def _first(rows: Rows) -> tuple[Row, str]:
    item = next(iter(rows.carrier if isinstance(rows, Table) else rows), None)
    if item is None:
        raise ValueError("data: got no rows in the stream, expected at least one")
    return (json.loads(item["row"]), f"row 0 ({item['place']})") if isinstance(rows, Table) else (item, "row 0")


def check_first_row(rows: Rows, stage: int, columns: Columns | None = None) -> None:
    """Raises what `compression_rows` (stage 1) or `alignment_rows` would of the first row, without a tokenizer."""
    names = (*(_STAGE_1 if stage == 1 else _STAGE_2), "text")
    unknown = [n for n in columns or {} if n not in names and not (stage == 2 and _NEGATIVE.fullmatch(n))]
    if unknown:
        more = "" if stage == 1 else ", neg, negative_1 …"
        raise ValueError(f"columns: got {unknown[0]!r}, expected {', '.join(names)}{more}")
    row, place = _first(rows)
    if stage == 2 and _is_alone(_map_columns(row, columns or {}, place)):
        _single_text(_map_columns(row, columns or {}, place), columns, place)
    else:
        (_compression_texts if stage == 1 else _alignment_texts)(row, columns, place)


def training_rows(rows: Rows, config: Config, prompt: Prompt) -> Dataset | IterableDataset:
    """Token ids of a run's data: texts, pairs or triplets, as its stage and its columns say."""
    tokenize = compression_rows if config.stage == 1 else alignment_rows
    if config.stage == 2 and is_unpaired(rows, config.column_map):
        tokenize = text_rows
    return tokenize(rows, prompt, columns=config.column_map, num_proc=config.num_proc)


def is_unpaired(rows: Rows, columns: Columns | None = None) -> bool:
    """Whether the first row is a text alone."""
    row, place = _first(rows)
    return _is_alone(_map_columns(row, columns or {}, place))


def _map(
    rows: Rows, convert: Callable[[Row, str], list[Row]], features: Features, prompt: Prompt, version: str,
    columns: Columns | None, num_proc: int | None,
) -> Dataset | IterableDataset:  # fmt: skip
    table = isinstance(rows, Table)
    source = rows.carrier if isinstance(rows, Table) else rows

    def run(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in features}
        for i, index in enumerate(indices):
            if table:
                row, place = json.loads(batch["row"][i]), f"row {index} ({batch['place'][i]})"
            else:
                row, place = {name: values[i] for name, values in batch.items()}, f"row {index}"
            for found in convert(row, place):
                for name, values in out.items():
                    values.append(found[name])
        return out

    names = source.column_names if source.column_names is not None else list(next(iter(source)))
    options = {"batched": True, "with_indices": True, "remove_columns": names, "features": features}
    if isinstance(source, IterableDataset):
        return source.map(run, **options)
    # Our own fingerprint: that of the function's closure would change with the tokenizer's state.
    known = rows.fingerprint if isinstance(rows, Table) else source._fingerprint
    parts = f"{known}|{prompt.fingerprint()}|{version}|{columns and sorted(columns.items())}"
    fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:16]
    num_proc = num_proc if num_proc and num_proc > 1 and len(source) >= 1000 * num_proc else None
    try:
        return source.map(run, **options, num_proc=num_proc, new_fingerprint=fingerprint, desc="tokenize")
    except UnicodeDecodeError as error:  # of an Arrow data set
        raise ValueError(f"data: got a text that is not UTF-8, expected UTF-8 texts: {error}") from error


def compression_rows(
    rows: Rows, prompt: Prompt, *, columns: Columns | None = None, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Stage 1: {context, output, instruction?} to {text_ids, suffix_ids, target_ids}, truncated.

    A column `text` replaces both: each text is then written from its own embedding.

    Args:
        rows: what `load_rows` returns, or a data set of `datasets`.
        columns: the data's own names for these columns. All columns that are neither named here nor known are then
            ignored; without `columns`, an unknown column that holds text is refused.
        num_proc: number of processes that tokenize.

    Raises:
        TypeError, ValueError: a wrong row; the message gives its index, its file and its line.
    """
    check_first_row(rows, 1, columns)

    def convert(row: Row, place: str) -> list[Row]:
        context, output, instruction = _compression_texts(row, columns, place)
        suffix = prompt.suffix(instruction)
        text_ids = _nonempty(prompt.ids(context), "context", place)
        target_ids = _nonempty(prompt.ids(output), "output", place)
        text_ids, target_ids = prompt.text(text_ids, suffix, place), target_ids[: prompt.max_target_length]
        return [{"text_ids": text_ids, "suffix_ids": suffix, "target_ids": target_ids}]

    return _map(rows, convert, _COMPRESSION, prompt, "compression-2", columns, num_proc)


def text_rows(
    rows: Rows, prompt: Prompt, *, columns: Columns | None = None, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Stage 2 without pairs: {text, instruction?} to {query_ids, suffix_ids, target_ids}, the text as its own target.

    The arguments and errors are those of `compression_rows`.
    """
    check_first_row(rows, 2, columns)

    def convert(row: Row, place: str) -> list[Row]:
        text, instruction = _single_text(_map_columns(row, columns or {}, place), columns, place)
        suffix = prompt.suffix(instruction)
        ids = _nonempty(prompt.ids(text), "text", place)
        target_ids = [ids[: prompt.max_target_length]]
        return [{"query_ids": prompt.text(ids, suffix, place), "suffix_ids": suffix, "target_ids": target_ids}]

    return _map(rows, convert, _TEXT, prompt, "text-1", columns, num_proc)


def text_pairs(source: str, split: str | None = None, rows: int | None = None) -> tuple[list[str], list[str]]:
    """(queries, passages) of the first `rows` rows as stage 2 reads them; a text alone is its own passage.

    Raises:
        TypeError, ValueError: a wrong row; the message has its file and its line. And those of `load_rows`.
    """
    queries, passages = [], []
    for place, row in itertools.islice(read_rows(source, split), rows):
        if _is_alone(row):
            text = require_text(_single_text(row, None, place)[0], "text", place)
            pair = text, text
        else:
            triplet = _alignment_texts(row, None, place)
            pair = triplet.query.text, triplet.positives[0].text
        queries.append(pair[0])
        passages.append(pair[1])
    return queries, passages


def alignment_rows(
    rows: Rows, prompt: Prompt, *, columns: Columns | None = None, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Stage 2: one row per (query, positive), from {query or anchor, pos or positive} and any negatives.

    The encoder reads `query_ids`, `positive_ids` and `negative_ids`. `suffix_ids` follow the query, and
    `passage_suffix_ids` follow each of [positive, *negatives]. The decoder scores `target_ids`, which are
    [positive, *negatives] without prompts.

    The columns hold strings or lists, as in BGE; several positives become several rows. Negatives are in `neg` or
    `negative`, or in `negative_1`, `negative_2` …. `instruction` follows all texts of a row; in MEDI's
    [instruction, text] pairs, each text has its own. `prompt` precedes the query, instead of `query_instruction`.

    The other arguments and errors are those of `compression_rows`.
    """
    check_first_row(rows, 2, columns)

    def convert(row: Row, place: str) -> list[Row]:
        triplet = _alignment_texts(row, columns, place)

        def side(before: str, part: _Text, column: str) -> tuple[list[int], list[int], list[int]]:
            """Ids as the encoder reads them, their suffix, and ids as the decoder scores them."""
            suffix = prompt.suffix(part.instruction)
            ids = _nonempty(prompt.ids(part.text), column, place)
            read = prompt.ids(before + part.text) if before else ids
            return prompt.text(read, suffix, place), suffix, ids[: prompt.max_target_length]

        before = prompt.query_instruction if triplet.prompt is None else triplet.prompt
        query_ids, suffix, _ = side(before, triplet.query, "query")
        negatives = [side(prompt.passage_instruction, part, "neg") for part in triplet.negatives]
        out = []
        for part in triplet.positives:
            passages = [side(prompt.passage_instruction, part, "pos"), *negatives]
            out.append(
                {
                    "query_ids": query_ids,
                    "positive_ids": passages[0][0],
                    "negative_ids": [read for read, _, _ in negatives],
                    "suffix_ids": suffix,
                    "passage_suffix_ids": [own for _, own, _ in passages],
                    "target_ids": [target for _, _, target in passages],
                }
            )
        return out

    return _map(rows, convert, _ALIGNMENT, prompt, "alignment-2", columns, num_proc)


def check_negatives(rows: Dataset | IterableDataset, options: Stage2Options) -> str | None:
    """What to tell the user where negatives are wanted and missing in some rows, or there and not read.

    Of a stream the first 1,000 rows are looked at.

    Raises:
        ValueError: they are wanted, and no row has one.
    """
    streamed = isinstance(rows, IterableDataset)
    found = [row["target_ids"] for row in rows.take(_LOOKED_AT)] if streamed else rows["target_ids"]
    which = f"the first {len(found)} rows" if streamed else f"{len(found)} rows"
    without = sum(len(t) < 2 for t in found)
    hard = options.contrastive_weight > 0 and options.hard_negatives
    wanted = "alignment_weight > 0" if options.alignment_weight > 0 else "hard_negatives is true" if hard else ""
    if without == len(found):
        if wanted:
            raise ValueError(
                f"data: got no negative in any {f'of {which}' if streamed else 'row'}, expected at least one when "
                f"{wanted}; columns: neg, negative or negative_1, negative_2 …"
            )
        return None
    if not wanted:
        return "data: the negatives are not read, as hard_negatives is false and alignment_weight 0"
    return f"data: {without} of {which} have no negative" if without else None


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
