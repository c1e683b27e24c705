"""What a run that stops, breaks or is repeated leaves behind, and how it goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentence, stage1, stage2, write_jsonl
from safetensors.torch import load_file

from autoregembed import held_out, models, runtime, sampling
from autoregembed import train as train_module
from autoregembed.config import ConfigError
from autoregembed.files import CheckpointError
from autoregembed.train import MAX_SKIPPED, train


def log(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in r.items() if n not in ("tokens_per_second", "memory_gb")} for r in rows]


def assert_same_run(a: Path, b: Path):
    """The last states, the log and the models, bit for bit."""
    last = max(p.name for p in (a / "checkpoints").glob("step-*"))
    files = [f"checkpoints/{last}/{name}.safetensors" for name in ("trainable", "optimizer", "rng")]
    for name in (*files, "model/model.safetensors", "export/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert log(a) == log(b)


def interrupt_after(step: int, monkeypatch):
    """The process dies (an exception that nobody expects) when it asks for the rows of the step after `step`."""
    inner = sampling.batches

    def batches(*args, start=0, **kwargs):
        for i, batch in enumerate(inner(*args, start=start, **kwargs), start):
            if i == step:
                raise MemoryError
            yield batch

    monkeypatch.setattr(sampling, "batches", batches)


def torn(config, quiet, monkeypatch, step: int):
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        with pytest.raises(MemoryError):
            train(config, quiet)
    config.resume_from_checkpoint = True


STAGE2 = {"stage": 2, "contrastive_weight": 0.5, "max_steps": 5}


@pytest.mark.parametrize(
    "options",
    [
        {"stage": 1, "lr_scheduler_type": "constant"},
        {**STAGE2, "warmup_steps": 4},
        {**STAGE2, "token_budget": 90, "hard_negatives": True, "lora_rank": 2},
        {"stage": 1, "streaming": True, "freeze": ["embed_tokens"], "init_output_rms": True},
    ],
)
def test_a_torn_run_ends_in_the_bits_of_a_whole_one(
    options, model_folder, compression_file, alignment_file, tmp_path, quiet, monkeypatch
):
    file = compression_file if options["stage"] == 1 else alignment_file
    make = stage1 if options["stage"] == 1 else stage2
    options = {"max_steps": 5, "save_steps": 2, "batch_size": 7, **options}
    train(make(model_folder, file, tmp_path / "whole", **options), quiet)
    config = make(model_folder, file, tmp_path / "torn", **options)
    torn(config, quiet, monkeypatch, 3)
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as half:
        half.write('{"step": 4, "lo')
    assert [r["step"] for r in log_or_half(tmp_path / "torn")] == [1, 2, 3]
    summary = train(config, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")
    assert summary["skipped_steps"] == 0


def log_or_half(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_dropout_draws_the_same_numbers_after_a_resume(compression_file, model_folder, tmp_path, quiet, monkeypatch):
    model, tokenizer, _ = models.load_causal_lm(model_folder)
    model.config.attention_dropout = 0.3
    models.save_model(tmp_path / "lm", model, tokenizer, {})
    options = {"max_steps": 4, "save_steps": 2}
    train(stage1(str(tmp_path / "lm"), compression_file, tmp_path / "whole", **options), quiet)
    config = stage1(str(tmp_path / "lm"), compression_file, tmp_path / "torn", **options)
    torn(config, quiet, monkeypatch, 3)
    torch.manual_seed(99)
    train(config, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


def test_a_damaged_state_is_skipped_aloud_and_the_one_before_is_taken(
    model_folder, compression_file, tmp_path, monkeypatch, capsys
):
    from rich.console import Console

    console = Console(width=1000)
    options = {"max_steps": 6, "save_steps": 2, "save_total_limit": 3}
    train(stage1(model_folder, compression_file, tmp_path / "whole", **options), console)
    config = stage1(model_folder, compression_file, tmp_path / "torn", **options)
    torn(config, console, monkeypatch, 5)
    damaged = tmp_path / "torn" / "checkpoints" / "step-00000004" / "trainable.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    train(config, console)
    printed = capsys.readouterr().out
    assert "resume_from_checkpoint: skipped step-00000004: trainable.safetensors is damaged" in printed
    assert "resume_from_checkpoint: step-00000002" in printed
    assert_same_run(tmp_path / "whole", tmp_path / "torn")
    states = [p.name for p in sorted((tmp_path / "torn" / "checkpoints").iterdir())]
    assert states == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_finished_run_stays_as_it_is(model_folder, compression_file, tmp_path, quiet):
    config = stage1(model_folder, compression_file, tmp_path / "out", max_steps=3, save_steps=1)
    summary = train(config, quiet)
    assert sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    config.resume_from_checkpoint = True
    assert train(config, quiet) == summary
    config.resume_from_checkpoint = False
    with pytest.raises(
        FileExistsError, match=r"^output_dir: got checkpoints of an earlier run in .*resume_from_checkpoint: true"
    ):
        train(config, quiet)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == stamps
    # One that was killed between its last state and its export is exported.
    model = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "out" / "model")
    config.resume_from_checkpoint = True
    again = train(config, quiet)
    assert {**again, "train_seconds": 0} == {**summary, "train_seconds": 0}
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == model


@pytest.fixture(scope="module")
def stopped(model_folder, tmp_path_factory):
    """(folder of a run with a state of step 2, its config's fields)"""
    from rich.console import Console

    folder = tmp_path_factory.mktemp("stopped")
    rows = [{"context": sentence(i, 5), "output": sentence(i, 5)} for i in range(16)]
    file = write_jsonl(folder / "rows.jsonl", rows)
    config = stage1(model_folder, file, folder / "out", max_steps=4, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        torn(config, Console(quiet=True), patch, 3)
    return folder, vars(config)


CHANGES = {
    "batch_size": 4,
    "seed": 1,
    "learning_rate": 2e-3,
    "compress_learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "adam_beta2": 0.99,
    "max_grad_norm": 2.0,
    "max_steps": 5,
    "instruction": "Other:",
    "max_length": 99,
    "max_target_length": 99,
    "num_compress_tokens": 4,
    "precision": "bf16",
    "freeze": ["norm"],
    "lora_rank": 2,
    "z_norm": "match_rms",
    "decoder_add_bos": True,
    "init_output_rms": True,
    "stage": 2,
}


@pytest.mark.parametrize("field", [*CHANGES, "model", "train_data"])
def test_a_run_is_not_resumed_as_another(field, stopped, tmp_path, quiet):
    folder, fields = stopped
    if field == "model":
        model, tokenizer, _ = models.load_causal_lm(fields["model"])
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        models.save_model(tmp_path / "other", model, tokenizer, {})
        value = str(tmp_path / "other")
    elif field == "train_data":
        rows = [json.loads(line) for line in Path(fields["train_data"]).read_text().splitlines()]
        rows[-1]["output"] += " old"
        value = write_jsonl(tmp_path / "other.jsonl", rows)
    else:
        value = CHANGES[field]
    changed = {**fields, field: value}
    if field == "stage":
        rows = [{"query": sentence(i, 5), "pos": sentence(i, 4), "neg": [sentence(i, 3)]} for i in range(16)]
        changed["train_data"] = write_jsonl(tmp_path / "two.jsonl", rows)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (folder / "out").rglob("*")}
    with pytest.raises((CheckpointError, ConfigError), match=rf"^{field}: got .*expected ") as error:
        train(train_module.Config(**changed), quiet)
    if field in CHANGES:
        assert f"got {CHANGES[field]!r}" in str(error.value)
        assert f"expected {fields[field]!r}" in str(error.value)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (folder / "out").rglob("*")} == before


def test_a_refused_resume_says_how_to_go_on(model_folder, compression_file, tmp_path, quiet):
    out = tmp_path / "out"
    options = {"max_steps": None, "save_steps": 1, "num_train_epochs": 1.0}
    train(stage1(model_folder, compression_file, out, **options), quiet)
    for changes, message in (
        ({"batch_size": 4}, "batch_size: got 4, expected 8"),
        ({"num_train_epochs": 2.0}, r"max_steps: got 6, expected 3 \(.*num_train_epochs.*lr_scheduler_type"),
    ):
        config = stage1(model_folder, compression_file, out, **options | changes, resume_from_checkpoint=True)
        with pytest.raises(CheckpointError, match=f"^{message}") as error:
            train(config, quiet)
        assert f"'{out}/config.json' has the settings that resume this run" in str(error.value)
        assert f"start from its result, model: '{out}/model', in another output_dir" in str(error.value)
    # Both ways out are open.
    fields = json.loads((out / "config.json").read_text())
    train(train_module.Config(**fields | {"resume_from_checkpoint": True}), quiet)
    config.model, config.output_dir = str(out / "model"), str(tmp_path / "next")
    assert train(config, quiet)["steps"] == 6
    shutil.rmtree(out / "model")
    config.model, config.output_dir = model_folder, str(out)
    with pytest.raises(CheckpointError, match=r"start from its result, '.*/out/model' once it is done, in another"):
        train(config, quiet)


def test_a_resume_without_a_checkpoint_says_so(model_folder, compression_file, tmp_path, capsys):
    from rich.console import Console

    config = stage1(model_folder, compression_file, tmp_path / "out", max_steps=1, resume_from_checkpoint=True)
    train(config, Console(width=1000))
    assert f"resume_from_checkpoint: no checkpoint in {tmp_path}/out/checkpoints" in capsys.readouterr().out


def test_places_and_what_is_written_when_may_change(stopped, tmp_path, quiet):
    folder, fields = stopped
    for name in ("one", "two"):
        shutil.copytree(folder / "out", tmp_path / name)
    shutil.copytree(fields["model"], tmp_path / "lm")
    shutil.copy(fields["train_data"], tmp_path / "moved.jsonl")
    train(train_module.Config(**{**fields, "output_dir": str(tmp_path / "one")}), quiet)
    places = {"model": str(tmp_path / "lm"), "train_data": str(tmp_path / "moved.jsonl"), "save_steps": 1}
    train(
        train_module.Config(**{**fields, "output_dir": str(tmp_path / "two"), **places, "save_total_limit": 5}), quiet
    )
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "two" / "checkpoints").iterdir())) == 3


def test_a_second_run_into_a_folder_is_refused_until_the_first_is_gone(model_folder, compression_file, tmp_path, quiet):
    config = stage1(model_folder, compression_file, tmp_path / "out", max_steps=1)
    config.resume_from_checkpoint = True
    train(config, quiet)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "out" / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        with pytest.raises(ConfigError, match=r"^output_dir: got .*another run is writing"):
            train(config, quiet)
    finally:
        other.kill()
        other.communicate()
    train(config, quiet)


def test_a_constant_schedule_can_be_made_longer(model_folder, compression_file, tmp_path, quiet):
    options = {"lr_scheduler_type": "constant", "save_steps": 1}
    train(stage1(model_folder, compression_file, tmp_path / "whole", max_steps=4, **options), quiet)
    train(stage1(model_folder, compression_file, tmp_path / "parts", max_steps=2, **options), quiet)
    longer = stage1(
        model_folder, compression_file, tmp_path / "parts", max_steps=4, resume_from_checkpoint=True, **options
    )
    train(longer, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    longer.max_steps = 3
    with pytest.raises(ConfigError, match=r"^max_steps: got 3, expected at least 4"):
        train(longer, quiet)


@pytest.mark.parametrize(("metric", "lora_rank"), [("spearman", 2), ("mean_cosine", 0)])
def test_the_model_of_the_best_evaluation_is_kept(
    metric, lora_rank, model_folder, compression_file, sts_file, tmp_path, quiet, monkeypatch
):
    """The second of four steps, also where the run was stopped after the third and after the last."""
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence(i, 4)} for i in range(5)])
    sign = 1 if metric == "spearman" else -1
    values: list = []
    function = "sts" if metric == "spearman" else "label_free"
    monkeypatch.setattr(held_out, function, lambda *_: {metric: values.pop(0)})
    options = {"lr_scheduler_type": "constant", "eval_data": sts_file if sign > 0 else texts, "lora_rank": lora_rank}
    options |= {"eval_metric": metric, "eval_steps": 1, "save_steps": 1, "save_best": True}

    def run(name: str, steps: int, *scores: float | None, **more) -> dict:
        values[:] = [None if x is None else sign * x for x in scores]
        config = stage1(model_folder, compression_file, tmp_path / name, max_steps=steps, **{**options, **more})
        summary = train(config, quiet)
        assert values == []
        return summary

    assert run("out", 4, 0.9, 0.1, 0.5, 0.5, None)["model_step"] == 2
    again = {"resume_from_checkpoint": True}
    run("parts", 3, 0.9, 0.1, 0.5, 0.5)
    assert run("parts", 4, None, **again)["model_step"] == 2
    (tmp_path / "parts" / "summary.json").unlink()
    assert run("parts", 4, **again)["model_step"] == 2
    assert run("better", 4, 0.9, None, 0.5, 0.5, 0.6)["model_step"] == 4
    run("two", 2, 0.9, 0.1, 0.5, save_best=False)
    files = ["model/model.safetensors", "export/model.safetensors", "adapter/adapter_model.safetensors"]
    for file in files if lora_rank else files[:2]:
        wanted = load_file(tmp_path / "two" / file)
        for name, same in (("out", True), ("parts", True), ("better", False)):
            found = load_file(tmp_path / name / file)
            assert all(torch.equal(found[n], wanted[n]) for n in wanted) == same, (name, file)
    (tmp_path / "parts" / "summary.json").unlink()
    assert run("parts", 4, save_best=False, **again)["model_step"] == 4
    with pytest.raises(ConfigError, match=r"^save_best: got True"):
        stage1(model_folder, compression_file, tmp_path / "out", save_best=True)
    with pytest.raises(ConfigError, match=r"^eval_metric: got 'uniformity', expected None without eval_data"):
        stage1(model_folder, compression_file, tmp_path / "out", eval_metric="uniformity")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def poison(monkeypatch, steps, where: str):
    """Either the loss or the gradient of these steps is not finite, and the other is."""
    inner = train_module.Objective.__call__
    calls = iter(range(1, 1000))

    def spoilt(self, rows):
        found = inner(self, rows)
        if next(calls) in steps:
            if where == "gradient":
                next(p for p in self.encoder.parameters() if p.grad is not None).grad.flatten()[-1] = torch.inf
            else:
                found["loss"] = torch.tensor(torch.nan)
        return found

    monkeypatch.setattr(train_module.Objective, "__call__", spoilt)


def parameters(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = folder / "checkpoints" / f"step-{step:08d}"
    return {**load_file(state / "trainable.safetensors"), **load_file(state / "optimizer.safetensors")}


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_it_updates(
    where, model_folder, compression_file, tmp_path, quiet, monkeypatch
):
    config = stage1(model_folder, compression_file, tmp_path / "out", save_steps=1)
    with monkeypatch.context() as patch:
        poison(patch, {3}, where)
        with pytest.raises(FloatingPointError, match=r"^step 3: loss .*rows \[\d.*nonfinite\.jsonl"):
            train(config, quiet)
    assert not (tmp_path / "out" / "model").exists()
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "nonfinite.jsonl").read_text().splitlines()]
    assert (row["step"], row["action"], row["rows"]) == (3, "stop", sampling.drawn(24, 16, 8, config.seed))
    assert row["loss" if where == "loss" else "grad_norm"] in ("nan", "inf")
    # Nothing of it reached the parameters: once the cause is gone, the run goes on as if it had never been.
    config.resume_from_checkpoint = True
    train(config, quiet)
    train(stage1(model_folder, compression_file, tmp_path / "whole", save_steps=1), quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "out" / "nonfinite.jsonl").exists()


@pytest.mark.parametrize("where", ["loss", "gradient", "loss, with loss scaling"])
def test_skipped_steps_change_nothing_but_the_place_in_schedule_and_data(
    where, model_folder, compression_file, tmp_path, quiet, monkeypatch
):
    options = {"on_nonfinite": "skip", "save_steps": 1, "save_total_limit": 9, "max_steps": 5}
    config = stage1(model_folder, compression_file, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        if "scaling" in where:
            patch.setattr(runtime, "Accelerator", Scaled)
            patch.setattr(Scaled, "first_scale", 1.0)
        poison(patch, {2, 4}, where)
        summary = train(config, quiet)
    assert summary["skipped_steps"] == 2
    for step in (2, 4):
        before, after = (parameters(tmp_path / "out", s) for s in (step - 1, step))
        assert all(torch.equal(before[n], after[n]) for n in before)
    moved = parameters(tmp_path / "out", 3)
    assert any(not torch.equal(moved[n], p) for n, p in parameters(tmp_path / "out", 2).items())
    rows = log(tmp_path / "out")
    assert [r["updated"] for r in rows] == [True, False, True, False, True]
    assert rows[1]["grad_norm" if where == "gradient" else "loss"] is None
    train(stage1(model_folder, compression_file, tmp_path / "whole", max_steps=5), quiet)
    assert [r["lr"] for r in rows] == [r["lr"] for r in log(tmp_path / "whole")]
    written = [json.loads(line) for line in (tmp_path / "out" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(w["step"], w["action"]) for w in written] == [(2, "skip"), (4, "skip")]
    assert [w["rows"] for w in written] == [sampling.drawn(24, 8 * (s - 1), 8, config.seed) for s in (2, 4)]


def test_too_many_skips_in_a_row_end_the_run(model_folder, compression_file, tmp_path, quiet, monkeypatch):
    options = {"on_nonfinite": "skip", "max_steps": 40, "save_steps": 5}
    config = stage1(model_folder, compression_file, tmp_path / "out", **options)
    bad = {*range(2, 2 + MAX_SKIPPED - 1), *range(20, 40)}  # one fewer than too many, then too many
    with monkeypatch.context() as patch:
        poison(patch, bad, "loss")
        torn(config, quiet, patch, 24)
        poison(patch, {*range(1, 40)}, "loss")  # from step 21 on again: the count goes on where the state was saved
        with pytest.raises(FloatingPointError, match=f"^step {20 + MAX_SKIPPED - 1}: "):
            train(config, quiet)


def test_a_step_without_any_negative_is_harmless(model_folder, tmp_path, quiet):
    """Nothing to align in most steps: their loss is 0 and attached to the graph."""
    rows = [
        {"query": sentence(i, 5), "pos": sentence(i + 9, 4), "neg": [sentence(i, 3)] if i == 0 else []}
        for i in range(6)
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    train(stage2(model_folder, file, tmp_path / "out", batch_size=1, max_steps=6), quiet)
    found = log(tmp_path / "out")
    assert sorted(r["loss"] > 0 for r in found) == [False] * 5 + [True]
    assert all(r["updated"] and r["grad_norm"] >= 0 for r in found)
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_fp16_without_cuda_is_refused(model_folder, compression_file, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = stage1(model_folder, compression_file, tmp_path / "out", precision="fp16")
    with pytest.raises(ConfigError, match=r"^precision: got 'fp16', expected 'auto', 'fp32' or 'bf16' without CUDA$"):
        train(config, quiet)


class Scaled(runtime.Accelerator):
    """What fp16 makes of an Accelerator, on a CPU: gradients above 65504 overflow while the scale is too large."""

    first_scale = 2.0**24

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.first_scale, growth_interval=3)

    def clip_grad_norm_(self, parameters, max_norm):
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.half())
        self.scaler.unscale_(self._optimizers[-1].optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def test_loss_scaling_waits_for_a_scale_that_fits_and_resumes(
    model_folder, compression_file, tmp_path, quiet, monkeypatch
):
    monkeypatch.setattr(runtime, "Accelerator", Scaled)
    options = {"max_steps": 20, "save_steps": 1, "learning_rate": 1e-4}
    train(stage1(model_folder, compression_file, tmp_path / "whole", **options), quiet)
    rows = log(tmp_path / "whole")
    updated = [r["updated"] for r in rows]
    first = updated.index(True)
    assert 0 < first < 15
    assert [r["loss_scale"] for r in rows[: first + 1]] == [2.0 ** (24 - i) for i in range(first + 1)]
    assert all(r["loss"] is not None and r["loss"] < 1e3 for r in rows)
    assert not (tmp_path / "whole" / "nonfinite.jsonl").exists(), "the scaler's search is nobody's fault"
    config = stage1(model_folder, compression_file, tmp_path / "torn", **options)
    torn(config, quiet, monkeypatch, first + 1)
    train(config, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs CUDA")
def test_fp16_trains_and_resumes_on_cuda(model_folder, compression_file, tmp_path, quiet, monkeypatch):
    options = {"max_steps": 30, "save_steps": 5, "precision": "fp16", "deterministic": True}
    summary = train(stage1(model_folder, compression_file, tmp_path / "whole", **options), quiet)
    assert summary["precision"] == "fp16"
    rows = log(tmp_path / "whole")
    assert sum(r["loss"] for r in rows[-5:]) < sum(r["loss"] for r in rows[:5])
    config = stage1(model_folder, compression_file, tmp_path / "torn", **options)
    torn(config, quiet, monkeypatch, 17)
    train(config, quiet)
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.parametrize("stage", [1, 2])
def test_deterministic_runs_are_equal_in_every_bit(
    stage, model_folder, compression_file, alignment_file, tmp_path, quiet, monkeypatch
):
    make, file = (stage1, compression_file) if stage == 1 else (stage2, alignment_file)
    seen = []
    inner = train_module.Objective.__call__
    enabled = torch.are_deterministic_algorithms_enabled
    monkeypatch.setattr(train_module.Objective, "__call__", lambda *a: seen.append(enabled()) or inner(*a))
    for name in ("one", "two"):
        train(make(model_folder, file, tmp_path / name, deterministic=True, save_steps=1, token_budget=99), quiet)
        torch.manual_seed(5)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert seen
    assert all(seen)
    assert not enabled(), "only while it trains"
    train(make(model_folder, file, tmp_path / "three", max_steps=1), quiet)
    assert not seen[-1]


def test_our_kernels_add_no_floats_in_an_order_of_their_own():
    """No atomics on the device: whatever is summed there is summed in a fixed order."""
    kernels = Path(__file__).resolve().parents[1] / "kernels"
    sources = [*(kernels / "triton").glob("*.py"), *(kernels / "native").glob("*.cpp")]
    assert len(sources) > 5
    for path in sources:
        assert not re.search(r"tl\.atomic|atomicAdd|atomic<(float|double)>|omp atomic|reduction\(", path.read_text())


# ----------------------------------------------------------------------------------------------------------------------


def test_kills_failing_disks_and_flipped_bits():
    """A small part of what `python tests/crash.py` does in full."""
    script = Path(__file__).with_name("crash.py")
    options = {"trials": 2, "faults": 3, "full-disks": 1, "damages": 300}
    arguments = [x for name, value in options.items() for x in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {}
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            counts |= json.loads(line)
    assert counts["trials"] == 2
    assert counts["EIO injected"] + counts["ENOSPC injected"] >= 3
    assert counts["file size limits"] == 1
    assert counts["damages refused"] > 300
