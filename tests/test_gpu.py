"""The kernels' production loops: several rows and tiles a program, many splits, offsets above 2³¹, bf16 throughout.

On a GPU at the sizes of real models, elsewhere in Triton's interpreter at sizes that take the same branches. It needs
torch, Triton and pytest alone; results are compared with float64 on the device, block by block.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.importorskip("numpy", reason="Triton's interpreter needs NumPy")

from triton_cases import DEVICE, poisoned  # noqa: F401

from autoregembed import alignment_loss, info_nce, ops, reference
from autoregembed.kernels.torch.linear_logprob import rows_per_chunk
from autoregembed.kernels.triton import linear_logprob as kernels
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.primitives import multiprocessors, split_count
from autoregembed.testing import assert_accurate, tensor_core_depth

GPU = DEVICE == "cuda"
METHODS = ["cublas", "shifted"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (N, D, V)
SHAPES = (
    [(4099, 640, 151665), (4099, 896, 50257), (4099, 4096, 151665), (4099, 640, 50257), (1031, 4096, 50257)]
    if GPU
    else [(41, 40, 333), (37, 64, 257)]
)
large = pytest.mark.skipif(not GPU, reason="more than 2³¹ elements take a GPU's memory")


def randn(*shape, seed=0, scale=1.0, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).mul_(scale).to(dtype)


def problem(n, d, v, dtype=torch.bfloat16, *, peak=4.0):
    """hidden, weight, target with logits of standard deviation `peak`; some rows point at their target."""
    hidden, weight = randn(n, d, dtype=dtype), randn(v, d, seed=1, scale=peak / d**0.5, dtype=dtype)
    target = torch.randint(v, (n,), generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE)
    target[:3] = torch.tensor([0, v - 1, v // 2], device=DEVICE)
    hidden[::2] += (weight[target[::2]] * (3 / peak)).to(dtype)
    target[n // 3] = -100
    return hidden, weight, target


def oracle(h, weight, target, dtype, *, bias=None, softcap=None, scale=1.0):
    """logprob, U and the largest |logit| of rows h in `dtype`, over blocks of the vocabulary."""
    h, z = h.to(dtype), []
    for block in weight.split(16384):
        z.append(h @ block.to(dtype).T)
    z = torch.cat(z, 1)
    z = scale * (z if bias is None else z + bias.to(dtype))
    slope = None
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap).square()
    logprob = z.gather(1, target[:, None])[:, 0] - z.logsumexp(1)
    e = torch.nn.functional.one_hot(target, len(weight)).to(dtype) - z.softmax(1)
    e = scale * (e if slope is None else e * slope)
    parts = zip(e.split(16384, 1), weight.split(16384), strict=True)
    return logprob, sum(a @ b.to(dtype) for a, b in parts), float(z.abs().max())


def sample(target, count=48):
    """Some rows that count: the first, the last, and others all over."""
    rows = torch.unique(torch.linspace(0, len(target) - 1, min(count, len(target)), device=DEVICE).long())
    return rows[target[rows] >= 0]


def check(hidden, weight, target, logprob, u=None, **options):
    rows = sample(target)
    exact, exact_u, top = oracle(hidden[rows], weight, target[rows], torch.float64, **options)
    eager, eager_u, _ = oracle(hidden[rows], weight, target[rows], torch.float32, **options)
    depth = tensor_core_depth(hidden)
    ignored = target == -100
    assert bool((logprob[ignored] == 0).all())
    assert bool(logprob.isfinite().all())
    assert_accurate(logprob[rows], eager, exact, max_logit=top, depth=depth)
    if u is not None:
        assert bool((u[ignored] == 0).all())
        assert bool(u.isfinite().all())
        factor = float(weight.abs().max())
        assert_accurate(u[rows], eager_u, exact_u, max_logit=top, gradient_factor=factor, depth=depth)


@pytest.mark.parametrize(
    ("method", "dtype"), [(m, t) for m in METHODS for t in DTYPES if (m, t) != ("shifted", torch.float16)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_head(shape, method, dtype):
    hidden, weight, target = problem(*shape, dtype)
    step = rows_per_chunk(shape[0], shape[2], 4, hidden.device)
    tile = tiles.tile("epilogue", hidden.device, torch.float32)
    assert step > tile.programs * multiprocessors(hidden.device), "no program has two rows"
    logprob, u = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True, method)
    check(hidden, weight, target, logprob, u)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scorer(shape, dtype):
    hidden, weight, target = problem(*shape, dtype)
    check(hidden, weight, target, kernels.score(hidden, weight, target))


@pytest.mark.parametrize("method", [*METHODS, "score"])
def test_bias_softcap_and_scale(method):
    n, d, v = SHAPES[0]
    hidden, weight, target = problem(n, d, v)
    options = {"bias": randn(v, seed=3), "softcap": 30.0, "scale": 0.5}
    gradient = method != "score"
    logprob, u = kernels.forward(
        hidden, weight, target, *options.values(), -100, gradient, method if gradient else None
    )
    check(hidden, weight, target, logprob, u if gradient else None, **options)


@pytest.mark.parametrize("n", [1, 16] if not GPU else [1, 130, 300, 700])
def test_more_than_two_splits(n):
    d, v = SHAPES[0][1:]
    hidden, weight, target = problem(max(n, 4), d, v)
    hidden, target = hidden[:n], target[:n]
    tile = tiles.tile("score", hidden.device, hidden.dtype, d)
    blocks, processors = -(-n // tile.rows), multiprocessors(hidden.device) * tile.programs
    parts = split_count(blocks, -(-v // tile.cols), processors)
    assert parts > 2
    check(hidden, weight, target, kernels.score(hidden, weight, target))
    check(hidden, weight, target, *kernels.forward(hidden, weight, target, None, None, 1.0, -100, True))


def test_persistent_programs_take_several_tiles():
    n, d, v = SHAPES[0]
    hidden, weight, target = problem(n, d, v)
    for name in ("score", "emit"):
        tile = tiles.tile(name, hidden.device, hidden.dtype, d)
        units = -(-n // tile.rows) * -(-v // tile.cols)
        assert units > 2 * multiprocessors(hidden.device) * tile.programs
    whole = kernels.score(hidden, weight, target)
    again = kernels.score(hidden, weight, target)
    assert torch.equal(whole, again)


@pytest.mark.parametrize(
    ("b", "p", "d"), [(4099, 8201, 640), (4099, 8201, 896), (2051, 8201, 4096)] if GPU else [(19, 70, 40)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_info_nce(b, p, d, dtype):
    q, passages = randn(b, d, dtype=dtype), randn(p, d, seed=1, dtype=dtype)
    passages[:b] = (0.6 * q + 0.8 * passages[:b]).to(dtype)
    results = {}
    for t in (torch.float64, torch.float32):
        leaves = [x.detach().clone().to(t).requires_grad_() for x in (q, passages)]
        loss = reference.info_nce(*leaves, torch.arange(b, device=DEVICE), temperature=0.05)
        results[t] = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    leaves = [x.clone().requires_grad_() for x in (q, passages)]
    loss = info_nce(*leaves, temperature=0.05, impl="triton")
    found = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    depth = tensor_core_depth(q)
    shortest = min(float(x.double().norm(dim=1).min()) for x in (q, passages))
    for i, (x, exact, eager) in enumerate(zip(found, results[torch.float64], results[torch.float32], strict=True)):
        assert_accurate(
            x, eager, exact, max_logit=20.0, gradient_factor=20.0 / (b * shortest) if i else 1.0, depth=depth
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_splice_and_pool(dtype):
    s, d = (3001, 4096) if GPU else (9, 40)
    lengths = torch.arange(s) % 23 + 6
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
    t = int(cu[-1])
    z, embedding = randn(s // 2 + 1, 5, d, dtype=dtype), randn(97, d, seed=1, dtype=dtype)
    ids, z_index = torch.arange(t, device=DEVICE) % 97, torch.arange(s, device=DEVICE) // 2
    upstream = randn(t, d, seed=2, dtype=dtype)
    leaf = z.clone().requires_grad_()
    found = ops.splice(leaf, embedding, ids, cu, z_index, offset=1, impl="triton")
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    exact_leaf = z.double().requires_grad_()
    exact = reference.splice(exact_leaf, embedding.double(), ids, cu, z_index, offset=1)
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
    assert torch.equal(found.double(), exact)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=tolerance, atol=tolerance * 8)
    leaf = upstream.clone().requires_grad_()
    pooled = ops.pool_last_k(leaf, cu, 5, impl="triton")
    assert torch.equal(pooled, reference.pool_last_k(upstream, cu, 5))
    (gradient,) = torch.autograd.grad(pooled, leaf, randn(*pooled.shape, seed=3, dtype=dtype))
    assert int(gradient.ne(0).any(1).sum()) == 5 * s


@pytest.mark.parametrize("negatives", ["independent", "joint"])
def test_alignment_and_sums(negatives):
    b, m = (4099, 15) if GPU else (41, 3)
    scores = [randn(*shape, seed=i, scale=20.0, dtype=torch.float32) - 60
              for i, shape in enumerate([(b,), (b,), (b, m), (b,), (b, m)])]  # fmt: skip
    results = []
    for t, impl in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton")):
        leaves = [x.to(t).requires_grad_() for x in scores[:3]]
        out = alignment_loss(*leaves, *(x.to(t) for x in scores[3:]), negatives=negatives, impl=impl)
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, leaves)])
    for exact, eager, found in zip(*results, strict=True):
        assert_accurate(found, eager, exact)
    s, length = (65537, 24) if GPU else (70, 9)
    cu = torch.nn.functional.pad((torch.arange(s) % length).cumsum(0), (1, 0)).int().to(DEVICE)
    x = randn(int(cu[-1]), dtype=torch.float32)
    exact = reference.segment_sum(x.double(), cu)
    torch.testing.assert_close(ops.segment_sum(x, cu, impl="triton").double(), exact, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Offsets above 2³¹


@large
@pytest.mark.parametrize("method", [*METHODS, "score"])
def test_weight_above_2_to_the_31(method):
    n, d, v = 64, 16384, 151665
    assert v * d > 2**31
    hidden, weight, target = problem(n, d, v)
    target[3:9] = v - 1 - torch.arange(6, device=DEVICE)
    gradient = method != "score"
    found = kernels.forward(hidden, weight, target, None, None, 1.0, -100, gradient, method if gradient else None)
    check(hidden, weight, target, found[0], found[1] if gradient else None)


@large
@pytest.mark.parametrize("method", [*METHODS, "score"])
def test_hidden_above_2_to_the_31(method):
    n, d, v = 2**21 + 77, 1024, 64
    assert n * d > 2**31
    hidden, weight, target = problem(n, d, v)
    gradient = method != "score"
    found = kernels.forward(hidden, weight, target, None, None, 1.0, -100, gradient, method if gradient else None)
    check(hidden, weight, target, found[0], found[1] if gradient else None)
    if gradient:
        g = randn(n, seed=5, dtype=torch.float32)
        scaled = kernels.scale_rows(g, found[1])
        rows = sample(target)
        assert torch.equal(scaled[rows], (g[rows, None] * found[1][rows].float()).to(scaled.dtype))


@large
def test_logits_above_2_to_the_31():
    rows, v = 17011, 151665
    assert rows * v > 2**31
    stride = -(-v // 16) * 16
    z = torch.empty(rows, stride, dtype=torch.float32, device=DEVICE).normal_(std=4.0)[:, :v]
    target = torch.arange(rows, device=DEVICE) * 8 % v
    some = sample(target)
    exact = z[some].double()
    p = exact.softmax(1)
    logprob = torch.empty(rows, device=DEVICE)
    kernels.epilogue(z, z, target, logprob)
    wanted = exact.gather(1, target[some, None])[:, 0] - exact.logsumexp(1)
    torch.testing.assert_close(logprob[some].double(), wanted, rtol=1e-6, atol=1e-5)
    e = torch.nn.functional.one_hot(target[some], v) - p
    torch.testing.assert_close(z[some].double(), e, rtol=1e-4, atol=1e-7)


@large
def test_packs_above_2_to_the_31():
    s, length, d = 65536, 33, 1024
    cu = torch.arange(s + 1, dtype=torch.int32, device=DEVICE) * length
    t = s * length
    assert t * d > 2**31
    z, embedding = randn(s, 5, d), randn(97, d, seed=1)
    ids = torch.arange(t, device=DEVICE) % 97
    found = ops.splice(z, embedding, ids, cu, impl="triton")
    at = cu[-4:-1].long()[:, None]
    assert torch.equal(found[at + torch.arange(5, device=DEVICE)], z[-3:])
    rest = at + torch.arange(5, length, device=DEVICE)
    assert torch.equal(found[rest], embedding[ids[rest]])
    assert torch.equal(
        ops.pool_last_k(found, cu, 5, impl="triton")[-3:], found[at + length - 5 + torch.arange(5, device=DEVICE)]
    )


@large
def test_passages_above_2_to_the_31():
    b, p, d = 32, 2**21 + 5, 1024
    assert p * d > 2**31
    q, passages = randn(b, d), randn(p, d, seed=1)
    target = p - 1 - torch.arange(b, device=DEVICE)
    passages[target] = (0.9 * q + 0.1 * passages[target]).to(q.dtype)
    leaf = q.clone().requires_grad_()
    loss = info_nce(leaf, passages, target, temperature=0.05, impl="triton")
    loss.backward()
    cosine = torch.nn.functional.normalize(q.double(), dim=1)
    z = (
        torch.cat([cosine @ torch.nn.functional.normalize(x.double(), dim=1).T for x in passages.split(65536)], 1)
        / 0.05
    )
    exact = (z.logsumexp(1) - z.gather(1, target[:, None])[:, 0]).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
    assert bool(leaf.grad.isfinite().all())
    assert bool((leaf.grad != 0).any(1).all())
