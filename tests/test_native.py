"""The cpp backend: its kernel at every machine code level, its threads, and an installation without it."""

import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from autoregembed import ops
from autoregembed.kernels.native import linear_logprob as kernels
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.ops import ImplUnavailable, linear_logprob
from autoregembed.testing import assert_accurate

if (state := ops.available_impls()["cpp"]) != "ok" and os.environ.get("AUTOREGEMBED_NATIVE") != "1":
    pytest.skip(f"native: {state}", allow_module_level=True)
native = kernels.extension
LEVELS = native.levels()
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(params=LEVELS)
def level(request):
    native.set_level(request.param)
    yield request.param
    native.set_level(LEVELS[0])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def epilogue(logits, target, *, bias=None, softcap=None, scale=1.0, store="fp32", threads=1, width=None):
    """(logprob, gradient of logprob with respect to the logits), in blocks of `width` columns; outputs NaN-poisoned."""
    z = logits.clone()
    state, e = torch_kernels.State.start(len(z), z.device), []
    width = width or z.shape[1]
    for first in range(0, z.shape[1], width):
        block = z[:, first : first + width].clone()
        rescale = torch.full((len(z),), torch.nan, dtype=torch.float64)
        some_bias = None if bias is None else bias[first : first + width].clone()
        native.epilogue(block, target - first, some_bias, softcap, scale, store, *state, rescale, threads)
        part = block.view(torch.bfloat16)[:, : block.shape[1]] if store == "bf16" and len(z) else block
        e = [x * rescale[:, None] for x in e] + [part.double()]
    logprob, at_target, elsewhere = state.finish(softcap, scale)
    if store == "nothing" or len(z) == 0:
        return logprob.float(), None
    gradient = torch.cat(e, 1) * elsewhere[:, None]
    assert (gradient.gather(1, target[:, None]) == 0).logical_or(gradient.isnan().any(1, keepdim=True)).all()
    return logprob.float(), gradient.scatter(1, target[:, None], at_target[:, None])


def exact(logits, target, bias=None, softcap=None, scale=1.0, dtype=torch.float64):
    z = logits.to(dtype).requires_grad_()
    x = scale * (z if bias is None else z + bias.to(dtype))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    logprob = x.gather(1, target[:, None]).squeeze(1) - x.logsumexp(1)
    logprob.sum().backward()
    return logprob.detach(), z.grad, x.detach().abs().nan_to_num(posinf=0).max()


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("name", ["exp", "tanh"])
def test_elementary_functions_within_the_stated_ulp(level, name):
    exponents = torch.linspace(-40, 6.3, 200_001, dtype=torch.float64)
    x = (2.0**exponents).float()
    x = -x[x <= 80] if name == "exp" else torch.cat([x, -x])
    x = torch.cat([x, torch.linspace(-80, 0, 1_000_003), torch.zeros(1)])
    y = torch.full_like(x, torch.nan)
    native.elementary(name, x, y)
    wanted = getattr(x.double(), name)()
    ulp = torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted)[1] - 24)
    assert ((y.double() - wanted).abs() / ulp).max() <= {"exp": 1.1, "tanh": 1.5}[name]


def test_elementary_functions_at_their_edges(level):
    x = torch.tensor([-torch.inf, -1e30, -80.001, -0.0, torch.nan])
    y = torch.empty_like(x)
    native.elementary("exp", x, y)
    assert torch.equal(y[:4], torch.tensor([0.0, 0, 0, 1]))
    assert y[4].isnan()
    x = torch.tensor([-torch.inf, torch.inf, 1e30, -12, torch.nan])
    native.elementary("tanh", x, y)
    assert torch.equal(y[:4], torch.tensor([-1.0, 1, 1, -1]))
    assert y[4].isnan()


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "rows": st.sampled_from([0, 1, 2, 5]),
        "v": st.one_of(st.integers(1, 70), st.sampled_from([255, 1023, 1024, 1025, 2111, 4099])),
        "largest": st.sampled_from([0.0, 1.0, 20.0, 1e4]),
        "bias": st.sampled_from(["none", "plain", "-inf"]),
        "softcap": st.sampled_from([None, 0.7, 30.0]),
        "scale": st.sampled_from([1.0, 0.37, -1.5, 0.0]),
        "certain": st.booleans(),
        "store": st.sampled_from(["fp32", "fp32", "bf16", "nothing"]),
        "width": st.sampled_from([None, 1, 100, 1024]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_epilogue_accurate(level, case):
    generator = torch.Generator().manual_seed(case["seed"])
    r, v = case["rows"], case["v"]
    logits = torch.empty(r, v).uniform_(-1, 1, generator=generator) * case["largest"]
    target = torch.randint(v, (r,), generator=generator)
    bias, scale = None, case["scale"]
    if case["bias"] != "none":
        bias = torch.randn(v, generator=generator)
        if case["bias"] == "-inf" and scale > 0:
            bias[torch.rand(v, generator=generator) < 0.3] = -torch.inf
            bias[target] = 0.5
    if case["certain"] and r:
        logits[0, target[0]] += 40 if scale >= 0 else -40
    head = {"bias": bias, "softcap": case["softcap"], "scale": scale}
    width = case["width"] if v < 300 or case["width"] != 1 else None
    logprob, gradient = epilogue(logits, target, **head, store=case["store"], width=width)
    wanted, wanted_gradient, max_logit = exact(logits, target, **head) if r else (torch.zeros(0).double(),) * 3
    eager, eager_gradient, _ = exact(logits, target, **head, dtype=torch.float32) if r else (torch.zeros(0),) * 3
    max_logit = float(max_logit) if r else 0.0
    assert_accurate(logprob, eager, wanted, max_logit=max_logit)
    if gradient is not None:
        dtype = torch.bfloat16 if case["store"] == "bf16" else torch.float32
        rounded = gradient.to(dtype)
        assert_accurate(rounded, eager_gradient, wanted_gradient, max_logit=max_logit, gradient_factor=abs(scale))


def test_bf16_gradient_is_the_fp32_one_rounded_to_nearest(level):
    torch.manual_seed(0)
    x = torch.linspace(-10, 0, 1_000_003)
    native.elementary("exp", x, y := torch.empty_like(x))
    ties = x[y.view(torch.int32) & 0xFFFF == 0x8000]  # exp half-way between two bf16 numbers
    assert len(ties) > 5
    for logits, softcap in ((torch.randn(3, 2111) * 4, 5.0), (torch.cat([ties, x[-1:]])[None], None)):
        v = logits.shape[1]
        target = torch.full((len(logits),), v - 1)
        e = {store: logits.clone() for store in ("fp32", "bf16")}
        for store, z in e.items():
            state = torch_kernels.State.start(len(z), z.device)
            native.epilogue(z, target, None, softcap, 1.0, store, *state, torch.empty_like(state.running_max), 1)
        assert torch.equal(e["bf16"].view(torch.bfloat16)[:, :v], e["fp32"].bfloat16())


def test_a_bound_stays_until_a_logit_is_far_above_it(level):
    values, state = torch.tensor([1.0, 8.0, 10.0]), torch_kernels.State.start(1, torch.device("cpu"))
    seen = []
    for value in values:
        rescale = torch.empty(1, dtype=torch.float64)
        block, target = value.expand(1, 64).clone(), torch.tensor([-1])
        native.epilogue(block, target, None, None, 1.0, "fp32", *state, rescale, 1)
        seen.append((state.running_max.item(), rescale.item()))
    assert seen == [(1.0, 0.0), (1.0, 1.0), (10.0, math.exp(-9))]
    lse = state.running_max + state.running_sumexp.log()
    torch.testing.assert_close(lse, values.double().repeat_interleave(64).logsumexp(0)[None], rtol=1e-6, atol=0)


def test_certain_target_keeps_its_gradient(level):
    """1 − p far below eps: as running_sumexp / s, never as a difference with 1."""
    logits = torch.full((1, 5000), -30.0)
    logits[0, 4321] = 0.0
    _, gradient = epilogue(logits, torch.tensor([4321]))
    _, wanted, _ = exact(logits, torch.tensor([4321]))
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=0)
    assert 0 < gradient[0, 4321] < 1e-8


def test_sum_of_many_equal_terms(level):
    """Added one by one in fp32, 150k equal probabilities would drift by hundreds of eps."""
    logits = torch.full((1, 151_665), -0.3567)
    logits[0, 7] = 0.0
    logprob, _ = epilogue(logits, torch.tensor([7]))
    wanted, _, _ = exact(logits, torch.tensor([7]))
    assert abs(float(logprob - wanted)) <= 4 * torch.finfo(torch.float32).eps * abs(float(wanted))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 40, 4098])
def test_bad_logit_is_never_hidden(level, bad, at):
    logits = torch.zeros(2, 4099)
    logits[0, at] = bad
    logprob, gradient = epilogue(logits, torch.tensor([17, 17]))
    assert not logprob[0].isfinite()
    assert gradient[0].isnan().any()
    assert logprob[1].isfinite()


def test_row_of_minus_infinity_is_nan_as_in_eager(level):
    logits = torch.full((1, 100), -torch.inf)
    assert epilogue(logits, torch.tensor([3]))[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [False, True])
def test_head_accurate(level, dtype, trainable, monkeypatch):
    # Several blocks and chunks, the last ones short.
    monkeypatch.setattr(torch_kernels, "ROWS", dict.fromkeys(("cpu", "cuda"), 7))
    monkeypatch.setattr(torch_kernels, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 7 * 1001 * 4))
    monkeypatch.setattr(torch_kernels, "COLUMNS", 300)
    monkeypatch.setattr(torch_kernels, "BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 1))
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(23, 40).to(dtype), torch.randn(1001, 40).to(dtype), torch.randn(1001).to(dtype)
    bias[::5] = -torch.inf
    target = torch.randint(1001, (23,)) // 5 * 5 + 1
    target[3], target[22] = -100, -100
    upstream = torch.randn(23)
    results = []
    for work, impl in ((dtype, "cpp"), (torch.float32, "reference"), (torch.float64, "reference")):
        h, w = hidden.to(work, copy=True).requires_grad_(), weight.to(work, copy=True).requires_grad_(trainable)
        logprob = linear_logprob(h, w, target, bias=bias.to(work), softcap=20.0, scale=0.5, impl=impl)
        logprob.backward(upstream.to(logprob.dtype))
        results.append((logprob.detach(), h.grad, w.grad))
    factor = float(upstream.abs().max() * weight.abs().max())
    assert_accurate(*(r[0] for r in results), max_logit=20.0)
    assert_accurate(*(r[1] for r in results), max_logit=20.0, gradient_factor=factor)
    if trainable:
        factor = float(upstream.abs().max() * hidden.abs().max())
        assert_accurate(*(r[2] for r in results), max_logit=20.0, gradient_factor=factor)


# ----------------------------------------------------------------------------------------------------------------------
# Memory layout and arguments


def test_unaligned_and_strided_inputs_change_nothing():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 17), torch.randn(333, 17), torch.randn(333)
    target = torch.randint(333, (9,))
    wanted = linear_logprob(hidden, weight, target, bias=bias, impl="cpp")
    unaligned = torch.empty(334)[1:].copy_(bias)
    found = linear_logprob(
        torch.randn(9, 40)[:, 5:39:2].copy_(hidden),
        torch.empty(17, 333).T.copy_(weight),
        torch.empty(18, dtype=torch.int64)[::2].copy_(target),
        bias=torch.empty(999)[::3].copy_(bias),
        impl="cpp",
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    assert torch.equal(linear_logprob(hidden, weight, target, bias=unaligned, impl="cpp"), wanted)
    assert torch.equal(linear_logprob(hidden, weight, target.int(), bias=bias, impl="cpp"), wanted)


@pytest.mark.parametrize("offset", [1, 3])
def test_rows_apart_and_off_alignment_stay_apart(level, offset):
    """A row stride above V, rows off every alignment: the numbers between the rows are not touched."""
    torch.manual_seed(0)
    logits, target = torch.randn(4, 131), torch.randint(131, (4,))
    for store in ("fp32", "bf16"):
        memory = torch.full((4, 150), 7.0)
        z = memory[:, offset : offset + 131].copy_(logits)
        state = torch_kernels.State.start(4, z.device)
        native.epilogue(z, target, None, None, 1.0, store, *state, torch.empty_like(state.running_max), 1)
        assert torch.equal(state.finish(None, 1.0)[0].float(), epilogue(logits, target)[0])
        assert (memory[:, :offset] == 7).all()
        assert (memory[:, offset + 131 :] == 7).all()


def arguments(**changes):
    names = (
        "logits",
        "target",
        "bias",
        "softcap",
        "scale",
        "store",
        "running_max",
        "running_sumexp",
        "target_logit",
        "rescale",
        "threads",
    )
    state = torch.zeros(4, 2, dtype=torch.float64)
    values = (torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), None, None, 1.0, "fp32", *state, 1)
    return {**dict(zip(names, values, strict=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(8, 2).T}, ValueError, "logits: got strided rows"),
        ({"logits": torch.zeros(1, 8).expand(2, 8)}, ValueError, "logits: got rows that overlap"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits: got no column"),
        ({"logits": torch.zeros(2, 8).double()}, TypeError, "incompatible"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target: got 3 numbers, expected 2"),
        ({"target": torch.zeros(4, dtype=torch.int64)[::2]}, ValueError, "target: got a strided array"),
        ({"bias": torch.zeros(7)}, ValueError, "bias: got 7 numbers, expected 8"),
        ({"running_sumexp": torch.zeros(4).double()[::2]}, ValueError, "running_sumexp: got a strided array"),
        ({"running_max": torch.zeros(3).double()}, ValueError, "running_max: got 3 numbers, expected 2"),
        ({"rescale": torch.zeros(2)}, TypeError, "incompatible"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"store": "fp8"}, ValueError, "store: got 'fp8'"),
    ],
)
def test_kernel_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        native.epilogue(**arguments(**changes))


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="level: got 'avx10'"):
        native.set_level("avx10")


# ----------------------------------------------------------------------------------------------------------------------
# Threads and processes


def test_same_bits_whatever_the_threads(level):
    torch.manual_seed(0)
    logits, target = torch.randn(37, 4099) * 5, torch.randint(4099, (37,))
    logprob, gradient = epilogue(logits, target, softcap=9.0)
    for count in (2, 3, 8, 64):
        found, found_gradient = epilogue(logits, target, softcap=9.0, threads=count)
        assert torch.equal(found, logprob)
        assert torch.equal(found_gradient, gradient)


def test_same_bits_a_thousand_times():
    torch.manual_seed(0)
    logits, target = torch.randn(16, 1027) * 5, torch.randint(1027, (16,))
    logprob, gradient = epilogue(logits, target, threads=2)
    for i in range(1000):
        found, found_gradient = epilogue(logits, target, threads=2 if i % 10 == 0 else 1)
        assert torch.equal(found, logprob)
        assert torch.equal(found_gradient, gradient)


def test_python_threads_at_the_same_time(threads):
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    logits, target = torch.randn(16, 2000) * 5, torch.randint(2000, (16,))
    logprob, gradient = epilogue(logits, target)
    with ThreadPoolExecutor(4) as pool:
        for found, found_gradient in pool.map(lambda _: epilogue(logits, target, threads=2), range(40)):
            assert torch.equal(found, logprob)
            assert torch.equal(found_gradient, gradient)


@pytest.mark.parametrize("flush", [False, True])
def test_floating_point_state_is_restored(threads, flush):
    """Denormals live on, or stay flushed, as before the call: here and on the threads that torch computes with."""
    small, big = torch.full((8,), 1e-40), torch.full((1 << 18,), 1e-40)
    try:
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormals")
        alive = [(x * 1.0 != 0).sum().item() for x in (small, big)]
        assert (alive[0] == 0) is flush
        epilogue(torch.randn(64, 500), torch.zeros(64, dtype=torch.int64), threads=3)
        assert [(x * 1.0 != 0).sum().item() for x in (small, big)] == alive
    finally:
        torch.set_flush_denormal(False)


def _in_child(logits, target, queue):
    queue.put(epilogue(logits, target, threads=2)[0].tolist())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_works_in_a_forked_child():
    """GCC's OpenMP pool hangs there; the kernel must not."""
    torch.manual_seed(0)
    logits, target = torch.randn(64, 500), torch.zeros(64, dtype=torch.int64)
    wanted = epilogue(logits, target, threads=2)[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(logits, target, queue), daemon=True)
    child.start()
    try:
        assert torch.equal(torch.tensor(queue.get(timeout=60)), wanted)
    finally:
        child.kill()


class _Scores(Dataset):
    """Scores in the workers, as a data set that filters by likelihood would."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        hidden, weight = torch.randn(8, 16, generator=generator), torch.randn(300, 16, generator=generator)
        return linear_logprob(hidden, weight, torch.arange(8), impl="cpp")


def test_works_in_data_loader_workers():
    data = _Scores()
    wanted = torch.stack([data[i] for i in range(len(data))])
    found = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2, timeout=60)))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The table of backends, and an installation without the module


def test_auto_takes_native_on_a_cpu(monkeypatch):
    calls = []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *a: calls.append(1) or forward(*a))
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    linear_logprob(hidden, weight, target)
    assert calls == [1]
    linear_logprob(hidden.double(), weight.double(), target)
    assert calls == [1]


def test_explicit_native_raises_where_it_cannot_run():
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ImplUnavailable, match="float64"):
        linear_logprob(hidden.double(), weight.double(), target, impl="cpp")
    with pytest.raises(ImplUnavailable, match="no such kernel"):
        ops.alignment_loss(*torch.zeros(3, 2), ref_margin="none", impl="cpp")
    assert "CPU" in ops.available_impls("cuda")["cpp"]


def test_failed_build_leaves_its_reason(tmp_path):
    """pip hides what a build printed; the table of backends, and so `autoregembed doctor`, repeat it."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for name in ("autoregembed", "kernels"):
        ignored = shutil.ignore_patterns("_native*", "__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "empty"), "PYTHONPATH": str(tmp_path)}
    for name in ("AUTOREGEMBED_NATIVE", "AUTOREGEMBED_NATIVE_MODULE"):
        environment.pop(name, None)

    def python(*command):
        return subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, text=True, capture_output=True)

    built = python("setup.py", "build_ext", "--build-lib", ".", "--build-temp", "temp")
    assert built.returncode == 0, built.stderr
    # An editable installation of this repository would answer for any submodule that is missing in the copy.
    script = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
from autoregembed import ops
print(ops.available_impls()["cpp"])
"""
    state = python("-c", script)
    assert state.stdout.strip() == "not built: cmake cannot be run: No such file or directory", state.stderr
