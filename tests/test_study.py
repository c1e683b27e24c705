import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from conftest import sentence, write_jsonl
from sentence_transformers import SentenceTransformer

from autoregembed.evaluate import spearman

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "study" / "run.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_runs_goes_on_where_it_was_cut_and_counts_what_it_ran(study, tmp_path, model_folder):
    triplets = [{"query": sentence(i, 9), "pos": sentence(i + 50, 5), "neg": sentence(i + 400, 6)} for i in range(300)]
    pairs = [{"sentence1": sentence(i, 5), "sentence2": sentence(i + 1, 6), "score": i % 5} for i in range(20)]
    command = ["--budget", "quick", "--model", model_folder, "--output", str(tmp_path / "out")]
    command += ["--triplets", write_jsonl(tmp_path / "t.jsonl", triplets)]
    command += ["--development", write_jsonl(tmp_path / "d.jsonl", pairs), "--test", str(tmp_path / "d.jsonl")]
    command += ["--only", "stage1", "stage1-alignment", "infonce-compute", "--ablations", "token-mean", "four-joint"]
    step = {"op": "step", "variant": "autoregembed", "curve": None}
    steps = [{**step, "job": f"stage{stage}", "speedup": 1.0 + stage} for stage in (1, 2)]
    steps += [{**steps[1], "curve": "K", "speedup": 9.0}, {**steps[1], "op": "head", "speedup": 9.0}]
    (tmp_path / "steps.json").write_text(json.dumps({"rows": steps}))
    command += ["--step-results", str(tmp_path / "steps.json")]

    def run(*more: str) -> dict:
        study.main([*command, *more])
        file = f"results{'-of-seeds-' * bool(more)}{''.join(more[1:])}.json"
        return json.loads((tmp_path / "out" / file).read_text())

    second = run("--seeds", "1")
    first = run()
    assert [r for r in first["cells"]["stage1-alignment"] if r["seed"] == 1] == second["cells"]["stage1-alignment"]
    runs = tmp_path / "out" / "runs"
    # Two seeds of stage 1, alignment and InfoNCE at equal compute (whose measure is counted, not run); two ablations.
    assert len(list(runs.glob("*/summary.json"))) == 8
    compute = {name: [r["tflops"] for r in cell] for name, cell in first["cells"].items()}
    assert compute["infonce-compute"][0] > 1.5 * compute["stage1"][0]
    times = {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
    assert run() == first
    # What is there can be seen before all of it is: without the second seed of one cell, and without an ablation.
    hidden = {}
    for config in (first["cells"]["stage1-alignment"][1], first["ablations"]["four-joint"]):
        folder = (tmp_path / "out" / config["export"]).parent
        hidden[folder] = folder.rename(folder.with_suffix(".hidden"))
    study.main([*command, "--collect"])
    part = json.loads((tmp_path / "out" / "results.json").read_text())
    assert part["cells"] == {**first["cells"], "stage1-alignment": first["cells"]["stage1-alignment"][:1]}
    assert list(part["ablations"]) == ["token-mean"]
    for folder, elsewhere in hidden.items():
        elsewhere.rename(folder)
    assert run() == first
    assert times == {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
    assert "| stage1-alignment | 2 |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "study.svg").read_text().count("<svg") == 1
    rows = [row.split(" | ") for row in (tmp_path / "out" / "ablations.md").read_text().splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["| **stage1-alignment**", ""],
        ["| token-mean", "logprob_reduction: mean, beta: 1.0"],
        ["| four-joint", "data: four, negatives: joint"],
    ]
    values = [first["cells"]["stage1-alignment"][0], *first["ablations"].values()]
    assert [row[2] for row in rows] == [f"{v['development']:.3f}" for v in values]
    learning = [row.split(" | ") for row in (tmp_path / "out" / "learning.md").read_text().splitlines()[2:]]
    (stage1,) = (r for r in learning if r[1:3] == ["1", "4"])
    (stage2,) = (r for r in learning if r[:3] == ["| stage1-alignment", "2", "2"])
    assert stage1[0] == "| stage1", "a stage 1 that two cells share stands with the first"
    runs = [seed["runs"] for seed in first["cells"]["stage1-alignment"]]
    assert stage1[3] == f"{runs[0][0]['tokens'] / 1e3:.0f}k"
    seconds = [(a["seconds"] + b["seconds"]) / 2 for a, b in zip(*runs, strict=True)]
    assert stage2[5:7] == [f"{sum(seconds) / 60:.1f}", f"{(2 * seconds[0] + 3 * seconds[1]) / 60:.1f}"]


def test_a_cell_after_another_starts_from_its_model_and_differences_are_by_seed(study, tmp_path, model_folder):
    triplets = [{"query": sentence(i, 9), "pos": sentence(i + 50, 5), "neg": sentence(i + 400, 6)} for i in range(400)]
    pairs = [{"sentence1": sentence(i, 5), "sentence2": sentence(i + 1, 6), "score": i % 5} for i in range(20)]
    out, file = tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", pairs)
    command = ["--plan", "distillation.yaml", "--budget", "quick", "--model", model_folder]
    command += ["--triplets", write_jsonl(tmp_path / "t.jsonl", triplets), "--development", file, "--test", file]
    command += ["--output", str(out), "--only"]
    names = ["stage1", "texts", "infonce-128", "texts-infonce-128"]
    with pytest.raises(SystemExit, match="--only: got 'texts-infonce-128' without 'texts'"):
        study.main([*command, names[3]])
    study.main([*command, *names])
    found = json.loads((out / "results.json").read_text())
    steps = {name: [[run["steps"] for run in seed["runs"]] for seed in cell] for name, cell in found["cells"].items()}
    assert steps == dict(zip(names, ([[4]] * 2, [[4, 2]] * 2, [[4, 16]] * 2, [[4, 2, 16]] * 2), strict=True))
    configs = [json.loads(f.read_text()) for f in out.glob("runs/*/config.json")]
    (last,) = (c for c in configs if c["max_steps"] == 16 and c["seed"] == 1 and "texts" in source(c["model"]))
    assert source(last["model"]) == ["texts", "reconstruct"]
    # A cell's difference is that of the same seed, and its standard error that of the differences.
    (row,) = (r for r in (out / "paired.md").read_text().splitlines() if r.startswith("| texts-infonce-128 |"))
    less = [
        a["test"] - b["test"]
        for a, b in zip(found["cells"]["texts-infonce-128"], found["cells"]["infonce-128"], strict=True)
    ]
    assert f"| {sum(less) / 2:+.3f} ± {abs(less[0] - less[1]) / 2:.3f} |" in row
    # Pairs that the study has not read, scored by what is left of a finished run.
    first = json.loads((out / "data" / "test.jsonl").read_text().splitlines()[0])
    few = [first, *(pair for pair in pairs if pair != first)][:11]
    other = [{"sentence1": sentence(i, 7), "sentence2": sentence(i + 1, 7), "score": i % 5} for i in range(6)]
    files = write_jsonl(tmp_path / "few.jsonl", few), write_jsonl(tmp_path / "other.jsonl", other)
    with pytest.raises(SystemExit, match=r"--held-out: got no pair in .*test.jsonl that"):
        study.main([*command, *names, "--held-out", str(out / "data" / "test.jsonl")])
    command[-1:] = ["--held-out", *files, "--only"]
    study.main([*command, *names])
    again = json.loads((out / "results.json").read_text())
    assert again["held_out"] == ["few.jsonl", "other.jsonl"]
    exported = SentenceTransformer(str(out / again["cells"]["infonce-128"][1]["export"]))
    unread = {tuple(row.values()) for row in few} - {
        tuple(json.loads(line).values())
        for name in ("development", "test")
        for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()
    }
    assert 0 < len(unread) <= 8
    a, b = (exported.encode([row[i] for row in unread]) for i in (0, 1))
    expected = spearman(exported.similarity_pairwise(a, b), [row[2] for row in unread])
    assert again["cells"]["infonce-128"][1]["few.jsonl"] == pytest.approx(expected)
    assert again["untrained"]["all_tokens"].keys() == {"development", "test", "few.jsonl", "other.jsonl"}
    (row,) = (r for r in (out / "table.md").read_text().splitlines() if r.startswith("| infonce-128 |"))
    few_scores = [run["few.jsonl"] for run in again["cells"]["infonce-128"]]
    assert f"| {sum(few_scores) / 2:.3f} ± {abs(few_scores[0] - few_scores[1]) / 2**0.5:.3f} |" in row


def source(model: str) -> list[str]:
    """Names of the data that the runs behind a model read, the last first."""
    config = Path(model).parent / "config.json"
    if not config.is_file():
        return []
    run = json.loads(config.read_text())
    return [Path(run["train_data"]).stem, *source(run["model"])]


def test_the_page_shows_what_the_committed_results_say(study):
    root = SCRIPT.parents[2]
    found = json.loads((root / "bench" / "results" / "study-cpu.json").read_text())
    page = (root / "docs" / "explanation" / "study.md").read_text(encoding="utf-8")
    assert study.table(found) in page
    assert study.ablations(found) in page
    assert study.learning(found, study.released_ratios(root / "bench" / "results" / "bench-cpu.json")) in page
    found = json.loads((root / "bench" / "results" / "study-distillation-cpu.json").read_text())
    assert study.table(found) in page
    assert study.paired(found, yaml.safe_load(SCRIPT.with_name("distillation.yaml").read_text())["paired"]) in page
