import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import DEVICE, few, leaf, poisoned  # noqa: F401

from autoregembed import alignment_loss, reference
from autoregembed.testing import assert_accurate

REF_MARGINS, NEGATIVES = ["add", "subtract", "none"], ["independent", "joint"]


def scores(b, m, seed, spread=30.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * spread).to(DEVICE)

    mask = torch.rand(b, m, generator=generator) < 0.6
    return draw(b), draw(b), draw(b, m), draw(b), draw(b, m), mask.to(DEVICE)


def specification(dtype, a, b, c, ra, rc, mask, **options):
    leaves = [leaf(x, dtype) for x in (a, b, c)]
    out = reference.alignment_loss(*leaves, ra.to(dtype), rc.to(dtype), mask=mask, **options)
    return [*(x.detach() for x in out), *torch.autograd.grad(out[0], leaves, allow_unused=True)]


def check(a, b, c, ra, rc, mask, **options):
    leaves = [leaf(x, torch.float32) for x in (a, b, c)]
    references = (None, None) if options.get("ref_margin") == "none" else (ra, rc)
    out = alignment_loss(*leaves, *references, negative_mask=mask, impl="triton", **options)
    gradients = torch.autograd.grad(out.loss, leaves)
    exact = specification(torch.float64, a, b, c, ra, rc, mask, **options)
    eager = specification(torch.float32, a, b, c, ra, rc, mask, **options)
    # |x| ≤ 1/τ goes into softplus; its rounding moves the loss by eps·|x| and a gradient by the fraction eps·|x|.
    x = 1 / options.get("temperature", 0.1)
    for found, f32, f64 in zip([*out, *gradients], eager, exact, strict=True):
        # From x = 37 on the fp64 oracle has σ(x) = 1 and slope 0, the kernel still e^−x: room for 5e-15.
        factor = max(f64.abs().max().item(), 1e-9) if f64.numel() else 0.0
        assert_accurate(found.detach(), f32, f64, max_logit=x, gradient_factor=factor)


@pytest.mark.parametrize("reference_", REF_MARGINS)
@pytest.mark.parametrize("negatives", NEGATIVES)
@few(4)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.sampled_from([0.1, 1.0]), st.integers(0, 99))
def test_loss_gradients_and_statistics(reference_, negatives, b, m, ragged, beta, seed):
    *given_, mask = scores(b, m, seed)
    options = {"ref_margin": reference_, "negatives": negatives, "beta": beta, "temperature": 0.1}
    check(*given_, mask if ragged else None, **options)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_values_without_a_negative_are_never_read(negatives):
    a, b, c, ra, rc, mask = scores(6, 3, 0)
    mask[2] = False
    expected = alignment_loss(a, b, c, ra, rc, negative_mask=mask, negatives=negatives, impl="triton")
    c[~mask], rc[~mask] = torch.nan, torch.inf
    leaves = [leaf(x, torch.float32) for x in (a, b, c)]
    found = alignment_loss(*leaves, ra, rc, negative_mask=mask, negatives=negatives, impl="triton")
    assert [x.item() for x in found] == [x.item() for x in expected]
    gradients = torch.autograd.grad(found.loss, leaves)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[2][~mask] == 0).all()
    assert (gradients[0][2] == 0) & (gradients[1][2] == 0)


def test_equal_scores_and_huge_ones():
    a, b, c, ra, rc, _ = scores(5, 2, 1)
    check(a, a.clone(), c, ra, rc, None)  # |a − b| has no slope at 0, as in eager
    check(a * 1e4, b * 1e4, c * 1e4, ra, rc, None)


def test_small_losses_keep_their_digits():
    """softplus(x) for x ≪ 0 is e^x: log(1 + e^x) in fp32 would be 0."""
    a = torch.zeros(3, device=DEVICE)
    c = torch.full((3, 2), -200.0, device=DEVICE)
    for negatives in NEGATIVES:
        check(a, a.clone(), c, a, c * 0, None, negatives=negatives, temperature=0.02)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_no_pair_at_all(negatives):
    for b, m in ((0, 3), (4, 0)):
        a, p, c, ra, rc, _ = scores(b, m, 0)
        a.requires_grad_()
        out = alignment_loss(a, p, c, ra, rc, negatives=negatives, impl="triton")
        assert out.loss.item() == 0
        (grad,) = torch.autograd.grad(out.loss, a)
        assert grad.shape == (b,)
        assert (grad == 0).all()
    a, p, c, ra, rc, mask = scores(4, 2, 0)
    out = alignment_loss(a, p, c, ra, rc, negative_mask=torch.zeros_like(mask), negatives=negatives, impl="triton")
    assert out.loss.item() == 0
    assert out.accuracy.item() == 0


def test_float64_and_sixteen_bits():
    a, b, c, ra, rc, _ = scores(7, 3, 2)
    exact = alignment_loss(*(x.double() for x in (a, b, c, ra, rc)), impl="reference")
    found = alignment_loss(*(x.double() for x in (a, b, c, ra, rc)), impl="triton")
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)
    half = [x.half() for x in (a, b, c, ra, rc)]
    assert_accurate(
        alignment_loss(*half, impl="triton").loss,
        alignment_loss(*(x.float() for x in half), impl="reference").loss,
        alignment_loss(*(x.double() for x in half), impl="reference").loss,
    )


def test_upstream_gradient_and_second_backward():
    a, b, c, ra, rc, _ = scores(4, 2, 3)
    leaves = [leaf(x, torch.float32) for x in (a, b, c)]
    out = alignment_loss(*leaves, ra, rc, impl="triton")
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    again = torch.autograd.grad(-3 * out.loss, leaves)
    for x, y in zip(first, again, strict=True):
        torch.testing.assert_close(y, -3 * x)
    assert not any(x.requires_grad for x in (out.s1, out.s2, out.accuracy))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    a, b, c, ra, rc, mask = scores(4, 2, 3)
    leaves = [leaf(x, torch.float32) for x in (a, b, c)]
    arguments = (*leaves, ra, rc, mask if masked else None, 0.1, 0.1, "add", "joint")
    torch.library.opcheck(torch.ops.autoregembed.alignment_loss.default, arguments)
