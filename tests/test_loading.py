"""Models whose weights come later: as `from_pretrained` makes them, read by slices, in a fraction of the memory."""

import json
import os
import re
import signal
import time

import distributed_cases as cases
import pytest
import torch
from architectures import composite
from conftest import stage1
from safetensors.torch import load_file

from autoregembed import loading, models, weight_files
from autoregembed.bench import start
from autoregembed.build import build_models
from autoregembed.files import write_safetensors
from autoregembed.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Tied and untied weights, names that Transformers changes, an embedding with a buffer, experts in one tensor.

    And a model that also reads images.
    """
    tokenizer, found = tiny_tokenizer(["the cat sat on a mat"]), {}
    for name, options in {
        "llama": {"tie_word_embeddings": False}, "tied": {"tie_word_embeddings": True}, "gpt_neox": {}, "gemma2": {},
        "mixtral": {"num_local_experts": 4}, "images": None,
    }.items():  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        if options is None:
            model = composite("gemma3").float()
        else:
            model = tiny_model("llama" if name == "tied" else name, vocab_size=len(tokenizer), **options)
        models.save_model(folder, model, tokenizer, {})
        (folder / models.RECIPE).unlink()
        found[name] = str(folder)
    return found


@pytest.mark.parametrize("name", ["llama", "tied", "gpt_neox", "gemma2", "images"])
def test_a_model_without_weights_has_buffers_and_compress_rows(folders, name):
    whole, tokenizer, _ = models.load_causal_lm(folders[name])
    with loading.in_parts():
        part, _, _ = models.load_causal_lm(folders[name])
        assert all(p.is_meta for p in part.parameters())
        rows = models.compress_embeddings(part, tokenizer, 3)
    wanted, found = dict(whole.named_buffers()), dict(part.named_buffers())
    assert type(part) is type(whole)
    assert [n for n, _ in part.named_parameters()] == [n for n, _ in whole.named_parameters()]
    assert wanted.keys() == found.keys()
    assert any("inv_freq" in key for key in wanted)
    assert all(torch.equal(found[key], wanted[key]) and found[key].dtype == wanted[key].dtype for key in wanted)
    expected = models.compress_embeddings(whole, tokenizer, 3)
    assert rows[0] == expected[0]
    assert torch.equal(rows[1], expected[1])


def test_the_text_model_of_a_model_that_is_read_whole_has_its_weights(folders, monkeypatch, capsys):
    whole, _, _ = models.load_causal_lm(folders["images"])
    monkeypatch.setattr(weight_files, "_match", lambda *_: ("of this test", {}))
    with loading.in_parts():
        part, _, _ = models.load_causal_lm(folders["images"])
    assert "are read whole by process 0, since of this test" in capsys.readouterr().out
    found = {}
    for place, module in part.named_modules():
        weights, keys = loading.stored(module) or (None, {})
        found |= {f"{place}.{name}": weights.tensors[key] for name, key in keys.items()}
    wanted = {name: p.detach() for name, p in whole.named_parameters(remove_duplicate=False)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_are_drawn_as_on_a_whole_model(model_folder, compression_file):
    config = stage1(model_folder, compression_file, "unused", lora_rank=2, init_output_rms=True)
    torch.manual_seed(0)
    whole = build_models(config)[0]
    torch.manual_seed(0)
    with loading.in_parts():
        part = build_models(config)[0]
    names = [name for name, p in part.named_parameters() if not p.is_meta]
    assert len(names) > 20
    assert {n for n, p in part.named_parameters() if p.requires_grad} == {
        n for n, p in whole.named_parameters() if p.requires_grad
    }
    for name in names:
        assert torch.equal(part.get_parameter(name), whole.get_parameter(name)), name
    assert all("lora_" in name or name == "compress_rows" for name in names)  # the trained norm comes from its file


def test_a_quantised_model_is_refused(folders, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with loading.in_parts(), pytest.raises(models.CheckpointError, match="whose weights are quantised"):
        models.load_causal_lm(str(folder))


def test_safetensors_are_written_piece_by_piece(tmp_path):
    tensors = {"a": torch.randn(5, 3, dtype=torch.float64), "b": torch.arange(4, dtype=torch.bfloat16).view(2, 2)}
    tensors |= {"scalar": torch.tensor(3, dtype=torch.bfloat16), "none": torch.zeros(0, 2, dtype=torch.uint8)}
    kinds = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    parts = [tensors["a"][:2], tensors["a"][2:], tensors["b"], tensors["scalar"], tensors["none"]]
    write_safetensors(tmp_path / "x.safetensors", kinds, parts)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == kinds[name][0] for name in tensors)
    with pytest.raises(ValueError, match="pieces: got 128 bytes for"):
        write_safetensors(tmp_path / "y.safetensors", kinds, parts[1:3] + parts[:1])


def test_each_process_has_the_rows_of_its_shards(folders, compression_file, tmp_path):
    made = [
        stage1(folders[name], compression_file, tmp_path / name, lora_rank=rank) for name, rank in
        [("llama", 0), ("tied", 2), ("gpt_neox", 0), ("gemma2", 0), ("mixtral", 0), ("images", 0)]
    ]  # fmt: skip
    cases.run(cases.fsdp, 2, tmp_path, cases.filled, made)


def test_shards_within_a_node_and_copies_between_nodes(folders, compression_file, tmp_path):
    made = [stage1(folders["llama"], compression_file, tmp_path / "run")]
    cases.run(cases.hybrid, 4, tmp_path, cases.filled, made)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_while_weights_are_read_ends_the_others(folders, compression_file, tmp_path, victim):
    case = stage1(folders["llama"], compression_file, tmp_path / "out")
    begin = time.monotonic()
    results = cases.finish(cases.start(cases.fsdp, 2, tmp_path / "work", cases.dying_reader, case, victim), seconds=60)
    assert time.monotonic() - begin < 60
    assert results[victim][0] == "dead"
    assert str(-signal.SIGKILL) in results[victim][1]
    state, error = results[1 - victim]
    assert state == "failed"
    # The other one may still wait for the last that process 0 had to say before it read.
    assert re.match(
        "LostProcess: (building the models|reading the weights): got no answer from another process, expected all 2",
        error,
    )


def test_processes_together_hold_a_model_little_more_than_once(tmp_path):
    start.write_random_model(tmp_path / "model", 8, 1024, 2816, 8000, "bfloat16")
    found = start.start(tmp_path / "model", tmp_path / "run", 2, lora=0)
    assert found["weights"] > 8e8  # both roles
    assert found["held"] == pytest.approx(found["weights"], rel=0.01)
    # 1.3 is for models that are large beside what is loaded with them; two whole copies would be 2.
    assert found["ratio"] < 1.4, found
