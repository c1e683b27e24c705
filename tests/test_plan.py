"""`autoregembed plan` against the resident memory of the runs that it plans."""

import plan_cases
import pytest
import torch
from conftest import sentence, stage1

from autoregembed import models, passes, plan, train
from autoregembed.cli import main
from autoregembed.config import Config
from autoregembed.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def data_files(tmp_path_factory) -> dict[int, str]:
    return plan_cases.write_data(tmp_path_factory.mktemp("rows"))


def test_a_run_needs_what_was_planned(data_files, tmp_path):
    """tests/plans.py has more of them."""
    plan_cases.assert_planned("llama", 1, data_files[1], tmp_path)


def planned(folder: str, data_file: str, **options) -> plan.Plan:
    machine = {name: options.pop(name) for name in ("processes", "fsdp") if name in options}
    config = Config(model=folder, train_data=data_file, output_dir="o", precision="fp32", **{"stage": 1, **options})
    return plan.plan(config, plan.Machine.here(options.pop("device", "cpu"), **machine))


def test_what_needs_less_is_planned_with_less(model_folder, compression_file, monkeypatch):
    monkeypatch.setattr(passes, "MIN_TERMS", 1)
    whole = planned(model_folder, compression_file)
    assert whole.step["optimizer"] == pytest.approx(2 * whole.step["encoder, weights"], rel=0.01)
    checkpointed = planned(model_folder, compression_file, gradient_checkpointing=True)
    kept = "encoder, kept for backward"
    assert checkpointed.step[kept] < 0.5 * whole.step[kept]
    selective = planned(model_folder, compression_file, gradient_checkpointing="selective")
    assert checkpointed.step[kept] < selective.step[kept] < 0.8 * whole.step[kept]
    assert planned(model_folder, compression_file, lora_rank=2).step["optimizer"] < 0.5 * whole.step["optimizer"]
    sharded = planned(model_folder, compression_file, processes=4, fsdp=True)
    assert sharded.step["encoder, weights"] == whole.step["encoder, weights"] / 4


@pytest.mark.parametrize(("kind", "share"), [("int8", 1 / 4), ("nf4", 1 / 8)])
def test_a_quantised_base_is_planned_in_its_bits(kind, share, model_folder, compression_file):
    plain, few = (planned(model_folder, compression_file, lora_rank=2, base_dtype=k) for k in ("fp32", kind))
    layers = [4 * p.numel() for n, p in models.load_causal_lm(model_folder)[0].named_parameters() if "proj" in n]
    saved = plain.step["encoder, weights"] - few.step["encoder, weights"]
    assert saved == pytest.approx((1 - share) * sum(layers), rel=0.1)
    assert few.step["a layer of the base, widened"] == max(layers)


def test_reference_scores_are_planned_in_their_own_passes(model_folder, alignment_file):
    few, many, none = (
        planned(model_folder, alignment_file, stage=2, **options)
        for options in ({"batch_size": 2}, {"batch_size": 8}, {"batch_size": 8, "ref_margin": "none"})
    )
    sizes = [found.device["scores before it"] - found.step["libraries"] for found in (few, many, none)]
    assert sizes[0] == pytest.approx(sizes[1])
    assert sizes[1] > 1.5 * sizes[2]


@pytest.mark.parametrize("checkpointing", [False, "selective"])
def test_few_layers_tell_of_many(checkpointing, tmp_path, compression_file):
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    folder = models.save_model(tmp_path / "deep", tiny_model(num_hidden_layers=12), tokenizer, {})
    options = {"stage": 1, "precision": "fp32", "gradient_checkpointing": checkpointing}
    config = Config(model=str(folder), train_data=compression_file, output_dir="o", **options)
    sizes = []
    for exact in (True, False):
        step = plan.plan(config, plan.Machine.here("cpu"), exact=exact).step
        sizes.append(sum(step.values()) - step["libraries"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_the_command_plans_stages_that_have_not_run(model_folder, compression_file, alignment_file, tmp_path, capsys):
    for stage, data_file in ((1, compression_file), (2, alignment_file)):
        (tmp_path / f"{stage}.yaml").write_text(
            f"stage: {stage}\ntrain_data: {data_file}\noutput_dir: {tmp_path}/out\n"
        )
    files = [str(tmp_path / f"{stage}.yaml") for stage in (1, 2)]
    assert main(["plan", *files, "--model", model_folder, "--batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "stage 1: " in printed
    assert "stage 2: " in printed
    assert not (tmp_path / "out").exists()
    assert main(["plan", files[0], "--model", model_folder, "--batch_size", "4", "--memory", "0.001"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "all and lora_rank: 16" in printed


def allocation_of_main_memory(*_):
    torch.empty(1 << 60, dtype=torch.uint8)


def allocation_of_a_device(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@pytest.mark.parametrize("ends", [allocation_of_main_memory, allocation_of_a_device])
def test_the_end_of_the_memory_names_ways_out(ends, model_folder, compression_file, tmp_path, monkeypatch, quiet):
    monkeypatch.setattr(train.Run, "step", ends)
    config = stage1(model_folder, compression_file, tmp_path / "out", gradient_checkpointing=True)
    with pytest.raises(MemoryError, match=r"memory: got too little .*`autoregembed plan`.*token_budget") as caught:
        train.train(config, quiet)
    assert "; gradient_checkpointing: true" not in str(caught.value)
    assert "; decoder_gradient_checkpointing: true" in str(caught.value)
    assert "lora_rank: 16" in str(caught.value)
