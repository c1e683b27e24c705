"""pool_last_k: the Triton and torch backends against the specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import DEVICE, ROW_DTYPES, bits, bounds, few, leaf, poisoned, tolerance  # noqa: F401

from autoregembed import ops

IMPLS = ["triton", "torch"]
OPS = torch.ops.autoregembed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ROW_DTYPES)
@few(5)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 40),
       st.sampled_from(["none", "rank", "any"]), st.integers(0, 99))  # fmt: skip
def test_pool_last_k(impl, dtype, extra, k, d, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    b = len(extra)
    cu = bounds([k + n for n in extra])
    hidden = leaf(torch.randn(int(cu[-1]), d, generator=generator).to(DEVICE), dtype)
    index = {
        "none": None,
        "rank": torch.randperm(b, generator=generator).to(DEVICE),
        "any": torch.randint(b, (b + 2,), generator=generator).to(DEVICE),  # some twice, some never
    }[kind]
    found = ops.pool_last_k(hidden, cu, k, index, impl=impl)
    assert bits(found, ops.pool_last_k(hidden, cu, k, index, impl="reference"))
    ends = cu.tolist()[1:]
    chosen = range(b) if index is None else index.tolist()
    assert bits(found, torch.stack([hidden[ends[i] - k : ends[i]] for i in chosen]))
    grad = torch.randn(found.shape, generator=generator).to(dtype).to(DEVICE)
    (found_grad,) = torch.autograd.grad(found, hidden, grad)
    wide = leaf(hidden, torch.float64)
    (exact,) = torch.autograd.grad(ops.pool_last_k(wide, cu, k, index, impl="reference"), wide, grad.double())
    torch.testing.assert_close(found_grad.double(), exact, **tolerance(dtype))


def test_strided_operands():
    cu = bounds([5, 5], torch.int64)
    hidden = torch.randn(10, 16, device=DEVICE)[:, 3:11]
    assert bits(ops.pool_last_k(hidden, cu, 2, impl="triton"), ops.pool_last_k(hidden, cu, 2, impl="reference"))
    again = torch.randn(8, 10, device=DEVICE).t()
    assert bits(ops.pool_last_k(again, cu, 2, impl="triton"), ops.pool_last_k(again, cu, 2, impl="reference"))


def test_nothing_in_the_batch():
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    hidden = torch.randn(0, 8, device=DEVICE, requires_grad=True)
    for impl in (*IMPLS, "reference"):
        out = ops.pool_last_k(hidden, empty, 2, impl=impl)
        assert out.shape == (0, 2, 8)
        assert torch.autograd.grad(out.sum(), hidden)[0].shape == (0, 8)


def test_bad_indices_are_nan():
    hidden = torch.randn(9, 4, device=DEVICE)
    cu = bounds([2, 3, 4])
    found = ops.pool_last_k(hidden, cu, 3, torch.tensor([0, 1, 3, -1, 2], device=DEVICE), impl="triton")
    assert found.isnan().all(2).all(1).tolist() == [True, False, True, True, False]  # the first has 2 rows, not 3


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("index", [None, [1, 0, 1]])
def test_gradcheck(impl, index):
    hidden = torch.randn(7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    index = None if index is None else torch.tensor(index, device=DEVICE)
    assert torch.autograd.gradcheck(lambda x: ops.pool_last_k(x, bounds([3, 4]), 2, index, impl=impl), hidden)


def test_opcheck():
    cu = bounds([3, 4])
    hidden = torch.randn(7, 4, device=DEVICE, requires_grad=True)
    index = torch.tensor([1, 0, 1], device=DEVICE)
    torch.library.opcheck(OPS.pool_last_k.default, (hidden, cu, 2, index))
    torch.library.opcheck(OPS.pool_last_k_backward.default, (torch.randn(3, 2, 4, device=DEVICE), cu, index, 7))
