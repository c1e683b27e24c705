"""How good embeddings are: STS by Spearman's correlation, retrieval by nDCG and recall, and what needs no label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from autoregembed.attention import keep_rope_per_text, rope_limit
from autoregembed.cells import as_number, as_text, require_keys, require_text
from autoregembed.models import base_model
from autoregembed.packing import make_microbatches
from autoregembed.tables import read_documents, read_qrels, read_rows

Embed = Callable[[list[str]], Tensor]  # n texts -> (n, D) float, rows of norm 1


class Metric(NamedTuple):
    title: str
    higher: bool  # whether more is better


# What a run is evaluated by (`Config.eval_metric`).
METRICS = {
    "spearman": Metric("Spearman's correlation of cosine with human ratings", True),
    "view_separation": Metric("separation of a text's own halves from those of others, in deviations", True),
    "mean_cosine": Metric("mean cosine of different texts", False),
    "view_accuracy": Metric("share of texts whose first half is nearest to their second", True),
    "effective_rank": Metric("effective rank of the embeddings about their mean", True),
    "uniformity": Metric("log of the mean of exp(-2 |x - y|^2) over different texts", False),
}
LABEL_FREE = tuple(METRICS)[1:]


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
    lengths = [len(x) for x in ids]
    alone = rope_limit(base) is not None  # in a batch the longest text would say how the others are rotated
    keep_rope_per_text(base)
    for part in [[i] for i in range(len(ids))] if alone else make_microbatches(lengths, token_budget):
        # Padded on the right, where causal attention does not look.
        mask = pad_sequence([torch.ones_like(ids[i]) for i in part], batch_first=True).to(base.device)
        padded = pad_sequence([ids[i] for i in part], batch_first=True).to(base.device)
        hidden = base(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state.float()
        out[part] = F.normalize((hidden * mask[..., None]).sum(1), dim=-1).cpu()
    return out


def load_sts(source: str, split: str | None = None) -> Dataset:
    """Rows {sentence1, sentence2, score} of a csv, tsv, jsonl, json or parquet file or a hub data set.

    Raises:
        TypeError, ValueError: a column is missing, there is no row, a sentence is no text or empty, a score is not a
            number (text that reads as a number is one), or all scores are equal.
    """
    table: dict[str, list] = {"sentence1": [], "sentence2": [], "score": []}
    for place, row in read_rows(source, split):
        require_keys(row, list(table), place)
        for name in ("sentence1", "sentence2"):
            table[name].append(require_text(as_text(row[name], name, place), name, place))
        table["score"].append(as_number(row["score"], "score", place))
    if len(set(table["score"])) == 1:
        raise ValueError(
            f"data: got {table['score'][0]} as 'score' in every row of {source!r}, expected at least two values, "
            "without which Spearman's correlation is undefined"
        )
    return Dataset.from_dict(table)


def load_retrieval(corpus: str, queries: str, qrels: str, split: str | None = None) -> tuple[dict, dict, dict]:
    """(queries, corpus, qrels) as `retrieval` takes them, from the three parts of a BEIR data set.

    Args:
        corpus: rows {_id, text, title?}: a file or hub data set; a title stands before its text, either may be empty.
        queries: rows {_id, text}.
        qrels: rows {query-id, corpus-id, score}.
        split: of hub data sets.

    Raises:
        TypeError, ValueError: a column is missing, there is no row, a query is empty, a text or id is none, a relevance
            is not a number, or an id has two texts or a pair two relevances.
    """
    asked = read_documents(queries, split)
    for name, text in asked.items():
        require_text(text, "text", f"query {name!r} of {queries!r}")
    return asked, read_documents(corpus, split), read_qrels(qrels, split)


def spearman(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation, ties at their mean rank.

    Raises:
        ValueError: it is undefined: a value is not finite, or one side has no two different values.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (x, y)]
    for name, side in zip("xy", sides, strict=True):
        if not np.isfinite(side).all():
            raise ValueError(f"{name}: got a value that is not finite, expected numbers")
        if not len(side) or (side == side[0]).all():
            raise ValueError(f"{name}: got no two different values, expected some, as Spearman's correlation needs")
    return float(spearmanr(*sides).statistic)


def sts(embed: Embed, pairs: Any) -> dict[str, Any]:
    """{"spearman": correlation of cosine similarity with the human scores}; every distinct text is embedded once.

    Where it is undefined, {"spearman": None, "spearman_undefined": why}: an encoder that embeds all texts alike, or as
    NaN, has none.
    """
    first, second, scores = (list(pairs[name]) for name in ("sentence1", "sentence2", "score"))
    e, place = _embed_distinct(embed, [*first, *second])
    e = F.normalize(e.double(), dim=1)
    a, b = place.split(len(first))
    try:
        # In fp32 the similarity of a text to itself is 1 for all; the last bits of fp64 would rank them.
        return {"spearman": spearman((e[a] * e[b]).sum(1).float(), scores)}
    except ValueError as error:
        why = str(error).replace("x:", "similarities:", 1).replace("y:", "scores:", 1)
        return {"spearman": None, "spearman_undefined": why}


def load_texts(source: str, split: str | None = None, column: str = "text") -> list[str]:
    """The different texts of a column, in order: of rows, of .txt files or of a folder of them.

    Args:
        column: where the first row lacks it, "text" is read.

    Raises:
        TypeError, ValueError: a row without the column, an empty text or none, or fewer than two different texts.
    """
    texts: dict[str, None] = {}
    for place, row in read_rows(source, split):
        if not texts and column not in row:
            column = "text"
        require_keys(row, [column], place)
        texts[require_text(as_text(row[column], column, place), column, place)] = None
    if len(texts) < 2:
        raise ValueError(f"data: got one text in {source!r}, expected at least two different ones")
    return list(texts)


def label_free(embed: Embed, texts: Sequence[str]) -> dict[str, Any]:
    """`LABEL_FREE` of different texts: what can be said of embeddings where nobody has rated anything.

    Texts and their halves are embedded in one call, n + 2n texts. Where embeddings are not finite, every metric is None
    and "undefined" says why.

    Returns:
        view_separation: with s_ij the cosine of the first half of text i and the second half of text j, (mean s_ii −
            mean s_ij) / std s_ij over i ≠ j: what embeddings tell apart, the same for shifted and for scaled cosines.
            None for fewer than two texts that can be halved, or where all s_ij are equal.
        mean_cosine: of all pairs; near 1 where embeddings share a few strong directions.
        view_accuracy: by cosine, over texts that can be halved, of chance 1/n; None for fewer than two of them.
        effective_rank: exp of the entropy of the singular values about the mean (Roy & Vetterli 2007; RankMe, arXiv
            2210.02885, is the same without the mean), at most min(n − 1, D); 0 where all embeddings are equal.
        uniformity: log mean exp(−2 |x − y|²) (arXiv 2005.10242), 0 where all embeddings are equal.

    Raises:
        ValueError: fewer than two different texts.
    """
    texts = list(dict.fromkeys(texts))
    n = len(texts)
    if n < 2:
        raise ValueError(f"texts: got {n}, expected at least two different ones")
    views = [halves for text in texts if (halves := _halves(text)) is not None]
    embedded = embed([*texts, *(a for a, _ in views), *(b for _, b in views)]).cpu().double()
    e, first, second = F.normalize(embedded, dim=1).split([n, len(views), len(views)])
    if not embedded.isfinite().all():
        return {**dict.fromkeys(LABEL_FREE), "undefined": "embeddings: got a value that is not finite"}
    accuracy = separation = None
    if len(views) > 1:
        nearest = best_columns(first, second, torch.arange(len(views)), 1)
        accuracy = sum(columns == [i] for i, columns in enumerate(nearest)) / len(views)
        cosines, own = first @ second.T, torch.eye(len(views), dtype=torch.bool)
        others = cosines[~own]
        deviation = float(others.std(correction=0))
        if deviation > 1e-7:  # below it is the noise of fp32
            separation = float(cosines[own].mean() - others.mean()) / deviation
    return {
        "view_separation": separation,
        "mean_cosine": float((e.sum(0).square().sum() - e.square().sum()) / (n * (n - 1))),
        "view_accuracy": accuracy,
        "effective_rank": _effective_rank(e),
        "uniformity": float((-2 * torch.pdist(e).square()).exp().mean().log()),
    }


def _halves(text: str) -> tuple[str, str] | None:
    """By words, or by characters where white space parts none."""
    words, gap = (text.split(), " ") if len(text.split()) > 1 else ([*text.strip()], "")
    middle = (len(words) + 1) // 2
    return (gap.join(words[:middle]), gap.join(words[middle:])) if len(words) > 1 else None


def _effective_rank(e: Tensor) -> float:
    deviations = torch.linalg.svdvals(e - e.mean(0)) / math.sqrt(len(e))
    kept = deviations[deviations.square() > 1e-9]  # below it is the noise of fp32
    share = kept / kept.sum()
    return float((-share * share.log()).sum().exp()) if len(kept) else 0.0


def retrieval(
    embed: Embed,
    queries: dict[str, str],
    corpus: dict[str, str],
    qrels: dict[str, dict[str, float]],
    ks: Sequence[int] = (1, 5, 10),
    embed_queries: Embed | None = None,
) -> dict[str, float]:
    """nDCG@10 and recall@k by cosine similarity, as BEIR has them: trec_eval's measures, means over judged queries.

    The gain of a document is its relevance (0 if negative), its discount log2(rank + 1). A document is relevant above
    0. Relevant documents that the corpus lacks count as not found. A query with judgments of which none is relevant
    scores 0; one without judgments does not count. A document with the id of the query is left out as the query
    itself, unless it is judged relevant. Scores are compared in fp32; documents of the same score, such as equal texts,
    rank by id, the last first.

    Args:
        queries, corpus: texts by id.
        qrels: relevance by document id, by query id.
        ks: depths of recall.
        embed_queries: embeds the queries where they have another prompt than the documents.

    Raises:
        ValueError: no document of the corpus is relevant to a query, or an embedding is not finite.
    """
    judged = judged_queries(queries, qrels)
    relevant = {q: {d: r for d, r in qrels[q].items() if r > 0} for q in judged}
    if not any(d in corpus for found in relevant.values() for d in found):
        raise ValueError("qrels: got no relevant document for any query, expected at least one id of the corpus")
    ids = sorted(corpus, reverse=True)
    questions, asked = _embed_distinct(embed_queries or embed, [queries[q] for q in judged])
    documents, place = _embed_distinct(embed, [corpus[d] for d in ids])
    totals = {"ndcg@10": 0.0, **{f"recall@{k}": 0.0 for k in ks}}
    for query, columns in zip(judged, best_columns(questions[asked], documents, place, max(10, *ks) + 1), strict=True):
        relevance = relevant[query]
        ranking = [ids[i] for i in columns if ids[i] != query or query in relevance]
        gains = [relevance.get(d, 0) for d in ranking]
        ideal = sorted(relevance.values(), reverse=True)
        totals["ndcg@10"] += _dcg(gains[:10]) / _dcg(ideal[:10]) if ideal else 0.0
        for k in ks:
            totals[f"recall@{k}"] += sum(g > 0 for g in gains[:k]) / max(len(relevance), 1)
    return {name: total / len(judged) for name, total in totals.items()}


def judged_queries(queries: dict[str, str], qrels: dict[str, dict[str, float]]) -> list[str]:
    """The ids of the queries that `retrieval` takes the mean over, in the order of `queries`."""
    return [q for q in queries if qrels.get(q)]


def _embed_distinct(embed: Embed, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of the distinct texts, and the row of each text in them."""
    rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return embed(list(rows)).cpu(), torch.tensor([rows[text] for text in texts], dtype=torch.int64)


def best_columns(
    questions: Tensor,  # (Q, D)
    documents: Tensor,  # (P, D)
    place: Tensor,  # (n,) int64: the row of `documents` of each candidate
    k: int,
) -> Iterator[list[int]]:
    """Per question the k candidates of the highest product, exactly; of equal ones those that stand first.

    Products are rounded from fp64, so neither the block nor the place in it shows in their bits.
    """
    for name, embeddings in (("queries", questions), ("corpus", documents)):
        if not embeddings.isfinite().all():
            raise ValueError(f"{name}: got an embedding that is not finite, expected finite ones")
    for block in questions.split(256):
        best = torch.empty(len(block), 0, dtype=torch.int64)
        for columns in torch.arange(len(place)).split(1 << 14):
            products = (block.double() @ documents[place[columns]].double().T).float() + 0.0  # no -0.0
            bits = products.view(torch.int32)
            order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers that compare as the floats do
            keys = (order << 32) | (0xFFFFFFFF - columns)  # distinct, so that topk has no tie to break
            best = torch.cat([best, keys], 1).topk(min(k, best.shape[1] + len(columns))).values
        yield from (0xFFFFFFFF - (best & 0xFFFFFFFF)).tolist()


def _dcg(gains: Sequence[float]) -> float:
    return sum(g / math.log2(rank + 2) for rank, g in enumerate(gains))
