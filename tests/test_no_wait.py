"""No wait for the device in a step: encoder, decoder, losses, backward and optimiser run on the meta device.

A meta tensor has no values, so whatever reads one (`.item()`, `.tolist()`, `if tensor`, `nonzero`, a boolean mask)
raises, where on a GPU it would wait. The ops run their own bodies up to the launch of each kernel. Copies from the
host that block are counted as well. `tests/seeded_waits.py` puts a wait into every file of a step: each is caught.
"""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import DistributedType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import seeded_waits
from pretend_gpu import BlockingCopies, device  # noqa: F401

from autoregembed import Decoder, Encoder, attention
from autoregembed.config import Config, Stage2Options
from autoregembed.cuda_graphs import GraphedObjective, map_tensors, shape_of
from autoregembed.integrations.transformers import AutoRegEmbedTrainer, Collator
from autoregembed.kernels.triton import primitives
from autoregembed.objective import Objective
from autoregembed.testing import tiny_model
from autoregembed.train import Run
from bench import compile_report

ROOT = Path(__file__).parents[1]
SUFFIX, COMPRESS = [5, 6], [120, 121, 122]


def rows_of(stage):
    if stage == 1:
        texts = [[7, 8, 9 + i] + [11] * i for i in range(4)]
        return [{"text_ids": t, "suffix_ids": SUFFIX, "target_ids": t} for t in texts]
    rows = []
    for i in range(4):
        negatives = [[12, 13 + j] for j in range(1 + i % 2)]
        rows.append({"query_ids": [7, 8, 9 + i], "positive_ids": [10, 11], "suffix_ids": SUFFIX, "row": i,
                     "negative_ids": negatives, "target_ids": [[10, 11], *negatives], "place": i, "block": 0,
                     "passage_suffix_ids": [SUFFIX] * (1 + len(negatives))})  # fmt: skip
    return rows


@functools.cache  # what has no values can be used again
def models(name="varlen"):
    options = dict(MODELS[name])
    implementation, lm = options.pop("implementation", attention.VARLEN), options.pop("lm", {})
    encoder = Encoder(
        tiny_model(vocab_size=128, **lm), compress_token_ids=COMPRESS, bos_token_id=1, suffix_ids=SUFFIX,
        **options,
    )  # fmt: skip
    decoder = Decoder(tiny_model(vocab_size=128, **lm), eos_token_id=2, bos_token_id=1, z_norm="match_rms")
    for model in (encoder, decoder):
        model.to("meta", torch.bfloat16).model.set_attn_implementation(implementation)
        for module in model.modules():  # longrope's second set of frequencies does not follow `to`
            if isinstance(getattr(module, "long_inv_freq", None), torch.Tensor):
                module.long_inv_freq = module.long_inv_freq.to("meta")
    return encoder, decoder


ACCELERATOR = SimpleNamespace(
    device=torch.device("meta"), distributed_type=DistributedType.NO, unwrap_model=lambda model: model,
    no_sync=lambda model: contextlib.nullcontext(), backward=lambda loss: loss.backward(),
    clip_grad_norm_=torch.nn.utils.clip_grad_norm_, scaler=None, is_main_process=False,
)  # fmt: skip


def objective_of(config, encoder, decoder, kind=Objective):
    reference = (torch.zeros(4), torch.zeros(4, 2)) if config.needs_ref_logps else None
    teacher = torch.zeros(1, 4, 4) if config.needs_teacher_scores else None
    return kind(config, encoder, decoder, ACCELERATOR, reference, teacher)


def trained(encoder):
    encoder.zero_grad()
    return [p for p in encoder.parameters() if p.requires_grad]


def require_gradients(encoder):
    assert not [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None and "lm_head" not in n]


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [5.0] * 4,
            "original_max_position_embeddings": 8, "factor": 16.0}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CASES = {
    "stage 1": {"stage": 1},
    "alignment": {"stage": 2},
    "joint, subtract": {"stage": 2, "negatives": "joint", "ref_margin": "subtract"},
    "alignment and InfoNCE": {"stage": 2, "contrastive_weight": 1.0, "hard_negatives": True},
    "distillation": {"stage": 2, "alignment_weight": 0.0, "distillation_weight": 1.0},
    "in parts": {"stage": 2, "token_budget": 20},
    "stage 1 in parts": {"stage": 1, "token_budget": 20},
    "gradients cached": {"stage": 2, "contrastive_weight": 1.0, "token_budget": 20},
    "per token": {"stage": 2, "logprob_reduction": "mean"},
    "in parts, no prefix shared": {"stage": 2, "token_budget": 20, "share_prefixes": False},
}
MODELS = {
    "varlen": {},
    "own rows": {"own_compress_rows": True},
    "sdpa": {"implementation": attention.SDPA},
    "longrope": {"implementation": attention.SDPA, "lm": {"rope_parameters": LONGROPE}},
    "dynamic rope": {"lm": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}},
}
GRAPHED = ("stage 1", "alignment", "joint, subtract", "alignment and InfoNCE", "distillation", "per token")
OTHERS = ("stage 1", "alignment", "gradients cached")  # for models other than the first


@pytest.mark.parametrize(("case", "model"), [(c, m) for m in MODELS for c in (CASES if m == "varlen" else OTHERS)])
def test_a_step_waits_for_nothing(device, case, model, monkeypatch):  # noqa: F811
    config = Config(model="", train_data="", output_dir="", **CASES[case])
    encoder, decoder = models(model)
    decoder.logprob_reduction = config.logprob_reduction
    if config.share_prefixes is not None:
        monkeypatch.setattr(decoder, "shares_prefixes", config.share_prefixes)
    objective = objective_of(config, encoder, decoder)
    parameters = trained(encoder)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with BlockingCopies() as copies:
        log = objective(rows_of(config.stage))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    assert {x.device.type for x in (*log.values(), norm)} == {"meta"}
    require_gradients(encoder)
    assert not copies.found
    wanted = {"_alignment_loss"} if config.alignment_weight else set()
    if config.stage == 1:
        wanted = {"_pool_last_k", "_splice", "_scale_rows"}
    assert wanted <= set(device)


class Calls(TorchDispatchMode):
    """What runs on the device, with all shapes and numbers; and what comes from the host."""

    def __init__(self):
        super().__init__()
        self.found, self.copied = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        self.found.append((func.name(), [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in given]))
        out = func(*args, **(kwargs or {}))
        there = any(x.device.type == "meta" for x in (*tensors, *tree_leaves(out)) if isinstance(x, torch.Tensor))
        if there and any(x.device.type == "cpu" for x in tensors):
            self.copied.append(func.name())
        return out

    def launch(self, kernel, programs, args, options):
        plain = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args]
        numbers = [x for x in plain if x is None or isinstance(x, (int, float, tuple))]
        self.found.append((kernel.__name__, programs, numbers, sorted(options.items(), key=lambda x: x[0])))


@pytest.mark.parametrize(("case", "model"), [(c, m) for m in ("varlen", "own rows") for c in GRAPHED])
def test_a_graphed_step_knows_nothing_of_its_batch(device, case, model):  # noqa: F811
    """It waits for nothing, takes nothing from the host, and is the same calls for every batch of its shape."""
    config = Config(model="", train_data="", output_dir="", **CASES[case])
    encoder, decoder = models(model)
    decoder.logprob_reduction = config.logprob_reduction
    objective, steps = objective_of(config, encoder, decoder, GraphedObjective), []
    for rows in (rows_of(config.stage), rows_of(config.stage)[::-1]):
        if config.stage == 1:
            rows = [{**r, "text_ids": r["text_ids"][::-1]} for r in rows]
        trained(encoder)
        inputs = map_tensors(lambda x: x.to("meta"), objective.plan(rows))
        with Calls() as calls, primitives.recording(calls.launch):
            objective.run(inputs)
        assert not calls.copied, calls.copied
        require_gradients(encoder)
        steps.append((shape_of(inputs), calls.found))
    assert len(steps[0][1]) > 300
    assert steps[0] == steps[1]


def test_the_loop_waits_once_a_step(device):  # noqa: F811
    """Whether to update is decided on the host, from one read of all that is logged."""
    config = Config(model="", train_data="", output_dir="", stage=2)
    encoder, decoder = models()
    run = Run.__new__(Run)
    run.config, run.accelerator, run.encoder, run.wrapped, run.world = config, ACCELERATOR, encoder, encoder, 1
    run.state = SimpleNamespace(seconds=0.0)
    run.scheduler = SimpleNamespace(get_last_lr=lambda: [1.0], step=lambda: None)
    run.objective, run.optimizer = objective_of(config, encoder, decoder), torch.optim.AdamW(trained(encoder))
    reads, tolist = [], torch.Tensor.tolist

    def read(x):
        if x.device.type != "meta":
            return tolist(x)
        reads.append(tuple(x.shape))
        return [1.0] * len(x)

    with mock.patch.object(torch.Tensor, "tolist", read), BlockingCopies() as copies:
        log = run.step(1, rows_of(2))
    assert reads == [(6,)]
    assert log.keys() >= {"loss", "align", "s1", "s2", "accuracy", "grad_norm"}
    assert not copies.found


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("counted", [False, True])
def test_a_step_of_the_trainer_waits_for_nothing(device, stage, counted):  # noqa: F811
    """Under `Trainer`, which counts terms on the device and hands the count over."""
    encoder, decoder = models()
    trainer = AutoRegEmbedTrainer.__new__(AutoRegEmbedTrainer)
    trainer.encoder, trainer.decoder, trainer.options = encoder, decoder, Stage2Options()
    trainer.args = SimpleNamespace(device=torch.device("meta"), average_tokens_across_devices=False)
    rows = rows_of(stage)
    for row in rows:
        row["ref_logps"] = [-1.0] * len(row["target_ids"])
    inputs = {name: x.to("meta") if name == "labels" else x for name, x in Collator()(rows).items()}
    count = torch.ones((), dtype=torch.int64, device="meta") if counted else None
    trained(encoder)
    with BlockingCopies() as copies:
        loss = trainer.compute_loss(encoder.model.model, inputs, num_items_in_batch=count)
        loss.backward()
    assert loss.device.type == "meta"
    require_gradients(encoder)
    assert not copies.found


def test_launchers_wait_for_nothing(device):  # noqa: F811
    """Every kernel, dtype and option that the compiler's report knows."""
    for name, call in compile_report.cases():
        try:
            call()
        except RuntimeError as error:
            raise AssertionError(name) from error
    assert len(set(device)) > 12


@pytest.mark.parametrize("case", ["stage 1", "alignment and InfoNCE", "distillation", "in parts"])
def test_every_file_of_a_step_has_a_seeded_wait(device, case):  # noqa: F811
    """So that a file that joins a step joins `seeded_waits.py`, which puts a wait into each."""
    config = Config(model="", train_data="", output_dir="", **CASES[case])
    objective = objective_of(config, *models())
    run, files = set(), set()
    sys.setprofile(lambda frame, event, argument: run.add(frame.f_code.co_filename))
    try:
        objective(rows_of(config.stage))
    finally:
        sys.setprofile(None)
    for folder in ("autoregembed", "kernels"):
        files |= {str(Path(f).relative_to(ROOT)) for f in run if Path(f).is_relative_to(ROOT / folder)}
    assert len(files) > 15, files
    assert files <= {file for file, _, _ in seeded_waits.WAITS}
