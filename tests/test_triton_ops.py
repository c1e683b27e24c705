"""The Triton backend through the public ops: choice of backend, autograd, compilation, and what a GPU adds."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from triton_cases import DEVICE, bits, leaf, poisoned  # noqa: F401

from autoregembed import alignment_loss, info_nce, linear_logprob, ops
from autoregembed.kernels.triton import linear_logprob as kernels

OPS = torch.ops.autoregembed
cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def problem(n=12, d=16, v=100, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(v, d, generator=generator) / d**0.5).to(dtype).to(DEVICE)
    cu = torch.tensor([0, 3, 3, n], dtype=torch.int32, device=DEVICE)
    return hidden, weight, torch.randint(v, (n,), generator=generator).to(DEVICE), cu


def test_auto_never_picks_the_interpreter():
    if DEVICE == "cpu":
        assert ops.available_impls("cpu")["triton"] == "ok"
    assert ops.default_impl("cpu") != "triton"
    assert "got meta" in ops.available_impls("meta")["triton"]
    if DEVICE == "cuda":
        assert ops.default_impl("cuda", torch.bfloat16) == "triton"


@pytest.mark.parametrize("blocked", ["", "sys.modules['triton'] = None; "])
def test_without_interpreter_or_triton_the_backend_says_why(blocked):
    program = (
        f"import sys; {blocked}import torch, autoregembed\n"
        "assert 'triton' not in sys.modules or sys.modules['triton'] is None, 'imported for nothing'\n"
        "x = torch.zeros(2, 4)\n"
        "print(autoregembed.linear_logprob(x, x, torch.zeros(2, dtype=torch.int64)).shape)\n"
        "try: autoregembed.linear_logprob(x, x, torch.zeros(2, dtype=torch.int64), impl='triton')\n"
        "except autoregembed.ops.ImplUnavailable as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET=1" in done.stdout if not blocked else "triton is not installed" in done.stdout


def test_sums_per_sequence_and_their_gradient():
    hidden, weight, target, cu = problem()
    results = []
    for impl in ("triton", "torch"):
        h = leaf(hidden, torch.float32)
        sums = linear_logprob(h, weight, target, cu_seqlens=cu, impl=impl)
        assert sums.shape == (3,)
        upstream = torch.tensor([2.0, 5.0, -1.5], device=DEVICE)
        results.append((sums.detach(), torch.autograd.grad(sums, h, upstream)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("rows", [0, 5, 12])
def test_rows_that_are_scored_only(impl, rows):
    hidden, weight, target, cu = problem()
    h = leaf(hidden, torch.float32)
    whole = linear_logprob(h, weight, target, impl=impl)
    (full,) = torch.autograd.grad(whole.sum(), h)
    part = linear_logprob(h, weight, target, num_grad_rows=rows, impl=impl)
    torch.testing.assert_close(part, whole, rtol=0, atol=2e-6)
    (grad,) = torch.autograd.grad(part.sum(), h)
    torch.testing.assert_close(grad[:rows], full[:rows], rtol=1e-5, atol=2e-6)
    assert (grad[rows:] == 0).all()
    w = leaf(weight, torch.float32)
    trained = linear_logprob(h, w, target, num_grad_rows=rows, impl=impl)
    if impl != "reference" and rows > 0:
        first = linear_logprob(h[:rows], w, target[:rows], impl=impl)
        expected = torch.autograd.grad(first.sum(), w)[0]
        torch.testing.assert_close(torch.autograd.grad(trained.sum(), w)[0], expected, rtol=1e-5, atol=2e-6)


def test_rows_out_of_range_are_refused():
    hidden, weight, target, _ = problem()
    with pytest.raises(ValueError, match=r"num_grad_rows: got 13, expected 0\.\.12"):
        linear_logprob(hidden, weight, target, num_grad_rows=13)


def test_second_backward_and_no_double_backward():
    hidden, weight, target, cu = problem()
    h = leaf(hidden, torch.float32)
    loss = linear_logprob(h, weight, target, cu_seqlens=cu, impl="triton").square().sum()
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    (again,) = torch.autograd.grad(loss, h, retain_graph=True)
    assert bits(first, again)
    (scaled,) = torch.autograd.grad(loss * 1e6, h)
    torch.testing.assert_close(scaled, first * 1e6)
    logprob = linear_logprob(h, weight, target, impl="triton")
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad((logprob**2).sum(), h, create_graph=True)


def test_autocast_runs_in_sixteen_bits():
    hidden, weight, target, _ = problem()
    h = leaf(hidden, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        logprob = linear_logprob(h, weight, target, impl="triton")
        loss = info_nce(h, weight, impl="triton")
    expected = linear_logprob(leaf(hidden, torch.float16), weight.half(), target, impl="triton")
    assert logprob.dtype == torch.float32
    assert bits(logprob, expected)
    assert loss.dtype == torch.float32
    assert bits(loss, info_nce(leaf(hidden, torch.float16), weight.half(), impl="triton"))
    assert torch.autograd.grad(logprob.sum() + loss, h)[0].dtype == torch.float32


@pytest.mark.parametrize("gradient", [True, False])
def test_opcheck(gradient):
    hidden, weight, target, _ = problem(6, 8, 40)
    h = leaf(hidden, torch.float32) if gradient else hidden
    bias = torch.randn(40, device=DEVICE)
    torch.library.opcheck(
        OPS.linear_logprob.default, (h, weight, target, bias, 5.0, 0.5, -100, gradient, "triton"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
    torch.library.opcheck(OPS.scale_rows.default, (torch.randn(6, device=DEVICE), hidden))
    torch.library.opcheck(
        OPS.linear_logprob_backward.default,
        (torch.randn(6, device=DEVICE), hidden, weight, target, bias, None, 1.0, -100, "triton"),
    )


def test_compiles_without_a_graph_break():
    """A training step's loss: z spliced, scored per sequence, aligned, and contrasted."""
    k = 2

    def step(z, embedding, ids, cu, rows, row_cu, weight, target):
        x = ops.splice(z, embedding, ids, cu, impl="triton")
        scores = linear_logprob(x[rows], weight, target, cu_seqlens=row_cu, num_grad_rows=None, impl="triton")
        a, b, c = scores.chunk(3)
        aligned = alignment_loss(a, b, c, a.detach(), c.detach(), impl="triton")
        z_out = ops.pool_last_k(x, cu, k, impl="triton").mean(1)
        return aligned.loss + info_nce(z_out, z_out, impl="triton"), aligned.s1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for s, length in ((3, 4), (6, 5)):
        generator = torch.Generator().manual_seed(s)
        draw = functools.partial(torch.randn, generator=generator)
        cu = torch.arange(s + 1, device=DEVICE, dtype=torch.int32) * length
        arguments = (
            draw(20, 8).to(DEVICE),
            torch.randint(20, (s * length,), generator=generator).to(DEVICE),
            cu,
            (torch.arange(length - k + 1, device=DEVICE) + k - 1 + cu[:-1, None]).flatten(),
            torch.arange(s + 1, device=DEVICE, dtype=torch.int32) * (length - k + 1),
            draw(30, 8).to(DEVICE),
            torch.randint(30, (s * (length - k + 1),), generator=generator).to(DEVICE),
        )
        z = draw(s, k, 8).to(DEVICE)
        results = []
        for f in (step, compiled):
            leaf_z = leaf(z, torch.float32)
            loss, s1 = f(leaf_z, *arguments)
            results.append((loss.detach(), s1, torch.autograd.grad(loss, leaf_z)[0]))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)


def test_nothing_is_read_on_the_host():
    """Launchers on meta tensors, which have no data: any .item(), bool() or tolist() would raise."""
    from autoregembed.kernels.triton import primitives
    from bench.compile_report import cases

    seen = set()
    with primitives.recording(lambda kernel, *_: seen.add(kernel.__name__)):
        for _, call in cases():
            call()
    assert {"_epilogue", "_score", "_emit", "_finish", "_alignment_loss", "_splice", "_unit"} <= seen


@cuda
def test_a_step_never_waits_and_can_be_captured():
    hidden, weight, target, cu = problem(256, 64, 1000, torch.bfloat16)
    h = hidden.clone().requires_grad_()

    def step():
        sums = linear_logprob(h, weight, target, cu_seqlens=cu, num_grad_rows=200, impl="triton")
        loss = alignment_loss(sums, sums, sums, sums.detach(), sums.detach(), impl="triton").loss
        return torch.autograd.grad(loss + info_nce(h, weight, impl="triton"), h)[0]

    eager = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_stream = step()
    stream.synchronize()
    assert bits(on_stream, eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    h.data.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert not bits(captured, eager)
    torch.testing.assert_close(captured, step())


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device_is_respected():
    hidden, weight, target, _ = problem()
    expected = kernels.forward(hidden, weight, target, None, None, 1.0, -100, True)
    moved = [x.to("cuda:1") for x in (hidden, weight, target)]
    found = kernels.forward(*moved, None, None, 1.0, -100, True)
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
