"""The module twins equal the functions, option for option; compression_loss."""

import inspect

import pytest
import torch

import autoregembed
from autoregembed import (
    AlignmentLoss,
    CompressionLoss,
    InfoNCELoss,
    LinearLogprob,
    alignment_loss,
    compression_loss,
    info_nce,
    linear_logprob,
)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same(module_call, function_call, leaf):
    """Equal values and an equal, non-zero gradient of `leaf`."""
    results = []
    for call in (module_call, function_call):
        leaf.grad = None
        out = call()
        parts = list(out) if isinstance(out, tuple) else [out]
        parts[0].sum().backward()
        results.append([*(x.detach() for x in parts), leaf.grad])
    assert results[0][-1].any()
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_linear_logprob():
    hidden, weight, bias = tensors((5, 4), (7, 4), (7,))
    hidden.requires_grad_()
    target = torch.tensor([0, 6, 3, 1, 1])
    cu_seqlens = torch.tensor([0, 2, 5])
    options = {"softcap": 2.0, "scale": 0.5, "ignore_index": 3, "impl": "torch"}
    same(
        lambda: LinearLogprob(**options)(hidden, weight, target, bias, cu_seqlens),
        lambda: linear_logprob(hidden, weight, target, bias=bias, cu_seqlens=cu_seqlens, **options),
        hidden,
    )
    same(
        lambda: LinearLogprob()(hidden, weight, target),
        lambda: linear_logprob(hidden, weight, target),
        hidden,
    )


def test_alignment_loss():
    scores = tensors((4,), (4,), (4, 3), (4,), (4, 3))
    mask = torch.rand(4, 3) < 0.6
    scores[0].requires_grad_()
    options = {"beta": 0.4, "temperature": 0.3, "reference": "subtract", "negatives": "joint", "impl": "torch"}
    same(
        lambda: AlignmentLoss(**options)(*scores, mask),
        lambda: alignment_loss(*scores, negative_mask=mask, **options),
        scores[0],
    )
    same(lambda: AlignmentLoss()(*scores), lambda: alignment_loss(*scores), scores[0])


def test_info_nce():
    query, passages = tensors((3, 4), (5, 4))
    query.requires_grad_()
    target = torch.tensor([4, 0, 2])
    options = {"temperature": 0.2, "impl": "torch"}
    same(
        lambda: InfoNCELoss(**options)(query, passages, target),
        lambda: info_nce(query, passages, target, **options),
        query,
    )
    same(lambda: InfoNCELoss()(query, passages), lambda: info_nce(query, passages), query)


@pytest.mark.parametrize(
    ("module", "function"),
    [(LinearLogprob, linear_logprob), (AlignmentLoss, alignment_loss), (InfoNCELoss, info_nce)],
)
def test_every_option_of_the_function_with_its_default(module, function):
    """Keyword-only options of the function are the module's, or tensors of its forward."""
    options = {k: p for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    constructor = inspect.signature(module).parameters
    forward = inspect.signature(module.forward).parameters
    for name, parameter in options.items():
        if name in forward:
            assert forward[name].default is parameter.default
        else:
            assert constructor[name].default == parameter.default


def test_compression_loss():
    """Nats per token: long targets weigh more than short ones."""
    logprob = torch.tensor([-6.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    for num_tokens in (torch.tensor([3, 4, 1]), 8, torch.tensor(8)):
        logprob.grad = None
        loss = compression_loss(logprob, num_tokens)
        assert loss.item() == pytest.approx(9 / 8)
        loss.backward()
        assert torch.equal(logprob.grad, torch.full((3,), -1 / 8, dtype=torch.float64))
        assert torch.equal(CompressionLoss()(logprob, num_tokens), loss)


@pytest.mark.parametrize("num_tokens", [0, torch.zeros(0, dtype=torch.int64)])
def test_compression_loss_of_nothing(num_tokens):
    logprob = torch.zeros(0, requires_grad=True)
    loss = compression_loss(logprob, num_tokens)
    assert loss.item() == 0
    loss.backward()
    assert logprob.grad.shape == (0,)


def test_public_names():
    assert all(hasattr(autoregembed, name) for name in autoregembed.__all__)
