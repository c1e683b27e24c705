"""score_distillation against its formula in loops over Python floats, and against float64."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from triton_cases import DEVICE, few, leaf, poisoned  # noqa: F401

from autoregembed import ScoreDistillationLoss, reference, score_distillation
from autoregembed.testing import EPS32, assert_accurate

IMPLS = ["triton", "torch", "reference"]
CLOSED = ["triton", "torch"]


def draw(b, p, d, seed=0, dtype=torch.float64, spread=30.0):
    """query, passages, scores; a mask; targets, some −1, the others kept by the mask; log p(d_j)."""
    g = torch.Generator().manual_seed(seed)
    query, passages = torch.randn(b, d, generator=g), 3 * torch.randn(p, d, generator=g)
    scores = -spread * torch.rand(b, p, generator=g) - spread * torch.rand(p, generator=g)
    mask = torch.rand(b, p, generator=g) < 0.6
    target = torch.randint(-1, p, (b,), generator=g)
    mask[torch.arange(b), target.clamp(min=0)] |= target >= 0
    prior = -spread * torch.rand(p, generator=g)
    return (
        [x.to(DEVICE, dtype) for x in (query, passages, scores)],
        mask.to(DEVICE),
        target.to(DEVICE),
        prior.to(DEVICE),
    )


def log_sum(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def by_hand(query, passages, scores, tau, teacher, mask=None, target=None, mixture=1.0, marginal="batch"):
    """The formula, one pair at a time."""
    b, p = scores.shape
    kept = [[mask is None or bool(mask[i, j]) for j in range(p)] for i in range(b)]
    y = [-1] * b if target is None else target.tolist()

    def cosine(u, v):
        norms = [max(math.sqrt(sum(a * a for a in w)), 1e-12) for w in (u, v)]
        return sum(a * c for a, c in zip(u, v, strict=True)) / (norms[0] * norms[1])

    x = [[cosine(q, d) / tau for d in passages.tolist()] for q in query.tolist()]
    s = [[v / teacher for v in row] for row in scores.tolist()]
    terms = {"rows": [], "columns": []}
    for j in range(p):
        members = [i for i in range(b) if kept[i][j]]
        if members:
            lse, student = log_sum([s[i][j] for i in members]), log_sum([x[i][j] for i in members])
            owners = [i for i in range(b) if y[i] == j]
            share = mixture if owners else 1.0
            term = 0.0
            for i in members:
                t = share * math.exp(s[i][j] - lse) + (1 - share) * ((i in owners) / max(len(owners), 1))
                term += t * (student - x[i][j])
            terms["columns"].append(term)
    for i in range(b):
        members = [j for j in range(p) if kept[i][j]]
        if members:
            level = []
            for j in members:
                m = 0.0
                if isinstance(marginal, torch.Tensor):
                    m = marginal[j].item() / teacher
                elif marginal == "batch":
                    m = log_sum([s[k][j] for k in range(b) if kept[k][j]])
                level.append(s[i][j] - m)
            lse, student = log_sum(level), log_sum([x[i][j] for j in members])
            share = mixture if y[i] >= 0 else 1.0
            terms["rows"].append(
                sum(
                    (share * math.exp(v - lse) + (1 - share) * (j == y[i])) * (student - x[i][j])
                    for j, v in zip(members, level, strict=True)
                )
            )
    return sum(sum(t) / len(t) for t in terms.values() if t) / 2


OPTIONS = st.fixed_dictionaries(
    {
        "masked": st.booleans(),
        "mixture": st.sampled_from([1.0, 0.5, 0.0]),
        "marginal": st.sampled_from(["batch", "none", "given"]),
        "temperature": st.sampled_from([0.05, 1.0]),
        "teacher_temperature": st.sampled_from([3.0, 0.7]),
    }
)

SHARED = {"masked": False, "mixture": 0.5, "marginal": "batch", "temperature": 1.0, "teacher_temperature": 0.7}


def options_of(drawn, mask, target, prior):
    masked, marginal = drawn["masked"], drawn["marginal"]
    return {
        "mask": mask if masked else None,
        "target": target if drawn["mixture"] < 1 else None,
        "mixture": drawn["mixture"],
        "marginal": prior if marginal == "given" else marginal,
        "teacher_temperature": drawn["teacher_temperature"],
    }


@pytest.mark.parametrize("impl", IMPLS)
@few(8)
@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 9), OPTIONS, st.integers(0, 999))
@example(7, 2, 4, SHARED, 0)  # passages with several owners
def test_formula(impl, b, p, d, drawn, seed):
    inputs, mask, target, prior = draw(b, p, d, seed)
    options = options_of(drawn, mask, target, prior.double())
    found = score_distillation(*inputs, temperature=drawn["temperature"], **options, impl=impl)
    teacher = options.pop("teacher_temperature")
    wanted = by_hand(*inputs, drawn["temperature"], teacher, **options)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def gradients(inputs, dtype, temperature, impl, **options):
    """loss, and the gradients of query, passages and temperature under an upstream gradient of 5."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = leaf(inputs[0], dtype), leaf(inputs[1], dtype), torch.tensor(temperature, dtype=wide, device=DEVICE)
    leaves[2].requires_grad_()
    scores = inputs[2].to(wide)
    loss = score_distillation(*leaves[:2], scores, temperature=leaves[2], **options, impl=impl)
    return [loss.detach(), *torch.autograd.grad(5 * loss, leaves)]


@pytest.mark.parametrize("impl", CLOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@few(3)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(2, 17), OPTIONS, st.integers(0, 999))
def test_accurate(impl, dtype, b, p, d, drawn, seed):
    inputs, mask, target, prior = draw(b, p, d, seed, dtype)
    inputs[2], temperature = inputs[2].float(), drawn["temperature"]
    options = options_of(drawn, mask, target, prior)
    found = gradients(inputs, dtype, temperature, impl, **options)
    exact = gradients(inputs, torch.float64, temperature, "reference", **options)
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)
        return
    eager = gradients(inputs, torch.float32, temperature, "reference", **options)
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype, torch.float32]
    logit = max(1 / temperature, 60 / options["teacher_temperature"])
    assert_accurate(found[0], eager[0], exact[0], max_logit=logit)
    assert_accurate(found[3], eager[3], exact[3], max_logit=logit, gradient_factor=5 / temperature**2)
    # The GEMMs of both gradients read E rounded to 16 bits: eps of the summands, not of their sum.
    rounding = torch.finfo(dtype).eps / (4 * EPS32) if dtype.itemsize == 2 else 0.0
    for x, f32, f64, side in zip(found[1:3], eager[1:3], exact[1:3], inputs[:2], strict=True):
        factor = 5 / temperature / side.double().norm(dim=1).min().item()
        assert_accurate(x, f32, f64, max_logit=logit + rounding, gradient_factor=factor)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    inputs, mask, target, _ = draw(3, 5, 2)
    leaves = [x.requires_grad_() for x in (*inputs[:2], torch.tensor([0.7], dtype=torch.float64, device=DEVICE))]

    def function(query, passages, temperature):
        options = {"mask": mask, "target": target, "mixture": 0.4, "impl": impl}
        return score_distillation(query, passages, inputs[2], temperature=temperature, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_what_the_mask_drops_reaches_nothing(impl, filler):
    inputs, mask, target, _ = draw(5, 9, 4, 3, torch.float32)
    mask[2], mask[:, 4] = False, False
    target[2] = -1
    target[target == 4] = -1
    options = {"mask": mask, "target": target, "mixture": 0.5, "impl": impl}
    wanted = gradients(inputs, torch.float32, 0.05, **options)
    assert wanted[0].item() == pytest.approx(by_hand(*inputs, 0.05, 3.0, mask, target, 0.5), rel=1e-5)
    inputs[2][~mask] = filler
    inputs[0][2], inputs[1][4] = filler, filler
    found = gradients(inputs, torch.float32, 0.05, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert all(x.abs().max() > 0 for x in found)
    assert not found[1][2].any()
    assert not found[2][4].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_pair_and_one_text(impl):
    inputs, mask, _, _ = draw(3, 4, 5, 0, torch.float32)
    query, passages, scores = inputs
    for texts in ([query[:0], passages, scores[:0]], [query, passages[:0], scores[:, :0]]):
        assert gradients(texts, torch.float32, 0.05, impl)[0].item() == 0
    found = gradients(inputs, torch.float32, 0.05, impl, mask=torch.zeros_like(mask))
    assert [x.abs().max().item() for x in found] == [0.0] * 4
    one = [x[:1] for x in inputs[:2]] + [inputs[2][:1, :1]]
    assert [x.abs().max().item() for x in gradients(one, torch.float32, 0.05, impl)] == [0.0] * 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("low", [-1e4, -1e30, -math.inf])
def test_extreme_scores(impl, low):
    """A pair as good as impossible has no share in T; its cosine still is in the student's softmax."""
    inputs, _, _, _ = draw(4, 6, 5, 1)
    inputs[2][0, :5] = inputs[2][3, 2] = low
    far = [*inputs[:2], inputs[2].clamp(min=-1e4)]
    wanted = by_hand(*far, 0.05, 3.0)
    assert score_distillation(*inputs, impl=impl).item() == pytest.approx(wanted, rel=1e-10)
    found, exact = (gradients(inputs, torch.float64, 0.05, name) for name in (impl, "reference"))
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)
    if low == -math.inf:
        inputs[2][1] = low  # a row that nothing explains has no distribution
        assert score_distillation(*inputs, marginal="none", impl=impl).isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_batch_marginal_forgets_how_likely_a_passage_is(impl):
    inputs, _, _, prior = draw(4, 6, 5, 1)
    shifted = [*inputs[:2], inputs[2] + 1e3 * torch.rand(6, device=DEVICE, dtype=torch.float64)]
    plain = score_distillation(*inputs, impl=impl)
    torch.testing.assert_close(score_distillation(*shifted, impl=impl), plain, rtol=1e-9, atol=1e-10)
    assert (score_distillation(*shifted, marginal="none", impl=impl) - plain).abs() > 1e-2


@pytest.mark.parametrize("impl", CLOSED)
def test_mixture_zero_is_info_nce_in_both_directions(impl):
    inputs, _, _, _ = draw(4, 4, 5, 1)
    query, passages, scores = inputs
    target = torch.tensor([2, 0, 3, 1], device=DEVICE)
    found = score_distillation(query, passages, scores, target=target, mixture=0.0, impl=impl)
    rows = reference.info_nce(query, passages, target)
    columns = reference.info_nce(passages, query, target.argsort())
    torch.testing.assert_close(found, (rows + columns) / 2, rtol=1e-12, atol=0)


def test_triton_gives_nan_for_targets_that_others_refuse():
    inputs, mask, _, _ = draw(4, 6, 5, 1, torch.float32)
    mask[1, 2] = False
    for target in ([0, 6, 1, 2], [0, -2, 1, 2], [-1, 2, -1, -1]):
        target = torch.tensor(target, device=DEVICE)
        m = mask.clone()
        m[torch.arange(4), target.clamp(0, 5)] |= torch.arange(4, device=DEVICE) != 1
        loss, d_query, d_passages, d_temperature = gradients(
            inputs, torch.float32, 0.05, "triton", mask=m, target=target, mixture=0.5
        )
        assert loss.isnan()
        assert d_query.isnan().all(1).tolist() == [False, True, False, False]
        assert d_passages.isnan().all()
        assert d_temperature.isnan()
        with pytest.raises((IndexError, ValueError), match=r"^(target|mask): got"):
            gradients(inputs, torch.float32, 0.05, "torch", mask=m, target=target, mixture=0.5)


BAD = {
    "scores that require grad": (
        ValueError, "scores: got scores that require grad", {"scores": torch.zeros(3, 5, requires_grad=True)},
    ),
    "scores of another shape": (
        ValueError, r"scores: got shape \(3, 4\), expected \(B, P\) = \(3, 5\)", {"scores": torch.zeros(3, 4)},
    ),
    "integer scores": (TypeError, "scores: got dtype torch.int64", {"scores": torch.zeros(3, 5).long()}),
    "another width": (ValueError, r"passages: got shape \(5, 3\)", {"passages": torch.ones(5, 3)}),
    "another dtype": (TypeError, "passages: got dtype torch.float64", {"passages": torch.ones(5, 4).double()}),
    "temperature 0": (ValueError, "temperature: got 0", {"temperature": 0}),
    "teacher's temperature": (ValueError, "teacher_temperature: got -1", {"teacher_temperature": -1}),
    "teacher's temperature as a tensor": (
        TypeError, "teacher_temperature: got a tensor", {"teacher_temperature": torch.ones(())},
    ),
    "mixture": (ValueError, r"mixture: got 1.5, expected a number in \[0, 1\]", {"mixture": 1.5}),
    "mixture NaN": (ValueError, "mixture: got nan", {"mixture": math.nan}),
    "mixture without positives": (ValueError, "target: got None, expected known positives", {"mixture": 0.5}),
    "mask of floats": (TypeError, "mask: got dtype torch.float32", {"mask": torch.ones(3, 5)}),
    "mask of another shape": (ValueError, r"mask: got shape \(5,\)", {"mask": torch.ones(5).bool()}),
    "target too large": (IndexError, "target: got id 5 at row 1, expected 0..4", {"target": torch.tensor([0, 5, 1])}),
    "target −2": (IndexError, "target: got id -2 at row 2", {"target": torch.tensor([0, 1, -2])}),
    "a positive that is dropped": (
        ValueError, "mask: got False for the positive of row 0",
        {"target": torch.tensor([2, -1, -1]), "mask": torch.zeros(3, 5).bool()},
    ),
    "marginal by another name": (ValueError, "marginal: got 'memory'", {"marginal": "memory"}),
    "marginal of another shape": (ValueError, r"marginal: got shape \(4,\)", {"marginal": torch.zeros(4)}),
    "backend": (RuntimeError, "impl='cpp' cannot run", {"impl": "cpp"}),
}  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, impl):
    error, message, changes = BAD[name]
    good = {"query": torch.ones(3, 4), "passages": torch.ones(5, 4), "scores": torch.zeros(3, 5), "impl": impl}
    given = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in {**good, **changes}.items()}
    with pytest.raises(error, match=f"^{message}"):
        score_distillation(**given)


@pytest.mark.parametrize("impl", CLOSED)
def test_sides_that_are_frozen_and_autocast(impl):
    inputs, _, _, _ = draw(3, 5, 4, 0, torch.float32)
    both = gradients(inputs, torch.float32, 0.05, impl)[1:3]
    for side in (0, 1):
        given = [x.clone().requires_grad_(i == side) for i, x in enumerate(inputs[:2])]
        (5 * score_distillation(*given, inputs[2], impl=impl)).backward()
        torch.testing.assert_close(given[side].grad, both[side], rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        plain = score_distillation(*inputs, impl=impl)
    if impl == "torch":
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(score_distillation(*inputs, impl=impl), plain)


@pytest.mark.parametrize("impl", CLOSED)
@pytest.mark.parametrize("options", [False, True])
def test_opcheck(impl, options):
    inputs, mask, target, prior = draw(4, 6, 5, 0, torch.float32)
    leaves = [leaf(x, torch.float32) for x in inputs[:2]]
    temperature = torch.tensor(0.05, device=DEVICE, requires_grad=True)
    given = (mask, target, prior) if options else (None, None, None)
    op = torch.ops.autoregembed.score_distillation.default
    torch.library.opcheck(op, (*leaves, inputs[2], *given, temperature, 3.0, 0.5, not options, True, True, True, impl))


def test_module():
    inputs, mask, target, prior = draw(4, 6, 5, 0, torch.float32)
    query = leaf(inputs[0], torch.float32)
    options = {"teacher_temperature": 2.0, "mixture": 0.3, "impl": "torch"}
    module = ScoreDistillationLoss(temperature=torch.nn.Parameter(torch.tensor(0.1, device=DEVICE)), **options)
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    loss = module(query, *inputs[1:], mask, target, prior)
    loss.backward()
    assert module.temperature.grad.abs() > 0
    same = score_distillation(*inputs, temperature=0.1, mask=mask, target=target, marginal=prior, **options)
    assert torch.equal(loss, same)
