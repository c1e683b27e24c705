"""alignment_loss against the paper's formulas in loops over Python floats, and the promises of its docstring."""

import functools
import itertools
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoregembed import alignment_loss, ops
from autoregembed import reference as spec
from autoregembed.testing import assert_accurate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def runs(impl: str, dtype: torch.dtype = torch.float32) -> bool:
    x = torch.ones(1, dtype=dtype, device=DEVICE)
    try:
        alignment_loss(x, x, x, x, x, impl=impl)
    except ops.ImplUnavailable:
        return False
    return True


# Triton's interpreter has tests of its own (test_triton_*.py): it takes a second where the others take a millisecond.
IMPLS = [name for name in ops.available_impls(DEVICE) if runs(name) and (name, DEVICE) != ("triton", "cpu")]
VARIANTS = list(itertools.product(ops.REF_MARGINS, ops.NEGATIVES))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def by_hand(a, b, c, r_a, r_c, mask, *, beta, temperature, ref_margin, negatives):
    """(loss, mean s1, mean s2, accuracy) from lists, one formula of DESIGN §2 after the other."""
    terms, s1s, s2s, wins = [], [], [], []
    for i in range(len(a)):
        s1 = sigmoid(beta * abs(a[i] - b[i]))
        s1s.append(s1)
        row = []
        for j in range(len(mask[i])):
            if not mask[i][j]:
                continue
            sign = {"add": 1, "subtract": -1, "none": 0}[ref_margin]
            margin = a[i] - c[i][j] + (sign * (r_a[i] - r_c[i][j]) if sign else 0)
            row.append(sigmoid(beta * margin))
            wins.append(a[i] > c[i][j])
        s2s += row
        if negatives == "independent":
            x = [(s1 - s2) / temperature for s2 in row]
            terms += [max(v, 0) + math.log1p(math.exp(-abs(v))) for v in x]
        elif row:
            denominator = math.exp(-s1 / temperature) + sum(math.exp(-s2 / temperature) for s2 in row)
            terms.append(s1 / temperature + math.log(denominator))
    mean = lambda xs: sum(xs) / len(xs) if xs else 0.0  # noqa: E731
    return mean(terms), mean(s1s), mean(s2s), mean(wins)


def scores(b, m, seed, spread=20.0, holes=0.3, dtype=torch.float64):
    """Scores (a, b, c, r_a, r_c), and the mask; NaN wherever the mask is False."""
    generator = torch.Generator().manual_seed(seed)
    rows = [spread * torch.randn(shape, generator=generator) - 40 for shape in [(b,), (b,), (b, m), (b,), (b, m)]]
    mask = torch.rand(b, m, generator=generator) >= holes
    for x in (rows[2], rows[4]):
        x[~mask] = math.nan
    return [x.to(DEVICE, dtype) for x in rows], mask.to(DEVICE)


def references(xs, ref_margin):
    """Those that the margin reads."""
    return [] if ref_margin == "none" else xs[3:]


def lists(xs, mask):
    return [x.tolist() for x in xs], mask.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    b=st.integers(0, 5),
    m=st.integers(0, 4),
    beta=st.sampled_from([0.1, 1.0, 0.003]),
    temperature=st.sampled_from([0.1, 0.02, 1.0]),
    spread=st.sampled_from([1.0, 20.0, 300.0]),
    holes=st.sampled_from([0.0, 0.4, 1.1]),
    seed=st.integers(0, 2**31),
)
def test_formulas(impl, ref_margin, negatives, b, m, beta, temperature, spread, holes, seed):
    options = {"beta": beta, "temperature": temperature, "ref_margin": ref_margin, "negatives": negatives}
    xs, mask = scores(b, m, seed, spread, holes)
    found = alignment_loss(*xs[:3], *references(xs, ref_margin), negative_mask=mask, impl=impl, **options)
    xs_list, mask_list = lists(xs, mask)
    for name, value, wanted in zip(found._fields, found, by_hand(*xs_list, mask_list, **options), strict=True):
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(wanted, rel=1e-12, abs=2e-15 / temperature), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accurate(impl, ref_margin, negatives, dtype):
    """The loss in fp32 whatever the scores' dtype; gradients in the scores' dtype."""
    options = {"ref_margin": ref_margin, "negatives": negatives}
    for seed, (spread, temperature) in enumerate([(3.0, 0.1), (30.0, 0.1), (30.0, 0.01)]):
        xs, mask = scores(6, 3, seed, spread, dtype=dtype)

        def run(function, work, xs=xs, temperature=temperature, **more):
            leaves = [x.to(work, copy=True).requires_grad_() for x in xs[:3]]
            given = [x.to(work) for x in references(xs, ref_margin)]
            out = function(*leaves, *given, temperature=temperature, **options, **more)
            (3 * out[0]).backward()
            return out[0].detach(), [x.grad for x in leaves]

        found, gradients = run(alignment_loss, dtype, negative_mask=mask, impl=impl)
        eager, eager_gradients = run(spec.alignment_loss, torch.float32, mask=mask)
        exact, exact_gradients = run(spec.alignment_loss, torch.float64, mask=mask)
        assert found.dtype == torch.float32
        assert_accurate(found, eager, exact, max_logit=1 / temperature)
        for x, y, z in zip(gradients, eager_gradients, exact_gradients, strict=True):
            assert x.dtype == dtype
            assert z.any()
            # dx/dscore ≤ β / (4τ): the factor of an error of the exponents
            assert_accurate(x, y, z, max_logit=1 / temperature, gradient_factor=3 * 0.1 / (4 * temperature))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
def test_gradcheck(impl, ref_margin, negatives):
    xs, mask = scores(4, 3, 5, spread=4.0, holes=0.4)
    assert not mask.all()
    c = xs[2].nan_to_num(0)

    def function(a, b, c):
        return alignment_loss(
            a,
            b,
            c,
            *references(xs, ref_margin),
            beta=0.3,
            ref_margin=ref_margin,
            negatives=negatives,
            negative_mask=mask,
            impl=impl,
        ).loss

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (xs[0], xs[1], c)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_places_are_never_read(impl, ref_margin, negatives, poison):
    """Whatever lies there reaches neither a value nor a gradient, its own (exactly 0) included."""
    results = []
    for filler in (poison, 0.0):
        xs, mask = scores(4, 3, 1)
        mask[2] = False  # a row with no negative at all
        for x in (xs[2], xs[4]):
            x[~mask] = filler
        leaves = [x.requires_grad_() for x in xs[:3]]
        out = alignment_loss(
            *leaves, *references(xs, ref_margin), ref_margin=ref_margin, negatives=negatives, negative_mask=mask,
            impl=impl,
        )  # fmt: skip
        out.loss.backward()
        assert not leaves[2].grad[~mask].any()
        results.append([*out, *(x.grad for x in leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all(x.isfinite().all() and x.any() for x in results[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
def test_padding_with_masked_negatives_changes_nothing(impl, ref_margin, negatives):
    xs, mask = scores(3, 2, 2, holes=0)
    wide = [torch.nn.functional.pad(x, (0, 3), value=math.nan) if x.ndim == 2 else x for x in xs]
    wide_mask = torch.nn.functional.pad(mask, (0, 3), value=False)
    options = {"ref_margin": ref_margin, "negatives": negatives, "impl": impl}
    found = alignment_loss(*wide[:3], *references(wide, ref_margin), negative_mask=wide_mask, **options)
    wanted = alignment_loss(*xs[:3], *references(xs, ref_margin), **options)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_negative_as_a_row(impl):
    """(B,) is (B, 1) for scores, references and the mask; with one negative both forms of the loss agree."""
    xs, mask = scores(5, 1, 3)
    xs[2] = xs[2].nan_to_num(-30)
    xs[4] = xs[4].nan_to_num(-30)
    flat = [xs[0], xs[1], xs[2][:, 0], xs[3], xs[4][:, 0]]
    for negatives in ops.NEGATIVES:
        wanted = alignment_loss(*xs, negative_mask=mask, negatives=negatives, impl=impl)
        found = alignment_loss(*flat, negative_mask=mask[:, 0], negatives=negatives, impl=impl)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        torch.testing.assert_close(found.loss, alignment_loss(*xs, negative_mask=mask, impl=impl).loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
@pytest.mark.parametrize(("b", "m", "holes"), [(3, 2, 1.1), (0, 2, 0.0), (3, 0, 0.0), (0, 0, 0.0)])
def test_no_pairs(impl, ref_margin, negatives, b, m, holes):
    """0, attached to the graph."""
    xs, mask = scores(b, m, 0, holes=holes)
    leaves = [x.requires_grad_() for x in xs[:3]]
    given = {"ref_margin": ref_margin, "negatives": negatives, "negative_mask": mask, "impl": impl}
    out = alignment_loss(*leaves, *references(xs, ref_margin), **given)
    assert out.loss.item() == out.s2.item() == out.accuracy.item() == 0
    out.loss.backward()
    for x in leaves:
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("ref_margin", "negatives"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores(impl, ref_margin, negatives, dtype):
    """|a − b| = 0 and margins of 1e4: finite everywhere, and the right side of each sigmoid."""
    a = torch.tensor([-40.0, -40.0, -1e4, -3.0], dtype=dtype, device=DEVICE, requires_grad=True)
    b = torch.tensor([-40.0, -1e4, -3.0, -3.0], dtype=dtype, device=DEVICE, requires_grad=True)
    c = torch.tensor([-40.0, -1e4, -3.0, -1e4], dtype=dtype, device=DEVICE, requires_grad=True)
    zeros = references([torch.zeros(4, dtype=dtype, device=DEVICE)] * 5, ref_margin)
    out = alignment_loss(a, b, c, *zeros, ref_margin=ref_margin, negatives=negatives, impl=impl)
    wanted = (math.log(2) * 2 + math.log1p(math.exp(10)) + math.log1p(math.exp(-5))) / 4
    assert out.loss.item() == pytest.approx(wanted, rel=1e-6)
    assert out.s1.item() == pytest.approx((0.5 + 1 + 1 + 0.5) / 4)
    assert out.s2.item() == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    assert out.accuracy.item() == 0.5  # a tie is not a win
    out.loss.backward()
    for x in (a, b, c):
        assert x.grad is not None
        assert x.grad.isfinite().all()
    assert b.grad[0] == 0
    assert a.grad[0] < 0  # only the margin pulls


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("negatives", ops.NEGATIVES)
def test_tail_of_softplus(impl, negatives):
    """softplus(21) is 21 + 8e-10: what a softplus with a threshold leaves out."""
    xs = [torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in ([-30.0], [-30.0], [-10.0], [-5.0], [5.0])]
    options = {"beta": 0.1, "temperature": 0.0215, "ref_margin": "add", "negatives": negatives}
    lists_of = [x.tolist() for x in xs]
    lists_of[2], lists_of[4] = [lists_of[2]], [lists_of[4]]
    wanted = by_hand(*lists_of, [[True]], **options)[0]
    assert 20 < wanted < 22
    assert alignment_loss(*xs, impl=impl, **options).loss.item() == pytest.approx(wanted, rel=1e-13)


# ----------------------------------------------------------------------------------------------------------------------
# gradients, types, compilation


@pytest.mark.parametrize("impl", IMPLS)
def test_the_reference_is_a_constant_and_statistics_carry_no_gradient(impl):
    xs, mask = scores(4, 2, 0, holes=0)
    leaves = [x.requires_grad_() for x in xs]
    out = alignment_loss(*leaves, negative_mask=mask, impl=impl)
    assert not any(x.requires_grad for x in out[1:])
    out.loss.backward()
    assert all(x.grad.any() for x in leaves[:3])
    assert leaves[3].grad is None
    assert leaves[4].grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_signs(impl):
    """Descent closes |a − b| and widens a − c."""
    a, b, c = (torch.tensor([x], device=DEVICE, requires_grad=True) for x in (-30.0, -25.0, -32.0))
    alignment_loss(a, b, c, ref_margin="none", impl=impl).loss.backward()
    assert a.grad < 0 < b.grad
    assert c.grad > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_through_a_retained_graph(impl):
    xs, _ = scores(3, 2, 0, holes=0)
    leaves = [x.requires_grad_() for x in xs[:3]]
    loss = alignment_loss(*leaves, *xs[3:], impl=impl).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_dtype_is_that_of_query_positive(impl):
    """float64 for float64 scores, else float32; references may come in any float dtype."""
    xs, _ = scores(3, 2, 0, holes=0)
    assert alignment_loss(*xs, impl=impl).loss.dtype == torch.float64
    half = [x.half() for x in xs]
    assert alignment_loss(*half, impl=impl).loss.dtype == torch.float32
    mixed = alignment_loss(*(x.float() for x in xs[:3]), *xs[3:], impl=impl)
    assert mixed.loss.dtype == torch.float32
    torch.testing.assert_close(mixed.loss.double(), alignment_loss(*xs, impl=impl).loss, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# bad input

BAD = {
    "scores are a list": (TypeError, "query_positive: got list", {"query_positive": [1.0]}),
    "no scores": (TypeError, "positive_positive: got NoneType", {"positive_positive": None}),
    "integer scores": (TypeError, "query_positive: got dtype torch.int64", {"query_positive": torch.ones(3).long()}),
    "two axes": (ValueError, "query_positive: got shape", {"query_positive": torch.ones(3, 1)}),
    "another B": (ValueError, r"positive_positive: got shape \(4,\)", {"positive_positive": torch.ones(4)}),
    "another B of c": (ValueError, r"query_negatives: got shape \(4, 2\)", {"query_negatives": torch.ones(4, 2)}),
    "three axes": (ValueError, "query_negatives: got shape", {"query_negatives": torch.ones(3, 2, 1)}),
    "negatives are a list": (TypeError, "query_negatives: got list", {"query_negatives": [[1.0]]}),
    "another M": (ValueError, r"reference_negatives: got shape \(3, 3\)", {"reference_negatives": torch.ones(3, 3)}),
    "reference is a list": (TypeError, "reference_negatives: got list", {"reference_negatives": [1.0]}),
    "elsewhere": (ValueError, "query_negatives: got device meta", {"query_negatives": torch.ones(3, 2, device="meta")}),
    "reference elsewhere": (
        ValueError,
        "reference_positive: got device meta",
        {"reference_positive": torch.ones(3, device="meta")},
    ),
    "no reference_positive": (ValueError, "reference_positive: got None", {"reference_positive": None}),
    "no reference_negatives": (ValueError, "reference_negatives: got None", {"reference_negatives": None}),
    "mask of floats": (TypeError, "negative_mask: got dtype torch.float32", {"negative_mask": torch.ones(3, 2)}),
    "mask is a list": (TypeError, "negative_mask: got list", {"negative_mask": [[True]]}),
    "mask of another M": (
        ValueError,
        r"negative_mask: got shape \(3, 3\)",
        {"negative_mask": torch.ones(3, 3, dtype=torch.bool)},
    ),
    "mask elsewhere": (
        ValueError,
        "negative_mask: got device meta",
        {"negative_mask": torch.ones(3, 2, dtype=torch.bool, device="meta")},
    ),
    "beta 0": (ValueError, "beta: got 0", {"beta": 0}),
    "beta NaN": (ValueError, "beta: got nan", {"beta": math.nan}),
    "temperature negative": (ValueError, "temperature: got -0.1", {"temperature": -0.1}),
    "temperature infinite": (ValueError, "temperature: got inf", {"temperature": math.inf}),
    "unknown ref_margin": (ValueError, "ref_margin: got 'sum'", {"ref_margin": "sum"}),
    "references that nothing reads": (
        ValueError,
        "reference_positive: got scores, expected None, since ref_margin='none'",
        {"ref_margin": "none"},
    ),
    "one reference that nothing reads": (
        ValueError,
        "reference_negatives: got scores, expected None, since ref_margin='none'",
        {"ref_margin": "none", "reference_positive": None},
    ),
    "unknown negatives": (ValueError, "negatives: got 'all'", {"negatives": "all"}),
    "unknown backend": (ValueError, "impl: got 'cuda'", {"impl": "cuda"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, changes = BAD[name]
    keys = ["query_positive", "positive_positive", "query_negatives", "reference_positive", "reference_negatives"]
    xs, mask = scores(3, 2, 0)
    arguments = {**dict(zip(keys, xs, strict=True)), "negative_mask": mask, **changes}
    arguments = {
        k: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type != "meta" else x for k, x in arguments.items()
    }
    with pytest.raises(error, match=message):
        alignment_loss(**arguments)


def test_no_reference_needed_without_the_term():
    xs, mask = scores(3, 2, 0)
    assert alignment_loss(*xs[:3], negative_mask=mask, ref_margin="none").loss > 0


# ----------------------------------------------------------------------------------------------------------------------
# the checks above catch what they are for

SEEDED_BUGS = {
    "s1 without |·|": ("(a - b).abs()", "(a - b)"),
    "s1 of a and c": ("beta * (a - b).abs()", "beta * margin.mean(1).abs()"),
    "no β in s2": ("beta * (margin + signed)", "(margin + signed)"),
    "no temperature": ("(s1[:, None] - s2) / temperature", "(s1[:, None] - s2)"),
    "margin upside down": ("margin = a[:, None] - kept(c)", "margin = kept(c) - a[:, None]"),
    "signs of the reference swapped": ('if ref_margin == "add" else', 'if ref_margin != "add" else'),
    "one reference for all": ("reference_positive[:, None]", "reference_positive.mean()"),
    "softplus of the other side": (
        "torch.logaddexp(x, torch.zeros_like(x))",
        "F.softplus(-x)",
    ),
    "softplus with a threshold": ("torch.logaddexp(x, torch.zeros_like(x))", "F.softplus(x)"),
    "mean over all places": (
        "kept(softplus).sum() / pairs",
        "kept(softplus).sum() / c.numel()",
    ),
    "masked places counted": ("kept(softplus)", "softplus"),
    "masked places in the joint sum": ("kept(x, -torch.inf)", "x"),
    "no s1 in the denominator": ("x.new_zeros(x.shape[0], 1)", "x.new_zeros(x.shape[0], 1) - torch.inf"),
    "joint mean over all rows": ("mask.any(1).sum().clamp(min=1)", "len(mask)"),
    "NaN from masked scores": ("a[:, None] - kept(c)", "a[:, None] - kept(c, c.sum() * 0)"),
    "NaN from masked references": ("kept(reference_negatives)", "reference_negatives"),
    "ties are wins": ("margin > 0", "margin >= 0"),
    "s2 of masked places": ("kept(s2)", "s2"),
    "no gradient of b": ("(a - b).abs()", "(a - b.detach()).abs()"),
    "half the gradient of a": ("margin = a[:, None] - kept(c)", "margin = a.detach()[:, None] - kept(c)"),
}


def test_no_seeded_bug_no_alarm():
    test_tail_of_softplus("torch", "independent")
    for seed, (ref_margin, negatives) in enumerate(VARIANTS):
        for temperature in (0.1, 0.02):
            xs, mask = scores(4, 3, seed, holes=0.4)
            mask[1] = False
            xs[2][1] = xs[4][1] = math.nan
            options = {"beta": 0.2, "temperature": temperature, "ref_margin": ref_margin, "negatives": negatives}
            given = references(xs, ref_margin)
            found = alignment_loss(*xs[:3], *given, negative_mask=mask, impl="torch", **options)
            for value, wanted in zip(found, by_hand(*lists(xs, mask)[0], mask.tolist(), **options), strict=True):
                assert value.item() == pytest.approx(wanted, rel=1e-12, abs=2e-15 / temperature)
            test_extreme_scores("torch", ref_margin, negatives, torch.float64)
            # Finite differences through the formulas in floats.
            a, b, c = (x.requires_grad_() for x in xs[:3])
            alignment_loss(a, b, c, *given, negative_mask=mask, impl="torch", **options).loss.backward()
            for leaf in (a, b):
                for i in range(4):
                    values = []
                    for step in (1e-5, -1e-5):
                        with torch.no_grad():
                            leaf[i] += step
                            values.append(by_hand(*lists(xs, mask)[0], mask.tolist(), **options)[0])
                            leaf[i] -= step
                    assert leaf.grad[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-9)
        test_masked_places_are_never_read("torch", ref_margin, negatives, math.nan)


@pytest.mark.parametrize("name", SEEDED_BUGS)
def test_seeded_bug_is_caught(name, monkeypatch):
    pattern, replacement = SEEDED_BUGS[name]
    source = Path(spec.__file__).read_text(encoding="utf-8")
    assert source.count(pattern) == 1, "the source has changed: bring this list up to date"
    broken = types.ModuleType("broken")
    exec(compile(source.replace(pattern, replacement), "broken", "exec"), broken.__dict__)
    monkeypatch.setattr(sys.modules[alignment_loss.__module__], "spec", broken)
    with pytest.raises(AssertionError):
        test_no_seeded_bug_no_alarm()
