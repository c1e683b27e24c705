"""How well embeddings rank texts: STS by Spearman's correlation, retrieval by nDCG and recall."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from autoregembed import data
from autoregembed.models import base_model
from autoregembed.packing import make_microbatches

Embed = Callable[[list[str]], Tensor]  # n texts -> (n, D) float, rows of norm 1


@torch.inference_mode()
def token_mean(model, tokenizer, texts: Sequence[str], *, token_budget: int = 4096) -> Tensor:
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


def load_sts(source: str, split: str | None = None):
    """Rows {sentence1, sentence2, score} of a csv, jsonl, json or parquet file or a hub data set.

    Raises:
        ValueError: a column is missing, there is no row, or a score is not a number.
    """
    rows = data.load_rows(source, split)
    data.require_columns(rows, ("sentence1", "sentence2", "score"))
    for row, score in enumerate(rows["score"]):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"data: got {score!r} as 'score' in row {row}, expected a number")
    return rows


def load_retrieval(corpus: str, queries: str, qrels: str, split: str | None = None) -> tuple[dict, dict, dict]:
    """(queries, corpus, qrels) as `retrieval` takes them, from the three parts of a BEIR data set.

    Args:
        corpus: rows {_id, text, title?}: a file or hub data set; a title stands before its text.
        queries: rows {_id, text}.
        qrels: rows {query-id, corpus-id, score}.
        split: of hub data sets.

    Raises:
        ValueError: a column is missing, there is no row, or a score is not a number.
    """
    texts: list[dict[str, str]] = []
    for source in (queries, corpus):
        rows = data.load_rows(source, split)
        data.require_columns(rows, ("_id", "text"))
        texts.append({str(r["_id"]): " ".join(filter(None, (r.get("title"), r["text"]))) for r in rows})
    relevance: dict[str, dict[str, float]] = {}
    rows = data.load_rows(qrels, split)
    data.require_columns(rows, ("query-id", "corpus-id", "score"))
    for row in rows:
        if not isinstance(row["score"], int | float):
            raise ValueError(f"data: got {row['score']!r} as 'score' in {qrels!r}, expected a number")
        relevance.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = row["score"]
    return texts[0], texts[1], relevance


def spearman(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation, ties at their mean rank."""
    return float(spearmanr(x, y).statistic)


def sts(embed: Embed, pairs) -> dict[str, float]:
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
) -> dict[str, float]:
    """nDCG@10 (gain = relevance, discount log2(rank + 1)) and recall@k by cosine similarity, means over queries.

    Queries without a relevant document are left out. Equal scores rank in the corpus' order.

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
    documents, questions = embed(list(corpus.values())), embed([queries[q] for q in wanted])
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


def _chunks(items: list, size: int):
    return [items[i : i + size] for i in range(0, len(items), size)]


def _dcg(gains: Sequence[float]) -> float:
    return sum(g / math.log2(rank + 2) for rank, g in enumerate(gains))
