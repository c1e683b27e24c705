"""Packed batches: many token sequences end to end in one row, without padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ids = Sequence[int]
IGNORED = -100  # a label that does not count


class Lengths:
    """Numbers of tokens, as plain integers. No tuple: `torch.compile` would compile a layer anew for other ones."""

    __slots__ = ("values",)

    def __init__(self, values: Iterable[int]):
        self.values = tuple(values)

    def runs(self) -> list[tuple[int, int]]:
        """(length, how many neighbours have it), in order."""
        return [(length, len(list(run))) for length, run in itertools.groupby(self.values)]


@dataclass(frozen=True)
class Packed:
    """B sequences end to end, sorted by length so that equal lengths are neighbours."""

    ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32
    position_ids: Tensor  # (T,) int64, from 0 in every sequence
    lengths: Lengths  # of the B sequences, on the host: nobody has to ask the device for them
    sort_index: Tensor  # (B,) int64: sequence sort_index[i] of the caller lies at place i
    unsort_index: Tensor  # (B,) int64: the caller's sequence i lies at place unsort_index[i]
    host_unsort_index: Tensor  # the same on the host
    max_length: int  # no sequence is longer

    def kwargs(self) -> dict:
        """What a Transformers base model needs besides `input_ids` or `inputs_embeds`."""
        return {
            "position_ids": self.position_ids[None],
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_length,
            "max_length_k": self.max_length,
            "use_cache": False,
        }

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        """The same with `function` of every tensor that a model reads."""
        names = ("ids", "cu_seqlens", "position_ids", "sort_index", "unsort_index")
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in names}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`; the copies do not wait for what it has yet to do."""
        return self.map(lambda x: x.to(device, non_blocking=True))


class ScoredPack(NamedTuple):
    """A pack of S pairs of a z and a target, and what is scored of it."""

    packed: Packed
    owners: Tensor  # (S,) int64: the row of z of the pair at each place of the pack
    rows: Tensor  # (N,) int64: the tokens whose hidden states score
    labels: Tensor  # (N,) int64: the tokens that they score, IGNORED where that is padding
    cu_seqlens: Tensor  # (S+1,) int32: the bounds of each pair's rows

    def to(self, device: torch.device | str) -> ScoredPack:
        """The same on `device`; the copies do not wait for what it has yet to do."""
        return ScoredPack(self.packed.to(device), *(x.to(device, non_blocking=True) for x in self[1:]))


def pack(sequences: Sequence[Ids], device: torch.device | str = "cpu") -> Packed:
    """Packs non-empty id sequences.

    Raises:
        ValueError: no sequence, or an empty one.
    """
    if len(sequences) == 0:
        raise ValueError("sequences: got none, expected at least one")
    lengths = torch.tensor([len(s) for s in sequences])
    if int(lengths.min()) == 0:
        raise ValueError(f"sequences: got an empty one at {int(lengths.argmin())}, expected at least one token")
    order = lengths.argsort(stable=True)
    unsort = order.argsort()
    lengths = lengths[order]
    cu = F.pad(lengths.cumsum(0), (1, 0))
    flat = list(itertools.chain.from_iterable(sequences[i] for i in order.tolist()))
    position_ids = torch.arange(len(flat)) - cu[:-1].repeat_interleave(lengths)
    return Packed(
        ids=torch.tensor(flat, dtype=torch.int64),
        cu_seqlens=cu.int(),
        position_ids=position_ids,
        lengths=Lengths(lengths.tolist()),
        sort_index=order,
        unsort_index=unsort,
        host_unsort_index=unsort,
        max_length=int(lengths[-1]),
    ).to(device)


def index_on(device: torch.device | str, index: Sequence[int] | Tensor) -> Tensor:
    """Integers of the host (n,) as int64 on `device`; the copy does not wait for what the device has yet to do."""
    return torch.as_tensor(index, dtype=torch.int64).to(device, non_blocking=True)


def order_of(microbatches: list[list[int]], device: torch.device | str) -> Tensor:
    """Where row i lies among the rows of all micro-batches end to end, (B,) int64."""
    return index_on(device, torch.tensor(list(itertools.chain.from_iterable(microbatches))).argsort())


def make_microbatches(lengths: Sequence[int], token_budget: int | None) -> list[list[int]]:
    """Cuts a batch into micro-batches: the places of rows, longest first, at most `token_budget` tokens in each.

    A row that is longer than the budget makes a micro-batch of its own.

    Raises:
        ValueError: a budget below 1.
    """
    places = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if token_budget is None:
        return [places] if places else []
    if token_budget < 1:
        raise ValueError(f"token_budget: got {token_budget}, expected at least 1")
    microbatches: list[list[int]] = []
    room = 0
    for place in places:
        if not microbatches or lengths[place] > room:
            microbatches.append([])
            room = token_budget
        microbatches[-1].append(place)
        room -= lengths[place]
    return microbatches


def check_ids(name: str, sequences: Sequence[Ids], vocabulary: int) -> None:
    """Raises IndexError naming the first id outside [0, vocabulary), ValueError an empty sequence, TypeError others."""
    if not hasattr(sequences, "__len__"):
        raise TypeError(f"{name}: got {sequences!r}, expected a list of sequences of ids")
    for row, ids in enumerate(sequences):
        try:
            empty, low, high = len(ids) == 0, min(ids, default=0), max(ids, default=0)
            whole = low == int(low) and high == int(high)
        except (TypeError, ValueError, AttributeError, OverflowError):
            whole = False
        if not whole or isinstance(ids, str):
            raise TypeError(f"{name}: got {str(ids)[:80]!r} at {row}, expected a sequence of ids")
        if empty:
            raise ValueError(f"{name}: got an empty sequence at {row}, expected at least one token")
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"{name}: got id {low if low < 0 else high} in sequence {row}, expected 0..{vocabulary - 1}"
            )
