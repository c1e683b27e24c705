"""Malformed input of every kind: each gives a typed error that names the argument, writes nothing, runs nothing, and
leaves a process that works.

A case is a name and a call. The tables below make them; `test_it_is_refused` judges them all alike.
"""

import contextlib
import gzip
import inspect
import io
import json
import os
import pickle
import re
import shutil
import struct
import typing
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sentence, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from autoregembed import Decoder, Encoder, checkpoint, data, evaluate, files, models, ops, reference_scores
from autoregembed.cli import main
from autoregembed.config import Config
from autoregembed.files import CheckpointError, file_fingerprint
from autoregembed.prompt import Prompt
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import train
from autoregembed.train_flags import read_config

TYPED = (ValueError, TypeError, IndexError, OSError, CheckpointError, ops.ImplUnavailable)
BIG = 2**63 - 1
TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
V = len(TOKENIZER)
CASES: dict[str, typing.Callable] = {}  # each takes the folder that it may use, and the files of `made`


def case(name: str, call) -> None:
    assert name not in CASES, name
    CASES[name] = call


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with all that is good: model lm/, its export e/, rows, a state, and what a hostile hand starts from."""
    folder = tmp_path_factory.mktemp("hostile")
    model = tiny_model(vocab_size=V)
    models.save_model(folder / "lm", model, TOKENIZER, {})
    (folder / "lm" / models.RECIPE).unlink()
    ids = models.add_compress_tokens(model, TOKENIZER, 3)
    Encoder(model, compress_token_ids=ids, bos_token_id=1, tokenizer=TOKENIZER).save_pretrained(folder / "e")
    write_jsonl(folder / "one.jsonl", [{"context": sentence(i, 4), "output": sentence(i, 4)} for i in range(4)])
    write_jsonl(folder / "two.jsonl", [{"query": sentence(i, 4), "pos": sentence(i, 3), "neg": "x"} for i in range(4)])
    (folder / "texts.txt").write_text("the cat\n")
    return folder


def works() -> None:
    hidden, weight = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3)
    score = ops.linear_logprob(hidden, weight, torch.tensor([0, 3]), cu_seqlens=torch.tensor([0, 2]))
    score.sum().backward()
    assert abs(score.item() + 3.4287) < 1e-3
    assert hidden.grad.abs().sum() > 0


def tree(folder: Path) -> dict:
    return {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*") if not p.is_dir()}


@pytest.mark.parametrize("name", CASES_NAMES := [])
def test_it_is_refused(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(made)
    with pytest.raises(TYPED) as error:
        CASES[name](tmp_path, made)
    message = str(error.value)
    system = isinstance(error.value, OSError) and error.value.errno is not None
    assert system or re.match(r"\w+: got |impl=", message), f"{error.type.__name__}: {message}"
    assert len(message) < 5000
    assert tree(made) == before
    left = [p for p in tmp_path.rglob("*") if p.name in ("model", "export", "ran", "summary.json", "metrics.jsonl")]
    left += tmp_path.rglob(".*")
    assert not left
    works()


def test_the_corpus_is_large():
    print(f"{len(CASES)} malformed inputs")
    assert len(CASES) >= 300


# ----------------------------------------------------------------------------------------------------------------------
# Ops

GOOD = {
    ops.linear_logprob: lambda: {
        "hidden": torch.ones(4, 8),
        "weight": torch.ones(9, 8),
        "target": torch.arange(4),
        "bias": torch.ones(9),
        "cu_seqlens": torch.tensor([0, 1, 4]),
    },
    ops.alignment_loss: lambda: {
        "query_positive": torch.ones(3),
        "positive_positive": torch.ones(3),
        "query_negatives": torch.ones(3, 2),
        "reference_positive": torch.ones(3),
        "reference_negatives": torch.ones(3, 2),
        "negative_mask": torch.ones(3, 2, dtype=torch.bool),
    },
    ops.info_nce: lambda: {
        "query": torch.ones(3, 8),
        "passages": torch.ones(5, 8),
        "target": torch.arange(3),
        "passage_ids": torch.arange(5),
    },
    ops.pool_last_k: lambda: {
        "hidden": torch.ones(9, 4),
        "cu_seqlens": torch.tensor([0, 4, 9]),
        "k": 3,
        "index": torch.arange(2),
    },
    ops.splice: lambda: {
        "z": torch.ones(2, 3, 4),
        "embedding": torch.ones(7, 4),
        "ids": torch.arange(10) % 7,
        "cu_seqlens": torch.tensor([0, 4, 10]),
        "z_index": torch.arange(2),
        "offset": 1,
    },
}

TENSORS = {
    "a string": lambda x: "x",
    "a list": lambda x: x.tolist(),
    "complex": lambda x: x.to(torch.complex64),
    "int8": lambda x: x.to(torch.int8),
    "meta": lambda x: x.to("meta"),
    "a number": lambda x: x.flatten()[0],
    "one axis more": lambda x: x[..., None, None],
    "empty": lambda x: x[:0],
}
# Fewer rows are fine where they only mean fewer of something.
FINE = {("pool_last_k", "index", "empty")}


def op_case(op, impl, name, changes):
    case(f"{op.__name__} {impl}: {name}", lambda folder, made: op(**{**GOOD[op](), "impl": impl, **changes()}))


for _op, _good in GOOD.items():
    for _name, _value in _good().items():
        for _what, _change in TENSORS.items():
            if isinstance(_value, torch.Tensor) and (_op.__name__, _name, _what) not in FINE:
                op_case(_op, "auto", f"{_name} is {_what}", lambda c=_change, n=_name, v=_value: {n: c(v)})

IDS = [-1, BIG, -BIG - 1]
BOUNDS = {
    "decreasing": [0, 5, 4],
    "not from 0": [1, 1, 4],
    "negative": [0, -1, 4],
    "too far": [0, 1, BIG],
    "short": [0, 1, 3],
}
NUMBERS = [0, -1, float("nan"), float("inf"), "x", None]
VALUES = {
    ops.linear_logprob: {
        "target": [torch.tensor([0, 1, 2, i]) for i in (9, *IDS)],
        "cu_seqlens": [torch.tensor(b) for b in BOUNDS.values()],
    },
    ops.info_nce: {"target": [torch.tensor([0, 1, i]) for i in (5, *IDS)]},
    ops.pool_last_k: {
        "index": [torch.tensor([0, i]) for i in (2, *IDS)],
        "cu_seqlens": [torch.tensor(b) for b in ([0, 5, 4], [1, 5, 9], [0, -4, 9], [0, 4, BIG], [0, 4, 8], [0, 2, 9])],
        "k": [0, -1, 5, 2**62, "x", 1.5, None],
    },
    ops.splice: {
        "ids": [torch.full((10,), i) for i in (7, *IDS)],
        "z_index": [torch.tensor([0, i]) for i in (2, *IDS)],
        "cu_seqlens": [
            torch.tensor(b) for b in ([0, 11, 10], [1, 5, 10], [0, -4, 10], [0, 4, BIG], [0, 4, 9], [0, 3, 10])
        ],
        "offset": [-1, 4, 2**62, "x", 1.5, None],
    },
}
for _op, _arguments in VALUES.items():
    for _impl in ("torch", "reference", "auto"):
        for _name, _values in _arguments.items():
            for _i, _value in enumerate(_values):
                op_case(_op, _impl, f"value {_i} of {_name}", lambda n=_name, v=_value: {n: v})
OPTIONS = {
    ops.linear_logprob: {
        "softcap": NUMBERS[:-1],
        "scale": NUMBERS[2:],
        "num_grad_rows": [-1, 5, "x", 1.5],
        "impl": ["cuda", 3, None],
        "ignore_index": ["x", None],
    },
    ops.alignment_loss: {
        "beta": NUMBERS,
        "temperature": NUMBERS,
        "ref_margin": ["plus", 3, None],
        "negatives": ["all", 3, None],
        "impl": ["cuda", 3],
        "reference_positive": [None],
        "reference_negatives": [None],
    },
    ops.info_nce: {
        "temperature": NUMBERS,
        "directions": ["query_to_doc", (), ("doc_to_query",), ("query_to_doc", "up"), ("query_to_doc", 3), 3, None],
        "partition_mode": ["both", 3, None],
        "margin": [float("nan"), float("inf"), "x"],
        "impl": ["cuda", 3],
    },
    ops.pool_last_k: {"impl": ["cuda", 3, "cpp"]},
    ops.splice: {"impl": ["cuda", 3, "cpp"], "embedding_scale": NUMBERS[2:]},
}
for _op, _arguments in OPTIONS.items():
    for _name, _values in _arguments.items():
        for _value in _values:
            op_case(_op, "auto", f"{_name}={_value!r}", lambda n=_name, v=_value: {n: v})


# ----------------------------------------------------------------------------------------------------------------------
# Encoder and decoder

HALVES: dict = {}


def halves():
    if not HALVES:
        HALVES["encoder"] = Encoder(
            tiny_model(), compress_token_ids=[317, 318, 319], bos_token_id=1, tokenizer=TOKENIZER
        )
        HALVES["decoder"] = Decoder(tiny_model())
    return HALVES["encoder"], HALVES["decoder"]


LISTS = {
    "no text": [],
    "an empty text": [[1], []],
    "a negative id": [[1, -1]],
    "an id outside": [[320]],
    "a huge id": [[BIG]],
    "a gigantic id": [[10**30]],
    "a string": ["abc"],
    "a float": [[1.5]],
    "None": [None],
    "NaN": [[float("nan")]],
    "nested": [[[1]]],
    "too long": [[1] * 9999],
    "a number": 3,
}
for _name, _ids in LISTS.items():
    case(f"encoder: {_name}", lambda f, m, i=_ids: halves()[0](i))
    if _ids != []:
        case(f"decoder targets: {_name}", lambda f, m, i=_ids: halves()[1].logprob(torch.ones(1, 3, 32), i))
for _name, _options in {
    "negative compress id": {"compress_token_ids": [-1]},
    "compress id outside": {"compress_token_ids": [999]},
    "compress id twice": {"compress_token_ids": [5, 5]},
    "no compress id": {"compress_token_ids": []},
    "compress id a string": {"compress_token_ids": ["a"]},
    "bos outside": {"bos_token_id": 999},
    "bos negative": {"bos_token_id": -1},
    "suffix outside": {"suffix_ids": [999]},
    "attention": {"attention": "fast"},
}.items():
    case(f"Encoder: {_name}", lambda f, m, o=_options: Encoder(tiny_model(), **{"compress_token_ids": [5], **o}))
for _name, _options in {
    "eos outside": {"eos_token_id": 999},
    "eos negative": {"eos_token_id": -1},
    "bos outside": {"bos_token_id": 999},
    "z_norm": {"z_norm": "half"},
    "attention": {"attention": "fast"},
}.items():
    case(f"Decoder: {_name}", lambda f, m, o=_options: Decoder(tiny_model(), **o))
for _name, _z in {
    "two axes": torch.ones(1, 32),
    "no vector": torch.ones(1, 0, 32),
    "another D": torch.ones(1, 3, 31),
    "integers": torch.ones(1, 3, 32, dtype=torch.int64),
    "meta": torch.ones(1, 3, 32, device="meta"),
    "a list": [[1.0]],
}.items():
    case(f"decoder z: {_name}", lambda f, m, z=_z: halves()[1].logprob(z, [[1]]))
for _z_index in ([1], [-1], [BIG], [0, 0], ["a"], torch.ones(1)):
    case(f"decoder z_index {_z_index}", lambda f, m, s=_z_index: halves()[1].logprob(torch.ones(1, 3, 32), [[1]], s))
case("encoder: suffixes missing", lambda f, m: halves()[0]([[1], [2]], [[1]]))
case("encoder: suffix outside", lambda f, m: halves()[0]([[1]], [[999]]))


# ----------------------------------------------------------------------------------------------------------------------
# Data


def prompt() -> Prompt:
    return Prompt(tokenizer=TOKENIZER, num_compress_tokens=3, bos_token_id=1, instruction="x")


def load(stage: str, path: Path):
    if stage == "sts":
        return evaluate.load_sts(str(path))
    rows = data.load_rows(str(path))
    return data.compression_rows(rows, prompt()) if stage == "one" else data.alignment_rows(rows, prompt())


def file_case(stage: str, what: str, name: str, content) -> None:
    def call(folder, made):
        path = folder / name
        content(path) if callable(content) else path.write_bytes(content)
        load(stage, path)

    case(f"data {stage}: {what}", call)


ROW = b'{"context": "a", "output": "b"}\n'
PARQUET = io.BytesIO()
data.Dataset.from_list([{"context": "a", "output": "b"}]).to_parquet(PARQUET)
for _what, _name, _content in [
    ("empty", "a.jsonl", b""),
    ("blank", "a.jsonl", b"  \n\n"),
    ("null bytes", "a.jsonl", b"\0" * 99),
    ("null byte in a row", "a.jsonl", ROW + b"\0\n"),
    ("bad UTF-8", "a.jsonl", ROW.replace(b"a", b"\xff\xfe", 1)),
    ("bad UTF-8 in a text", "a.jsonl", b'{"context": "\xc3\x28", "output": "b"}\n'),
    ("UTF-16", "a.jsonl", ROW.decode().encode("utf-16")),
    ("lone surrogate", "a.jsonl", ROW.replace(b'"b"', b'"\\ud800"')),
    ("truncated", "a.jsonl", ROW * 3 + ROW[:14]),
    ("an array", "a.jsonl", b"[1, 2]\n"),
    ("a number", "a.jsonl", b"3\n"),
    ("nested", "a.jsonl", b"[" * 100000),
    ("nested in a row", "a.jsonl", b'{"context": ' + b"[" * 9999 + b"]" * 9999 + b"}\n"),
    ("giant integer", "a.jsonl", b'{"context": "a", "output": ' + b"9" * 5000 + b"}\n"),
    ("NaN", "a.jsonl", b'{"context": "a", "output": NaN}\n'),
    ("a float", "a.jsonl", b'{"context": "a", "output": 1.5}\n'),
    ("null", "a.jsonl", ROW + b'{"context": null, "output": "b"}\n'),
    ("a number in a later row", "a.jsonl", ROW + b'{"context": 3, "output": "b"}\n'),
    ("a list as text", "a.jsonl", b'{"context": ["a"], "output": "b"}\n'),
    ("an object as text", "a.jsonl", b'{"context": {"a": 1}, "output": "b"}\n'),
    ("empty text", "a.jsonl", b'{"context": "", "output": "b"}\n'),
    ("empty output", "a.jsonl", b'{"context": "a", "output": ""}\n'),
    ("column missing", "a.jsonl", b'{"context": "a"}\n'),
    ("column misspelt", "a.jsonl", b'{"Context": "a", "output": "b"}\n'),
    ("instruction a number", "a.jsonl", b'{"context": "a", "output": "b", "instruction": 3}\n'),
    ("duplicate keys", "a.jsonl", b'{"context": "a", "context": 4, "output": "b"}\n'),
    ("csv empty", "a.csv", b""),
    ("csv header only", "a.csv", b"context,output\n"),
    ("csv ragged", "a.csv", b"context,output\na,b\na,b,c,d\n"),
    ("csv unclosed quote", "a.csv", b'context,output\n"a,b\n'),
    ("csv duplicate columns", "a.csv", b"context,context,out\na,b,c\n"),
    ("csv null bytes", "a.csv", b"\0\0\0"),
    ("csv bad UTF-8", "a.csv", b"context,output\n\xff\xfe,b\n"),
    ("csv of missing values", "a.csv", b"context,output\n,\n"),
    ("tsv with commas", "a.tsv", b"context,output\na,b\n"),
    ("json broken", "a.json", b"{"),
    ("json a string", "a.json", b'"abc"'),
    ("json empty", "a.json", b"[]"),
    ("json nested", "a.json", b"[" * 100000),
    ("parquet rubbish", "a.parquet", b"PAR1" + b"x" * 99 + b"PAR1"),
    ("parquet truncated", "a.parquet", PARQUET.getvalue()[:-20]),
    ("parquet empty", "a.parquet", b""),
    ("parquet cut within", "a.parquet", PARQUET.getvalue()[:40] + PARQUET.getvalue()[80:]),
    ("gzip truncated", "a.jsonl.gz", gzip.compress(ROW * 999)[:-30]),
    ("gzip rubbish", "a.jsonl.gz", b"\x1f\x8b" + b"x" * 40),
    ("gzip of nothing", "a.jsonl.gz", gzip.compress(b"")),
    ("no gzip", "a.jsonl.gz", ROW),
    ("unknown ending", "a.dat", ROW),
    ("a pickle", "a.pkl", pickle.dumps([1])),
    ("a folder", "a.jsonl", Path.mkdir),
    ("a symbolic link to nothing", "a.jsonl", lambda p: p.symlink_to("nothing")),
    ("a symbolic link to itself", "a.jsonl", lambda p: p.symlink_to(p)),
    ("a pipe", "a.jsonl", os.mkfifo),
    ("a device", "a.jsonl", lambda p: p.symlink_to("/dev/null")),
    ("nothing there", "a.jsonl", lambda p: None),
]:
    file_case("one", _what, _name, _content)
PAIR = {"query": "a", "pos": "b", "neg": "c"}
for _what, _change in {
    "no positive": {"pos": []},
    "positive null": {"pos": None},
    "positive a number": {"pos": 3},
    "positive empty": {"pos": ""},
    "positive of numbers": {"pos": [1]},
    "positive an object": {"pos": {"a": 1}},
    "negative a number": {"neg": 3},
    "negative of nulls": {"neg": [None]},
    "negative empty": {"neg": [""]},
    "negative nested": {"neg": [["a"]]},
    "query null": {"query": None},
    "query a number": {"query": 3},
    "query empty": {"query": ""},
    "query of one": {"query": ["a"]},
    "query of three": {"query": ["a", "b", "c"]},
    "query no pair of texts": {"query": ["a", "b"], "pos": "c"},
    "instruction a list": {"instruction": ["a"]},
    "instruction of numbers": {"instruction": 1.5},
}.items():
    file_case("two", _what, "a.jsonl", (json.dumps({**PAIR, **_change}) + "\n").encode())
for _what, _score in {"NaN": "NaN", "infinite": "Infinity", "text": '"x"', "null": "null", "a list": "[1]"}.items():
    file_case(
        "sts", f"score {_what}", "a.jsonl", f'{{"sentence1": "a", "sentence2": "b", "score": {_score}}}\n'.encode()
    )
file_case("sts", "no score", "a.jsonl", b'{"sentence1": "a", "sentence2": "b"}\n')


# ----------------------------------------------------------------------------------------------------------------------
# Configurations

FIELDS = {"stage": 1, "model": "m", "train_data": "d.jsonl", "output_dir": "o"}
WRONG = {
    bool: ["maybe", 3, None],
    int: ["x", 1.5, [1], {"a": 1}],
    float: ["x", [1], float("nan")],
    str: [{"a": 1}, [1], "a\0b"],
    list: [3, {"a": 1}, [{"a": 1}]],
    dict: [3, {"a": 1}, {1: "a"}, "a", "a=b,a=c", "a=b,"],
}


def wrong_values(field: str) -> list:
    kind = typing.get_type_hints(Config)[field]
    unset = type(None) in typing.get_args(kind)  # then None is right
    kinds = [kind]
    if typing.get_origin(kind) is not typing.Literal:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)] or [kind]
    if typing.get_origin(kinds[0]) is typing.Literal:
        return ["zzz", 7, [1]]
    kinds = kinds if typing.get_origin(kind) is not list else [list]
    values = WRONG[typing.get_origin(kinds[0]) or kinds[0]]
    values = [v for v in values if not (unset and v is None)]
    return [v for v in values if not (len(kinds) > 1 and isinstance(v, list))]  # lora_targets: a list or a string


def config_case(what: str, content) -> None:
    def call(folder, made):
        path = folder / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        read_config([str(path)])

    case(f"config: {what}", call)


for _field in Config.__dataclass_fields__:
    for _value in wrong_values(_field):
        case(f"Config({_field}={_value!r})", lambda f, m, n=_field, v=_value: Config(**{**FIELDS, n: v}))
    config_case(f"{_field} of the wrong type", {**FIELDS, _field: wrong_values(_field)[0]})
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
for _what, _content in {
    "empty": b"",
    "a list": b"- 1\n",
    "a text": b"abc",
    "bad UTF-8": b"stage: \xff\xfe\n",
    "null byte": b"stage: \0\n",
    "a tab": b"stage:\t1\n\tmodel: m\n",
    "unclosed": b"a: [1\n",
    "python tag": b"stage: !!python/object/apply:os.system [touch ran]\n",
    "python name": b"stage: !!python/name:os.system\n",
    "aliases that multiply": LAUGHS.encode(),
    "aliases as a value": (LAUGHS.replace("i: &i", "batch_size: &i")).encode(),
    "an alias to itself": b"stage: &a [*a]\n",
    "nested": b"stage: " + b"[" * 5000,
    "two documents": b"stage: 1\n---\nstage: 2\n",
    "a date": b"stage: 2020-01-01\n",
    "keys that are numbers": b"1: 2\n",
    "a giant integer": b"stage: 1\nseed: " + b"9" * 5000 + b"\n",
    "an infinite number of steps": {**FIELDS, "max_steps": float("inf")},
    "negative steps": {**FIELDS, "max_steps": -1},
    "seed above int64": {**FIELDS, "seed": 2**64},
    "unknown": {**FIELDS, "zzz": 1},
    "no model": {"stage": 1},
}.items():
    config_case(_what, _content)
case("config: a folder", lambda f, m: read_config([str(f)]))
case("config: no file", lambda f, m: read_config([str(f / "none.yaml")]))
case("config: flag without value", lambda f, m: read_config(["--config"]))
case("config: null byte in the name", lambda f, m: read_config(["a\0b"]))


# ----------------------------------------------------------------------------------------------------------------------
# Training states


def trained():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def forge(folder: Path, change) -> None:
    """A state whose manifest is in order, since whoever changed it wrote the manifest too; loaded afterwards."""
    state = checkpoint.save_checkpoint(folder / "step-00000001", *trained(), 1, {})
    change(state)
    names = [n for n in checkpoint.CHECKPOINT_FILES if (state / n).is_file()]
    sizes = {n: [(state / n).stat().st_size, file_fingerprint(state / n)] for n in names}
    (state / "manifest.json").write_text(checkpoint.manifest_text(sizes))
    newest, skipped = checkpoint.latest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"resume_from_checkpoint: got {skipped[0]}")
    model, optimizer = trained()
    before = files.weights_fingerprint(model)
    try:
        checkpoint.load_checkpoint(newest, model, optimizer)
    finally:
        assert files.weights_fingerprint(model) == before


def edit(**changes):
    def change(state: Path) -> None:
        content = json.loads((state / "state.json").read_text())
        for name, value in changes.items():
            content.pop(name) if value is KeyError else content.update({name: value})
        (state / "state.json").write_text(json.dumps(content))

    return change


def tensors(file: str, **changes):
    def change(state: Path) -> None:
        content = load_file(state / f"{file}.safetensors")
        for name, value in changes.items():
            content.pop(name.replace("__", ".")) if value is KeyError else content.update(
                {name.replace("__", "."): value}
            )
        save_file(content, state / f"{file}.safetensors")

    return change


def write(name: str, content: bytes):
    return lambda state: (state / name).write_bytes(content)


HEADERS = {
    "oversized header": struct.pack("<Q", 2**62) + b"{}",
    "header beyond the file": struct.pack("<Q", 99999) + b"{}",
    "header of rubbish": struct.pack("<Q", 8) + b"rubbish!",
    "no header": b"abc",
    "empty": b"",
    "zeros": bytes(64),
    "offsets that overlap": save({"a": torch.ones(2), "b": torch.ones(2)}).replace(b"[8,16]", b"[0,8] "),
    "offsets beyond the end": save({"a": torch.ones(2)}).replace(b"[0,8]", b"[0,9]"),
    "a pickle": pickle.dumps({"a": 1}),
    "a zip": b"PK\3\4" + bytes(40),
}
GROUP = {"params": [0, 1], "lr": 0.1}
for _what, _change in {
    **{
        f"{f}: {h}": write(f"{f}.safetensors", c) for f in ("trainable", "optimizer", "rng") for h, c in HEADERS.items()
    },
    **{f"step {s!r}": edit(step=s) for s in (-1, "1", True, 1.5, None, [1], 10**30 + 0.5, KeyError)},
    **{
        f"groups {g!r}": edit(param_groups=g)
        for g in (
            [],
            {},
            None,
            KeyError,
            [GROUP] * 2,
            [{"params": [0]}],
            [{**GROUP, "lr": "x"}],
            [{**GROUP, "betas": 3}],
            [{**GROUP, "betas": ["a", "b"]}],
            [{**GROUP, "new": 1}],
            [{"lr": 0.1}],
            [3],
        )
    },
    **{
        f"scalars {s!r}": edit(scalars=s)
        for s in (3, None, {"a": 1}, {"9.x": 1}, {"-1.x": 1}, {"0.x": "y"}, {"x.y": 1}, KeyError)
    },
    "settings no object": edit(run=[1]),
    "state nested": write("state.json", b"[" * 100000),
    "state a list": write("state.json", b"[]"),
    "state empty": write("state.json", b""),
    "state bad UTF-8": write("state.json", b'{"step": "\xff"}'),
    "state giant integer": write("state.json", b'{"step": ' + b"9" * 5000 + b"}"),
    "another shape": tensors("trainable", weight=torch.ones(3, 3)),
    "a parameter less": tensors("trainable", weight=KeyError),
    "a parameter more": tensors("trainable", other=torch.ones(1)),
    "optimiser of another shape": tensors("optimizer", **{"0__exp_avg": torch.ones(9)}),
    "optimiser slot outside": tensors("optimizer", **{"7__exp_avg": torch.ones(2, 3)}),
    "optimiser slot without index": tensors("optimizer", zzz=torch.ones(1)),
    "no generator": tensors("rng", **{"0__cpu": KeyError}),
    "generator too short": tensors("rng", **{"0__cpu": torch.ones(9, dtype=torch.uint8)}),
    "generator of floats": tensors("rng", **{"0__cpu": torch.ones(5056)}),
    "a file less": lambda s: (s / "rng.safetensors").unlink(),
    "a file more": write("extra.bin", b"x"),
    "another file more": write("_more", b"x"),
    "a pickle beside": write("optimizer.pt", pickle.dumps(1)),
    "a folder beside": lambda s: (s / "more").mkdir(),
    "a link in place of a file": lambda s: (
        shutil.move(s / "rng.safetensors", s.parent / "r"),
        (s / "rng.safetensors").symlink_to("../r"),
    ),
}.items():
    case(f"state: {_what}", lambda folder, made, c=_change: forge(folder, c))


def manifest_case(what: str, content) -> None:
    def call(folder, made):
        state = checkpoint.save_checkpoint(folder / "step-00000001", *trained(), 1, {})
        files = json.loads((state / "manifest.json").read_text())["files"]
        (state / "manifest.json").write_bytes(content(files, state) if callable(content) else content)
        newest, skipped = checkpoint.latest_checkpoint(folder)
        assert newest is None
        assert not (folder / "ran").exists()
        raise CheckpointError(f"resume_from_checkpoint: got {skipped[0]}")

    case(f"manifest: {what}", call)


def named(name: str):
    """An intact manifest that names a file elsewhere, which is there and has that checksum."""

    def content(files, state):
        (state.parent / "evil").write_bytes(b"x")
        entry = [1, file_fingerprint(state.parent / "evil")]
        return checkpoint.manifest_text({**files, name.format(state.parent): entry}).encode()

    return content


for _what, _content in {
    "empty": b"",
    "rubbish": b"\xff\xff",
    "a list": b"[1]",
    "nested": b"[" * 100000,
    "null": b"null",
    "no files": b"{}",
    "out of the folder": named("../evil"),
    "absolute": named("{}/evil"),
    "null byte": named("a\0b"),
    "backslashes": named("..\\evil"),
    "a folder": named("."),
    "itself": named("manifest.json"),
    "files a list": b'{"checksum": "x", "files": [1]}',
    "sizes as text": lambda f, s: checkpoint.manifest_text({n: ["x", "y"] for n in f}).encode(),
    "sizes negative": lambda f, s: checkpoint.manifest_text({n: [-1, c] for n, (_, c) in f.items()}).encode(),
    "one number only": lambda f, s: checkpoint.manifest_text({n: [1] for n in f}).encode(),
    "no checksum": lambda f, s: json.dumps({"files": f}, sort_keys=True).encode(),
    "spaces added": lambda f, s: checkpoint.manifest_text(f).encode() + b" ",
    "too large": b" " * (files.MAX_JSON_BYTES + 2),
}.items():
    manifest_case(_what, _content)


def link_case(folder, made):
    checkpoint.save_checkpoint(folder / "elsewhere", *trained(), 1, {})
    (folder / "step-00000001").symlink_to("elsewhere")
    raise CheckpointError(f"resume_from_checkpoint: got {checkpoint.latest_checkpoint(folder)[1][0]}")


case("state: a link in place of the folder", link_case)
case(
    "state: a file in place of the folder",
    lambda f, m: ((f / "step-1").write_text("x"), forge(f, lambda s: shutil.rmtree(s))),
)


# ----------------------------------------------------------------------------------------------------------------------
# Models and reference scores


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def model_case(what: str, change, source: str | None = None) -> None:
    def call(folder, made):
        shutil.copytree(made / "lm", folder / "m")
        change(folder / "m")
        models.load_causal_lm(source if source is not None else str(folder / "m"))

    case(f"model: {what}", call)


def in_json(file: str, **changes):
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    return change


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin")


def remote_code(folder: Path) -> None:
    in_json("config.json", model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})(
        folder
    )
    (folder / "code.py").write_text("import os\nos.mkdir('ran')\n")


for _what, _change in {
    **{f"weights: {h}": write("model.safetensors", c) for h, c in HEADERS.items()},
    "a hostile pickle": as_pickle,
    "a pickle of that name": write("model.safetensors", pickle.dumps(Evil())),
    "code of its own": remote_code,
    "config empty": write("config.json", b""),
    "config bad UTF-8": write("config.json", b"\xff\xfe"),
    "config a list": write("config.json", b"[1]"),
    "config nested": write("config.json", b"[" * 100000),
    "config without type": write("config.json", b"{}"),
    "config of an unknown type": in_json("config.json", model_type="zzz"),
    "config with text as size": in_json("config.json", hidden_size="x"),
    "config of another size": in_json("config.json", hidden_size=64),
    "config with a negative size": in_json("config.json", vocab_size=-5),
    "config with a huge size": in_json("config.json", vocab_size=10**13),
    "tokenizer empty": write("tokenizer.json", b""),
    "tokenizer nested": write("tokenizer.json", b"[" * 100000),
    "tokenizer of rubbish": write("tokenizer.json", b"{}"),
    "a weight that is not finite": lambda f: save_file(
        {n: t * torch.nan for n, t in load_file(f / "model.safetensors").items()},
        f / "model.safetensors",
        metadata={"format": "pt"},
    ),
    "recipe empty": write(models.RECIPE, b""),
    "recipe a list": write(models.RECIPE, b"[1]"),
    "recipe nested": write(models.RECIPE, b"[" * 100000),
    "recipe ids text": write(models.RECIPE, b'{"compress_token_ids": "abc"}'),
    "recipe ids floats": write(models.RECIPE, b'{"compress_token_ids": [1.5]}'),
    "recipe decoder a number": write(models.RECIPE, b'{"compress_token_ids": [3], "decoder": 3}'),
}.items():
    if "not finite" in _what:

        def _call(folder, made, change=_change):
            shutil.copytree(made / "lm", folder / "m")
            change(folder / "m")
            Decoder(models.load_causal_lm(str(folder / "m"))[0])

        case(f"model: {_what}", _call)
    else:
        model_case(_what, _change)
for _z_index in (
    "",
    "a\0b",
    "../../etc",
    "/dev/null",
    "/etc/passwd",
    "http://localhost/m",
    "x" * 5000,
    "a b",
    "nobody/nothing",
):
    model_case(f"named {_z_index[:20]!r}", lambda f: None, _z_index)


def reference_case(what: str, change) -> None:
    def call(folder, made):
        path, identity = folder / "r.safetensors", {"data": "a", "model": "b", "tokenizer": "c"}
        reference_scores.save_ref_logps(path, torch.ones(3), torch.ones(3, 2), identity)
        change(path, identity)
        reference_scores.load_ref_logps(path, identity)

    case(f"ref_logps: {what}", call)


for _what, _content in HEADERS.items():
    reference_case(_what, lambda p, i, c=_content: p.write_bytes(c))
reference_case("one bit", lambda p, i: p.write_bytes(p.read_bytes()[:-1] + b"\x01"))
reference_case("of other data", lambda p, i: i.update(data="x"))
reference_case("without its tensors", lambda p, i: save_file({"x": torch.ones(1)}, p, metadata={**i, "checksum": "x"}))
reference_case("a folder", lambda p, i: (p.unlink(), p.mkdir()))
reference_case("a link to itself", lambda p, i: (p.unlink(), p.symlink_to(p)))


# ----------------------------------------------------------------------------------------------------------------------
# Runs and commands

BLOCKED = ["/proc/none/out", "/dev/null/out", "{made}/texts.txt/out", "{made}/texts.txt", "/sys/out", "x" * 300]
for _out in BLOCKED:

    def _call(folder, made, out=_out):
        fields = {"model": str(made / "lm"), "train_data": str(made / "one.jsonl"), "output_dir": out.format(made=made)}
        train(Config(stage=1, max_steps=1, batch_size=2, precision="fp32", **fields))

    case(f"output_dir {_out[:24]}", _call)
    case(f"export to {_out[:24]}", lambda f, m, o=_out: halves()[0].save_pretrained(o.format(made=m)))

COMMANDS = [
    "train",
    "train none.yaml",
    "train --stage 1",
    "train {made}/texts.txt",
    "train --stage 3 --model m --train_data d --output_dir o",
    "train --stage 1 --model {made}/lm --train_data none.jsonl --output_dir {tmp}/o",
    "train --stage 1 --model {made}/lm --train_data {made}/two.jsonl --output_dir {tmp}/o",
    "train --stage 2 --model {made}/lm --train_data {made}/one.jsonl --output_dir {tmp}/o",
    "train --stage 1 --model {made}/none --train_data {made}/one.jsonl --output_dir {tmp}/o",
    "train --stage 1 --model {made}/lm --train_data {made}/one.jsonl --output_dir {made}/texts.txt",
    "{run} --max_length 4",
    "{run} --max_length 99999",
    "{run} --num_compress_tokens 99999999999",
    "{run} --log_with nothing",
    "{run} --lora_rank 2 --lora_targets nothing",
    "{run} --gguf_file none.gguf",
    "{run} --decoder {made}/none",
    "{run} --eval_data {made}/two.jsonl",
    "{run} --attention flash_attention_2",
    "{run} --stage 2 --train_data {made}/two.jsonl --ref_logps_file {made}/texts.txt",
    "encode {made}/e --texts {made}/none --output e.safetensors",
    "encode {made}/e --texts {made} --output e.safetensors",
    "encode {made}/e --texts {made}/lm/model.safetensors --output e.safetensors",
    "encode {made}/e {texts} none/e.safetensors",
    "encode {made}/e {texts} .",
    "encode {made}/e {texts} /dev/full",
    "encode {made}/e {texts} /proc/e",
    "encode {made}/lm/config.json {texts} e.safetensors",
    "encode {made}/none {texts} e.safetensors",
    "encode {tmp}/pickled {texts} e.safetensors",
    "eval {made}/e",
    "eval {made}/e --sts none.csv",
    "eval {made}/e --sts {made}/one.jsonl",
    "eval {made}/e --corpus {made}/one.jsonl",
    "eval {made}/none --sts {tmp}/sts.jsonl",
    "eval {made}/e --sts {tmp}/sts.jsonl --json_file /proc/none",
    "eval {made}/e --sts {tmp}/sts.jsonl --json_file {made}",
    "bench --compare none.json",
    "bench --compare {made}/texts.txt",
    "bench --device tpu",
    "bench --suite nothing",
]


def command_case(line: str) -> None:
    def call(folder, made):
        write_jsonl(folder / "sts.jsonl", [{"sentence1": "a", "sentence2": "b", "score": i} for i in range(2)])
        if "{tmp}/pickled" in line:
            shutil.copytree(made / "e", folder / "pickled")
            (folder / "pickled" / "model.safetensors").unlink()
            torch.save({"embed_tokens.weight": Evil()}, folder / "pickled" / "pytorch_model.bin")
        run = f"train --stage 1 --model {made}/lm --train_data {made}/one.jsonl --output_dir {folder}/o"
        texts = f"--texts {made}/texts.txt --output"
        found = io.StringIO()
        with contextlib.redirect_stderr(found), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = main(line.format(made=made, tmp=folder, run=run, texts=texts).split())
            except SystemExit as stop:
                status = stop.code
        assert status == 2
        assert "Traceback" not in found.getvalue()
        assert not (folder / "e.safetensors").exists()
        printed = next(
            (x for x in found.getvalue().splitlines() if re.match(r"\w+(Error|Unavailable|Mismatch)?: ", x)),
            found.getvalue(),
        )
        raise ValueError(f"command: got {printed}")

    case(f"command: {line.replace('{made}/', '')}"[:90], call)


for _line in COMMANDS:
    command_case(_line)

CASES_NAMES.extend(CASES)


# ----------------------------------------------------------------------------------------------------------------------
# Random input


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]),
)
def test_any_bytes_are_rows_or_a_typed_error(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = "data: got rows"
    try:
        load("one", tmp_path / name)
    except TYPED as error:
        message = str(error)
    assert message.startswith("data: got "), message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), file=st.sampled_from([*checkpoint.CHECKPOINT_FILES, "manifest.json"]))
def test_any_bytes_in_a_state_are_refused(content, file, tmp_path):
    state = tmp_path / "step-00000001"
    if not state.exists():
        checkpoint.save_checkpoint(state, *trained(), 1, {})
    good = (state / file).read_bytes()
    (state / file).write_bytes(content)
    try:
        assert checkpoint.latest_checkpoint(tmp_path)[0] is None or content == good
    finally:
        (state / file).write_bytes(good)


numbers = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5)
values = st.recursive(
    numbers, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=5
)


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from(list(Config.__dataclass_fields__)), value=values)
def test_any_value_of_a_field_is_taken_or_named(field, value):
    message = "all: got good"
    try:
        Config(**{**FIELDS, field: value})
    except ValueError as error:
        message = str(error)
    assert re.match(r"\w+: got ", message), message


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), BIG) | st.integers(-3, 12), min_size=1, max_size=6))
def test_any_bounds_are_right_or_refused(bounds):
    x, weight, target = torch.ones(4, 8), torch.ones(9, 8), torch.arange(4)
    good = bounds[0] == 0 and bounds[-1] == 4 and bounds == sorted(bounds)
    for impl in ("torch", "reference"):
        with contextlib.nullcontext() if good else pytest.raises(ValueError, match=r"^cu_seqlens: got"):
            found = ops.linear_logprob(x, weight, target, cu_seqlens=torch.tensor(bounds), impl=impl)
            assert found.shape == (len(bounds) - 1,)


def test_what_is_unusual_but_right_is_read(tmp_path):
    """A BOM, CRLF, NUL within a string, texts of one emoji, numbers spelt as text: nobody's mistake."""
    rows = [{"context": "a\0b", "output": "\U0001f600"}, {"context": "12", "output": "null"}]
    text = "\r\n".join(json.dumps(r) for r in rows) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert list(data.load_rows(str(tmp_path / "a.jsonl"))) == rows
    (tmp_path / "b.csv").write_bytes("\ufeffcontext,output\r\na,b\r\n".encode())
    assert list(data.load_rows(str(tmp_path / "b.csv"))) == [{"context": "a", "output": "b"}]
    (tmp_path / "c.csv").write_bytes(b"context,output\n007,1e5\n")
    assert list(data.load_rows(str(tmp_path / "c.csv"))) == [{"context": "007", "output": "1e5"}]
    assert "trust_remote_code" in inspect.signature(models.load_causal_lm).parameters
    assert Config(**FIELDS).trust_remote_code is False
