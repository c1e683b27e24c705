"""The memory of a step, counted: the step itself runs on fake tensors, every allocation is booked until it is freed.

A fake tensor has a shape, a dtype and a device and no memory, so a model of any size is run in seconds. Only indices of
tokens are real. What an op allocates inside and frees again is not seen; the head says it of itself (`head_workspace`).
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from accelerate import DistributedType
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from autoregembed.build import build_models
from autoregembed.config import Config
from autoregembed.decoder import Decoder
from autoregembed.encoder import Encoder
from autoregembed.kernels.torch.linear_logprob import CHUNK_BYTES, block_shape
from autoregembed.loading import without_values
from autoregembed.objective import Objective
from autoregembed.reference_scores import SCORING_BUDGET
from autoregembed.teacher_scores import pair_scores

_HEADS = ("linear_logprob", "conditional_alignment", "conditional_compression")

# What an allocation is for.
ENCODER, DECODER, HEAD = "encoder, kept for backward", "decoder, kept for backward", "head"
GRADIENTS, BACKWARD = "gradients", "backward, temporary"


def head_workspace(device: str, n: int, v: int, d: int, itemsize: int) -> int:
    """Bytes that one call of the head on (n, d) and (v, d) allocates and frees: its block or chunk of logits."""
    if device != "cpu":
        return min(CHUNK_BYTES["cuda"], n * (v * itemsize + 4 * d))
    rows, columns = block_shape(torch.device("cpu"), n, v, d, 4)
    widened = 0 if itemsize == 4 else 4 * (columns * d + 2 * rows * d)
    return 4 * rows * (columns + d) + widened


Peaks: TypeAlias = "dict[tuple[str, bool], Counter[str]]"


class Allocations(TorchDispatchMode):
    """Books the storage of every tensor that an op returns; `known` storages are weights and count as none.

    `peaks` has the largest sum of each stretch of a step, with its parts by use. A stretch is a use, and in a backward
    whether half of the gradients are there: within one, memory grows evenly with the layers of a model.
    """

    def __init__(self, device: str, known: Iterator[Tensor]):
        super().__init__()
        self.device = device
        self.use = ENCODER
        self.live: Counter[str] = Counter()
        self.peaks: Peaks = {}
        self.gradients = 0  # of this backward
        self.trained = 0  # parameters
        self.booked: dict[int, tuple[str, int, Any]] = {}
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def book(self, tensor: Tensor, use: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.booked:
            return
        self.booked[key] = use, size, weakref.ref(storage, lambda _: self.free(key))
        self.live[use] += size

    def free(self, key: int) -> None:
        use, size, _ = self.booked.pop(key)
        self.live[use] -= size

    def is_gradient(self, parameter: Tensor) -> None:
        """Books the gradient of a parameter, which a backward has just made, as what it is."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self.booked:
            use, size, storage = self.booked[key]
            self.booked[key] = GRADIENTS, size, storage
            self.live[use] -= size
            self.live[GRADIENTS] += size
        self.gradients += 1

    def look(self, transient: int = 0) -> None:
        stretch = self.use, 2 * self.gradients >= self.trained
        now = self.live.total() + transient
        if stretch not in self.peaks or now > self.peaks[stretch].total():
            self.peaks[stretch] = self.live + Counter({HEAD: transient})

    def __torch_dispatch__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        head = func.namespace == "autoregembed" and any(name in str(func) for name in _HEADS)
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.book(x, HEAD if head else self.use)
        if head and len(args) > 1 and args[0].ndim == 2:
            (n, d), v = args[0].shape, args[1].shape[0]
            self.look(head_workspace(self.device, n, v, d, args[0].element_size()))
        self.look()
        return out


@dataclass
class Models:
    """Encoder and decoder of a run as fake tensors, in the dtypes and under the autocast of the run."""

    encoder: Encoder
    decoder: Decoder | None
    tokenizer: Any
    mode: Any  # FakeTensorMode
    half: torch.dtype | None  # what products are in, None: as the weights
    device: str  # cpu or cuda: what is planned for

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Where a pass is run."""
        with without_values(torch.device("meta")), torch.autocast("cpu", self.half, enabled=self.half is not None):
            yield

    def tensors(self) -> Iterator[Tensor]:
        for model in (self.encoder, self.decoder):
            if model is not None:
                yield from model.parameters()
                yield from model.buffers()

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.encoder.parameters() if p.requires_grad]


def fake_models(
    config: Config, *, half: torch.dtype | None, device: str, attention: str, layers: int | None = None
) -> Models:
    """What a run of `config` would build, from config.json and the tokenizer alone; with the first `layers` layers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with without_values(torch.device("meta"), layers):
        encoder, decoder, tokenizer, _ = build_models(replace(config, compile=False))
        for model, dtype in ((encoder, None), (decoder, half)):
            if model is not None:
                model.model.set_attn_implementation(attention)
                _fake(model, mode, dtype)
    if half is not None:  # as accelerate does it
        forward = torch.autocast("cpu", half)(type(encoder).forward)
        encoder.forward = types.MethodType(convert_outputs_to_fp32(forward), encoder)  # type: ignore[method-assign]
    return Models(encoder, decoder, tokenizer, mode, half, device)


def _fake(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
    """Puts fake tensors on a CPU, of `dtype`, in place of those on the meta device; tied weights stay tied.

    A model is not built of fake tensors: copying and resizing them has corrupted memory (torch 2.13).
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter.data, FakeTensor):  # another model has it as well
                continue
            if id(parameter) not in made:
                value = FakeTensor(mode, parameter.detach().to(dtype or parameter.dtype), torch.device("cpu"))
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad), parameter
            setattr(module, name, made[id(parameter)][0])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                cast = buffer if dtype is None or not buffer.is_floating_point() else buffer.to(dtype)
                module._buffers[name] = FakeTensor(mode, cast, torch.device("cpu"))


def step(config: Config, models: Models, rows: list[dict]) -> Peaks:
    """Peaks of loss and gradients of one step over `rows`."""
    encoder, decoder = models.encoder, models.decoder
    allocations = Allocations(models.device, models.tensors())

    def backward(loss: Tensor) -> None:
        allocations.use, allocations.gradients = BACKWARD, 0
        loss.backward()
        allocations.use = ENCODER

    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"), distributed_type=DistributedType.NO, unwrap_model=lambda model: model,
        no_sync=lambda model: contextlib.nullcontext(), backward=backward,
    )  # fmt: skip
    b, m = len(rows), max((len(r["target_ids"]) for r in rows), default=1) if config.stage == 2 else 1
    reference = (torch.zeros(b), torch.zeros(b, m)) if config.needs_ref_logps else None
    teacher = torch.zeros(1, b, b) if config.needs_teacher_scores else None
    rows = [{**row, "row": i, "place": i, "block": 0} for i, row in enumerate(rows)]
    if not config.steps_need_decoder:
        decoder = None
    allocations.trained = len(models.parameters())
    handles: list[Any] = [p.register_post_accumulate_grad_hook(allocations.is_gradient) for p in models.parameters()]
    handles += _label(allocations, encoder)
    encoder.train()
    try:
        with models.inside(), allocations:
            Objective(config, encoder, decoder, accelerator, reference, teacher)(rows)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in models.parameters():
            parameter.grad = None
        allocations.booked.clear()
    return allocations.peaks


def _label(allocations: Allocations, encoder: Encoder) -> list[Any]:
    """Hooks that tell the passes of the encoder from those of the decoder."""

    def entering(use: str) -> Any:
        def hook(*_: Any) -> None:
            if allocations.use != BACKWARD:  # recomputation is for the backward
                allocations.use = use

        return hook

    return [encoder.register_forward_pre_hook(entering(ENCODER)), encoder.register_forward_hook(entering(DECODER))]


def scoring(config: Config, models: Models, rows: list[dict]) -> Peaks:
    """Peaks without gradients: of a block of teacher scores, or one pass of reference scores or of an evaluation."""
    allocations = Allocations(models.device, models.tensors())
    with torch.no_grad(), models.inside(), allocations:
        z = models.encoder([r["query_ids"] if "query_ids" in r else r["text_ids"] for r in rows],
                           [r["suffix_ids"] for r in rows])  # fmt: skip
        decoder = models.decoder
        if decoder is not None and config.needs_teacher_scores:
            pair_scores(decoder, z, [r["target_ids"][0] for r in rows], SCORING_BUDGET)
        elif decoder is not None and config.needs_ref_logps:
            owner = [i for i, r in enumerate(rows) for _ in r["target_ids"]]
            decoder.logprob(z, [t for r in rows for t in r["target_ids"]], owner)
    allocations.booked.clear()
    return allocations.peaks
