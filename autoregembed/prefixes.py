"""Sequences of a pack that begin alike run their common prefix once: bos and the K rows of one z before its targets.

Whatever works token by token (norms, linear layers, rope, experts) reads each distinct token once. Attention alone
reads a sequence as a whole: there the prefix's keys and values stand before those of every sequence that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoregembed.packing import make_microbatches

# Of the tokens; below it, the copies of queries, keys and values cost more than is saved.
_WORTH_SHARING = 15 / 16


class SharedPrefixes(NamedTuple):
    """How the U distinct tokens of a pack of T make up the pack; each prefix is run with the first that has it."""

    kept: Tensor  # (U,) int64: the places of the pack that are run
    source: Tensor  # (T,) int64: the run token that stands at each place
    repeated: Tensor  # (C,) int64: the run tokens that stand at several places
    places: Tensor  # (R, C) int64: all places of each
    exists: Tensor | None  # (R, C) bool, False where a token has fewer than R places; None: each has R
    cu_seqlens: Tensor  # (S+1,) int32: the bounds of what is run of every sequence


def share_prefixes(
    lengths: Sequence[int], owners: Sequence[int], prefix: int, device: torch.device | str = "cpu"
) -> SharedPrefixes | None:
    """For `pack` of sequences of which those of one owner begin with the same tokens; None where no two do.

    Args:
        lengths: tokens of each sequence, in the order that `pack` is given, above `prefix`.
        owners: an integer each.
        prefix: how many tokens are common.
        device: of the indices.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")  # as `pack` sorts
    sizes = np.asarray(lengths)[order]
    _, first, group, count = np.unique(
        np.asarray(owners)[order], return_index=True, return_inverse=True, return_counts=True
    )
    if len(count) == len(order):
        return None
    cu = np.concatenate([[0], sizes.cumsum()])
    sequence = np.repeat(np.arange(len(sizes)), sizes)  # (T,)
    within = np.arange(cu[-1]) - cu[sequence]
    carries = first[group] == np.arange(len(sizes))  # (S,)
    runs = (within >= prefix) | carries[sequence]
    row = runs.cumsum() - 1
    source = np.where(runs, row, row[cu[first[group]][sequence] + np.minimum(within, prefix - 1)])
    run = sizes - np.where(carries, 0, prefix)
    # Sequences by owner, those with company alone: (G, R) of them, filled up with the first.
    members = np.argsort(group, kind="stable")
    begin = np.concatenate([[0], count.cumsum()])[:-1]
    shared = count > 1
    nth = np.arange(count.max())[:, None]
    exists = nth < count[shared]
    chosen = members[begin[shared] + np.where(exists, nth, 0)]
    places = (cu[chosen][..., None] + np.arange(prefix)).reshape(len(nth), -1)

    def on(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).to(device, non_blocking=True)

    return SharedPrefixes(
        kept=on(runs.nonzero()[0]),
        source=on(source),
        repeated=on(row[places[0]]),
        places=on(places),
        exists=None if exists.all() else on(np.repeat(exists, prefix, 1), torch.bool),
        cu_seqlens=on(np.concatenate([[0], run.cumsum()]), torch.int32),
    )


class _Spread(torch.autograd.Function):
    """A token's row at each of its places. The backward gathers and adds in a fixed order, where a scatter would need
    atomics; it is made of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrefixes) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        parts = grad.index_select(0, shared.places.flatten()).unflatten(0, shared.places.shape)
        if shared.exists is not None:
            parts = parts.masked_fill(~shared.exists.view(*shared.exists.shape, *(1,) * (grad.ndim - 1)), 0)
        own = grad.index_select(0, shared.kept)
        return own.index_copy(0, shared.repeated, parts.sum(0)), None


class _Select(torch.autograd.Function):
    """The rows of the places that are run; the gradient of the others is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedPrefixes) -> Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape = len(ctx.shared.source), *grad.shape[1:]
        return grad.new_zeros(shape).index_copy(0, ctx.shared.kept, grad), None


def spread(x: Tensor, shared: SharedPrefixes) -> Tensor:
    """Rows of the tokens that are run (U, ...) to those of the whole pack (T, ...); gradients of one token add up."""
    return _Spread.apply(x, shared)


def select(x: Tensor, shared: SharedPrefixes) -> Tensor:
    """Rows of the whole pack (T, ...) to those of the tokens that are run (U, ...)."""
    return _Select.apply(x, shared)


def make_shared_microbatches(
    lengths: Sequence[int], owners: Sequence[int], prefix: int, token_budget: int | None
) -> list[list[int]]:
    """`make_microbatches` that keeps the sequences of one owner together and counts their prefix once in each part.

    Args:
        lengths, owners, prefix: as in `share_prefixes`.
        token_budget: as in `make_microbatches`; the sequences of one owner are parted where they exceed it.

    Raises:
        ValueError: a budget below 1.
    """
    if token_budget is None or token_budget < 1:
        return make_microbatches(lengths, token_budget)
    groups: dict[int, list[int]] = {}
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        groups.setdefault(owners[place], []).append(place)
    own = [length - prefix for length in lengths]
    microbatches: list[list[int]] = []
    room = 0
    for group in sorted(groups.values(), key=lambda group: -sum(own[i] for i in group)):
        whole = prefix + sum(own[i] for i in group)
        here = room < whole <= token_budget  # begins a part of its own
        begun = False
        for place in group:
            if here or not microbatches or own[place] + (0 if begun else prefix) > room:
                microbatches.append([])
                room, begun, here = token_budget, False, False
            microbatches[-1].append(place)
            room -= own[place] + (0 if begun else prefix)
            begun = True
    return microbatches


def choose_passes(
    lengths: Sequence[int],
    owners: Sequence[int],
    prefix: int,
    token_budget: int | None,
    share: bool | None,
    *,
    with_gradient: bool,
) -> tuple[list[list[int]], bool]:
    """The sequences of each pass, and whether those of one owner share their prefix.

    Args:
        lengths, owners, prefix: as in `share_prefixes`.
        token_budget: as in `make_microbatches`.
        share: True, False, or None: where it takes less time.
        with_gradient: a gradient is wanted of every sequence's result, whose upstream is not known in the pass.

    Raises:
        ValueError: a budget below 1.
    """
    separate = make_microbatches(lengths, token_budget)
    if share is False or len(set(owners)) == len(owners):
        return separate, False
    shared = make_shared_microbatches(lengths, owners, prefix, token_budget)
    repeats = sum(len(part) - len({owners[i] for i in part}) for part in shared)
    cost = 1 - prefix * repeats / sum(lengths)
    # Separate passes have their backward at once, one number a pair later. With a shared prefix these numbers must be
    # known first: several passes run again for that, and three times the tokens stand beside twice as many.
    worth = 2 / 3 if with_gradient and len(shared) > 1 else _WORTH_SHARING
    return (shared, True) if share or cost < worth else (separate, False)


def pass_tokens(lengths: Sequence[int], owners: Sequence[int], prefix: int, share: bool | None) -> int:
    """Tokens that one pass over all these sequences runs; arguments as in `choose_passes`."""
    _, shared = choose_passes(lengths, owners, prefix, None, share, with_gradient=True)
    return sum(lengths) - (prefix * (len(owners) - len(set(owners))) if shared else 0)
