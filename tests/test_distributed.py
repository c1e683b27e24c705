"""Several processes, joined by gloo, against one process on the joined batch."""

import os

import distributed_cases as cases
import numpy as np
import pytest
from conftest import sentence, write_jsonl
from safetensors.numpy import load_file


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The server that forks the workers is started with these."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[int, str]:
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
    return {1: write_jsonl(folder / "1.jsonl", stage1), 2: write_jsonl(folder / "2.jsonl", stage2)}


STEPS = {
    "compression": {"stage": 1},
    "compression in parts": {"stage": 1, "token_budget": 80},
    "both losses": {"stage": 2, "contrastive_weight": 0.7, "hard_negatives": True},
    "both losses in parts": {"stage": 2, "contrastive_weight": 0.7, "hard_negatives": True, "token_budget": 160},
    "joint negatives in parts": {"stage": 2, "negatives": "joint", "reference": "subtract", "token_budget": 120},
    "contrast alone": {"stage": 2, "alignment_weight": 0.0, "contrastive_weight": 1.0},
}


def config_of(model_folder: str, files: dict[int, str], **options) -> dict:
    fields = {"model": model_folder, "train_data": files[options["stage"]], "output_dir": "unused", "batch_size": 8}
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


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_is_that_of_one_process_on_the_joined_batch(model_folder, files, alone, tmp_path, world):
    configs = [config_of(model_folder, files, **options) for options in STEPS.values()]
    found = cases.run(cases.one_step, world, tmp_path, configs)
    for i, (name, wanted) in enumerate(alone.items()):
        steps = [process[i] for process in found]
        assert len({step["counts"]["loss"] for step in steps}) > 1 or "contrast" in name
        if "parts" in name:
            assert len({step["parts"] for step in steps}) > 1
        assert wanted["norm"] > 0.5  # it is clipped
        for step in steps:
            assert distance(step["gradients"], wanted["gradients"]) < 1e-10, name
            assert step["norm"] == pytest.approx(wanted["norm"], rel=1e-10)
            assert distance(step["parameters"], wanted["parameters"]) < 1e-10, name
            assert step["log"] == pytest.approx(wanted["log"], rel=1e-5), name
            if wanted["reference"] is not None:
                np.testing.assert_allclose(step["reference"][0], wanted["reference"][0], rtol=1e-6)
                np.testing.assert_allclose(step["reference"][1], wanted["reference"][1], rtol=1e-6)


@pytest.fixture(scope="module")
def trained_alone(model_folder, files, tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("run")
    cases.run(cases.one_run, 1, folder / "work", run_of(model_folder, files, folder / "out", 4))
    return load_file(folder / "out" / "model" / "model.safetensors")


def run_of(model_folder: str, files: dict[int, str], out, batch_size: int) -> dict:
    rows = [{"sentence1": sentence(i, 5), "sentence2": sentence(i % 4, 6), "score": i % 6} for i in range(13)]
    sts = write_jsonl(out.parent / "sts.jsonl", rows)
    options = {"stage": 2, "output_dir": str(out), "eval_data": sts, "contrastive_weight": 0.7, "token_budget": 120}
    options |= {"reference_file": str(out.parent / "reference.safetensors"), "steps": 4, "batch_size": batch_size}
    return config_of(model_folder, files, **options)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_run_of_two_processes_ends_where_one_does(model_folder, files, trained_alone, tmp_path, sharded):
    arguments = (cases.one_run, run_of(model_folder, files, tmp_path / "out", 2))
    (first, main), (second, other) = cases.run(
        cases.fsdp if sharded else arguments[0], 2, tmp_path / "work", *arguments[1 - sharded :]
    )
    assert first == second
    assert len(set(first["spearman"].values())) == 2
    assert main
    assert not other
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert found.keys() == trained_alone.keys()
    for name in found:
        np.testing.assert_allclose(found[name], trained_alone[name], rtol=1e-4, atol=1e-5, err_msg=name)
