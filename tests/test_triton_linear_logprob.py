import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_cases import DEVICE, DTYPES, bits, few, leaf, poisoned  # noqa: F401

from autoregembed import ops, reference
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.kernels.triton import linear_logprob as kernels
from autoregembed.kernels.triton import tiles
from autoregembed.testing import assert_accurate

METHODS = ["cublas", "shifted"]
FORMS = [  # (method, dtype): e of `shifted` has the range of bf16
    *(pytest.param("cublas", d, id=f"cublas-dtype{i}") for i, d in enumerate((torch.float32, torch.float16))),
    pytest.param("shifted", torch.float32, id="shifted-dtype0"),
    *(pytest.param(m, torch.bfloat16, id=f"{m}-dtype2") for m in METHODS),
]


def problem(n, d, v, dtype, *, bias=False, seed=0, peak=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (torch.randn(v, d, generator=generator) * peak / d**0.5).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    b = torch.randn(v, generator=generator).to(dtype) if bias else None
    moved = (hidden, weight, target, b)
    return [None if x is None else x.to(DEVICE) for x in moved]


def oracle(dtype, hidden, weight, target, bias, grad, **options):
    """logprob and d hidden of the specification, in `dtype`."""
    h = leaf(hidden, dtype)
    logprob = reference.linear_logprob(h, weight.to(dtype), target, bias=None if bias is None else bias.to(dtype),
                                       **options)  # fmt: skip
    return logprob.detach(), torch.autograd.grad(logprob, h, grad.to(dtype))[0]


def largest_logit(hidden, weight, bias, scale=1.0):
    z = hidden.double() @ weight.double().t()
    z = (z if bias is None else z + bias.double()) * scale
    return z[z.isfinite()].abs().max().item() if z.numel() else 0.0


def check(hidden, weight, target, bias, *, grad=None, softcap=None, scale=1.0, method="cublas", ignore_index=-100):
    grad = torch.linspace(-2, 1, len(hidden), device=DEVICE) if grad is None else grad
    options = {"softcap": softcap, "scale": scale, "ignore_index": ignore_index}
    exact, exact_grad = oracle(torch.float64, hidden, weight, target, bias, grad, **options)
    eager, eager_grad = oracle(torch.float32, hidden, weight, target, bias, grad, **options)
    top = largest_logit(hidden, weight, bias, scale)
    factor = grad.abs().max().item() * weight.abs().max().item() if len(hidden) else 0.0
    scored, _ = kernels.forward(hidden, weight, target, bias, softcap, scale, ignore_index, False)
    assert_accurate(scored, eager, exact, max_logit=top)
    found, u = kernels.forward(hidden, weight, target, bias, softcap, scale, ignore_index, True, method)
    assert found.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert_accurate(found, eager, exact, max_logit=top)
    before = u.clone()
    found_grad = kernels.scale_rows(grad, u)
    assert found_grad.dtype == hidden.dtype
    assert_accurate(found_grad, eager_grad, exact_grad, max_logit=top, gradient_factor=factor)
    assert bits(u, before)


@pytest.mark.parametrize(("method", "dtype"), FORMS)
@few(5)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 300), st.booleans(),
       st.sampled_from([None, 3.0, 30.0]), st.sampled_from([1.0, 0.25]), st.integers(0, 99))  # fmt: skip
def test_any_shape(dtype, method, n, d, v, bias, softcap, scale, seed):
    hidden, weight, target, b = problem(n, d, v, dtype, bias=bias, seed=seed, peak=3.0)
    if n > 2:
        target[n // 2] = -100
    check(hidden, weight, target, b, softcap=softcap, scale=scale, method=method)


@pytest.mark.parametrize(("method", "dtype"), FORMS)
@pytest.mark.parametrize(("n", "d", "v"), [(1, 64, 256), (20, 40, 250)])
def test_whole_words_and_last_column(dtype, method, n, d, v):
    """Rows of whole 16-byte words go through tensor descriptors, with and without ragged tiles."""
    hidden, weight, target, _ = problem(n, d, v, dtype, seed=1)
    target[0], target[-1] = v - 1, 128
    check(hidden, weight, target, None, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_certain_target_keeps_its_gradient(method):
    """p → 1: U = W[y] − softmax W cancels in any form but rest / s."""
    hidden, weight, target, _ = problem(4, 16, 150, torch.float32)
    weight[target] = 16 * hidden / hidden.square().sum(1, keepdim=True)
    exact, exact_grad = oracle(torch.float64, hidden, weight, target, None, torch.ones(4, device=DEVICE))
    found, u = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
    assert ((u - exact_grad).norm(dim=1) / exact_grad.norm(dim=1)).max() < 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)  # about −1e-5: log(1 + x) is off by 1e-2
    check(hidden, weight, target, None, method=method)


@pytest.mark.parametrize(("method", "dtype"), FORMS)
def test_masked_columns(method, dtype):
    hidden, weight, target, bias = problem(5, 24, 200, dtype, bias=True)
    bias[:130] = -torch.inf  # the first tiles hold nothing else
    target.copy_(torch.tensor([130, 150, 199, 131, 180]))
    check(hidden, weight, target, bias, method=method)
    bias[target[0]] = -torch.inf
    logprob, u = kernels.forward(hidden, weight, target, bias, None, 1.0, -100, True, method)
    assert logprob[0] == -torch.inf
    assert logprob[1:].isfinite().all()
    p = torch.softmax(hidden.double() @ weight.double().t() + bias.double(), 1)
    exact = weight[target].double() - p @ weight.double()
    assert_accurate(u[:1], exact[:1].float(), exact[:1], max_logit=10.0)


@pytest.mark.parametrize("method", METHODS)
def test_large_logits(method):
    hidden, weight, target, _ = problem(4, 16, 200, torch.float32, peak=1e4)
    check(hidden, weight, target, None, method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "margin", "distance"),
    [("cublas", 0.0, 500.0), *(("shifted", m, d) for m in (0.0, 84.0) for d in (20.0, 80.0, 125.0, 140.0, 9000.0))],
)
def test_improbable_targets(monkeypatch, method, dtype, distance, margin):
    """A target far below the maximum of its row, one far above the rest, and between; a row of hidden is a unit."""
    monkeypatch.setattr(kernels, "margin", lambda v: margin)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(150, 5, generator=generator)
    target = torch.tensor([3, 140, 77, 149, 0])
    weight[target[0], 0] -= distance
    weight[target[1], 1] += distance
    weight[20:90, 2] += distance  # many at the maximum
    weight[:, 3] += distance  # a large shift of all
    hidden, weight, target = (x.to(DEVICE) for x in (torch.eye(5).to(dtype), weight.to(dtype), target))
    check(hidden, weight, target, None, method=method)
    grad = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], device=DEVICE)
    check(hidden, weight, target, None, method=method, grad=grad)
    found = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
    hidden[0] = 0  # nothing of row 0 reaches another
    again = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
    assert all(bits(a[1:], b[1:]) for a, b in zip(found, again, strict=True))


def test_shifted_needs_the_range_of_bf16():
    hidden, weight, target, _ = problem(2, 16, 100, torch.float16)
    with pytest.raises(TypeError, match="method: got 'shifted' for"):
        kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, "shifted")
    with pytest.raises(ValueError, match="method: got 'tiles'"):
        kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, "tiles")
    assert tiles.method(hidden.device, torch.bfloat16, 16) == "shifted"
    assert tiles.method(hidden.device, torch.float16, 16) == "cublas"


@pytest.mark.parametrize("method", METHODS)
def test_no_depth(method):
    """D = 0: every logit is its bias."""
    bias = torch.randn(70, device=DEVICE)
    target = torch.tensor([0, 69], device=DEVICE)
    head = (torch.empty(2, 0, device=DEVICE), torch.empty(70, 0, device=DEVICE), target, bias, None, 1.0, -100)
    for gradient in (True, False):
        logprob, u = kernels.forward(*head, gradient, method)
        torch.testing.assert_close(logprob, torch.log_softmax(bias, 0)[target])
        assert u.shape == (2 * gradient, 0)


@pytest.mark.parametrize("method", METHODS)
def test_small_logits_under_a_large_cap(method):
    """cap · tanh(z / cap) ≈ z: the rounding of 1 − e^−2z/cap, times cap, must not show."""
    hidden, weight, target, _ = problem(4, 16, 150, torch.float32, peak=0.1)
    check(hidden, weight, target, None, softcap=1000.0, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_ignored_and_invalid_ids(method):
    hidden, weight, target, _ = problem(6, 16, 100, torch.float32)
    target[1], target[2], target[4] = -100, 100, -1
    hidden[1] = torch.nan  # an ignored row is never read
    logprob, u = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
    scored, _ = kernels.forward(hidden, weight, target, None, None, 1.0, -100, False, method)
    for x in (logprob, scored):
        assert x[1] == 0
        assert x.isnan().tolist() == [False, False, True, False, True, False]
    assert (u[1] == 0).all()
    assert u[2].isnan().all()
    assert u[4].isnan().all()
    assert u[[0, 3, 5]].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_score(method):
    hidden, weight, target, _ = problem(0, 16, 100, torch.float32)
    logprob, u = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
    assert logprob.shape == (0,)
    assert u.shape == (0, 16)
    hidden, weight, target, _ = problem(3, 16, 100, torch.float32)
    logprob, u = kernels.forward(hidden, weight, target.fill_(-100), None, None, 1.0, -100, True, method)
    assert (logprob == 0).all()
    assert (u == 0).all()


def test_a_row_of_minus_infinity_is_nan_as_in_eager():
    hidden, weight, target, bias = problem(2, 8, 70, torch.float32, bias=True)
    bias.fill_(-torch.inf)
    for gradient in (True, False):
        assert kernels.forward(hidden, weight, target, bias, None, 1.0, -100, gradient)[0].isnan().all()


def test_float64():
    check(*problem(5, 24, 150, torch.float64, bias=True), softcap=5.0)
    hidden, weight, target, _ = problem(5, 24, 150, torch.float64)
    exact, exact_grad = oracle(torch.float64, hidden, weight, target, None, torch.ones(5, device=DEVICE), scale=1 / 3)
    found, u = kernels.forward(hidden, weight, target, None, None, 1 / 3, -100, True)
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(u, exact_grad, rtol=1e-12, atol=1e-13)


def test_chunks_and_splits_agree(monkeypatch):
    hidden, weight, target, _ = problem(40, 16, 200, torch.float32)
    whole = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True)
    scored = kernels.forward(hidden, weight, target, None, None, 1.0, -100, False)[0]
    monkeypatch.setattr(torch_kernels, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 16 * 208 * 4))
    monkeypatch.setattr(torch_kernels, "CHUNK_ROWS", 8)
    for method in METHODS:
        logprob, u = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
        torch.testing.assert_close(logprob, whole[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(u, whole[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(scored, whole[0], rtol=0, atol=2e-6)
    monkeypatch.setattr(kernels, "split_count", lambda *_: 4)  # 4 parts of the vocabulary where 1 is the default
    torch.testing.assert_close(kernels.score(hidden, weight, target), scored, rtol=0, atol=2e-6)


def test_runs_are_equal_to_the_bit():
    for method, dtype in (("cublas", torch.float16), ("shifted", torch.float32)):
        hidden, weight, target, _ = problem(20, 24, 200, dtype)
        first = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
        again = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
        assert all(bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strided_operands(dtype):
    hidden, weight, target, _ = problem(8, 24, 100, dtype)
    wide = torch.empty(8, 48, dtype=dtype, device=DEVICE)
    wide[:, 3:27] = hidden
    found = kernels.forward(wide[:, 3:27], weight.t().contiguous().t(), target, None, None, 1.0, -100, True)
    expected = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sixteen_bit_logits(dtype):
    """The epilogue by itself: logits in any dtype, E over them in place."""
    z = torch.randn(4, 160, device=DEVICE).to(dtype)
    target = torch.tensor([0, 7, 159, 3], device=DEVICE)
    p = torch.softmax(z.double(), 1)
    exact = torch.nn.functional.one_hot(target, 160) - p
    logprob = torch.empty(4, device=DEVICE)
    kernels.epilogue(z, z, target, logprob)
    torch.testing.assert_close(logprob.double(), p.gather(1, target[:, None]).log()[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(z.double(), exact, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trainable_head(dtype):
    hidden, weight, target, bias = problem(7, 20, 90, dtype, bias=True)
    target[3] = -100
    grad = torch.linspace(-1, 2, 7, device=DEVICE)
    leaves = {t: [leaf(x, t) for x in (hidden, weight, bias)] for t in (torch.float64, torch.float32, dtype)}
    gradients = {}
    for t in (torch.float64, torch.float32):
        h, w, b = leaves[t]
        out = reference.linear_logprob(h, w, target, bias=b, softcap=4.0, scale=0.5)
        gradients[t] = torch.autograd.grad(out, (h, w, b), grad.to(t))
    h, w, b = leaves[dtype]
    out = ops.linear_logprob(h, w, target, bias=b, softcap=4.0, scale=0.5, impl="triton")
    found = torch.autograd.grad(out, (h, w, b), grad)
    for x, eager, exact in zip(found, gradients[torch.float32], gradients[torch.float64], strict=True):
        assert_accurate(x, eager, exact, max_logit=4.0, gradient_factor=2.0 * len(hidden))


def test_tile_table_is_consistent():
    for tile in tiles.TABLE.values():
        assert tile.rows & (tile.rows - 1) == 0
        assert tile.cols & (tile.cols - 1) == 0
