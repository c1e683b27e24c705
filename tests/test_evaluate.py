import io
import math
from typing import get_args, get_type_hints

import pytest
import pytrec_eval
import torch
import torch.nn.functional as F
from conftest import sentence, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from autoregembed import Encoder
from autoregembed.config import Config
from autoregembed.encoder import text_embedding
from autoregembed.evaluate import (
    LABEL_FREE,
    METRICS,
    best_columns,
    judged_queries,
    label_free,
    load_retrieval,
    load_sts,
    load_texts,
    retrieval,
    spearman,
    sts,
    token_mean,
)
from autoregembed.held_out import HeldOut
from autoregembed.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])


@pytest.fixture(scope="module")
def encoder():
    suffix = TOKENIZER("\nAgain:\n")["input_ids"]
    ids = [len(TOKENIZER) + i for i in range(3)]
    model = tiny_model(vocab_size=len(TOKENIZER) + 3)
    return Encoder(model, compress_token_ids=ids, suffix_ids=suffix, bos_token_id=1, tokenizer=TOKENIZER)


def ranks(values):
    """Mean ranks, by counting."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
@settings(deadline=None)
def test_spearman_is_the_correlation_of_mean_ranks(pairs):
    a, b = (torch.tensor(ranks(column)).double() for column in zip(*pairs, strict=True))
    a, b = a - a.mean(), b - b.mean()
    if a.norm() == 0 or b.norm() == 0:
        return
    x, y = zip(*pairs, strict=True)
    assert spearman(x, y) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-9)


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    # Ranks 1.5 1.5 3 and 1 2 3: 1.5 / sqrt(1.5 · 2).
    assert spearman(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([1, 2, 3])) == pytest.approx(math.sqrt(3) / 2)


def vectors(table: dict[str, list[float]], seen: list):
    def lookup(texts):
        seen.append(texts)
        return F.normalize(torch.tensor([table[t] for t in texts]), dim=-1)

    return lookup


def test_sts_embeds_each_text_once_and_ranks_by_cosine():
    table = {"a": [1.0, 0.0], "b": [0.9, 0.1], "c": [0.0, 2.0], "d": [5.0, 5.0]}
    pairs = {"sentence1": ["a", "a", "a"], "sentence2": ["b", "c", "d"], "score": [5, 1, 3]}
    seen = []
    assert sts(vectors(table, seen), pairs) == {"spearman": pytest.approx(1.0)}
    assert sorted(t for texts in seen for t in texts) == ["a", "b", "c", "d"]
    assert sts(vectors(table, seen), {**pairs, "score": [1, 5, 3]})["spearman"] == pytest.approx(-1.0)


PAIR = {"sentence1": "a", "sentence2": "b", "score": 1.5}


@pytest.mark.parametrize("score", ["high", None, math.inf, "nan", "", "1_0"])
def test_sts_scores_must_be_numbers(score, tmp_path):
    rows = [PAIR | {"score": str(PAIR["score"]) if isinstance(score, str) else 1.5}, PAIR | {"score": score}]
    with pytest.raises(ValueError, match=r"^data: got .* as 'score' in line 2 of 'a.jsonl', expected a number"):
        load_sts(write_jsonl(tmp_path / "a.jsonl", rows))


def test_sts_scores_may_be_written_as_text(tmp_path):
    rows = [PAIR | {"score": score} for score in ("4", " 2.50", "1e-1", "-.5")]
    assert load_sts(write_jsonl(tmp_path / "a.jsonl", rows))["score"][:] == [4, 2.5, 0.1, -0.5]


@pytest.mark.parametrize("column", ["sentence1", "sentence2"])
@pytest.mark.parametrize(
    ("value", "error"), [(None, TypeError), (5, TypeError), (["b"], TypeError), ("", ValueError), (" \t", ValueError)]
)
def test_sts_sentences_must_be_texts(column, value, error, tmp_path):
    rows = [PAIR | {"score": 2, column: value}] * 2  # of one type, as any reader of columns keeps it
    with pytest.raises(error, match=rf"^data: got .*{column}' in line 1 of 'a.jsonl', expected a (string|text)"):
        load_sts(write_jsonl(tmp_path / "a.jsonl", rows))


def test_sts_without_two_scores_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data: got 1.5 as 'score' in every row of .*, expected at least two values"):
        load_sts(write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR | {"sentence1": "c"}]))


def test_an_undefined_correlation_is_none_with_the_reason():
    pairs = {"sentence1": ["a", "b", "c"], "sentence2": ["b", "b", "a"], "score": [1, 2, 3]}
    table = {name: [1.0, 2.0, 0.5] for name in "abc"}
    same = {"spearman": None, "spearman_undefined": "similarities: got no two different values, expected some, as "
            "Spearman's correlation needs"}  # fmt: skip
    assert sts(vectors(table, []), pairs) == same
    # Each text beside itself: the similarities are 1, whatever the rounding of the vectors' norms.
    twins = {"sentence1": list("abc"), "sentence2": list("abc"), "score": [1, 2, 3]}
    table = {"a": [1.0, 0.3, 0.7], "b": [3.0, 0.1, 9.0], "c": [0.2, 0.7, 0.9]}
    assert sts(vectors(table, []), twins) == same
    assert "not finite" in sts(vectors(table | {"a": [math.nan] * 3}, []), pairs)["spearman_undefined"]
    found = sts(vectors(table, []), pairs | {"score": [2, 2, 2]})
    assert found["spearman"] is None
    assert found["spearman_undefined"].startswith("scores: ")


def test_sts_needs_its_columns(tmp_path):
    with pytest.raises(ValueError, match=r"missing \['score'\]"):
        load_sts(write_jsonl(tmp_path / "a.jsonl", [{"sentence1": "a", "sentence2": "b"}]))


# ----------------------------------------------------------------------------------------------------------------------
# Without labels


def by_hand(texts: dict[str, list[float]], views: list[tuple[list[float], list[float]]]) -> dict[str, float]:
    """The metrics of `label_free`, pair by pair in plain Python."""
    rows = [[x / math.hypot(*row) for x in row] for row in texts.values()]
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[:i]]
    cosines = [sum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs]
    spread = [math.exp(-2 * math.dist(a, b) ** 2) for a, b in pairs]
    found = [
        max(range(len(views)), key=lambda j, a=a: F.cosine_similarity(*torch.tensor([a, views[j][1]]), 0))
        for a, _ in views
    ]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    scatter = torch.tensor([[x - m for x, m in zip(row, mean, strict=True)] for row in rows], dtype=torch.float64)
    sigma = torch.linalg.eigvalsh(scatter.T @ scatter).clamp(min=0).sqrt()
    share = [float(s / sigma.sum()) for s in sigma if s > 1e-4]
    crossed = [[float(F.cosine_similarity(*torch.tensor([a, b]).double(), 0)) for _, b in views] for a, _ in views]
    others = [x for i, row in enumerate(crossed) for j, x in enumerate(row) if i != j]
    middle = sum(others) / len(others)
    deviation = math.sqrt(sum((x - middle) ** 2 for x in others) / len(others))
    return {
        "view_separation": (sum(row[i] for i, row in enumerate(crossed)) / len(crossed) - middle) / deviation,
        "mean_cosine": sum(cosines) / len(cosines),
        "view_accuracy": sum(i == j for i, j in enumerate(found)) / len(views),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in share)),
        "uniformity": math.log(sum(spread) / len(spread)),
    }


def test_metrics_without_labels_by_hand():
    table = {
        "one two three": [1.0, 0.2, 0.0],
        "four five": [0.3, 2.0, 0.1],
        "six": [0.1, 0.4, 0.9],
        "x": [2.0, 1.0, 1.0],
    }
    halves = {"one two": [1.0, 0.0, 0.0], "three": [0.9, 0.1, 0.0], "four": [0.0, 1.0, 0.0], "five": [1.0, 0.2, 0.1],
              "si": [0.0, 0.1, 1.0], "x": table["x"]}  # fmt: skip
    views = [(halves["one two"], halves["three"]), (halves["four"], halves["five"]), (halves["si"], table["x"])]
    seen = []
    found = label_free(vectors({**halves, **table}, seen), [*table, "four five"])
    assert found == pytest.approx(by_hand(table, views), abs=1e-6)
    assert found["view_accuracy"] == pytest.approx(2 / 3)
    assert tuple(found) == LABEL_FREE
    assert seen == [[*table, "one two", "four", "si", "three", "five", "x"]], "in one call, each once"


def test_metrics_without_labels_tell_a_collapse_from_a_spread():
    texts = [f"{i} and {i}" for i in range(40)]
    alike = label_free(lambda found: torch.ones(len(found), 64), texts)
    wanted = {"mean_cosine": 1, "view_accuracy": 1 / 40, "effective_rank": 0, "uniformity": 0}
    assert alike.pop("view_separation") is None, "nothing is told apart"
    assert alike == pytest.approx(wanted, abs=1e-6)
    apart = label_free(lambda found: torch.eye(40, 64).repeat(3, 1), texts)
    assert apart.pop("view_separation") is None, "halves of different texts are all at the same cosine, 0"
    assert apart["view_accuracy"] == 1
    assert apart["mean_cosine"] == pytest.approx(0)
    assert apart["effective_rank"] == pytest.approx(39)
    assert apart["uniformity"] == pytest.approx(-4)
    for name in alike:
        assert (apart[name] > alike[name]) == METRICS[name].higher
    noise = torch.randn(120, 64, generator=torch.Generator().manual_seed(0)) / 8
    lines = [label_free(lambda found, x=x: torch.eye(40, 64).repeat(3, 1) + x * noise, texts) for x in (0.3, 0.6, 1.2)]
    values = [found["view_separation"] for found in lines]
    assert values[0] > values[1] > values[2] > 1, "the more noise, the less is told apart"
    nothing = label_free(lambda found: torch.full((len(found), 3), math.nan), texts)
    assert nothing == {**dict.fromkeys(LABEL_FREE), "undefined": "embeddings: got a value that is not finite"}
    assert label_free(lambda found: torch.eye(len(found)), ["a", "b"])["view_accuracy"] is None, "no halves"
    with pytest.raises(ValueError, match="texts: got 1, expected at least two different ones"):
        label_free(lambda found: torch.ones(len(found), 3), ["a b", "a b"])


def test_the_metrics_of_the_config_are_these():
    named, _ = get_args(get_type_hints(Config)["eval_metric"])
    assert get_args(named) == tuple(METRICS)


def test_texts_of_an_evaluation_are_read_as_those_of_training(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "b.txt").write_text("two\nthree")
    assert load_texts(str(folder)) == load_texts(str(folder), column="body") == ["one", "two", "three"]
    rows = [{"text": "a", "body": "b"}, {"text": "c", "body": "d"}]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    assert load_texts(file) == ["a", "c"]
    assert load_texts(file, column="body") == ["b", "d"]
    file = write_jsonl(tmp_path / "b.jsonl", [*rows, {"text": "e"}])
    with pytest.raises(ValueError, match=r"in line 3 of 'b.jsonl', expected \{body\}"):
        load_texts(file, column="body")
    out = io.StringIO()
    many = write_jsonl(tmp_path / "c.jsonl", [{"body": str(i)} for i in range(300)])
    config = Config(stage=1, model="m", train_data=many, output_dir="o", eval_data=many, columns="text=body")
    texts = HeldOut(config, Console(file=out)).texts
    assert (len(texts), texts[0], texts[64], texts[-1]) == (128, "0", "150", "297")
    assert "eval_data: 128 of 300 texts are read, spread evenly" in out.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Retrieval


def on_a_ray(names):
    """Documents at growing angles from the query "q": they rank in the order of `names`."""
    table = {name: [math.cos(0.05 * i), math.sin(0.05 * i)] for i, name in enumerate(names)}
    return {"q": [1.0, 0.0], **table}


def test_retrieval_by_hand():
    names = list("abcdefghijklmn")
    corpus = {n: n for n in reversed(names)}
    # Ranked a b c …: relevant are b (2), d (1) and, at place 12, l (1).
    qrels = {"1": {"b": 2, "d": 1, "l": 1, "e": 0}, "2": {}}
    found = retrieval(vectors(on_a_ray(names), []), {"1": "q", "2": "q"}, corpus, qrels, ks=(1, 2, 10, 12, 100))
    dcg = 2 / math.log2(3) + 1 / math.log2(5)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found == {
        "ndcg@10": pytest.approx(dcg / ideal),
        "recall@1": 0,
        "recall@2": pytest.approx(1 / 3),
        "recall@10": pytest.approx(2 / 3),
        "recall@12": 1,
        "recall@100": 1,
    }


def test_retrieval_takes_the_mean_over_queries_and_ties_by_id_the_last_first():
    table = {"q": [1.0, 0.0], "r": [0.0, 1.0], "a": [1.0, 0.0], "b": [2.0, 0.0], "c": [0.0, 1.0]}
    qrels = {"1": {"x": 1}, "2": {"c": 1}}
    for corpus in ({"x": "a", "y": "b", "c": "c"}, {"y": "a", "c": "c", "x": "b"}):
        found = retrieval(vectors(table, []), {"1": "q", "2": "r"}, corpus, qrels, ks=(1,))
        assert found == {"ndcg@10": pytest.approx((1 / math.log2(3) + 1) / 2), "recall@1": 0.5}


def test_equal_texts_tie_whatever_their_batch_makes_of_them():
    """An encoder gives the same text other last bits in another batch; as two documents it has one score."""
    calls = []

    def embed(texts):
        calls.extend(texts)
        return F.normalize(torch.tensor([[1.0, 0.1 * len(t) + 1e-4 * i] for i, t in enumerate(texts)]), dim=-1)

    corpus = {"1": "same", "2": "other text", "3": "same"}
    assert retrieval(embed, {"q": "same"}, corpus, {"q": {"3": 1}}, ks=(1,))["recall@1"] == 1
    assert retrieval(embed, {"q": "same"}, corpus, {"q": {"1": 1}}, ks=(1, 2)) == {
        "ndcg@10": pytest.approx(1 / math.log2(3)), "recall@1": 0, "recall@2": 1,
    }  # fmt: skip
    assert calls == ["same", "same", "other text"] * 2


def test_a_query_in_the_corpus_is_not_its_own_answer():
    corpus = {"5": "q", "2": "b", "3": "c"}
    embed = vectors(on_a_ray("abcd"), [])
    assert retrieval(embed, {"5": "q"}, corpus, {"5": {"2": 1}}, ks=(1,)) == {"ndcg@10": 1, "recall@1": 1}
    # Judged irrelevant, it is left out all the same; of another id, it is a document like any other.
    assert retrieval(embed, {"5": "q"}, corpus, {"5": {"5": 0, "2": 1}}, ks=(1,))["recall@1"] == 1
    assert retrieval(embed, {"05": "q"}, corpus, {"05": {"2": 1}}, ks=(1,))["recall@1"] == 0
    # Judged relevant, it is another text that happens to have the number of the query.
    assert retrieval(embed, {"3": "q"}, corpus, {"3": {"3": 1}}, ks=(2, 3)) == {
        "ndcg@10": 0.5, "recall@2": 0, "recall@3": 1,
    }  # fmt: skip


def test_a_relevant_document_that_the_corpus_lacks_was_not_found():
    found = retrieval(vectors(on_a_ray("ab"), []), {"1": "q"}, {"a": "a"}, {"1": {"a": 1, "gone": 3}}, ks=(1,))
    assert found == {"ndcg@10": pytest.approx(1 / (3 + 1 / math.log2(3))), "recall@1": 0.5}


@pytest.mark.parametrize("qrels", [{"1": {"zz": 1}}, {"1": {"a": 0}}, {"1": {"a": -1}}, {"2": {"a": 1}}, {}])
def test_retrieval_refuses_relevance_that_means_nothing(qrels):
    with pytest.raises(ValueError, match=r"^qrels: got no relevant document for any query"):
        retrieval(vectors(on_a_ray("a"), []), {"1": "q"}, {"a": "a"}, qrels)


@pytest.mark.parametrize("name", ["queries", "corpus"])
def test_retrieval_refuses_embeddings_that_are_not_finite(name):
    table = {"q": [1.0, 0.0], "a": [1.0, 0.0]} | {"q" if name == "queries" else "a": [math.nan, 0.0]}
    with pytest.raises(ValueError, match=rf"^{name}: got an embedding that is not finite"):
        retrieval(vectors(table, []), {"1": "q"}, {"a": "a"}, {"1": {"a": 1}})


IDS = ["001", "01", "1", "10", "2", "a", "Z", "é", "ß", "doc-9", "doc-10", "日本"]


@st.composite
def runs(draw):
    """Vectors on a small grid, so that scores tie; judgments of absent documents, of 0 and below; ids on both sides."""
    grid = st.tuples(*[st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0])] * 3)
    ids = st.lists(st.sampled_from(IDS), unique=True, min_size=1)
    corpus, queries = draw(ids), draw(ids)
    names = [f"d{d}" for d in corpus] + [f"q{q}" for q in queries]
    table = {name: draw(grid) for name in names}
    qrels = {q: draw(st.dictionaries(st.sampled_from(IDS), st.integers(-2, 3), max_size=8)) for q in queries}
    return table, {q: f"q{q}" for q in queries}, {d: f"d{d}" for d in corpus}, qrels


@given(runs())
@settings(deadline=None, max_examples=100)
def test_retrieval_is_that_of_pytrec_eval(run):
    """trec_eval's own measures, of the run that BEIR makes: all documents but the query itself."""
    table, queries, corpus, qrels = run
    qrels = {q: {d: r for d, r in found.items() if d != q or r <= 0} for q, found in qrels.items()}
    if not any(r > 0 and d in corpus for q in queries for d, r in qrels[q].items()):
        return
    scores = {
        q: {d: sum(x * y for x, y in zip(table[a], table[b], strict=True)) for d, b in corpus.items() if d != q}
        for q, a in queries.items()
    }
    # trec_eval takes what is below 0 for not judged; its Python package then writes outside of an array.
    judged = {q: {d: max(r, 0) for d, r in found.items()} for q, found in qrels.items() if found}
    found = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.1,3,100"}).evaluate(scores)
    mean = {n: sum(m[n.replace("ndcg", "ndcg_cut").replace("@", "_")] for m in found.values()) / len(judged)
            for n in ("ndcg@10", "recall@1", "recall@3", "recall@100")}  # fmt: skip
    assert set(found) == set(judged)
    embed = lambda texts: torch.tensor([table[t] for t in texts])  # noqa: E731
    assert retrieval(embed, queries, corpus, qrels, ks=(1, 3, 100)) == pytest.approx(mean, abs=1e-12)


def test_the_ranking_is_exact_over_several_blocks():
    """More queries and documents than one block holds, with many ties: the order of a sort of everything."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(-2, 3, (40_000, 4), generator=generator).float()
    questions = torch.randint(-2, 3, (300, 4), generator=generator).float()
    place = torch.randperm(40_000, generator=generator)
    wanted = (questions @ documents[place].T).sort(dim=1, descending=True, stable=True).indices[:, :101]
    assert list(best_columns(questions, documents, place, 101)) == wanted.tolist()
    # In fp32 the first product is -0, which is no less than 0.
    tiny = torch.tensor([[-1e-30], [0.0]])
    assert list(best_columns(-tiny[:1], tiny, torch.arange(2), 2)) == [[0, 1]]


def test_retrieval_reads_beir_files(tmp_path):
    corpus = write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": "7", "title": "T", "text": "x"}, {"_id": "8", "title": "", "text": "y"}]
    )
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "q", "metadata": {}}])
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t7\t2\n1\t8\t0\n")
    found = load_retrieval(corpus, queries, str(tmp_path / "test.tsv"))
    assert found == ({"1": "q"}, {"7": "T x", "8": "y"}, {"1": {"7": 2, "8": 0}})
    assert judged_queries(found[0], found[2]) == ["1"]
    (tmp_path / "test.tsv").write_text("query\tcorpus-id\tscore\n1\t7\t2\n")
    with pytest.raises(ValueError, match=r"missing \['query-id'\]"):
        load_retrieval(corpus, queries, str(tmp_path / "test.tsv"))


GOOD = {
    "corpus": {"_id": "7", "title": "T", "text": "x"},
    "queries": {"_id": "1", "text": "q"},
    "qrels": {"query-id": "1", "corpus-id": "7", "score": 1},
}


@pytest.mark.parametrize(
    ("part", "bad", "error", "message"),
    [
        ("corpus", {"text": 5}, TypeError, "got 5 as 'text' in line 1 of 'corpus.jsonl', expected a string"),
        ("corpus", {"title": 5}, TypeError, "got 5 as 'title' in line 1"),
        ("corpus", {"text": None}, TypeError, "got None as 'text' in line 1"),
        ("corpus", {"_id": None}, TypeError, "got None as '_id' in line 1 .*, expected a string or an integer"),
        ("corpus", {"_id": 1.5}, TypeError, "got 1.5 as '_id' in line 1"),
        ("queries", {"_id": ""}, TypeError, "got '' as '_id' in line 1"),
        ("queries", {"text": ""}, ValueError, "got an empty 'text' in query '1' of '.*queries.jsonl'"),
        ("qrels", {"score": None}, ValueError, "got None as 'score' in line 1 of 'qrels.jsonl', expected a number"),
        ("qrels", {"score": True}, ValueError, "got True as 'score' in line 1"),
        ("qrels", {"corpus-id": None}, TypeError, "got None as 'corpus-id' in line 1"),
    ],
)
def test_beir_files_are_checked_cell_by_cell(part, bad, error, message, tmp_path):
    rows = {name: [row | bad if name == part else row] for name, row in GOOD.items()}
    files = [write_jsonl(tmp_path / f"{name}.jsonl", found) for name, found in rows.items()]
    with pytest.raises(error, match=f"^data: {message}"):
        load_retrieval(*files)


def test_beir_files_contradict_themselves_nowhere(tmp_path):
    twice = {name: [row, dict(row)] for name, row in GOOD.items()}
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in twice.items()}
    assert load_retrieval(**files) == ({"1": "q"}, {"7": "T x"}, {"1": {"7": 1}})
    for name, other in (("corpus", {"text": "y"}), ("queries", {"text": "y"}), ("qrels", {"score": 2})):
        rows = [GOOD[name], GOOD[name] | other]
        with pytest.raises(ValueError, match=r"^data: got .* in line 2 of .* and before"):
            load_retrieval(**files | {name: write_jsonl(tmp_path / "other.jsonl", rows)})


def test_a_document_may_be_empty(tmp_path):
    """BEIR's corpora have some."""
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", [row]) for name, row in GOOD.items()}
    files["corpus"] = write_jsonl(tmp_path / "empty.jsonl", [{"_id": 7, "title": None, "text": ""}])
    assert load_retrieval(**files)[1] == {"7": ""}


# ----------------------------------------------------------------------------------------------------------------------
# Encoder.encode


@torch.no_grad()
def test_embeddings_keep_the_order_of_the_texts_whatever_the_budget(encoder):
    texts = [sentence(i, 1 + (5 * i) % 11) for i in range(9)] + ["</s>", "<s> <unk>"]
    whole = encoder.encode(texts)
    assert whole.shape == (11, 32)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(11))
    for i, text in enumerate(texts):
        expected = text_embedding(encoder([TOKENIZER(text)["input_ids"]]))[0]
        torch.testing.assert_close(whole[i], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.encode(texts, token_budget=1), whole, rtol=0, atol=1e-6)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


def test_long_texts_are_cut_so_that_the_suffix_stays(encoder):
    long = sentence(0, 400)
    ids = TOKENIZER(long)["input_ids"]
    around = len(encoder.sequences([[]])[0])
    for length, options in ((256, {}), (40, {"max_length": 40})):
        expected = text_embedding(encoder([ids[: length - around]]))[0]
        torch.testing.assert_close(encoder.encode([long], **options)[0], expected, rtol=0, atol=1e-6)


def test_encode_leaves_the_mode_of_the_encoder(encoder):
    encoder.train()
    encoder.encode(["the cat"])
    assert encoder.training
    encoder.eval()


def test_encode_refuses(encoder):
    with pytest.raises(ValueError, match=r"^texts: got none"):
        encoder.encode([])
    with pytest.raises(ValueError, match=r"^texts: got an empty text in row 1"):
        encoder.encode(["the", ""])
    with pytest.raises(ValueError, match=r"^max_length: got 257, expected at most 256"):
        encoder.encode(["the"], max_length=257)
    with pytest.raises(ValueError, match=r"^max_length: got 5, expected at least"):
        encoder.encode(["the"], max_length=5)


def test_real_sts_pairs_load(shared):
    pairs = load_sts(str(shared / "data" / "stsb" / "stsb-dev.jsonl.gz"))
    assert len(pairs) == 1500
    words = {
        w: i for i, w in enumerate(sorted({w for c in ("sentence1", "sentence2") for t in pairs[c] for w in t.split()}))
    }

    def bag_of_words(texts):
        bags = torch.zeros(len(texts), len(words))
        for bag, text in zip(bags, texts, strict=True):
            bag[[words[w] for w in text.split()]] = 1
        return F.normalize(bags, dim=-1)

    assert 0.5 < sts(bag_of_words, pairs)["spearman"] < 0.6


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                             "long_factor": [5.0] * 4, "original_max_position_embeddings": 8, "factor": 32.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 8},
    ],
    ids=["longrope", "dynamic"],
)  # fmt: skip
def test_token_mean_of_a_text_does_not_depend_on_longer_ones(options):
    texts = [sentence(i, n) for i, n in enumerate((3, 30, 5, 20, 30, 3))]

    def fresh():
        return tiny_model(vocab_size=len(TOKENIZER), **options)

    wanted = torch.cat([token_mean(fresh(), TOKENIZER, [text]) for text in texts])
    for text, mean in zip(texts, wanted, strict=True):
        hidden = fresh().model(torch.tensor([TOKENIZER(text)["input_ids"]])).last_hidden_state.mean(1)
        torch.testing.assert_close(F.normalize(hidden, dim=-1)[0], mean, rtol=0, atol=1e-5)
    model = fresh()
    for order in ([0, 1, 2, 3, 4, 5], [1, 3, 0]):
        found = token_mean(model, TOKENIZER, [texts[i] for i in order])
        torch.testing.assert_close(found, wanted[order], rtol=0, atol=1e-5)


def test_token_mean_in_batches_is_that_of_each_text_alone():
    model = tiny_model(vocab_size=len(TOKENIZER))
    texts = [sentence(i, 1 + 3 * (i % 5)) for i in range(12)]
    alone = [model.model(torch.tensor([TOKENIZER(t)["input_ids"]])).last_hidden_state.mean(1) for t in texts]
    wanted = F.normalize(torch.cat(alone), dim=-1)
    for budget in (1, 20, 4096):
        torch.testing.assert_close(token_mean(model, TOKENIZER, texts, token_budget=budget), wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"^texts: got an empty text in row 1"):
        token_mean(model, lambda text: {"input_ids": [3] if text else []}, ["a", ""])
