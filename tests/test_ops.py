"""The module twins equal the functions, option for option; the public names."""

import inspect

import pytest
import torch

import autoregembed
from autoregembed import (
    AlignmentLoss,
    ConditionalAlignment,
    ConditionalCompression,
    GenerativeInfoNCELoss,
    InfoNCELoss,
    LinearLogprob,
    PoolLastK,
    ScoreDistillationLoss,
    SegmentSum,
    Splice,
    alignment_loss,
    conditional_alignment,
    conditional_compression,
    generative_info_nce,
    info_nce,
    linear_logprob,
    ops,
    pool_last_k,
    score_distillation,
    segment_sum,
    splice,
)

GENERATIVE = {
    "num_tokens": torch.tensor([3, 9, 1, 4, 5]),
    "mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool(),
    "passage_ids": torch.tensor([7, 1, 7, 2, 1]),
}


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
    options = {
        "temperature": 0.2, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction",
        "margin": 0.3, "impl": "torch",
    }  # fmt: skip
    same(
        lambda: InfoNCELoss(**options)(query, passages, target),
        lambda: info_nce(query, passages, target, **options),
        query,
    )
    same(lambda: InfoNCELoss()(query, passages), lambda: info_nce(query, passages), query)


def test_generative_info_nce():
    (scores,) = tensors((3, 5))
    scores.requires_grad_()
    target, options = torch.tensor([2, 0, 4]), GENERATIVE
    same(
        lambda: GenerativeInfoNCELoss(temperature=0.3, direction="both")(scores, target, *options.values(), "batch"),
        lambda: generative_info_nce(scores, target, temperature=0.3, direction="both", marginal="batch", **options),
        scores,
    )
    same(lambda: GenerativeInfoNCELoss()(scores), lambda: generative_info_nce(scores), scores)


def test_segment_sum():
    (x,) = tensors((7,))
    cu_seqlens = torch.tensor([0, 3, 3, 7])
    for impl in ("auto", "reference"):
        same(lambda i=impl: SegmentSum(impl=i)(x, cu_seqlens), lambda i=impl: segment_sum(x, cu_seqlens, impl=i),
             x.requires_grad_())  # fmt: skip


def test_pool_last_k():
    (hidden,) = tensors((7, 4))
    cu_seqlens, index = torch.tensor([0, 3, 7]), torch.tensor([1, 0, 1])
    same(
        lambda: PoolLastK(2, impl="torch")(hidden, cu_seqlens, index),
        lambda: pool_last_k(hidden, cu_seqlens, 2, index, impl="torch"),
        hidden.requires_grad_(),
    )
    same(lambda: PoolLastK(3)(hidden, cu_seqlens), lambda: pool_last_k(hidden, cu_seqlens, 3), hidden)


def test_splice():
    z, embedding = tensors((2, 2, 4), (6, 4))
    z.requires_grad_()
    inputs = (z, embedding, torch.arange(7) % 6, torch.tensor([0, 3, 7]))
    options = {"offset": 1, "embedding_scale": 2.0, "impl": "torch"}
    z_index = torch.tensor([1, 1])
    same(lambda: Splice(**options)(*inputs, z_index), lambda: splice(*inputs, z_index, **options), z)
    same(lambda: Splice()(*inputs), lambda: splice(*inputs), z)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (LinearLogprob, linear_logprob),
        (AlignmentLoss, alignment_loss),
        (InfoNCELoss, info_nce),
        (GenerativeInfoNCELoss, generative_info_nce),
        (SegmentSum, segment_sum),
        (ScoreDistillationLoss, score_distillation),
        (ConditionalAlignment, conditional_alignment),
        (ConditionalCompression, conditional_compression),
        (PoolLastK, pool_last_k),
        (Splice, splice),
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


def test_public_names():
    for module in (autoregembed, ops):
        assert all(hasattr(module, name) for name in module.__all__)
