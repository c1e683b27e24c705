"""Every op with every option under torch.compile(fullgraph=True): one graph, the values and gradients of eager code."""

import pytest
import torch
from triton_cases import DEVICE

from autoregembed import (
    AlignmentPairs,
    alignment_loss,
    compression_loss,
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

ONE = ("auto",)
MOST = ("auto", "triton", "reference")  # opcheck and ALL hold the others
ALL = tuple(ops.available_impls(DEVICE))


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids(*values):
    return torch.tensor(values, device=DEVICE)


def some(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) < 0.6


def bounds(n, parts=3):
    """Sequences of uneven lengths with n rows in all."""
    return torch.tensor([0, *(n * i // parts for i in range(1, parts)), n], dtype=torch.int32, device=DEVICE)


def tau():
    return torch.tensor(0.3, device=DEVICE)


# name: (op of leaves and other inputs, the leaves by size n, the other inputs by size n, backends)
def head(**options):
    def inputs(n):
        return (numbers(n, 6), numbers(11, 6, seed=1)), (torch.arange(n, device=DEVICE) % 11,)

    return lambda h, w, y, impl: linear_logprob(h, w.detach(), y, impl=impl, **options), inputs


def trained_head(**options):
    def inputs(n):
        return (numbers(n, 6), numbers(11, 6, seed=1), numbers(11)), (torch.arange(n, device=DEVICE) % 11, bounds(n))

    def op(h, w, b, y, cu, impl):
        return linear_logprob(h, w, y, bias=b, cu_seqlens=cu, impl=impl, **options)

    return op, inputs


FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def contrastive(names=(), **options):
    def inputs(n):
        given = {
            "target": torch.arange(n, device=DEVICE).flip(0),
            "passage_ids": torch.arange(n + 3, device=DEVICE) % 4,
        }
        return (numbers(n, 6), numbers(n + 3, 6, seed=1), tau()), tuple(given[name] for name in names)

    def op(q, p, t, *rest):
        *rest, impl = rest
        return info_nce(q, p, temperature=t, impl=impl, **dict(zip(names, rest, strict=True)), **options)

    return op, inputs


def generative(names=(), **options):
    def inputs(n):
        mask = some(n, n + 3) | torch.eye(n, n + 3, dtype=torch.bool, device=DEVICE)
        given = {
            "target": torch.arange(n, device=DEVICE),
            "num_tokens": torch.arange(1, n + 4, device=DEVICE),
            "mask": mask,
            "passage_ids": torch.arange(n + 3, device=DEVICE) % 4,
            "marginal": numbers(n + 3),
        }
        return (numbers(n, n + 3), tau()), tuple(given[name] for name in names)

    def op(s, t, *rest):
        *rest, _ = rest
        return generative_info_nce(s, temperature=t, **dict(zip(names, rest, strict=True)), **options)

    return op, inputs


def distillation(names=(), **options):
    def inputs(n):
        given = {
            "mask": some(n, n + 3) | torch.eye(n, n + 3, dtype=torch.bool, device=DEVICE),
            "target": torch.arange(n, device=DEVICE).where(torch.arange(n, device=DEVICE) != 1, -1),
            "marginal": numbers(n + 3),
        }
        return (numbers(n, 6), numbers(n + 3, 6, seed=1), tau()), (numbers(n, n + 3), *(given[x] for x in names))

    def op(q, p, t, s, *rest):
        *rest, impl = rest
        options_ = dict(zip(names, rest, strict=True))
        return score_distillation(q, p, s, temperature=t, impl=impl, **options_, **options)

    return op, inputs


def alignment(mask=False, **options):
    def inputs(n):
        scores = [numbers(n, seed=1), numbers(n, seed=2), numbers(n, 3, seed=3)]
        return scores, (numbers(n, seed=4), numbers(n, 3, seed=5), *([some(n, 3)] if mask else []))

    def op(a, b, c, ra, rc, *rest):
        *rest, impl = rest
        return alignment_loss(a, b, c, ra, rc, negative_mask=rest[0] if rest else None, impl=impl, **options).loss

    return op, inputs


def fused(**options):
    def inputs(n):
        pairs = AlignmentPairs.in_order([1], DEVICE)
        references = numbers(1, seed=4), numbers(1, 1, seed=5)
        y = torch.arange(n, device=DEVICE) % 11
        return (numbers(n, 6),), (numbers(11, 6, seed=1), y, bounds(n), *pairs, *references)

    def op(h, w, y, cu, a, b, c, ra, rc, impl):
        return conditional_alignment(h, w, y, cu, AlignmentPairs(a, b, c), ra, rc, impl=impl, **options).loss

    return op, inputs


def compressed(**options):
    def inputs(n):
        return (numbers(n, 6),), (numbers(11, 6, seed=1), torch.arange(n, device=DEVICE) % 11)

    return lambda h, w, y, impl: conditional_compression(h, w, y, impl=impl, **options), inputs


def pooled(index):
    def inputs(n):
        return (numbers(n, 6),), (bounds(n), *([ids(2, 0, 2, 1)] if index else []))

    return lambda h, cu, *rest: pool_last_k(h, cu, 1, *rest[:-1], impl=rest[-1]), inputs


def spliced(z_index, **options):
    def inputs(n):
        rest = torch.arange(n, device=DEVICE) % 5, bounds(n), *([ids(1, 0, 1)] if z_index else [])
        return (numbers(2 if z_index else 3, 1, 6),), (numbers(5, 6, seed=1), *rest)

    return lambda z, e, i, cu, *rest: splice(z, e, i, cu, *rest[:-1], impl=rest[-1], **options), inputs


CASES = {
    "linear_logprob": (*head(), ONE),
    "linear_logprob softcap, scale, num_grad_rows": (*head(softcap=3.0, scale=0.5, num_grad_rows=3), MOST),
    "linear_logprob trained, by sequence": (*trained_head(), ALL),
    "linear_logprob trained, ignored, num_grad_rows": (*trained_head(ignore_index=2, num_grad_rows=4), ONE),
    "info_nce": (*contrastive(), ONE),
    "info_nce target, passage_ids": (*contrastive(["target", "passage_ids"]), MOST),
    "info_nce four directions, margin": (*contrastive(["target", "passage_ids"], directions=FOUR, margin=0.3), MOST),
    "info_nce symmetric": (*contrastive(directions=FOUR[::2], partition_mode="per_direction"), MOST),
    "generative_info_nce": (*generative(), ONE),
    "generative_info_nce all": (
        *generative(["target", "num_tokens", "mask", "passage_ids"], direction="both", marginal="batch"), ONE,
    ),
    "generative_info_nce queries, marginal": (*generative(["mask", "marginal"], direction="queries"), ONE),
    "score_distillation": (*distillation(), ONE),
    "score_distillation all": (*distillation(["mask", "target", "marginal"], mixture=0.4), MOST),
    "alignment_loss": (*alignment(), ONE),
    "alignment_loss mask, joint": (*alignment(True, negatives="joint", ref_margin="subtract"), MOST),
    "conditional_alignment": (*fused(logprob_reduction="mean", negatives="joint", softcap=3.0, ignore_index=2), ALL),
    "conditional_compression": (*compressed(ignore_index=2), MOST),
    "conditional_compression num_tokens": (*compressed(num_tokens=30, scale=0.5), ONE),
    "compression_loss": (
        lambda x, n, _: compression_loss(x, n), lambda n: ((numbers(n),), (torch.arange(n, device=DEVICE),)), ONE,
    ),
    "compression_loss of a total": (
        lambda x, _: compression_loss(x, 7), lambda n: ((numbers(n),), ()), ONE,
    ),
    "segment_sum": (
        lambda x, cu, impl: segment_sum(x, cu, impl=impl), lambda n: ((numbers(n),), (bounds(n),)), MOST,
    ),
    "pool_last_k": (*pooled(False), ONE),
    "pool_last_k index": (*pooled(True), MOST),
    "splice": (*spliced(False), ONE),
    "splice z_index, offset, scale": (*spliced(True, offset=1, embedding_scale=8.0), MOST),
}  # fmt: skip
PARAMETERS = [(name, impl) for name, (_, _, impls) in CASES.items() for impl in impls]


def values_and_gradients(function, inputs, n):
    leaves, rest = inputs(n)
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(*leaves, *rest)
    (out * numbers(*out.shape, seed=9)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def check(name, impl, sizes, **options):
    op, inputs, _ = CASES[name]
    if impl != "auto" and ops.available_impls(DEVICE)[impl] != "ok":
        pytest.skip(ops.available_impls(DEVICE)[impl])
    torch._dynamo.reset()
    eager = lambda *args: op(*args, impl)  # noqa: E731
    compiled = torch.compile(eager, fullgraph=True, **options)
    for n in sizes:
        found, wanted = (values_and_gradients(f, inputs, n) for f in (compiled, eager))
        assert any(x is not None and x.any() for x in wanted[1:])
        for x, y in zip(found, wanted, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "impl"), PARAMETERS)
def test_one_graph_for_any_size(name, impl):
    check(name, impl, (6, 9), dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("name", CASES)
def test_one_graph_of_static_sizes(name):
    check(name, "auto", (6,), dynamic=False, backend="aot_eager")


def test_inductor():
    check("score_distillation all", "torch", (6, 9), dynamic=True)


def test_checks_that_read_values_are_part_of_the_graph():
    """The same errors as without compilation, and no graph break for them."""
    kept = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    kept[1, 1] = False
    bad = {
        "target: got id 9": lambda x: info_nce(x, x, ids(0, 9, 1), passage_ids=ids(0, 1, 2)),
        "target: got id 5": lambda x: generative_info_nce(x[:, :5], ids(0, 5, 1)),
        "num_tokens: got 0": lambda x: generative_info_nce(x[:, :5], num_tokens=ids(1, 1, 0, 1, 1)),
        "mask: got False for the positive of row 1": lambda x: generative_info_nce(x[:, :5], mask=kept),
        "target: got id 6": lambda x: score_distillation(x, x, x[:, :3], target=ids(0, 6, 1)),
        "cu_seqlens: got": lambda x: segment_sum(x[:, 0], ids(0, 2, 5)),
        "cu_seqlens: got 1 rows in sequence 0": lambda x: pool_last_k(x, ids(0, 1, 3), 2),
        "pairs.query_positive: got id 3": lambda x: conditional_alignment(
            x, x, ids(0, 1, 2), ids(0, 1, 2, 3), (ids(3), ids(1), ids(2)[None]), ref_margin="none"
        ),
        "index: got id 2": lambda x: pool_last_k(x, ids(0, 1, 3), 1, ids(0, 2)),
        "z_index: got id 3": lambda x: splice(x[:, None], x, ids(0, 0), ids(0, 2), ids(3)),
        "ids: got id 3": lambda x: splice(x[:, None], x, ids(0, 3), ids(0, 2), ids(1)),
    }
    for message, function in bad.items():
        torch._dynamo.reset()
        with pytest.raises((IndexError, ValueError), match=f"^{message}"):
            torch.compile(function, fullgraph=True, backend="aot_eager")(numbers(3, 6))
