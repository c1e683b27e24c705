"""generative_info_nce: the softmax over the passages that were scored."""

import pytest
import torch

from autoregembed import generative_info_nce


def some_scores(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_hand(scores, target, temperature, num_tokens=None, mask=None, passage_ids=None, direction="passages",
            marginal="none"):  # fmt: skip
    """One query and one passage after the other."""
    b, p = scores.shape
    kept = [[mask is None or bool(mask[i, j]) for j in range(p)] for i in range(b)]
    same = lambda j, k: j == k or (passage_ids is not None and int(passage_ids[j]) == int(passage_ids[k]))  # noqa: E731
    x = [[None] * p for _ in range(b)]
    for j in range(p):
        width = temperature * (1 if num_tokens is None else int(num_tokens[j]))
        level = {i: scores[i, j] / width for i in range(b) if kept[i][j]}
        if isinstance(marginal, torch.Tensor):
            level = {i: v - marginal[j] / width for i, v in level.items()}
        elif marginal == "batch" and level:
            level = {i: v - torch.stack(list(level.values())).logsumexp(0) for i, v in level.items()}
        for i, v in level.items():
            x[i][j] = v
    passages, queries = [], []
    for i in range(b):
        y = int(target[i])
        row = [x[i][j] for j in range(p) if kept[i][j] and (j == y or not same(j, y))]
        column = [x[k][y] for k in range(b) if kept[k][y] and (k == i or not same(int(target[k]), y))]
        passages.append(torch.stack(row).logsumexp(0) - x[i][y])
        queries.append(torch.stack(column).logsumexp(0) - x[i][y])
    means = torch.stack(passages).mean(), torch.stack(queries).mean()
    return {"passages": means[0], "queries": means[1], "both": sum(means) / 2}[direction]


OPTIONS = {
    "num_tokens": torch.tensor([3, 9, 1, 4, 5]),
    "mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool(),
    "passage_ids": torch.tensor([7, 1, 7, 2, 1]),
    "direction": "both",
    "marginal": "batch",
}
CHOICES = [
    (), ("num_tokens",), ("mask",), ("passage_ids",), ("direction",), ("marginal",), ("marginal", "mask"),
    ("direction", "passage_ids"), ("direction", "num_tokens", "mask"), tuple(OPTIONS),
]  # fmt: skip


@pytest.mark.parametrize("names", CHOICES)
def test_generative_info_nce_is_the_softmax_over_scored_passages(names):
    options = {name: OPTIONS[name] for name in names}
    target = torch.tensor([2, 0, 4])
    exact = (-40 * some_scores(3, 5).double().abs()).requires_grad_()
    wanted = by_hand(exact, target, 0.7, **options)
    (gradient,) = torch.autograd.grad(wanted, exact)
    assert gradient.abs().max() > 0.05
    broken = exact.detach() if "mask" not in names else exact.detach().where(OPTIONS["mask"], torch.nan)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        scores = broken.detach().to(dtype).requires_grad_()
        loss = generative_info_nce(scores, target, temperature=0.7, **options)
        loss.backward()
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(scores.grad.double(), gradient, rtol=tolerance, atol=tolerance)
    assert torch.autograd.gradcheck(lambda s: generative_info_nce(s, target, **options), exact)


@pytest.mark.parametrize("direction", ["passages", "queries", "both"])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_given_marginal_and_two_queries_of_one_passage(direction, tokens):
    """Another query with the same positive is no negative of the passage, and the marginal cancels in its column."""
    scores, target = -40 * some_scores(4, 5).double().abs(), torch.tensor([2, 0, 2, 4])
    options = {"direction": direction, "num_tokens": OPTIONS["num_tokens"] if tokens else None}
    given = {"marginal": -20 * some_scores(5).double().abs(), **options}
    found = generative_info_nce(scores, target, **given)
    torch.testing.assert_close(found, by_hand(scores, target, 1.0, **given), rtol=1e-12, atol=1e-12)
    plain = generative_info_nce(scores, target, **options)
    assert torch.allclose(found, plain, rtol=1e-10, atol=1e-12) == (direction == "queries")


def test_the_batch_marginal_and_columns_forget_how_likely_a_passage_is():
    scores, likely = -40 * some_scores(3, 5).double().abs(), 100 * some_scores(5).double()
    for options in ({"marginal": "batch"}, {"direction": "queries"}, {"marginal": "batch", "direction": "both"}):
        plain, shifted = generative_info_nce(scores, **options), generative_info_nce(scores + likely, **options)
        torch.testing.assert_close(shifted, plain, rtol=1e-10, atol=1e-11)
    assert (generative_info_nce(scores + likely) - generative_info_nce(scores)).abs() > 1


def test_nothing_to_score():
    nothing = torch.zeros(0, 4, requires_grad=True)
    loss = generative_info_nce(nothing)
    loss.backward()
    assert (loss.item(), nothing.grad.shape) == (0, (0, 4))


def test_sixteen_bits_are_widened():
    assert generative_info_nce(some_scores(2, 2).bfloat16()).dtype == torch.float32


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
        ({"direction": "columns"}, ValueError, "direction: got 'columns', expected"),
        ({"marginal": "memory"}, ValueError, "marginal: got 'memory', expected"),
        ({"marginal": torch.zeros(3)}, ValueError, r"marginal: got shape \(3,\), expected \(P,\) = \(5\)"),
        ({"passage_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"passage_ids: got shape \(4,\)"),
    ],
)
def test_generative_info_nce_refuses(changed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        generative_info_nce(**{"scores": torch.zeros(3, 5), **changed})
