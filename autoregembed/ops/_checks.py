"""Argument checks of the ops. Every message reads `name: got A, expected B`.

Checks of dtype, device and shape never wait for a device and trace under torch.compile. Those that read values say so.
"""

from __future__ import annotations

import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping
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
        raise ValueError(f"{name}: got device {x.device}, expected the device of {like[0]}, {like[1].device}")
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


def require_number(name: str, x: Any) -> float:
    """x as a float; numpy's scalars are numbers, bools are not."""
    if isinstance(x, Tensor):
        raise TypeError(f"{name}: got a tensor, expected a number: it is fixed and gets no gradient (pass x.item())")
    if isinstance(x, bool) or not isinstance(x, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {x!r}, expected a number")
    return float(x)


def require_integer(name: str, x: Any, least: int | None = None) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: got {x!r}, expected an integer")
    if least is not None and x < least:
        raise ValueError(f"{name}: got {x}, expected {least} or more")


def require_finite(name: str, x: Any) -> float:
    x = require_number(name, x)
    if not -math.inf < x < math.inf:
        raise ValueError(f"{name}: got {x}, expected a finite number")
    return x


def require_positive(name: str, x: Any) -> float:
    number = require_number(name, x)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: got {x}, expected a positive finite number")
    return number


def require_temperature(x: Any, dtype: torch.dtype, like: Like) -> Tensor:
    """A positive number, or a tensor that holds one and may be trained, as () of `dtype` on the device of `like`.

    A bad value of a tensor raises on a CPU; on a GPU, where the check would wait, and under torch.compile it is NaN.
    """
    device = like[1].device
    if not isinstance(x, Tensor):
        return torch.full((), require_positive("temperature", x), dtype=dtype, device=device)
    if x.dtype not in FLOATS:
        raise TypeError(f"temperature: got a tensor of {x.dtype}, expected a number or a floating-point tensor")
    if x.ndim > 1 or x.numel() != 1:
        raise ValueError(f"temperature: got shape {tuple(x.shape)}, expected a number or a tensor of shape () or (1,)")
    if x.device != device:
        raise ValueError(f"temperature: got device {x.device}, expected the device of {like[0]}, {device}")
    good = (x > 0) & (x < math.inf)
    if device.type == "cpu" and not torch.compiler.is_compiling() and not bool(good):
        raise ValueError(f"temperature: got {x.item()}, expected a positive finite number")
    return x.where(good, math.nan).to(dtype).reshape(())


def require_reference(name: str, x: Any, ref_margin: str) -> None:
    """Reference scores are there where a margin reads them, and only there."""
    if (x is None) != (ref_margin == "none"):
        got, expected = ("None", "a tensor of scores") if x is None else ("scores", "None")
        raise ValueError(f"{name}: got {got}, expected {expected}, since ref_margin={ref_margin!r}")


def require_option(name: str, x: Any, options: tuple[str, ...]) -> None:
    if x not in options:
        raise ValueError(f"{name}: got {x!r}, expected {options}")


# ----------------------------------------------------------------------------------------------------------------------
# Checks that read values: on a GPU they wait for the device. Each returns its first tensor, for use in place of it.


def _graph_node(check: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`check`; under torch.compile a custom op, which stays in the graph because its result, a copy, is used."""
    schema = torch.library.infer_schema(check, mutates_args=())

    def copied(*args: Any) -> Tensor:
        return check(*args).clone()

    op = torch.library.custom_op(f"autoregembed::{check.__name__}", copied, mutates_args=(), schema=schema)
    op.register_fake(lambda *args: torch.empty_like(next(x for x in args if isinstance(x, Tensor))))

    @functools.wraps(check)
    def checked(*args: Any) -> Tensor:
        return (op if torch.compiler.is_compiling() else check)(*args)

    return checked


@_graph_node
def require_ids(name: str, x: Tensor, size: int, ignore_index: int = NOT_IGNORED) -> Tensor:
    """Every element of x (N,) lies in [0, size) or equals `ignore_index`."""
    bad = (x < 0) | (x >= size)
    if ignore_index != NOT_IGNORED:
        bad &= x != ignore_index
    if bad.any():
        row = int(bad.nonzero()[0])
        ignored = "" if ignore_index == NOT_IGNORED else f" and {ignore_index=}"
        raise IndexError(f"{name}: got id {int(x[row])} at row {row}, expected 0..{size - 1}{ignored}")
    return x


def require_bounds(cu_seqlens: Tensor, length: int) -> Tensor:
    """cu_seqlens (S+1,) rises from 0 to `length`."""
    return require_sequences(cu_seqlens, length, 0)


@_graph_node
def require_sequences(cu_seqlens: Tensor, length: int, least: int) -> Tensor:
    """Bounds (S+1,) from 0 to `length` of sequences that have at least `least` rows each."""
    bounds = cu_seqlens.tolist()
    lengths = [j - i for i, j in itertools.pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != length or any(n < 0 for n in lengths):
        raise ValueError(
            f"cu_seqlens: got {bounds[:8]}{'…' if len(bounds) > 8 else ''}, expected non-decreasing bounds "
            f"from 0 to {length}"
        )
    for place, n in enumerate(lengths):
        if n < least:
            raise ValueError(f"cu_seqlens: got {n} rows in sequence {place}, expected {least} or more")
    return cu_seqlens


@_graph_node
def require_counts(name: str, x: Tensor, least: int, meaning: str) -> Tensor:
    """Every element of x is `least` or more."""
    if (x < least).any():
        raise ValueError(f"{name}: got {int(x.min())}, expected at least {least}, {meaning}")
    return x


@_graph_node
def require_kept(
    mask: Tensor,  # (B, P) bool
    target: Tensor,  # (B,) in [0, P)
) -> Tensor:
    """The mask keeps every row's target."""
    kept = mask.gather(1, target[:, None]).squeeze(1)
    if not kept.all():
        raise ValueError(f"mask: got False for the positive of row {int((~kept).nonzero()[0])}, expected True")
    return mask
