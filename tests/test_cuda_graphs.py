"""A step that is captured and replayed: padding changes no number, and nothing but the inputs knows its batch.

Without a GPU a trace stands for the graph: made of one batch's step, it runs on the numbers of another, in float64.
"""

import contextlib
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from autoregembed import Decoder, Encoder, attention
from autoregembed.config import Config, ConfigError
from autoregembed.cuda_graphs import (
    GraphedObjective,
    GraphedOptimizer,
    captured,
    map_tensors,
    padding,
    rounded_up,
    shape_of,
    tensors_of,
)
from autoregembed.objective import Objective
from autoregembed.testing import tiny_model

CUDA = torch.cuda.is_available()
ACCELERATOR = SimpleNamespace(
    device=torch.device("cuda" if CUDA else "cpu"), distributed_type=DistributedType.NO, num_processes=1,
    unwrap_model=lambda model: model, no_sync=lambda model: contextlib.nullcontext(),
    backward=lambda loss: loss.backward(), clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
)  # fmt: skip
CASES = {
    "stage 1": {"stage": 1},
    "alignment": {"stage": 2},
    "joint, no reference": {"stage": 2, "negatives": "joint", "ref_margin": "none"},
    "per token": {"stage": 2, "logprob_reduction": "mean"},
    "InfoNCE": {"stage": 2, "alignment_weight": 0.0, "contrastive_weight": 1.0},
    "all, hard negatives": {"stage": 2, "contrastive_weight": 0.5, "distillation_weight": 2.0, "hard_negatives": True},
    "distillation, own pairs": {"stage": 2, "alignment_weight": 0.0, "distillation_weight": 1.0,
                                "distillation_pairs": "keep", "distillation_mixture": 0.5},
}  # fmt: skip


def rows_of(stage, seed=0):
    """Four rows; those of another seed have other lengths and ids, but padded the same shape."""
    lengths = [[3, 5, 4, 6], [6, 4, 5, 4]][seed]

    def text(n, i):
        return [7 + (13 * seed + 5 * i + 3 * j) % 100 for j in range(n)]

    if stage == 1:
        return [{"text_ids": text(n, i), "suffix_ids": [5, 6], "target_ids": text(n, i)} for i, n in enumerate(lengths)]
    rows = []
    for i, n in enumerate(lengths):
        negatives = [text(2 + (i + j + seed) % 3, 20 + i + j) for j in range([1, 2, 1, 2][(i + seed) % 4])]
        positive = text(n - 1, 40 + i // 2)  # some are equal
        rows.append({"query_ids": text(n, i), "positive_ids": positive, "suffix_ids": [5, 6], "row": (i + seed) % 4,
                     "negative_ids": negatives, "target_ids": [positive, *negatives], "place": (i + seed) % 4,
                     "block": seed, "passage_suffix_ids": [[5, 6]] * (1 + len(negatives))})  # fmt: skip
    return rows


def models(dtype=torch.float64, **options):
    torch.manual_seed(0)
    device = ACCELERATOR.device

    def model():
        made = tiny_model(vocab_size=128)
        for norm in (m for m in made.modules() if type(m).__name__ == "LlamaRMSNorm"):  # it rounds to fp32
            if dtype == torch.float64:
                norm.forward = partial(lambda norm, x: F.rms_norm(x, x.shape[-1:], norm.weight, 1e-6), norm)
        return made

    encoder = Encoder(
        model(), compress_token_ids=[120, 121, 122], bos_token_id=1, suffix_ids=[5, 6],
        own_compress_rows=True,
    )  # fmt: skip
    decoder = Decoder(model(), eos_token_id=2, bos_token_id=1, z_norm="match_rms", **options)
    return encoder.to(device, dtype), decoder.to(device, dtype)


def objective_of(kind, case, encoder, decoder):
    config = Config(model="", train_data="", output_dir="", **{"max_grad_norm": 0.01, **CASES[case]})
    decoder.logprob_reduction = config.logprob_reduction
    draw = torch.Generator().manual_seed(1)
    reference = -30 * torch.rand(4, 3, generator=draw, dtype=torch.float64) if config.needs_ref_logps else None
    teacher = -30 * torch.rand(2, 4, 4, generator=draw, dtype=torch.float64) if config.needs_teacher_scores else None
    given = None if reference is None else (reference[:, 0], reference[:, 1:])
    encoder.zero_grad()
    return kind(config, encoder, decoder, ACCELERATOR, given, teacher)


def eager(case, rows, encoder, decoder):
    """What is logged, and the clipped gradients."""
    objective = objective_of(Objective, case, encoder, decoder)
    log = objective(rows)
    return {**log, "grad_norm": objective.clip()}, gradients_of(encoder)


def gradients_of(encoder):
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def assert_same(found, wanted, tolerance=1e-10):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            scale = float(b[name].abs().max()) if b[name].numel() else 0.0
            torch.testing.assert_close(a[name], b[name].to(a[name].dtype), rtol=tolerance, atol=tolerance * scale)


LENGTHS = st.lists(st.integers(4, 400), min_size=1, max_size=300)


@given(LENGTHS, st.integers(2, 4), st.one_of(st.none(), st.integers(400, 600)))
def test_padding(lengths, least, limit):
    added, longest = padding(lengths, least, limit)
    whole = [*lengths, *added]
    assert added
    assert least <= min(added)
    assert max(whole) <= longest <= (limit or 2 * max(*lengths, 2 * least))
    assert len(whole) == rounded_up(len(whole))
    assert sum(whole) == rounded_up(sum(whole))
    assert len(whole) <= 1.7 * len(lengths) + 2
    assert sum(whole) <= 1.35 * sum(lengths) + 8 * least


def test_few_shapes_stand_for_many_batches():
    draw = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(200):
        lengths = torch.randint(8, 40, (128,), generator=draw).tolist()
        added, longest = padding(lengths, 6, 2048)
        shapes.add((len(lengths) + len(added), sum(lengths) + sum(added), longest))
    assert len(shapes) <= 3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(CUDA, reason="in float64")
def test_padding_changes_no_number(case):
    encoder, decoder = models()
    rows = rows_of(CASES[case]["stage"])
    wanted = eager(case, rows, encoder, decoder)
    objective = objective_of(GraphedObjective, case, encoder, decoder)
    inputs = objective.plan(rows)
    assert len(inputs.texts.ids) > sum(inputs.texts.lengths.values[-inputs.num_texts :]) - 1  # there is some
    values = objective.run(inputs)
    assert_same((dict(zip(objective.log_names, values, strict=True)), gradients_of(encoder)), wanted, 1e-6)
    assert_same((gradients_of(encoder),), wanted[1:])


def dense(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen on a CPU: shapes are those of its inputs alone."""
    place = torch.arange(len(q), dtype=torch.int32, device=q.device)
    text = torch.searchsorted(cu_q[1:].contiguous(), place, right=True)
    mask = (text[:, None] == text) & (place[:, None] >= place)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return y[0].transpose(0, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(CUDA, reason="in float64")
def test_a_captured_step_serves_every_batch_of_its_shape(case):
    encoder, decoder = models()
    stage = CASES[case]["stage"]
    wanted = eager(case, rows_of(stage, 1), encoder, decoder)
    for lm in (encoder, decoder):
        lm.model.set_attn_implementation(attention.VARLEN)
    objective = objective_of(GraphedObjective, case, encoder, decoder)
    first, second = (objective.plan(rows_of(stage, seed)) for seed in (0, 1))
    assert shape_of(first) == shape_of(second)

    def step(*given):
        turn = iter(given)
        encoder.zero_grad()
        values = objective.run(map_tensors(lambda x: next(turn), first))
        return values, {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}

    # On a CPU the ops read and check values, but for a compiler they are nodes that do.
    compiling = mock.patch("torch.compiler.is_compiling", return_value=True)
    with mock.patch("torch.nn.attention.varlen.varlen_attn", dense), compiling:
        graph = make_fx(step)(*tensors_of(first))
    values, gradients = graph(*tensors_of(second))
    assert_same((dict(zip(objective.log_names, values, strict=True)),), wanted[:1], 1e-6)
    assert_same((gradients,), wanted[1:])


def test_what_cannot_be_captured_is_refused():
    for fields, match in (
        ({"token_budget": 100}, r"^token_budget: got 100 with cuda_graphs, expected None: a step in several passes"),
        ({"gradient_checkpointing": True}, "^gradient_checkpointing: got True with cuda_graphs, expected False"),
        (
            {"gradient_checkpointing": "selective"},
            "^gradient_checkpointing: got 'selective' with cuda_graphs, expected",
        ),
        ({"share_prefixes": True}, "^share_prefixes: got True with cuda_graphs"),
        ({"attention": "sdpa"}, "^attention: got 'sdpa' with cuda_graphs"),
        ({"precision": "fp16"}, "^precision: got 'fp16' with cuda_graphs"),
    ):
        with pytest.raises(ConfigError, match=match):
            Config(stage=1, model="", train_data="", output_dir="", cuda_graphs=True, **fields)
    encoder, decoder = models(torch.float32)
    objective = objective_of(Objective, "alignment", encoder, decoder)

    def on(device, processes):
        objective.accelerator = SimpleNamespace(
            **{**vars(ACCELERATOR), "device": torch.device(device), "num_processes": processes}
        )
        return captured(objective, SimpleNamespace(optimizer=None))

    with pytest.raises(ConfigError, match=r"^cuda_graphs: got True on cpu, expected False without CUDA"):
        on("cpu", 1)
    with pytest.raises(ConfigError, match=r"^cuda_graphs: got True with 2 processes, expected False"):
        on("cuda", 2)
    with pytest.raises(ConfigError, match=r"^attention: got 'sdpa' with cuda_graphs, expected one of"):
        on("cuda", 1)
    encoder.attention = decoder.attention = "varlen"
    assert [type(x) for x in on("cuda", 1)] == [GraphedObjective, GraphedOptimizer]
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    objective.encoder.model = tiny_model(vocab_size=128, rope_parameters=rope, max_position_embeddings=16)
    with pytest.raises(
        ConfigError, match=r"^cuda_graphs: got True for a model with another rope for texts of more than 16 tokens"
    ):
        on("cuda", 1)


def test_the_update_before_capture_is_the_optimizers_own():
    found = []
    for graphed in (False, True):
        x = torch.nn.Parameter(torch.arange(1.0, 4.0, device=ACCELERATOR.device))
        adamw = torch.optim.AdamW([x], lr=0.5, fused=True)
        optimizer = GraphedOptimizer(SimpleNamespace(optimizer=adamw, step=adamw.step)) if graphed else adamw
        adamw.param_groups[0]["lr"] = 0.25  # a scheduler's
        x.grad = torch.ones_like(x)
        optimizer.step()
        optimizer.zero_grad()
        assert adamw.param_groups[0]["lr"] == 0.25
        assert adamw.param_groups[0]["capturable"] is False
        assert (x.grad is not None) == graphed  # it keeps its memory
        found.append(x.detach())
    torch.testing.assert_close(*found)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_train_as_eager_ones(case):
    """Six steps of two batches of one shape, eager on what is padded, and replayed from the third on."""
    runs = []
    for graphed in (False, True):
        encoder, decoder = models(torch.bfloat16, attention="varlen")
        encoder.use_attention("varlen")
        objective = objective_of(GraphedObjective, case, encoder, decoder)
        adamw = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=True)
        optimizer = GraphedOptimizer(SimpleNamespace(optimizer=adamw, step=adamw.step)) if graphed else adamw
        losses = []
        for step in range(6):
            adamw.param_groups[0]["lr"] = 1e-3 / (1 + step)
            rows = rows_of(CASES[case]["stage"], step % 2)
            if graphed:
                losses.append(objective(rows)["loss"])
            else:
                values = objective.run(map_tensors(torch.Tensor.cuda, objective.plan(rows)))
                losses.append(dict(zip(objective.log_names, values, strict=True))["loss"])
            optimizer.step()
        assert not graphed or (len(objective.graphs) == 1 and optimizer.captured)
        runs.append((torch.stack(losses), [p.detach().float() for p in encoder.parameters()]))
    assert bool(runs[0][0].diff().abs().min() > 0)
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-2, atol=1e-3)
