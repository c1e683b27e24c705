"""linear_logprob: every route that runs here against float64, and the promises of its docstring."""

import math
import types
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from autoregembed import linear_logprob, ops
from autoregembed.kernels.torch import linear_logprob as torch_route
from autoregembed.testing import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = [name for name, state in ops.available_impls(DEVICE).items() if state == "ok"]
IGNORED = -100


@dataclass(frozen=True)
class Case:
    """One problem; N = sum(lengths)."""

    lengths: tuple[int, ...] = (3, 0, 4)
    d: int = 12
    v: int = 37
    dtype: torch.dtype = torch.float32
    largest: float = 8.0  # about the largest |logit| before scale and cap
    bias: str = "none"  # "none", "normal", or "-inf": some columns are impossible
    softcap: float | None = None
    scale: float = 1.0
    ignored: float = 0.0  # share of rows
    peaked: bool = False  # the target's probability goes to 1
    upstream: str = "normal"  # "normal", "zero" or "huge"
    per_sequence: bool = True
    trainable: bool = False  # weight and bias require grad
    layout: str = "contiguous"  # "transposed" or "strided" memory of hidden and weight
    int32: bool = False
    chunk_rows: int = 2
    seed: int = 0


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        wide = x.new_full((2 * x.shape[0], 3 * x.shape[1]), math.nan)
        wide[::2, 1::3] = x
        return wide[::2, 1::3]
    return x


def inputs_of(case: Case):
    generator = torch.Generator().manual_seed(case.seed)
    n = sum(case.lengths)
    hidden = torch.randn(n, case.d, generator=generator)
    weight = torch.randn(case.v, case.d, generator=generator) * (case.largest / 3 / math.sqrt(case.d))
    target = torch.randint(case.v, (n,), generator=generator)
    bias = torch.randn(case.v, generator=generator) if case.bias != "none" else None
    if case.bias == "-inf":
        assert bias is not None
        impossible = torch.rand(case.v, generator=generator) < 0.4
        impossible[int(torch.randint(case.v, (1,), generator=generator))] = False
        bias[impossible] = -math.inf
    if case.peaked:
        rows = weight[target]
        hidden += (case.largest / case.scale) * rows / rows.square().sum(1, keepdim=True).clamp(min=1e-3)
    target[torch.rand(n, generator=generator) < case.ignored] = IGNORED
    grad = torch.randn(len(case.lengths) if case.per_sequence else n, generator=generator)
    grad *= {"normal": 1.0, "zero": 0.0, "huge": 300.0 if case.dtype == torch.float16 else 1e6}[case.upstream]
    to = {"dtype": case.dtype, "device": DEVICE}
    return (
        laid_out(hidden.to(**to), case.layout),
        laid_out(weight.to(**to), case.layout),
        target.to(DEVICE, torch.int32 if case.int32 else torch.int64),
        None if bias is None else bias.to(**to),
        torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
        if case.per_sequence
        else None,
        grad.to(DEVICE, torch.float64 if case.dtype == torch.float64 else torch.float32),
    )


def eager(hidden, weight, target, *, bias=None, softcap=None, scale=1.0, ignore_index=IGNORED, cu_seqlens=None):
    """The textbook: full logits, z_y − logsumexp(z), a slice per sequence."""
    z = hidden @ weight.T
    z = scale * (z if bias is None else z + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    valid = target != ignore_index
    y = target.long().where(valid, 0)
    rows = torch.where(valid, z.gather(1, y[:, None])[:, 0] - z.logsumexp(1), 0)
    if cu_seqlens is None:
        return rows
    return torch.stack([rows[i:j].sum() for i, j in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)])


def run(function, case: Case, dtype=None, **options):
    """The result and the gradients (hidden, weight, bias) of `function` on the case's inputs, cast to dtype."""
    hidden, weight, target, bias, cu_seqlens, grad = inputs_of(case)
    if dtype is not None:
        hidden, weight, grad = hidden.to(dtype), weight.to(dtype), grad.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    hidden.requires_grad_()
    if case.trainable:
        weight.requires_grad_()
        bias = None if bias is None else bias.requires_grad_()
    out = function(
        hidden, weight, target, bias=bias, softcap=case.softcap, scale=case.scale, cu_seqlens=cu_seqlens, **options
    )
    out.backward(grad)
    return out.detach(), {"hidden": hidden.grad, "weight": weight.grad, "bias": None if bias is None else bias.grad}


def check(case: Case, impl: str = "torch") -> None:
    """DESIGN §8's rule for the log-probabilities and every gradient of one case."""
    found, gradients = run(linear_logprob, case, impl=impl)
    eager_out, eager_gradients = run(eager, case, torch.float32)
    exact, exact_gradients = run(eager, case, torch.float64)
    hidden, weight, _, bias, _, grad = (None if x is None else x.double() for x in inputs_of(case))
    assert found.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    finite = exact.isfinite()
    assert torch.equal(found[~finite].double(), exact[~finite])
    logits = case.scale * (hidden @ weight.T + (0 if bias is None else bias))
    logits = logits[logits.isfinite()].abs()
    max_logit = logits.max().item() if len(logits) else 0.0
    if case.dtype == torch.float64:  # eager fp32 says nothing about it
        torch.testing.assert_close(found[finite], exact[finite], rtol=1e-12, atol=1e-14 * max_logit)
    else:
        assert_accurate(found[finite], eager_out[finite], exact[finite], max_logit=max_logit)
    factors = {"hidden": weight, "weight": hidden, "bias": torch.ones(1)}
    for name, x in gradients.items():
        wanted = exact_gradients[name]
        if wanted is None:
            assert x is None, f"{name} got a gradient"
            continue
        assert x.dtype == case.dtype
        largest = [y.abs().max().item() if y.numel() else 0.0 for y in (grad, factors[name])]
        factor = largest[0] * largest[1] * abs(case.scale)
        if case.dtype == torch.float64:
            torch.testing.assert_close(x, wanted, rtol=1e-10, atol=1e-13 * (1 + max_logit) * factor)
        else:
            assert_accurate(x, eager_gradients[name], wanted, max_logit=max_logit, gradient_factor=factor)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even in tests of a few rows: two rows of at most 64 columns each."""
    monkeypatch.setattr(torch_route, "CHUNK_BYTES", {"cpu": 512, "cuda": 512})


def test_chunks_are_several():
    assert 1 <= torch_route.rows_per_chunk(torch.device(DEVICE), 37, 4) < 7


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    d=st.sampled_from([1, 3, 12, 20, 33]),
    v=st.sampled_from([1, 2, 5, 31, 64, 129]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    largest=st.sampled_from([1.0, 8.0, 60.0, 1e4]),
    bias=st.sampled_from(["none", "normal", "-inf"]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
    scale=st.sampled_from([1.0, 0.3, -2.0]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    peaked=st.booleans(),
    upstream=st.sampled_from(["normal", "zero", "huge"]),
    trainable=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    int32=st.booleans(),
    seed=st.integers(0, 2**31),
).flatmap(lambda case: st.booleans().map(lambda s: replace(case, per_sequence=s and len(case.lengths) > 0)))
# With scale < 0 a −inf bias is +inf to the softmax, NaN in any implementation.
cases = cases.filter(lambda case: not (case.bias == "-inf" and case.scale < 0))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_accurate(impl, case):
    check(case, impl)
