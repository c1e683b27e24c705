"""Which rows a step reads: a pure function of seed and step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from datasets import Dataset, IterableDataset


def batches(
    rows: Dataset | IterableDataset,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    in_blocks: bool = False,
) -> Iterator[list[dict]]:
    """Endless batches of `batch_size` rows for this rank, from optimiser step `start` on.

    A map-style data set is permuted anew every epoch (by seed and epoch) and read without a break between epochs, so
    the rows of a step depend on the seed and the step alone. Each row carries its index as "row".

    in_blocks: rows that were together once stay together (`blocks`), and each row carries the index of its block as
        "block" and its place there as "place"; an epoch draws blocks in place of rows.
    """
    if isinstance(rows, IterableDataset):
        yield from _streamed(rows, batch_size, seed=seed, start=start, rank=rank, world=world)
        return
    together = blocks(len(rows), batch_size, seed) if in_blocks else []
    for step in itertools.count(start):
        if in_blocks:
            (block,) = drawn(len(together), step * world + rank, 1, seed)
            found = zip(rows.select(together[block]).to_list(), together[block], strict=True)
            yield [{**row, "row": i, "block": block, "place": place} for place, (row, i) in enumerate(found)]
            continue
        first = (step * world + rank) * batch_size
        indices = drawn(len(rows), first, batch_size, seed)
        yield [{**row, "row": i} for row, i in zip(rows.select(indices).to_list(), indices, strict=True)]


def num_steps(n: int, rows_per_step: int, epochs: float) -> int:
    """Optimiser steps of so many epochs of n rows, at least one."""
    return max(1, round(epochs * n / rows_per_step))


def blocks(n: int, size: int, seed: int) -> list[list[int]]:
    """n rows cut into blocks of `size` rows; n % size rows are in none."""
    order = permutation(n, seed, 0)
    return [order[i : i + size] for i in range(0, n - size + 1, size)]


def rows_read(n: int, batch_size: int, num_batches: int, seed: int, in_blocks: bool = False) -> list[int]:
    """Indices, of n rows, of those in the first `num_batches` batches of all processes, each once and sorted."""
    if not in_blocks:
        return sorted(set(drawn(n, 0, num_batches * batch_size, seed)))
    together = blocks(n, batch_size, seed)
    return sorted(i for block in set(drawn(len(together), 0, num_batches, seed)) for i in together[block])


def drawn(n: int, first: int, count: int, seed: int) -> list[int]:
    """Indices, of n rows, of the `count` rows that training reads from its `first`-th on."""
    return [permutation(n, seed, place // n)[place % n] for place in range(first, first + count)]


@functools.lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def _streamed(
    rows: IterableDataset, batch_size: int, *, seed: int, start: int, rank: int, world: int
) -> Iterator[list[dict]]:
    epoch, skip = 0, start * world * batch_size + rank * batch_size
    batch: list[dict] = []
    place = 0
    while True:
        shuffled = rows.shuffle(seed=seed + epoch, buffer_size=10_000)
        found = False
        for row in shuffled:
            found = True
            mine = place >= skip and (place // batch_size - rank) % world == 0
            place += 1
            if mine:
                batch.append({**row, "row": place - 1})
                if len(batch) == batch_size:
                    yield batch
                    batch = []
        if not found:
            raise ValueError("data: got no rows in the stream, expected at least one")
        if place < batch_size * world:
            raise ValueError(
                f"batch_size: got {batch_size} on each of {world} processes, expected at most {place // world} for the "
                f"{place} rows of the stream"
            )
        epoch += 1
