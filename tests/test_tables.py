"""Files are read as they were written, or refused by file and line."""

import csv
import gzip
import io
import json
import os

import datasets
import pytest
from conftest import sentence, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoregembed import data, tables
from autoregembed.prompt import Prompt
from autoregembed.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
PROMPT = Prompt(tokenizer=TOKENIZER, num_compress_tokens=3, bos_token_id=1, instruction="Again:")


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


# ----------------------------------------------------------------------------------------------------------------------
# Round trips

texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["007", "1e5", "null", "2024-03-01", '"', ""]
)
names = st.lists(st.text("abcxyz_-1", min_size=1, max_size=5), min_size=2, max_size=4, unique=True)


@st.composite
def tables_of_text(draw, alphabet=texts):
    columns = draw(names)
    rows = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(columns, alphabet)), min_size=1, max_size=5))
    return rows


def read(path) -> list[dict]:
    return [row for _, row in tables.read_rows([str(path)])]


fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fast
@given(rows=tables_of_text(), end=st.sampled_from(["\n", "\r\n"]), packed=st.booleans(), bom=st.booleans())
def test_csv_gives_back_every_text(rows, end, packed, bom, tmp_path):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    content = (("\ufeff" if bom else "") + file.getvalue()).encode()
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read(path) == rows


@fast
@given(rows=tables_of_text(texts.map(lambda t: t.translate({9: None, 10: None, 13: None}))), blank=st.booleans())
def test_tsv_gives_back_every_text(rows, blank, tmp_path):
    lines = ["\t".join(rows[0]), *("\t".join(row[name] for name in rows[0]) for row in rows)]
    (tmp_path / "a.tsv").write_bytes(("\n".join(lines) + "\n" * (1 + 2 * blank)).encode())
    assert read(tmp_path / "a.tsv") == rows


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts, st.lists, max_leaves=4
)


@fast
@given(
    rows=st.lists(st.dictionaries(texts, values, min_size=1, max_size=4), min_size=1, max_size=5), ascii=st.booleans()
)
def test_json_gives_back_every_value(rows, ascii, tmp_path):
    lines = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    (tmp_path / "a.json").write_text("[" + ",\n".join(lines) + "]", encoding="utf-8", newline="")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json") == rows
    (tmp_path / "b.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert read(tmp_path / "b.json") == rows


@fast
@given(content=st.binary(max_size=60) | st.text('{}[]",:\\ab1\n\t\r', max_size=60).map(str.encode),
       name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.csv.gz"]))  # fmt: skip
def test_any_bytes_are_rows_or_an_error_that_names_the_file(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    message, rows = f"data: got {str(tmp_path / name)!r}", []
    try:
        rows = read(tmp_path / name)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"data: got {str(tmp_path / name)!r}")
    assert all(isinstance(row, dict) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# What a general loader gets wrong


def test_types_may_change_late_in_a_file(tmp_path):
    """Beyond the first block that a loader looks at: a list, a text where there was null, a column that is new."""
    long = {"query": "x " * 300, "pos": "p", "neg": None}
    late = [
        {"query": "q", "pos": ["a", "b"], "neg": ["n"]},
        {"query": "q", "pos": "p", "neg": [], "instruction": "Find."},
    ]
    rows = data.load_rows(write_jsonl(tmp_path / "a.jsonl", [*[long] * 3000, *late]))
    assert [rows[-2], rows[-1], rows[0]] == [*late, long]
    found = data.alignment_rows(rows, PROMPT)
    assert [text(found[i]["positive_ids"]) for i in (-3, -2, -1)] == ["a", "b", "p"]
    assert [len(found[i]["negative_ids"]) for i in (0, -3, -2, -1)] == [0, 1, 1, 0]
    assert text(found[-1]["suffix_ids"]) == "\nFind.\n"


@pytest.mark.parametrize(
    "name", ["set[1].jsonl", "v?.csv", "a*b.tsv", "x{1,2}.parquet", "a b%20#.json", "é[!a].jsonl.gz"]
)
def test_names_are_no_patterns(name, tmp_path):
    rows = [{"context": "the", "output": "cat"}]
    for n, other in enumerate(
        [name, *(name.replace(c, "1") for c in "?*" if c in name), "set1.jsonl", "x1.parquet"], 1
    ):
        path, many = tmp_path / other, rows * n
        kind = tables.file_kind(other)
        if kind == ".parquet":
            datasets.Dataset.from_list(many).to_parquet(str(path))
        elif kind in (".csv", ".tsv"):
            mark = "\t" if kind == ".tsv" else ","
            path.write_text(f"context{mark}output\n" + f"the{mark}cat\n" * n)
        else:
            content = "".join(json.dumps(r) + "\n" for r in many).encode()
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert list(data.load_rows(str(tmp_path / name))) == rows


def test_a_file_with_the_old_time_and_size_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"

    def load(word: str) -> str:
        write_jsonl(path, [{"context": word, "output": word}])
        os.utime(path, ns=(10**18, 10**18))
        return text(data.compression_rows(data.load_rows(str(path)), PROMPT)[0]["text_ids"])

    assert [load("cat"), load("mat"), load("cat")] == ["cat", "mat", "cat"]


def test_quotation_marks_of_a_tsv_swallow_no_rows(tmp_path):
    (tmp_path / "a.tsv").write_text('context\toutput\n"the\tcat\nold\train"\n')
    assert read(tmp_path / "a.tsv") == [{"context": '"the', "output": "cat"}, {"context": "old", "output": 'rain"'}]


def test_texts_of_any_length_are_read(tmp_path):
    long = "a" * 300_000
    (tmp_path / "a.csv").write_text(f"context,output\n{long},b\n")
    assert read(tmp_path / "a.csv") == [{"context": long, "output": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", "line 3: it has 1 cells, expected 2"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2: it has 3 cells, expected 2"),
        ("a.csv", b'a,b\n1,"x\n\ny"\n3\n', "line 5: it has 1 cells"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', "line 2: unexpected end of data"),
        ("a.csv", b"a,a\n1,2\n", "line 1: it has the column 'a' twice"),
        ("a.tsv", b"a\tb\n\n1\t2\t3\n", "line 3: it has 3 cells"),
        ("a.tsv", b"a\tb\n1\t\xff\n", "line 2: 'utf-8' codec can't decode byte 0xff in position 2"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', "line 3: it holds a list, expected an object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: 'utf-8' codec can't decode byte 0xe9 in position 7"),
        ("a.jsonl", b'{"a": {"b": 1, "b": 2}}\n', "line 1: it has the key 'b' twice"),
        ("a.jsonl", b'{"a": "\\ud83d"}\n', "line 1: 'utf-8' codec can't encode"),
        ("a.json", b'[{"a": 1}, 2]', "item 2: it holds a int"),
        ("a.json", b'[{"a": 1}', "Expecting"),
    ],
)
def test_the_line_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^data: got ") as error:
        data.load_rows(str(tmp_path / name))
    assert f"{name}', which cannot be read: {message}" in str(error.value)


def test_dates_of_parquet_are_no_texts(tmp_path):
    import datetime

    day = datetime.date(2024, 3, 1)
    datasets.Dataset.from_dict({"context": ["When?"], "output": [day]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(TypeError, match=r"^data: got {'date.*as 'output' in row 0 \(row 1 of 'a.parquet'\)"):
        data.compression_rows(data.load_rows(str(tmp_path / "a.parquet")), PROMPT)


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def test_several_files_are_one_data_set(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"context": "the", "output": "cat"}])
    (tmp_path / "two.csv").write_text("context,output\nold,rain\n")
    two = str(tmp_path / "two.csv")
    for source in ([one, two], f"{one},{two}", f"{one}, {two}"):
        assert [row["context"] for row in data.load_rows(source)] == ["the", "old"]
    comma = write_jsonl(tmp_path / "a,b.jsonl", [{"context": "a", "output": "b"}])
    assert len(data.load_rows(comma)) == 1
    with pytest.raises(FileNotFoundError, match=r"none.jsonl', which does not exist"):
        data.load_rows(f"{one},{tmp_path / 'none.jsonl'}")
    with pytest.raises(ValueError, match=r"^data: got the folder .*one.jsonl"):
        data.load_rows(str(tmp_path))


def beir(folder, qrels: str):
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": 1, "title": "old", "text": "rain"}, {"_id": "002", "title": "", "text": "the cat"}]
    write_jsonl(folder / "corpus.jsonl", [*documents, {"_id": "x", "text": 5}])
    write_jsonl(folder / "queries.jsonl", [{"_id": 7, "text": "dusk"}, {"_id": "8", "text": "hills"}])
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return str(folder)


def test_a_beir_folder_is_training_data(tmp_path):
    folder = beir(tmp_path / "set", "7\t1\t2\n7\t002\t0\n7\tgone\t1\n8\tgone\t1\n")
    with pytest.warns(UserWarning, match=r"^data: 2 documents that .* names are not in the corpus; 1 queries"):
        rows = data.load_rows(folder)
    assert list(rows) == [{"query": "dusk", "pos": ["old rain"], "neg": ["the cat"]}]
    with pytest.raises(FileNotFoundError, match=r"expected a train_split among those there: train$"):
        data.load_rows(folder, "dev")
    unknown = beir(tmp_path / "other", "9\t1\t1\n")
    with pytest.raises(ValueError, match=r"^data: got query '9' in"):
        data.load_rows(unknown)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", [{"context": "a", "output": "b"}])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/cache")
    with pytest.raises(OSError, match=r"^HF_DATASETS_CACHE: got '/proc/cache', where nothing can be written"):
        data.load_rows(file)


# ----------------------------------------------------------------------------------------------------------------------
# Columns


def align(rows: list[dict], tmp_path, **options) -> list[dict]:
    prompt = Prompt(**{**vars(PROMPT), **options.pop("prompt", {})})
    found = data.alignment_rows(data.load_rows(write_jsonl(tmp_path / "a.jsonl", rows)), prompt, **options)
    read = ("query_ids", "positive_ids", "suffix_ids")
    many = ("negative_ids", "passage_suffix_ids", "target_ids")
    return [{n: text(r[n]) for n in read} | {n: [text(x) for x in r[n]] for n in many} for r in found]


@pytest.mark.parametrize(
    "columns",
    [
        {"negative_1": "a", "negative_2": "b"},
        {"negative_2": "b", "negative_10": None, "negative_1": "a", "negative_3": ""},
        {"neg1": "a", "neg2": ["b"]},
        {"neg_1": "a", "neg_2": "b"},
        {"hard_negative_1": ["a", "b"]},
        {"negatives": ["a", "b"]},
        {"hard_negatives": ["a"], "hard_negative_2": "b"},
        {"negative": "a", "negative_1": "b"},
    ],
)
def test_negatives_may_have_columns_of_their_own(columns, tmp_path):
    for names in (("anchor", "positive"), ("query", "pos"), ("query", "positive")):
        (row,) = align([{names[0]: "the", names[1]: "cat", **columns}], tmp_path)
        assert row["negative_ids"] == ["a", "b"]
        assert row["target_ids"] == ["cat", "a", "b"]


def test_columns_can_be_mapped(tmp_path):
    row = {"question": "the", "answer": "cat", "bad": "old", "task": "Find.", "note": "rain fell", "id": "a7"}
    columns = {"query": "question", "pos": "answer", "negative_1": "bad", "instruction": "task"}
    (found,) = align([row], tmp_path, columns=columns)
    assert (found["query_ids"], found["target_ids"]) == ("the", ["cat", "old"])
    assert found["suffix_ids"] == found["passage_suffix_ids"][1] == "\nFind.\n"
    rows = data.load_rows(write_jsonl(tmp_path / "b.jsonl", [{"text": "the cat"}]))
    same = data.compression_rows(rows, PROMPT, columns={"context": "text", "output": "text"})
    assert text(same[0]["text_ids"]) == text(same[0]["target_ids"]) == "the cat"
    for wrong, message in (
        ({"query": "quest", "pos": "answer"}, r"^data: got columns .*expected \['quest'\] too"),
        ({"qurey": "question", "pos": "answer"}, r"^columns: got 'qurey', expected query"),
    ):
        with pytest.raises(ValueError, match=message):
            align([row], tmp_path, columns=wrong)


@pytest.mark.parametrize(
    "extra",
    [
        {"answer": "a cat"}, {"bad": ["old"]}, {"bad_passages": [{"text": "rain"}]}, {"label": 0}, {"score": 0.2},
        {"title": "old"}, {"context_2": "雨"},
    ],
)  # fmt: skip
def test_what_looks_like_data_is_not_ignored(extra, tmp_path):
    good = {"query": "the", "pos": "cat"}
    with pytest.raises(ValueError, match=r"^data: got the unknown columns .* in row 1 \(line 2 of 'a.jsonl'\), expe"):
        align([good, {**good, **extra}], tmp_path)
    assert len(align([good, {**good, **extra}], tmp_path, columns={"query": "query"})) == 2


def test_what_is_harmless_is_ignored(tmp_path):
    known = {"pos_scores": [0.5], "neg_scores": [0.1], "id": "a7", "source": "snli", "lang": "en", "n": 3, "note": None}
    more = {"type": "normal", "date": "2024-03-01", "flag": "True", "pos_id": ["p1"], "metadata": {"author": "me"}}
    assert len(align([{"query": "the", "pos": "cat", **known, **more, "context": "of stage 1"}], tmp_path)) == 1
    rows = data.load_rows(write_jsonl(tmp_path / "b.jsonl", [{"context": "a", "output": "b", "prompt": "Find: "}]))
    with pytest.raises(ValueError, match=r"^data: got the unknown columns \['prompt'\]"):
        data.compression_rows(rows, PROMPT)


def test_prompts_stand_before_the_texts_of_their_side(tmp_path):
    rows = [
        {"query": "the cat", "pos": "a mat", "neg": ["rain"]},
        {"query": "the cat", "pos": "a mat", "neg": ["rain"], "prompt": "old ", "instruction": "Find."},
    ]
    sides = {"query_instruction": "green ", "passage_instruction": "stone "}
    first, second = align(rows, tmp_path, prompt=sides)
    assert (first["query_ids"], first["positive_ids"], first["negative_ids"]) == (
        "green the cat",
        "stone a mat",
        ["stone rain"],
    )
    assert second["query_ids"] == "old the cat"
    assert second["target_ids"] == ["a mat", "rain"]  # what the decoder scores is the text alone
    assert (first["suffix_ids"], second["passage_suffix_ids"][0]) == ("\nAgain:\n", "\nFind.\n")
    with pytest.raises(ValueError, match="empty 'query' in row 0"):
        align([{**rows[0], "query": ""}], tmp_path, prompt=sides)


def test_pairs_keep_the_instruction_of_each_text(tmp_path):
    (row,) = align([{"query": ["Ask.", "the"], "pos": ["Match.", "cat"], "neg": ["Other.", "rain"]}], tmp_path)
    assert (row["suffix_ids"], row["passage_suffix_ids"]) == ("\nAsk.\n", ["\nMatch.\n", "\nOther.\n"])
