import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import sentence, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed import data, sampling
from autoregembed.packing import make_microbatches
from autoregembed.prompt import Prompt
from autoregembed.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])


def prompt(**options) -> Prompt:
    fixed = {"tokenizer": TOKENIZER, "num_compress_tokens": 3, "bos_token_id": 1, "instruction": "Again:"}
    return Prompt(**{**fixed, **options})


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


ROWS = [{"context": '"cat", the "mat', "output": "NA"}, {"context": "'rain, fell", "output": "null, or 12"}]


def write(path: Path) -> str:
    """ROWS in the format that the file's name says."""
    import datasets

    name = path.name.removesuffix(".gz")
    plain = path.with_name(name)
    if name.endswith(".jsonl"):
        write_jsonl(plain, ROWS)
    elif name.endswith(".json"):
        plain.write_text(json.dumps(ROWS))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(plain)
    elif name.endswith(".tsv"):
        plain.write_text("".join("\t".join(cells) + "\n" for cells in (ROWS[0], *(r.values() for r in ROWS))))
    else:
        datasets.Dataset.from_list(ROWS).to_csv(plain)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.CSV", "a.tsv.gz"]
)
def test_every_format_gives_the_same_rows(name, streaming, tmp_path):
    rows = data.load_rows(write(tmp_path / name), streaming=streaming)
    assert list(rows) == ROWS
    tokenised = list(data.compression_rows(rows, prompt()))
    assert [text(r["text_ids"]) for r in tokenised] == [r["context"] for r in ROWS]
    assert [text(r["target_ids"]) for r in tokenised] == [r["output"] for r in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            "a.jsonl",
            '{"context": "x"\n{bad',
            ValueError,
            r"a\.jsonl', which cannot be read: line 1: Expecting",
        ),
        ("a.jsonl", "", ValueError, "it has no rows"),
        ("a.json", "[]", ValueError, "it has no rows"),
        ("a.csv", "context,output\n", ValueError, "it has no rows"),
        ("a.csv", "", ValueError, "cannot be read"),
        ("a.parquet", "junk", ValueError, "cannot be read: Parquet"),
        ("a.jsonl.gz", "junk", ValueError, "cannot be read: Not a gzipped file"),
        ("a.dat", "hello", ValueError, r"expected files ending in \.jsonl"),
        ("noending", "hello", ValueError, "expected files ending in"),
    ],
)
def test_files_that_hold_no_rows_are_refused(name, content, error, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=rf"^data: got .*{message}"):
        data.load_rows(str(tmp_path / name))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data: got .*, which does not exist"):
        data.load_rows(str(tmp_path / "none.jsonl"))


def test_an_empty_stream_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("context,output\n")
    rows = data.load_rows(str(tmp_path / "a.csv"), streaming=True)
    with pytest.raises(ValueError, match=r"^data: got .*, which cannot be read: it has no rows"):
        data.compression_rows(rows, prompt())


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def compression(rows, tmp_path, **options):
    return list(data.compression_rows(data.load_rows(write_jsonl(tmp_path / "a.jsonl", rows)), prompt(**options)))


def alignment(rows, tmp_path, **options):
    return list(data.alignment_rows(data.load_rows(write_jsonl(tmp_path / "a.jsonl", rows)), prompt(**options)))


def test_compression_rows_take_their_own_instruction_or_the_default(tmp_path):
    rows = [
        {"context": "the cat", "output": "a mat", "instruction": "Where?"},
        {"context": "rain fell", "output": "dusk"},
    ]
    first, second = compression(rows, tmp_path)
    assert [text(first[c]) for c in ("text_ids", "suffix_ids", "target_ids")] == ["the cat", "\nWhere?\n", "a mat"]
    assert text(second["suffix_ids"]) == "\nAgain:\n"


def texts_of(row) -> dict:
    return {
        "query": text(row["query_ids"]),
        "pos": text(row["positive_ids"]),
        "neg": [text(t) for t in row["negative_ids"]],
        "instruction": text(row["suffix_ids"]).strip("\n"),
        "target": [text(t) for t in row["target_ids"]],
    }


Q, P, N = "the cat", "a mat", "old rain"


@pytest.mark.parametrize(
    ("row", "instruction", "negatives"),
    [
        ({"query": Q, "pos": P, "neg": N}, "Again:", [N]),
        ({"query": Q, "pos": [P], "neg": [N, Q]}, "Again:", [N, Q]),
        ({"query": Q, "pos": P, "neg": []}, "Again:", []),
        ({"query": Q, "pos": P, "neg": None}, "Again:", []),
        ({"query": Q, "pos": P}, "Again:", []),
        ({"query": Q, "pos": P, "neg": [N], "instruction": "Match."}, "Match.", [N]),
        ({"query": Q, "pos": P, "neg": [N], "instruction": None}, "Again:", [N]),
        ({"query": ["Match.", Q], "pos": ["x", P], "neg": ["x", N]}, "Match.", [N]),
        ({"query": ["Match.", Q], "pos": ["x", P]}, "Match.", []),
        ({"anchor": Q, "positive": P, "negative": N}, "Again:", [N]),
        ({"anchor": Q, "positive": P}, "Again:", []),
    ],
)
def test_alignment_rows_of_every_format(row, instruction, negatives, tmp_path):
    (found,) = alignment([row], tmp_path)
    expected = {"query": Q, "pos": P, "neg": negatives, "instruction": instruction, "target": [P, *negatives]}
    assert texts_of(found) == expected


def test_several_positives_make_several_rows(tmp_path):
    found = alignment([{"query": Q, "pos": [P, N], "neg": ["dusk"]}, {"query": N, "pos": [Q], "neg": []}], tmp_path)
    assert [(texts_of(r)["query"], texts_of(r)["pos"], texts_of(r)["neg"]) for r in found] == [
        (Q, P, ["dusk"]),
        (Q, N, ["dusk"]),
        (N, Q, []),
    ]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"context": "x"}], ValueError, r"\['context'\].*missing \['output'\]"),
        ([{"context": "x", "output": "y"}, {"context": "", "output": "y"}], ValueError, "empty 'context' in row 1"),
        ([{"context": "x", "output": ""}], ValueError, "empty 'output' in row 0"),
        ([{"context": "x", "output": "y"}, {"context": None, "output": "y"}], TypeError, "None as 'context' in row 1"),
        (
            [{"context": 3, "output": "y"}],
            TypeError,
            r"3 as 'context' in row 0 \(line 1 of 'a.jsonl'\)",
        ),
        ([{"context": ["x", "y"], "output": "y"}], TypeError, "as 'context' in row 0.*, expected a string"),
        ([{"context": "x", "output": "y", "instruction": 5}], TypeError, "5 as 'instruction' in row 0"),
    ],
)
def test_compression_rows_refuse(rows, error, message, tmp_path):
    with pytest.raises(error, match=rf"^data: got .*{message}"):
        compression(rows, tmp_path)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            [{"query": Q, "answer": P}],
            ValueError,
            r"expected {query, pos} or {anchor, positive}.*; missing \['pos'\]",
        ),
        ([{"query": Q, "pos": [], "neg": [N]}], ValueError, "empty 'pos' in row 0"),
        ([{"query": Q, "pos": None, "neg": [N]}], TypeError, "None as 'pos' in row 0"),
        ([{"query": Q, "pos": P, "neg": [""]}], ValueError, "empty 'neg' in row 0"),
        ([{"query": Q, "pos": P, "neg": [None, N]}], TypeError, "as 'neg' in row 0"),
        ([{"query": "", "pos": P}], ValueError, "empty 'query' in row 0"),
        ([{"query": None, "pos": P}], TypeError, "None as 'query' in row 0"),
        ([{"anchor": Q, "positive": P, "negative": 5}], TypeError, "5 as 'negative' in row 0"),
        (
            [{"query": ["Match.", Q, P], "pos": ["x", P]}],
            ValueError,
            r"as 'query' in row 0.*\[instruction, text\] pair",
        ),
        ([{"query": ["Match.", Q], "pos": "ab"}], ValueError, "'ab' as 'pos' in row 0"),
        ([{"query": ["Match.", Q], "pos": ["x", P], "neg": [N]}], ValueError, "as 'neg' in row 0"),
    ],
)
def test_alignment_rows_refuse(rows, error, message, tmp_path):
    with pytest.raises(error, match=rf"^data: got .*{message}"):
        alignment(rows, tmp_path)


@pytest.mark.parametrize("bos", [None, 1])
def test_truncation_keeps_instruction_and_compress_tokens(bos, tmp_path):
    long = sentence(0, 80)
    suffix = ids("\nAgain:\n")
    options = {"max_length": len(suffix) + 3 + 10 + (bos is not None), "max_target_length": 4, "bos_token_id": bos}
    (row,) = compression([{"context": long, "output": long}], tmp_path, **options)
    assert row["text_ids"] == ids(long)[:10]
    assert row["suffix_ids"] == suffix
    assert row["target_ids"] == ids(long)[:4]
    (row,) = alignment([{"query": long, "pos": long, "neg": [long, "dusk"]}], tmp_path, **options)
    assert row["query_ids"] == row["positive_ids"] == row["negative_ids"][0] == ids(long)[:10]
    assert row["negative_ids"][1] == ids("dusk")
    assert row["target_ids"] == [ids(long)[:4], ids(long)[:4], ids("dusk")[:4]]


def test_an_instruction_that_leaves_no_room_is_refused(tmp_path):
    least = len(ids("\nAgain:\n")) + 3 + 1 + 1
    assert compression([ROWS[0]], tmp_path, max_length=least)[0]["text_ids"] == ids(ROWS[0]["context"])[:1]
    with pytest.raises(ValueError, match=rf"^max_length: got {least - 1}, expected at least {least}.* in row 0 \("):
        compression([ROWS[0]], tmp_path, max_length=least - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenised once


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self):
        self.calls = 0
        self.backend_tokenizer = TOKENIZER.backend_tokenizer

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return TOKENIZER(*args, **kwargs)


def test_tokenised_rows_are_cached_by_data_and_prompt(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)

    def calls(source=file, tokenise=data.compression_rows, **options) -> int:
        counting = Counting()
        rows = tokenise(data.load_rows(source), prompt(tokenizer=counting, **options))
        assert len(rows) == 2
        return counting.calls

    assert calls() > 0
    assert calls() == 0
    for change in (
        {"instruction": "Other."},
        {"max_length": 40},
        {"max_target_length": 3},
        {"bos_token_id": None},
        {"num_compress_tokens": 4},
    ):
        assert calls(**change) > 0, change
    assert calls() == 0
    other = write_jsonl(tmp_path / "b.jsonl", [ROWS[0], {"context": "the", "output": "cat"}])
    assert calls(other) > 0
    both = write_jsonl(tmp_path / "c.jsonl", [{**r, "query": Q, "pos": P} for r in ROWS])
    assert calls(both) > 0
    assert calls(both, data.alignment_rows) > 0


def test_another_tokenizer_misses_the_cache(tmp_path):
    rows = data.load_rows(write_jsonl(tmp_path / "a.jsonl", ROWS))
    other = tiny_tokenizer(["dusk " * 9])
    one, two = (data.compression_rows(rows, prompt(tokenizer=t)) for t in (TOKENIZER, other))
    assert one[1]["text_ids"] != two[1]["text_ids"]
    assert two[1]["text_ids"] == other(ROWS[1]["context"], add_special_tokens=False)["input_ids"]


def test_several_processes_give_the_same_rows_in_order(tmp_path):
    rows = [{"context": sentence(i, 3), "output": sentence(i, 2), "instruction": f"Do {i}."} for i in range(2001)]
    loaded = data.load_rows(write_jsonl(tmp_path / "a.jsonl", rows))
    many = data.compression_rows(loaded, prompt(), num_proc=2)
    assert [text(t) for t in many["text_ids"]] == [r["context"] for r in rows]
    assert [text(t) for t in many["suffix_ids"]] == [f"\n{r['instruction']}\n" for r in rows]


def test_the_content_fingerprint_is_that_of_ids_and_their_order(tmp_path):
    def fingerprint(rows):
        return data.content_fingerprint(
            data.compression_rows(data.load_rows(write_jsonl(tmp_path / "a.jsonl", rows)), prompt())
        )

    a = fingerprint(ROWS)
    assert fingerprint([{**r, "other": 1} for r in ROWS]) == a
    assert fingerprint(ROWS[::-1]) != a
    assert fingerprint([ROWS[0], {**ROWS[1], "output": "12"}]) != a


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def numbered(n: int, streaming: bool = False):
    from datasets import Dataset

    rows = Dataset.from_list([{"value": 10 * i} for i in range(n)])
    return rows.to_iterable_dataset() if streaming else rows


def take(rows, steps: int, size: int, **options) -> list[list[int]]:
    found = sampling.batches(rows, size, **options)
    return [[row["value"] // 10 for row in next(found)] for _ in range(steps)]


@given(n=st.integers(1, 12), size=st.integers(1, 7), world=st.integers(1, 3), start=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_batches_are_a_function_of_seed_and_step_and_ranks_share_them(n, size, world, start):
    rows = numbered(n)
    whole = take(rows, 8, size * world, seed=3)
    for rank in range(world):
        part = take(rows, 3, size, seed=3, start=start, rank=rank, world=world)
        assert part == [step[rank * size : (rank + 1) * size] for step in whole[start : start + 3]]
    read = [i for step in whole for i in step]
    for epoch in range(len(read) // n):
        assert sorted(read[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_carry_their_row_and_change_with_epoch_and_seed():
    rows = numbered(20)
    first = next(sampling.batches(rows, 4, seed=0))
    assert all(row["row"] * 10 == row["value"] for row in first)
    read = [i for step in take(rows, 10, 4, seed=0) for i in step]
    assert read[:20] != read[20:]
    assert read[:20] != list(range(20))
    assert take(rows, 5, 4, seed=1) != take(rows, 5, 4, seed=0)


@pytest.mark.parametrize("world", [1, 3])
def test_streamed_batches_share_the_stream_and_resume(world):
    rows = numbered(10, streaming=True)
    whole = take(rows, 10, 2 * world, seed=0)
    for rank in range(world):
        found = take(rows, 4, 2, seed=0, start=2, rank=rank, world=world)
        assert found == [step[rank * 2 : rank * 2 + 2] for step in whole[2:6]]
    read = [i for step in whole for i in step]
    assert Counter(read[:10]) == Counter(range(10))
    assert read[:10] != read[10:20]


def test_a_stream_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"^data: got no rows in the stream"):
        next(sampling.batches(numbered(1, streaming=True).filter(lambda row: False), 2, seed=0))


@given(st.lists(st.integers(1, 50), max_size=20), st.one_of(st.none(), st.integers(1, 80)))
@settings(deadline=None)
def test_cut_puts_every_row_into_one_part_within_the_budget(lengths, budget):
    parts = make_microbatches(lengths, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(parts)
    if budget is None:
        assert len(parts) <= 1
        return
    for part in parts:
        assert sum(lengths[i] for i in part) <= budget or len(part) == 1
    for one, two in itertools.pairwise(parts):
        assert sum(lengths[i] for i in one) + lengths[two[0]] > budget, "no part is cut short without need"


# ----------------------------------------------------------------------------------------------------------------------


def test_real_triplets_and_compression_rows(shared, tmp_path):
    for name, tokenise in (("nli/nli-triplets-clean", data.alignment_rows), ("stage1/stage1", data.compression_rows)):
        source = shared / "data" / f"{name}.jsonl.gz"
        with gzip.open(source, "rt", encoding="utf-8") as file:
            lines = [json.loads(next(file)) for _ in range(300)]
        rows = tokenise(data.load_rows(write_jsonl(tmp_path / "part.jsonl", lines)), prompt(max_length=200))
        streamed = iter(tokenise(data.load_rows(str(source), streaming=True), prompt(max_length=200)))
        assert [next(streamed) for _ in range(300)] == list(rows)
        for line, row in zip(lines, rows, strict=True):
            key, column = ("query_ids", "query") if "query" in line else ("text_ids", "context")
            assert row["suffix_ids"] == ids(f"\n{line['instruction']}\n")
            assert row[key] == ids(line[column])[: 200 - 4 - len(row["suffix_ids"])]


def test_permutations_differ_between_neighbouring_seeds_and_epochs():
    seen = {tuple(sampling.permutation(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(seen) == 25
