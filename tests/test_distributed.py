"""Several processes, joined by gloo, against one process on the joined batch."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_cases as cases
import numpy as np
import pytest
from conftest import sentence, write_jsonl
from safetensors.numpy import load_file

from autoregembed.testing import tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The server that forks the workers is started with these."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """Data whose first rows are long and last rows short; the first have no negative, later ones up to three."""
    folder = tmp_path_factory.mktemp("rows")
    sizes = [40, 36, 30, 24, 9, 5, 2, 2]
    stage1 = [{"context": sentence(i, n), "output": sentence(i, 2 + n // (1 + i % 2))} for i, n in enumerate(sizes)]
    stage2 = [
        {
            "query": sentence(i, n),
            "pos": sentence(100 + i, 2 + n // 2),
            "neg": [sentence(200 + 7 * i + j, 3 + j) for j in range(max(0, i - 3) % 4)],
        }
        for i, n in enumerate(sizes)
    ]
    rare = [{**row, "neg": row["neg"][: i == 5]} for i, row in enumerate(stage2)]
    repeated = [
        {**row, "pos": stage2[i % 3]["pos"], "neg": [stage2[(i + 1) % 3]["pos"]]} for i, row in enumerate(stage2)
    ]
    rows = {1: stage1, 2: stage2, "one negative": rare, "repeated": repeated}
    return {name: write_jsonl(folder / f"{name}.jsonl", some) for name, some in rows.items()}


STEPS = {
    "compression": {"stage": 1},
    "compression in parts": {
        "stage": 1, "token_budget": 80, "gradient_checkpointing": "selective",
        "decoder_gradient_checkpointing": "selective",
    },
    "both losses": {"stage": 2, "contrastive_weight": 0.7, "hard_negatives": True},
    "both losses in parts": {"stage": 2, "contrastive_weight": 0.7, "hard_negatives": True, "token_budget": 160},
    "joint negatives in parts": {"stage": 2, "negatives": "joint", "ref_margin": "subtract", "token_budget": 120},
    "one negative in all": {"stage": 2, "train_data": "one negative"},
    "contrast of repeated texts": {
        "stage": 2, "alignment_weight": 0.0, "contrastive_weight": 1.0, "hard_negatives": True,
        "train_data": "repeated",
    },
    "contrast alone": {"stage": 2, "alignment_weight": 0.0, "contrastive_weight": 1.0},
    "a shared base": {"stage": 1, "lora_rank": 2, "share_base": True},
    "a shared base in parts": {
        "stage": 2, "lora_rank": 2, "share_base": True, "token_budget": 160, "contrastive_weight": 0.7,
        "gradient_checkpointing": True,
    },
}  # fmt: skip


def config_of(model_folder: str, files: dict, **options) -> dict:
    options["train_data"] = files[options.get("train_data", options["stage"])]
    fields = {"model": model_folder, "output_dir": "unused", "batch_size": 8}
    return {**fields, "instruction": "Go.", "precision": "fp32", "learning_rate": 1e-3, "max_grad_norm": 0.5, **options}


@pytest.fixture(scope="module")
def alone(model_folder, files, tmp_path_factory) -> dict[str, dict]:
    configs = [config_of(model_folder, files, **options) for options in STEPS.values()]
    (found,) = cases.run(cases.one_step, 1, tmp_path_factory.mktemp("alone"), configs)
    return dict(zip(STEPS, found, strict=True))


def distance(found: dict, wanted: dict) -> float:
    """Relative to the norm of all of them."""
    assert found.keys() == wanted.keys()
    square = sum(np.square(found[n] - wanted[n]).sum() for n in wanted)
    return float(np.sqrt(square / sum(np.square(x).sum() for x in wanted.values())))


def called(sharded: bool, function, *arguments) -> tuple:
    return (cases.fsdp, function, *arguments) if sharded else (function, *arguments)


def assert_same_steps(found: list[list[dict]], alone: dict[str, dict]) -> None:
    """What each process found for each of `alone`."""
    for i, (name, wanted) in enumerate(alone.items()):
        steps = [process[i] for process in found]
        assert len({step["counts"]["loss"] for step in steps}) > 1 or "contrast" in name
        if "parts" in name:
            assert len({step["parts"] for step in steps}) > 1
        assert wanted["norm"] > 0.5 or name == "one negative in all"  # it is clipped
        # The norms of the model round to float32, otherwise in other packs: those of parts, and of a process whose
        # pairs share enough prefixes where another's do not.
        room = 1e-6 if "parts" in name or name == "one negative in all" else 1e-10
        for step in steps:
            assert distance(step["gradients"], wanted["gradients"]) < room, name
            assert step["norm"] == pytest.approx(wanted["norm"], rel=room)
            assert distance(step["parameters"], wanted["parameters"]) < room, name
            assert step["log"] == pytest.approx(wanted["log"], rel=1e-5), name
            if wanted["reference"] is not None:
                np.testing.assert_allclose(step["reference"][0], wanted["reference"][0], rtol=1e-6)
                np.testing.assert_allclose(step["reference"][1], wanted["reference"][1], rtol=1e-6)


@pytest.mark.parametrize(("world", "sharded"), [(2, False), (4, False), (2, True)], ids=["ddp-2", "ddp-4", "fsdp2-2"])
def test_a_step_is_that_of_one_process_on_the_joined_batch(model_folder, files, alone, tmp_path, world, sharded):
    configs = [config_of(model_folder, files, **options) for options in STEPS.values()]
    function, *arguments = called(sharded, cases.one_step, configs)
    assert_same_steps(cases.run(function, world, tmp_path, *arguments), alone)


def test_so_is_a_step_on_shards_within_a_node_and_copies_between_nodes(model_folder, files, alone, tmp_path):
    wanted = {name: alone[name] for name in ("compression", "a shared base in parts")}
    configs = [config_of(model_folder, files, **STEPS[name]) for name in wanted]
    assert_same_steps(cases.run(cases.hybrid, 4, tmp_path, cases.one_step, configs, seconds=300), wanted)


@pytest.fixture(scope="module")
def trained_alone(model_folder, files, tmp_path_factory) -> Path:
    """The folder of a run of one process, on batches of 4."""
    folder = tmp_path_factory.mktemp("run")
    cases.run(cases.one_run, 1, folder / "work", run_of(model_folder, files, folder / "out", 4))
    return folder / "out"


def assert_same_run(out: Path, wanted: Path) -> None:
    """Losses and gradient norms of every step, and the weights at the end."""
    logs = [[json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (out, wanted)]
    assert [row["step"] for row in logs[0]] == [1, 2, 3, 4]
    for found, expected in zip(*logs, strict=True):
        for name in ("loss", "align", "nce", "s1", "s2", "accuracy", "grad_norm", "lr"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    weights, expected = (load_file(x / "model" / "model.safetensors") for x in (out, wanted))
    assert weights.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(weights[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def run_of(model_folder: str, files: dict, out, batch_size: int) -> dict:
    rows = [{"sentence1": sentence(i, 5), "sentence2": sentence(i % 4, 6), "score": i % 6} for i in range(13)]
    sts = write_jsonl(out.parent / "sts.jsonl", rows)
    options = {"stage": 2, "output_dir": str(out), "eval_data": sts, "contrastive_weight": 0.7, "token_budget": 120}
    options |= {"ref_logps_file": str(out.parent / "reference.safetensors"), "max_steps": 4, "batch_size": batch_size}
    return config_of(model_folder, files, **options)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_run_of_two_processes_ends_where_one_does(model_folder, files, trained_alone, tmp_path, sharded):
    function, *arguments = called(sharded, cases.one_run, run_of(model_folder, files, tmp_path / "out", 2))
    (first, main), (second, other) = cases.run(function, 2, tmp_path / "work", *arguments)
    assert first.pop("train_seconds") + second.pop("train_seconds") > 0
    assert first == second
    assert len({found["spearman"] for found in first["evaluations"].values()}) == 2
    files_of_a_run = ("config.json", "metrics.jsonl", "summary.json", "model", "export")
    assert {"reference.safetensors", *(f"out/{name}" for name in files_of_a_run)} <= set(main)
    assert [name for name in other if not name.startswith("work")] == []
    assert_same_run(tmp_path / "out", trained_alone)


def test_shards_take_the_decoders_rms_as_one_model_does(model_folder, files, tmp_path):
    bases = {"all weights": {}, "own base": {"share_base": False}, "shared base": {"share_base": True}}
    options = {"stage": 1, "init_output_rms": True, "max_steps": 1, "token_budget": 80}

    def runs(folder: str, batch_size: int) -> list[dict]:
        return [
            config_of(
                model_folder, files, **options, output_dir=str(tmp_path / folder / name), batch_size=batch_size,
                lora_rank=2 * bool(base), **base,
            )
            for name, base in bases.items()
        ]  # fmt: skip

    cases.run(cases.several_runs, 1, tmp_path / "work", runs("alone", 4))
    cases.run(cases.fsdp, 2, tmp_path / "sharded work", cases.several_runs, runs("sharded", 2))
    start = load_file(Path(model_folder) / "model.safetensors")
    for name in bases:
        found, wanted = (
            load_file(tmp_path / place / name / "model" / "model.safetensors") for place in ("sharded", "alone")
        )
        assert found.keys() == wanted.keys()
        for key in wanted:
            np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5, err_msg=f"{name}: {key}")
        assert np.abs(wanted["model.norm.weight"] - start["model.norm.weight"]).mean() > 0.1  # more than a step


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_stopped_run_goes_on_to_the_same_weights(model_folder, files, trained_alone, tmp_path, sharded):
    case = run_of(model_folder, files, tmp_path / "out", 2)
    function, *arguments = called(sharded, cases.stopped, case, 1)
    found = cases.run(function, 2, tmp_path / "work", *arguments)
    assert found[0] == found[1]
    assert "step 3" in found[0]
    function, *arguments = called(sharded, cases.one_run, {**case, "resume_from_checkpoint": True})
    cases.run(function, 2, tmp_path / "again", *arguments)
    assert_same_run(tmp_path / "out", trained_alone)


def test_rows_are_gathered_with_their_gradients(tmp_path):
    cases.run(cases.gathered_rows, 4, tmp_path)


def test_texts_are_embedded_in_shares(model_folder, files, tmp_path):
    cases.run(cases.shared_embeddings, 3, tmp_path, config_of(model_folder, files, stage=1))


def test_a_decoder_whose_weights_are_shared_out_scores_the_same_and_keeps_nothing(tmp_path):
    cases.run(cases.sharded_decoder, 2, tmp_path)


def test_a_decoder_on_an_encoders_shards_scores_the_same_and_keeps_nothing(tmp_path):
    cases.run(cases.shared_shards, 2, tmp_path)


def test_stage_2_in_passes_through_a_decoder_whose_weights_are_shared_out(tmp_path):
    cases.run(cases.sharded_passes, 2, tmp_path)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others_with_an_error(model_folder, files, tmp_path, victim):
    case = run_of(model_folder, files, tmp_path / "out", 2)
    results = cases.finish(cases.start(cases.dying, 2, tmp_path / "work", case, victim), seconds=60)
    assert results[victim][0] == "dead"
    state, error = results[1 - victim]
    assert state == "failed"
    assert "gloo" in error.lower() or "closed" in error


def test_what_process_0_finds_wrong_is_raised_by_all(model_folder, files, tmp_path):
    (tmp_path / "reference.safetensors").write_text("rubbish")
    found = cases.run(cases.refused, 2, tmp_path / "work", run_of(model_folder, files, tmp_path / "out", 2))
    assert found[0] == found[1]
    assert found[0].startswith("CheckpointError: ref_logps: got a damaged file")


def launched(arguments: list[str], files: dict, model_folder: str, folder) -> Path:
    """Runs a launcher with the package's command on a YAML file; the folder of the run."""
    options = run_of(model_folder, files, folder / "out", 2)
    (folder / "run.yaml").write_text(json.dumps(options))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        [*arguments, "-m", "autoregembed", "train", str(folder / "run.yaml")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall(r"^export ", done.stdout, re.MULTILINE)) == 1  # one process tells where the results are
    return folder / "out"


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers_end_where_one_process_does(model_folder, files, trained_alone, tmp_path, launcher):
    options = {
        "torch.distributed.run": ["--standalone", "--nproc_per_node", "2"],
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    }[launcher]
    out = launched([sys.executable, "-m", launcher, *options], files, model_folder, tmp_path)
    assert_same_run(out, trained_alone)


def test_the_page_on_scaling_shows_what_its_command_prints_for_real_parameter_counts():
    from autoregembed.bench import scaling

    page = (Path(scaling.__file__).parents[1] / "docs" / "explanation" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.tables(64, 1, {"7B": 4096, "70B": 1024}, [8, 16, 64, 128, 512]) in page
    tiny = scaling.Shape(2, 32, 64, 4, 2, 8, 320)
    assert tiny.total == sum(p.numel() for p in tiny_model("llama", tie_word_embeddings=False).parameters())
    biased = dataclasses.replace(tiny, qkv_bias=True)
    assert biased.total == sum(p.numel() for p in tiny_model("qwen2", tie_word_embeddings=False).parameters())
