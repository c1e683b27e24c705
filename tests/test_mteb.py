"""mteb on local data: what it reports is what our own evaluation computes."""

import mteb
import pytest
import torch
from conftest import sentence
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from autoregembed import Encoder, models
from autoregembed.evaluate import retrieval, sts
from autoregembed.integrations.mteb import MTEBEncoder
from autoregembed.prompt import Prompt
from autoregembed.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
PAIRS = {
    "sentence1": [sentence(i, 5) for i in range(12)],
    "sentence2": [sentence(i % 4, 6) for i in range(12)],
    "score": [i % 6 for i in range(12)],
}
QUERIES = {f"q{i}": sentence(i, 3) for i in range(6)}
CORPUS = {f"d{i}": sentence(100 + i, 8) for i in range(20)}
QUESTION = "Which one is it, and where on the hills?"
QRELS = {f"q{i}": {f"d{(3 * i) % 20}": 1, f"d{(7 * i + 1) % 20}": 2} for i in range(6)}


def metadata(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name, type=kind, main_score=score, description="-", reference=None,
        dataset={"path": "local", "revision": "1"}, category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"],
        date=("2024-01-01", "2024-01-01"), dialect=[], domains=[], task_subtypes=[], license="cc0-1.0",
        annotations_creators="derived", modalities=["text"], sample_creation="created", bibtex_citation="",
        prompt="A prompt of the task's own.",
    )  # fmt: skip


class LocalSTS(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")

    def load_data(self, **kwargs):
        self.dataset = DatasetDict({"test": Dataset.from_dict(PAIRS)})
        self.data_loaded = True


class LocalRetrieval(AbsTaskRetrieval):
    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, **kwargs):
        split = RetrievalSplitData(
            queries=Dataset.from_list([{"id": i, "text": t} for i, t in QUERIES.items()]),
            corpus=Dataset.from_list([{"id": i, "text": t, "title": ""} for i, t in CORPUS.items()]),
            relevant_docs=QRELS,
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    model = tiny_model(vocab_size=len(TOKENIZER))
    ids = models.add_compress_tokens(model, TOKENIZER, 3)
    return Encoder(model, compress_token_ids=ids, suffix_ids=suffix("Again:"), bos_token_id=1, tokenizer=TOKENIZER)


def suffix(instruction: str) -> list[int]:
    return Prompt(TOKENIZER, 3, 1, instruction).suffix()


def scores(model) -> tuple[float, float, float]:
    options = {"cache": None, "encode_kwargs": {"batch_size": 5}, "show_progress_bar": False, "co2_tracker": False}
    results = mteb.evaluate(model, [LocalSTS(), LocalRetrieval()], **options)
    found = {r.task_name: r.scores["test"][0] for r in results.task_results}
    search = found["LocalRetrieval"]
    return found["LocalSTS"]["cosine_spearman"], search["ndcg_at_10"], search["recall_at_5"]


def own_scores(embed_pairs, embed_queries, embed_documents) -> tuple[float, float, float]:
    def embed_both(texts):
        return (embed_queries if set(texts) <= set(QUERIES.values()) else embed_documents)(texts)

    search = retrieval(embed_both, QUERIES, CORPUS, QRELS)
    return sts(embed_pairs, PAIRS)["spearman"], search["ndcg@10"], search["recall@5"]


def reader(encoder, instruction: str):
    def read(texts):
        encoder.suffix_ids = suffix(instruction)
        try:
            return encoder.encode(texts)
        finally:
            encoder.suffix_ids = suffix("Again:")

    return read


def test_an_exported_model_is_read_with_its_own_instruction(encoder, tmp_path):
    expected = own_scores(*[reader(encoder, "Again:")] * 3)
    model = SentenceTransformer(str(encoder.save_pretrained(tmp_path / "out")), device="cpu")
    assert scores(model) == pytest.approx(expected, abs=2e-5)
    assert scores(MTEBEncoder(encoder)) == pytest.approx(expected, abs=2e-5)


def test_every_task_and_side_can_have_its_instruction(encoder):
    expected = own_scores(
        reader(encoder, "Compare:"),
        reader(encoder, QUESTION),
        reader(encoder, "Again:"),
    )
    assert expected != own_scores(*[reader(encoder, "Again:")] * 3)
    instructions = {"STS": "Compare:", "Retrieval-query": QUESTION}
    assert scores(MTEBEncoder(encoder, instructions=instructions)) == pytest.approx(expected, abs=2e-5)
    assert encoder.suffix_ids == suffix("Again:")


def test_prompts_stand_before_each_side_as_in_the_export(encoder, tmp_path):
    """In a search, not in STS, whose texts have no side."""
    encoder.prompts = {"query": "where on the hills ", "document": "of the sea "}
    try:
        expected = own_scores(
            encoder.encode,
            lambda texts: encoder.encode(texts, prompt_name="query"),
            lambda texts: encoder.encode(texts, prompt_name="document"),
        )
        assert expected[1:] != own_scores(*[encoder.encode] * 3)[1:]
        folder = encoder.save_pretrained(tmp_path / "out")
        assert scores(MTEBEncoder(encoder)) == pytest.approx(expected, abs=2e-5)
        assert scores(SentenceTransformer(str(folder), device="cpu")) == pytest.approx(expected, abs=2e-5)
    finally:
        encoder.prompts = {}


def test_results_are_filed_under_a_name(encoder):
    model = MTEBEncoder(encoder, name="me/mine", revision="7")
    assert (model.mteb_model_meta.name, model.mteb_model_meta.revision) == ("me/mine", "7")
    similarity = model.similarity(torch.eye(3)[:2], 2 * torch.eye(3))
    torch.testing.assert_close(torch.as_tensor(similarity), torch.eye(3)[:2])
