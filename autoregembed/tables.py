"""Files of rows, read as they were written: nothing is guessed, and an error names the file and the line.

A jsonl file is read line by line as JSON, csv and tsv as text (tsv has no quoting), parquet with its own types. Data
sets of the hub are read by `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError, DatasetsError

from autoregembed.cells import Row, as_id, as_number, document_text, require_keys
from autoregembed.files import file_fingerprint

Rows: TypeAlias = "Table | Dataset | IterableDataset"

_VERSION = "1"  # of what is read from the same bytes
_CARRIER = Features({"row": Value("large_string"), "place": Value("string")})


# ----------------------------------------------------------------------------------------------------------------------
# One file


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1; only "\\n" ends a line, and a BOM is none of the text."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield number, text


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _parse(text: str) -> Any:
    value = json.loads(text, object_pairs_hook=_object)
    if "\\ud" in text or "\\uD" in text:  # half of a pair, which is no text
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _require_object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected an object")
    return value


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                row = _require_object(_parse(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from error
            yield f"line {number}", row


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """An array of objects, or one object a line."""
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(_parse("".join(line for _, line in _lines(path))), 1):
        try:
            yield f"item {number}", _require_object(row)
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from error


def _read_txt(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", {"text": line.removesuffix("\n").removesuffix("\r")}


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # texts are longer than the 131,072 characters of its default
    # Not strict, the reader would take a quotation mark that is never closed for one at the end of the file.
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"line {number}: {error}") from error
        if cells is None:
            return
        yield number, cells


def _tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path):
        yield number, line.removesuffix("\n").removesuffix("\r").split("\t")


def _read_cells(cells: Callable[[Path], Iterator[tuple[int, list[str]]]], path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of text: the first line that is not blank names the columns, and every other one has as many cells."""
    names: list[str] | None = None
    for number, values in cells(path):
        if not any(value.strip() for value in values) and len(values) < 2:
            continue
        if names is None:
            names = values
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise ValueError(f"line {number}: it has the column {twice!r} twice")
        elif len(values) != len(names):
            raise ValueError(f"line {number}: it has {len(values)} cells, expected {len(names)}, those of the header")
        else:
            yield f"line {number}", dict(zip(names, values, strict=True))


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    return _read_cells(_csv_cells, path)


def _read_tsv(path: Path) -> Iterator[tuple[str, Row]]:
    return _read_cells(_tsv_cells, path)


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"it has the column {next(n for n in names if names.count(n) > 1)!r} twice")
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet,
    ".txt": _read_txt,
}  # fmt: skip


def file_kind(source: str | Path) -> str | None:
    """The ending that says how a file of rows is read (".jsonl" of "a.jsonl.gz"), None of other files."""
    suffixes = [s.lower() for s in Path(source).suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        suffixes = [s for s in suffixes[:-1] if s != ".parquet"]
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _read_file(path: Path) -> Iterator[tuple[str, Row]]:
    kind = file_kind(path)
    if kind is None:
        raise ValueError(f"data: got {str(path)!r}, expected files ending in {', '.join(_READERS)} (text also in .gz)")
    found = False
    try:
        for place, row in _READERS[kind](path):
            found = True
            yield f"{place} of {path.name!r}", row
        if not found:
            raise ValueError("it has no rows")
    except (ValueError, RecursionError, EOFError, OSError, zlib.error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, and not of the file's content
            raise
        raise ValueError(f"data: got {str(path)!r}, which cannot be read: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Any source


def sources_of(source: str | Sequence[str]) -> list[str]:
    """Paths or hub ids, "~" expanded; a comma separates several where no file has the whole name."""
    if isinstance(source, str):
        whole = "," not in source or Path(source).expanduser().exists()
        source = [source] if whole else [s.strip() for s in source.split(",") if s.strip()]
    if not source or not all(source):
        raise ValueError(f"data: got {source!r}, expected files, a folder or a hub id")
    return [file for s in source for file in _files_of(os.path.expanduser(s))]


def _files_of(source: str) -> list[str]:
    """The text files of a folder of texts; anything else stands for itself."""
    path = Path(source)
    texts = sorted(map(str, path.glob("*.txt"))) if path.is_dir() and not _is_beir(path) else []
    return texts or [source]


def _is_local(source: str) -> bool:
    """Whether `source` is a file, or a BEIR folder, that exists; False for what `datasets` loads.

    Raises:
        FileNotFoundError: it looks like a file and there is none.
        ValueError: a folder of files.
    """
    path = Path(source)
    if path.is_file() or _is_beir(path):
        return True
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if file_kind(p))
        if files and not (path / "state.json").is_file():
            raise ValueError(
                f"data: got the folder {source!r}, expected its files ({', '.join(files[:3])}), or a BEIR folder with "
                "corpus.jsonl, queries.jsonl and qrels/"
            )
    elif file_kind(path) or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"data: got {source!r}, which does not exist, expected a file")
    return False


def _load_hub(source: str, split: str | None, streaming: bool = False) -> Dataset | IterableDataset:
    path = Path(source)
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(source)
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(source)[split or "train"]
        return datasets.load_dataset(source, split=split or "train", streaming=streaming)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ValueError(f"data: got {source!r}, which `datasets` cannot load: {error}") from error


def _read_local(sources: Sequence[str], split: str | None) -> Iterator[tuple[str, Row]]:
    for source in sources:
        path = Path(source)
        yield from _read_beir(path, split) if _is_beir(path) else _read_file(path)


def read_rows(source: str | Sequence[str], split: str | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) of each row of files, of a BEIR folder or of a hub data set; `place` is for error messages.

    Args:
        source: a jsonl, json, csv, tsv or parquet file (text also as .gz), several of them, or a hub id.
        split: of a hub data set, or of the qrels of a BEIR folder; by default "train".

    Raises:
        FileNotFoundError: `source` looks like a file and there is none.
        ValueError: an unknown kind of file, one that cannot be read (the line is named), or one without rows.
    """
    sources = sources_of(source)
    local = [_is_local(s) for s in sources]
    if all(local):
        return _read_local(sources, split)
    if len(sources) > 1:
        raise ValueError(f"data: got {sources[local.index(False)]!r} among several sources, expected local files")
    return ((f"row {i} of {source!r}", row) for i, row in enumerate(_load_hub(sources[0], split)))


# ----------------------------------------------------------------------------------------------------------------------
# BEIR


def read_documents(source: str, split: str | None = None, wanted: set[str] | None = None) -> dict[str, str]:
    """Texts by id, from rows {_id, text, title?}; those of `wanted` alone where it is given.

    Raises:
        TypeError, ValueError: a wrong row, or an id that stands twice with different texts. And those of `read_rows`.
    """
    texts: dict[str, str] = {}
    for place, row in read_rows(source, split):
        require_keys(row, ("_id", "text"), place)
        key = as_id(row["_id"], "_id", place)
        if wanted is None or key in wanted:
            text = document_text(row, place)
            if texts.setdefault(key, text) != text:
                raise ValueError(
                    f"data: got {key!r} as '_id' in {place} and before with another text, expected one text"
                )
    return texts


def read_qrels(source: str, split: str | None = None) -> dict[str, dict[str, float]]:
    """{query: {document: relevance}}, from rows {query-id, corpus-id, score}.

    Raises:
        TypeError, ValueError: a wrong row. And those of `read_rows`.
    """
    relevance: dict[str, dict[str, float]] = {}
    for place, row in read_rows(source, split):
        require_keys(row, ("query-id", "corpus-id", "score"), place)
        query, document = (as_id(row[name], name, place) for name in ("query-id", "corpus-id"))
        score = as_number(row["score"], "score", place)
        if relevance.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(
                f"data: got {score} as 'score' in {place} and before {relevance[query][document]} for the same pair, "
                "expected one relevance"
            )
    return relevance


def _is_beir(path: Path) -> bool:
    return all((path / name).is_file() for name in ("corpus.jsonl", "queries.jsonl")) and (path / "qrels").is_dir()


def _beir_files(folder: Path, split: str | None) -> list[Path]:
    qrels = folder / "qrels" / f"{split or 'train'}.tsv"
    if not qrels.is_file():
        found = ", ".join(sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))) or "none"
        raise FileNotFoundError(f"data: got no {str(qrels)!r}, expected a train_split among those there: {found}")
    return [folder / "corpus.jsonl", folder / "queries.jsonl", qrels]


def _read_beir(folder: Path, split: str | None) -> Iterator[tuple[str, Row]]:
    """{query, pos, neg} of each query with a relevant document; documents judged irrelevant are its negatives."""
    corpus, queries, qrels = map(str, _beir_files(folder, split))
    relevance = read_qrels(qrels)
    asked = read_documents(queries, wanted=set(relevance))
    documents = read_documents(corpus, wanted={d for judged in relevance.values() for d in judged})
    absent = without = 0
    for query, judged in relevance.items():
        if query not in asked:
            raise ValueError(f"data: got query {query!r} in {qrels!r}, expected one of {queries!r}")
        absent += sum(d not in documents for d in judged)
        known = {d: relevant for d, relevant in judged.items() if d in documents}
        positives = [documents[d] for d, relevant in known.items() if relevant > 0]
        negatives = [documents[d] for d, relevant in known.items() if relevant <= 0]
        without += not positives
        if positives:
            yield f"query {query!r} of {folder.name!r}", {"query": asked[query], "pos": positives, "neg": negatives}
    if absent or without:
        warnings.warn(
            f"data: {absent} documents that {qrels!r} names are not in the corpus; {without} queries without a "
            "relevant document are left out",
            stacklevel=2,
        )


# ----------------------------------------------------------------------------------------------------------------------
# Rows for training


class Table:
    """Rows of local files in the Arrow cache of `datasets`, each as it was written.

    An Arrow column has one type, and a column of a file need not: a text here, a list there. So every row is kept as
    JSON. `carrier` has the columns {row, place}; `fingerprint` is that of the files' bytes.
    """

    def __init__(self, carrier: Dataset | IterableDataset, fingerprint: str):
        self.carrier = carrier
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.carrier)

    def __iter__(self) -> Iterator[Row]:
        return (json.loads(item["row"]) for item in self.carrier)

    def __getitem__(self, index: int) -> Row:
        return json.loads(self.carrier[index]["row"])


def _json(row: Row) -> str:
    # Dates, bytes and decimals of parquet are no texts: in a column that is read they are refused as such.
    return json.dumps(row, default=lambda value: {type(value).__name__: str(value)})


def _carry(sources: Sequence[str], split: str | None, fingerprint: str) -> Iterator[dict[str, str]]:
    """`fingerprint` is there for the cache of `datasets`, which tells generators apart by their arguments."""
    for place, row in _read_local(sources, split):
        yield {"row": _json(row), "place": place}


def _bytes_fingerprint(sources: Sequence[str], split: str | None) -> str:
    digest = xxhash.xxh3_128(_VERSION.encode())
    for source in sources:
        path = Path(source)
        for file in _beir_files(path, split) if _is_beir(path) else [path]:
            digest.update(f"{file.name}|{file_fingerprint(file)}|".encode())
    return digest.hexdigest()[:16]


def require_cache() -> Path:
    """The cache folder of `datasets`, which receives rows, token ids and reference scores.

    Raises:
        OSError: nothing can be written there.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise type(error)(
            f"HF_DATASETS_CACHE: got {str(folder)!r}, where nothing can be written ({error.strerror}), expected a "
            "folder of your own: set the environment variable HF_DATASETS_CACHE or HF_HOME"
        ) from error


def load_rows(source: str | Sequence[str], split: str | None = None, streaming: bool = False) -> Rows:
    """Loads rows for training: files and BEIR folders as a `Table`, a hub data set as `datasets` returns it.

    Args:
        source: a jsonl, json, csv, tsv, txt or parquet file (text also as .gz), several (a list, or separated by
            commas), a folder of .txt files, a folder with corpus.jsonl, queries.jsonl and qrels/*.tsv, or a hub id.
        split: the split of a hub data set, or of the qrels of a BEIR folder; by default "train".
        streaming: read rows when they are needed, and keep none.

    Raises:
        FileNotFoundError: `source` looks like a file and there is none.
        ValueError: an empty data set, an unknown kind of file, or one that cannot be read (the line is named).
        OSError: the cache of `datasets` cannot be written.
    """
    sources = sources_of(source)
    local = [_is_local(s) for s in sources]
    if not any(local) and len(sources) == 1:
        rows = _load_hub(sources[0], split, streaming)
        if not streaming and len(rows) == 0:
            raise ValueError(f"data: got no rows in {source!r}, expected at least one")
        return rows
    if not all(local):
        raise ValueError(f"data: got {sources[local.index(False)]!r} among several sources, expected local files")
    for path in map(Path, sources):
        if file_kind(path) is None and not _is_beir(path):
            next(_read_file(path))  # raises
    options = {"sources": tuple(sources), "split": split}
    require_cache()
    if streaming:
        generator = IterableDataset.from_generator(_carry, features=_CARRIER, gen_kwargs={**options, "fingerprint": ""})
        return Table(generator, "")
    fingerprint = _bytes_fingerprint(sources, split)
    try:
        carrier = Dataset.from_generator(
            _carry, features=_CARRIER, gen_kwargs={**options, "fingerprint": fingerprint}
        )  # fmt: skip
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | TypeError | OSError):
            raise error.__cause__ from None
        raise
    if len(carrier) == 0:
        raise ValueError(f"data: got no rows in {source!r}, expected at least one")
    return Table(carrier, fingerprint)
