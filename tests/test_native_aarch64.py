"""The native kernels' NEON build: cross-compiled, run by qemu, and held to the numbers tests of test_native.py."""

import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import test_native
import torch
from test_native import (  # noqa: F401 (collected here too: they run with the fixtures below)
    test_a_bound_stays_until_a_logit_is_far_above_it,
    test_bad_logit_is_never_hidden,
    test_bf16_gradient_is_the_fp32_one_rounded_to_nearest,
    test_certain_target_keeps_its_gradient,
    test_elementary_functions_at_their_edges,
    test_elementary_functions_within_the_stated_ulp,
    test_epilogue_accurate,
    test_head_accurate,
    test_row_of_minus_infinity_is_nan_as_in_eager,
    test_rows_apart_and_off_alignment_stay_apart,
    test_same_bits_whatever_the_threads,
    test_sum_of_many_equal_terms,
)

from autoregembed.kernels.native import linear_logprob as kernels

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
MISSING = [name for name in TOOLS if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: cmake, g++-aarch64-linux-gnu, qemu-user)"
)


class Emulated:
    """`_native`'s functions by kernels/native/driver.cpp in an emulator; arguments as there."""

    FUNCTIONS = ("epilogue", "exp", "tanh", "denormals")
    STORES = ("nothing", "fp32", "bf16")

    def __init__(self, *command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self):
        self.process.communicate()
        assert self.process.returncode == 0

    def call(self, function, sent, received, *, rows=0, columns=0, stride=0, offset=0, bias=False, store="fp32",
             threads=1, softcap=0.0, scale=1.0):  # fmt: skip
        """One call of the driver: tensors `sent`, results over the tensors `received`."""
        header = self.FUNCTIONS.index(function), rows, columns, stride, offset, bias, self.STORES.index(store), threads
        data = struct.pack("=8q2d", *header, softcap, scale) + b"".join(x.numpy().tobytes() for x in sent)
        self.process.stdin.write(data)
        self.process.stdin.flush()
        for x in received:
            found = self.process.stdout.read(x.nbytes)
            assert len(found) == x.nbytes, "the driver has stopped"
            if found:
                x.copy_(torch.frombuffer(bytearray(found), dtype=x.dtype))

    def epilogue(self, logits, target, bias, softcap, scale, store, *rest):
        (rows, columns), stride = logits.shape, logits.stride(0)
        offset = logits.data_ptr() % 64 // 4  # of the first logit from where vectors are aligned
        memory = torch.zeros(offset + ((rows - 1) * stride + columns if rows else 0))
        inside = logits.as_strided((len(memory) - offset,), (1,))
        memory[offset:] = inside
        *state, threads = rest  # running_max, running_sumexp, target_logit, rescale
        self.call(
            "epilogue", (memory, target, *([] if bias is None else [bias]), *state), (memory, *state), rows=rows,
            columns=columns, stride=stride, offset=offset, bias=bias is not None, store=store, threads=threads,
            softcap=softcap or 0.0, scale=scale,
        )  # fmt: skip
        assert not memory[:offset].any()
        inside.copy_(memory[offset:])

    def elementary(self, name, x, y):
        self.call(name, (x,), (y,), columns=len(x))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={TOOLS[1]}")
    # This machine's Python: CMakeLists.txt asks for one, the driver uses none.
    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-DPython_INCLUDE_DIR={sysconfig.get_path('include')}")
    for command in (
        ("cmake", "-S", REPOSITORY, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *target, *python),
        ("cmake", "--build", folder, "--target", "native_driver"),
    ):
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
    driver = Emulated(TOOLS[2], folder / "native_driver")
    yield driver
    driver.close()


@pytest.fixture(autouse=True)
def level(emulated, monkeypatch):
    monkeypatch.setattr(test_native, "native", emulated)
    monkeypatch.setattr(kernels, "extension", emulated)
    return "neon"


def test_denormals_are_flushed_inside_and_live_on_outside(emulated):
    seen = torch.full((6,), torch.nan)
    emulated.call("denormals", (), (seen,), rows=4, threads=3)
    assert (seen != 0).tolist() == [True, False, False, False, False, True]
