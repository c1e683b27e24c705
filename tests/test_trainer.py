"""Both stages under Transformers' Trainer, against our own loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import sentence
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from autoregembed import Decoder, Encoder, data, models
from autoregembed.config import Config, Stage2Options
from autoregembed.integrations.transformers import (
    AutoRegEmbedTrainer,
    CompressionLossFunction,
    compression_inputs,
    precompute_ref_logps,
)
from autoregembed.objective import Objective
from autoregembed.prompt import Prompt
from autoregembed.reference_scores import compute_ref_logps
from autoregembed.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
PROMPT = Prompt(TOKENIZER, 3, 1, "Again:", 256)


def rows_of(stage: int) -> Dataset:
    if stage == 1:
        texts = [{"context": sentence(i, 4 + i % 7), "output": sentence(50 + i, 3 + 2 * i)} for i in range(8)]
        return data.compression_rows(Dataset.from_list(texts), PROMPT)
    texts = [
        {
            "query": sentence(i, 4 + i % 3),
            "pos": sentence(100 + i, 3 + i % 5),
            "neg": [sentence(10 * i + j, 4) for j in range(200, 200 + i % 4)],
        }
        for i in range(8)
    ]
    return data.alignment_rows(Dataset.from_list(texts), PROMPT)


def lm():
    return tiny_model(vocab_size=len(TOKENIZER))


def encoder_of(wrap=lambda model: model) -> Encoder:
    model = lm()
    ids = models.add_compress_tokens(model, TOKENIZER, 3)
    return Encoder(wrap(model.model), compress_token_ids=ids, suffix_ids=PROMPT.suffix(), bos_token_id=1)


def decoder_of() -> Decoder:
    return Decoder(lm(), z_norm="match_rms")


def arguments(out, batch=8, accumulation=1, **options) -> TrainingArguments:
    """Plain SGD with a rate of 1: what a step takes off a weight is its gradient."""
    return TrainingArguments(
        str(out),
        **{
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )


def values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def own_loop(rows, **options) -> tuple[float, dict[str, torch.Tensor]]:
    config = Config(model="", train_data="", output_dir="", **options)
    encoder, decoder = encoder_of(), decoder_of()
    reference = compute_ref_logps(encoder, decoder, rows) if config.needs_ref_logps else None
    batch = [{**row, "row": i} for i, row in enumerate(rows)]
    log = Objective(config, encoder, decoder, Accelerator(cpu=True), reference)(batch)
    return log["loss"].item(), {n: p.grad for n, p in encoder.model.named_parameters()}


def assert_one_step(trainer, loss: float, gradient: dict[str, torch.Tensor]):
    before = values(trainer.model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    after = values(trainer.model)
    assert before.keys() == gradient.keys()
    for name, expected in gradient.items():
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(before[name] - after[name], expected, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("cut", [(8, 1), (2, 4), (3, 3)])
@pytest.mark.parametrize(
    ("stage", "options"),
    [(1, {}), (2, {}), (2, {"ref_margin": "subtract", "negatives": "joint", "alignment_weight": 2.0})],
)
def test_a_step_is_that_of_our_own_loop_however_it_is_cut(stage, options, cut, tmp_path):
    rows = rows_of(stage)
    expected = own_loop(rows, stage=stage, **options)
    encoder, decoder = encoder_of(), decoder_of()
    if stage == 2:
        rows = precompute_ref_logps(rows, encoder, decoder)
    trainer = AutoRegEmbedTrainer(
        encoder, decoder, arguments(tmp_path, *cut), Stage2Options(**options), train_dataset=rows
    )
    assert trainer.args.remove_unused_columns
    assert_one_step(trainer, *expected)


TEXTS = [
    {
        "anchor": sentence(i, 4 + i % 3),
        "positive": sentence(100 + i, 3 + i % 5),
        "negative_1": sentence(200 + i, 4),
        "negative_2": sentence(300 + i, 3 + i % 2),
    }
    for i in range(8)
]


@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_one_line_trains_texts(negatives, model_folder, tmp_path):
    """No decoder, no options, no rows of ids; pairs take their negatives from the batch."""
    columns = ["anchor", "positive", "negative_1", "negative_2"][: 2 + negatives]
    texts = [{name: row[name] for name in columns} for row in TEXTS]
    lm = AutoModel.from_pretrained(model_folder)
    encoder = Encoder.from_model(lm, AutoTokenizer.from_pretrained(model_folder))
    # In the order of the rows, which tells the negatives of pairs.
    options = {"train_sampling_strategy": "sequential"}
    trainer = AutoRegEmbedTrainer(encoder, args=arguments(tmp_path, **options), train_dataset=Dataset.from_list(texts))
    assert (trainer.decoder.z_norm, bool(trainer.decoder.prefix)) == ("match_rms", True)
    assert all(not p.requires_grad for p in trainer.decoder.parameters())
    if not negatives:
        texts = [{**row, "negative_1": TEXTS[(i + 1) % 8]["positive"]} for i, row in enumerate(texts)]
    rows = data.alignment_rows(Dataset.from_list(texts), encoder.prompt)
    twin = Encoder.from_model(AutoModel.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder))
    decoder = Decoder.from_pretrained(model_folder, z_norm="match_rms", add_bos=True)
    common = {"alignment_weight": 0.2, "contrastive_weight": 1.0, "ref_margin": "none"}
    config = Config(model="", train_data="", output_dir="", stage=2, **common)
    log = Objective(config, twin, decoder, Accelerator(cpu=True))([{**r, "row": i} for i, r in enumerate(rows)])
    assert_one_step(trainer, log["loss"].item(), {n: p.grad for n, p in twin.model.named_parameters()})


def test_texts_of_stage_1_find_their_decoder(model_folder, tmp_path):
    encoder = Encoder.from_model(AutoModel.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder))
    texts = Dataset.from_list([{"text": sentence(i, 5)} for i in range(8)])
    trainer = AutoRegEmbedTrainer(encoder, args=arguments(tmp_path), train_dataset=texts, eval_dataset={"a": texts})
    trainer.train()
    assert 3 < trainer.state.log_history[0]["loss"] < 10
    assert trainer.evaluate()["eval_a_loss"] > 0


def test_info_nce_beside_the_alignment(tmp_path):
    options = {"contrastive_weight": 0.5, "hard_negatives": True, "ref_margin": "none", "contrastive_temperature": 0.1}
    expected = own_loop(rows_of(2), stage=2, **options)
    trainer = AutoRegEmbedTrainer(
        encoder_of(),
        decoder_of(),
        arguments(tmp_path, gradient_checkpointing=True),
        Stage2Options(**options),
        train_dataset=rows_of(2),
    )
    assert_one_step(trainer, *expected)


@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_stage_1_in_the_stock_trainer(cut, tmp_path):
    expected = own_loop(rows_of(1), stage=1)
    encoder, decoder = encoder_of(), decoder_of()
    rows = compression_inputs(rows_of(1), encoder, decoder.eos_token_id)
    padding = TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer, pad_token="</s>", padding_side="left")
    trainer = Trainer(
        encoder.model,
        arguments(tmp_path, *cut, label_names=["labels"]),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(padding),
        compute_loss_func=CompressionLossFunction(decoder, 3),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected[0], abs=1e-4)
    assert_one_step(trainer, *expected)


def test_two_processes_take_the_step_of_one(tmp_path):
    """The Trainer, and InfoNCE with the passages of both processes in sentence-transformers' one."""
    import test_sentence_transformers as st

    code = """
import sys
import torch
from sentence_transformers import SentenceTransformer
from test_trainer import AutoRegEmbedTrainer, Stage2Options, precompute_ref_logps
from test_trainer import arguments, decoder_of, encoder_of, rows_of, values
import test_sentence_transformers as st

encoder, decoder = encoder_of(), decoder_of()
rows = precompute_ref_logps(rows_of(2), encoder, decoder)
trainer = AutoRegEmbedTrainer(encoder, decoder, arguments(sys.argv[1], 2, 2), Stage2Options(), train_dataset=rows)
before = values(encoder.model)
trainer.train()
out = {"trainer": {n: before[n] - p for n, p in values(encoder.model).items()}}
assert trainer.accelerator.num_processes == 2

model = SentenceTransformer(sys.argv[2], device="cpu")
before = values(st.transformer(model))
loss = st.FusedInfoNCELoss(model, gather_across_devices=True)
options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
st.train(model, loss, st.TRIPLETS, sys.argv[1], save_strategy="no", ddp_find_unused_parameters=False, **options)
out["sentence_transformers"] = {n: before[n] - p for n, p in values(st.transformer(model)).items()}
if trainer.is_world_process_zero():
    torch.save(out, sys.argv[1] + "/out.pt")
torch.distributed.destroy_process_group()
"""
    (tmp_path / "two.py").write_text(code)
    folder = st.encoder_of().save_pretrained(tmp_path / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py"), str(tmp_path), str(folder)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    model = st.SentenceTransformer(str(folder), device="cpu")
    st.FusedInfoNCELoss(model)(st.features(model, st.TRIPLETS), None).backward()
    expected = {
        "trainer": own_loop(rows_of(2), stage=2)[1],
        "sentence_transformers": st.gradients(st.transformer(model)),
    }
    for name in expected:
        st.assert_same_gradients(found[name], expected[name])


def test_trainer_saves_and_resumes(tmp_path):
    ends = []
    for resume in (None, str(tmp_path / "0" / "checkpoint-2")):
        encoder, decoder = encoder_of(), decoder_of()
        rows = precompute_ref_logps(rows_of(2), encoder, decoder)
        frozen = values(decoder)
        options = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps"}
        trainer = AutoRegEmbedTrainer(
            encoder, decoder, arguments(tmp_path / str(len(ends)), 2, 2, save_steps=2, **options), Stage2Options(),
            train_dataset=rows, eval_dataset=rows, processing_class=TOKENIZER,
        )  # fmt: skip
        first = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.evaluate()["eval_loss"] < first
        assert all(torch.equal(p, frozen[n]) for n, p in decoder.named_parameters())
        ends.append(values(encoder.model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    again = AutoModel.from_pretrained(tmp_path / "0" / "checkpoint-4")
    assert all(torch.equal(p, ends[0][n]) for n, p in again.named_parameters())


def test_adapters_and_compress_tokens_are_what_a_checkpoint_holds(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = list(range(len(TOKENIZER), len(TOKENIZER) + 3))
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": ids})
    encoder = encoder_of(lambda model: get_peft_model(model, config))
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 2, "save_strategy": "steps"}
    trainer = AutoRegEmbedTrainer(
        encoder, decoder_of(), arguments(tmp_path, 4, save_steps=2, **options), train_dataset=rows_of(1)
    )
    before = values(encoder.model)
    trainer.train()
    changed = {n for n, p in encoder.model.named_parameters() if not torch.equal(before[n], p)}
    assert {n.split(".")[-2] for n in changed} >= {"trainable_tokens_delta", "default"}
    assert all("lora_" in n or "trainable_tokens" in n for n in changed)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    again = PeftModel.from_pretrained(encoder_of().model, tmp_path / "checkpoint-2")
    z = Encoder(again, compress_token_ids=ids, bos_token_id=1)([[5, 6, 7]], [PROMPT.suffix()])
    torch.testing.assert_close(z, encoder([[5, 6, 7]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda out: AutoRegEmbedTrainer(Encoder(lm(), compress_token_ids=[3]), decoder_of()),
            "encoder: got a LlamaForCausalLM with a head",
        ),
        (
            lambda out: AutoRegEmbedTrainer(
                Encoder(lm().model, compress_token_ids=[3], own_compress_rows=True), decoder_of()
            ),
            "encoder: got own_compress_rows=True",
        ),
        (
            lambda out: AutoRegEmbedTrainer(encoder_of(), None, train_dataset=rows_of(1)),
            "decoder: got None with a model from '', which does not say what it was made from",
        ),
        (
            lambda out: AutoRegEmbedTrainer(
                encoder_of(),
                decoder_of(),
                arguments(out, 2, 4),
                Stage2Options(ref_margin="none"),
                train_dataset=data.alignment_rows(
                    Dataset.from_list([{"anchor": "the cat", "positive": "the dog"}] * 8), PROMPT
                ),
            ),
            "gradient_accumulation_steps: got 4, expected 1 with rows without negatives",
        ),
        (
            lambda out: AutoRegEmbedTrainer(encoder_of(), decoder_of(), options=Stage2Options(ref_margin="sub")),
            "ref_margin: got 'sub'",
        ),
        (
            lambda out: AutoRegEmbedTrainer(encoder_of(), decoder_of(), options=Stage2Options(negatives="all")),
            "negatives: got 'all'",
        ),
        (
            lambda out: AutoRegEmbedTrainer(
                encoder_of(), decoder_of(), arguments(out, 2, 4), Stage2Options(contrastive_weight=1.0)
            ),
            "gradient_accumulation_steps: got 4, expected 1 with contrastive_weight > 0",
        ),
        (
            lambda out: AutoRegEmbedTrainer(
                encoder_of(), decoder_of(), arguments(out), Stage2Options(), train_dataset=rows_of(2)
            ).train(),
            "ref_logps: got rows without reference scores",
        ),
        (
            lambda out: AutoRegEmbedTrainer(
                encoder_of(),
                decoder_of(),
                arguments(out),
                train_dataset=rows_of(2).add_column("ref_logps", [[0.0, 0.0]] * len(rows_of(2))),
            ).train(),
            "ref_logps: got rows with reference scores, expected none, since ref_margin='none'",
        ),
        (
            lambda out: CompressionLossFunction(decoder_of(), 3)(lm()(torch.tensor([[1, 2]])), torch.tensor([[1]])),
            "outputs: got CausalLMOutputWithPast without last_hidden_state",
        ),
        (
            lambda out: CompressionLossFunction(decoder_of(), 3)(lm().model(torch.tensor([[1, 2]])), None),
            "labels: got None",
        ),
    ],
)
def test_invalid_arguments_are_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
