"""segment_sum: every backend that runs here against float64, and the promises of its docstring."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import DEVICE, few, leaf, poisoned  # noqa: F401

from autoregembed import ops, segment_sum

IMPLS = ["triton", "torch", "reference"]
OPS = torch.ops.autoregembed
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def bounds(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@few(6)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99))
def test_accurate(impl, dtype, lengths, seed):
    cu = bounds(0, *itertools.accumulate(lengths))
    generator = torch.Generator().manual_seed(seed)
    x = leaf(torch.randn(sum(lengths), generator=generator).to(DEVICE), dtype)
    sums = segment_sum(x, cu, impl=impl)
    assert sums.dtype == dtype
    exact = torch.stack([x.detach()[i:j].double().sum() for i, j in itertools.pairwise(cu.tolist())] or [x.sum()])
    eps = torch.finfo(dtype).eps
    if lengths and (dtype in (torch.float32, torch.float64) or impl != "reference"):  # that one adds 16 bits in steps
        torch.testing.assert_close(sums.double(), exact.double(), rtol=2 * eps, atol=40 * torch.finfo(x.dtype).eps)
    upstream = torch.randn(len(lengths), generator=generator).to(DEVICE, dtype)
    (grad,) = torch.autograd.grad(sums, x, upstream)
    assert torch.equal(grad, upstream.repeat_interleave(cu.diff()))


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_and_their_gradient(impl):
    x = torch.randn(40, device=DEVICE, requires_grad=True)
    cu = bounds(0, 0, 3, 40, 40)
    sums = segment_sum(x, cu, impl=impl)
    expected = torch.stack([x[:0].sum(), x[:3].double().sum(), x[3:].double().sum(), x[:0].sum()])
    torch.testing.assert_close(sums.double(), expected.double(), rtol=0, atol=2e-6)
    (grad,) = torch.autograd.grad(sums, x, torch.tensor([5.0, 2.0, -3.0, 7.0], device=DEVICE))
    assert grad.tolist() == [2.0] * 3 + [-3.0] * 37
    alone = segment_sum(x[3:], bounds(0, 37), impl=impl)
    assert alone[0] == sums[2]  # the same text alone and in a pack: the same bits


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    x = torch.randn(7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, bounds(0, 2, 2, 7), impl=impl), x)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_double_backward_is_refused(impl):
    x = torch.randn(5, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(segment_sum(x, bounds(0, 5), impl=impl).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]])
def test_nothing_to_add(impl, cu):
    x = torch.zeros(0, device=DEVICE, requires_grad=True)
    sums = segment_sum(x, bounds(*cu), impl=impl)
    assert sums.tolist() == [0.0] * (len(cu) - 1)
    assert torch.autograd.grad(sums.sum(), x)[0].shape == (0,)


BAD_BOUNDS = [[1, 3, 8], [0, 5, 3, 8], [0, 3, 9], [0, 3, 7], [0, -2, 8]]


@pytest.mark.parametrize("cu", BAD_BOUNDS)
def test_bad_bounds_are_nan(cu):
    """On the Triton backend, which does not wait for the bounds."""
    x = torch.ones(8, device=DEVICE, requires_grad=True)
    sums = segment_sum(x, torch.tensor(cu, device=DEVICE), impl="triton")
    assert sums.isnan().any()
    assert torch.autograd.grad(sums.sum(), x)[0].shape == (8,)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("cu", [*BAD_BOUNDS, [0]])
def test_bad_bounds_are_refused(impl, cu):
    with pytest.raises(ValueError, match=r"^cu_seqlens: got \[.*expected non-decreasing bounds from 0 to 8"):
        segment_sum(torch.ones(8, device=DEVICE), torch.tensor(cu, device=DEVICE), impl=impl)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: got list, expected torch.Tensor"),
        ({"x": torch.ones(3).long()}, TypeError, "x: got dtype torch.int64"),
        ({"x": torch.ones(3, 1)}, ValueError, r"x: got shape \(3, 1\), expected \(N,\)"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens: got list"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens: got dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 3]])}, ValueError, r"cu_seqlens: got shape \(1, 2\), expected \(S\+1,\)"),
        ({"cu_seqlens": torch.zeros(0).long()}, ValueError, r"cu_seqlens: got shape \(0,\)"),
        ({"cu_seqlens": torch.zeros(2, device="meta").long()}, ValueError, "cu_seqlens: got device meta"),
        ({"impl": "cuda"}, ValueError, "impl: got 'cuda', expected 'auto', "),
        ({"impl": "cpp"}, ops.ImplUnavailable, "impl='cpp' cannot run on cpu: this op has no such kernel"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        segment_sum(**{"x": torch.ones(3), "cu_seqlens": torch.tensor([0, 3]), **changed})


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(impl, dtype):
    cu = bounds(0, 2, 2, 5, dtype=dtype)
    torch.library.opcheck(OPS.segment_sum.default, (torch.randn(5, device=DEVICE, requires_grad=True), cu, impl))
    torch.library.opcheck(OPS.segment_sum_backward.default, (torch.randn(3, device=DEVICE), cu, 5, impl))
