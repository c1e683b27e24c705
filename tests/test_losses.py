"""The module twins equal the functions, option for option; compression_loss."""

import inspect

import pytest
import torch

import autoregembed
from autoregembed import (
    AlignmentLoss,
    CompressionLoss,
    GenerativeInfoNCELoss,
    InfoNCELoss,
    LinearLogprob,
    alignment_loss,
    compression_loss,
    generative_info_nce,
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
    options = {"beta": 0.4, "temperature": 0.3, "ref_margin": "subtract", "negatives": "joint", "impl": "torch"}
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
    [
        (LinearLogprob, linear_logprob),
        (AlignmentLoss, alignment_loss),
        (InfoNCELoss, info_nce),
        (GenerativeInfoNCELoss, generative_info_nce),
    ],
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


# ----------------------------------------------------------------------------------------------------------------------
# generative_info_nce


def by_hand(scores, target, temperature, num_tokens=None, mask=None, passage_ids=None):
    """One query and one passage after the other."""
    terms = []
    for i, row in enumerate(scores):
        y = int(target[i])
        kept = [
            j
            for j in range(len(row))
            if (mask is None or mask[i, j])
            and (j == y or passage_ids is None or int(passage_ids[j]) != int(passage_ids[y]))
        ]
        logits = torch.stack([row[j] / (temperature * (1 if num_tokens is None else int(num_tokens[j]))) for j in kept])
        terms.append(-logits.log_softmax(0)[kept.index(y)])
    return torch.stack(terms).mean()


GENERATIVE = {
    "num_tokens": torch.tensor([3, 9, 1, 4, 5]),
    "mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool(),
    "passage_ids": torch.tensor([7, 1, 7, 2, 1]),
}


@pytest.mark.parametrize("names", [(), ("num_tokens",), ("mask",), ("passage_ids",), tuple(GENERATIVE)])
def test_generative_info_nce_is_the_softmax_over_scored_passages(names):
    options = {name: GENERATIVE[name] for name in names}
    target = torch.tensor([2, 0, 4])
    exact = (-40 * tensors((3, 5))[0].double().abs()).requires_grad_()
    wanted = by_hand(exact, target, 0.7, **options)
    (gradient,) = torch.autograd.grad(wanted, exact)
    assert gradient.abs().max() > 0.05
    broken = exact.detach() if "mask" not in names else exact.detach().where(GENERATIVE["mask"], torch.nan)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        scores = broken.detach().to(dtype).requires_grad_()
        loss = generative_info_nce(scores, target, temperature=0.7, **options)
        loss.backward()
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(scores.grad.double(), gradient, rtol=tolerance, atol=tolerance)
    assert torch.autograd.gradcheck(lambda s: generative_info_nce(s, target, **options), exact)


def test_generative_info_nce_module_and_defaults():
    scores = tensors((3, 5))[0].requires_grad_()
    target = torch.tensor([2, 0, 4])
    same(
        lambda: GenerativeInfoNCELoss(temperature=0.3)(scores, target, *GENERATIVE.values()),
        lambda: generative_info_nce(scores, target, temperature=0.3, **GENERATIVE),
        scores,
    )
    same(lambda: GenerativeInfoNCELoss()(scores), lambda: generative_info_nce(scores), scores)
    nothing = torch.zeros(0, 4, requires_grad=True)
    loss = generative_info_nce(nothing)
    loss.backward()
    assert (loss.item(), nothing.grad.shape) == (0, (0, 4))
    assert generative_info_nce(tensors((2, 2))[0].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": torch.zeros(3)}, ValueError, r"scores: got shape \(3,\), expected \(B, P\)"),
        ({"scores": torch.zeros(3, 2)}, ValueError, "scores: got P = 2, expected P ≥ B = 3"),
        ({"scores": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "scores: got dtype torch.int64"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, expected a positive finite number"),
        ({"target": torch.tensor([0, 5, 1])}, IndexError, "target: got id 5 at row 1, expected 0..4"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target: got shape \(2,\), expected \(B,\) = \(3\)"),
        ({"num_tokens": torch.tensor([1, 2, 0, 1, 1])}, ValueError, "num_tokens: got 0, expected at least 1"),
        ({"num_tokens": torch.ones(5)}, TypeError, "num_tokens: got dtype torch.float32"),
        ({"mask": torch.zeros(3, 5, dtype=torch.bool)}, ValueError, "mask: got False for the positive of row 0"),
        ({"passage_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"passage_ids: got shape \(4,\)"),
    ],
)
def test_generative_info_nce_refuses(changed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        generative_info_nce(**{"scores": torch.zeros(3, 5), **changed})


def test_public_names():
    assert all(hasattr(autoregembed, name) for name in autoregembed.__all__)
