import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentence, stage1, stage2, write_jsonl
from safetensors.torch import load_file

from autoregembed import Decoder, Encoder, data, files, models, sampling
from autoregembed import encoder as encoder_module
from autoregembed.build import build_models
from autoregembed.config import Config, ConfigError
from autoregembed.encoder import text_embedding
from autoregembed.evaluate import LABEL_FREE, METRICS, load_sts
from autoregembed.models import final_norm, scale_output
from autoregembed.objective import Objective, texts_of
from autoregembed.ops import info_nce
from autoregembed.packing import make_microbatches
from autoregembed.prompt import Prompt
from autoregembed.reference_scores import compute_ref_logps
from autoregembed.score_files import ScoresMismatch
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import Interrupted, train


def objective_of(config: Config, file: str):
    from accelerate import Accelerator

    encoder, decoder, tokenizer, _ = build_models(config)
    prompt = Prompt(tokenizer, encoder.num_compress_tokens, encoder.bos_token_id, config.instruction)
    tokenise = data.compression_rows if config.stage == 1 else data.alignment_rows
    rows = tokenise(data.load_rows(file), prompt)
    reference = compute_ref_logps(encoder, decoder, rows) if config.needs_ref_logps else None
    batch = [{**rows[i], "row": i} for i in range(8)]
    return Objective(config, encoder, decoder, Accelerator(cpu=True), reference), encoder, batch


def gradients(encoder) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 2, "negatives": "joint", "ref_margin": "subtract"},
        {"stage": 2, "alignment_weight": 0.0, "contrastive_weight": 1.0},
        {"stage": 2, "contrastive_weight": 0.7, "hard_negatives": True},
    ],
)
def test_an_update_does_not_depend_on_how_the_step_is_cut(model_folder, compression_file, alignment_file, options):
    file = compression_file if options["stage"] == 1 else alignment_file
    results = []
    for budget in (None, 60):
        config = Config(
            **{"model": model_folder, "train_data": file, "output_dir": "unused", "token_budget": budget, **options}
        )
        objective, encoder, batch = objective_of(config, file)
        log = objective(batch)
        results.append(({name: x.item() for name, x in log.items()}, gradients(encoder)))
        if budget:
            assert len(make_microbatches([len(t) for t in texts_of(batch, False)[0]], 20)) > 2
    (whole_log, whole), (cut_log, parts) = results
    assert whole.keys() == parts.keys()
    assert max(g.abs().max() for g in whole.values()) > 1e-4
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=2e-6, msg=name)
    for name in whole_log:
        assert cut_log[name] == pytest.approx(whole_log[name], rel=1e-4, abs=1e-5), name


def test_wrong_evaluation_data_is_refused_before_anything_is_loaded(model_folder, compression_file, tmp_path, quiet):
    pair = {"sentence1": "a", "sentence2": "b", "score": 1}
    for rows, options, message in (
        ([{"title": "the cat"}], {}, "sentence1"),
        ([{"text": "the cat"}] * 2, {}, "got one text in"),
        ([{"text": "the cat"}, {"text": " "}], {}, "got an empty 'text' in line 2"),
        ([{"text": "a"}, {"text": "b"}], {"eval_metric": "spearman"}, "^eval_metric: got 'spearman', expected view_s"),
        ([pair, pair], {}, "got 1.0 as 'score' in every row"),
    ):
        wrong = write_jsonl(tmp_path / "wrong.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            train(stage1("no model", compression_file, tmp_path / "out", eval_data=wrong, **options), quiet)


@pytest.mark.parametrize("hard_negatives", [False, True])
def test_equal_texts_are_no_negatives_of_each_other(model_folder, tmp_path, hard_negatives):
    rows = [
        {"query": sentence(i, 5), "pos": sentence(100 + i % 3, 4), "neg": sentence(101 + i % 4, 4)} for i in range(8)
    ]
    file = write_jsonl(tmp_path / "repeated.jsonl", rows)
    options = {"alignment_weight": 0.0, "contrastive_weight": 1.0, "hard_negatives": hard_negatives}
    objective, encoder, batch = objective_of(stage2(model_folder, file, "unused", **options), file)
    passages = [row["pos"] for row in rows] + [row["neg"] for row in rows] * hard_negatives
    e = text_embedding(encoder(*texts_of(batch, hard_negatives)))
    scores = e[:8] @ e[8:].T / 0.05
    for i, row in enumerate(rows):
        for j, text in enumerate(passages):
            if text == row["pos"] and i != j:
                scores[i, j] = -torch.inf
    wanted = torch.nn.functional.cross_entropy(scores, torch.arange(8))
    assert objective(batch)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert wanted < info_nce(e[:8], e[8:]) - 0.1, "unlike the loss that takes them as negatives"


def test_contrastive_objective_is_info_nce_over_the_whole_step(model_folder, alignment_file):
    config = stage2(model_folder, alignment_file, "unused", alignment_weight=0.0, contrastive_weight=1.0)
    objective, encoder, batch = objective_of(config, alignment_file)
    assert objective.decoder is None
    e = text_embedding(encoder(*texts_of(batch, False)))
    assert objective(batch)["loss"].item() == pytest.approx(info_nce(e[:8], e[8:]).item(), rel=1e-5)


def test_both_stages_learn_and_leave_a_model_that_loads(
    model_folder, compression_file, alignment_file, sts_file, tmp_path, quiet
):
    from sentence_transformers import SentenceTransformer

    first = train(
        stage1(model_folder, compression_file, tmp_path / "one", max_steps=25, eval_data=sts_file, learning_rate=3e-3),
        quiet,
    )
    log = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 26))
    assert sum(r["loss"] for r in log[-5:]) < sum(r["loss"] for r in log[:5]) - 2.5
    options = {"contrastive_weight": 1.0, "eval_data": sts_file, "license": "mit"}
    second = train(stage2(first["model"], alignment_file, tmp_path / "two", **options), quiet)
    card = (tmp_path / "two" / "export" / "README.md").read_text()
    for part in ("license: mit", f"made from {Path(model_folder).name} by", "Data: stage2.jsonl.", "stage: 2"):
        assert part in card
    for step, found in second["evaluations"].items():
        assert f"| {'before' if step == '0' else f'after step {step}'} | {found['spearman']:.4f} |" in card
    assert "contrastive_weight: 1.0" in card
    assert str(tmp_path) not in card
    last = first["evaluations"]["25"]["spearman"]
    assert second["evaluations"]["0"]["spearman"] == pytest.approx(last, abs=1e-6)
    config = stage2(second["model"], alignment_file, "unused")
    encoder = build_models(config)[0]
    texts = ["the cat sat", "rain fell over old stone bridges </s> and <EMBED0> boats", "dusk " * 600]
    exported = SentenceTransformer(second["export"], device="cpu")
    found = exported.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, encoder.encode(texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"token_budget": 60}])
def test_autocast_ends_with_every_pass_of_a_run(options, model_folder, compression_file, tmp_path, quiet):
    """What is left on would round all that the process computes from then on, the comparison of the export first."""
    train(stage1(model_folder, compression_file, tmp_path / "out", precision="bf16", **options), quiet)
    assert not torch.is_autocast_enabled("cpu")


def test_the_export_has_the_dtype_and_the_name_of_the_config(model_folder, compression_file, sts_file, tmp_path, quiet):
    options = {"export_dtype": "bf16", "model_name": "me/mine", "eval_data": sts_file}
    made = train(stage1(model_folder, compression_file, tmp_path / "out", **options), quiet)
    folder = Path(made["export"])
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n# me/mine\n" in card
    assert "export_dtype: bf16" in card
    weights = load_file(f"{made['model']}/model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}, "stage 2 starts from these"


def test_the_decoder_is_the_original_model_in_both_stages(
    model_folder, compression_file, alignment_file, tmp_path, quiet
):
    first = train(stage1(model_folder, compression_file, tmp_path / "one"), quiet)
    original = build_models(stage1(model_folder, compression_file, "unused"))[1]
    later = build_models(stage2(first["model"], alignment_file, "unused"))[1]
    for a, b in zip(original.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_interruption_saves_a_state_that_resumes(model_folder, compression_file, tmp_path):
    code = """
import os, signal, sys
from autoregembed import sampling
from autoregembed.cli import main
inner = sampling.batches
def batches(*args, **kwargs):
    for i, batch in enumerate(inner(*args, **kwargs)):
        if i == 2:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch
sampling.batches = batches
sys.exit(main(sys.argv[1:]))
"""
    flags = {"stage": 1, "model": model_folder, "train_data": compression_file, "output_dir": tmp_path / "out"}
    flags |= {"max_steps": 5, "batch_size": 4, "precision": "fp32"}
    arguments = [x for name, value in flags.items() for x in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, "-c", code, "train", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 130, result.stderr
    assert "resume" in result.stdout
    assert (tmp_path / "out" / "checkpoints" / "step-00000003").is_dir()
    assert signal.getsignal(signal.SIGINT) is not None


def test_lora_trains_compress_tokens_and_merges(model_folder, compression_file, tmp_path, quiet):
    config = stage1(model_folder, compression_file, tmp_path / "lora", lora_rank=4, max_steps=6)
    start = build_models(config)[0]
    result = train(config, quiet)
    original = start.model.get_base_model().get_input_embeddings().weight.detach()
    weights = load_file(f"{result['model']}/model.safetensors")
    embedding = next(w for n, w in weights.items() if "embed_tokens" in n)
    ids = start.compress_token_ids
    assert ((embedding[ids] - start.compress_rows.detach()).abs().amax(1) > 1e-4).all()
    rest = torch.ones(len(embedding), dtype=torch.bool)
    rest[ids] = False
    assert torch.equal(embedding[: len(original)][rest[: len(original)]], original[rest[: len(original)]])
    adapter = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name or "trainable_tokens" in name for name in adapter), "no whole embedding matrix"
    assert sum("trainable_tokens" in name for name in adapter) == 1
    again = build_models(stage1(result["model"], compression_file, "unused", decoder=model_folder))[0]
    assert again.compress_token_ids == ids


def test_frozen_parameters_stay_and_compress_rows_move(model_folder, compression_file, tmp_path, quiet):
    config = stage1(model_folder, compression_file, tmp_path / "out", freeze=["embed_tokens", r"layers\.0\."])
    before = build_models(config)[0]
    result = train(config, quiet)
    after = build_models(stage1(result["model"], compression_file, "unused", decoder=model_folder))[0]
    old, new = dict(before.model.named_parameters()), dict(after.model.named_parameters())
    ids = before.compress_token_ids
    for name in old:
        moved = not torch.equal(old[name], new[name])
        assert moved == (".layers.0." not in name), name
    assert (after.compress_rows - before.compress_rows).abs().max() > 1e-4
    rest = [i for i in range(len(old["model.embed_tokens.weight"])) if i not in ids]
    assert torch.equal(old["model.embed_tokens.weight"][rest], new["model.embed_tokens.weight"][rest])


def test_reference_scores_are_cached_and_refused_for_other_data(
    model_folder, compression_file, alignment_file, tmp_path, quiet
):
    model = train(stage1(model_folder, compression_file, tmp_path / "one"), quiet)["model"]
    kept = tmp_path / "scores.safetensors"
    config = stage2(model, alignment_file, tmp_path / "two", ref_logps_file=str(kept))
    train(config, quiet)
    stamp = kept.stat().st_mtime_ns
    train(config, quiet)
    assert kept.stat().st_mtime_ns == stamp
    other = tmp_path / "other.jsonl"
    other.write_text(Path(alignment_file).read_text().split("\n", 1)[1])
    config.train_data = str(other)
    with pytest.raises(ScoresMismatch, match=r"'data': '\w+'.*'data': '\w+'"):
        train(config, quiet)
    config = stage2(model_folder, alignment_file, tmp_path / "two", ref_logps_file=str(kept))
    with pytest.raises(ScoresMismatch, match="model"):
        train(config, quiet)
    kept.write_bytes(b"rubbish")
    with pytest.raises(files.CheckpointError, match="damaged"):
        train(config, quiet)


def test_reference_scores_do_not_depend_on_their_batches(model_folder, alignment_file):
    config = stage2(model_folder, alignment_file, "unused")
    encoder, decoder, tokenizer, _ = build_models(config)
    rows = data.alignment_rows(data.load_rows(alignment_file), Prompt(tokenizer, 5, encoder.bos_token_id, "x"))
    whole, parts = (compute_ref_logps(encoder.eval(), decoder, rows, budget) for budget in (10**9, 50))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert whole[1].isnan().any()
    assert not whole[0].isnan().any()


def test_k_mismatch_with_a_checkpoint_is_refused(model_folder, compression_file, tmp_path, quiet):
    model = train(stage1(model_folder, compression_file, tmp_path / "one", num_compress_tokens=3), quiet)["model"]
    with pytest.raises(files.CheckpointError, match=r"num_compress_tokens: got 5, expected 3"):
        build_models(stage2(model, compression_file, "unused", num_compress_tokens=5))
    assert build_models(stage2(model, compression_file, "unused"))[0].num_compress_tokens == 3


def test_an_unwritable_output_folder_fails_at_once(model_folder, compression_file, tmp_path, quiet):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"^output_dir: got '.*/file/out', which cannot be written"):
        train(stage1("/nowhere", compression_file, tmp_path / "file" / "out"), quiet)


@pytest.mark.parametrize(
    "name", ["model", "export", "adapter", "checkpoints", "summary.json", "metrics.jsonl", "training.png"]
)
def test_what_stands_in_the_way_of_a_result_is_named_before_the_model_is_loaded(
    name, compression_file, tmp_path, quiet
):
    if "." in name:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/nowhere/either")
    with pytest.raises(FileExistsError, match=rf"^output_dir: got '.*/{name}', which is no (file|folder)"):
        train(stage1("/nowhere", compression_file, tmp_path), quiet)
    assert [p.name for p in tmp_path.iterdir() if p.name != "stage1.jsonl"] == [name]


@pytest.mark.parametrize(("options", "copies"), [({}, 2), ({"save_steps": 1}, 5), ({"lora_rank": 2}, 2)])
def test_a_result_that_does_not_fit_onto_the_disk_is_not_trained(
    options, copies, model_folder, compression_file, tmp_path, quiet, monkeypatch
):
    config = stage1(model_folder, compression_file, tmp_path / "out", max_steps=1, **options)
    size = sum(p.numel() * p.element_size() for p in build_models(config)[0].parameters())
    usage = files.shutil.disk_usage(tmp_path)
    free = {"bytes": copies * size - 1}
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=free["bytes"]))
    with pytest.raises(OSError, match=r"^output_dir: got '.*/out' with .* GB free, expected "):
        train(config, quiet)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"lock"}
    free["bytes"] += 1
    train(config, quiet)
    # Written anew, each replaces the one before: there need not be room for both at once.
    free["bytes"] = size
    if not options:
        train(config, quiet)


def test_a_run_from_an_export_leaves_a_model_that_loads(compression_file, alignment_file, tmp_path, quiet):
    """An export has no LM head; where it is not tied, nobody else has its weights either."""
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    models.save_model(tmp_path / "lm", model, tokenizer, {})
    (tmp_path / "lm" / models.RECIPE).unlink()
    out = tmp_path / "one"
    train(stage1(str(tmp_path / "lm"), compression_file, out, max_steps=2), quiet)
    made = [
        train(stage2(str(out / folder), alignment_file, tmp_path / f"from {folder}", max_steps=1), quiet)
        for folder in ("model", "export")
    ]
    same, found = (Encoder.from_pretrained(summary["model"]).encode(["the cat"]) for summary in made)
    torch.testing.assert_close(found, same, rtol=0, atol=1e-6)
    train(stage2(made[1]["model"], alignment_file, tmp_path / "three", max_steps=1), quiet)
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in
               Decoder.from_pretrained(made[1]["model"]).model.state_dict().items())  # fmt: skip


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../a/b", "~/model", "runs/stage1/model"])
def test_a_path_that_does_not_exist_is_taken_for_no_hub_id(name, compression_file, tmp_path, quiet):
    for field in ("model", "decoder"):
        config = {"model": name} if field == "model" else {"model": "/nowhere/model", "decoder": name}
        with pytest.raises(
            files.CheckpointError, match=r"^model: got '[^']+', which cannot be loaded: it does not exist; expected a"
        ):
            train(stage1(config.pop("model"), compression_file, tmp_path / "out", **config), quiet)


def test_a_base_model_that_has_moved_is_named_by_who_names_it(
    model_folder, compression_file, alignment_file, tmp_path, quiet
):
    shutil.copytree(model_folder, tmp_path / "base")
    out = tmp_path / "out"
    train(stage1(str(tmp_path / "base"), compression_file, out, max_steps=1), quiet)
    (tmp_path / "base").rename(tmp_path / "moved")
    message = r"^decoder: got '.*/base', which cannot .* not exist; .*/(model|export)' was trained from, .*`decoder`"
    with pytest.raises(files.CheckpointError, match=message):
        train(stage2(str(out / "model"), alignment_file, tmp_path / "two", max_steps=1), quiet)
    for folder in ("model", "export"):
        with pytest.raises(files.CheckpointError, match=message):
            Decoder.from_pretrained(out / folder)
        Encoder.from_pretrained(out / folder)  # needs no decoder
    moved = str(tmp_path / "moved")
    train(stage2(str(out / "model"), alignment_file, tmp_path / "two", max_steps=1, decoder=moved), quiet)
    assert json.loads((tmp_path / "two" / "model" / "autoregembed.json").read_text())["decoder"] == moved
    # Nor does a loss without a decoder.
    options = {"alignment_weight": 0.0, "contrastive_weight": 1.0, "max_steps": 1}
    train(stage2(str(out / "model"), alignment_file, tmp_path / "three", **options), quiet)


def test_rated_pairs_are_measured_without_their_ratings_too(model_folder, compression_file, sts_file, tmp_path, quiet):
    options = {"eval_data": sts_file, "eval_metric": "view_separation", "eval_steps": 1, "save_best": True}
    summary = train(stage1(model_folder, compression_file, tmp_path / "out", **options, max_steps=3), quiet)
    found = summary["evaluations"]
    assert all(list(values) == [*METRICS] and None not in values.values() for values in found.values())
    assert summary["model_step"] == int(max("123", key=lambda step: found[step]["view_separation"]))
    pairs = load_sts(sts_file)
    texts = dict.fromkeys([*pairs["sentence1"], *pairs["sentence2"]])
    alone = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    config = stage1(model_folder, compression_file, tmp_path / "alone", **options | {"eval_data": alone}, max_steps=3)
    for step, values in train(config, quiet)["evaluations"].items():
        assert values == pytest.approx({name: found[step][name] for name in LABEL_FREE}, rel=1e-5)


def test_equal_embeddings_leave_no_nan_in_what_a_run_writes(model_folder, compression_file, tmp_path):
    from rich.console import Console

    rows = [{"sentence1": "the cat", "sentence2": "the cat", "score": i} for i in range(4)]
    pairs = write_jsonl(tmp_path / "same.jsonl", rows)
    console = Console(file=io.StringIO(), width=1000)
    options = {"eval_data": pairs, "eval_steps": 1, "save_best": True, "save_steps": 1, "max_steps": 2}
    summary = train(stage1(model_folder, compression_file, tmp_path / "out", **options), console)
    assert summary["evaluations"] == {step: {"spearman": None} for step in "012"}
    assert summary["model_step"] == 2, "the last, where none is the best"
    assert "evaluation: no spearman, similarities: got no two different" in console.file.getvalue()
    written = [p for p in (tmp_path / "out").rglob("*.json*") if p.is_file()]
    assert len(written) > 8
    for path in written:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_full_disk_leaves_no_half_written_folder(tmp_path):
    def write():
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / "part").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="out"), files.atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_weights_that_are_not_finite_are_refused(model_folder, compression_file, tmp_path, quiet):
    model, tokenizer, _ = models.load_causal_lm(model_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    models.save_model(tmp_path / "nan", model, tokenizer, {})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        train(stage1(str(tmp_path / "nan"), compression_file, tmp_path / "out"), quiet)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("beta", -1.0), ("freeze", ["("])],
)
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        Config(**{"stage": 1, "model": "m", "train_data": "d", "output_dir": "o", field: value})


def test_interrupted_is_a_keyboard_interrupt():
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"token_budget": 80}])
def test_init_output_rms_gives_z_the_decoders_rms_once(
    model_folder, compression_file, tmp_path, quiet, monkeypatch, options
):
    packs: list[int] = []  # the tokens of each pass of init_output_rms
    whole, pack = Encoder.init_output_rms, encoder_module.pack

    def watched(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(encoder_module, "pack", lambda s, device: packs.append(sum(map(len, s))) or pack(s, device))
            whole(*arguments)

    monkeypatch.setattr(Encoder, "init_output_rms", watched)
    tiny = {"init_output_rms": True, "max_steps": 1, "learning_rate": 1e-12, **options}
    first = train(stage1(model_folder, compression_file, tmp_path / "one", **tiny), quiet)
    again = train(stage1(first["model"], compression_file, tmp_path / "two", **tiny), quiet)
    assert packs
    assert (len(packs) > 1) is ("token_budget" in options)
    assert max(packs) <= options.get("token_budget", 4096)
    for summary in (first, again):
        config = stage1(summary["model"], compression_file, "unused")
        encoder, decoder, tokenizer, recipe = build_models(config)
        assert recipe["output_rms_initialized"]
        prompt = Prompt(tokenizer, 5, encoder.bos_token_id, config.instruction)
        rows = data.compression_rows(data.load_rows(compression_file), prompt).to_list()
        with torch.no_grad():
            z = encoder(*texts_of(rows, False))
        found, wanted = z.square().mean((0, 1)).sqrt(), decoder.input_rms_per_dimension()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_lora_and_init_output_rms_train_no_norm_but_the_final_one(model_folder, compression_file):
    encoder = build_models(stage1(model_folder, compression_file, "unused", lora_rank=2, init_output_rms=True))[0]
    norms = [n for n, p in encoder.named_parameters() if p.requires_grad and "norm" in n]
    assert len(norms) == 1
    assert ".model.norm." in norms[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])
def test_scale_output_scales_any_final_norm(architecture):
    model = tiny_model(architecture)
    ids, gain = torch.tensor([[1, 5, 9]]), torch.rand(32) + 0.5
    before = model.base_model(ids).last_hidden_state
    scale_output(final_norm(model), gain)
    torch.testing.assert_close(model.base_model(ids).last_hidden_state, before * gain, rtol=1e-4, atol=1e-5)


def test_reference_scores_are_made_for_the_rows_that_a_run_reads(model_folder, alignment_file, tmp_path, quiet):
    kept = tmp_path / "scores.safetensors"
    config = stage2(model_folder, alignment_file, tmp_path / "out", ref_logps_file=str(kept), batch_size=3, max_steps=2)
    train(config, quiet)
    first = load_file(kept)
    read = sorted(set(sampling.drawn(24, 0, 6, config.seed)))
    assert (~first["positive"].isnan()).nonzero().flatten().tolist() == read
    train(
        stage2(model_folder, alignment_file, tmp_path / "out", ref_logps_file=str(kept), batch_size=3, max_steps=5),
        quiet,
    )
    second = load_file(kept)
    assert int((~second["positive"].isnan()).sum()) == 15
    torch.testing.assert_close(second["negatives"][read], first["negatives"][read], equal_nan=True, rtol=0, atol=0)
