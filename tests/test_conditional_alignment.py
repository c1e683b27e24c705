"""conditional_alignment against its parts, linear_logprob and alignment_loss."""

import pytest
import torch
from triton_cases import DEVICE, leaf, poisoned  # noqa: F401

from autoregembed import (
    AlignmentPairs,
    ConditionalAlignment,
    Decoder,
    alignment_loss,
    conditional_alignment,
    linear_logprob,
    objective,
    ops,
)
from autoregembed.config import Stage2Options
from autoregembed.testing import assert_accurate, tiny_model

IMPLS = [name for name, state in ops.available_impls(DEVICE).items() if state == "ok"]
CLOSED = [name for name in IMPLS if name != "reference"]
COUNTS = [2, 0, 3, 1]  # negatives of each row
LENGTHS = [3, 1, 2, 4, 2, 2, 1, 3, 5, 1, 2, 2, 3, 1]  # of S = 4 + 4 + 6 sequences
N, D, V = sum(LENGTHS), 12, 37


def problem(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(V, (N,), generator=g)
    target[5] = -100
    references = -10 * torch.rand(4, generator=g), -10 * torch.rand(4, 3, generator=g)
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0).to(torch.int32)
    given = [x.to(DEVICE, dtype) for x in (hidden, weight)]
    return *given, target.to(DEVICE), cu.to(DEVICE), [x.to(DEVICE, torch.float64) for x in references]


def parts(hidden, weight, target, cu, pairs, references, head, variant, impl):
    """The same from two ops, and the scores' indexing in between."""
    scores = linear_logprob(hidden, weight, target, cu_seqlens=cu, impl=impl, **head)
    variant = dict(variant)
    if variant.pop("logprob_reduction", "sum") == "mean":
        scores = scores / cu.diff()
    mask = pairs.query_negatives >= 0
    c = torch.stack([torch.stack([scores[j] if j >= 0 else scores.new_tensor(torch.nan) for j in row])
                     for row in pairs.query_negatives.tolist()])  # fmt: skip
    a, b = scores[pairs.query_positive], scores[pairs.positive_positive]
    return alignment_loss(a, b, c, *references, negative_mask=mask, impl="reference", **variant)


HEADS = {
    "plain": {},
    "softcap, bias": {"softcap": 2.0, "scale": 0.7, "bias": torch.linspace(-1, 1, V, dtype=torch.float64).to(DEVICE)},
}
VARIANTS = [
    {"ref_margin": margin, "negatives": negatives, "beta": 0.4, "temperature": 0.3}
    for margin in ("add", "subtract", "none")
    for negatives in ("independent", "joint")
] + [{"logprob_reduction": "mean"}]


@pytest.mark.parametrize("impl", [name for name in IMPLS if name != "cpp"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
@pytest.mark.parametrize("shuffled", [False, True])
def test_equal_to_its_parts_in_float64(impl, head, variant, shuffled):
    hidden, weight, target, cu, references = problem()
    references = [] if variant.get("ref_margin") == "none" else references
    pairs = AlignmentPairs.in_order(COUNTS, DEVICE)
    if shuffled:  # sequences in any order; one plays two parts, one none
        place = torch.randperm(14, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        pairs = AlignmentPairs(*(torch.where(x < 0, -1, place[x.clamp(min=0)]) for x in pairs))
        pairs.query_negatives[0, 0] = pairs.query_positive[1]
    results = []
    for function in (conditional_alignment, parts):
        x = leaf(hidden, torch.float64)
        if function is parts:
            out = parts(x, weight, target, cu, pairs, references, HEADS[head], variant, "reference")
        else:
            out = function(x, weight, target, cu, pairs, *references, **HEADS[head], **variant, impl=impl)
        results.append([*(v.detach() for v in out), *torch.autograd.grad(-3 * out.loss, x)])
    assert results[0][-1].abs().max() > 1e-3
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", CLOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", [{}, {"negatives": "joint", "ref_margin": "subtract"}])
def test_accurate(impl, dtype, variant):
    hidden, weight, target, cu, references = problem(dtype)
    pairs = AlignmentPairs.in_order(COUNTS, DEVICE)

    def run(wide, name):
        x = leaf(hidden, wide)
        out = conditional_alignment(x, weight.to(wide), target, cu, pairs, *references, **variant, impl=name)
        return [*(v.detach() for v in out), *torch.autograd.grad(5 * out.loss, x)]

    found, eager, exact = run(dtype, impl), run(torch.float32, "reference"), run(torch.float64, "reference")
    logit = (hidden.double() @ weight.double().T).abs().max().item()
    assert [x.dtype for x in found] == [*[torch.float32] * 4, dtype]
    for x, f32, f64 in zip(found[:4], eager, exact, strict=False):
        assert_accurate(x, f32, f64, max_logit=5 * logit)  # sums of up to five rows
    assert_accurate(found[4], eager[4], exact[4], max_logit=logit, gradient_factor=5 * weight.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_no_negative_no_row_and_what_is_not_read(impl):
    hidden, weight, target, cu, references = problem(torch.float32)
    pairs = AlignmentPairs.in_order(COUNTS, DEVICE)
    references[1][pairs.query_negatives < 0] = torch.nan
    x = leaf(hidden, torch.float32)
    out = conditional_alignment(x, weight, target, cu, pairs, *references, impl=impl)
    (gradient,) = torch.autograd.grad(out.loss, x)
    assert all(v.isfinite() for v in out)
    assert gradient.isfinite().all()
    assert not gradient[5].any()
    none = AlignmentPairs.in_order([0, 0], DEVICE)
    out = conditional_alignment(x, weight, target, cu, none, references[0][:2], references[1][:2, :0], impl=impl)
    assert out.loss.item() == 0
    assert not torch.autograd.grad(out.loss, x)[0].any()
    empty = AlignmentPairs.in_order([], DEVICE)
    out = conditional_alignment(x, weight, target, cu, empty, references[0][:0], references[1][:0, :0], impl=impl)
    assert out.loss.item() == 0
    assert not torch.autograd.grad(out.loss, x)[0].any()


def test_triton_gives_nan_where_others_raise():
    hidden, weight, target, cu, references = problem(torch.float32)
    for part, bad, error in ((0, 14, IndexError), (1, -1, IndexError), (2, 99, IndexError), (2, -2, IndexError)):
        pairs = AlignmentPairs.in_order(COUNTS, DEVICE)
        pairs[part].view(-1)[0] = bad
        for impl in IMPLS:
            if impl == "triton":
                assert conditional_alignment(hidden, weight, target, cu, pairs, *references, impl=impl).loss.isnan()
                continue
            name = AlignmentPairs._fields[part]
            with pytest.raises(error, match=rf"^pairs\.{name}: got id {bad} at row 0"):
                conditional_alignment(hidden, weight, target, cu, pairs, *references, impl=impl)


def test_bad_input():
    hidden, weight, target, cu, references = problem(torch.float32)
    pairs = AlignmentPairs.in_order(COUNTS, DEVICE)
    given = {
        "hidden": hidden, "weight": weight, "target": target, "cu_seqlens": cu, "pairs": pairs,
        "reference_positive": references[0], "reference_negatives": references[1],
    }  # fmt: skip
    trained, floats = leaf(weight, torch.float32), pairs._replace(query_positive=references[0].float())
    for error, message, changed in (
        (ValueError, "weight: got a head that requires grad, expected a frozen one", {"weight": trained}),
        (ValueError, "reference_positive: got None", {"reference_positive": None}),
        (ValueError, r"reference_negatives: got shape \(4, 2\)", {"reference_negatives": references[1][:, :2]}),
        (TypeError, "pairs: got list", {"pairs": list(pairs)}),
        (TypeError, "pairs.query_positive: got dtype torch.float32", {"pairs": floats}),
        (ValueError, r"pairs.positive_positive: got shape \(3,\)", {"pairs": (pairs[0], pairs[1][:3], pairs[2])}),
        (ValueError, "ref_margin: got 'plus'", {"ref_margin": "plus"}),
        (ValueError, "reference_positive: got scores, expected None", {"ref_margin": "none"}),
        (ValueError, "logprob_reduction: got 'max'", {"logprob_reduction": "max"}),
        (TypeError, "beta: got a tensor", {"beta": torch.tensor(0.1)}),
        (ValueError, "cu_seqlens: got", {"cu_seqlens": cu[:-1], "impl": "torch"}),
        (IndexError, "target: got id 99", {"target": target.where(target != target[0], 99), "impl": "torch"}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            conditional_alignment(**{**given, **changed})


def test_a_step_costs_two_gemms_and_one_pass(monkeypatch):
    """The backward touches U alone: neither weight nor logits are seen again, whatever the upstream number."""
    hidden, weight, target, cu, references = problem(torch.float32)
    pairs, x = AlignmentPairs.in_order(COUNTS, DEVICE), leaf(hidden, torch.float32)
    for impl in CLOSED:
        out = conditional_alignment(x, weight, target, cu, pairs, *references, impl=impl)
        (first,) = torch.autograd.grad(out.loss, x, retain_graph=True)
        with torch.profiler.profile() as trace:
            (again,) = torch.autograd.grad(-2.5 * out.loss, x)
        torch.testing.assert_close(again, -2.5 * first, rtol=1e-6, atol=1e-9)
        names = {event.name for event in trace.events()}
        assert not any("mm" in name.split("::")[-1] for name in names), names


@pytest.mark.parametrize("impl", CLOSED)
def test_opcheck(impl):
    hidden, weight, target, cu, references = problem(torch.float32)
    pairs, op = AlignmentPairs.in_order(COUNTS, DEVICE), torch.ops.autoregembed.conditional_alignment.default
    given = (weight, target, cu, *pairs, *(x.float() for x in references), None, 2.0, 0.5, -100)
    for gradient in (True, False):
        x = leaf(hidden, torch.float32) if gradient else hidden
        torch.library.opcheck(op, (x, *given, "mean", 0.1, 0.1, "add", "joint", gradient, impl))


def test_module():
    hidden, weight, target, cu, references = problem(torch.float32)
    pairs, x = AlignmentPairs.in_order(COUNTS, DEVICE), leaf(hidden, torch.float32)
    options = {"softcap": 2.0, "scale": 0.5, "logprob_reduction": "mean", "negatives": "joint", "impl": "torch"}
    bias = torch.ones(V, device=DEVICE)
    found = ConditionalAlignment(**options)(x, weight, target, cu, pairs, *references, bias)
    wanted = conditional_alignment(x, weight, target, cu, pairs, *references, bias=bias, **options)
    assert all(torch.equal(u, v) for u, v in zip(found, wanted, strict=True))
    assert found.loss.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("ref_margin", ["add", "none"])
def test_the_loss_of_the_loop_is_this_op_where_a_pass_holds_all_pairs_of_its_rows(reduction, ref_margin, monkeypatch):
    decoder = Decoder(tiny_model(dtype=torch.float64), bos_token_id=1, logprob_reduction=reduction).to(DEVICE)
    rows = [{"target_ids": ids} for ids in ([[5, 6, 7], [8], [9, 4]], [[3]], [[7, 7], [6, 5, 4, 3]])]
    z = torch.randn(6, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    references = -10 * torch.rand(3, dtype=torch.float64), -10 * torch.rand(3, 4, dtype=torch.float64)
    options = Stage2Options(ref_margin=ref_margin, negatives="joint", beta=0.4)
    given = references if options.uses_ref_logps else None
    called = []
    fused = objective.conditional_alignment
    monkeypatch.setattr(objective, "conditional_alignment", lambda *x, **y: called.append(1) or fused(*x, **y))
    results = []
    for budget in (None, 9):
        x = leaf(z, torch.float64)
        out = objective.stage2_loss(options, decoder, x, rows, ref_logps=given, token_budget=budget)
        results.append([out.alignment, *out.stats.values(), *torch.autograd.grad(out.alignment, x)])
    assert called == [1, 1]  # under the budget, the row with one pair; the pairs of the others are parted
    largest = results[0][-1].abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-5 * largest)  # the model's norms are fp32 inside
