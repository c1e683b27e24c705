"""generative_info_nce: the softmax over the passages that were scored."""

import pytest
import torch

from autoregembed import generative_info_nce


def some_scores(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


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


OPTIONS = {
    "num_tokens": torch.tensor([3, 9, 1, 4, 5]),
    "mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 1]]).bool(),
    "passage_ids": torch.tensor([7, 1, 7, 2, 1]),
}


@pytest.mark.parametrize("names", [(), ("num_tokens",), ("mask",), ("passage_ids",), tuple(OPTIONS)])
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
        ({"passage_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"passage_ids: got shape \(4,\)"),
    ],
)
def test_generative_info_nce_refuses(changed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        generative_info_nce(**{"scores": torch.zeros(3, 5), **changed})
