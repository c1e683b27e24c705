"""splice: the Triton and torch backends against the specification."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from triton_cases import DEVICE, ROW_DTYPES, bits, bounds, few, leaf, poisoned, tolerance  # noqa: F401

from autoregembed import ops

IMPLS = ["triton", "torch"]
OPS = torch.ops.autoregembed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", ROW_DTYPES)
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
    assert bits(found, ops.splice(z, embedding, ids, cu, z_index, **options, impl="reference"))
    rows = []
    for (start, end), i in zip(itertools.pairwise(cu.tolist()), range(s) if z_index is None else z_index, strict=True):
        before, after = ids[start : start + offset], ids[start + offset + k : end]
        rows += [embedding[before] * scale, z[i], embedding[after] * scale]
    assert bits(found, torch.cat(rows))
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


def test_nothing_in_the_batch():
    empty = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for impl in (*IMPLS, "reference"):
        ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        spliced = ops.splice(torch.randn(0, 2, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE), ids, empty,
                             impl=impl)  # fmt: skip
        assert spliced.shape == (0, 8)


def test_bad_indices_are_nan():
    cu = bounds([2, 3, 4])
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


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("z_index", [None, [1, 1]])
def test_gradcheck(impl, z_index):
    z = torch.randn(2, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    embedding = torch.randn(5, 3, dtype=torch.float64, device=DEVICE)
    ids, cu = torch.arange(7, device=DEVICE) % 5, bounds([3, 4])
    z_index = None if z_index is None else torch.tensor(z_index, device=DEVICE)
    options = {"offset": 1, "embedding_scale": 3.0, "impl": impl}
    assert torch.autograd.gradcheck(lambda z: ops.splice(z, embedding, ids, cu, z_index, **options), z)


def test_opcheck():
    cu, z_index = bounds([3, 4]), torch.tensor([1, 0], device=DEVICE)
    z = torch.randn(2, 2, 4, device=DEVICE, requires_grad=True)
    ids = torch.zeros(7, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(OPS.splice.default, (z, torch.randn(5, 4, device=DEVICE), ids, cu, z_index, 0, 1.0))
    torch.library.opcheck(
        OPS.splice_backward.default, (torch.randn(7, 4, device=DEVICE), cu, z_index, 0, 2, 2, torch.float32)
    )
