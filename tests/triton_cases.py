"""What the tests of the Triton backend share: devices and dtypes to run on, and the fp64 oracle of DESIGN's rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="tl.dot on bf16 is garbage in Triton's interpreter"),
)
DTYPES = [torch.float32, torch.float16, BF16]
ROW_DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]  # of kernels that only move rows


def few(examples: int) -> settings:
    """The interpreter takes about a second a call: few examples, and none spent on shrinking a failure."""
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
