"""The ready configurations: each is copied by `autoregembed init`, is read whole, and trains a tiny model."""

import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from autoregembed.cli import main
from autoregembed.config import Config
from autoregembed.train import train
from autoregembed.train_flags import GROUPS, field_help, read_config

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
STAGES = sorted(CONFIGS.glob("*/stage*.yaml"))
# What does not fit a tiny model, a test's time or a CPU.
SMALL = {
    "max_steps": 1,
    "batch_size": 4,
    "precision": "fp32",
    "max_length": 64,
    "max_target_length": 32,
    "eval_data": None,
    "save_best": False,
}


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_the_recipes_are_these():
    assert {p.parent.name for p in STAGES} == {"cpu-demo", "lora-7b-1gpu", "full-7b-8gpu", "paper", "label-free"}


@pytest.mark.parametrize("path", STAGES, ids=named)
def test_a_recipe_trains_a_tiny_model(path, model_folder, compression_file, alignment_file, tmp_path, quiet):
    config = read_config([str(path)])
    assert config.stage == int(path.stem[5:])
    assert set(yaml.safe_load(path.read_text())) <= {*asdict(config)}
    assert path.read_text().startswith("# "), "init prints the first line"
    data = compression_file if config.stage == 1 else alignment_file
    changed = replace(config, model=model_folder, train_data=data, output_dir=str(tmp_path / "out"), **SMALL)
    summary = train(changed, quiet)
    assert summary["steps"] == 1
    assert Path(summary["export"], "modules.json").is_file()


@pytest.mark.parametrize("path", [p for p in STAGES if p.stem == "stage2"], ids=named)
def test_stage_2_starts_where_stage_1_ends(path):
    first, second = (read_config([str(path.with_name(f"stage{n}.yaml"))]) for n in (1, 2))
    assert second.model == f"{first.output_dir}/model"
    for name in ("instruction", "z_norm", "decoder_add_bos", "max_length"):
        assert getattr(first, name) == getattr(second, name), name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/accelerate.yaml")), ids=named)
def test_accelerate_reads_its_file(path):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert (found.distributed_type.value, found.num_processes) == ("FSDP", 8)
    assert found.fsdp_config["fsdp_version"] == 2
    assert found.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


def test_init_lists_copies_and_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {p.parent.name} " in listed for p in STAGES)
    assert main(["init", "paper"]) == 0
    assert "accelerate launch --config_file paper/accelerate.yaml" in capsys.readouterr().out
    for file in (CONFIGS / "paper").iterdir():
        assert (tmp_path / "paper" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "paper" / "stage1.yaml").write_text("mine")
    assert main(["init", "paper"]) == 2
    assert "FileExistsError" in capsys.readouterr().err
    assert (tmp_path / "paper" / "stage1.yaml").read_text() == "mine"
    assert main(["init", "cpu-demo", "elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "stage2.yaml").is_file()
    assert main(["init", "huge"]) == 2
    assert "ValueError: name: got 'huge', expected one of cpu-demo" in capsys.readouterr().err


def test_every_field_has_one_group_and_a_help_text(capsys):
    listed = [name for names in GROUPS.values() for name in names]
    fields = Config.__dataclass_fields__
    assert sorted(listed) == sorted(fields), "GROUPS of autoregembed/train_flags.py lists every field of Config once"
    assert all(field_help().get(name) for name in fields)
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    places = [printed.index(f"\n{title}:\n") for title in GROUPS]
    assert places == sorted(places)
    assert "\nother:" not in printed


def test_completion_offers_the_flags_of_every_command():
    """In a process of its own: jsonargparse keeps the setting."""
    pytest.importorskip("shtab", reason="shtab is not installed")
    command = [sys.executable, "-m", "autoregembed", "completion", "bash"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert all(flag in result.stdout for flag in ("--learning_rate", "--compare", "--json_file"))
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
