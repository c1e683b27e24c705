"""A frozen decoder keeps the activations of one pass, or of one layer, with the gradients of them all."""

import pytest
import torch
from torch import nn

from autoregembed import Decoder
from autoregembed.bench import harness
from autoregembed.config import Stage2Options
from autoregembed.models import base_model
from autoregembed.objective import stage2_loss
from autoregembed.testing import tiny_model

K = 3


def texts(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in sizes]


def rows_of(*negatives, seed=0):
    """A row for each number of negatives."""
    return [
        {"target_ids": texts(5 + i % 3, *[4 + j % 5 for j in range(m)], seed=seed + i)} for i, m in enumerate(negatives)
    ]


def some_z(b, width=32):
    return torch.randn(b, K, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def float64_model(architecture="gpt_neox", **options):
    """With norms that keep float64."""
    return tiny_model(architecture, dtype=torch.float64, **options)


def step(decoder, rows, budget, **options):
    """Loss, statistics and gradient of z."""
    z = some_z(2 * len(rows)).to(next(decoder.parameters()).dtype).requires_grad_()
    most = max(len(r["target_ids"]) for r in rows) - 1
    generator = torch.Generator().manual_seed(1)
    reference = [torch.randn(size, generator=generator, dtype=z.dtype) for size in ((len(rows),), (len(rows), most))]
    out = stage2_loss(Stage2Options(**options), decoder, z, rows, ref_logps=tuple(reference), token_budget=budget)
    assert not any(x.requires_grad for x in out.stats.values())
    (gradient,) = torch.autograd.grad(out.alignment, z)
    return out.alignment.detach(), out.stats, gradient


def count_passes(decoder) -> list[int]:
    """The tokens of each pass from now on."""
    passes = []
    base_model(decoder.model).register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return passes


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("negatives", ["independent", "joint"])
@pytest.mark.parametrize("budget", [1, 45, 80])
def test_stage_2_does_not_depend_on_its_passes(budget, negatives, share):
    decoder = Decoder(float64_model(), bos_token_id=1, share_prefixes=share)
    rows = rows_of(2, 0, 1, 4, 1)
    options = {"negatives": negatives, "alignment_weight": 0.7}
    wanted = step(decoder, rows, None, **options)
    passes = count_passes(decoder)
    found = step(decoder, rows, budget, **options)
    assert len(passes) > 1
    assert wanted[2].abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_a_pass_holds_whole_rows_and_runs_once():
    decoder = Decoder(float64_model(), bos_token_id=1)
    rows = rows_of(3, 3, 3, 3)
    passes = count_passes(decoder)
    step(decoder, rows, None)
    (whole,) = passes
    passes.clear()
    step(decoder, rows, 80)  # two rows each
    assert len(passes) == 2
    assert sum(passes) == whole, "each prefix is run once"


def test_scores_without_a_graph_give_the_same_loss():
    decoder, rows = Decoder(float64_model()), rows_of(2, 1, 3)
    options, z = Stage2Options(ref_margin="none"), some_z(6)
    with torch.no_grad():
        losses = [stage2_loss(options, decoder, z, rows, token_budget=budget).alignment for budget in (None, 40)]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_the_peak_does_not_grow_with_the_negatives():
    decoder = Decoder(tiny_model(num_hidden_layers=4), bos_token_id=1)
    prefix = 1 + K

    def peak(m, budget):
        rows = [{"target_ids": texts(*[8] * (1 + m), seed=i)} for i in range(12)]
        z = some_z(24).float().requires_grad_()
        options = Stage2Options(ref_margin="none")

        def call():
            torch.autograd.grad(stage2_loss(options, decoder, z, rows, token_budget=budget).alignment, z)

        call()
        return harness.peak_memory(call, "cpu")[0]

    budget = 5 * (3 * 8 + 2 * prefix)  # of M = 1, or two rows of M = 7
    assert budget == 2 * (9 * 8 + 2 * prefix)
    one, seven, whole = peak(1, budget), peak(7, budget), peak(7, None)
    assert seven < 1.25 * one
    assert seven < whole / 4


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("share", [True, False])
def test_checkpointing_gives_the_same_bits(architecture, share):
    options = {"sliding_window": 4} if architecture == "gemma3_text" else {}
    found = []
    for checkpointing in (False, True):
        decoder = Decoder(
            float64_model(architecture, **options), share_prefixes=share, gradient_checkpointing=checkpointing
        )
        runs = []
        layers = next(m for m in decoder.model.modules() if isinstance(m, nn.ModuleList))
        next(layers[1].children()).register_forward_hook(lambda *_, runs=runs: runs.append(1))
        for budget in (None, 30):
            found.append(step(decoder, rows_of(2, 1), budget)[2])
        with torch.no_grad():
            decoder.logprob(some_z(1), texts(5))
        found.append(len(runs))
    assert torch.equal(found[0], found[3])
    assert torch.equal(found[1], found[4])
    once, twice = found[2], found[5]
    assert twice - 1 == 2 * (once - 1), "each layer runs again in the backward, and not where there is none"


def test_checkpointing_keeps_the_inputs_of_layers_alone():
    peaks = []
    for checkpointing in (False, True):
        decoder = Decoder(tiny_model(num_hidden_layers=8), gradient_checkpointing=checkpointing)
        z, targets = some_z(8).float().requires_grad_(), texts(*[40] * 8)

        def call(decoder=decoder, z=z, targets=targets):
            decoder.logprob(z, targets).sum().backward()

        call()
        peaks.append(harness.peak_memory(call, "cpu")[0])
    assert peaks[1] < peaks[0] / 3


def test_a_model_without_known_layers_is_refused():
    model = tiny_model()

    class Layer(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.parts = nn.ModuleDict(dict(layer.named_children()))
            self.attention_type = getattr(layer, "attention_type", None)

        def forward(self, x, **kwargs):
            p = self.parts
            x = x + p["self_attn"](hidden_states=p["input_layernorm"](x), **kwargs)[0]
            return x + p["mlp"](p["post_attention_layernorm"](x))

    model.model.layers = nn.ModuleList(map(Layer, model.model.layers))
    assert Decoder(model).logprob(some_z(1).float(), texts(3)).shape == (1,)
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: got True for a LlamaForCausalLM, which names no"):
        Decoder(model, gradient_checkpointing=True)
