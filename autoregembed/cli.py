"""The `autoregembed` command: train, plan, encode, eval, export, probe, doctor, bench, init, completion."""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console

from autoregembed.commands import COMMANDS, HEAVY
from autoregembed.doctor import report
from autoregembed.export_command import export_model
from autoregembed.text_files import read_texts
from autoregembed.train_flags import plan_parser, read_configs, train_parser

console = Console(stderr=False)


def _doctor() -> None:
    """Prints what is installed, which backends run here, and why the others do not."""
    console.print(report(), highlight=False, markup=False, soft_wrap=True)


def _init(name: str | None = None, folder: str | None = None) -> None:
    """Copies a ready configuration, with its comments, into a folder to edit.

    Args:
        name: name of a configuration; without one, the command lists them.
        folder: the folder to create; by default NAME in the current folder. It must not exist.
    """
    found = {p.name: p for p in sorted(_configs().iterdir()) if p.is_dir() and not p.name.startswith("_")}
    if name is None:
        for key, path in found.items():
            first = next(iter(sorted(path.glob("*.yaml")))).read_text(encoding="utf-8").splitlines()[0]
            console.print(f"  {key:<14} {first.lstrip('# ')}", highlight=False, markup=False, soft_wrap=True)
        return
    if name not in found:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(found)}")
    target = Path(folder or name)
    shutil.copytree(found[name], target)  # raises FileExistsError naming the folder
    for file in sorted(target.iterdir()):
        console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
    launch = target / "accelerate.yaml"
    command = f"accelerate launch --config_file {launch} -m autoregembed" if launch.is_file() else "autoregembed"
    stages = " ".join(str(path) for path in sorted(target.glob("stage*.yaml")))
    console.print(f"Set model and train_data, then:\n  {command} train {stages}", soft_wrap=True)


def _configs() -> Path:
    """Inside an installed package, or in the examples of a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "examples" / "configs"


def _exported(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    from autoregembed.models import read_recipe, require_source, wrap_load_errors

    require_source(model)
    recipe = read_recipe(model)
    if recipe and recipe.get("lm_head", True):
        raise ValueError(
            f"model: got {model!r}, a causal LM to train on, expected an export: its sibling export/, or what "
            "Encoder.save_pretrained writes"
        )
    # Without it sentence-transformers would take the mean over all tokens.
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "modules.json")):
        raise ValueError(
            f"model: got {model!r}, which has no modules.json, expected an export: a run's export/, or what "
            "Encoder.save_pretrained or sentence-transformers writes"
        )
    with wrap_load_errors(model):
        return SentenceTransformer(model, model_kwargs={"use_safetensors": True})  # never a pickle


def _require_prompt(exported: Any, prompt_name: str | None) -> None:
    """Which side the texts are of is never guessed: without its prompt a text is read as it never was in training."""
    known = sorted(name for name, prompt in (exported.prompts or {}).items() if prompt)
    if prompt_name is None and known and exported.default_prompt_name is None:
        raise ValueError(f"prompt_name: got None, expected one of {known}, the model's prompts, or none")
    if prompt_name not in (None, "none", *known):
        raise ValueError(f"prompt_name: got {prompt_name!r}, expected one of {known} or none")


def _encode(model: str, texts: str, output: str, column: str | None = None, prompt_name: str | None = None) -> None:
    """Embeds the texts of a file or of stdin with MODEL, an exported folder, into a .safetensors or .npy file.

    Args:
        model: an exported folder, or any sentence-transformers model.
        texts: one text per line ("-" is stdin), or rows: a jsonl, json, csv, tsv or parquet file.
        output: receives the embeddings (n, D), rows of norm 1, in the order of the texts: a NumPy array in a .npy file,
            or the tensor `embeddings` in a .safetensors file.
        column: the column to read in a file of rows; by default text, with the row's title before it, as in BEIR.
        prompt_name: which prompt of the model to put before each text: query, document, or none.
    """
    import numpy
    from safetensors.torch import save_file

    from autoregembed.files import atomic_file, require_writable_file
    from autoregembed.progress import in_parts

    lines = read_texts(texts, column)
    target = Path(output)
    if target.suffix not in (".safetensors", ".npy") and not target.is_dir():
        raise ValueError(f"output: got {output!r}, expected a name that ends in .safetensors or .npy")
    require_writable_file(output, "output")
    exported = _exported(model)
    _require_prompt(exported, prompt_name)
    require_writable_file(output, "output", size=4 * len(lines) * (exported.get_embedding_dimension() or 0))
    prompt = {"prompt": ""} if prompt_name == "none" else {"prompt_name": prompt_name}
    options = {**prompt, "convert_to_tensor": True, "show_progress_bar": False}
    place = {text: i for i, text in enumerate(dict.fromkeys(lines))}  # equal texts are embedded once
    distinct = in_parts(console, "texts", lambda part: exported.encode(part, **options), list(place))
    embeddings = distinct[[place[text] for text in lines]]
    with atomic_file(target) as temporary:
        if target.suffix == ".npy":
            with temporary.open("wb") as file:
                numpy.save(file, embeddings.float().cpu().numpy())
        else:
            save_file({"embeddings": embeddings.cpu().contiguous()}, temporary)
    console.print(f"{len(lines)} embeddings of {embeddings.shape[1]} numbers in {output}")


def _evaluate(
    model: str,
    sts: str | None = None,
    corpus: str | None = None,
    queries: str | None = None,
    qrels: str | None = None,
    split: str | None = None,
    json_file: str | None = None,
) -> None:
    """Scores MODEL, an exported folder, by STS (Spearman with human scores) and retrieval (nDCG@10, recall@k).

    Args:
        model: the exported folder, or any sentence-transformers model.
        sts: rows {sentence1, sentence2, score}: a jsonl, json, csv, tsv or parquet file, or a hub id.
        corpus: rows {_id, text, title?}, as in BEIR.
        queries: rows {_id, text}.
        qrels: rows {query-id, corpus-id, score}.
        split: the split of hub data sets.
        json_file: also receives the result.
    """
    from autoregembed import evaluate
    from autoregembed.files import json_text, require_writable_file, write_json
    from autoregembed.progress import in_parts

    if json_file:
        require_writable_file(json_file, "json_file")
    retrieval = {"corpus": corpus, "queries": queries, "qrels": qrels}
    missing = [name for name, value in retrieval.items() if value is None]
    if len(missing) in (1, 2):
        raise ValueError(f"{missing[0]}: got None, expected a file, since another part of a retrieval task is given")
    if missing and sts is None:
        raise ValueError("sts: got None, expected a file unless corpus, queries and qrels are given")
    pairs = None if sts is None else evaluate.load_sts(sts, split)
    parts = None if missing else evaluate.load_retrieval(str(corpus), str(queries), str(qrels), split)
    exported = _exported(model)
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    shown = Console(stderr=True)  # stdout is the result's alone

    def embed(texts: list[str]) -> Any:
        return in_parts(shown, "texts", lambda part: exported.encode(part, **options), texts).cpu()

    def embed_queries(texts: list[str]) -> Any:
        return in_parts(shown, "queries", lambda part: exported.encode_query(part, **options), texts).cpu()

    def embed_documents(texts: list[str]) -> Any:
        return in_parts(shown, "documents", lambda part: exported.encode_document(part, **options), texts).cpu()

    result: dict = {"model": model}
    if pairs is not None:
        result |= {"sts": sts, "pairs": len(pairs), **evaluate.sts(embed, pairs)}
    if parts is not None:
        asked, documents, judgments = parts
        judged = evaluate.judged_queries(asked, judgments)
        absent = sum(r > 0 and d not in documents for q in judged for d, r in judgments[q].items())
        sizes = {"queries": len(judged), "documents": len(documents), "relevant_but_absent": absent}
        scores = evaluate.retrieval(embed_documents, *parts, embed_queries=embed_queries)
        result |= {"corpus": corpus, **sizes, **scores}
    console.print_json(json_text(result))
    if json_file:
        write_json(Path(json_file), result)


def _probe(
    model: str,
    triplets: str,
    split: str | None = None,
    rows: int = 48,
    block: int = 12,
    json_file: str | None = None,
) -> None:
    """Shows what MODEL, the model/ of a run, has learned, and whether a stage 2 can build on it.

    Args:
        model: the model/ folder of a training run.
        triplets: rows {query, pos} as stage 2 reads them, or {text}, where each text is its own passage.
        split: the split of hub data sets.
        rows: how many rows to read, from the first.
        block: rows per block; within a block, every query is scored with every passage.
        json_file: also receives the numbers.
    """
    from rich.table import Table

    from autoregembed import Decoder, Encoder, data, diagnostics
    from autoregembed.files import require_writable_file, write_json

    if json_file:
        require_writable_file(json_file, "json_file")
    pairs = data.text_pairs(triplets, split, rows)
    encoder, decoder = Encoder.from_pretrained(model), Decoder.from_pretrained(model)
    found = diagnostics.probe(encoder, decoder, *pairs, block=block)
    chance = {name: 1 / min(block, len(pairs[0])) for name in diagnostics.FINDS}
    chance |= {"gradient_in_mean": 1 / encoder.num_compress_tokens}
    table = Table("", "value", "chance", "", title=f"{len(pairs[0])} pairs in blocks of {block}", title_justify="left")
    for name, value in found.items():
        by_chance = f"{chance[name]:.2f}" if name in chance else ""
        table.add_row(name, f"{value:.3f}", by_chance, diagnostics.MEANING[name])
    console.print(table)
    if json_file:
        write_json(Path(json_file), {"model": model, "pairs": len(pairs[0]), "block": block, **found})


def _bench(
    suite: str = "all",
    quick: bool = False,
    device: str | None = None,
    json: str | None = None,
    report: str | None = None,
    compare: str | None = None,
    threshold: float = 1.15,
    rounds: int | None = None,
    rows: int | None = None,
    triplets: str | None = None,
    limit: float | None = None,
    baseline: str | None = None,
    op: str = "linear_logprob",
    shape: str | None = None,
    dtype: str | None = None,
) -> int:
    """Times every op and the training step beside baselines, bare GEMMs and roofline.

    Args:
        suite: ops, step (a training step of both stages), integrations (losses for other trainers) or all.
        device: cpu or cuda; by default a GPU where there is one.
        json: receives the results.
        report: receives an HTML report.
        compare: results of an earlier run; exit status 1 if a time or a peak memory of ours grew beyond the threshold.
        threshold: the allowed growth, as a ratio.
        rounds: how often each case runs.
        rows: triplets in a training step.
        triplets: a jsonl file of query, pos, neg for the steps; by default, passages of news.
        limit: seconds after which no further case starts.
        baseline: module:function, your own kernel, to measure beside ours at one shape.
        op: what your kernel computes: linear_logprob or info_nce.
        shape: N,D,V of linear_logprob; B,P,D of info_nce.
        dtype: bf16, fp16 or fp32; by default bf16 on a GPU, fp32 on a CPU.
    """
    from autoregembed.bench import results
    from autoregembed.bench.suite import bench
    from autoregembed.files import require_writable_file

    old = results.load(Path(compare)) if compare else None
    for name, path in (("json", json), ("report", report)):
        if path:
            require_writable_file(path, name)
    if old is not None:
        results.refuse_quick("compare", old, {"quick": quick})
    files = {"json_file": Path(json) if json else None, "report": Path(report) if report else None}
    options: dict[str, Any] = {"rounds": rounds, "rows": rows, "triplets": triplets, "limit": limit}
    options |= {"baseline": baseline, "op": op, "shape": shape, "dtype": dtype}
    found = bench(suite, quick=quick, device=device, console=console, **files, **options)
    return int(old is not None and bool(results.compare(old, found, threshold, console)))


def _train(arguments: list[str]) -> int:
    from torch import distributed

    from autoregembed.train import train

    configs = read_configs(arguments)
    for config in configs:
        if len(configs) > 1:
            console.rule(f"{config.output_dir}: stage {config.stage}")
        summary = train(config, console)
        metric = summary["eval_metric"]
        found = {step: values.get(metric) for step, values in summary["evaluations"].items()}
        known = [f"step {step}: {value:.4f}" for step, value in found.items() if value is not None]
        if known:
            console.print(f"{metric:<9} " + "  ".join(known), highlight=False)
        if summary["model_step"] != summary["steps"]:
            console.print(f"{'best':<9} step {summary['model_step']}, whose weights are kept", highlight=False)
        for name in ("model", "export"):
            console.print(f"{name:<9} {summary[name]}", highlight=False, markup=False, soft_wrap=True)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    return 0


def _plan(arguments: list[str]) -> int:
    import autoregembed.train  # noqa: F401  what a run imports counts as its libraries
    from autoregembed import plan

    machine, rest = plan.read_machine(arguments)
    return 0 if plan.report(read_configs(rest), machine, console) else 1


def _mute_other_bars() -> None:
    """Ours is the one display of progress; a hub's download keeps its bar."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()  # and the hub's
    enable_progress_bars()


def _named(function: Callable, arguments: list[str]) -> list[str]:
    """Gives leading values the names of the required arguments of `function`, in order; of all where none is."""
    names = inspect.signature(function).parameters
    required = [n for n, p in names.items() if p.default is p.empty] or list(names)
    values = list(itertools.takewhile(lambda a: a == "-" or not a.startswith("-"), arguments))[: len(required)]
    named = [x for name, value in zip(required, values, strict=False) for x in (f"--{name}", value)]
    return named + arguments[len(values) :]


def _completion(shell: Literal["bash", "zsh", "fish", "tcsh"]) -> None:
    """Prints a completion script, for `eval "$(autoregembed completion bash)"` in the shell's start file.

    Args:
        shell: bash, zsh, fish or tcsh.
    """
    set_parsing_settings(add_print_completion_argument=True)
    _parser().parse_args([f"--print_completion=shtab-{shell}"])


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="autoregembed", description=__doc__)
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("train", train_parser(), help=COMMANDS["train"])
    commands.add_subcommand("plan", plan_parser(), help=COMMANDS["plan"])
    for name, function in _functions().items():
        sub = ArgumentParser(description=(function.__doc__ or "").split("\n\n")[0])
        flags = [n for n, p in inspect.signature(function).parameters.items() if p.default is False]
        sub.add_function_arguments(function, skip=set(flags))
        for flag in flags:
            sub.add_argument(f"--{flag}", action="store_true", help="tiny sizes, to see that everything runs")
        commands.add_subcommand(name, sub, help=COMMANDS[name])
    return parser


def _functions() -> dict[str, Callable]:
    return {
        "encode": _encode, "eval": _evaluate, "doctor": _doctor, "bench": _bench, "init": _init,
        "probe": _probe, "export": export_model,
        "completion": _completion,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0: done. 1: slower than `bench --compare` allows, or too large by `plan`. 2: bad input. 130: interrupted, with a
    checkpoint saved.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        name = arguments[0] if arguments else ""
        if name in HEAVY:
            _mute_other_bars()
        if name in ("train", "plan"):
            if "-h" in arguments or "--help" in arguments:
                (train_parser() if name == "train" else plan_parser()).print_help()
                return 0
            return (_train if name == "train" else _plan)(arguments[1:])
        functions = _functions()
        if name in functions:
            arguments = [name, *_named(functions[name], arguments[1:])]
        parsed = _parser().parse_args(arguments)
        options = parsed[parsed.command].as_dict() if parsed.get(parsed.command) else {}
        options = {n: os.path.expanduser(v) if isinstance(v, str) else v for n, v in options.items()}
        return functions[parsed.command](**options) or 0
    except KeyboardInterrupt as stop:
        console.print(str(stop) or "interrupted")
        return 130
    except (ValueError, TypeError, IndexError, ArithmeticError, OSError, RuntimeError, MemoryError) as error:
        Console(stderr=True).print(
            f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
