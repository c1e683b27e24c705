"""No wait for the device in a step: encoder, decoder, losses, backward and optimiser run on the meta device.

A meta tensor has no values, so whatever reads one (`.item()`, `.tolist()`, `if tensor`, `nonzero`, a boolean mask)
raises, where on a GPU it would wait. The ops run their own bodies up to the launch of each kernel. Copies from the
host that block are counted as well. `tests/seeded_waits.py` puts a wait into every file of a step: each is caught.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import DistributedType
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from autoregembed import Decoder, Encoder, attention
from autoregembed.config import Config
from autoregembed.kernels.triton import primitives, tiles
from autoregembed.objective import Objective
from autoregembed.testing import tiny_model
from bench import compile_report

SUFFIX, COMPRESS = [5, 6], [120, 121, 122]


class BlockingCopies(TorchDispatchMode):
    """Copies of values from the host, of more than one number, that wait until the device has them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and isinstance(source, torch.Tensor):
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if source.device.type == "cpu" and out.device.type == "meta" and source.ndim and waits:
                self.found.append(f"{func} of {tuple(source.shape)}")
        return out


@pytest.fixture
def device():
    """The meta device as a GPU: the ops take the Triton backend and run their bodies; launches are recorded."""
    definitions = torch._library.custom_ops.OPDEFS
    # Checks of values are nodes of their own: Triton's kernels check on the device.
    bodies = [body for name, body in definitions.items() if name.startswith("autoregembed::") and "require" not in name]
    assert len(bodies) >= 14
    launched = []
    with contextlib.ExitStack() as stack:
        for body in bodies:
            stack.enter_context(mock.patch.object(body, "_abstract_fn", body._init_fn))
        stack.enter_context(mock.patch("autoregembed.ops._dispatch._state_of_triton", return_value="ok"))
        # Autocast does not know the meta device.
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))
        stack.enter_context(mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()))
        stack.enter_context(tiles.pretend("sm_90"))
        stack.enter_context(primitives.recording(lambda kernel, *_: launched.append(kernel.__name__)))
        yield launched


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


def models(dtype, **options):
    encoder = Encoder(
        tiny_model(vocab_size=128), compress_token_ids=COMPRESS, bos_token_id=1, suffix_ids=SUFFIX, **options
    )
    decoder = Decoder(tiny_model(vocab_size=128), eos_token_id=2, bos_token_id=1, z_norm="match_rms")
    for model in (encoder, decoder):
        model.to("meta", dtype).model.set_attn_implementation(attention.VARLEN)
    return encoder, decoder


CASES = {
    "stage 1": {"stage": 1},
    "alignment": {"stage": 2},
    "joint, subtract": {"stage": 2, "negatives": "joint", "ref_margin": "subtract"},
    "alignment and InfoNCE": {"stage": 2, "contrastive_weight": 1.0, "hard_negatives": True},
    "distillation": {"stage": 2, "alignment_weight": 0.0, "distillation_weight": 1.0},
    "in parts": {"stage": 2, "token_budget": 20},
    "gradients cached": {"stage": 2, "contrastive_weight": 1.0, "token_budget": 20},
}


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing(device, case, own_rows):
    config = Config(model="", train_data="", output_dir="", **CASES[case])
    encoder, decoder = models(torch.bfloat16, own_compress_rows=own_rows)
    accelerator = SimpleNamespace(
        device=torch.device("meta"), distributed_type=DistributedType.NO, unwrap_model=lambda model: model,
        no_sync=lambda model: contextlib.nullcontext(), backward=lambda loss: loss.backward(),
    )  # fmt: skip
    reference = None
    if config.needs_ref_logps:
        reference = torch.zeros(4), torch.zeros(4, 2)
    teacher = torch.zeros(1, 4, 4) if config.needs_teacher_scores else None
    objective = Objective(config, encoder, decoder, accelerator, reference, teacher)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with BlockingCopies() as copies:
        log = objective(rows_of(config.stage))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    assert {x.device.type for x in (*log.values(), norm)} == {"meta"}
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None and "lm_head" not in n]
    assert not without
    assert not copies.found
    wanted = {"_alignment_loss"} if config.alignment_weight else set()
    if config.stage == 1:
        wanted = {"_pool_last_k", "_splice", "_scale_rows", "_segment_sum"}
    assert wanted <= set(device)


def test_launchers_wait_for_nothing(device):
    """Every kernel, dtype and option that the compiler's report knows."""
    for name, call in compile_report.cases():
        try:
            call()
        except RuntimeError as error:
            raise AssertionError(name) from error
    assert len(set(device)) > 12
