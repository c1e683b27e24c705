"""The numeric rule and tensor cores: right results pass at any depth, and seeded bugs do not."""

import functools

import pytest
import torch

from autoregembed.testing import assert_accurate

N, V = 16, 2000


def toward_zero(x):
    """float64 to the fp32 numbers that a tensor core keeps: cut off, not rounded."""
    y = x.float()
    return torch.where(y.double().abs() > x.abs(), torch.nextafter(y, torch.zeros_like(y)), y)


def tensor_core_logits(h, w, depth=16):
    """h wᵀ in fp32: exact sums of `depth` products, each added to the fp32 sum so far and cut off."""
    h, w = h.double(), w.double()
    total = torch.zeros(len(h), len(w))
    for k in range(0, h.shape[1], depth):
        total = toward_zero(total.double() + h[:, k : k + depth] @ w[:, k : k + depth].T)
    return total


@functools.cache
def problem(d, *, top=40.0, seed=0):
    """Rows that point at some column, as a language model's do: the largest logits are near `top`."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(V, d, generator=g) / d**0.5
    pull = torch.randint(V, (N,), generator=g)
    h = 3.5 * torch.randn(N, d, generator=g) + torch.linspace(0.1, 1, N)[:, None] * top * w[pull]
    y = torch.where(torch.arange(N) % 3 == 0, torch.randint(V, (N,), generator=g), pull)
    y[:4] = V - 1 - torch.arange(4)
    h, w = h.bfloat16(), w.bfloat16()
    return h, w, y, tensor_core_logits(h, w)


def logprob(z, y):
    return z.gather(1, y[:, None])[:, 0] - z.logsumexp(1)


def gradient(z, y, w):
    """U of logits z, in bf16 as the kernels store it."""
    e = torch.nn.functional.one_hot(y, V).to(z.dtype) - z.softmax(1)
    return (e @ w.to(z.dtype)).to(torch.bfloat16 if z.dtype == torch.float32 else z.dtype)


def checks(h, w, y, z, u=None, depth=None):
    """The rule for log-probabilities, and for U where there is one."""
    exact = h.double() @ w.double().T
    eager = h.float() @ w.float().T
    top = float(exact.abs().max())
    depth = h.shape[1] if depth is None else depth
    assert_accurate(logprob(z, y).float(), logprob(eager, y), logprob(exact, y), max_logit=top, depth=depth)
    if u is not None:
        e = torch.nn.functional.one_hot(y, V)
        f32, f64 = ((e.to(x.dtype) - x.softmax(1)) @ w.to(x.dtype) for x in (eager, exact))
        assert_accurate(u, f32, f64, max_logit=top, gradient_factor=float(w.abs().max()), depth=depth)


@pytest.mark.parametrize(
    ("d", "top"), [(64, 40.0), (576, 10.0), (896, 400.0), (2048, 40.0), (4096, 10.0), (8192, 40.0)]
)
def test_truncated_sums_pass(d, top):
    h, w, y, z = problem(d, top=top, seed=d)
    checks(h, w, y, z, gradient(z, y, w))


def test_without_its_term_the_rule_would_refuse_right_results():
    h, w, y, z = problem(8192, seed=8192)
    assert (z.double() - h.double() @ w.double().T).abs().max() > 4 * 2**-23 * z.abs().max()
    with pytest.raises(AssertionError, match="error"):
        checks(h, w, y, z, depth=0)


BUGS = {
    "logits in bf16": lambda h, w, y, z: z.bfloat16().float(),
    "logits in fp16": lambda h, w, y, z: z.half().float(),
    "sums in bf16": lambda h, w, y, z: sum((h[:, k : k + 64].float() @ w[:, k : k + 64].float().T).bfloat16().float()
                                           for k in range(0, h.shape[1], 64)),
    "end of D dropped": lambda h, w, y, z: tensor_core_logits(h[:, :-16], w[:, :-16]),
    "one product of D dropped": lambda h, w, y, z: tensor_core_logits(h[:, :-1], w[:, :-1]),
    "last tile of V dropped": lambda h, w, y, z: z.masked_fill(torch.arange(V) >= V - 128, -torch.inf),
    "another column's logit": lambda h, w, y, z: z.roll(1, 1),
    "some columns counted twice": lambda h, w, y, z: z + 0.7 * torch.isin(torch.arange(V), y[4:8]),
    "h in fp8": lambda h, w, y, z: tensor_core_logits(h.to(torch.float8_e4m3fn).bfloat16(), w),
    "logits in tf32": lambda h, w, y, z: (z.view(torch.int32) & ~0x1FFF).view(torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("d", [896, 4096])
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_fail_with_the_term(bug, d):
    h, w, y, z = problem(d, seed=1)
    wrong = BUGS[bug](h, w, y, z)
    with pytest.raises(AssertionError, match="error"):
        checks(h, w, y, wrong)


def test_seeded_bugs_of_the_gradient_fail_with_the_term():
    h, w, y, z = problem(4096, seed=1)
    for u in (
        gradient(z, y, w) * 1.02,
        -gradient(z, y, w),
        gradient(z, (y + 1) % V, w),
        (gradient(z, y, w).float() - w[y].float()).bfloat16(),  # the target's part forgotten
        torch.where(torch.arange(4096) < 4080, gradient(z, y, w).float(), 0.0).bfloat16(),
        (z.softmax(1).where(z.softmax(1) > 2e-2, 0.0) @ w.float()).neg().add(w[y].float()).bfloat16(),  # a filter
    ):
        with pytest.raises(AssertionError, match="error"):
            checks(h, w, y, z, u)
