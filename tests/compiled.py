"""Every kernel with every entry of the tile table, compiled for a part that is not here: `pytest tests/compiled.py`
goes through all parts, nightly; test_triton_compile.py takes the one that is counted and, of the one with the least
shared memory, the kernels that fill it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from autoregembed.kernels.triton import tiles

ROOT = Path(__file__).resolve().parents[1]
MATRIX = {
    "sm_80": ("mma.sync",),
    "sm_86": ("mma.sync",),
    "sm_90": ("wgmma.mma_async",),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}


def check(part, kernels=()):
    """No spills, no more shared memory than there is, the matrix unit, and SASS within its count.

    Of all kernels, or of those with one of `kernels` in their names.
    """
    # A process of its own: in this one the kernels may belong to the interpreter.
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))  # tests/pairs.py: another Triton
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "bench.compile_report", "--arch", part, "--json"]
    command += [word for kernel in kernels for word in ("--kernel", kernel)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    expected = kernels or {
        "_epilogue", "_score", "_emit", "_finish", "_target_logits", "_gradient_rows", "_segment_sum",
        "_segment_sum_backward", "_scale_rows", "_alignment_loss", "_pool_last_k", "_pool_last_k_backward", "_splice",
        "_splice_backward", "_unit", "_unit_backward", "_excess", "_lse", "_gradient",
        "_part_scores", "_row_gradients", "_positive_cosine", "_emit_cosine", "_finish_cosine",
    }  # fmt: skip
    assert {row["kernel"] for row in rows} >= set(expected)
    for row in rows:
        assert row["spills"] == 0, row
        assert 0 < row["registers"] <= (512 if part == "gfx942" else 255), row
        assert row["shared"] <= tiles.ARCHITECTURES[part], row
        if row["dot"] and row["sixteen_bits"]:
            assert row["matrix"] in MATRIX[part], row
    if part in ("sm_90", "sm_100"):
        assert {"_score", "_emit", "_emit_cosine"} <= {r["kernel"] for r in rows if r["bulk_copy"]}
    if part == "sm_90":
        counted = {(row["kernel"], row["case"]): row["sass"] for row in rows if "sass" in row}
        # One a logit, and one a thread and block that rescales the running sum.
        assert all(0.9 < sass["exponentials"] < 1.15 for sass in counted.values()), counted
        most = {"_emit": 8, "_score": 8, "_epilogue": 15}  # SASS instructions a logit
        plain = [(kernel, sass["all"]) for (kernel, case), sass in counted.items() if "info_nce" not in case]
        assert {kernel for kernel, _ in plain} == set(most)
        assert all(found <= most[kernel] for kernel, found in plain), plain
        cosines = {case: sass["usual"] for (kernel, case), sass in counted.items() if kernel == "_emit_cosine"}
        assert cosines["info_nce torch.bfloat16 D=4096 ids=False gradients=True, False"] <= 8, cosines
        assert cosines["info_nce torch.bfloat16 D=4096 ids=True gradients=True, False"] <= 10, cosines


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's time is better spent running the kernels")
@pytest.mark.parametrize("part", tiles.ARCHITECTURES)
def test_no_spills_fits_and_uses_the_matrix_unit(part):
    check(part)
