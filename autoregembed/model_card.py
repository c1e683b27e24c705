"""The README.md of an exported folder: what the model is, how it was made, what it scores, how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from autoregembed.config import Config
from autoregembed.evaluate import METRICS
from autoregembed.tables import sources_of

TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "autoregembed"]
CITATION = """\
@inproceedings{deng2025following,
  title     = {Following the Autoregressive Nature of LLM Embeddings via Compression and Alignment},
  author    = {Deng, Jingcheng and others},
  booktitle = {EMNLP},
  year      = {2025},
  note      = {arXiv:2502.11401}
}"""


@dataclass
class Card:
    """What only the person who trained a model knows. Of a local path, the card shows only the last part.

    Args:
        base_model: the model that training started from, before any stage.
        license: an SPDX id, or another one that the Hugging Face hub knows. It is never guessed.
        train_data: the data file or data set.
        recipe: the options of the training, in types that YAML can represent.
        eval_data: the data of `evaluations`.
        evaluations: the metrics of `evaluate.METRICS` by step, "0" before training; an undefined one is None.
        eval_metric: the metric that the card shows.
        model_name: the name of this model, such as its hub id; by default that of the base model with -autoregembed.
    """

    base_model: str | None = None
    license: str = "unknown"
    train_data: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    eval_data: str | None = None
    evaluations: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    eval_metric: str = "spearman"
    model_name: str | None = None


def _hub_id(source: str | None) -> str | None:
    """The id of a model on the hub, also of its copy in the hub's cache; None for any other folder or file."""
    if source is None:
        return None
    if cached := re.search(r"(?:^|[\\/])models--([^\\/]+)(?:[\\/]|$)", source):
        return cached[1].replace("--", "/", 1)
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source) and not Path(source).exists()
    return source if known else None


def _name(source: str | None) -> str | None:
    """A hub id as it is; of anything that lies on this disk its last part."""
    if source is None:
        return None
    return _hub_id(source) or Path(source).name


def _servers(num_compress_tokens: int, centred: bool) -> str:
    if centred:
        return (
            "sentence-transformers computes these vectors, and so does what runs on it. They are centred by a layer "
            "behind the pooling, which vLLM and Text Embeddings Inference do not apply: both refuse this folder. Do "
            "not force a pooling on them; the vectors would be others."
        )
    if num_compress_tokens == 1:
        return (
            "sentence-transformers, vLLM and Text Embeddings Inference compute these vectors from this folder: the "
            "embedding is the state of the last token. No other server has been looked at."
        )
    return (
        f"sentence-transformers computes these vectors, and so does what runs on it. The embedding is the mean of the "
        f"states of the last {num_compress_tokens} tokens, which vLLM and Text Embeddings Inference cannot compute: "
        "both refuse this folder. Do not force a pooling on them; the vectors would be others."
    )


def adapter_card(model: str, instruction: str, num_compress_tokens: int, gguf_file: str | None = None) -> str:
    """README.md of an adapter's folder: three lines that load it."""
    options = f"instruction={instruction!r}, num_compress_tokens={num_compress_tokens}"
    if gguf_file is not None:
        options += f", gguf_file={gguf_file!r}"
    return (
        "# A LoRA adapter by autoregembed\n\n"
        f"It holds the embeddings of {num_compress_tokens} compress tokens too, and belongs to `{model}` alone. The "
        "first path is that model, the second this folder. `PeftModel.from_pretrained` would not add the compress "
        "tokens.\n\n"
        "```python\nfrom autoregembed import Encoder\n"
        f'encoder = Encoder.from_pretrained({model!r}, {options}, adapter="adapter")\n'
        'embeddings = encoder.encode(["A text.", "Another one."])\n```\n'
    )


def model_card(
    card: Card, *, name: str, width: int, max_length: int, num_compress_tokens: int, centred: bool = False
) -> str:
    """Markdown with YAML metadata, as the Hugging Face hub reads it.

    Args:
        card: what is known of the training.
        name: of its folder: the model's where nothing else is known.
        width: D, numbers of an embedding.
        max_length: tokens of a text, with instruction and compress tokens.
        num_compress_tokens: K.
        centred: a `Centering` follows the pooling.
    """
    values = ((int(step), found.get(card.eval_metric)) for step, found in card.evaluations.items())
    measured = sorted((step, value) for step, value in values if value is not None)
    hub_id = _hub_id(card.base_model)
    base, data, held_out = _name(card.base_model), _name(card.train_data), _name(card.eval_data) or "unnamed"
    name = card.model_name or (f"{Path(base).name}-autoregembed" if base else name)
    facts = {"license": card.license != "unknown", "base_model": hub_id, "the training data": data}
    missing = [fact for fact, known in facts.items() if not known]
    scored: dict[str, Any] = {"task_type": "sts", "dataset_type": held_out, "dataset_name": held_out}
    results = None
    if measured and card.eval_metric == "spearman":  # the others are no scores that a hub knows
        results = [EvalResult(**scored, metric_type="spearman_cosine", metric_value=round(measured[-1][1], 4))]
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        license=card.license,
        base_model=hub_id,
        tags=TAGS,
        model_name=name,
        eval_results=results,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"A text embedder of {width} numbers, made from {base or 'a causal language model'} by AutoRegEmbed. It reads "
        f"at most {max_length} tokens, with an instruction and {num_compress_tokens} compress tokens that its "
        "tokenizer appends. Compare embeddings by cosine.",
        *([f"**Fill in before pushing to a hub:** {', '.join(missing)}. Then remove this line."] if missing else []),
        "```python\nfrom sentence_transformers import SentenceTransformer\n"
        f'model = SentenceTransformer("{name}")  # or the path of this folder\n'
        'embeddings = model.encode(["A text.", "Another one."])\n```',
        "## Servers",
        _servers(num_compress_tokens, centred),
        "## Training",
        f"Data: {data or 'not stated'}. Licence of the model: {card.license}.",
    ]
    if card.recipe:
        parts.append(f"```yaml\n{yaml.safe_dump(dict(card.recipe), sort_keys=False).strip()}\n```")
    if measured:
        steps = ["before" if step == 0 else f"after step {step}" for step, _ in measured]
        rows = [f"| {step} | {score:.4f} |" for step, (_, score) in zip(steps, measured, strict=True)]
        title = METRICS[card.eval_metric].title
        parts += ["## Scores", f"{title[0].upper()}{title[1:]}, {held_out}:"]
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    parts += ["## Citation", f"```bibtex\n{CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def run_card(
    config: Config, base_model: str, eval_metric: str | None, evaluations: Mapping[str, Mapping[str, float | None]]
) -> Card:
    """The model card's facts of a run: the options that are not the default, without the places of its files."""
    left_out = {"model", "decoder", "train_data", "eval_data", "ref_logps_file", "output_dir"}
    left_out |= {"resume_from_checkpoint", "log_with", "num_proc", "license", "model_name"}
    defaults = {f.name: [] if f.default is MISSING else f.default for f in fields(Config)}
    recipe = {k: v for k, v in asdict(config).items() if k not in left_out and v != defaults[k]}
    sources = [Path(s).name if Path(s).exists() else s for s in sources_of(config.train_data)]
    train_data = ", ".join(sources)
    return Card(
        base_model, config.license, train_data, recipe, config.eval_data, evaluations, eval_metric or "spearman",
        config.model_name,
    )  # fmt: skip
