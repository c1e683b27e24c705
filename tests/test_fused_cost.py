"""What conditional_alignment and conditional_compression save beside their parts: launches and bytes, counted.

On the meta device as a GPU every kernel of torch's and every Triton launch is seen. Bytes are those of the tensors that
each reads and writes, once each.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from pretend_gpu import device  # noqa: F401

from autoregembed import Decoder, alignment_loss, attention, compression_loss, objective
from autoregembed.config import Stage2Options
from autoregembed.kernels.triton import primitives
from autoregembed.testing import tiny_model

OPDEFS = torch._library.custom_ops.OPDEFS


class Cost(TorchDispatchMode):
    """Kernels by name and bytes; `views` and bare allocations are none."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = [], 0

    def add(self, name, *arguments):
        self.kernels.append(name)
        tensors = [getattr(x, "base", x) for x in arguments]  # of a TMA descriptor
        tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.device.type == "meta"]
        self.bytes += sum(x.numel() * x.element_size() for x in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        if name in OPDEFS:  # its body, under this mode again
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        on_device = any(x.device.type == "meta" for x in tensors)
        if on_device and not func.is_view and not any(word in name for word in ("empty", "detach", "promote")):
            self.add(name, *tensors)
        return out


@pytest.fixture
def decoder(device):  # noqa: F811
    made = Decoder(tiny_model(vocab_size=128), eos_token_id=2, bos_token_id=1).to("meta", torch.bfloat16)
    made.model.set_attn_implementation(attention.VARLEN)
    return made


def cost(function):
    """Of a forward and backward from z on."""
    z = torch.empty(12, 2, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with Cost() as found, primitives.recording(lambda kernel, _, args, __: found.add(kernel.__name__, *args)):
        function(z).backward()
    return found


def test_alignment(decoder):
    rows = [{"target_ids": [[5, 6 + i], *([7, 8, 9 + j] for j in range(1 + i % 3))]} for i in range(6)]
    references = torch.zeros(6), torch.zeros(6, 3)

    def fused(z):
        return objective.stage2_loss(Stage2Options(), decoder, z, rows, ref_logps=references).alignment

    def parts(z):
        a, b, c, mask = objective.alignment_scores(decoder, z, rows)
        given = (x.to("meta", non_blocking=True) for x in references)
        return alignment_loss(a, b, c, *given, negative_mask=mask).loss

    found, wanted = cost(fused), cost(parts)
    assert found.kernels.count("_alignment_loss") == wanted.kernels.count("_alignment_loss") == 1
    assert len(found.kernels) < len(wanted.kernels) - 8, (found.kernels, wanted.kernels)
    assert found.bytes <= 1.001 * wanted.bytes, (found.bytes, wanted.bytes)


def test_compression(decoder):
    targets = [[5, 6 + i, *[7] * i] for i in range(12)]
    count = decoder.num_tokens(targets)
    found = cost(lambda z: objective.stage1_loss(decoder, z, targets, num_tokens=count))
    wanted = cost(lambda z: compression_loss(decoder.logprob(z, targets), count))
    assert len(found.kernels) < len(wanted.kernels)
    assert found.bytes < wanted.bytes
