"""A part of the list in compiled.py: the GPU whose code is counted, and the GEMMs of the one with the least memory."""

import pytest
import torch

pytest.importorskip("triton")

from compiled import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's time is better spent running the kernels")
@pytest.mark.parametrize(("part", "kernels"), [("sm_90", ()), ("sm_86", ("_score", "_emit", "_emit_cosine"))])
def test_no_spills_fits_and_uses_the_matrix_unit(part, kernels):
    check(part, kernels)
