import math

import pytest
import torch
import torch.nn.functional as F
from conftest import sentence, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed import Encoder
from autoregembed.encoder import text_embedding
from autoregembed.evaluate import load_retrieval, load_sts, retrieval, spearman, sts, token_mean
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


@pytest.mark.parametrize("score", ["high", None, math.inf])
def test_sts_scores_must_be_numbers(score, tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": score}]
    with pytest.raises(ValueError, match=r"^data: got .* as 'score' in line 1 of 'a.jsonl', expected a number"):
        load_sts(write_jsonl(tmp_path / "a.jsonl", rows))


def test_sts_needs_its_columns(tmp_path):
    with pytest.raises(ValueError, match=r"missing \['score'\]"):
        load_sts(write_jsonl(tmp_path / "a.jsonl", [{"sentence1": "a", "sentence2": "b"}]))


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
    qrels = {"1": {"b": 2, "d": 1, "l": 1, "e": 0}, "2": {}, "3": {"a": 0}}
    found = retrieval(
        vectors(on_a_ray(names), []), {"1": "q", "2": "q", "3": "q"}, corpus, qrels, ks=(1, 2, 10, 12, 100)
    )
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


def test_retrieval_takes_the_mean_over_queries_and_ties_in_corpus_order():
    table = {"q": [1.0, 0.0], "r": [0.0, 1.0], "a": [1.0, 0.0], "b": [2.0, 0.0], "c": [0.0, 1.0]}
    qrels = {"1": {"b": 1}, "2": {"c": 1}}
    found = retrieval(vectors(table, []), {"1": "q", "2": "r"}, {"x": "a", "b": "b", "c": "c"}, qrels, ks=(1,))
    assert found == {"ndcg@10": pytest.approx((1 / math.log2(3) + 1) / 2), "recall@1": 0.5}


@pytest.mark.parametrize(
    ("qrels", "message"), [({"1": {"zz": 1}}, "got document 'zz'"), ({"1": {"a": 0}}, "got no relevant document")]
)
def test_retrieval_refuses_relevance_that_means_nothing(qrels, message):
    with pytest.raises(ValueError, match=rf"^qrels: {message}"):
        retrieval(vectors(on_a_ray("a"), []), {"1": "q"}, {"a": "a"}, qrels)


def test_retrieval_reads_beir_files(tmp_path):
    corpus = write_jsonl(
        tmp_path / "corpus.jsonl", [{"_id": "7", "title": "T", "text": "x"}, {"_id": "8", "title": "", "text": "y"}]
    )
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"_id": "1", "text": "q", "metadata": {}}])
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t7\t2\n1\t8\t0\n")
    found = load_retrieval(corpus, queries, str(tmp_path / "test.tsv"))
    assert found == ({"1": "q"}, {"7": "T x", "8": "y"}, {"1": {"7": 2, "8": 0}})
    (tmp_path / "test.tsv").write_text("query\tcorpus-id\tscore\n1\t7\t2\n")
    with pytest.raises(ValueError, match=r"missing \['query-id'\]"):
        load_retrieval(corpus, queries, str(tmp_path / "test.tsv"))


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


def test_token_mean_in_batches_is_that_of_each_text_alone():
    model = tiny_model(vocab_size=len(TOKENIZER))
    texts = [sentence(i, 1 + 3 * (i % 5)) for i in range(12)]
    alone = [model.model(torch.tensor([TOKENIZER(t)["input_ids"]])).last_hidden_state.mean(1) for t in texts]
    wanted = F.normalize(torch.cat(alone), dim=-1)
    for budget in (1, 20, 4096):
        torch.testing.assert_close(token_mean(model, TOKENIZER, texts, token_budget=budget), wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"^texts: got an empty text in row 1"):
        token_mean(model, lambda text: {"input_ids": [3] if text else []}, ["a", ""])
