"""Score distillation in the loop: the scores of the model before the stage teach the cosines."""

import gc
import io
import json
import math
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from conftest import sentence, stage2, write_jsonl
from rich.console import Console

from autoregembed import cli, data, sampling, score_distillation, teacher_scores
from autoregembed.build import build_models
from autoregembed.config import ConfigError, Stage2Options
from autoregembed.embedding_losses import distillation_loss, unknown_pairs
from autoregembed.encoder import text_embedding
from autoregembed.evaluate import LABEL_FREE
from autoregembed.files import CheckpointError
from autoregembed.objective import Objective, texts_of
from autoregembed.prompt import Prompt
from autoregembed.teacher_scores import compute_teacher_scores, log_marginal, pair_scores, retrieval_accuracy
from autoregembed.train import Run, train

ONLY = {"alignment_weight": 0.0, "distillation_weight": 1.0}


@pytest.fixture
def text_file(tmp_path) -> str:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence(i, 4 + i % 5)} for i in range(20)])


def step_of(config, file):
    """The objective, the encoder, all teacher scores, and the first batch of a run."""
    from accelerate import Accelerator

    encoder, decoder, tokenizer, _ = build_models(config)
    prompt = Prompt(tokenizer, encoder.num_compress_tokens, encoder.bos_token_id, config.instruction)
    loaded = data.load_rows(file)
    rows = (data.text_rows if data.is_unpaired(loaded) else data.alignment_rows)(loaded, prompt)
    blocks = sampling.blocks(len(rows), config.batch_size, config.seed)
    scores = compute_teacher_scores(encoder, decoder, rows, blocks)
    batch = next(sampling.batches(rows, config.batch_size, seed=config.seed, in_blocks=True))
    objective = Objective(config, encoder, None, Accelerator(cpu=True), None, scores)
    return objective, encoder, decoder, scores, batch


def cross_entropy(target, cosines, i, mixture):
    """−Σ t · log softmax of one row or column, as {place: value}; t mixed with the known pair i."""
    top = max(target.values())
    total = sum(math.exp(x - top) for x in target.values())
    lse = math.log(sum(math.exp(x) for x in cosines.values()))
    weights = {j: mixture * math.exp(x - top) / total + (1 - mixture) * (i == j) for j, x in target.items()}
    return -sum(w * (cosines[j] - lse) for j, w in weights.items())


def distilled(q, p, s, mask, tau, mixture):
    """The formula, pair by pair, in float64; s is already divided by the teacher's temperature."""
    places = range(len(q))
    cos = [[float(q[i] @ p[j]) / tau for j in places] for i in places]
    rows = [[j for j in places if mask[i][j]] for i in places]
    columns = [[i for i in places if mask[i][j]] for j in places]
    marginal = []
    for j in places:
        top = max(s[i][j] for i in columns[j])
        marginal.append(top + math.log(sum(math.exp(s[i][j] - top) for i in columns[j])))
    total = 0.0
    for i in places:
        total += cross_entropy({j: s[i][j] - marginal[j] for j in rows[i]}, {j: cos[i][j] for j in rows[i]}, i, mixture)
        total += cross_entropy({x: s[x][i] for x in columns[i]}, {x: cos[x][i] for x in columns[i]}, i, mixture)
    return total / (2 * len(q))


@pytest.mark.parametrize(
    ("pairs", "mixture", "unpaired"),
    [("mask", 1.0, False), ("keep", 1.0, False), ("keep", 0.4, False), ("mask", 1.0, True)],
)
def test_a_step_is_the_formula(model_folder, alignment_file, text_file, pairs, mixture, unpaired):
    file = text_file if unpaired else alignment_file
    options = {**ONLY, "distillation_pairs": pairs, "distillation_mixture": mixture, "teacher_temperature": 2.0}
    results = []
    for budget in (None, 60):
        config = stage2(model_folder, file, "unused", token_budget=budget, **options)
        objective, encoder, _, scores, batch = step_of(config, file)
        results.append(objective(batch)["loss"])
    with torch.no_grad():
        e = text_embedding(encoder(*texts_of(batch, False))).double()
    q, p = (e, e) if unpaired else e.split(len(batch))
    assert len(p) == len(batch)
    mask = [[pairs == "keep" or i != j for j in range(len(batch))] for i in range(len(batch))]
    block = batch[0]["block"]
    s = (scores[block].double() / 2.0).tolist()
    wanted = distilled(q, p, s, mask, config.distillation_temperature, mixture)
    assert results == pytest.approx([wanted, wanted], rel=1e-5)


def test_the_teacher_scores_every_pair_of_a_block(model_folder, alignment_file):
    config = stage2(model_folder, alignment_file, "unused", **ONLY)
    _, encoder, decoder, scores, batch = step_of(config, alignment_file)
    with torch.no_grad():
        for i in (0, 5):
            z = encoder([batch[i]["query_ids"]], [batch[i]["suffix_ids"]])
            for j in (0, 3, 7):
                wanted = decoder.logprob(z, [batch[j]["target_ids"][0]])
                torch.testing.assert_close(scores[batch[0]["block"], i, j], wanted[0], rtol=1e-5, atol=1e-4)


def test_pair_scores_is_all_queries_by_all_passages(model_folder, alignment_file):
    _, encoder, decoder, _, batch = step_of(stage2(model_folder, alignment_file, "unused", **ONLY), alignment_file)
    with torch.no_grad():
        z = encoder([r["query_ids"] for r in batch[:3]], [r["suffix_ids"] for r in batch[:3]])
        targets = [r["target_ids"][0] for r in batch[:2]]
        found = pair_scores(decoder, z, targets, token_budget=20)
        assert found.shape == (3, 2)
        torch.testing.assert_close(found[2], decoder.logprob(z, targets, [2, 2]))


def test_chosen_candidates_are_the_pairs_that_are_scored(model_folder, alignment_file):
    _, encoder, decoder, _, batch = step_of(stage2(model_folder, alignment_file, "unused", **ONLY), alignment_file)
    with torch.no_grad():
        z = encoder([r["query_ids"] for r in batch[:3]], [r["suffix_ids"] for r in batch[:3]])
        targets = [r["target_ids"][0] for r in batch[:4]]
        chosen = [[2, 0], [1], [], [0, 1, 2]]
        found = pair_scores(decoder, z, targets, z_index=chosen)
        every = pair_scores(decoder, z, targets)
        none = pair_scores(decoder, z, targets, z_index=[[]] * 4)
    known = torch.tensor([[i in chosen[j] for j in range(4)] for i in range(3)])
    assert torch.equal(~found.isnan(), known)
    torch.testing.assert_close(found[known], every[known], rtol=1e-6, atol=1e-5)
    assert none.isnan().all()
    e = text_embedding(z)
    loss = score_distillation(e, torch.cat([e, e[:1]]), found, mask=known)
    filled = score_distillation(e, torch.cat([e, e[:1]]), every, mask=known)
    torch.testing.assert_close(loss, filled, rtol=1e-5, atol=1e-6)
    for wrong, error in (([[0]] * 3, ValueError), ([[0, 0], [], [], []], ValueError), ([[9], [], [], []], IndexError)):
        with pytest.raises(error, match="z_index"):
            pair_scores(decoder, z, targets, z_index=wrong)


def test_the_marginal_may_be_that_of_more_texts_than_the_batch_has():
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 4))
    scores = 9 * torch.randn(8, 4, generator=generator, dtype=torch.float64)  # of five earlier texts and the three
    mine, tau = scores[5:], 2.0
    found = score_distillation(q, p, mine, teacher_temperature=tau, marginal=log_marginal(scores, tau))
    cos = [[float(torch.cosine_similarity(q[i], p[j], dim=0)) / 0.05 for j in range(4)] for i in range(3)]
    wanted = 0.0
    for i in range(3):
        removed = [math.log(sum(math.exp(float(scores[r, j]) / tau) for r in range(8))) for j in range(4)]
        row = {j: float(mine[i, j]) / tau - removed[j] for j in range(4)}
        wanted += cross_entropy(row, dict(enumerate(cos[i])), i, 1.0) / 6
    for j in range(4):
        column = {i: float(mine[i, j]) / tau for i in range(3)}
        wanted += cross_entropy(column, {i: cos[i][j] for i in range(3)}, j, 1.0) / 8
    assert found.item() == pytest.approx(wanted, rel=1e-9)
    batch = score_distillation(q, p, mine, teacher_temperature=tau)
    alone = score_distillation(q, p, mine, teacher_temperature=tau, marginal=log_marginal(mine, tau))
    assert alone.item() == pytest.approx(batch.item(), rel=1e-12)
    assert abs(batch.item() - wanted) > 1e-3


def test_equal_texts_are_masked_with_the_known_pairs(model_folder, tmp_path):
    """A repeated passage, or the query itself among the passages, is no unlabelled candidate."""
    rows = [{"query": sentence(i, 5), "pos": sentence(100 + i // 2, 4)} for i in range(8)]
    rows[7]["pos"] = rows[0]["query"]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = stage2(model_folder, file, "unused", **ONLY)
    objective, encoder, _, scores, batch = step_of(config, file)
    texts = [rows[r["row"]] for r in batch]
    mask = [[d["pos"] not in (x["pos"], x["query"]) for d in texts] for x in texts]
    assert sum(not m for row in mask for m in row) == 8 + 6 + 1
    with torch.no_grad():
        q, p = text_embedding(encoder(*texts_of(batch, False))).double().split(8)
    s = (scores[batch[0]["block"]].double() / 3.0).tolist()
    assert objective(batch)["loss"] == pytest.approx(distilled(q, p, s, mask, 0.05, 1.0), rel=1e-5)


def test_blocks_stay_together():
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(24)]})
    mine = [sampling.batches(rows, 5, seed=3, rank=r, world=2, in_blocks=True) for r in range(2)]
    seen = [next(mine[i % 2]) for i in range(2 * 4)]
    blocks = sampling.blocks(24, 5, 3)
    assert len(blocks) == 4
    for batch in seen:
        assert [r["row"] for r in batch] == blocks[batch[0]["block"]]
        assert [r["place"] for r in batch] == list(range(5))
    epochs = [[b[0]["block"] for b in seen[i : i + 4]] for i in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 1, 2, 3]
    again = sampling.batches(rows, 5, seed=3, start=2, rank=1, world=2, in_blocks=True)
    assert [r["row"] for r in next(again)] == [r["row"] for r in seen[5]]


@pytest.mark.parametrize("options", [{"candidates": 2}, {"others": 3}, {"candidates": 1, "others": 2}])
def test_chosen_pairs_and_other_texts_are_scored_as_all_pairs_are(options, model_folder, text_file):
    config = stage2(model_folder, text_file, "unused", **ONLY)
    encoder, decoder, tokenizer, _ = build_models(config)
    prompt = Prompt(tokenizer, encoder.num_compress_tokens, encoder.bos_token_id, config.instruction)
    rows = data.text_rows(data.load_rows(text_file), prompt)
    blocks = [[0, 3, 5, 7, 9], [1, 2, 4, 6, 8]]
    r, candidates = options.get("others", 0), options.get("candidates")
    others = [[10 + i + k for k in range(r)] for i in range(2)]
    encoder.eval()
    found = compute_teacher_scores(encoder, decoder, rows, blocks, 8192, candidates, others)
    assert found.shape == (2, 5 + r, 5)
    for block, more, scores in zip(blocks, others, found, strict=True):
        batch = rows.select([*block, *more]).to_list()
        with torch.no_grad():
            z = encoder([x["query_ids"] for x in batch], [x["suffix_ids"] for x in batch])
            wanted = pair_scores(decoder, z, [x["target_ids"][0] for x in batch[:5]])
        e = text_embedding(z[:5])
        order = (e @ e.T + 3 * torch.eye(5)).argsort(0, descending=True)  # its own first
        kept = torch.ones(5 + r, 5, dtype=torch.bool)
        if candidates is not None:
            kept[:5] = (order[: candidates + 1, None] == torch.arange(5)[None, :, None]).any(0)
            assert kept[:5].sum(0).tolist() == [candidates + 1] * 5
        torch.testing.assert_close(scores[kept], wanted[kept], rtol=1e-4, atol=1e-3)
        assert bool((scores[~kept] == -torch.inf).all())


@pytest.mark.parametrize("pairs", ["mask", "keep"])
def test_the_loss_reads_chosen_pairs_and_a_wider_marginal(pairs):
    generator = torch.Generator().manual_seed(0)
    query, passages = (torch.randn(4, 6, generator=generator) for _ in range(2))
    scores, others = -40 * torch.rand(4, 4, generator=generator), -40 * torch.rand(3, 4, generator=generator)
    chosen = ~torch.eye(4, dtype=torch.bool).roll(3, 1)  # each passage by its own z and two others
    kept = chosen & ~torch.eye(4, dtype=torch.bool) if pairs == "mask" else chosen
    options = Stage2Options(**ONLY, distillation_pairs=pairs)
    keys = [([i], [10 + i]) for i in range(4)]
    given = torch.cat([scores.masked_fill(~chosen, -torch.inf), others])
    # By hand: the marginal over the kept pairs of the block and the three other texts.
    marginal = torch.tensor(
        [3 * math.log(sum(math.exp(x / 3) for x in [*scores[kept[:, j], j].tolist(), *others[:, j].tolist()]))
         for j in range(4)]
    )  # fmt: skip
    wanted = score_distillation(query, passages, scores, mask=kept, marginal=marginal)
    mask = unknown_pairs(options, keys, given)
    torch.testing.assert_close(distillation_loss(options, query, passages, given, mask), wanted)
    narrow = distillation_loss(options, query, passages, given[:4], mask)
    torch.testing.assert_close(narrow, score_distillation(query, passages, scores, mask=kept))
    assert abs(narrow - wanted) > 1e-3


def test_a_teacher_is_told_by_the_texts_that_find_themselves():
    """How likely a text is anyway does not count, nor who scores it besides the block."""
    own = torch.tensor([[[0.0, -1, -1], [-1, 0, -1], [-1, 0.5, 0]]])
    likely = own + torch.tensor([0.0, -30, -7])
    for scores in (own, likely, torch.cat([likely, likely.new_full((1, 2, 3), 99.0)], 1)):
        assert retrieval_accuracy(scores) == 1.0
    wrong = likely.clone()
    wrong[0, 2, 1] += 0.3
    assert retrieval_accuracy(torch.cat([wrong, likely])) == pytest.approx(5 / 6)
    assert retrieval_accuracy(likely.masked_fill(own < 0, -torch.inf)) == 1.0


def test_candidates_and_other_texts_are_options_of_a_run(model_folder, text_file, tmp_path):
    out = io.StringIO()
    options = {**ONLY, "batch_size": 5, "distillation_candidates": 2, "distillation_marginal_texts": 4}
    train(stage2(model_folder, text_file, tmp_path / "run", **options), Console(file=out, width=200))
    shown = out.getvalue()
    assert "teacher scores: 3 blocks of 5 × 7 pairs" in shown
    said = next(line for line in shown.splitlines() if "of the texts find their own passage" in line)
    assert said.endswith("train stage 1 for longer"), "an untrained model teaches nothing"
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["distill"]) and row["distill"] > 0 for row in log)
    options |= {"distillation_marginal_texts": 16}
    with pytest.raises(
        ValueError, match="distillation_marginal_texts: got 16, expected at most 15, the texts of the o"
    ):
        train(stage2(model_folder, text_file, tmp_path / "more", **options), Console(quiet=True))


def test_texts_alone_train_without_a_pair(model_folder, text_file, sts_file, tmp_path, quiet):
    summary = train(stage2(model_folder, text_file, tmp_path / "run", eval_data=sts_file, **ONLY), quiet)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert all(row["distill"] == pytest.approx(row["loss"]) for row in log)
    assert (tmp_path / "run" / "export" / "modules.json").is_file()
    assert summary["evaluations"]["3"] != summary["evaluations"]["0"]


@pytest.mark.parametrize("weights", [{"alignment_weight": 1.0}, {"alignment_weight": 0.0, "contrastive_weight": 1.0}])
def test_texts_alone_are_refused_where_pairs_are_needed(model_folder, text_file, tmp_path, quiet, weights):
    with pytest.raises(ConfigError, match=r"train_data: got texts without pairs.*distillation_weight"):
        train(stage2(model_folder, text_file, tmp_path / "run", distillation_weight=1.0, **weights), quiet)


def test_scores_are_made_once_and_a_longer_run_adds_the_blocks_it_lacks(
    model_folder, alignment_file, tmp_path, quiet, monkeypatch
):
    made: list[list[int]] = []
    compute = compute_teacher_scores

    def counted(encoder, decoder, rows, blocks, *rest):
        made.extend(blocks)
        return compute(encoder, decoder, rows, blocks, *rest)

    monkeypatch.setattr(teacher_scores, "compute_teacher_scores", counted)
    out = tmp_path / "run"
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "autoregembed"
    before = set(cache.glob("teacher-scores-*"))
    first = train(stage2(model_folder, alignment_file, out, max_steps=1, **ONLY), quiet)
    assert len(made) == 1
    train(stage2(model_folder, alignment_file, out, max_steps=1, **ONLY), quiet)
    assert len(made) == 1, "they were read"
    train(stage2(model_folder, alignment_file, out, max_steps=5, **ONLY), quiet)
    assert len(made) == 3, "24 rows are three blocks of 8, read twice by five steps"
    assert len({tuple(b) for b in made}) == 3
    assert first["steps"] == 1
    (file,) = set(cache.glob("teacher-scores-*.safetensors")) - before
    train(stage2(model_folder, alignment_file, out, max_steps=1, batch_size=6, **ONLY), quiet)
    found = set(cache.glob("teacher-scores-*.safetensors")) - before
    assert len(found) == 2, "other blocks, another file"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="teacher_scores: got a damaged file"):
        train(stage2(model_folder, alignment_file, out, max_steps=1, **ONLY), quiet)
    file.unlink()


def test_the_decoder_is_released_once_its_scores_are_there(model_folder, text_file, tmp_path, quiet, monkeypatch):
    prepare, released = Run.prepare, []

    def watched(self):
        decoder = weakref.ref(self.decoder.model)
        prepare(self)
        gc.collect()
        released.append(decoder() is None)

    monkeypatch.setattr(Run, "prepare", watched)
    train(stage2(model_folder, text_file, tmp_path / "run", **ONLY), quiet)
    assert released == [True]


def test_distillation_adds_to_the_other_losses(model_folder, alignment_file, tmp_path, quiet):
    options = {"alignment_weight": 0.5, "contrastive_weight": 2.0, "distillation_weight": 3.0}
    train(stage2(model_folder, alignment_file, tmp_path / "run", max_steps=1, **options), quiet)
    log = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    wanted = 0.5 * log["align"] + 2.0 * log["nce"] + 3.0 * log["distill"]
    assert log["loss"] == pytest.approx(wanted, rel=1e-5)
    assert min(log["align"], log["nce"], log["distill"]) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_weight": -1.0}, "distillation_weight: got -1.0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature: got 0.0"),
        ({"distillation_mixture": 1.5}, "distillation_mixture: got 1.5"),
        ({"distillation_candidates": 0}, "distillation_candidates: got 0, expected at least 1"),
        ({"distillation_marginal_texts": -1}, "distillation_marginal_texts: got -1, expected at least 0"),
        ({"ref_margin": "none", "ref_logps_file": "f"}, "ref_logps_file: got 'f', expected None with stage 2"),
        ({"stage": 1, "ref_logps_file": "f"}, "ref_logps_file: got 'f', expected None with stage 1"),
        ({"distillation_mixture": 0.5}, "distillation_pairs: got 'mask' with distillation_mixture 0.5"),
        ({"distillation_weight": 1.0, "ref_margin": "none", "streaming": True}, "expected 0 when streaming"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        stage2("m", "d", "o", **options)


def test_a_folder_of_texts_becomes_an_export_in_one_command(model_folder, tmp_path, monkeypatch, capsys):
    """Both stages of the ready configuration, by a user who has no pairs."""
    from sentence_transformers import SentenceTransformer

    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b"):
        lines = [sentence(i + ord(name), 4 + i % 5) for i in range(12)]
        (texts / f"{name}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "label-free"]) == 0
    flags = ["--model", model_folder, "--output_dir", "out", "--max_steps", "2", "--eval_steps", "1"]
    assert cli.main(["train", "label-free/stage1.yaml", "label-free/stage2.yaml", *flags]) == 0
    assert SentenceTransformer("out/stage2/export").encode(["the cat"]).shape == (1, 32)
    kept = [json.loads(Path(f"out/stage{n}/config.json").read_text()) for n in (1, 2)]
    assert [c["model"] for c in kept] == [model_folder, "out/stage1/model"]
    assert kept[1]["distillation_weight"] == 1.0
    shown = capsys.readouterr().out
    assert "teacher scores: 2 blocks of 12 × 12 pairs" in shown
    for stage, steps in (("stage1", "012"), ("stage2", "012")):
        summary = json.loads(Path(f"out/{stage}/summary.json").read_text())
        found = summary["evaluations"]
        assert (summary["eval_metric"], [*found]) == ("view_separation", [*steps])
        assert all(set(values) == set(LABEL_FREE) and None not in values.values() for values in found.values())
        assert summary["model_step"] == 2, "the last step is the better teacher"
        recipe = json.loads(Path(f"out/{stage}/model/autoregembed.json").read_text())
        assert recipe["step"] == 2
        assert f"view_separation step 0: {found['0']['view_separation']:.4f}" in " ".join(shown.split())


def test_stages_with_folders_of_their_own_keep_them(tmp_path):
    for n, more in ((1, ""), (2, "model: m\n")):
        (tmp_path / f"{n}.yaml").write_text(f"stage: {n}\noutput_dir: out-{n}\ntrain_data: d\n{more}")
    files, flags = [str(tmp_path / f"{n}.yaml") for n in (1, 2)], ["--model", "base", "--gguf_file", "q4.gguf"]
    first, second = cli.read_configs([files[0], *flags, files[1]])
    assert (first.model, first.gguf_file, first.output_dir) == ("base", "q4.gguf", "out-1")
    assert (second.model, second.gguf_file, second.output_dir) == ("out-1/model", None, "out-2")
