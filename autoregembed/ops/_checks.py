"""Argument checks of the ops. Every message reads `name: got A, expected B`.

Checks of dtype, device and shape never wait for a device and trace under torch.compile. Those that read values say so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32)

# An `ignore_index` that equals no id: every row counts.
NOT_IGNORED = -(2**63)

Like = tuple[str, Tensor]  # the name of another argument, and its value


def require_tensor(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], axes: Mapping[str, int | None], like: Like | None = None
) -> None:
    """x is a tensor of one of `dtypes`, on the device of `like`, with these axes.

    Args:
        axes: letter of each axis to its size, None for any size: {"N": None, "D": 8} is (N, 8).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {', '.join(map(str, dtypes))}")
    if like is not None and x.device != like[1].device:
        raise ValueError(f"{name}: got on {x.device}, expected the device of {like[0]}, {like[1].device}")
    # A plain loop over the axes: torch.compile traces through it with symbolic sizes.
    good = x.ndim == len(axes)
    if good:
        for found, wanted in zip(x.shape, axes.values(), strict=True):
            if wanted is not None and found != wanted:
                good = False
    if not good:
        letters = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
        sizes = ", ".join("*" if size is None else str(size) for size in axes.values())
        known = f" = ({sizes})" if any(size is not None for size in axes.values()) else ""
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {letters}{known}")


def require_same_dtype(name: str, x: Tensor, like: Like) -> None:
    if x.dtype != like[1].dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected the dtype of {like[0]}, {like[1].dtype}")


def require_cu_seqlens(x: Any, letter: str, like: Like) -> None:
    """Bounds of `letter` sequences, unread: (letter + 1,) integers."""
    require_tensor("cu_seqlens", x, INTEGERS, {f"{letter}+1": None}, like)
    if x.shape[0] == 0:
        raise ValueError(f"cu_seqlens: got shape (0,), expected ({letter}+1,) with 0 as its first element")


def require_number(name: str, x: Any) -> None:
    if not isinstance(x, (int, float)):
        raise TypeError(f"{name}: got {x!r}, expected a number")


def require_integer(name: str, x: Any, least: int | None = None) -> None:
    if not isinstance(x, int):
        raise TypeError(f"{name}: got {x!r}, expected an integer")
    if least is not None and x < least:
        raise ValueError(f"{name}: got {x}, expected {least} or more")


def require_finite(name: str, x: Any) -> None:
    require_number(name, x)
    if not -math.inf < x < math.inf:
        raise ValueError(f"{name}: got {x}, expected a finite number")


def require_positive(name: str, x: Any) -> None:
    require_number(name, x)
    if not 0 < x < math.inf:
        raise ValueError(f"{name}: got {x}, expected a positive finite number")


def require_option(name: str, x: Any, options: tuple[str, ...]) -> None:
    if x not in options:
        raise ValueError(f"{name}: got {x!r}, expected {options}")


# ----------------------------------------------------------------------------------------------------------------------
# Checks that read values: on a GPU they wait for the device.


def require_ids(name: str, x: Tensor, size: int, ignore_index: int = NOT_IGNORED) -> None:
    """Every element of x (N,) lies in [0, size) or equals `ignore_index`."""
    bad = (x < 0) | (x >= size)
    if ignore_index != NOT_IGNORED:
        bad &= x != ignore_index
    if bad.any():
        row = int(bad.nonzero()[0])
        ignored = "" if ignore_index == NOT_IGNORED else f" and {ignore_index=}"
        raise IndexError(f"{name}: got id {int(x[row])} at row {row}, expected 0..{size - 1}{ignored}")


def require_bounds(cu_seqlens: Tensor, length: int) -> None:
    """cu_seqlens (S+1,) rises from 0 to `length`."""
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != length or any(i > j for i, j in itertools.pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens: got {bounds[:8]}{'…' if len(bounds) > 8 else ''}, expected non-decreasing bounds "
            f"from 0 to {length}"
        )


def require_sequences(cu_seqlens: Tensor, length: int, least: int) -> None:
    """Bounds of sequences that have at least `least` rows each."""
    require_bounds(cu_seqlens, length)
    lengths = cu_seqlens.diff()
    if len(lengths) and int(lengths.min()) < least:
        place = int(lengths.argmin())
        raise ValueError(f"cu_seqlens: got {int(lengths[place])} rows in sequence {place}, expected {least} or more")
