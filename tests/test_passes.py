"""A model keeps the activations of one pass, or of one layer, with the gradients of them all."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoregembed import Decoder, Encoder, attention, passes
from autoregembed.adapters import add_lora
from autoregembed.bench import harness
from autoregembed.config import Config, ConfigError, Stage2Options
from autoregembed.models import base_model
from autoregembed.objective import stage2_loss
from autoregembed.testing import tiny_model
from autoregembed.train import train

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
    return tiny_model(architecture, **{"dtype": torch.float64, **options})


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


@pytest.fixture
def products_of_few_terms(monkeypatch):
    """Are kept as well."""
    monkeypatch.setattr(passes, "MIN_TERMS", 1)


@pytest.mark.parametrize("kind", [True, "selective"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gemma3_text", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("share", [True, False])
def test_checkpointing_gives_the_same_bits(architecture, share, kind, products_of_few_terms):
    options = {"sliding_window": 4} if architecture.startswith("gemma") else {}
    if architecture == "mixtral":  # torch has no grouped product in float64
        options["dtype"] = torch.float32
    found = []
    for checkpointing in (False, kind):
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


def memory_and_products(call) -> tuple[int, Counter]:
    """Peak bytes of a step, and how often it multiplied matrices, with how many terms a sum."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
            if op is torch.ops.aten.mm.default:
                found[args[1].shape[0]] += 1
            elif "attention" in op.name() and "backward" not in op.name():
                found["attention"] += 1
            return op(*args, **(kwargs or {}))

    found: Counter = Counter()
    call()
    with Products():
        call()
    return harness.peak_memory(call, "cpu")[0], found


def wide_model(layers: int):
    return tiny_model(num_hidden_layers=layers, hidden_size=128, intermediate_size=384, head_dim=32)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize(("trained", "bound"), [(True, 0.65), (False, 0.85)])
def test_checkpointing_keeps_inputs_or_products_of_layers(trained, bound, short, monkeypatch):
    """Frozen layers keep less to begin with: no gradient of theirs needs their inputs."""
    monkeypatch.setattr(attention, "SHORT", 40 + 3 if short else 39)
    found = {}
    for kind in (False, True, "selective"):
        model, ids = wide_model(8), texts(*[40] * 8)
        if trained:
            if kind:
                model.activation_checkpointing_enable(passes.checkpoint_options(kind))
            encoder = Encoder(model, compress_token_ids=[120, 121], bos_token_id=1).train()
        else:
            decoder = Decoder(model, gradient_checkpointing=kind)
            z = some_z(8, 128).float().requires_grad_()

        def call():
            score = encoder(ids).square() if trained else decoder.logprob(z, ids)  # noqa: B023
            score.sum().backward()

        found[kind] = memory_and_products(call)
    peaks, products = ({kind: x[i] for kind, x in found.items()} for i in (0, 1))
    assert peaks[True] < peaks[False] / 2
    assert peaks[True] < peaks["selective"] < bound * peaks[False]
    assert products["selective"] == products[False] + Counter({"attention": 8 if short else 0})
    assert products[True].total() > products[False].total() + 8 * 6


def test_selective_checkpointing_repeats_an_adapters_second_product():
    """Its terms are as few as the rank. The base's products and the first one are kept."""
    found = []
    for kind in (False, "selective"):
        torch.manual_seed(0)
        model = wide_model(3)
        if kind:
            model.activation_checkpointing_enable(passes.checkpoint_options(kind))
        model = add_lora(model, None, rank=4, alpha=4.0, targets="all-linear")
        encoder = Encoder(model, compress_token_ids=[120, 121], bos_token_id=1, own_compress_rows=True).train()

        def call(encoder=encoder):
            encoder(texts(9, 7)).square().sum().backward()

        found.append((memory_and_products(call)[1], [p.grad for p in encoder.parameters()]))
    (plain, expected), (selective, gradients) = found
    assert sum(g is not None for g in expected) == 3 * 7 * 2 + 1
    assert all(e is None if g is None else torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))
    repeated = selective - plain
    assert repeated.pop("attention") == 2 * 3  # of short texts
    assert set(repeated) == {4}
    assert 2 * 6 <= repeated[4] <= 3 * 7


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"token_budget": 60}, {"precision": "bf16"}])
def test_a_run_with_selective_checkpointing_gives_the_same_weights(
    stage, options, model_folder, compression_file, alignment_file, tmp_path, products_of_few_terms, quiet
):
    data_file, found = (compression_file, alignment_file)[stage - 1], []
    for kind in (False, "selective"):
        config = Config(
            **{"precision": "fp32", **options}, stage=stage, model=model_folder, train_data=data_file, max_steps=3,
            batch_size=6, output_dir=str(tmp_path / str(kind)), gradient_checkpointing=kind,
            decoder_gradient_checkpointing=kind,
        )  # fmt: skip
        found.append(load_file(Path(train(config, quiet)["model"]) / "model.safetensors"))
    plain, selective = found
    assert plain.keys() == selective.keys()
    assert all(torch.equal(plain[name], selective[name]) for name in plain)


@pytest.mark.parametrize("field", ["gradient_checkpointing", "decoder_gradient_checkpointing"])
def test_selective_checkpointing_of_compiled_layers_is_refused(field):
    with pytest.raises(ConfigError, match=f"^{field}: got 'selective' with compile, which selects itself"):
        Config(stage=1, model="m", train_data="d", output_dir="o", compile=True, **{field: "selective"})


def test_an_unknown_kind_of_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"^gradient_checkpointing: got 'some', expected True, False or 'selective'"):
        Decoder(tiny_model(), gradient_checkpointing="some")


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
