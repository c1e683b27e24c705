"""The examples run as they stand, on a model made on the spot and on a folder; DPO's numbers are TRL's own."""

import copy
import importlib
from pathlib import Path

import pytest
import torch

from autoregembed import Decoder, Encoder
from autoregembed.testing import tiny_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LOOPS = ["plain_pytorch", "accelerate_loop", "fabric_loop", "grad_cache", "score_distillation"]


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def example(name: str):
    if name == "fabric_loop":
        pytest.importorskip("lightning_fabric")
    return importlib.import_module(name)


@pytest.mark.parametrize("name", [*LOOPS, "dpo_logps"])
def test_an_example_learns(name):
    losses = example(name).main()
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


@pytest.mark.parametrize("name", [*LOOPS, "dpo_logps"])
def test_an_example_takes_a_models_folder(name, model_folder, capsys):
    assert len(example(name).main(model_folder, steps=2)) == 2
    assert "step   2  loss" in capsys.readouterr().out


def test_the_loops_are_short():
    for name in LOOPS:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60, name


def test_the_gradient_cache_example_cuts_both_sides():
    module = example("grad_cache")
    encoder, decoder = Encoder.from_pretrained(module.tiny()), Decoder.from_pretrained(module.tiny())
    texts = encoder.tokenize([text for row in module.TRIPLETS for text in row])
    assert sum(map(len, encoder.sequences(texts))) > 2 * module.ENCODER_TOKENS
    assert decoder.num_tokens(texts) > 2 * module.DECODER_TOKENS


# ----------------------------------------------------------------------------------------------------------------------
# DPO


def preferences() -> dict[str, torch.Tensor]:
    """What TRL's collator gives: (2B, L) ids with masks, chosen completions first, padded on the right."""
    collator = pytest.importorskip("trl.trainer.dpo_trainer").DataCollatorForPreference(pad_token_id=0)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 300, (n,), generator=generator).tolist()

    sizes = [(4, 6, 3), (9, 1, 8), (2, 5, 5)]
    return dict(collator([{"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in sizes]))


def trl_logps(model, batch, fused: bool):
    """TRL's own: its fused head, as its DPO trainer calls it, or `selective_log_softmax` over all logits."""
    utils = pytest.importorskip("trl.trainer.utils")
    ids, mask = batch["input_ids"], batch["completion_mask"]
    if fused:
        utils.add_fused_lm_head(model)
        labels = ids.masked_fill(mask == 0, -100)
        out = model(
            input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False, labels=labels, fused_lm_head=True
        )
        per_token = out.log_probs[:, -mask[:, 1:].shape[1] :]
    else:
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        per_token = utils.selective_log_softmax(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]
    return per_token.sum(1).chunk(2)


@pytest.mark.parametrize("fused", [True, False], ids=["fused head", "selective_log_softmax"])
@pytest.mark.parametrize("head", ["trainable", "frozen", "tied", "softcapped"])
def test_dpo_logps_and_their_gradients_are_trls(fused, head):
    options = {"tie_word_embeddings": head == "tied"}
    architecture = "llama"
    if head == "softcapped":
        architecture = "gemma2"
        options |= {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
    model = tiny_model(architecture, **options)
    if head == "frozen":
        model.get_output_embeddings().weight.requires_grad_(False)
    batch = preferences()
    results = []
    for lm, call in (
        (copy.deepcopy(model), lambda lm: example("dpo_logps").logps(lm, **batch)),
        (copy.deepcopy(model), lambda lm: trl_logps(lm, batch, fused)),
    ):
        chosen, rejected = call(lm)
        (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
        gradients = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
        results.append((torch.cat([chosen, rejected]).detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert theirs.shape == (6,)
    assert theirs.max() < -1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert our_gradients.keys() == their_gradients.keys()
    assert ("lm_head.weight" in our_gradients) == (head == "trainable" or (head == "softcapped"))
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
