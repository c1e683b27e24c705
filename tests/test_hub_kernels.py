"""The folder of `make hub-kernels`, loaded by the real package `kernels`, against float64 in Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoregembed import reference
from autoregembed.testing import assert_accurate

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "autoregembed"
    subprocess.run([sys.executable, ROOT / "release" / "hub_kernels.py", target], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def hub(folder):
    kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")
    if not hasattr(kernels, "get_local_kernel"):
        pytest.skip("the package kernels is not installed: `kernels` is this repository's folder")
    if not torch.cuda.is_available():  # the package looks for the variant of torch's own backend
        return kernels.get_local_kernel(folder / "build" / "torch-cuda")
    return kernels.get_local_kernel(folder)


def test_the_folder_is_a_valid_project(folder, hub):
    from kernels._rust import Build, Metadata

    assert [str(b) for b in Build.open(folder).general.backends] == ["cuda", "rocm"]
    for backend in ("cuda", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        metadata = Metadata.read_from_file(variant / "metadata.json")
        assert (str(metadata.name), metadata.version, metadata.license) == ("autoregembed", 1, "apache-2.0")
        assert metadata.id in sys.modules or backend == "rocm"
        for file in (folder / "torch-ext" / "autoregembed").rglob("*.py"):
            assert (variant / file.relative_to(folder / "torch-ext" / "autoregembed")).read_bytes() == file.read_bytes()


def test_it_needs_nothing_of_ours(folder):
    """Loaded by path where our package cannot be imported, as on any user's machine."""
    code = f"""
import importlib.util, sys
sys.modules["autoregembed"] = None
spec = importlib.util.spec_from_file_location("_unique_name", {str(folder / "build/torch-cuda/__init__.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["_unique_name"] = module
spec.loader.exec_module(module)
import torch
assert {{"linear_logprob", "info_nce"}} <= set(module.__all__)
assert all(callable(getattr(module, name)) for name in module.__all__)
assert not [name for name in dir(torch.ops) if "autoregembed" in name]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, timeout=300)


def test_log_probabilities_and_their_gradient(hub):
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(21, 20, generator=generator), torch.randn(131, 20, generator=generator)
    target = torch.randint(131, (21,), generator=generator)
    target[3] = -100
    g = torch.randn(21, generator=generator)
    found = h.clone().requires_grad_()
    logprob = hub.linear_logprob(found, w, target)
    logprob.backward(g)
    results = []
    for dtype in (torch.float32, torch.float64):
        x = h.to(dtype, copy=True).requires_grad_()
        exact = reference.linear_logprob(x, w.to(dtype), target)
        exact.backward(g.to(dtype))
        results.append((exact.detach(), x.grad))
    (eager, eager_grad), (exact, exact_grad) = results
    top = float((h @ w.T).abs().max())
    assert_accurate(logprob.detach(), eager, exact, max_logit=top)
    factor = float(g.abs().max() * w.abs().max())
    assert_accurate(found.grad, eager_grad, exact_grad, max_logit=top, gradient_factor=factor)
    with pytest.raises(TypeError, match="weight: got one that requires grad"):
        hub.linear_logprob(h, w.clone().requires_grad_(), target)


def agree(function, specification, leaves, constants):
    """Value and gradients, to fp32's rounding of sums this short."""
    results = []
    for call, dtype in ((function, torch.float32), (specification, torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        out = call(*inputs, *constants)
        weights = torch.linspace(-1, 2, out.numel(), dtype=dtype).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)])
    for found, exact in zip(*results, strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=4e-6 * exact.abs().max().item())


def test_the_other_functions(hub):
    generator = torch.Generator().manual_seed(1)
    cu_seqlens = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
    x = torch.randn(12, generator=generator)
    agree(hub.segment_sum, reference.segment_sum, [x], [cu_seqlens])
    hidden = torch.randn(12, 7, generator=generator)
    agree(hub.pool_last_k, reference.pool_last_k, [hidden], [cu_seqlens, 2])
    query, passages = torch.randn(5, 9, generator=generator), torch.randn(8, 9, generator=generator)
    target = torch.tensor([1, 0, 7, 3, 3])
    agree(
        lambda q, p, t: hub.info_nce(q, p, t, 0.1), lambda q, p, t: reference.info_nce(q, p, t, temperature=0.1),
        [query, passages], [target],
    )  # fmt: skip
    z, embedding = torch.randn(2, 3, 7, generator=generator), torch.randn(30, 7, generator=generator)
    ids, index = torch.randint(30, (12,), generator=generator), torch.tensor([1, 0, 1])
    # cu_seqlens of at least K rows each
    agree(
        lambda z: hub.splice(z, embedding, ids, cu_seqlens, index),
        lambda z: reference.splice(z, embedding.to(z.dtype), ids, cu_seqlens, z_index=index),
        [z], [],
    )  # fmt: skip
