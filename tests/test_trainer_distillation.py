"""Score distillation under both trainers, against our own loop."""

import functools

import pytest
import torch
from accelerate import Accelerator
from conftest import sentence
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from test_sentence_transformers import TOKENIZER, assert_same_gradients, decoder_of, encoder_of, features, gradients
from test_sentence_transformers import transformer as lm_of
from test_trainer import arguments, assert_one_step
from test_trainer import encoder_of as bare_encoder

from autoregembed import data, sampling, teacher_scores
from autoregembed.config import Config, Stage2Options
from autoregembed.integrations.sentence_transformers import BlockBatchSampler, LikelihoodDistillationLoss
from autoregembed.integrations.transformers import AutoRegEmbedTrainer, precompute_teacher_scores
from autoregembed.objective import Objective
from autoregembed.prompt import Prompt
from autoregembed.teacher_scores import compute_teacher_scores

PAIRS = Dataset.from_dict(
    {
        "anchor": [sentence(i, 4 + i % 3) for i in range(14)],
        "positive": [sentence(100 + i, 3 + i % 5) for i in range(14)],
    }
)
TEXTS = PAIRS.select_columns("anchor").rename_column("anchor", "text")
PROMPT = Prompt(TOKENIZER, 3, 1, "Again:", 256)
ONLY = {"alignment_weight": 0.0, "distillation_weight": 1.0}
CASES = [
    (PAIRS, {}),
    (PAIRS, {"distillation_pairs": "keep", "distillation_mixture": 0.4, "teacher_temperature": 2.0}),
    (TEXTS, {"distillation_temperature": 0.2}),
]


def own_loop(dataset, encoder, options) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Loss and gradients of our loop on the second block of six rows, and which rows those are."""
    config = Config(model="", train_data="", output_dir="", stage=2, batch_size=6, **ONLY, **options)
    rows = (data.text_rows if data.is_unpaired(dataset) else data.alignment_rows)(dataset, PROMPT)
    blocks = sampling.blocks(len(rows), 6, 0)
    scores = compute_teacher_scores(encoder, decoder_of(), rows, blocks)
    found = zip(rows.select(blocks[1]).to_list(), blocks[1], strict=True)
    batch = [{**row, "row": i, "block": 1, "place": place} for place, (row, i) in enumerate(found)]
    log = Objective(config, encoder, None, Accelerator(cpu=True), None, scores)(batch)
    return log["loss"].item(), {n: p.grad for n, p in encoder.model.named_parameters()}, blocks[1]


@functools.cache
def exported(root) -> str:
    return str(encoder_of().save_pretrained(root / "model"))


@pytest.fixture
def model(tmp_path_factory) -> SentenceTransformer:
    if not hasattr(exported, "root"):
        exported.root = tmp_path_factory.mktemp("exported")
    return SentenceTransformer(exported(exported.root), device="cpu")


@pytest.mark.parametrize(("dataset", "options"), CASES)
def test_sentence_transformers_has_the_gradient_of_our_own_loop(model, dataset, options):
    expected, _, block = own_loop(dataset, encoder_of(), options)
    encoder = encoder_of()
    own_loop(dataset, encoder, options)
    gradient = {n: p.grad for n, p in encoder.model.model.named_parameters()}
    loss = LikelihoodDistillationLoss(model, decoder_of(), Stage2Options(**options))
    rows = loss.precompute_teacher_scores(dataset, 6)
    assert len(rows) == 12, "two rows fill no block"
    mine = rows.select(range(6, 12))
    assert mine["anchor" if "anchor" in mine.column_names else "text"] == [
        dataset[i][dataset.column_names[0]] for i in block
    ]
    order = [3, 0, 5, 1, 4, 2]  # a sampler may draw the rows of a block in any order
    mine = mine.select(order)
    found = loss(features(model, mine), torch.tensor(mine["label"]))
    found.backward()
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert_same_gradients(gradients(lm_of(model)), gradient)


@pytest.mark.parametrize(("dataset", "options"), CASES)
def test_transformers_takes_the_step_of_our_own_loop(dataset, options, tmp_path):
    expected = own_loop(dataset, bare_encoder(), options)[:2]
    encoder = bare_encoder()
    encoder.tokenizer = TOKENIZER
    rows = (data.text_rows if dataset is TEXTS else data.alignment_rows)(dataset, PROMPT)
    rows = precompute_teacher_scores(rows, encoder, decoder_of(), 6)
    trainer = AutoRegEmbedTrainer(
        encoder, None, arguments(tmp_path, 6), Stage2Options(**ONLY, **options), train_dataset=rows.select(range(6, 12))
    )
    assert trainer.decoder is None
    assert_one_step(trainer, *expected)


def test_an_epoch_reads_every_block_whole(tmp_path):
    encoder = bare_encoder()
    encoder.tokenizer = TOKENIZER
    rows = precompute_teacher_scores(data.alignment_rows(PAIRS, PROMPT), encoder, decoder_of(), 3)
    trainer = AutoRegEmbedTrainer(
        encoder, None, arguments(tmp_path, 3, learning_rate=1e-3, max_steps=12), Stage2Options(**ONLY),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    seen = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *a, **k: (
        seen.append([(r["block"], r["place"]) for r in inputs["rows"].items]) or compute(model, inputs, *a, **k)
    )
    trainer.train()
    assert all(sorted(batch) == [(batch[0][0], i) for i in range(3)] for batch in seen)
    epochs = [[batch[0][0] for batch in seen[i : i + 4]] for i in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1, "each in an order of its own"
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_trainer_of_sentence_transformers_learns_without_a_label(model, tmp_path, monkeypatch):
    made = []
    compute = teacher_scores.compute_teacher_scores
    monkeypatch.setattr(teacher_scores, "compute_teacher_scores", lambda *a, **k: made.append(1) or compute(*a, **k))
    loss = LikelihoodDistillationLoss(model, decoder_of())
    texts = Dataset.from_list([{"text": sentence(500 + i, 5)} for i in range(12)])
    rows = loss.precompute_teacher_scores(texts, 4, seed=7)
    assert len(made) == 3
    assert loss.precompute_teacher_scores(texts, 4, seed=7)["label"] == rows["label"]
    assert len(made) == 3, "they were read"
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, batch_sampler=BlockBatchSampler, learning_rate=1e-3,
        num_train_epochs=8, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss)
    trainer.train()
    log = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 24
    assert sum(log[-3:]) < 0.98 * sum(log[:3])


def rows_of_two_blocks(model):
    loss = LikelihoodDistillationLoss(model, decoder_of())
    return loss, loss.precompute_teacher_scores(PAIRS, 6).select([0, 1, 2, 6, 7, 8])


def mixed_in_the_trainer(tmp_path):
    encoder = bare_encoder()
    encoder.tokenizer = TOKENIZER
    rows = precompute_teacher_scores(data.alignment_rows(PAIRS, PROMPT), encoder, decoder_of(), 3)
    options = Stage2Options(**ONLY)
    AutoRegEmbedTrainer(encoder, None, arguments(tmp_path, 6), options, train_dataset=rows).train()


def test_what_does_not_belong_together_is_refused(model, tmp_path):
    loss, mixed = rows_of_two_blocks(model)
    with pytest.raises(ValueError, match="teacher_scores: got rows of 2 blocks in a batch"):
        loss(features(model, mixed), torch.tensor(mixed["label"]))
    with pytest.raises(ValueError, match="teacher_scores: got rows of 2 blocks in a batch"):
        mixed_in_the_trainer(tmp_path)
    with pytest.raises(ValueError, match="labels: got None, expected the scores of 14 rows"):
        loss(features(model, PAIRS), None)
    with pytest.raises(ValueError, match="sentence_features: got 3 columns"):
        loss(features(model, PAIRS) + features(model, TEXTS), None)
    with pytest.raises(ValueError, match="dataset: got columns"):
        loss.precompute_teacher_scores(PAIRS.add_column("negative", TEXTS["text"]), 6)
    with pytest.raises(ValueError, match="batch_size: got 16 for 14 rows"):
        loss.precompute_teacher_scores(PAIRS, 16)
    whole = loss.precompute_teacher_scores(PAIRS, 6)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size: got 4 with blocks of \[6\] rows"):
        BlockBatchSampler(whole, 4, drop_last=False)
    with pytest.raises(ValueError, match=r"dataset: got columns .* expected 'label'"):
        BlockBatchSampler(PAIRS, 6, drop_last=False)
    encoder, rows = bare_encoder(), data.alignment_rows(PAIRS, PROMPT)
    with pytest.raises(ValueError, match="encoder: got one without its tokenizer"):
        precompute_teacher_scores(rows, encoder, decoder_of(), 6)
    with pytest.raises(ValueError, match="teacher_scores: got rows without them"):
        AutoRegEmbedTrainer(
            encoder, None, arguments(tmp_path), Stage2Options(**ONLY), train_dataset=rows.select(range(8))
        ).train()
    with pytest.raises(ValueError, match="gradient_accumulation_steps: got 2, expected 1 with distillation_weight > 0"):
        AutoRegEmbedTrainer(encoder, None, arguments(tmp_path, 2, 2), Stage2Options(**ONLY), train_dataset=rows)
