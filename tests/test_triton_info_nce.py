import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, few, leaf, poisoned  # noqa: F401

from autoregembed import info_nce, reference
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.testing import assert_accurate


def problem(b, p, d, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(b, d, generator=generator) * scale).to(dtype)
    passages = torch.randn(p, d, generator=generator).to(dtype)
    target = torch.randint(p, (b,), generator=generator)
    ids = torch.randint(max(1, p // 2), (p,), generator=generator)
    return [x.to(DEVICE) for x in (q, passages, target, ids)]


def check(q, p, target, ids, temperature=0.05):
    results = {}
    for dtype in (torch.float64, torch.float32):
        leaves = leaf(q, dtype), leaf(p, dtype)
        loss = reference.info_nce(*leaves, target, temperature=temperature, passage_ids=ids)
        results[dtype] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    leaves = leaf(q, q.dtype), leaf(p, p.dtype)
    loss = info_nce(*leaves, target, temperature=temperature, passage_ids=ids, impl="triton")
    gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        scored = info_nce(q, p, target, temperature=temperature, passage_ids=ids, impl="triton")
    largest = 1 / temperature
    exact, eager = results[torch.float64], results[torch.float32]
    for found in (loss.detach(), scored):
        assert found.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        assert_accurate(found, eager[0], exact[0], max_logit=largest)
    for found, f32, f64, x in zip(gradients, eager[1:], exact[1:], (q, p), strict=True):
        shortest = x.double().norm(dim=1).min().item()
        assert found.dtype == q.dtype
        # Operands of the two gradient GEMMs are rounded to 16 bits: eps of the largest summand, 1/(B τ |x|).
        assert_accurate(found, f32, f64, max_logit=largest, gradient_factor=largest / (len(q) * shortest))


@pytest.mark.parametrize("dtype", DTYPES)
@few(4)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_loss_and_both_gradients(dtype, b, p, d, duplicates, seed):
    q, passages, target, ids = problem(b, p, d, dtype, seed)
    check(q, passages, target, ids if duplicates else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_temperatures_and_lengths(dtype):
    q, passages, target, ids = problem(9, 40, 24, dtype, scale=30.0)
    check(q, passages, target, ids, temperature=0.01)
    check(q, passages, target, None, temperature=1.0)


def test_float64():
    q, passages, target, ids = problem(5, 20, 12, torch.float64)
    check(q, passages, target, ids)
    loss = info_nce(q, passages, target, temperature=0.07, impl="triton")
    torch.testing.assert_close(loss, reference.info_nce(q, passages, target, temperature=0.07), rtol=1e-13, atol=1e-13)


def test_duplicates_are_no_negatives():
    q, passages, _, _ = problem(4, 4, 8, torch.float32)
    ids = torch.arange(4, device=DEVICE)
    plain = info_nce(q, passages, impl="triton")
    again = torch.cat([passages, passages[:2]])
    for impl in ("triton", "torch", "reference"):
        masked = info_nce(q, again, passage_ids=torch.cat([ids, ids[:2]]), impl=impl)
        # Queries 0 and 1 do not see their positive twice; 2 and 3 see both copies, as they should.
        assert masked > plain
        full = info_nce(q, again, impl=impl)
        assert masked < full
        first_two = info_nce(q[:2], again, passage_ids=torch.cat([ids, ids[:2]]), impl=impl)
        torch.testing.assert_close(first_two, info_nce(torch.cat([q[:1], q[1:2]]), again, impl=impl,
                                   passage_ids=torch.cat([ids, ids[:2]])))  # fmt: skip
    alone = info_nce(q[:1], passages, impl="triton")
    copied = info_nce(q[:1], again[[0, 1, 2, 3, 4]], passage_ids=torch.tensor([0, 1, 2, 3, 0], device=DEVICE),
                      impl="triton")  # fmt: skip
    torch.testing.assert_close(copied, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch"])
def test_the_torch_backend_masks_too(impl):
    q, passages, target, ids = problem(9, 30, 12, torch.float32)
    results = []
    for name in (impl, "reference"):
        leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
        loss = info_nce(*leaves, target, passage_ids=ids, impl=name)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_chunks_of_rows_agree(monkeypatch):
    q, passages, target, ids = problem(24, 40, 12, torch.float32)
    leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
    whole = info_nce(*leaves, target, passage_ids=ids, impl="triton")
    expected = torch.autograd.grad(whole, leaves)
    monkeypatch.setattr(torch_kernels, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 8 * 48 * 4))
    monkeypatch.setattr(torch_kernels, "CHUNK_ROWS", 8)
    loss = info_nce(*leaves, target, passage_ids=ids, impl="triton")
    for x, y in zip((loss, *torch.autograd.grad(loss, leaves)), (whole, *expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_only_one_side_trained():
    q, passages, target, _ = problem(5, 9, 8, torch.float32)
    both = leaf(q, torch.float32), leaf(passages, torch.float32)
    expected = torch.autograd.grad(info_nce(*both, target, impl="triton"), both)
    (found,) = torch.autograd.grad(info_nce(both[0], passages, target, impl="triton"), both[0])
    torch.testing.assert_close(found, expected[0])
    (found,) = torch.autograd.grad(info_nce(q, both[1], target, impl="triton"), both[1])
    torch.testing.assert_close(found, expected[1])


def test_zero_vector_and_bad_target():
    q, passages, target, _ = problem(4, 9, 8, torch.float32)
    q[1] = 0
    loss = info_nce(q, passages, target, impl="triton")
    torch.testing.assert_close(loss, reference.info_nce(q, passages, target))
    target[2] = 9
    assert info_nce(q, passages, target, impl="triton").isnan()
    leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
    loss = info_nce(*leaves, target, impl="triton")
    assert torch.autograd.grad(loss, leaves)[0][2].isnan().all()


def test_upstream_gradient_and_second_backward():
    q, passages, target, _ = problem(4, 9, 8, torch.float32)
    leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
    loss = info_nce(*leaves, target, impl="triton")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(2.5 * loss, leaves)
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(y, 2.5 * x)


@pytest.mark.parametrize("duplicates", [False, True])
def test_opcheck(duplicates):
    q, passages, target, ids = problem(4, 9, 8, torch.float32)
    tau = torch.tensor(0.05, device=DEVICE, requires_grad=True)
    op, ids = torch.ops.autoregembed.info_nce.default, ids if duplicates else None
    for impl in ("triton", "torch"):
        leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
        torch.library.opcheck(op, (*leaves, target, ids, tau, True, True, True, impl))
        torch.library.opcheck(op, (q, passages, target, ids, tau.detach(), False, False, False, impl))
