"""A training step as a CUDA graph: batches are padded to few shapes, and the step of each shape is captured once.

The host packs a batch, pads it and copies ids and indices to where the captured kernels read them. All else is one
replay: encoder, decoder, losses, backward and clipping; a second one is the optimizer's update, which the loop skips
where loss or gradient are not finite. What is padded are lists and no kernel knows of it: a pack gets further texts
that no loss reads, and further pairs whose labels do not count. Loss and gradient of the others stay the same.

The first batch of a shape runs as it is, the second is captured, and every later one replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoregembed.attention import rope_limit
from autoregembed.config import ConfigError
from autoregembed.decoder import Decoder
from autoregembed.embedding_losses import distillation_loss, keys_of, paired, text_keys, unknown_pairs
from autoregembed.encoder import Encoder, text_embedding
from autoregembed.models import max_positions
from autoregembed.objective import (
    Objective,
    alignment_of,
    alignment_pairs,
    compression_of,
    places_in,
    texts_of,
    weighted,
)
from autoregembed.ops import AlignmentPairs, info_nce
from autoregembed.packing import Ids, Lengths, Packed, ScoredPack, pack

REPEATABLE = ("varlen", "flash_attention_2")  # one call over a pack, whatever the lengths in it


def captured(objective: Objective, optimizer: Any) -> tuple[GraphedObjective, GraphedOptimizer]:
    """Objective and accelerate's optimizer of a loop whose steps are captured and replayed.

    Raises:
        ConfigError: a step cannot be captured here. `Config` has refused what it can tell.
    """
    accelerator = objective.accelerator
    if accelerator.device.type != "cuda":
        raise ConfigError(f"cuda_graphs: got True on {accelerator.device.type}, expected False without CUDA")
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"cuda_graphs: got True with {accelerator.num_processes} processes, expected False: in every step the host "
            "counts what all of them have"
        )
    for lm in (accelerator.unwrap_model(objective.encoder), objective.decoder):
        if lm is not None:
            require_repeatable(lm)
    graphed = GraphedObjective(*(getattr(objective, field.name) for field in fields(objective)))
    return graphed, GraphedOptimizer(optimizer)


def require_repeatable(lm: Encoder | Decoder) -> None:
    """Raises ConfigError where the kernels of a pass depend on more than the shape of a pack."""
    if lm.attention not in REPEATABLE:
        raise ConfigError(
            f"attention: got {lm.attention!r} with cuda_graphs, expected one of {REPEATABLE}, which need 16 bits "
            "(precision 'bf16')"
        )
    if (limit := rope_limit(lm.model)) is not None:
        raise ConfigError(
            f"cuda_graphs: got True for a model with another rope for texts of more than {limit} tokens, expected False"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Few shapes


def rounded_up(n: int) -> int:
    """The next size of eight a doubling: at most an eighth more."""
    step = 1 << max(n.bit_length() - 4, 0)
    return -(-n // step) * step


def padding(lengths: Sequence[int], least: int, limit: int | None) -> tuple[list[int], int]:
    """The lengths of sequences to add to a pack, and the length to plan for, so that few shapes stand for all packs.

    Args:
        lengths: of the sequences that are there.
        least: tokens of one that is added.
        limit: the model's positions; above `least`.
    """
    count, total = len(lengths), sum(lengths)
    longest = 1 << (max(*lengths, 2 * least) - 1).bit_length()
    longest = longest if limit is None else min(longest, limit)
    number = rounded_up(count + 1)
    while (tokens := rounded_up(total + (number - count) * least)) - total > (number - count) * longest:
        number = rounded_up(number + 1)
    share, rest = divmod(tokens - total, number - count)
    return [share + (i < rest) for i in range(number - count)], longest


# ----------------------------------------------------------------------------------------------------------------------
# What a step reads


class StepInputs(NamedTuple):
    """All that a step reads of a batch of B rows; None where its losses do not."""

    num_rows: int
    num_texts: int  # the first of those in the pack; the others are padding
    texts: Packed
    pairs: ScoredPack | None = None
    places: AlignmentPairs | None = None
    references: tuple[Tensor | None, Tensor | None] = (None, None)  # (B,), (B, M)
    num_tokens: Tensor | None = None  # () int64, targets with eos
    passage_ids: Tensor | None = None  # (P,) int64, equal for equal passages
    teacher_scores: Tensor | None = None  # (≥ B, B)
    unknown: Tensor | None = None  # (B, B) bool


def map_tensors(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """`x` with `function` of every tensor that the device reads; what else a pack knows of its batch is dropped."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Packed):
        return replace(x.map(function), lengths=Lengths(()), host_unsort_index=x.host_unsort_index[:0])
    if isinstance(x, tuple):
        parts = [map_tensors(function, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def tensors_of(x: Any) -> list[Tensor]:
    """What `map_tensors` changes, in order."""
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(add, x)
    return found


def shape_of(inputs: Any) -> tuple[Any, ...]:
    """What two inputs must have in common for one graph to serve both."""
    found: list[Any] = []

    def visit(x: Any) -> None:
        if isinstance(x, Packed):
            found.append(x.max_length)
        elif isinstance(x, tuple):
            for part in x:
                visit(part)
        elif not isinstance(x, Tensor):
            found.append(x)

    visit(inputs)
    return *found, *((tuple(x.shape), x.dtype) for x in tensors_of(inputs))


class GraphedObjective(Objective):
    """`Objective` whose step, with the clipping after it, is captured and replayed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._step = Replayed(self.run, self.accelerator.device)
        self.log_names: list[str] = []

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        values = self._step(self.plan(rows))
        found = dict(zip(self.log_names, values.unbind(), strict=True))
        self._norm = found.pop("grad_norm")
        return found

    @property
    def graphs(self) -> dict[tuple[Any, ...], Any]:
        """The graphs by the shapes that they serve."""
        return self._step.graphs

    def clip(self) -> Tensor:
        """The norm of the gradient before the step clipped it."""
        return self._norm

    def plan(self, rows: list[dict]) -> StepInputs:
        """The padded batch, on the host."""
        config, encoder = self.config, self.accelerator.unwrap_model(self.encoder)
        texts, suffixes = texts_of(rows, config.hard_negatives)
        k = encoder.num_compress_tokens
        sequences = encoder.sequences(texts, suffixes)
        added, longest = padding([len(s) for s in sequences], k + 1, max_positions(encoder.model))
        packed = pack([*sequences, *([0] * n for n in added)])
        inputs = StepInputs(len(rows), len(texts), replace(packed, max_length=longest))
        if config.stage == 1:
            targets = [r["target_ids"] for r in rows]
            count = torch.tensor(sum(map(len, targets)) + len(targets))
            return inputs._replace(pairs=self._pairs(k, targets, range(len(rows))), num_tokens=count)
        ref_logps, teacher_scores = self.scores_of(rows)
        if config.alignment_weight:
            targets, owners, parts = alignment_pairs(rows)
            pairs = self._pairs(k, targets, owners.tolist())
            inputs = inputs._replace(pairs=pairs, places=places_in(pairs.packed, parts))
            if ref_logps is not None:
                r_a, r_c = ref_logps
                inputs = inputs._replace(references=(r_a, r_c[:, : parts.query_negatives.shape[1]]))
        if config.contrastive_weight:
            inputs = inputs._replace(passage_ids=torch.tensor(text_keys(texts[len(rows) :])))
        if config.distillation_weight:
            unknown = unknown_pairs(config, keys_of(rows), teacher_scores)
            inputs = inputs._replace(teacher_scores=teacher_scores, unknown=unknown)
        return inputs

    def _pairs(self, k: int, targets: Sequence[Ids], owners: Sequence[int]) -> ScoredPack:
        assert self.decoder is not None
        around = len(self.decoder.prefix) + k
        lengths = [around + len(target) for target in targets]
        self.decoder.verify(max(lengths))
        added, longest = padding(lengths, around + 1, max_positions(self.decoder.model))
        more = [[0] * (n - around) for n in added]
        scored = self.decoder.pack(k, [*targets, *more], [*owners, *[0] * len(more)], padding=len(more))
        return scored._replace(packed=replace(scored.packed, max_length=longest))

    def run(self, inputs: StepInputs) -> Tensor:
        """The step on the device: gradients in the parameters, and what is logged, in the order of `log_names`."""
        parameters = self.accelerator.unwrap_model(self.encoder).parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:  # in place: the update reads the same memory every time
            torch._foreach_zero_(gradients)
        loss, found = self._loss(self.encoder(inputs.texts), inputs)
        self.accelerator.backward(loss)
        found |= {"loss": loss.detach(), "grad_norm": super().clip()}
        self.log_names = list(found)
        return torch.stack([x.float() for x in found.values()])

    def _loss(self, z: Tensor, inputs: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        config, b = self.config, inputs.num_rows
        alignment = nce = distilled = None
        if inputs.pairs is not None:
            assert self.decoder is not None
            score, reduction = partial(self.decoder.score, z, inputs.pairs, None), self.decoder.logprob_reduction
            if inputs.num_tokens is not None:
                return compression_of(score, reduction, inputs.num_tokens), {}
            assert inputs.places is not None
            alignment = score(alignment_of(config, reduction, inputs.places, inputs.references))
        embeddings = text_embedding(z[: inputs.num_texts].to(torch.promote_types(z.dtype, torch.float32)))
        if config.contrastive_weight:
            target = torch.arange(b, device=z.device)
            nce = info_nce(
                embeddings[:b], embeddings[b:], target, temperature=config.contrastive_temperature,
                passage_ids=inputs.passage_ids,
            )  # fmt: skip
        if inputs.teacher_scores is not None:
            distilled = distillation_loss(config, *paired(embeddings, b), inputs.teacher_scores, inputs.unknown)
        out = weighted(config, alignment, nce, distilled)
        parts = [part for part in out[:3] if part is not None]
        return torch.stack(parts).sum(), out.stats


# ----------------------------------------------------------------------------------------------------------------------
# Capture and replay


class Replayed:
    """A function of tensors on the device, captured for every shape of its inputs that repeats.

    Graphs share the memory of what they compute: only one runs at a time, and its result is copied out.
    """

    def __init__(self, function: Callable[[Any], Tensor], device: torch.device):
        self.function, self.device = function, device
        self.graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, Any, Tensor]] = {}
        self._met: set[tuple[Any, ...]] = set()
        self._stream: Any = None

    def __call__(self, inputs: Any) -> Tensor:
        """`function` of host tensors `inputs`."""
        key = shape_of(inputs)
        if key not in self._met:
            self._met.add(key)
            return self._run(inputs)
        if key not in self.graphs:
            self.graphs[key] = self._capture(inputs)
        graph, static, out = self.graphs[key]
        for place, x in zip(tensors_of(static), tensors_of(inputs), strict=True):
            place.copy_(x.pin_memory(), non_blocking=True)
        graph.replay()
        return out.clone()

    def _on_device(self, inputs: Any) -> Any:
        return map_tensors(lambda x: x.pin_memory().to(self.device, non_blocking=True), inputs)

    def _run(self, inputs: Any) -> Tensor:
        """On the stream that will capture: autograd remembers on which one a gradient was first accumulated."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = self.function(self._on_device(inputs))
        current.wait_stream(self._stream)
        return out.clone()

    def _capture(self, inputs: Any) -> tuple[torch.cuda.CUDAGraph, Any, Tensor]:
        static, graph = self._on_device(inputs), torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                out = self.function(static)
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graphs: got a step that cannot be captured ({error}), expected False for this model"
            ) from error
        return graph, static, out


class GraphedOptimizer:
    """accelerate's optimizer with its update captured the second time, and replayed from then on."""

    def __init__(self, optimizer: Any):
        self.optimizer: torch.optim.Optimizer = optimizer.optimizer
        self._accelerated = optimizer
        self._rates: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def zero_grad(self) -> None:
        """Nothing: the captured step begins with it, and the gradients keep their memory."""

    def step(self) -> None:
        """One update with the learning rates that the groups have now."""
        groups = self.optimizer.param_groups
        first = not self._rates
        if first:
            self._rates = [torch.empty((), device=group["params"][0].device) for group in groups]
        for rate, group in zip(self._rates, groups, strict=True):
            rate.fill_(group["lr"])
        if self._graph is not None:
            self._graph.replay()
            return
        given = [(group["lr"], group["capturable"]) for group in groups]
        for rate, group in zip(self._rates, groups, strict=True):
            group["lr"], group["capturable"] = rate, not first
        try:
            if first:
                self._accelerated.step()
            else:
                self._graph = self._capture()
                self._graph.replay()
        finally:
            for group, (rate, capturable) in zip(groups, given, strict=True):
                group["lr"], group["capturable"] = rate, capturable

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._accelerated.step()
        return graph
