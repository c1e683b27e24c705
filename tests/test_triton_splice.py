import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from triton_cases import DEVICE, bits, few, leaf, poisoned  # noqa: F401

from autoregembed import ops

DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
ROUTES = ["triton", "torch"]


def bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def tolerance(dtype):
    return {"rtol": 2 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
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
    expected = ops.pool_last_k(hidden, cu, k, index, impl="reference")
    assert bits(found, expected)
    grad = torch.randn(found.shape, generator=generator).to(dtype).to(DEVICE)
    (found_grad,) = torch.autograd.grad(found, hidden, grad)
    wide = leaf(hidden, torch.float64)
    (exact,) = torch.autograd.grad(ops.pool_last_k(wide, cu, k, index, impl="reference"), wide, grad.double())
    torch.testing.assert_close(found_grad.double(), exact, **tolerance(dtype))


@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@few(5)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 40),
       st.integers(0, 2), st.booleans(), st.sampled_from([1.0, 8.0]), st.integers(0, 99))  # fmt: skip
@example(extra=[1, 2, 0], k=2, d=5, offset=1, shared_z=True, scale=8.0, seed=0)
def test_splice(impl, dtype, extra, k, d, offset, shared_z, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    s, v = len(extra), 11
    cu = bounds([offset + k + n for n in extra])
    options = {"offset": offset, "embedding_scale": scale}
    b = max(1, s // 2) if shared_z else s  # some z are read twice
    z_index = torch.randint(b, (s,), generator=generator).to(DEVICE) if shared_z else None
    z = leaf(torch.randn(b, k, d, generator=generator).to(DEVICE), dtype)
    embedding = torch.randn(v, d, generator=generator).to(dtype).to(DEVICE)
    ids = torch.randint(v, (int(cu[-1]),), generator=generator).to(DEVICE)
    ids[cu[:-1].long() + offset] = -7  # places of z: never read
    found = ops.splice(z, embedding, ids, cu, z_index, **options, impl=impl)
    expected = ops.splice(z, embedding, ids, cu, z_index, **options, impl="reference")
    assert bits(found, expected)
    grad = torch.randn(found.shape, generator=generator).to(dtype).to(DEVICE)
    (found_grad,) = torch.autograd.grad(found, z, grad)
    wide = leaf(z, torch.float64)
    exact_out = ops.splice(wide, embedding.double(), ids, cu, z_index, **options, impl="reference")
    (exact,) = torch.autograd.grad(exact_out, wide, grad.double())
    if impl == "triton" or dtype in (torch.float32, torch.float64):  # torch adds 16-bit gradients in 16 bits
        torch.testing.assert_close(found_grad.double(), exact, **tolerance(dtype))


def test_wide_z_and_strided_operands():
    z = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)
    embedding = torch.randn(5, 16, device=DEVICE).half()[:, ::2]
    ids, cu = torch.arange(5, device=DEVICE).repeat(2), bounds([5, 5], torch.int64)
    found = ops.splice(z, embedding, ids, cu, impl="triton")
    assert found.dtype == torch.float16
    assert bits(found, ops.splice(z, embedding, ids, cu, impl="torch"))
    assert torch.autograd.grad(found.float().sum(), z)[0].dtype == torch.float32
    hidden = torch.randn(10, 16, device=DEVICE)[:, 3:11]
    assert bits(ops.pool_last_k(hidden, cu, 2, impl="triton"), ops.pool_last_k(hidden, cu, 2, impl="reference"))
    again = torch.randn(8, 10, device=DEVICE).t()
    assert bits(ops.pool_last_k(again, cu, 2, impl="triton"), ops.pool_last_k(again, cu, 2, impl="reference"))


def test_nothing_in_the_batch():
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    hidden = torch.randn(0, 8, device=DEVICE, requires_grad=True)
    for impl in (*ROUTES, "reference"):
        out = ops.pool_last_k(hidden, empty, 2, impl=impl)
        assert out.shape == (0, 2, 8)
        assert torch.autograd.grad(out.sum(), hidden)[0].shape == (0, 8)
        ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        spliced = ops.splice(torch.randn(0, 2, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE), ids, empty,
                             impl=impl)  # fmt: skip
        assert spliced.shape == (0, 8)


def test_bad_indices_are_nan():
    hidden = torch.randn(9, 4, device=DEVICE)
    cu = bounds([2, 3, 4])
    found = ops.pool_last_k(hidden, cu, 3, torch.tensor([0, 1, 3, -1, 2], device=DEVICE), impl="triton")
    assert found.isnan().all(2).all(1).tolist() == [True, False, True, True, False]  # the first has 2 rows, not 3
    ids = torch.tensor([0, 1, 0, 9, 1, 0, 0, -1, 4], device=DEVICE)
    z, embedding = torch.randn(2, 1, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    found = ops.splice(z, embedding, ids, cu, torch.tensor([0, 2, 1], device=DEVICE), impl="triton")
    bad = [False, False, True, True, False, False, False, True, False]
    assert found.isnan().all(1).tolist() == bad
    assert found.isnan().any(1).tolist() == bad
    found = ops.splice(z[:1], embedding, ids * 0, bounds([3, 3]), torch.tensor([0, 0], device=DEVICE), impl="triton")
    assert found.isnan().all(1).tolist() == [False] * 6 + [True] * 3  # the pack ends at 6


def test_round_trip_through_a_pack():
    """pool_last_k undoes splice where the pairs read each z once."""
    z = torch.randn(3, 2, 8, device=DEVICE)
    cu = bounds([2, 2, 2])
    ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    spliced = ops.splice(z, torch.randn(5, 8, device=DEVICE), ids, cu, torch.tensor([2, 0, 1], device=DEVICE),
                         impl="triton")  # fmt: skip
    assert bits(ops.pool_last_k(spliced, cu, 2, torch.tensor([1, 2, 0], device=DEVICE), impl="triton"), z)


def test_trainable_embedding_is_refused():
    with pytest.raises(ValueError, match=r"embedding: got one that requires grad"):
        ops.splice(torch.randn(1, 1, 4), torch.randn(5, 4, requires_grad=True), torch.zeros(2, dtype=torch.int64),
                   torch.tensor([0, 2]))  # fmt: skip


def test_opcheck():
    cu = bounds([3, 4])
    hidden = torch.randn(7, 4, device=DEVICE, requires_grad=True)
    index = torch.tensor([1, 0, 1], device=DEVICE)
    torch.library.opcheck(ops._pool_last_k, (hidden, cu, 2, index))
    torch.library.opcheck(ops._pool_last_k_backward, (torch.randn(3, 2, 4, device=DEVICE), cu, index, 7))
    z = torch.randn(2, 2, 4, device=DEVICE, requires_grad=True)
    ids = torch.zeros(7, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(ops._splice, (z, torch.randn(5, 4, device=DEVICE), ids, cu, index[:2], 0, 1.0))
    torch.library.opcheck(
        ops._splice_backward, (torch.randn(7, 4, device=DEVICE), cu, index[:2], 0, 2, 2, torch.float32)
    )
