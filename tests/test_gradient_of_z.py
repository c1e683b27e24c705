"""The gradient of z, through a whole decoder, is as near as rounding the head's gradient to its dtype leaves it.

The rule of `assert_accurate` holds each element of U, the head's gradient, and is blind to errors that share a
direction: the decoder's layers add them up. Dropping small entries of E = onehot(y) − softmax(Z) makes such errors
(bench/NOTES.md).
"""

import pytest
import torch

from autoregembed import Decoder
from autoregembed.ops import linear_logprob
from autoregembed.ops._dispatch import available_impls
from autoregembed.testing import assert_accurate, tiny_model

HEADS = [impl for impl, state in available_impls(torch.device("cpu")).items() if state == "ok" and impl != "triton"]
K, VOCABULARY, WIDTH = 5, 4096, 64


def decoder(common: float = 0.0) -> Decoder:
    """Random, with logits as large as those of a trained model: its probabilities are neither flat nor one-hot.

    The rows of a trained head have a direction in common. It cancels in U as long as the entries of a row of E add up
    to zero.
    """
    model = tiny_model(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, dtype=torch.float64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight *= 2
        model.lm_head.weight += common * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    return Decoder(model, bos_token_id=1, z_norm="match_rms")


def case_of(common: float = 0.0) -> tuple:
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 14, 6, 11, 11, 20)]
    z = torch.randn(3, K, WIDTH, dtype=torch.float64, generator=generator)
    upstream = torch.randn(6, dtype=torch.float64, generator=generator)
    return decoder(common), z, targets, [0, 0, 1, 1, 2, 2], upstream


def gradient(case, head) -> torch.Tensor:
    """d Σ upstream · score / dz, where `head(hidden, weight, labels, upstream of each row)` gives that of hidden."""
    model, z, targets, owners, upstream = case
    z = z.clone().requires_grad_()

    def fused(hidden, weight, labels, *, packed, cu_seqlens, **_):
        scale = upstream[packed.sort_index].repeat_interleave(cu_seqlens.diff().long())
        u = head(hidden.detach(), weight, labels, scale)
        return (hidden * u.double()).sum()

    return torch.autograd.grad(model.run(z, targets, owners, None, fused), z)[0]


def exact(hidden, weight, labels, scale):
    """U of the specification, in float64."""
    hidden = hidden.double().requires_grad_()
    logprob = linear_logprob(hidden, weight.double(), labels, impl="reference")
    return torch.autograd.grad((logprob * scale).sum(), hidden)[0]


def dropping(mass):
    """U without the entries of softmax that make up the last `mass` of each row."""

    def head(hidden, weight, labels, scale):
        p = (hidden @ weight.T).softmax(-1)
        ordered, order = p.sort(descending=True)
        keep = torch.empty_like(p, dtype=torch.bool).scatter(1, order, ordered.cumsum(-1) - ordered < 1 - mass)
        e = torch.zeros_like(p).scatter(1, labels[:, None], 1.0) - p * keep
        return scale[:, None] * (e @ weight)

    return head


def distance(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def case():
    return case_of()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [head for head in HEADS if head != "reference"])
def test_the_gradient_of_z_is_as_near_as_rounding_u_leaves_it(case, impl, dtype):
    rounded = lambda x: x.to(dtype)  # noqa: E731
    wanted = gradient(case, lambda h, w, y, s: exact(rounded(h), rounded(w), y, s))

    def head(impl):
        def run(hidden, weight, labels, scale):
            hidden = rounded(hidden).requires_grad_()
            logprob = linear_logprob(hidden, rounded(weight), labels, impl=impl)
            return torch.autograd.grad((logprob * scale).sum(), hidden)[0]

        return distance(gradient(case, run), wanted)

    rounding = distance(gradient(case, lambda h, w, y, s: exact(rounded(h), rounded(w), y, s).bfloat16()), wanted)
    # In fp32 what rounds is the sums of the GEMMs, as they do in eager PyTorch.
    bound = 1.5 * rounding if dtype == torch.bfloat16 else 2 * head("reference")
    assert bound <= 1.5 * rounding
    assert 0 < head(impl) <= bound


def test_a_head_that_drops_small_entries_is_caught_here_and_not_by_its_elements():
    case, found = case_of(common=1.0), {}
    heads = {"exact": exact, "rounded": lambda *x: exact(*x).bfloat16(), "dropping": dropping(0.006)}
    for name, head in heads.items():
        u = []
        z = gradient(case, lambda *x, head=head, u=u: u.append(head(*x)) or u[0])
        found[name] = u[0].double(), z
    u, z = found["exact"]
    assert distance(gradient(case, dropping(0)), z) < 1e-9
    assert_accurate(found["dropping"][0].bfloat16(), u.float(), u)
    off = {name: distance(gradient, z) for name, (_, gradient) in found.items()}
    assert off["dropping"] > 3 * off["rounded"], off
