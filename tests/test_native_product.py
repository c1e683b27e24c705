"""The cpp backend's own GEMM, bf16 operands into fp32 logits: on the matrix unit, as its emulation, under the head."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoregembed import ops
from autoregembed.kernels.native import linear_logprob as kernels
from autoregembed.kernels.torch import linear_logprob as torch_kernels
from autoregembed.ops import linear_logprob
from autoregembed.testing import assert_accurate

if (state := ops.available_impls()["cpp"]) != "ok" and os.environ.get("AUTOREGEMBED_NATIVE") != "1":
    pytest.skip(f"native: {state}", allow_module_level=True)
native = kernels.extension
LEVELS = native.levels()


@pytest.fixture(params=LEVELS)
def level(request):
    native.set_level(request.param)
    yield request.param
    native.set_level(LEVELS[0])


def packed(x, operand, threads=1):
    out = torch.full(native.packed_shape(*x.shape), 0x7FC0, dtype=torch.int16)  # NaN
    native.pack(x.view(torch.int16), out, operand, threads)
    return out


def product(a, b, threads=1):
    z = torch.full((len(a), len(b)), torch.nan)
    native.product(packed(a, "left", threads), packed(b, "right", threads), z, threads)
    return z


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    r=st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 205])),
    v=st.one_of(st.integers(1, 70), st.sampled_from([96, 97, 257])),
    d=st.one_of(st.integers(1, 80), st.sampled_from([383, 384, 385, 576, 801])),
    seed=st.integers(0, 2**31),
)
def test_product_accurate(level, r, v, d, seed):
    """Exact products, summed in fp32: within D eps of the sum of magnitudes, where rounding to bf16 would lose 2^-9."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, d, generator=generator).bfloat16() for n in (r, v))
    exact, magnitude = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    assert ((product(a, b) - exact).abs() <= d * torch.finfo(torch.float32).eps * magnitude).all()


def test_levels_agree_bit_for_bit():
    """So what holds at one level is known of all, those included that only another processor can run."""
    torch.manual_seed(0)
    a, b = torch.randn(50, 803).bfloat16(), torch.randn(101, 803).bfloat16()
    found = []
    for name in LEVELS:
        native.set_level(name)
        found.append(product(a, b))
    native.set_level(LEVELS[0])
    assert all(torch.equal(found[0], z) for z in found)


def test_same_bits_whatever_the_threads(level):
    torch.manual_seed(0)
    a, b = torch.randn(205, 390).bfloat16(), torch.randn(131, 390).bfloat16()
    wanted = product(a, b)
    for count in (2, 3, 8, 64):
        assert torch.equal(product(a, b, count), wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("row", "k"), [(0, 0), (13, 401), (26, 801)])
def test_bad_number_stays_in_its_row(level, bad, row, k):
    torch.manual_seed(0)
    a, b = torch.randn(27, 802).bfloat16(), torch.randn(35, 802).bfloat16()
    a[row, k] = bad
    z = product(a, b)
    assert not z[row].isfinite().any()
    assert z.isfinite().all(1).sum() == 26


def test_memory_between_rows_is_not_touched(level):
    torch.manual_seed(0)
    a, b = torch.randn(29, 400).bfloat16(), torch.randn(37, 400).bfloat16()
    memory = torch.full((29, 50), 7.0)
    native.product(packed(a, "left"), packed(b, "right"), memory[:, 3:40], 1)
    assert torch.equal(memory[:, 3:40], product(a, b))
    assert (memory[:, :3] == 7).all()
    assert (memory[:, 40:] == 7).all()
    apart = torch.zeros(29, 411).bfloat16()[:, 5:405].copy_(a)  # an odd stride and offset
    assert torch.equal(product(apart, b), product(a, b))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, p, z: native.pack(x[:, :0], p, "left", 1), ValueError, "x: got no column, expected at least one"),
        (lambda x, p, z: native.pack(x.T, p, "left", 1), ValueError, "x: got strided rows"),
        (lambda x, p, z: native.pack(x, p[:31], "left", 1), ValueError, r"packed: got \(31, 32\), expected \(32, 32\)"),
        (lambda x, p, z: native.pack(x, p, "middle", 1), ValueError, "operand: got 'middle', expected left, right"),
        (lambda x, p, z: native.pack(x.float(), p, "left", 1), TypeError, "incompatible"),
        (lambda x, p, z: native.product(p, p[:, :6], z, 1), ValueError, r"b: got \(32, 6\), expected \(32, 32\)"),
        (lambda x, p, z: native.product(p[:20], p, z, 1), ValueError, r"a: got \(20, 32\), expected \(32, 32\)"),
        (lambda x, p, z: native.product(p, p, z.T, 1), ValueError, "z: got strided rows"),
        (lambda x, p, z: native.product(p, p, z[:1].expand(4, 4), 1), ValueError, "z: got rows that overlap"),
    ],
)
def test_refuses(call, error, message):
    x = torch.zeros(8, 8, dtype=torch.int16)
    with pytest.raises(error, match=message):
        call(x, torch.zeros(32, 32, dtype=torch.int16), torch.zeros(4, 4))


@pytest.fixture
def as_on_a_bf16_processor(monkeypatch):
    monkeypatch.setattr(kernels, "MULTIPLIES_BF16", True)
    monkeypatch.setattr(kernels, "PRODUCT_OF_BF16", True)
    calls = []
    init = kernels.Logits.__init__
    monkeypatch.setattr(kernels.Logits, "__init__", lambda self, h: calls.append(len(h)) or init(self, h))
    return calls


@pytest.mark.parametrize(("n", "v", "d"), [(23, 1001, 40), (1, 7, 2), (60, 3000, 386), (23, 301, 41)])
@pytest.mark.parametrize("gradient", [True, False])
def test_head_accurate(level, as_on_a_bf16_processor, monkeypatch, n, v, d, gradient):
    monkeypatch.setattr(torch_kernels, "ROWS", dict.fromkeys(("cpu", "cuda"), 17))
    monkeypatch.setattr(torch_kernels, "COLUMNS", 300)
    monkeypatch.setattr(torch_kernels, "BLOCK_BYTES", dict.fromkeys(("cpu", "cuda"), 1))
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d).bfloat16(), (torch.randn(v, d) * 3 / d**0.5).bfloat16()
    bias, target, upstream = torch.randn(v).bfloat16(), torch.randint(v, (n,)), torch.randn(n)
    target[n // 2] = -100 if n > 1 else target[0]
    results = []
    for work, impl in ((torch.bfloat16, "cpp"), (torch.float32, "reference"), (torch.float64, "reference")):
        h = hidden.to(work, copy=True).requires_grad_(gradient)
        logprob = linear_logprob(h, weight.to(work), target, bias=bias.to(work), softcap=20.0, scale=0.5, impl=impl)
        if gradient:
            logprob.backward(upstream.to(logprob.dtype))
        results.append((logprob.detach(), h.grad))
    assert sum(as_on_a_bf16_processor) == n - (n > 1)
    assert_accurate(*(r[0] for r in results), max_logit=20.0)
    if gradient:
        factor = float(upstream.abs().max() * weight.abs().max())
        assert_accurate(*(r[1] for r in results), max_logit=20.0, gradient_factor=factor)


def test_strided_operands_change_nothing(as_on_a_bf16_processor):
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(9, 18).bfloat16(), torch.randn(333, 18).bfloat16(), torch.randint(333, (9,))
    wanted = linear_logprob(hidden, weight, target, impl="cpp")
    apart = torch.zeros(9, 40).bfloat16()[:, 3:39:2].copy_(hidden)
    assert torch.equal(
        linear_logprob(apart, torch.zeros(18, 333).bfloat16().T.copy_(weight), target, impl="cpp"), wanted
    )
    assert as_on_a_bf16_processor == [9, 9]


def test_a_step_takes_four_loads_and_four_products():
    """Read off the machine code, since few processors can run it: no tile register is loaded twice or spilled."""
    module = Path(native.__file__)
    if shutil.which("objdump") is None or "build" in module.parts:
        pytest.skip("needs objdump, and a module without sanitizers")
    code = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", module], stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [line.split("\t", 2)[-1].strip() for line in code.stdout.splitlines() if "\t" in line]
    places = [i for i, line in enumerate(lines) if line.startswith("tdpbf16ps")]
    if not places:
        pytest.skip("the compiler has no -mamx-bf16, or the system is no Linux on x86-64")
    for first in places[::4]:  # the loop is inlined where a tile is whole and where it is at the edge
        step = lines[first - 8 : first + 4]
        assert [line.split()[0] for line in step[-4:]] == ["tdpbf16ps"] * 4
        assert len([line for line in step if line.startswith("tileload")]) == 4, step
        assert not [line for line in step if line.startswith("tilestore")], step
