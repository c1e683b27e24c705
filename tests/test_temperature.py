"""Temperatures that are trained, and what counts as a number."""

import math

import numpy as np
import pytest
import torch
from triton_cases import DEVICE, leaf

from autoregembed import (
    AlignmentLoss,
    GenerativeInfoNCELoss,
    InfoNCELoss,
    LinearLogprob,
    Splice,
    alignment_loss,
    generative_info_nce,
    info_nce,
    linear_logprob,
    ops,
    reference,
    score_distillation,
    splice,
)
from autoregembed.testing import EPS32, assert_accurate

IMPLS = [name for name, state in ops.available_impls(DEVICE).items() if state == "ok"]
P = 300  # passages: several blocks of the interpreter, so that a later one has the largest cosine


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def contrastive(function, dtype, tau, ids=None, frozen=False):
    """loss, and the gradients of the temperature and, unless frozen, of both sides."""
    leaves = [leaf(tau, tau.dtype), *(leaf(numbers(*shape, seed=shape[0]), dtype) for shape in ((5, 16), (P, 16)))]
    if frozen:
        leaves[1:] = [x.detach() for x in leaves[1:]]
    loss = function(*leaves[1:], temperature=leaves[0], passage_ids=ids)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves[: 1 if frozen else 3])]


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("value", [0.05, 1.0])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_info_nce(impl, dtype, value, repeated, frozen):
    if impl == "cpp" and (repeated or dtype == torch.float64):
        pytest.skip("has none")
    ids = torch.arange(P, device=DEVICE) % 200 if repeated else None
    tau = torch.tensor(value, device=DEVICE, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    found = contrastive(lambda *x, **o: info_nce(*x, **o, impl=impl), dtype, tau, ids, frozen)
    # What is exact is exact for the inputs as they are, rounded to 16 bits.
    sides = [numbers(*shape, seed=shape[0]).to(dtype) for shape in ((5, 16), (P, 16))]

    def exactly(wide):
        leaves = [leaf(x, wide) for x in (tau, *sides)]
        loss = reference.info_nce(*leaves[1:], temperature=leaves[0], passage_ids=ids)
        return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]

    exact, eager = exactly(torch.float64), exactly(torch.float32)
    assert found[1].dtype == tau.dtype
    assert found[1].abs() > 1e-3
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact[: len(found)], rtol=1e-11, atol=1e-12)
        return
    assert_accurate(found[0], eager[0], exact[0], max_logit=1 / value)
    # d loss / dτ is the mean of cosine differences over τ²; their rounding is that of fp32, in 16 bits as well.
    assert_accurate(found[1], eager[1], exact[1], max_logit=1 / value, gradient_factor=3 / value)
    rounding = torch.finfo(dtype).eps / (4 * EPS32) if dtype == torch.float16 else 0.0
    for x, f32, f64 in zip(found[2:], eager[2 : len(found)], exact[2 : len(found)], strict=True):
        assert_accurate(x, f32, f64, max_logit=1 / value + rounding, gradient_factor=3 / value)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl not in ("cpp", "reference")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "query_to_query", "doc_to_query")])
def test_info_nce_directions(impl, dtype, directions):
    sides = [numbers(*shape, seed=shape[0]).to(dtype) for shape in ((5, 16), (9, 16))]

    def gradient(function, wide, **options):
        tau = torch.tensor(0.3, device=DEVICE, dtype=torch.float64 if wide == torch.float64 else torch.float32)
        tau.requires_grad_()
        loss = function(*(x.to(wide) for x in sides), temperature=tau, directions=directions, margin=0.2, **options)
        return torch.autograd.grad(loss, tau)[0]

    exact = gradient(reference.info_nce, torch.float64)
    assert exact.abs() > 1e-2
    found, eager = gradient(info_nce, dtype, impl=impl), gradient(reference.info_nce, torch.float32)
    assert_accurate(found, eager, exact, max_logit=1 / 0.3, gradient_factor=1 / 0.3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunks", [False, True])
def test_info_nce_gradcheck(impl, chunks, monkeypatch):
    if impl == "cpp":
        pytest.skip("has no float64")
    if chunks:
        from autoregembed.kernels.torch import linear_logprob as torch_kernels

        monkeypatch.setattr(torch_kernels, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 2 * 5 * 8))
    tau = torch.tensor([0.4], dtype=torch.float64, device=DEVICE, requires_grad=True)
    query, passages = (numbers(*shape, seed=shape[0]).double().requires_grad_() for shape in ((3, 2), (5, 2)))
    ids = torch.arange(5, device=DEVICE) % 3
    function = lambda t, q, p: info_nce(q, p, temperature=t, passage_ids=ids, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(function, (tau, query, passages))


@pytest.mark.parametrize("direction", ["passages", "queries", "both"])
@pytest.mark.parametrize("marginal", ["none", "batch"])
def test_generative_info_nce(direction, marginal):
    tau = torch.tensor(2.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    scores = (-20 * numbers(3, 5).double().abs()).requires_grad_()
    options = {"direction": direction, "marginal": marginal}
    assert torch.autograd.gradcheck(lambda t, s: generative_info_nce(s, temperature=t, **options), (tau, scores))
    loss = generative_info_nce(scores, temperature=tau, **options)
    assert torch.autograd.grad(loss, tau)[0].abs() > 1e-3


@pytest.mark.parametrize("loss", [InfoNCELoss, GenerativeInfoNCELoss])
def test_a_module_trains_its_temperature(loss):
    module = loss(temperature=torch.nn.Parameter(torch.tensor(0.5, device=DEVICE)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    given = (numbers(4, 6), numbers(7, 6)) if loss is InfoNCELoss else (numbers(4, 7),)
    before = module(*given)
    before.backward()
    optimizer.step()
    assert module(*given) < before
    assert "temperature" in module.state_dict()


WITH_A_TEMPERATURE = {
    "info_nce": lambda t: info_nce(numbers(3, 6), numbers(5, 6), temperature=t),
    "generative_info_nce": lambda t: generative_info_nce(numbers(3, 5), temperature=t),
    "score_distillation": lambda t, **o: score_distillation(
        numbers(3, 6), numbers(5, 6), numbers(3, 5), temperature=t, **o
    ),
}
BAD = {
    "integer tensor": (TypeError, torch.tensor(1)),
    "bool tensor": (TypeError, torch.tensor(True)),
    "complex tensor": (TypeError, torch.tensor(1j)),
    "bool": (TypeError, True),
    "numpy's bool": (TypeError, np.bool_(True)),
    "text": (TypeError, "0.05"),
    "None": (TypeError, None),
    "numpy array": (TypeError, np.array([0.05, 0.1])),
    "NaN": (ValueError, torch.tensor(math.nan)),
    "0": (ValueError, torch.tensor([0.0])),
    "negative": (ValueError, torch.tensor(-0.05)),
    "infinite": (ValueError, torch.tensor(math.inf)),
    "float NaN": (ValueError, math.nan),
    "numpy's NaN": (ValueError, np.float32("nan")),
    "two": (ValueError, torch.tensor([0.05, 0.1])),
    "none": (ValueError, torch.zeros(0)),
    "(1, 1)": (ValueError, torch.full((1, 1), 0.05)),
    "elsewhere": (ValueError, torch.tensor(0.05, device="meta")),
}


@pytest.mark.parametrize("op", WITH_A_TEMPERATURE)
@pytest.mark.parametrize("name", BAD)
@pytest.mark.skipif(DEVICE != "cpu", reason="reading the value would wait for the device: NaN there")
def test_what_is_refused(op, name):
    error, value = BAD[name]
    with pytest.raises(error, match=r"^temperature: got "):
        WITH_A_TEMPERATURE[op](value)


@pytest.mark.parametrize("op", WITH_A_TEMPERATURE)
@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5), 0.5])
def test_numbers(op, value):
    assert torch.equal(WITH_A_TEMPERATURE[op](value), WITH_A_TEMPERATURE[op](0.5))
    assert torch.equal(WITH_A_TEMPERATURE[op](np.int64(2)), WITH_A_TEMPERATURE[op](2))


@pytest.mark.parametrize("op", WITH_A_TEMPERATURE)
def test_a_tensor_gives_what_its_number_gives(op):
    for tau in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.bfloat16)):
        assert torch.equal(WITH_A_TEMPERATURE[op](tau.to(DEVICE)), WITH_A_TEMPERATURE[op](0.25))


def test_a_bad_tensor_is_nan_where_it_cannot_be_read():
    torch._dynamo.reset()
    query = numbers(3, 6)
    compiled = torch.compile(lambda t: info_nce(query, query, temperature=t), fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor(0.5, device=DEVICE)).isfinite()
    assert compiled(torch.tensor(-0.5, device=DEVICE)).isnan()


SPLICED = numbers(1, 1, 4), numbers(5, 4), torch.tensor([0, 1]).to(DEVICE), torch.tensor([0, 2]).to(DEVICE)
FIXED = {
    "alignment_loss beta": (
        "beta", lambda x: alignment_loss(numbers(3), numbers(3), numbers(3), ref_margin="none", beta=x),
        lambda x: AlignmentLoss(ref_margin="none", beta=x)(numbers(3), numbers(3), numbers(3)),
    ),
    "alignment_loss temperature": (
        "temperature", lambda x: alignment_loss(numbers(3), numbers(3), numbers(3), ref_margin="none", temperature=x),
        None,
    ),
    "linear_logprob scale": (
        "scale", lambda x: linear_logprob(numbers(3, 4), numbers(5, 4), torch.tensor([0, 1, 2]).to(DEVICE), scale=x),
        lambda x: LinearLogprob(scale=x)(numbers(3, 4), numbers(5, 4), torch.tensor([0, 1, 2]).to(DEVICE)),
    ),
    "linear_logprob softcap": (
        "softcap",
        lambda x: linear_logprob(numbers(3, 4), numbers(5, 4), torch.tensor([0, 1, 2]).to(DEVICE), softcap=x), None,
    ),
    "splice embedding_scale": (
        "embedding_scale",
        lambda x: splice(*SPLICED, embedding_scale=x), lambda x: Splice(embedding_scale=x)(*SPLICED),
    ),
    "score_distillation teacher_temperature": (
        "teacher_temperature",
        lambda x: score_distillation(numbers(3, 6), numbers(5, 6), numbers(3, 5), teacher_temperature=x), None,
    ),
    "score_distillation mixture": (
        "mixture", lambda x: score_distillation(numbers(2, 6), numbers(2, 6), numbers(2, 2), mixture=x,
                                                target=torch.tensor([1, -1]).to(DEVICE)), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_other_numbers_are_fixed(name):
    """numpy's scalars are numbers; a tensor, which would get no gradient, is refused by name."""
    argument, function, module = FIXED[name]
    for call in (function, *([module] if module else [])):
        with pytest.raises(TypeError, match=rf"^{argument}: got a tensor, expected a number.*item"):
            call(torch.tensor(0.5, device=DEVICE))
        with pytest.raises(TypeError, match=rf"^{argument}: got True, expected a number"):
            call(True)
        for x, y in zip(call(np.float32(0.5)), call(0.5), strict=True) if name.startswith("al") else [
            (call(np.float32(0.5)), call(0.5))
        ]:  # fmt: skip
            assert torch.equal(x, y)
