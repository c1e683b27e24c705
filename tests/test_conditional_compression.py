"""conditional_compression against its parts, linear_logprob and compression_loss."""

import pytest
import torch
from triton_cases import DEVICE, leaf, poisoned  # noqa: F401

from autoregembed import (
    ConditionalCompression,
    Decoder,
    compression_loss,
    conditional_compression,
    linear_logprob,
    objective,
    ops,
)
from autoregembed.testing import assert_accurate, tiny_model

IMPLS = [name for name, state in ops.available_impls(DEVICE).items() if state == "ok"]
CLOSED = [name for name in IMPLS if name != "reference"]
N, D, V = 19, 12, 37


def problem(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    target = torch.randint(V, (N,), generator=g)
    target[5] = target[9] = 3
    given = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return *(x.to(DEVICE, dtype) for x in given), target.to(DEVICE)


HEADS = {
    "plain": {},
    "softcap, bias": {"softcap": 2.0, "scale": 0.7, "bias": torch.linspace(-1, 1, V, dtype=torch.float64).to(DEVICE)},
    "ignored": {"ignore_index": 3},
}


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "cpp"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("num_tokens", [None, 30, "tensor"])
def test_equal_to_its_parts_in_float64(impl, head, num_tokens):
    hidden, weight, target = problem()
    options = HEADS[head]
    total = torch.tensor(30, device=DEVICE) if num_tokens == "tensor" else num_tokens
    counted = int((target != options.get("ignore_index", -100)).sum()) if total is None else 30
    x, y = leaf(hidden, torch.float64), leaf(hidden, torch.float64)
    found = conditional_compression(x, weight, target, num_tokens=total, **options, impl=impl)
    wanted = compression_loss(linear_logprob(y, weight, target, **options, impl="reference"), counted)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(-3 * found, x), torch.autograd.grad(-3 * wanted, y)
    assert gradients[0][0].abs().max() > 1e-2
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", CLOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_accurate(impl, dtype):
    hidden, weight, target = problem(dtype)

    def run(wide, name):
        x = leaf(hidden, wide)
        loss = conditional_compression(x, weight.to(wide), target, impl=name)
        return loss.detach(), *torch.autograd.grad(5 * loss, x)

    found, eager, exact = run(dtype, impl), run(torch.float32, "reference"), run(torch.float64, "reference")
    logit = (hidden.double() @ weight.double().T).abs().max().item()
    assert_accurate(found[0], eager[0], exact[0], max_logit=logit)
    assert found[1].dtype == dtype
    assert_accurate(found[1], eager[1], exact[1], max_logit=logit, gradient_factor=5 / N * weight.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_no_token_and_rows_that_are_ignored(impl):
    hidden, weight, target = problem(torch.float32)
    hidden[5] = torch.nan
    x = leaf(hidden, torch.float32)
    loss = conditional_compression(x, weight, target, ignore_index=3, impl=impl)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    for rows, y in ((slice(0, 0), target[:0]), (slice(0, 4), torch.full_like(target[:4], 3))):
        x = leaf(hidden[rows], torch.float32)
        loss = conditional_compression(x, weight, y, ignore_index=3, impl=impl)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, x)[0].any()


def test_bad_input():
    hidden, weight, target = problem(torch.float32)
    trained = leaf(weight, torch.float32)
    for error, message, changed in (
        (ValueError, "weight: got a head that requires grad, expected a frozen one", {"weight": trained}),
        (ValueError, "num_tokens: got -1, expected 0 or more", {"num_tokens": -1}),
        (TypeError, "num_tokens: got 2.5, expected an integer", {"num_tokens": 2.5}),
        (ValueError, r"num_tokens: got shape \(2,\), expected \(\)", {"num_tokens": target[:2]}),
        (IndexError, "target: got id 99", {"target": target.where(target != target[0], 99), "impl": "torch"}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            conditional_compression(**{"hidden": hidden, "weight": weight, "target": target, **changed})


@pytest.mark.parametrize("impl", CLOSED)
def test_opcheck(impl):
    hidden, weight, target = problem(torch.float32)
    op = torch.ops.autoregembed.conditional_compression.default
    torch.library.opcheck(op, (leaf(hidden, torch.float32), weight, target, None, None, 2.0, 0.5, 3, True, impl))
    torch.library.opcheck(op, (hidden, weight, target, target.sum(), None, None, 1.0, 3, False, impl))


def test_module():
    hidden, weight, target = problem(torch.float32)
    options = {"softcap": 2.0, "scale": 0.5, "ignore_index": 3, "impl": "torch"}
    x, bias = leaf(hidden, torch.float32), torch.ones(V, device=DEVICE)
    found = ConditionalCompression(**options)(x, weight, target, bias, 30)
    assert torch.equal(found, conditional_compression(x, weight, target, bias=bias, num_tokens=30, **options))
    assert found.requires_grad


@pytest.mark.parametrize("num_tokens", [14, torch.tensor(14, device=DEVICE)], ids=["a number", "a tensor"])
def test_the_loss_of_the_loop_is_this_op_in_one_pass_and_the_parts_in_several(num_tokens, monkeypatch):
    decoder = Decoder(tiny_model(dtype=torch.float64), bos_token_id=1).to(DEVICE)
    targets = [[5, 6, 7], [8], [9, 4]]
    z = torch.randn(3, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    called, fused = [], objective.conditional_compression
    monkeypatch.setattr(objective, "conditional_compression", lambda *x, **y: called.append(1) or fused(*x, **y))
    results = []
    for budget in (None, 9):
        x = leaf(z, torch.float64)
        loss = objective.stage1_loss(decoder, x, targets, num_tokens=num_tokens, token_budget=budget)
        results.append([loss, *torch.autograd.grad(loss, x)])
    assert called == [1]
    largest = results[0][-1].abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-5 * largest)  # the model's norms are fp32 inside
    wanted = -decoder.logprob(z, targets).sum() / 14
    torch.testing.assert_close(results[0][0].detach(), wanted, rtol=1e-12, atol=0)
