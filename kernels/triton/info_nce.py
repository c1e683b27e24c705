"""Contrastive loss over cosine similarities and both of its gradients without a (B, P) matrix.

Derivation. q̂ = q/|q|, p̂ = p/|p|, z_ip = q̂_i·p̂_p / τ, loss = −(1/B) Σ_i logprob_i. With E_ip = onehot − softmax:

    ∂loss/∂q̂ = −(1/(Bτ)) E P̂          ∂loss/∂p̂ = −(1/(Bτ)) Eᵀ Q̂          ∂loss/∂x = (g − x̂ (x̂·g)) / |x|
    ∂loss/∂τ = −(1/(Bτ²)) Σ_i Σ_p softmax_ip (cos_ip − cos_iy)

The loss is a scalar and both operands are trained, so both gradients are formed in the forward: with F = 2·B·P·D that
is 3F, and a chunk of rows of E is all that is ever there of it. Logits come from the operands as they are, with
1/|q| and 1/|p| as fp32 factors on fp32 products, so that 16-bit inputs lose nothing on the way to the loss; the two
gradient GEMMs read q̂ and p̂ rounded to the inputs' dtype. A passage with the positive's id that is not the positive
leaves the row (a duplicate is no negative). 1/τ is a factor of 1/|q|: it stays on the device.

`shifted` (cosines.py), for bf16 and fp32, has neither logits in memory nor a pass over E. `cublas`, for fp16 and fp64,
is that of linear_logprob.py, with `_epilogue` over a chunk of logits.

The other directions are further rows and columns of the same problem. Row i of the first half is q_i, of the second
half p_{y_i}; columns are the passages, then the queries; every direction is one half of the rows and one kind of
columns. Halves with the same columns are one launch. A joint partition function adds the sums of both halves, and
holds the positive twice with "doc_to_query", where it is a query's passage and a passage's query. Column ids (a query
has that of its positive) keep a row's own texts out of its sum. "per_direction" is two problems, whose losses are
averaged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoregembed.kernels.torch.linear_logprob import rows_per_chunk, work_dtype
from autoregembed.kernels.triton import tiles
from autoregembed.kernels.triton.cosines import Half, Problem, solve
from autoregembed.kernels.triton.linear_logprob import LN_2, epilogue
from autoregembed.kernels.triton.primitives import LOG2_E, Logits, dense, launch, matmul, multiprocessors

EPS = 1e-12  # of torch.nn.functional.normalize
NEVER = -(2**31)  # ignore_index: every target counts


@triton.jit(do_not_specialize=["rows"])
def _unit(x_ptr, inverse_ptr, unit_ptr, rows, D, stride, eps: tl.float64, BLOCK: tl.constexpr):
    """inverse = 1 / max(|x|, eps) per row and, where asked for, unit = inverse · x."""
    WORK: tl.constexpr = inverse_ptr.dtype.element_ty
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride + d, mask=d < D, other=0.0).to(WORK)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x)), tl.full((), eps, WORK))
    tl.store(inverse_ptr + row, inverse)
    if unit_ptr is not None:
        unit = (x * inverse).to(unit_ptr.dtype.element_ty)
        tl.store(unit_ptr + tl.cast(row, tl.int64) * D + d, unit, mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _unit_backward(
    x_ptr, inverse_ptr, g_ptr, temperature_ptr, out_ptr,  # (rows, D), (rows,), (rows, D), (), (rows, D)
    rows, D, stride, factor: tl.float64, eps: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor / τ · (g − x̂ (x̂·g)) / |x|; without the projection where |x| ≤ eps, as autograd has it."""
    WORK: tl.constexpr = inverse_ptr.dtype.element_ty
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inverse = tl.load(inverse_ptr + row)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride + d, mask=d < D, other=0.0).to(WORK) * inverse
    g = tl.load(g_ptr + tl.cast(row, tl.int64) * D + d, mask=d < D, other=0.0)
    along = tl.sum(x * g)
    along = tl.where(inverse * tl.full((), eps, WORK) < 1.0, along, 0.0)
    out = (g - x * along) * (inverse * (tl.full((), factor, WORK) / tl.load(temperature_ptr)))
    tl.store(out_ptr + tl.cast(row, tl.int64) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["rows"])
def _excess(
    z_ptr,  # (rows, P), stride z_stride: q·p
    target_ptr, row_norm_ptr, col_norm_ptr, id_ptr,  # (rows,), (rows,), (P,), (P,) int64 or None
    temperature_ptr, out_ptr,  # (), (rows,)
    rows, P, z_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = Σ_p softmax_p (cos_p − cos_y) of a row."""
    WORK: tl.constexpr = out_ptr.dtype.element_ty
    temperature = tl.load(temperature_ptr)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        y = tl.load(target_ptr + row)
        valid = (y >= 0) & (y < P)
        at = tl.where(valid, y, 0)
        z_row = z_ptr + tl.cast(row, tl.int64) * z_stride
        norm = tl.load(row_norm_ptr + row)
        cos_y = tl.load(z_row + at) * norm * tl.load(col_norm_ptr + at)
        own = y
        if id_ptr is not None:
            own = tl.load(id_ptr + at)
        # The target's own term, e^0 · 0, is there from the start: no sum is empty.
        running_max = tl.full((), 0.0, WORK)
        total = tl.full((), 1.0, WORK)
        excess = tl.full((), 0.0, WORK)
        for start in range(0, P, BLOCK):
            col = start + tl.arange(0, BLOCK)
            cos = tl.load(z_row + col, mask=col < P, other=0.0) * norm
            more = cos * tl.load(col_norm_ptr + col, mask=col < P, other=0.0) - cos_y
            counts = (col < P) & (col != y)
            if id_ptr is not None:
                counts = counts & (tl.load(id_ptr + col, mask=col < P, other=0) != own)
            x = tl.where(counts, more / temperature, -float("inf"))
            new_max = tl.maximum(running_max, tl.max(x))
            e = tl.exp(x - new_max)
            rescale = tl.exp(running_max - new_max)
            total = total * rescale + tl.sum(e)
            excess = excess * rescale + tl.sum(e * more)
            running_max = new_max
        tl.store(out_ptr + row, tl.where(valid, excess / total, float("nan")))


def normalize(x: Tensor, with_unit: bool) -> tuple[Tensor, Tensor | None]:
    """1/max(|x|, EPS) (R,) in the working dtype, and x̂ (R, D) in x's."""
    rows, d = x.shape
    inverse = x.new_empty(rows, dtype=work_dtype(x))
    unit = x.new_empty(rows, d) if with_unit else None
    t = tiles.tile("unit", x.device)
    launch(
        _unit, rows, x.device, x, inverse, unit, rows, d, x.stride(0), EPS,
        BLOCK=triton.next_power_of_2(d), **t.options,
    )  # fmt: skip
    return inverse, unit


def project(x: Tensor, inverse: Tensor, g: Tensor, temperature: Tensor, factor: float) -> Tensor:
    """The gradient of x (R, D) from g (R, D), that of x̂ times `temperature` () / `factor`."""
    rows, d = x.shape
    out = x.new_empty(rows, d)
    t = tiles.tile("unit", x.device)
    launch(
        _unit_backward, rows, x.device, x, inverse, g, temperature, out, rows, d, x.stride(0), factor, EPS,
        BLOCK=triton.next_power_of_2(d), **t.options,
    )  # fmt: skip
    return out


def _store_excess(
    z: Tensor, target: Tensor, norms: tuple[Tensor, Tensor], ids: Tensor | None, temperature: Tensor, out: Tensor
) -> None:
    (rows, p), device = z.shape, z.device
    t = tiles.tile("epilogue_cosine", device, z.dtype)
    launch(
        _excess, min(rows, t.programs * multiprocessors(device)), device,
        z, target, *norms, ids, temperature, out, rows, p, z.stride(0), BLOCK=t.cols, **t.options,
    )  # fmt: skip


def _dense_ids(ids: Tensor) -> Tensor:
    """int32, equal where `ids` are: one register a column. Nothing waits for the number of distinct ones."""
    values, order = ids.sort()
    rank = torch.zeros(len(ids), dtype=torch.int32, device=ids.device)
    rank[1:] = (values[1:] != values[:-1]).cumsum(0)
    return torch.empty_like(rank).scatter_(0, order, rank)


def _problems(
    query: Tensor, passages: Tensor, target: Tensor, passage_ids: Tensor | None, inverses: tuple[Tensor, Tensor],
    directions: list[str], per_direction: bool, limit: Tensor | None,
) -> list[Problem]:  # fmt: skip
    (b, p), (q_inverse, p_inverse) = (len(query), len(passages)), inverses
    own = ids = None
    at = target.where((target >= 0) & (target < p), 0)
    if passage_ids is not None or len(directions) > 1:
        ids = _dense_ids(passage_ids) if passage_ids is not None else torch.arange(p, device=at.device).int()
        own = ids[at]
    first = Half(query, q_inverse, 0, p)
    if len(directions) == 1:
        return [Problem([first], passages, p_inverse, target, p, own, ids, limit, 1)]
    assert own is not None
    assert ids is not None
    if per_direction:
        second = Half(passages[at], p_inverse[at], 0, b)
        order = torch.arange(b, device=at.device)
        return [
            Problem([first], passages, p_inverse, target, p, own, ids, limit, 1),
            Problem([second], query, q_inverse, order, b, own, own, limit, 1),
        ]
    queries = "doc_to_query" in directions
    halves = [first._replace(size=p + b) if "query_to_query" in directions else first]
    if queries or "doc_to_doc" in directions:
        start, stop = 0 if "doc_to_doc" in directions else p, p + b if queries else p
        halves.append(Half(passages[at], p_inverse[at], start, stop - start))
    if any(half.first + half.size > p for half in halves):
        passages, p_inverse = torch.cat([passages, query]), torch.cat([p_inverse, q_inverse])
        ids = torch.cat([ids, own])
    return [Problem(halves, passages, p_inverse, target, p, own, ids, limit, 1 + queries)]


def _shifted(
    query: Tensor, passages: Tensor, target: Tensor, passage_ids: Tensor | None, temperature: Tensor,
    query_gradient: bool, passage_gradient: bool, temperature_gradient: bool,
    directions: list[str], per_direction: bool, most: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (b, d), p = query.shape, len(passages)
    either, several = query_gradient or passage_gradient, len(directions) > 1  # several: all gradients or none
    q_inverse, q_unit = normalize(query, either and several)
    p_inverse, p_unit = normalize(passages, either if several else query_gradient)
    problems = _problems(
        query, passages, target, passage_ids, (q_inverse, p_inverse), directions, per_direction,
        None if most is None else most * LOG2_E / temperature,
    )  # fmt: skip
    at = target.where((target >= 0) & (target < p), 0)
    loss, d_temperature = torch.zeros_like(temperature), torch.zeros_like(temperature)
    g_query: Tensor | None = None
    g_passages: Tensor | None = None
    for number, problem in enumerate(problems):
        unit = p_unit if number == 0 else q_unit
        if len(problem.columns) > p and p_unit is not None and q_unit is not None and number == 0:
            unit = torch.cat([p_unit, q_unit])
        found = solve(problem, unit, either if several else passage_gradient, temperature, temperature_gradient)
        loss -= found.logprob.mean() / len(problems)
        if found.excess is not None:
            d_temperature -= found.excess.mean() * (LN_2.value / len(problems)) / temperature
        rows: list[Tensor | None] = [*found.rows, None, None][:2]
        columns = [None, None] if found.columns is None else [found.columns[:p], found.columns[p:]]
        if number == 1:  # its rows are passages and its columns queries
            rows, columns = [None, rows[0]], [None, found.columns]
        for x in (rows[0], columns[1]):
            if x is not None and len(x) > 0:
                g_query = x if g_query is None else g_query.add_(x)
        if columns[0] is not None:
            g_passages = columns[0]
        if rows[1] is not None and g_passages is not None:
            g_passages.index_put_((at,), rows[1], accumulate=True)  # by a sort on CUDA: no order of arrival
    d_query, d_passages = query.new_empty(0, d), passages.new_empty(0, d)
    if query_gradient and g_query is not None:
        d_query = project(query, q_inverse, g_query, temperature, -1 / (b * len(problems)))
    if passage_gradient and g_passages is not None:
        d_passages = project(passages, p_inverse, g_passages, temperature, -1 / (b * len(problems)))
    return loss, d_query, d_passages, d_temperature


def forward(
    query: Tensor,  # (B, D), B > 0
    passages: Tensor,  # (P, D)
    target: Tensor,  # (B,) int64
    passage_ids: Tensor | None,  # (P,) int64
    temperature: Tensor,  # () fp32 (fp64 for fp64)
    query_gradient: bool,
    passage_gradient: bool,
    temperature_gradient: bool,
    directions: str = "query_to_doc",  # and others, after commas: needs "shifted"
    per_direction: bool = False,
    margin: float | None = None,  # needs "shifted"
    method: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss () and its gradients of query (B, D), passages (P, D), each (0, D) unless asked for, and temperature ().

    `method` is "shifted" (bf16 and fp32, any 16 or 32 bits without gradients) or "cublas", by default the faster one
    that serves.
    """
    (b, d), p = query.shape, len(passages)
    query, passages, target = dense(query), dense(passages), target.contiguous()
    passage_ids = None if passage_ids is None else passage_ids.contiguous()
    wanted = query_gradient, passage_gradient, temperature_gradient
    more = directions != "query_to_doc" or margin is not None
    if method is None:
        scores = not any(wanted) and query.dtype != torch.float64
        method = "shifted" if more or scores else tiles.method(query.device, query.dtype, d)
    if method == "shifted":
        if query.dtype == torch.float64 or (query.dtype == torch.float16 and any(wanted)):
            raise TypeError(f"method: got 'shifted' for {query.dtype}, expected bfloat16 or float32; use 'cublas'")
        return _shifted(
            query, passages, target, passage_ids, temperature, *wanted, directions.split(","), per_direction, margin
        )  # fmt: skip
    if more:
        raise ValueError(f"method: got {method!r}, expected 'shifted' for other directions or a margin")
    q_inverse, q_unit = normalize(query, passage_gradient)
    p_inverse, p_unit = normalize(passages, query_gradient)
    d_query, d_passages = query.new_empty(0, d), passages.new_empty(0, d)
    work = work_dtype(query)
    q_scale = q_inverse / temperature
    none = query.new_zeros((), dtype=work)
    logprob, excess = query.new_empty(2, b, dtype=work).unbind()
    g_query = query.new_empty(b, d, dtype=work) if query_gradient else None
    g_passages = None
    step = rows_per_chunk(b, p, work.itemsize, query.device)
    memory = Logits(step, p, query.dtype, query.device)
    for i in range(0, b, step):
        rows = slice(i, min(i + step, b))
        z, e = memory.z[: rows.stop - i], memory.e[: rows.stop - i]
        matmul(query[rows], passages.t(), z)
        if temperature_gradient:
            norms = q_inverse[rows], p_inverse
            _store_excess(z, target[rows], norms, passage_ids, temperature, excess[rows])
        epilogue(
            z, e, target[rows], logprob[rows],
            ignore_index=NEVER, norms=(q_scale[rows], p_inverse), ids=passage_ids,
            with_gradient=query_gradient or passage_gradient,
        )  # fmt: skip
        if g_query is not None:
            matmul(e, p_unit, g_query[rows])
        if passage_gradient:
            part = matmul(e.t(), q_unit[rows], passages.new_empty(p, d, dtype=work))
            g_passages = part if g_passages is None else g_passages.add_(part)
    if g_query is not None:
        d_query = project(query, q_inverse, g_query, temperature, -1 / b)
    if g_passages is not None:
        d_passages = project(passages, p_inverse, g_passages, temperature, -1 / b)
    d_temperature = -excess.mean() / temperature.square() if temperature_gradient else none
    return -logprob.mean(), d_query, d_passages, d_temperature
