"""compression_loss: nats per token over whole targets."""

import pytest
import torch

from autoregembed import CompressionLoss, compression_loss


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


@pytest.mark.parametrize("num_tokens", [8, torch.tensor([3, 4, 1])])
def test_gradcheck(num_tokens):
    logprob = torch.tensor([-6.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: compression_loss(x, num_tokens), logprob)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logprob": [1.0]}, TypeError, "logprob: got list, expected torch.Tensor"),
        ({"logprob": torch.ones(3).long()}, TypeError, "logprob: got dtype torch.int64"),
        ({"logprob": torch.ones(3, 2)}, ValueError, r"logprob: got shape \(3, 2\), expected \(S,\)"),
        ({"num_tokens": "many"}, TypeError, "num_tokens: got 'many', expected a number"),
    ],
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=f"^{message}"):
        compression_loss(**{"logprob": torch.zeros(3), "num_tokens": 5, **changed})
