import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, few, leaf, poisoned  # noqa: F401

from autoregembed import info_nce, ops, reference
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.kernels.triton import info_nce as kernels
from autoregembed.kernels.triton import primitives
from autoregembed.testing import EPS32, assert_accurate


def problem(b, p, d, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(b, d, generator=generator) * scale).to(dtype)
    passages = torch.randn(p, d, generator=generator).to(dtype)
    target = torch.randint(p, (b,), generator=generator)
    ids = torch.randint(max(1, p // 2), (p,), generator=generator)
    return [x.to(DEVICE) for x in (q, passages, target, ids)]


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ALL[::2], "partition_mode": "per_direction"}


def check(q, p, target, ids, temperature=0.05, **options):
    options = {"temperature": temperature, "passage_ids": ids, **options}
    results = {}
    for dtype in (torch.float64, torch.float32):
        leaves = leaf(q, dtype), leaf(p, dtype)
        loss = reference.info_nce(*leaves, target, **options)
        results[dtype] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    leaves = leaf(q, q.dtype), leaf(p, p.dtype)
    loss = info_nce(*leaves, target, **options, impl="triton")
    gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        scored = info_nce(q, p, target, **options, impl="triton")
    largest = 1 / temperature
    exact, eager = results[torch.float64], results[torch.float32]
    for found in (loss.detach(), scored):
        assert found.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
        assert_accurate(found, eager[0], exact[0], max_logit=largest)
    # Operands of the gradient GEMMs are rounded to 16 bits: eps of the largest summand, 1/(B τ |x|), before what lies
    # along x is taken away. A row has one from each half.
    rounding = 0.0 if q.element_size() > 2 else torch.finfo(q.dtype).eps / (4 * EPS32)
    halves = 2 if len(options.get("directions", ())) > 1 else 1
    for found, f32, f64, x in zip(gradients, eager[1:], exact[1:], (q, p), strict=True):
        shortest = x.double().norm(dim=1).min().item()
        assert found.dtype == q.dtype
        factor = halves * largest / (len(q) * shortest)
        assert_accurate(found, f32, f64, max_logit=largest + rounding, gradient_factor=factor)


@pytest.mark.parametrize("dtype", DTYPES)
@few(4)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@example(9, 40, 16, True, 0)
def test_loss_and_both_gradients(dtype, b, p, d, duplicates, seed):
    q, passages, target, ids = problem(b, p, d, dtype, seed)
    check(q, passages, target, ids if duplicates else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_real_temperatures_and_lengths(dtype):
    q, passages, target, ids = problem(9, 40, 24, dtype, scale=30.0)
    check(q, passages, target, ids, temperature=0.01)
    check(q, passages, target, None, temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few(3)
@example(9, 31, 12, {*ALL[1:]}, False, True, 0.1, 1)
@example(5, 40, 12, {ALL[2]}, False, False, None, 2)
@given(
    st.integers(1, 19), st.integers(1, 70), st.integers(1, 40), st.sets(st.sampled_from(ALL[1:])), st.booleans(),
    st.booleans(), st.sampled_from([None, 0.1, -0.2]), st.integers(0, 99),
)  # fmt: skip
def test_directions_and_margin(dtype, b, p, d, more, symmetric, duplicates, margin, seed):
    q, passages, target, ids = problem(b, p, d, dtype, seed)
    more = {"directions": tuple(x for x in ALL if x == ALL[0] or x in more)}
    check(q, passages, target, ids if duplicates else None, **(SYMMETRIC if symmetric else more), margin=margin)


@pytest.mark.parametrize("p", [40, 1030])  # below and above 1024 columns the shift lies elsewhere
@pytest.mark.parametrize("options", [{}, {"directions": ALL, "margin": 1.9}], ids=str)
def test_improbable_positives(p, options):
    """Rows whose positive is far below the maximum leave the range of bf16 and are redone; their neighbours stay."""
    q, passages, target, _ = problem(7, p, 16, torch.float32)
    for row, angle in enumerate((-1.0, -0.9, -0.5, 0.0, 0.5, 0.99, 1.0)):
        other = passages[(target[row] + 1) % p]
        q[row] = other / other.norm()
        passages[target[row]] = angle * q[row] + (1 - abs(angle)) * 0.3 * passages[target[row]]
    for temperature in (0.012, 0.004) if p < 1024 else (0.004,):
        check(q.bfloat16(), passages.bfloat16(), target, None, temperature, **options)


def test_a_margin_in_a_large_batch():
    """From 1024 columns on the shift is not the positive itself: the margin counts from the positive all the same."""
    q, passages, target, _ = problem(5, 1030, 16, torch.bfloat16)
    check(q, passages, target, None, margin=0.1)


def test_float16_and_float64_have_no_directions():
    for dtype in (torch.float16, torch.float64):
        q, passages, target, _ = problem(3, 5, 8, dtype)
        for options in ({"directions": ALL}, {"margin": 0.1}):
            with pytest.raises(ops.ImplUnavailable, match=f"directions and margin in bfloat16 and .* got {dtype}"):
                info_nce(q, passages, target, impl="triton", **options)


def test_directions_in_chunks_of_rows_agree(monkeypatch):
    q, passages, target, ids = problem(24, 40, 12, torch.float32)
    tau = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    for options in ({"directions": ALL}, {"directions": ALL[:3]}, SYMMETRIC):
        leaves = leaf(q, torch.float32), leaf(passages, torch.float32), tau
        whole = info_nce(*leaves[:2], target, temperature=tau, passage_ids=ids, impl="triton", **options)
        expected = torch.autograd.grad(whole, leaves)
        with monkeypatch.context() as patch:
            patch.setattr(torch_kernels, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 8 * 64 * 4))
            patch.setattr(torch_kernels, "CHUNK_ROWS", 8)
            loss = info_nce(*leaves[:2], target, temperature=tau, passage_ids=ids, impl="triton", **options)
            for x, y in zip((loss, *torch.autograd.grad(loss, leaves)), (whole, *expected), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_halves_with_the_same_columns_are_one_launch():
    """Launches are counted where nothing runs: on the meta device."""
    q, passages = (torch.empty(n, 64, device="meta", dtype=torch.bfloat16) for n in (512, 512))
    y, tau = torch.empty(512, device="meta", dtype=torch.int64), torch.empty((), device="meta")
    for directions, gemms in ((ALL[:1], 1), (ALL[:2], 1), (ALL, 1), ((ALL[0], ALL[3]), 1), (ALL[:3], 2)):
        launched = []
        with primitives.recording(lambda kernel, *_: launched.append(kernel.__name__)):  # noqa: B023
            kernels.forward(q, passages, y, None, tau, True, True, False, ",".join(directions))
        assert launched.count("_emit_cosine") == gemms, directions
        assert launched.count("_finish_cosine") == 1


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
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"directions": ALL})):
        leaves = leaf(q, dtype), leaf(passages, dtype)
        loss = info_nce(*leaves, target, impl="triton", **options)
        assert loss.isnan()
        assert torch.autograd.grad(loss, leaves)[0][2].isnan().all()


def test_upstream_gradient_and_second_backward():
    q, passages, target, _ = problem(4, 9, 8, torch.float32)
    leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
    loss = info_nce(*leaves, target, impl="triton")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(2.5 * loss, leaves)
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(y, 2.5 * x)


@pytest.mark.parametrize(
    ("duplicates", "mode"),
    [(False, (ALL[0], False, None)), (True, (",".join(ALL), False, 0.1)), (False, (",".join(ALL[::2]), True, None))],
)
def test_opcheck(duplicates, mode):
    q, passages, target, ids = problem(4, 9, 8, torch.float32)
    tau = torch.tensor(0.05, device=DEVICE, requires_grad=True)
    op, ids = torch.ops.autoregembed.info_nce.default, ids if duplicates else None
    for impl in ("triton", "torch"):
        leaves = leaf(q, torch.float32), leaf(passages, torch.float32)
        torch.library.opcheck(op, (*leaves, target, ids, tau, True, True, True, *mode, impl))
        torch.library.opcheck(op, (q, passages, target, ids, tau.detach(), False, False, False, *mode, impl))
