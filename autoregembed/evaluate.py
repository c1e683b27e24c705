"""How well embeddings rank texts: STS by Spearman's correlation, retrieval by nDCG and recall."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from autoregembed.models import base_model
from autoregembed.packing import make_microbatches
from autoregembed.tables import as_number, as_text, read_documents, read_qrels, read_rows, require_keys

Embed = Callable[[list[str]], Tensor]  # n texts -> (n, D) float, rows of norm 1


@torch.inference_mode()
def token_mean(model: Any, tokenizer: Any, texts: Sequence[str], *, token_budget: int = 4096) -> Tensor:
    """The usual embedding by an untrained causal LM: the normalised mean of its last hidden states over all tokens.

    Returns:
        (n, D) float32 on the CPU, in the order of `texts`.

    Raises:
        ValueError: a text without a token (the row is named).
    """
    base = base_model(model)
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    empty = [row for row, x in enumerate(ids) if not len(x)]
    if empty:
        raise ValueError(f"texts: got an empty text in row {empty[0]}, expected at least one token")
    out = torch.zeros(len(texts), base.get_input_embeddings().weight.shape[1])
    for part in make_microbatches([len(x) for x in ids], token_budget):
        # Padded on the right, where causal attention does not look.
        mask = pad_sequence([torch.ones_like(ids[i]) for i in part], batch_first=True).to(base.device)
        padded = pad_sequence([ids[i] for i in part], batch_first=True).to(base.device)
        hidden = base(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state.float()
        out[part] = F.normalize((hidden * mask[..., None]).sum(1), dim=-1).cpu()
    return out


def load_sts(source: str, split: str | None = None) -> Dataset:
    """Rows {sentence1, sentence2, score} of a csv, tsv, jsonl, json or parquet file or a hub data set.

    Raises:
        TypeError, ValueError: a column is missing, there is no row, a sentence is no text or a score no number.
    """
    columns: dict[str, list] = {"sentence1": [], "sentence2": [], "score": []}
    for place, row in read_rows(source, split):
        require_keys(row, list(columns), place)
        for name in ("sentence1", "sentence2"):
            columns[name].append(as_text(row[name], name, place))
        columns["score"].append(as_number(row["score"], "score", place))
    return Dataset.from_dict(columns)


def load_retrieval(corpus: str, queries: str, qrels: str, split: str | None = None) -> tuple[dict, dict, dict]:
    """(queries, corpus, qrels) as `retrieval` takes them, from the three parts of a BEIR data set.

    Args:
        corpus: rows {_id, text, title?}: a file or hub data set; a title stands before its text.
        queries: rows {_id, text}.
        qrels: rows {query-id, corpus-id, score}.
        split: of hub data sets.

    Raises:
        TypeError, ValueError: a column is missing, there is no row, a text or id is none, or a score is not a number.
    """
    return read_documents(queries, split), read_documents(corpus, split), read_qrels(qrels, split)


def spearman(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation, ties at their mean rank."""
    return float(spearmanr(x, y).statistic)


def sts(embed: Embed, pairs: Any) -> dict[str, float]:
    """{"spearman": correlation of cosine similarity with the human scores}; every distinct text is embedded once."""
    first, second, scores = (list(pairs[name]) for name in ("sentence1", "sentence2", "score"))
    texts = list(dict.fromkeys([*first, *second]))
    place = {text: i for i, text in enumerate(texts)}
    e = embed(texts)
    a, b = (e[[place[t] for t in column]] for column in (first, second))
    return {"spearman": spearman((a * b).sum(1), scores)}


def retrieval(
    embed: Embed,
    queries: dict[str, str],
    corpus: dict[str, str],
    qrels: dict[str, dict[str, float]],
    ks: Sequence[int] = (1, 5, 10),
    embed_queries: Embed | None = None,
) -> dict[str, float]:
    """nDCG@10 (gain = relevance, discount log2(rank + 1)) and recall@k by cosine similarity, means over queries.

    Queries without a relevant document are left out. Equal scores rank in the corpus' order. `embed_queries` embeds the
    queries where they have another prompt than the documents.

    Raises:
        ValueError: no query has a relevant document in the corpus, or a relevance names an unknown document.
    """
    unknown = next((d for q in qrels.values() for d in q if d not in corpus), None)
    if unknown is not None:
        raise ValueError(f"qrels: got document {unknown!r}, expected those of the corpus")
    wanted = [q for q in queries if any(r > 0 for r in qrels.get(q, {}).values())]
    if not wanted:
        raise ValueError("qrels: got no relevant document for any query, expected at least one")
    ids = list(corpus)
    documents, questions = embed(list(corpus.values())), (embed_queries or embed)([queries[q] for q in wanted])
    deepest = min(max(10, *ks), len(ids))
    totals = {"ndcg@10": 0.0, **{f"recall@{k}": 0.0 for k in ks}}
    for part, names in zip(questions.split(256), _chunks(wanted, 256), strict=True):
        ranking = (part @ documents.T).sort(dim=1, descending=True, stable=True).indices[:, :deepest]
        for name, row in zip(names, ranking.tolist(), strict=True):
            relevance = {d: r for d, r in qrels[name].items() if r > 0}
            gains = [relevance.get(ids[i], 0) for i in row]
            ideal = sorted(relevance.values(), reverse=True)
            totals["ndcg@10"] += _dcg(gains[:10]) / _dcg(ideal[:10])
            for k in ks:
                totals[f"recall@{k}"] += sum(g > 0 for g in gains[:k]) / len(relevance)
    return {name: total / len(wanted) for name, total in totals.items()}


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _dcg(gains: Sequence[float]) -> float:
    return sum(g / math.log2(rank + 2) for rank, g in enumerate(gains))
