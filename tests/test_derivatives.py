"""Gradients: what an op does not have raises, and what does not count never reaches one, on every backend."""

import pytest
import torch
from torch.autograd import forward_ad
from triton_cases import DEVICE

from autoregembed import (
    AlignmentPairs,
    Decoder,
    alignment_loss,
    conditional_alignment,
    conditional_compression,
    info_nce,
    linear_logprob,
    pool_last_k,
    score_distillation,
    segment_sum,
    splice,
)
from autoregembed.ops import available_impls
from autoregembed.testing import tiny_model


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


# Every op with a backend of its own, as a function of one tensor. Where a backend is plain PyTorch, autograd has every
# derivative.
W, B, C, SCORES = numbers(11, 6, seed=1), numbers(3), numbers(3, 2), 5 * numbers(4, 11)
EVERY = ("triton", "cpp", "torch")
CASES = {
    "linear_logprob": (lambda x, impl: linear_logprob(x, W, ids(0, 3, 10, 5), impl=impl), (4, 6), EVERY),
    "linear_logprob of a trained head": (
        lambda w, impl: linear_logprob(W[:4], w, ids(0, 3, 4, 1), impl=impl), (5, 6), EVERY,
    ),
    "linear_logprob of a trained bias": (
        lambda b, impl: linear_logprob(W[:4], W, ids(0, 3, 4, 1), bias=b, impl=impl), (11,), EVERY,
    ),
    "linear_logprob by sequence": (
        lambda x, impl: linear_logprob(x, W, ids(0, 3, 10, 5), cu_seqlens=ids(0, 1, 4), impl=impl), (4, 6),
        EVERY,
    ),
    "conditional_alignment": (
        lambda x, impl: conditional_alignment(
            x, W, ids(0, 3, 10, 5), ids(0, 1, 2, 4), AlignmentPairs(ids(0), ids(1), ids(2)[None]), ref_margin="none",
            impl=impl,
        ).loss[None], (4, 6), EVERY,
    ),
    "conditional_compression": (
        lambda x, impl: conditional_compression(x, W, ids(0, 3, 10, 5), impl=impl)[None], (4, 6), EVERY,
    ),
    "segment_sum": (lambda x, impl: segment_sum(x, ids(0, 2, 5), impl=impl), (5,), ("triton", "torch")),
    "alignment_loss": (
        lambda a, impl: alignment_loss(a, B, C, ref_margin="none", impl=impl).loss[None], (3,),
        ("triton",),
    ),
    "info_nce": (lambda q, impl: info_nce(q, W, impl=impl)[None], (4, 6), EVERY),
    "info_nce of passages": (lambda p, impl: info_nce(W[:3], p, impl=impl)[None], (5, 6), EVERY),
    "info_nce of its temperature": (
        lambda t, impl: info_nce(W[:3], W, temperature=t.abs() + 0.1, impl=impl)[None], (1,), EVERY,
    ),
    "score_distillation": (
        lambda q, impl: score_distillation(q, W, SCORES, impl=impl)[None], (4, 6), ("triton", "torch"),
    ),
    "score_distillation of passages": (
        lambda p, impl: score_distillation(W[:3], p, SCORES[:3, :5], impl=impl)[None], (5, 6), ("triton", "torch"),
    ),
    "pool_last_k": (lambda x, impl: pool_last_k(x, ids(0, 2, 5), 2, impl=impl), (5, 6), ("triton",)),
    "splice": (lambda z, impl: splice(z, W, ids(0, 0, 1, 0, 0), ids(0, 3, 5), impl=impl), (2, 2, 6), ("triton",)),
}  # fmt: skip
PARAMETERS = [(name, impl) for name, (_, _, impls) in CASES.items() for impl in impls]


def op_of(name: str, impl: str):
    function, shape, _ = CASES[name]
    if available_impls(DEVICE)[impl] != "ok":
        pytest.skip(available_impls(DEVICE)[impl])
    return lambda x: function(x, impl), numbers(*shape, seed=3)


@pytest.mark.parametrize(("name", "impl"), PARAMETERS)
def test_a_second_derivative_raises_and_is_not_wrong(name, impl):
    """The upstream gradient is a constant, and the op's input is no leaf: nothing else would notice."""
    op, x = op_of(name, impl)
    leaf = x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^\w+: got a backward with create_graph.*impl='reference'"):
        torch.autograd.grad(op(torch.tanh(leaf)).sum(), leaf, create_graph=True)
    (gradient,) = torch.autograd.grad(op(torch.tanh(leaf)).sum(), leaf)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("name", "impl"), PARAMETERS)
def test_forward_mode_and_transforms_raise(name, impl):
    op, x = op_of(name, impl)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        op(forward_ad.make_dual(x, torch.ones_like(x)))
    for transform in (
        lambda: torch.func.jvp(op, (x,), (torch.ones_like(x),)),
        lambda: torch.func.jacfwd(op)(x),
        lambda: torch.func.grad(lambda y: op(y).sum())(x),
        lambda: torch.func.vjp(op, x),
        lambda: torch.func.jacrev(op)(x),
    ):
        with pytest.raises(NotImplementedError, match=rf"^{name.split()[0]}: got an input of .*impl='reference'"):
            transform()


@pytest.mark.parametrize("name", CASES)
def test_the_specification_has_what_the_message_promises(name):
    function, shape, _ = CASES[name]
    x = numbers(*shape, seed=3).double()
    if name in ("segment_sum", "pool_last_k", "splice"):
        x = x.float()
    op = lambda y: function(y.float(), "reference")  # noqa: E731
    step = 1e-2
    tangent = torch.func.jvp(op, (x,), (torch.ones_like(x),))[1]
    finite = (op(x + step) - op(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, finite.to(tangent.dtype), rtol=5e-2, atol=5e-3)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(op(torch.tanh(leaf)).square().sum(), leaf, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), leaf)[0].abs().max() > 0


def test_scores_of_several_passes_have_no_second_derivative():
    decoder = Decoder(tiny_model())
    z = torch.randn(3, 2, 32, requires_grad=True)
    scores = decoder.logprob(torch.tanh(z), [[5, 6], [7], [8, 9]], token_budget=4)
    with pytest.raises(NotImplementedError, match=r"^Decoder\.logprob"):
        torch.autograd.grad(scores.sum(), z, create_graph=True)
    (gradient,) = torch.autograd.grad(decoder.logprob(torch.tanh(z), [[5], [7], [8]], token_budget=4).sum(), z)
    assert gradient.abs().max() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Rows that do not count

HEADS = [impl for impl, state in available_impls(DEVICE).items() if state == "ok"]


def head(impl: str, hidden: torch.Tensor, target: torch.Tensor, trained: bool, **options):
    """logprob and the gradients of hidden, weight and bias (None where they are frozen)."""
    leaves = [hidden.clone().requires_grad_(), *(x.clone().requires_grad_(trained) for x in (W, numbers(11, seed=7)))]
    out = linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], impl=impl, **options)
    (out * numbers(*out.shape, seed=9)).sum().backward()
    return out.detach(), *(x.grad for x in leaves)


@pytest.mark.parametrize("impl", HEADS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_an_ignored_row_holds_reaches_nothing(impl, trained, filler, softcap):
    hidden, target = numbers(5, 6, seed=4), ids(1, -100, 3, -100, 10)
    wanted = head(impl, hidden, target, trained, softcap=softcap)
    hidden[target == -100] = filler
    found = head(impl, hidden, target, trained, softcap=softcap)
    for x, y in zip(found, wanted, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.abs().max() > 0
            assert torch.equal(x, y)


@pytest.mark.parametrize("impl", HEADS)
@pytest.mark.parametrize("count", [0, 2, 5])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 3, 5)])
def test_rows_that_are_scored_only_reach_no_gradient(impl, count, cu_seqlens):
    hidden, target = numbers(5, 6, seed=4), ids(1, 0, 3, 7, 10)
    bounds = None if cu_seqlens is None else ids(*cu_seqlens)
    out, *found = head(impl, hidden, target, True, num_grad_rows=count, cu_seqlens=bounds)
    leaves = [x.double().requires_grad_() for x in (hidden[:count], W, numbers(11, seed=7))]
    rows = linear_logprob(*leaves[:2], target[:count], bias=leaves[2], impl="reference")
    upstream = numbers(*out.shape, seed=9).double()
    if cu_seqlens is not None:
        upstream = upstream.repeat_interleave(bounds.diff())
    wanted = torch.autograd.grad((rows * upstream[:count]).sum(), leaves)
    assert not found[0][count:].any()
    for x, y in zip((found[0][:count], *found[1:]), wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)
