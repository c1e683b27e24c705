"""Does the suite notice? One-line bugs, each put into a copy of the Triton kernels, each of which the tests must catch.

    python tests/seeded_bugs.py [substring of a bug's name]

Prints one line a bug and exits with the number of survivors. Every bug runs in a fork of one process that has imported
everything but the kernels. Outcome in the interpreter, fp32: all caught. Two survived at first and got a test: tanh
without its series, and a gradient of z from its first reader only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

HEAD, SUM, ALIGN, NCE = "linear_logprob", "segment_sum", "alignment_loss", "info_nce"
COSINES, PARTS = "cosines", "conditional_alignment"
POOL, SPLICE, DISTILL = "pool_last_k", "splice", "score_distillation"
SHAPES = "any_shape and dtype0"
CUBLAS, SHIFTED = SHAPES + " and cublas", SHAPES + " and shifted"
# (name, file, the line's text, what it becomes, file of tests, tests that should notice)
BUGS = [
    ("epilogue drops the last block", HEAD, "    blocks = tl.cdiv(V, BLOCK)\n", "    blocks = V // BLOCK\n", HEAD,
     CUBLAS),
    ("epilogue leaves E unscaled", HEAD, "factors = exp2(shifts - shift, FAST) * (-g / s)",
     "factors = exp2(shifts - shift, FAST) * -g", HEAD, CUBLAS),
    ("epilogue: target in its own sum", HEAD, "tl.store(z_row + at, -float(\"inf\"))", "pass", HEAD, CUBLAS),
    ("epilogue: padding in the sum", HEAD, "-float(\"inf\"), mask=V + tl.arange(0, 16) < width",
     "0.0, mask=V + tl.arange(0, 16) < width", HEAD, CUBLAS),
    ("epilogue: gradient of the target forgotten", HEAD,
     "tl.store(e_row + at, (g * softcap_grad_y * (rest / s)).to(E))", "pass", HEAD, CUBLAS),
    ("epilogue: 1 − p by a difference", HEAD, "(g * softcap_grad_y * (rest / s)).to(E)",
     "(g * softcap_grad_y * (1 - tl.exp(logprob))).to(E)", HEAD, "certain_target and cublas"),
    ("epilogue: sum not rescaled to a new maximum", HEAD, "sums = sums * exp2(running_max - shift, FAST) + e",
     "sums = sums + e", HEAD, CUBLAS),
    ("epilogue: softcap's slope missing", HEAD, "                        e = e * softcap_grad\n",
     "                        e = e\n", HEAD, CUBLAS),
    ("ignored rows leave E as it was", HEAD, "if GRADIENT:\n                for block in range(0, blocks):\n"
     "                    col = block * BLOCK + lanes\n                    tl.store(e_row + col, tl.zeros",
     "if False:\n                for block in range(0, blocks):\n                    col = block * BLOCK + lanes\n"
     "                    tl.store(e_row + col, tl.zeros", HEAD, "ignored and cublas"),
    ("epilogue: invalid ids score as id 0", HEAD,
     "tl.store(logprob_ptr + row, tl.where(valid, logprob, float(\"nan\")))",
     "tl.store(logprob_ptr + row, logprob)", HEAD, "ignored and cublas"),
    ("−inf columns give NaN", "primitives", 'return tl.where(running_max == -float("inf"), 0.0, running_max)',
     "return running_max", HEAD, "masked_columns"),
    ("target one to the right", "primitives", "col[None, :] == at[:, None]", "col[None, :] == at[:, None] + 1", HEAD,
     SHIFTED),
    ("columns past V in the sum", "primitives", "x = tl.where((col < V - start)[None, :], x, fill)", "x = x", HEAD,
     SHIFTED),
    ("scorer's splits overlap", HEAD, "(split + 1) * tiles_v // splits", "tiles_v", HEAD, "chunks_and_splits"),
    ("forgotten bias", HEAD,
     "x += tl.load(bias_ptr + col, mask=col < V, other=0.0).to(tl.float32)[None, :]", "x += 0.0", HEAD, SHIFTED),
    ("forgotten bias of the target", HEAD, "x += tl.load(bias_ptr + y).to(tl.float32)", "x += 0.0", HEAD, SHIFTED),
    ("one part of the sums too few", HEAD, "for first in range(0, parts, PARTS)",
     "for first in range(0, parts - 1, PARTS)", HEAD, SHIFTED),
    ("row beyond the range kept", HEAD, "((total > LIMIT) | (z_y == -float(\"inf\")))", "(total > 1e38)", HEAD,
     "improbable"),
    ("row beyond the range: old e kept", HEAD, "mask=beyond[:, None] & (col < V)[None, :]",
     "mask=(row < 0)[:, None] & (col < V)[None, :]", HEAD, "improbable"),
    ("row beyond the range: its sum kept", HEAD, "total = tl.where(beyond, again, total)", "total = total", HEAD,
     "improbable"),
    ("epilogue: log of a sum near 1", HEAD, "-log1p(rest)", "-tl.log(1.0 + rest)", HEAD, "certain_target and cublas"),
    ("log of a sum near 1", HEAD, "-log1p(total / e_y)", "-tl.log(1.0 + total / e_y)", HEAD, "certain_target"),
    ("1 − p by a difference", HEAD, "at_target = g * (total / s)", "at_target = g * (1.0 - e_y / s)", HEAD,
     "certain_target and shifted"),
    ("emit: softcap's slope missing", HEAD, "        if SOFTCAP:\n            e = e * softcap_grad\n        if TMA",
     "        if TMA", HEAD, SHIFTED),
    ("ignored rows keep their product", HEAD, "u = tl.load(product_ptr + at, mask=counts[:, None] & within",
     "u = tl.load(product_ptr + at, mask=inside[:, None] & within", HEAD, "ignored and shifted"),
    ("invalid ids score as id 0", HEAD, "logprob = tl.where(valid, logprob, float(\"nan\"))", "logprob = logprob", HEAD,
     "ignored and shifted"),
    ("GEMM: end of D dropped", "primitives", "for k in range(0, depth, DEPTH):\n            if EVEN",
     "for k in range(0, depth - DEPTH + 1, DEPTH):\n            if EVEN", HEAD, SHAPES),
    ("GEMM: second operand of the wrong tile", "primitives", "b.load([col, k]).T", "b.load([0 * col, k]).T", HEAD,
     "whole_words and dtype0"),
    ("tanh without its series", "primitives", "y = tl.where(tl.abs(x) < 0.25, x * p, big)", "y = big", HEAD,
     "large_cap"),
    ("gradient applied twice to rows", HEAD, "(g[:, None] * u)", "(g[:, None] * g[:, None] * u)", HEAD, SHAPES),
    ("gradient is zero", HEAD, "(g[:, None] * u)", "(0.0 * g[:, None] * u)", HEAD, SHAPES),
    ("segment sums lose the tail", SUM, "for start in range(0, count, BLOCK):",
     "for start in range(0, count - BLOCK + 1, BLOCK):", SUM, "sums_and and triton"),
    ("bad bounds unnoticed", SUM, "tl.where(good, total, float(\"nan\"))", "total", SUM,
     "bad_bounds_are_nan"),
    ("binary search off by one", "primitives", "right = tl.load(cu_ptr + middle) <= row",
     "right = tl.load(cu_ptr + middle) < row", SUM, "sums_and and triton"),
    ("alignment: sign of |a − b|", ALIGN, "tl.where(d < 0, -1.0, 0.0)", "tl.where(d < 0, 1.0, 0.0)", ALIGN,
     "loss_gradients"),
    ("alignment: mean over all places", ALIGN, "pairs += tl.sum(some)", "pairs += tl.sum(some) * 0 + ROWS", ALIGN,
     "loss_gradients"),
    ("alignment: subtract is add", ALIGN, "margin + SIGN * (", "margin + SIGN * SIGN * (", ALIGN, "loss_gradients"),
    ("alignment: log(1 + t) by log", "primitives", "return tl.where(exact, t, tl.log(u) * (t / tl.where(exact, 1.0, "
     "u - 1.0)))", "return tl.log(u)", ALIGN, "small_losses"),
    ("pool_last_k: one row early", POOL, "row = end - K + out_row % K", "row = end - K - 1 + out_row % K", POOL,
     "test_pool_last_k and dtype0"),
    ("splice: K + 1 rows of z", SPLICE, "(j >= 0) & (j < K)", "(j >= 0) & (j <= K)", SPLICE, "test_splice and dtype0"),
    ("splice: only the first reader's gradient", SPLICE, "for n in range(0, most):\n            s = first + n",
     "for n in range(0, tl.minimum(most, 1)):\n            s = first + n", SPLICE, "test_splice and dtype0"),
    ("InfoNCE: projection missing", NCE, "out = (g - x * along)", "out = g", NCE, "both_gradients and dtype0"),
    ("InfoNCE: mean over passages", NCE, "g_query, temperature, -1 / b)", "g_query, temperature, -1 / p)", NCE,
     "both_gradients and dtype0"),
    ("InfoNCE: duplicates stay", HEAD, "z = tl.where(same, -float(\"inf\"), z)\n                most",
     "z = z\n                most", NCE, "both_gradients and dtype0"),
    ("cosines: duplicates stay", COSINES,
     "x = tl.where(tl.load(id_ptr + col, mask=col < V, other=0)[None, :] == own[:, None], fill, x)", "x = x", NCE,
     "directions_and_margin and dtype1"),
    ("cosines: false negatives stay", COSINES, "x = tl.where(gap > most, fill, x)", "x = x", NCE,
     "directions_and_margin and dtype1"),
    ("cosines: positive missing in e", COSINES, "(-total).to(e_ptr.dtype.element_ty)",
     "(0.0 * total).to(e_ptr.dtype.element_ty)", NCE, "directions_and_margin and dtype1"),
    ("cosines: positive once in a joint sum", COSINES, "float(p.copies)", "1.0", NCE,
     "directions_and_margin and dtype1"),
    ("cosines: sums of the second half over the first", COSINES, "(0, heights[0])", "(0, 0)", NCE, "agree"),
    ("cosines: margin from the shift", COSINES, "most = limit - margin", "most = limit", NCE, "large_batch"),
    ("cosines: row beyond the range kept", COSINES, "(total > LIMIT)", "(total > float(\"inf\"))", NCE, "improbable"),
    ("cosines: row beyond the range, old e kept", COSINES, "counts = beyond[:, None]", "counts = (row < 0)[:, None]",
     NCE, "improbable"),
    ("cosines: row beyond the range, its sum kept", COSINES, "total = tl.where(beyond, again, total)", "total = total",
     NCE, "improbable"),
    ("cosines: bad targets unnoticed", COSINES, "tl.where(valid, logprob, float(\"nan\"))", "logprob", NCE,
     "bad_target"),
    ("cosines: last chunk's gradient alone", COSINES, "into += matmul(", "into[:] = matmul(", NCE, "agree"),
    ("cosines: factor of a row missing", COSINES, "product.mul_(elsewhere[at, None])", "pass", NCE,
     "directions_and_margin and dtype1"),
    ("cosines: temperature's gradient of the first half", COSINES, "moments[first:]", "moments", "temperature",
     "directions and triton"),
    ("InfoNCE: gradient of documents as rows missing", NCE, "g_passages.index_put_((at,), rows[1], accumulate=True)",
     "pass", NCE, "directions_and_margin and dtype1"),
    ("InfoNCE: one of several documents", NCE, "rows[1], accumulate=True)", "rows[1] + g_passages[at])", NCE,
     "directions_and_margin and dtype1"),
    ("InfoNCE: duplicates in the temperature's gradient", NCE,
     "counts = counts & (tl.load(id_ptr + col, mask=col < P, other=0) != own)", "counts = counts", "temperature",
     "test_info_nce and True-True and triton"),
    ("InfoNCE: temperature's gradient not rescaled", NCE, "excess = excess * rescale", "excess = excess", "temperature",
     "test_info_nce and triton"),
    ("distillation: passages' sums drop the last rows", DISTILL, "for start in range(0, inner, INNER):",
     "for start in range(0, inner - INNER + 1, INNER):", DISTILL, "test_formula and triton"),
    ("distillation: masked pairs in the sums", DISTILL, "z_max, z_sum = _add(z_max, z_sum, tl.where(kept, z,",
     "z_max, z_sum = _add(z_max, z_sum, tl.where((j < inner)[None, :], z,", DISTILL, "test_formula and triton"),
    ("distillation: sums not rescaled", DISTILL, "running_sum * tl.exp(running_max - shift) +", "running_sum +",
     DISTILL, "test_formula and triton"),
    ("distillation: marginal of rows in columns", DISTILL, "t_col = tl.exp(s - ", "t_col = tl.exp(by_row - ", DISTILL,
     "test_formula and triton"),
    ("distillation: mean over all columns", DISTILL, "((n > 0).sum()", "((n >= 0).sum()", DISTILL,
     "drops_reaches and triton"),
    ("distillation: one-hot not shared", DISTILL, "(hit / tl.maximum(owners, 1.0))", "hit", DISTILL,
     "test_formula and triton"),
    ("distillation: mixture in rows without a positive", DISTILL,
     "tl.where(y >= 0, share * t_row + (1.0 - share) * hit, t_row)",
     "share * t_row + (1.0 - share) * hit", DISTILL, "test_formula and triton"),
    ("distillation: gradient of rows alone", DISTILL, "ratio * (tl.exp(along_col) - t_col)", "0.0 * ratio", DISTILL,
     "test_accurate and triton"),
    ("distillation: slope without the teacher", DISTILL, "slope += e * z", "slope += tl.exp(along_row) * z", DISTILL,
     "test_accurate and triton"),
    ("distillation: bad targets unnoticed", DISTILL, "tl.where(valid, 0.0, float(\"nan\"))",
     "tl.where(valid, 0.0, 0.0)", DISTILL, "gives_nan"),
    ("parts: a place outside the pack", PARTS, "tl.where(inside & good, total", "tl.where(good, total", PARTS,
     "gives_nan"),
    ("parts: sum for mean", PARTS, "total = total / count.to(total.dtype)", "total = total", PARTS,
     "equal_to_its_parts and mean and triton"),
    ("parts: absent negatives count", PARTS, "tl.where(absent, 0, 1)", "tl.where(absent, 1, 1)", PARTS,
     "equal_to_its_parts and triton"),
    ("parts: the last few gradients alone", PARTS, "total += tl.sum(", "total = tl.sum(", PARTS,
     "equal_to_its_parts and triton"),
    ("parts: gradient of the mean", PARTS, "total = total / tl.maximum(end - start, 1).to(total.dtype)",
     "total = total", PARTS, "equal_to_its_parts and mean and triton"),
]  # fmt: skip


def caught(bug: tuple[str, str, str, str, str, str]) -> bool:
    """Whether the chosen tests fail with the bug in place (in a fork: this process stays as it is)."""
    import pytest

    name, file, old, new, tests, chosen = bug
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "triton"
        shutil.copytree(ROOT / "kernels" / "triton", copy, ignore=shutil.ignore_patterns("__pycache__"))
        source = (copy / f"{file}.py").read_text(encoding="utf-8")
        if old not in source:
            raise SystemExit(f"{name}: the line is not in {file}.py: {old!r}")
        (copy / f"{file}.py").write_text(source.replace(old, new), encoding="utf-8")
        child = os.fork()
        if child == 0:
            import autoregembed.kernels

            autoregembed.kernels.__path__.insert(0, folder)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                command = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", chosen]
                plain = TESTS / f"test_{tests}.py"
                path = plain if tests in (SUM, DISTILL, PARTS, "temperature") else TESTS / f"test_triton_{tests}.py"
                code = pytest.main([*command, str(path)])
            os._exit(int(code))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise SystemExit(f"{name}: pytest answered {code}")
    return code == 1


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(TESTS)]
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401

    import autoregembed.train  # noqa: F401

    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = 0
    for bug in BUGS:
        if wanted in bug[0]:
            found = caught(bug)
            survivors += not found
            print(f"{'caught' if found else 'SURVIVED':9} {bug[0]}", flush=True)
    print(f"{survivors} survived")
    return survivors


if __name__ == "__main__":
    raise SystemExit(main())
