"""linear_logprob: every backend that runs here against float64, and the promises of its docstring."""

import functools
import itertools
import math
import re
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from autoregembed import linear_logprob, ops
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.testing import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def runs(impl: str, dtype: torch.dtype = torch.float32) -> bool:
    x = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    try:
        linear_logprob(x, x, torch.zeros(1, dtype=torch.int64, device=DEVICE), impl=impl)
    except ops.ImplUnavailable:
        return False
    return True


# Triton's interpreter has tests of its own (test_triton_*.py): it takes a second where the others take a millisecond.
IMPLS = [name for name in ops.available_impls(DEVICE) if runs(name) and (name, DEVICE) != ("triton", "cpu")]
UNAVAILABLE = [name for name in ops.available_impls(DEVICE) if not runs(name)]
FUSED = [name for name in IMPLS if name != "reference"]
IGNORED = -100
OPS = torch.ops.autoregembed


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
    return torch.stack([rows[i:j].sum() for i, j in itertools.pairwise(cu_seqlens.tolist())])


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
    if not runs(impl, case.dtype):
        return
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
            fits = wanted.abs() < torch.finfo(case.dtype).max / 2
            assert_accurate(
                x[fits], eager_gradients[name][fits], wanted[fits], max_logit=max_logit, gradient_factor=factor
            )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and blocks, the last ones short, even in tests of a few rows."""
    monkeypatch.setattr(torch_kernels, "CHUNK_BYTES", {"cpu": 512, "cuda": 512})
    monkeypatch.setattr(torch_kernels, "ROWS", {"cpu": 3, "cuda": 3})
    monkeypatch.setattr(torch_kernels, "BLOCK_BYTES", {"cpu": 3 * 16 * 4, "cuda": 3 * 16 * 4})
    monkeypatch.setattr(torch_kernels, "COLUMNS", 8)


def test_chunks_and_blocks_are_several():
    assert 1 <= torch_kernels.rows_per_chunk(7, 37, 4, torch.device(DEVICE)) < 7
    assert torch_kernels.block_shape(torch.device(DEVICE), 7, 37, 12, 4) == (3, 16)


@pytest.mark.parametrize(("n", "v", "d"), [(1, 1, 1), (0, 49152, 576), (250, 49152, 576), (1536, 128256, 4096)])
def test_blocks_fit_their_budget_and_cover_the_logits(n, v, d, monkeypatch):
    monkeypatch.undo()
    for device in ("cpu", "cuda"):
        rows, columns = torch_kernels.block_shape(torch.device(device), n, v, d, 4)
        assert 1 <= rows <= torch_kernels.ROWS[device]
        assert 1 <= columns <= v
        assert rows * columns * 4 <= max(torch_kernels.BLOCK_BYTES[device], 4 * rows * torch_kernels.COLUMNS)


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [50257, 151665])
def test_accurate_on_real_vocabularies(impl, v, dtype):
    check(Case(lengths=(2, 1), d=24, v=v, dtype=dtype, largest=20.0), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_accurate_sum_of_a_long_sequence(impl, monkeypatch):
    for name in ("CHUNK_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(torch_kernels, name, {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(torch_kernels, "ROWS", {"cpu": 2048, "cuda": 2048})
    check(Case(lengths=(20000,), d=4, v=7), impl)


@pytest.mark.parametrize("impl", FUSED)  # autograd of logsumexp loses 1 − p
@pytest.mark.parametrize("trainable", [False, True])
def test_gradient_survives_certainty(impl, trainable):
    """p_target → 1: 1 − p is far below eps, and the gradient is right relative to itself, not to W."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(33, 64, generator=generator).to(DEVICE)
    target = torch.arange(4, device=DEVICE)
    hidden = weight[target] * (40 / weight[target].square().sum(1, keepdim=True))
    hidden.requires_grad_()
    linear_logprob(hidden, weight.requires_grad_(trainable), target, impl=impl).sum().backward()
    w = weight.detach().double()
    others = torch.softmax(hidden.detach().double() @ w.T, 1).scatter(1, target[:, None], 0)
    exact = others.sum(1, keepdim=True) * w[target] - others @ w
    largest = exact.abs().amax(1, keepdim=True)
    assert 0 < largest.min() < 1e-12  # the case is what it says
    assert ((hidden.grad - exact).abs() <= 1e-4 * largest).all()


def test_specification_is_the_formula():
    """reference.linear_logprob against loops over Python floats."""
    case = Case(lengths=(2, 0, 3), d=3, v=6, dtype=torch.float64, bias="normal", ignored=0.3, seed=3)
    for softcap, scale in [(None, 1.0), (2.0, -0.7)]:
        hidden, weight, target, bias, cu_seqlens, _ = inputs_of(case)
        rows = []
        for h, y in zip(hidden.tolist(), target.tolist(), strict=True):
            z = [
                scale * (sum(a * b for a, b in zip(h, w, strict=True)) + c)
                for w, c in zip(weight.tolist(), bias.tolist(), strict=True)
            ]
            z = z if softcap is None else [softcap * math.tanh(x / softcap) for x in z]
            rows.append(0.0 if y == IGNORED else z[y] - math.log(sum(map(math.exp, z))))
        assert 0.0 in rows
        options = {"bias": bias, "softcap": softcap, "scale": scale, "impl": "reference"}
        found = linear_logprob(hidden, weight, target, **options)
        torch.testing.assert_close(found.cpu(), torch.tensor(rows, dtype=torch.float64), rtol=1e-13, atol=1e-13)
        sums = linear_logprob(hidden, weight, target, cu_seqlens=cu_seqlens, **options)
        wanted = torch.tensor([rows[0] + rows[1], 0.0, sum(rows[2:])], dtype=torch.float64)
        torch.testing.assert_close(sums.cpu(), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(impl, trainable, softcap):
    if not runs(impl, torch.float64):
        pytest.skip("has no float64")
    case = Case(dtype=torch.float64, d=5, v=7, largest=3.0, bias="normal", ignored=0.2, scale=1.3)
    hidden, weight, target, bias, cu_seqlens, _ = inputs_of(case)
    wrt = [hidden, weight, bias] if trainable else [hidden]

    def function(hidden, weight=weight, bias=bias):
        return linear_logprob(
            hidden, weight, target, bias=bias, softcap=softcap, scale=1.3, cu_seqlens=cu_seqlens, impl=impl
        )

    # Gradients are computed in forward: the forward must see that they are wanted.
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in wrt])


# ----------------------------------------------------------------------------------------------------------------------
# nothing to score


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("lengths", [(), (0, 0), (2, 1)])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_zero_attached_to_the_graph(impl, trainable, lengths, per_sequence):
    """N = 0 and all ignored: zeros that can be differentiated."""
    case = Case(lengths=lengths, ignored=1.1, bias="normal", trainable=trainable, per_sequence=per_sequence)
    out, gradients = run(linear_logprob, case, impl=impl)
    assert out.shape == (len(lengths) if per_sequence else sum(lengths),)
    assert not out.any()
    for name in ["hidden", "weight", "bias"] if trainable else ["hidden"]:
        assert gradients[name] is not None, name
        assert not gradients[name].any(), name


@pytest.mark.parametrize("impl", FUSED)
def test_ignored_rows_change_nothing(impl):
    """An ignored row, NaN and all, leaves every other bit and every other gradient alone."""
    hidden, weight, target, _, _, _ = inputs_of(Case(lengths=(6,), per_sequence=False))
    target[[1, 4]] = 7
    kept = torch.tensor([0, 2, 3, 5], device=DEVICE)
    dirty = hidden.clone()
    dirty[[1, 4]] = math.nan
    dirty.requires_grad_()
    clean = hidden[kept].requires_grad_()
    out = linear_logprob(dirty, weight, target, ignore_index=7, impl=impl)
    wanted = linear_logprob(clean, weight, target[kept], ignore_index=7, impl=impl)
    assert int((target == 7).sum()) == 2
    torch.testing.assert_close(out[kept], wanted, rtol=1e-6, atol=1e-6)
    assert not out[[1, 4]].any()
    out.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(dirty.grad[kept], clean.grad, rtol=1e-5, atol=1e-6)
    assert not dirty.grad[[1, 4]].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_impossible_target_is_minus_infinity(impl):
    hidden, weight, target, _, _, _ = inputs_of(Case(lengths=(3,), per_sequence=False))
    bias = torch.zeros(37, device=DEVICE)
    bias[target[1].item()] = -math.inf
    out = linear_logprob(hidden.requires_grad_(), weight, target, bias=bias, impl=impl)
    assert out[1] == -math.inf
    assert out[[0, 2]].isfinite().all()
    out.sum().backward()
    assert hidden.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# autograd


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trainable", [False, True])
def test_second_backward_through_a_retained_graph(impl, trainable):
    """What the forward saved is never scaled in place, and gradients accumulate."""
    hidden, weight, target, _, cu_seqlens, grad = inputs_of(Case(trainable=trainable))
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    out = linear_logprob(hidden, weight, target, cu_seqlens=cu_seqlens, impl=impl)
    wrt = [hidden, weight] if trainable else [hidden]
    first = torch.autograd.grad(out, wrt, grad, retain_graph=True)
    other = torch.autograd.grad(out, wrt, -3 * grad, retain_graph=True)
    again = torch.autograd.grad(out, wrt, grad)
    for x, y, z in zip(first, other, again, strict=True):
        assert torch.equal(x, z)
        torch.testing.assert_close(y, -3 * x)
    assert any(x.any() for x in first)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("trainable", [False, True])
def test_double_backward_is_refused(impl, trainable):
    hidden, weight, target, _, _, _ = inputs_of(Case(per_sequence=False))
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight.requires_grad_(trainable), target, impl=impl)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(out.square().sum(), hidden, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_only_where_wanted(impl):
    hidden, weight, target, _, _, _ = inputs_of(Case(per_sequence=False))
    with torch.no_grad():
        assert not linear_logprob(hidden.requires_grad_(), weight, target, impl=impl).requires_grad
    with torch.inference_mode():
        linear_logprob(hidden.detach(), weight, target, impl=impl)
    assert not linear_logprob(hidden.detach(), weight, target, impl=impl).requires_grad
    weight.requires_grad_()
    linear_logprob(hidden.detach(), weight, target, impl=impl).sum().backward()
    assert weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trainable", [False, True])
def test_autocast(impl, trainable):
    """Autocast rounds the operands to its dtype and nothing after them: the same bits as with a cast by hand."""
    results = []
    for enabled in (True, False):
        hidden, weight, target, bias, _, grad = inputs_of(Case(per_sequence=False, bias="normal"))
        leaves = [x.requires_grad_() for x in ([hidden, weight, bias] if trainable else [hidden])]
        cast = (lambda x: x) if enabled else torch.Tensor.bfloat16
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            out = linear_logprob(cast(hidden), cast(weight), target, bias=cast(bias), impl=impl)
            if impl != "reference":  # a plain autograd graph is autocast where its backward runs under autocast
                out.backward(grad)
        assert out.dtype == torch.float32
        results.append([out.detach(), *(x.grad for x in leaves)])
    for found, wanted in zip(*results, strict=True):
        assert found is None or (torch.equal(found, wanted) and found.any())


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_float64_alone(impl):
    if not runs(impl, torch.float64):
        pytest.skip("has no float64")
    hidden, weight, target, _, _, _ = inputs_of(Case(dtype=torch.float64, per_sequence=False))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = linear_logprob(hidden, weight, target, impl=impl)
    torch.testing.assert_close(out, eager(hidden, weight, target), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trainable", [False, True])
def test_same_bits_every_time(impl, trainable):
    case = Case(lengths=(5, 0, 9), trainable=trainable, bias="normal", dtype=torch.bfloat16)
    (out, gradients), (again, gradients_again) = (run(linear_logprob, case, impl=impl) for _ in range(2))
    assert torch.equal(out, again)
    for name, x in gradients.items():
        assert x is None or torch.equal(x, gradients_again[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_text_alone_and_in_a_pack(impl):
    """Equal to rounding: a GEMM of other sizes may sum in another order. The sums over sequences are equal in bits."""
    hidden, weight, target, _, cu_seqlens, _ = inputs_of(Case(lengths=(4, 7, 1, 5), d=64, v=300))
    hidden.requires_grad_()
    bounds = cu_seqlens.tolist()
    packed = linear_logprob(hidden, weight, target, cu_seqlens=cu_seqlens, impl=impl)
    (together,) = torch.autograd.grad(packed.sum(), hidden)
    rows = linear_logprob(hidden.detach(), weight, target, impl=impl)
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = slice(start, end)
        length = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        alone = linear_logprob(hidden[part], weight, target[part], cu_seqlens=length, impl=impl)
        torch.testing.assert_close(alone[0], packed[i], rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(alone, hidden)
        torch.testing.assert_close(gradient[part], together[part], rtol=1e-5, atol=1e-6)
        assert torch.equal(ops.segment_sum(rows[part], length)[0], ops.segment_sum(rows, cu_seqlens)[i])


# ----------------------------------------------------------------------------------------------------------------------
# cost, of the torch backend


def cost(case: Case, with_grad: bool = True) -> tuple[float, int]:
    """(FLOPs of all matrix products in units of F = 2·N·V·D, bytes of the largest tensor made)."""
    hidden, weight, target, bias, _, grad = inputs_of(case)
    hidden.requires_grad_(with_grad)
    weight.requires_grad_(case.trainable)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as trace:
        out = linear_logprob(hidden, weight, target, bias=bias, softcap=case.softcap, impl="torch")
        if with_grad:
            out.backward(grad)
    flops = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm_", "aten::addmm", "aten::bmm"):
            first = 1 if event.name.startswith("aten::addmm") else 0
            (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
            flops += 2 * rows * inner * columns
    largest = max(event.self_cpu_memory_usage for event in trace.events())
    return flops / (2 * sum(case.lengths) * case.v * case.d), largest


@pytest.mark.parametrize(
    ("trainable", "with_grad", "passes"),
    [(False, True, 2), (False, False, 1), (True, True, 4), (True, False, 1)],
)
def test_matrix_products(trainable, with_grad, passes):
    """Two for a frozen head with gradients, one without; a trainable head recomputes its logits."""
    flops, _ = cost(Case(lengths=(64,), trainable=trainable, per_sequence=False), with_grad)
    assert flops == passes


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trainable", [False, True])
def test_no_logits_in_memory(trainable, softcap, monkeypatch):
    """The largest tensor is a block of logits (a chunk, with a trainable head), not (N, V)."""
    case = Case((64,), d=8, v=1024, trainable=trainable, softcap=softcap, bias="normal", per_sequence=False)
    budget = 8 * case.v * 4
    for name in ("CHUNK_BYTES", "BLOCK_BYTES"):
        monkeypatch.setattr(torch_kernels, name, {"cpu": budget, "cuda": budget})
    monkeypatch.setattr(torch_kernels, "ROWS", {"cpu": 16, "cuda": 16})
    _, largest = cost(case)
    assert budget <= largest <= 1.01 * budget  # a Python list of lengths is an allocation, too


# ----------------------------------------------------------------------------------------------------------------------
# torch.library and torch.compile


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("with_gradient", [False, True])
def test_opcheck_forward(impl, with_gradient):
    hidden, weight, target, bias, _, _ = inputs_of(Case(bias="normal", ignored=0.3))
    hidden.requires_grad_(with_gradient)
    for softcap, b in [(None, None), (2.0, bias)]:
        torch.library.opcheck(
            OPS.linear_logprob.default, (hidden, weight, target, b, softcap, 1.5, IGNORED, with_gradient, impl)
        )


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck_forward_of_a_trainable_head(impl):
    hidden, weight, target, bias, _, _ = inputs_of(Case(bias="normal", ignored=0.3))
    args = (hidden.requires_grad_(), weight.requires_grad_(), target, bias.requires_grad_())
    torch.library.opcheck(OPS.linear_logprob.default, (*args, 2.0, 1.5, IGNORED, False, impl))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_opcheck_backward(impl, layout):
    hidden, weight, target, bias, _, _ = inputs_of(Case(bias="normal", ignored=0.3, layout=layout))
    grad = torch.ones(len(hidden), device=DEVICE)
    torch.library.opcheck(
        OPS.linear_logprob_backward.default, (grad, hidden, weight, target, bias, None, 1.0, IGNORED, impl)
    )


def compiled_equals_eager(backend, impl, case, other):
    torch._dynamo.reset()

    def function(hidden, weight, target, bias, cu_seqlens):
        out = linear_logprob(
            hidden * 2, weight, target, bias=bias, softcap=case.softcap, cu_seqlens=cu_seqlens, impl=impl
        )
        return out + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for one in (case, other):
        results = []
        for f in (compiled, function):
            hidden, weight, target, bias, cu_seqlens, grad = inputs_of(one)
            hidden.requires_grad_()
            weight.requires_grad_(one.trainable)
            out = f(hidden, weight, target, bias, cu_seqlens)
            out.backward(grad)
            results.append((out.detach(), hidden.grad, weight.grad))
        for found, wanted in zip(*results, strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                torch.testing.assert_close(found, wanted)
        assert results[0][1].any()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_compiles_whole_with_dynamic_sizes(impl, trainable, per_sequence):
    """One graph for all sizes, equal to eager; the second sizes are new to it."""
    case = Case(lengths=(3, 2, 4), bias="normal", softcap=5.0, trainable=trainable, per_sequence=per_sequence)
    compiled_equals_eager("aot_eager", impl, case, replace(case, lengths=(5, 0, 7, 1), v=41, seed=1))


def test_compiled_code_refuses_bad_data():
    """What a graph cannot see at trace time is checked when it runs."""
    torch._dynamo.reset()
    hidden, weight, target, _, cu_seqlens, _ = inputs_of(Case())
    compiled = torch.compile(linear_logprob, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(hidden, weight, target, cu_seqlens=cu_seqlens, impl="torch")
    with pytest.raises(IndexError, match="target: got id 37 "):
        compiled(hidden, weight, target.fill_(37), cu_seqlens=cu_seqlens, impl="torch")
    with pytest.raises(ValueError, match="cu_seqlens: "):
        compiled(hidden, weight, target.fill_(0), cu_seqlens=cu_seqlens + 1, impl="torch")


# ----------------------------------------------------------------------------------------------------------------------
# bad input


def valid(**changes):
    hidden, weight, target, bias, cu_seqlens, _ = inputs_of(Case(bias="normal"))
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, "cu_seqlens": cu_seqlens}
    return {**arguments, **changes}


N, D, V = 7, 12, 37
ids = torch.zeros(N, dtype=torch.int64)
BAD = {
    "hidden is a list": (TypeError, "hidden: got list", {"hidden": [[1.0]]}),
    "hidden of integers": (TypeError, "hidden: got dtype torch.int64", {"hidden": torch.ones(N, D).long()}),
    "hidden of one axis": (ValueError, r"hidden: got shape \(84,\)", {"hidden": torch.ones(N * D)}),
    "weight of another dtype": (TypeError, "weight: got dtype torch.float64", {"weight": torch.ones(V, D).double()}),
    "weight of another width": (ValueError, r"weight: got shape \(37, 13\)", {"weight": torch.ones(V, D + 1)}),
    "weight elsewhere": (ValueError, "weight: got device meta", {"weight": torch.ones(V, D, device="meta")}),
    "no vocabulary": (ValueError, "weight: got V = 0", {"weight": torch.ones(0, D), "bias": None}),
    "target is a list": (TypeError, "target: got list", {"target": [0] * N}),
    "target of floats": (TypeError, "target: got dtype torch.float32", {"target": torch.ones(N)}),
    "target of another length": (ValueError, r"target: got shape \(8,\)", {"target": torch.ones(N + 1).long()}),
    "target of two axes": (ValueError, r"target: got shape \(7, 1\)", {"target": ids[:, None]}),
    "target elsewhere": (ValueError, "target: got device meta", {"target": ids.to("meta")}),
    "target too large": (IndexError, "target: got id 37 at row 3", {"target": ids.index_fill(0, ids[:1] + 3, V)}),
    "target negative": (IndexError, "target: got id -1 at row 6", {"target": ids.index_fill(0, ids[:1] + 6, -1)}),
    "target ignored by another name": (
        IndexError,
        "target: got id -100 at row 0, expected 0..36 and ignore_index=-1",
        {"target": ids - 100, "ignore_index": -1},
    ),
    "bias of another dtype": (TypeError, "bias: got dtype torch.bfloat16", {"bias": torch.ones(V).bfloat16()}),
    "bias of another length": (ValueError, r"bias: got shape \(36,\)", {"bias": torch.ones(V - 1)}),
    "bias elsewhere": (ValueError, "bias: got device meta", {"bias": torch.ones(V, device="meta")}),
    "cu_seqlens is a list": (TypeError, "cu_seqlens: got list", {"cu_seqlens": [0, N]}),
    "cu_seqlens of floats": (TypeError, "cu_seqlens: got dtype", {"cu_seqlens": torch.tensor([0.0, N])}),
    "cu_seqlens of two axes": (ValueError, "cu_seqlens: got shape", {"cu_seqlens": torch.tensor([[0, N]])}),
    "cu_seqlens empty": (ValueError, r"cu_seqlens: got shape \(0,\)", {"cu_seqlens": ids[:0]}),
    "cu_seqlens elsewhere": (ValueError, "cu_seqlens: got device meta", {"cu_seqlens": ids[:2].to("meta")}),
    "cu_seqlens not from 0": (ValueError, r"cu_seqlens: got \[1, 7\]", {"cu_seqlens": torch.tensor([1, N])}),
    "cu_seqlens not to N": (ValueError, r"cu_seqlens: got \[0, 8\]", {"cu_seqlens": torch.tensor([0, N + 1])}),
    "cu_seqlens short of N": (ValueError, r"cu_seqlens: got \[0, 6\]", {"cu_seqlens": torch.tensor([0, N - 1])}),
    "cu_seqlens decreasing": (ValueError, "non-decreasing", {"cu_seqlens": torch.tensor([0, 5, 2, N])}),
    "softcap 0": (ValueError, "softcap: got 0.0", {"softcap": 0.0}),
    "softcap negative": (ValueError, "softcap: got -1.0", {"softcap": -1.0}),
    "softcap NaN": (ValueError, "softcap: got nan", {"softcap": math.nan}),
    "scale infinite": (ValueError, "scale: got inf", {"scale": math.inf}),
    "scale NaN": (ValueError, "scale: got nan", {"scale": math.nan}),
}


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, impl):
    error, message, changes = BAD[name]
    if DEVICE == "cuda" and impl in ("auto", "triton") and (error is IndexError or r"got \[" in message):
        pytest.skip("the Triton backend does not wait for the data: NaN there, see test_triton_linear_logprob.py")
    changes = {
        k: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x for k, x in changes.items()
    }
    with pytest.raises(error, match=message):
        linear_logprob(**valid(**changes), impl=impl)


def test_unknown_backend():
    with pytest.raises(ValueError, match="impl: got 'cuda', expected 'auto', "):
        linear_logprob(**valid(), impl="cuda")


@pytest.mark.parametrize("impl", UNAVAILABLE)
def test_a_named_backend_that_cannot_run_is_not_replaced(impl):
    reason = re.escape(ops.available_impls(DEVICE)[impl])
    with pytest.raises(ops.ImplUnavailable, match=f"impl='{impl}' cannot run on {DEVICE}.*: {reason}"):
        linear_logprob(**valid(), impl=impl)


# ----------------------------------------------------------------------------------------------------------------------
# the checks above catch what they are for

SEEDED_BUGS = {
    "dropped tail of rows": ("for i in range(0, n, height):", "for i in range(0, n - n % height, height):", 1),
    "dropped tail chunk": ("for i in range(0, n, step):", "for i in range(0, n - n % step, step):", 1),
    "dropped tail of columns": ("for j in range(0, v, width):", "for j in range(0, v - width + 1, width):", 1),
    "zero gradient": ("total.mul_(elsewhere[:, None].to(work))", "total.zero_()", 1),
    "sign of the gradient": (
        "scale * softcap_grad * self.running_sumexp / s, -scale / s",
        "-scale * softcap_grad * self.running_sumexp / s, scale / s",
        1,
    ),
    "no 1/Σ in the gradient": ("/ s, -scale / s", "/ s, -scale + 0 * s", 1),
    "no scale in the gradient": ("/ s, -scale / s", "/ s, -1 / s", 1),
    "no slope of the cap": ("e.mul_(softcap_grad)", "e", 1),
    "no slope at the target": (
        "scale * softcap_grad * self.running_sumexp / s,",
        "scale * self.running_sumexp / s,",
        1,
    ),
    "wrong slope of the cap": ("1 - z * z", "1 - z.abs()", 1),
    "off-by-one target": ("    here = ", "    y = y + 1; here = ", 1),
    "target's column forgotten": ("addcmul_(weight[y].to(work), at_target[:, None].to(work))", "add_(0)", 1),
    "target counted twice": ("s = self.running_sumexp + x_y.exp()", "s = self.running_sumexp + 2 * x_y.exp()", 1),
    "target left in the sum": ("e.scatter_(1, column, torch", "e.clone().scatter_(1, column, torch", 1),
    "target of a block without it": ("here = (y >= 0) & (y < z.shape[1])", "here = y < z.shape[1]", 1),
    "1 − p as a difference": ("* self.running_sumexp / s,", "* (1 - x_y.exp() / s),", 1),
    "sum not rescaled": ("state.running_sumexp.mul_(rescale)", "state.running_sumexp", 1),
    "gradient not rescaled": ("u[rows] *= ", "_ = ", 1),
    "bound not kept": ("torch.where(raised, running_max, state.running_max)", "running_max", 1),
    "bound never raised": (
        "raised = running_max > state.running_max + RESCALE_THRESHOLD",
        "raised = (running_max > state.running_max) & (state.running_max == -math.inf)",
        1,
    ),
    "no scale": ("if scale != 1.0:", "if False:", 1),
    "no bias": ("if bias is not None:", "if False:", 1),
    "bias of the first block": ("bias[j : j + width]", "bias[: len(w)]", 1),
    "cap without its factor": ("z.mul_(softcap)", "z.mul_(1)", 1),
    "floor too high": ("MIN_EXPONENT = -80.0", "MIN_EXPONENT = -8.0", 1),
    "ignored rows counted": ("keep = target != ignore_index", "target.clamp_(min=0); keep = target >= 0", 1),
    "logits rounded to 16 bits": ("    here = ", "    z.copy_(z.bfloat16()); here = ", 1),
    "rows of the first chunk": ("y = target[rows]", "y = target[: len(target[rows])]", 2),
    "bias gradient of the last chunk": ("d_bias += e.sum(0)", "d_bias = e.sum(0)", 1),
    "weight gradient of another row": (
        "d_weight.addmm_(e.t(), product.h)",
        "d_weight.addmm_(e.t(), product.h.roll(1, 0))",
        1,
    ),
    "gradient without upstream": ("(at_target * grad[rows])", "at_target", 1),
}
REGRESSIONS = [
    Case(),
    Case(trainable=True, bias="normal"),
    Case(bias="-inf", softcap=3.0, scale=-0.7 + 1.4),
    Case(softcap=2.0, trainable=True, ignored=0.4, bias="normal", scale=1.7),
    Case(dtype=torch.bfloat16, largest=200.0, peaked=True),
    Case(largest=1e4, v=129),
    Case(dtype=torch.float64, largest=20.0, peaked=True, trainable=True),
]


def test_no_seeded_bug_no_alarm():
    for case in REGRESSIONS:
        check(case)
    test_gradient_survives_certainty("torch", False)


@pytest.mark.parametrize("name", SEEDED_BUGS)
def test_seeded_bug_is_caught(name, monkeypatch):
    pattern, replacement, count = SEEDED_BUGS[name]
    source = Path(torch_kernels.__file__).read_text(encoding="utf-8")
    assert source.count(pattern) == count, "the source has changed: bring this list up to date"
    broken = types.ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)
    exec(compile(source.replace(pattern, replacement), "broken", "exec"), broken.__dict__)
    for budget in ("CHUNK_BYTES", "BLOCK_BYTES", "ROWS", "COLUMNS"):
        setattr(broken, budget, getattr(torch_kernels, budget))
    monkeypatch.setitem(sys.modules, torch_kernels.__name__, broken)
    with pytest.raises(AssertionError):
        test_no_seeded_bug_no_alarm()
