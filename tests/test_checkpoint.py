import errno
import math
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from conftest import sentence
from safetensors.torch import load_file, save_file

from autoregembed import checkpoint, files, models, reference_scores, runtime
from autoregembed.encoder import Encoder
from autoregembed.score_files import ScoresMismatch
from autoregembed.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
V = len(TOKENIZER)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 2, 8])
def test_compress_tokens_lie_behind_the_vocabulary_and_change_nothing_else(tied, spare):
    """Models often have more rows than their tokenizer has tokens; those are used first."""
    before = tiny_model(vocab_size=V + spare, tie_word_embeddings=tied)
    model = tiny_model(vocab_size=V + spare, tie_word_embeddings=tied)
    ids = models.add_compress_tokens(model, TOKENIZER, 5)
    assert ids == list(range(V, V + 5))
    old, new = before.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert len(new) == max(V + 5, V + spare)
    assert torch.equal(new[:V], old[:V])
    assert model.config.vocab_size == len(new)
    assert len(TOKENIZER) == V
    rows = new[ids]
    tokens = TOKENIZER(" ,", add_special_tokens=False)["input_ids"]
    comma, spread = old[[tokens[i % len(tokens)] for i in range(5)]], old[:V].std(0)
    assert 0.08 < ((rows - comma) / spread).std() < 0.12, "a tenth of real tokens' spread around a comma"
    assert torch.pdist(rows).min() > 0.05 * torch.pdist(old[:V]).median()
    again = tiny_model(vocab_size=V + spare, tie_word_embeddings=tied)
    models.add_compress_tokens(again, TOKENIZER, 5)
    assert torch.equal(again.get_input_embeddings().weight[ids], rows)


@pytest.mark.parametrize("own", [True, False])
def test_compress_tokens_start_from_given_words_again_and_again(own):
    model = tiny_model(vocab_size=V)
    words = TOKENIZER("the cat", add_special_tokens=False)["input_ids"]
    assert 1 < len(words) < 5
    expected = model.get_input_embeddings().weight.detach()[[words[i % len(words)] for i in range(5)]]
    spread = model.get_input_embeddings().weight.detach()[:V].std(0)
    encoder = Encoder.from_model(model, TOKENIZER, compress_init="the cat", own_compress_rows=own)
    rows = encoder.compress_rows if own else model.get_input_embeddings().weight[encoder.compress_token_ids]
    assert 0.08 < ((rows - expected) / spread).std() < 0.12
    with pytest.raises(ValueError, match=r"^compress_init: got '', expected a text of at least one token"):
        Encoder.from_model(tiny_model(vocab_size=V), TOKENIZER, compress_init="", own_compress_rows=own)


def test_words_to_start_from_are_refused_where_compress_tokens_are_trained(tmp_path):
    Encoder.from_model(tiny_model(vocab_size=V), TOKENIZER).save_pretrained(tmp_path / "m")
    with pytest.raises(files.CheckpointError, match=r"^compress_init: got ',' for 5 compress tokens that are trained"):
        Encoder.from_pretrained(tmp_path / "m", compress_init=",")


def test_no_compress_tokens_are_refused():
    with pytest.raises(ValueError, match=r"^num_compress_tokens: got 0"):
        models.add_compress_tokens(tiny_model(vocab_size=V), TOKENIZER, 0)


def test_a_model_comes_back_as_it_was_with_its_recipe(tmp_path):
    model = tiny_model(vocab_size=V, tie_word_embeddings=True, dtype=torch.bfloat16)
    recipe = {"compress_token_ids": [1, 2], "decoder": "é"}
    models.save_model(tmp_path / "m", model, TOKENIZER, recipe)
    loaded, tokenizer, found = models.load_causal_lm(str(tmp_path / "m"), dtype=torch.bfloat16)
    assert found == recipe
    assert files.weights_fingerprint(loaded) == files.weights_fingerprint(model)
    text = "the cat </s> sat"
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    (tmp_path / "m" / models.RECIPE).unlink()
    assert models.load_causal_lm(str(tmp_path / "m"))[2] == {}


@pytest.mark.parametrize(
    "what",
    ["nothing", "empty folder", "no weights", "a weight less", "damaged weights", "damaged config", "damaged recipe"],
)
def test_what_cannot_be_loaded_is_a_checkpoint_error_that_names_it(what, tmp_path):
    folder = tmp_path / "m"
    if what == "empty folder":
        folder.mkdir()
    elif what != "nothing":
        models.save_model(folder, tiny_model(vocab_size=V), TOKENIZER, {"compress_token_ids": [3]})
        if what == "no weights":
            (folder / "model.safetensors").unlink()
        elif what == "a weight less":
            weights = load_file(folder / "model.safetensors")
            weights.pop("model.layers.1.mlp.up_proj.weight")
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        elif what == "damaged weights":
            (folder / "model.safetensors").write_bytes(b"rubbish" * 9)
        elif what == "damaged config":
            (folder / "config.json").write_text("{")
        else:
            (folder / models.RECIPE).write_text("{")
    place = f"{folder}/{models.RECIPE}', which cannot be read" if "recipe" in what else f"{folder}', which cannot be"
    with pytest.raises(files.CheckpointError, match=rf"^model: got '{place}"):
        models.load_causal_lm(str(folder))


def test_the_fingerprint_of_weights_is_that_of_names_shapes_and_values():
    one = tiny_model()
    same = tiny_model()
    seen = {files.weights_fingerprint(one), files.weights_fingerprint(same)}
    assert len(seen) == 1
    with torch.no_grad():
        same.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    seen.add(files.weights_fingerprint(same))
    seen.add(files.weights_fingerprint(tiny_model(dtype=torch.bfloat16)))
    seen.add(files.weights_fingerprint(one, one))
    seen.add(files.weights_fingerprint(torch.nn.ModuleDict({"renamed": one})))
    assert len(seen) == 5


def test_reference_scores_come_back_and_only_for_what_they_belong_to(tmp_path):
    path, mine = tmp_path / "new" / "r.safetensors", {"data": "a", "model": "b", "tokenizer": "c"}
    positive, negatives = torch.tensor([-3.0, -4.5]), torch.tensor([[-1.0, torch.nan], [-2.0, -5.0]])
    reference_scores.save_ref_logps(path, positive, negatives, mine)
    found = reference_scores.load_ref_logps(path, mine)
    torch.testing.assert_close(found, (positive, negatives), rtol=0, atol=0, equal_nan=True)
    for name in mine:
        other = {**mine, name: "x"}
        with pytest.raises(ScoresMismatch) as error:
            reference_scores.load_ref_logps(path, other)
        for key in mine:
            assert f"'{key}': '{mine[key]}'" in str(error.value)
            assert f"'{key}': '{other[key]}'" in str(error.value)
    assert [p.name for p in path.parent.iterdir()] == ["r.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def trained(width: int = 4, steps: int = 3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 1))
    model[0].bias.requires_grad_(False)
    parameters = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.01}]
    optimizer = torch.optim.AdamW(parameters)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_state_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    checkpoint.save_checkpoint(tmp_path / "step-3", model, optimizer, 3, {"scores": {"0": 0.5}})
    assert checkpoint.verify(tmp_path / "step-3") is None
    step(model, optimizer)
    other, fresh = trained(steps=0)
    state = checkpoint.load_checkpoint(tmp_path / "step-3", other, fresh)
    assert (state["step"], state["scores"]) == (3, {"0": 0.5})
    step(other, fresh)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [g["lr"] for g in fresh.param_groups] == [0.1, 0.01]
    names = set(load_file(tmp_path / "step-3" / "trainable.safetensors"))
    assert names == {"0.weight", "1.weight", "1.bias"}


def test_a_state_of_another_shape_is_refused_and_changes_nothing(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "s", *trained(), 3, {})
    model, optimizer = trained(width=5)
    before = files.weights_fingerprint(model)
    with pytest.raises(
        files.CheckpointError, match=r"^resume_from_checkpoint: got 0\.weight with shape \(4, 3\).*\(5, 3\)"
    ):
        checkpoint.load_checkpoint(tmp_path / "s", model, optimizer)
    assert files.weights_fingerprint(model) == before


@pytest.mark.parametrize("damage", ["missing", "shorter", "one byte", "no manifest", "manifest of rubbish"])
def test_damaged_states_are_skipped_with_the_reason(damage, tmp_path):
    for n in (1, 2):
        checkpoint.save_checkpoint(tmp_path / f"step-{n:08d}", *trained(), n, {})
    newest = tmp_path / "step-00000002"
    file = newest / "optimizer.safetensors"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(content[:-1])
    elif damage == "one byte":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        manifest = newest / "manifest.json"
        manifest.unlink() if damage == "no manifest" else manifest.write_text("[1]")
    found, skipped = checkpoint.latest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000002: " + ("manifest" if "manifest" in damage else "optimizer.safetensors"))
    assert checkpoint.latest_checkpoint(tmp_path / "none") == (None, [])


def test_an_interrupted_replacement_leaves_the_old_folder(tmp_path):
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("old")

    def interrupted():
        with files.atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with files.atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "b").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        with files.atomic_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            save_file({"x": torch.zeros(1)}, folder / "inner" / "x.safetensors")
        with files.atomic_file(tmp_path / "x.safetensors") as path:
            save_file({"x": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {
        "folder": 0o777 & ~mask, "inner": 0o777 & ~mask, "x.safetensors": 0o666 & ~mask,
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "folder" / "inner" / "x.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_folder_that_a_group_shares_stays_shared(tmp_path):
    """A folder made in it inherits its setgid bit, as one that mkdir makes does."""
    tmp_path.chmod(0o2775)
    (tmp_path / "made").mkdir()
    with files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "folder", tmp_path / "folder" / "inner")}
    assert modes == dict.fromkeys(("folder", "inner"), (tmp_path / "made").stat().st_mode)
    assert modes["folder"] & stat.S_ISGID


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_json_holds_what_json_has_not(value, tmp_path):
    files.write_json(tmp_path / "a.json", {"x": 1.5})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"x": [1.0, {"y": value}]})
    assert [p.read_text() for p in tmp_path.iterdir()] == ['{\n  "x": 1.5\n}\n']
    runtime.append_log(tmp_path / "log.jsonl", {"step": 1, "loss": value})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_a_folder_that_cannot_be_made_is_named_and_not_its_temporary_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = r"^folder: got '.*/file/out', which cannot be written: '.*/file' is no folder$"
    with pytest.raises(FileExistsError, match=message), files.atomic_folder(tmp_path / "file" / "out"):
        pass


def test_a_full_disk_is_seen_by_writing(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OSError, match=r"^output: got '.*/a', which cannot be written: No space left on device"):
        files.require_writable_file(tmp_path / "a", "output")
    with pytest.raises(OSError, match=r"^output_dir: got '.*/b', which cannot be written: No space left on device"):
        files.require_writable_folder(tmp_path / "b", "output_dir")


def test_a_read_only_folder_is_refused(tmp_path):
    """As root, by a process that may not ignore permissions."""
    (tmp_path / "ro").mkdir(mode=0o555)
    code = (
        "import sys; from autoregembed import files\n"
        "for check, path in ((files.require_writable_file, sys.argv[1] + '/x'),\n"
        "                    (files.require_writable_folder, sys.argv[1]),\n"
        "                    (files.require_writable_folder, sys.argv[1] + '/new')):\n"
        "    try: check(path, 'output')\n"
        "    except PermissionError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ro")]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to give up its right to ignore permissions")
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *command]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    names = [str(tmp_path / "ro" / "x"), str(tmp_path / "ro"), str(tmp_path / "ro" / "new")]
    assert found == [f"output: got {name!r}, which cannot be written: Permission denied" for name in names]
