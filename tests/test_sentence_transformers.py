"""The losses under sentence-transformers' own trainer, against its own losses and our own loop."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from conftest import sentence
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedModel

from autoregembed import Decoder, Encoder, data, models
from autoregembed.config import Config, Stage2Options
from autoregembed.integrations.sentence_transformers import (
    AutoRegEmbedLoss,
    FusedInfoNCELoss,
    InformationCompressionLoss,
    compress_token_ids,
    from_causal_lm,
)
from autoregembed.objective import Objective
from autoregembed.prompt import Prompt
from autoregembed.reference_scores import compute_ref_logps
from autoregembed.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer([sentence(i, 12) for i in range(50)])
PAIRS = Dataset.from_dict(
    {"context": [sentence(i, 4 + i % 7) for i in range(8)], "output": [sentence(50 + i, 3 + i % 5) for i in range(8)]}
)
TRIPLETS = Dataset.from_dict(
    {
        "anchor": [sentence(i, 4 + i % 3) for i in range(8)],
        "positive": [sentence(100 + i, 3 + i % 5) for i in range(8)],
        "negative_1": [sentence(200 + i, 5) for i in range(8)],
        "negative_2": [sentence(300 + i, 2 + i % 4) for i in range(8)],
    }
)


def lm() -> torch.nn.Module:
    return tiny_model(vocab_size=len(TOKENIZER))


def encoder_of() -> Encoder:
    model = lm()
    ids = models.add_compress_tokens(model, TOKENIZER, 3)
    suffix = TOKENIZER("\nAgain:\n", add_special_tokens=False)["input_ids"]
    return Encoder(model, compress_token_ids=ids, suffix_ids=suffix, bos_token_id=1, tokenizer=TOKENIZER)


def decoder_of(**options) -> Decoder:
    return Decoder(lm(), z_norm="match_rms", **options)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    return str(encoder_of().save_pretrained(tmp_path_factory.mktemp("exported") / "model"))


@pytest.fixture
def model(folder) -> SentenceTransformer:
    return SentenceTransformer(folder, device="cpu")


def transformer(model) -> PreTrainedModel:
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def features(model, dataset) -> list[dict]:
    preprocess = getattr(model, "preprocess", None) or model.tokenize
    return [preprocess(list(dataset[n])) for n in dataset.column_names if n != "label"]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict, expected: dict, atol: float = 1e-5):
    assert found.keys() == expected.keys()
    assert all(g.abs().max() > 100 * atol for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=name)


def own_loop(dataset, decoder, **options) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step of `autoregembed.train` on the same rows and weights."""
    config = Config(model="", train_data="", output_dir="", **options)
    encoder = encoder_of()
    prompt = Prompt(TOKENIZER, 3, 1, "Again:", 256)
    if config.stage == 1:
        rows = data.compression_rows(dataset, prompt)
    else:
        texts = [
            {"query": r["anchor"], "pos": r["positive"], "neg": [r["negative_1"], r["negative_2"]]} for r in dataset
        ]
        rows = data.alignment_rows(Dataset.from_list(texts), prompt)
    reference = compute_ref_logps(encoder, decoder, rows) if config.needs_ref_logps else None
    batch = [{**row, "row": i} for i, row in enumerate(rows)]
    log = Objective(config, encoder, decoder, Accelerator(cpu=True), reference)(batch)
    return log["loss"].item(), gradients(encoder.model.model)


def test_stage_1_has_the_gradient_of_our_own_loop(model):
    expected, gradient = own_loop(PAIRS, decoder_of(bos_token_id=1), stage=1)
    loss = InformationCompressionLoss(model, decoder_of(bos_token_id=1))
    found = loss(features(model, PAIRS), None)
    found.backward()
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert_same_gradients(gradients(transformer(model)), gradient)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ref_margin": "subtract", "negatives": "joint", "beta": 0.05, "temperature": 0.2},
        {"contrastive_weight": 0.5, "alignment_weight": 2.0, "contrastive_temperature": 0.1, "hard_negatives": True},
        {"contrastive_weight": 1.0, "ref_margin": "none"},
    ],
)
def test_stage_2_has_the_gradient_of_our_own_loop(model, options):
    expected, gradient = own_loop(TRIPLETS, decoder_of(), stage=2, **options)
    loss = AutoRegEmbedLoss(model, decoder_of(), Stage2Options(**options))
    rows = TRIPLETS if options.get("ref_margin") == "none" else loss.precompute_ref_logps(TRIPLETS, batch_size=3)
    labels = torch.tensor(rows["label"]) if "label" in rows.column_names else None
    found = loss(features(model, TRIPLETS), labels)
    if options.get("contrastive_weight"):
        assert found.keys() == {"alignment", "contrastive"}
        found = sum(found.values())
    found.backward()
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert_same_gradients(gradients(transformer(model)), gradient)


def next_positives(pairs: Dataset) -> Dataset:
    """The pairs as triplets: the negative is the positive of the next row that has another one."""
    positives = pairs["positive"]
    n = len(positives)
    rows = []
    for i, row in enumerate(pairs):
        later = [positives[(i + k) % n] for k in range(1, n)]
        rows.append({**row, "negative": next(text for text in later if text != row["positive"])})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("options", [{}, {"alignment_weight": 1.0}, {"contrastive_weight": 1.0}])
def test_pairs_take_their_negatives_from_the_batch(model, options):
    from autoregembed.integrations.defaults import RECOMMENDED

    pairs = TRIPLETS.select_columns(["anchor", "positive"])
    pairs = Dataset.from_list([{**row, "positive": pairs[i // 2 * 2]["positive"]} for i, row in enumerate(pairs)])
    chosen = Stage2Options(**{"ref_margin": "none", **options}) if options else None
    alone, given = (
        AutoRegEmbedLoss(model, decoder_of(), chosen)(features(model, rows), None)
        for rows in (pairs, next_positives(pairs))
    )
    torch.testing.assert_close(alone, given, rtol=0, atol=1e-6)
    if options.get("contrastive_weight") or not options:
        assert alone.keys() == {"alignment", "contrastive"}
        assert alone["contrastive"] > 0.1
    assert (RECOMMENDED.alignment_weight, RECOMMENDED.contrastive_weight) == (0.2, 1.0)
    assert not RECOMMENDED.uses_ref_logps


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_one_line_is_a_loss(model_folder, tmp_path, columns):
    """No decoder, no options, no reference: any of the usual formats trains."""
    start = from_causal_lm(model_folder, tmp_path / "start", instruction="Again:")
    loss = AutoRegEmbedLoss(start)
    given = Decoder.from_pretrained(model_folder, z_norm="match_rms", add_bos=True)
    for ours, theirs in zip(loss.decoder.parameters(), given.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert (loss.decoder.z_norm, loss.decoder.prefix) == ("match_rms", given.prefix)
    assert given.prefix
    before = values(start)
    dataset = TRIPLETS.select_columns(TRIPLETS.column_names[:columns])
    train(start, loss, dataset, tmp_path / "run", max_steps=2)
    assert any(not torch.equal(before[n], p) for n, p in start.named_parameters())


def test_the_decoder_is_read_as_the_model_was_trained(model_folder, tmp_path):
    encoder = Encoder.from_pretrained(model_folder)
    encoder.recipe |= {"z_norm": "none", "decoder_add_bos": False}
    start = SentenceTransformer(str(encoder.save_pretrained(tmp_path / "start")), device="cpu")
    decoder = InformationCompressionLoss(start).decoder
    assert (decoder.z_norm, decoder.prefix) == ("none", [])


def test_equal_texts_are_no_negatives_of_each_other(model):
    rows = [{**row, "positive": TRIPLETS[i % 2]["positive"]} for i, row in enumerate(TRIPLETS)]
    repeated = Dataset.from_list(rows)
    options = {"contrastive_weight": 1.0, "ref_margin": "none", "hard_negatives": True}
    expected, gradient = own_loop(repeated, decoder_of(), stage=2, **options)
    loss = AutoRegEmbedLoss(model, decoder_of(), Stage2Options(**options))
    found = sum(loss(features(model, repeated), None).values())
    found.backward()
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert_same_gradients(gradients(transformer(model)), gradient)
    stock = FusedInfoNCELoss(model)(features(model, repeated), None)
    assert loss(features(model, repeated), None)["contrastive"] < stock - 0.01, "which takes them as negatives"


def test_left_padding_gives_the_same_loss(model):
    loss = AutoRegEmbedLoss(model, decoder_of(), Stage2Options(ref_margin="none", contrastive_weight=1.0))
    right = loss(features(model, TRIPLETS), None)
    model.tokenizer.padding_side = "left"
    left = loss(features(model, TRIPLETS), None)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dataset", "scale"), [(TRIPLETS.select_columns(["anchor", "positive"]), 20.0), (TRIPLETS, 7.0)]
)
def test_fused_info_nce_is_multiple_negatives_ranking(model, dataset, scale):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    found = {}
    for cls in (MultipleNegativesRankingLoss, FusedInfoNCELoss):
        loss = cls(model, scale=scale)
        value = loss(features(model, dataset), None)
        value.backward()
        found[cls] = value.item(), gradients(transformer(model))
    stock, fused = found.values()
    assert fused[0] == pytest.approx(stock[0], abs=1e-5)
    assert_same_gradients(fused[1], stock[1])


ANCHOR_POSITIVE = TRIPLETS.select_columns(["anchor", "positive"])
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (ANCHOR_POSITIVE, {"directions": EVERY}),
        (TRIPLETS, {"directions": EVERY[:3]}),
        (TRIPLETS, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}),
    ],
)
def test_directions_are_those_of_multiple_negatives_ranking(model, dataset, options):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    assert_same_loss(model, dataset, MultipleNegativesRankingLoss(model, **options), FusedInfoNCELoss(model, **options))


@pytest.mark.parametrize("margin", [0.0, 0.02, -0.02])
def test_margin_is_that_of_gist_with_the_model_as_its_guide(model, margin):
    from sentence_transformers.losses import GISTEmbedLoss

    stock = GISTEmbedLoss(model, model, temperature=0.05, margin=-margin)
    options = {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")}
    fused = FusedInfoNCELoss(model, margin=margin, **options)
    assert_same_loss(model, ANCHOR_POSITIVE, stock, fused)
    other = FusedInfoNCELoss(model, **options)(features(model, ANCHOR_POSITIVE), None)
    assert abs(other - fused(features(model, ANCHOR_POSITIVE), None)) > 1e-3, "nothing is left out"


def assert_same_loss(model, dataset, *losses):
    found = []
    for loss in losses:
        model.zero_grad()
        value = loss(features(model, dataset), None)
        value.backward()
        found.append((value.item(), gradients(transformer(model))))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert_same_gradients(found[1][1], found[0][1])


def train(model, loss, dataset, out, **options) -> SentenceTransformerTrainer:
    evaluator = options.pop("evaluator", None)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        **{
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "num_train_epochs": 3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=dataset, loss=loss, evaluator=evaluator,
        eval_dataset=dataset if "eval_strategy" in options else None,
    )  # fmt: skip
    trainer.train()
    return trainer


def values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_trainer_trains_saves_and_resumes_an_exported_model(folder, tmp_path):
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    evaluator = EmbeddingSimilarityEvaluator(TRIPLETS["anchor"], TRIPLETS["positive"], list(range(8)), name="sts")
    ends = []
    for resume in (None, str(tmp_path / "0" / "checkpoint-3")):
        model = SentenceTransformer(folder, device="cpu")
        loss = AutoRegEmbedLoss(model, decoder_of(), Stage2Options(contrastive_weight=1.0))
        rows = loss.precompute_ref_logps(TRIPLETS)
        frozen, before = values(loss.decoder), values(model)
        arguments = SentenceTransformerTrainingArguments(
            str(tmp_path / str(len(ends))), per_device_train_batch_size=4, learning_rate=1e-3, num_train_epochs=3,
            logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=3,
            save_steps=3, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, loss=loss, evaluator=evaluator
        )
        trainer.train(resume_from_checkpoint=resume)
        log = trainer.state.log_history
        assert [x["eval_sts_spearman_cosine"] for x in log if "eval_sts_spearman_cosine" in x]
        assert all("alignment" in x and "contrastive" in x for x in log if "loss" in x)
        evaluated = [x["eval_loss"] for x in log if "eval_loss" in x]
        assert evaluated[-1] < evaluated[0]
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert not any(id(p) in held for p in loss.decoder.parameters())
        assert all(torch.equal(p, frozen[n]) for n, p in loss.decoder.named_parameters())
        after = values(model)
        still = {n for n in before if torch.equal(before[n], after[n])}
        assert still == {n for n in before if "emb_layer" in n}
        ends.append(after)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])  # resumed in the middle: the same end
    saved = load_file(tmp_path / "0" / "checkpoint-6" / "model.safetensors")
    assert sum(w.numel() for w in saved.values()) == sum(p.numel() for p in transformer(model).parameters())
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = list(TRIPLETS["anchor"])
    torch.testing.assert_close(again.encode(texts), model.encode(texts), rtol=0, atol=1e-6)
    assert compress_token_ids(again) == compress_token_ids(model)
    InformationCompressionLoss(again, decoder_of())


def adapt(model, **options) -> str:
    """Wraps the LM as PEFT does; the name that it has in its module (version 5.4 changed it)."""
    from peft import LoraConfig, get_peft_model

    name = next(n for n, m in model[0].named_children() if isinstance(m, PreTrainedModel))
    setattr(model[0], name, get_peft_model(transformer(model), LoraConfig(r=2, **options)))
    return name


def test_adapters_train_with_the_compress_tokens_and_are_merged(model, tmp_path):
    untrained = model.encode(list(PAIRS["context"]), convert_to_tensor=True)
    indices = {"embed_tokens": compress_token_ids(model)}
    name = adapt(model, target_modules=["q_proj", "v_proj"], trainable_token_indices=indices)
    before = values(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The compress tokens")
        train(model, InformationCompressionLoss(model, decoder_of()), PAIRS, tmp_path / "run", learning_rate=1e-2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert any("trainable_tokens" in n for n in changed)
    assert any("lora_B" in n for n in changed)
    assert all("trainable_tokens" in n or "lora_" in n for n in changed)
    expected = model.encode(list(PAIRS["context"]), convert_to_tensor=True)
    setattr(model[0], name, getattr(model[0], name).merge_and_unload())
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = again.encode(list(PAIRS["context"]), convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - untrained).abs().max() > 1e-3


def test_adapters_without_the_compress_tokens_are_told(model):
    adapt(model, target_modules=["q_proj"])
    loss = InformationCompressionLoss(model, decoder_of())
    with pytest.warns(UserWarning, match=r"compress tokens are not trained.*trainable_token_indices"):
        loss(features(model, PAIRS), None).backward()


def test_the_decoder_follows_the_loss_and_belongs_to_nobody(model):
    loss = AutoRegEmbedLoss(model, decoder_of())
    assert not any("decoder" in name for name in [*loss.state_dict(), *dict(loss.named_modules())])
    loss.train().requires_grad_(True)
    assert not loss.decoder.model.training
    assert not any(p.requires_grad for p in loss.decoder.parameters())
    moved = copy.deepcopy(loss).to("meta")
    assert {p.device.type for p in moved.decoder.parameters()} == {"meta"} == {moved.decoder.input_rms.device.type}
    assert {p.device.type for p in loss.decoder.parameters()} == {"cpu"}


def test_a_model_to_start_from_is_one_call(model_folder, tmp_path):
    model = from_causal_lm(model_folder, tmp_path / "start", instruction="Again:", num_compress_tokens=4)
    assert len(compress_token_ids(model)) == 4
    loss = InformationCompressionLoss(model, decoder_of())
    assert loss(features(model, PAIRS), None).item() > 0


def test_what_a_model_card_says(model):
    loss = AutoRegEmbedLoss(model, decoder_of(bos_token_id=1), Stage2Options(beta=0.2))
    config = loss.get_config_dict()
    assert (config["beta"], config["z_norm"], config["decoder_add_bos"]) == (0.2, "match_rms", True)
    assert "2502.11401" in loss.citation
    assert "1807.03748" in FusedInfoNCELoss(model).citation
    assert FusedInfoNCELoss(model, 10.0, margin=0.1).get_config_dict() == {
        "scale": 10.0, "gather_across_devices": False, "directions": ("query_to_doc",), "partition_mode": "joint",
        "margin": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: AutoRegEmbedLoss(m, lm()), TypeError, "decoder: got LlamaForCausalLM"),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of(), Stage2Options(ref_margin="sub")),
            ValueError,
            "ref_margin: got 'sub'",
        ),
        (lambda m: FusedInfoNCELoss(m, 0.0), ValueError, "scale: got 0.0"),
        (lambda m: FusedInfoNCELoss(m, directions=("doc_to_query",)), ValueError, "directions: got"),
        (lambda m: FusedInfoNCELoss(m, margin=float("nan")), ValueError, "margin: got nan"),
        (
            lambda m: FusedInfoNCELoss(m, 20.0, True, EVERY),
            ValueError,
            "gather_across_devices: got True with directions",
        ),
        (
            lambda m: FusedInfoNCELoss(m, directions=EVERY)(features(m, TRIPLETS), None),
            ValueError,
            "sentence_features: got 4 columns with 'doc_to_doc'",
        ),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of(), Stage2Options())(features(m, TRIPLETS), None),
            ValueError,
            r"labels: got None, expected the reference scores \(8, 3\)",
        ),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of(), Stage2Options())(features(m, TRIPLETS), torch.zeros(8, 2)),
            ValueError,
            r"labels: got \(8, 2\)",
        ),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of())(features(m, TRIPLETS), torch.zeros(8, 3)),
            ValueError,
            r"labels: got \(8, 3\), expected None, as ref_margin='none'",
        ),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of(), Stage2Options())(features(m, PAIRS), None),
            ValueError,
            "sentence_features: got 2 columns, expected at least 3: anchor, positive and a negative, since ref_margin",
        ),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of())(features(m, PAIRS)[:1], None),
            ValueError,
            "sentence_features: got 1 columns, expected at least 2: anchor, positive$",
        ),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of()).precompute_ref_logps(TRIPLETS),
            ValueError,
            "ref_margin: got 'none' with alignment_weight 0.2",
        ),
        (lambda m: AutoRegEmbedLoss(m, None), ValueError, "decoder: got None with a model from .* which does not say"),
        (
            lambda m: AutoRegEmbedLoss(m, decoder_of(), Stage2Options(distillation_weight=1.0)),
            ValueError,
            "distillation_weight: got 1.0, expected 0 in AutoRegEmbedLoss",
        ),
        (
            lambda m: InformationCompressionLoss(m, decoder_of())(features(m, TRIPLETS), None),
            ValueError,
            "sentence_features: got 4 columns, expected 2",
        ),
        (
            lambda m: FusedInfoNCELoss(m)(features(m, TRIPLETS)[:1], None),
            ValueError,
            "sentence_features: got 1 columns",
        ),
    ],
)
def test_invalid_arguments_are_refused(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


def test_models_that_were_not_exported_are_refused(model):
    plain = SentenceTransformer(modules=[model[0], Pooling(32, "mean")], device="cpu")
    with pytest.raises(ValueError, match=r"^model: got no compress tokens"):
        InformationCompressionLoss(plain, decoder_of())
    FusedInfoNCELoss(plain)
    foreign = features(model, PAIRS)
    foreign[1]["input_ids"] = foreign[1]["input_ids"].roll(1, 1)
    with pytest.raises(ValueError, match=r"^sentence_features: got a text that ends with ids"):
        InformationCompressionLoss(model, decoder_of())(foreign, None)
    with torch.no_grad():
        model[1].emb_layer.weight[3] = 0.1
    with pytest.raises(ValueError, match=r"^model: got WordWeights other than 1"):
        InformationCompressionLoss(model, decoder_of())


def wrappers():
    from sentence_transformers.sentence_transformer import losses

    cut = {"MatryoshkaLoss": lambda m, loss: losses.MatryoshkaLoss(m, loss, [32, 16])}
    cut["AdaptiveLayerLoss"] = lambda m, loss: losses.AdaptiveLayerLoss(m, loss, n_layers_per_step=-1)
    cut["Matryoshka2dLoss"] = lambda m, loss: losses.Matryoshka2dLoss(m, loss, [32, 16], n_layers_per_step=-1)
    return cut


@pytest.mark.parametrize("options", [{}, {"contrastive_weight": 1.0}], ids=["alignment", "joint"])
@pytest.mark.parametrize("name", ["MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss"])
def test_losses_that_cut_embeddings_or_layers_are_refused(name, options, model):
    stage2 = AutoRegEmbedLoss(model, decoder_of(), Stage2Options(ref_margin="none", **options))
    stage1 = InformationCompressionLoss(model, decoder_of())
    for loss, dataset in ((stage2, TRIPLETS), (stage1, PAIRS)):
        with pytest.raises(TypeError, match=rf"^loss: got {type(loss).__name__} inside .*{name}"):
            wrappers()[name](model, loss)(features(model, dataset), None)
        loss(features(model, dataset), None)  # alone it still runs


def test_info_nce_may_be_cut(model):
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    found = [
        wrappers()["MatryoshkaLoss"](model, cls(model))(features(model, TRIPLETS), None)
        for cls in (FusedInfoNCELoss, MultipleNegativesRankingLoss)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_one_compress_token_trains_as_several_do(tmp_path, model_folder):
    start = from_causal_lm(model_folder, tmp_path / "start", instruction="Again:", num_compress_tokens=1)
    loss = AutoRegEmbedLoss(start, Decoder.from_pretrained(model_folder), Stage2Options(ref_margin="none"))
    assert len(compress_token_ids(start)) == 1
    z, embedding = loss._read(features(start, TRIPLETS)[0])
    torch.testing.assert_close(torch.nn.functional.normalize(z[:, 0], dim=-1), embedding)
