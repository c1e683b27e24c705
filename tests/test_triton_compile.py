"""A part of the list in compiled.py: the GPU with the least shared memory, and the one whose code is counted."""

import pytest
import torch

pytest.importorskip("triton")

from compiled import check


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's time is better spent running the kernels")
@pytest.mark.parametrize("part", ["sm_86", "sm_90"])
def test_no_spills_fits_and_uses_the_matrix_unit(part):
    check(part)
