"""The memory of a process does not grow with the number of shapes that it multiplies."""

import os
import subprocess
import sys

import pytest
import torch

PRODUCTS = """
import sys, torch
from autoregembed.cpu import bound_primitive_caches
if sys.argv[1] == "bounded":
    bound_primitive_caches()
torch.set_num_threads(1)
def resident():
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1])
weight, bias = torch.randn(512, 256).to_mkldnn(), torch.zeros(512).to_mkldnn()
for length in range(64, 464):
    torch._C._nn.mkldnn_linear(torch.randn(length, 256).to_mkldnn(), weight, bias)
    if length == 263:
        before = resident()
print(resident() - before)
"""


def growth(kind: str) -> int:
    """Bytes that 200 more shapes take, after as many, in a process of its own; in fp32, which oneDNN has everywhere."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS, kind], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_products_of_many_shapes_take_bounded_memory():
    free = growth("free")
    assert free > 60e6
    # What the allocator keeps varies by tens of megabytes from run to run.
    assert growth("bounded") < free / 2


def test_what_the_user_has_set_stays(monkeypatch):
    from autoregembed.cpu import bound_primitive_caches

    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    bound_primitive_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) > 0
