"""What the tests of the Triton backend share: devices and dtypes to run on, and the fp64 oracle of DESIGN's rule."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROW_DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]  # of kernels that only move rows


def emulate_bfloat16() -> None:
    """Makes `tl.dot` of Triton's interpreter right for bf16, which it holds as integers and multiplies as such.

    The operands become fp32, exactly; products and sums are then fp32's.
    """
    from triton.runtime import interpreter

    tl = interpreter.tl
    create_dot = interpreter.InterpreterBuilder.create_dot
    if hasattr(create_dot, "__wrapped__"):
        return

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    @functools.wraps(create_dot)
    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot


if DEVICE == "cpu":
    emulate_bfloat16()


def few(examples: int) -> Any:
    """The interpreter takes about a second a call: few examples, and none spent on shrinking a failure."""
    from hypothesis import HealthCheck, Phase, settings

    return settings(
        max_examples=examples,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@pytest.fixture(autouse=True)
def poisoned():
    """Every torch.empty is NaN, so that an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_()


def bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN included."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def bounds(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens of sequences with these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
