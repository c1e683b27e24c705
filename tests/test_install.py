"""The package as it is installed: what the wheel holds, what importing needs, whom it leaves alone."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from autoregembed import __version__

REPO = Path(__file__).resolve().parents[1]


def run(*arguments, cwd: Path, **environment) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AUTOREGEMBED_NATIVE")}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def copy_sources(folder: Path) -> Path:
    """Building writes beside the sources."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return Path(shutil.copytree(REPO, folder / "source", ignore=ignored))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    run(*pip, copy_sources(folder), cwd=folder, AUTOREGEMBED_NATIVE="0")
    (wheel,) = folder.glob("autoregembed-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_kernels_under_our_name_only(site):
    names = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    top = {n.split("/")[0] for n in names}
    assert {n for n in top if not n.endswith(".dist-info")} == {"autoregembed"}
    sources = {p.relative_to(REPO).as_posix() for p in (REPO / "kernels").rglob("*.py")}
    assert sources
    assert {f"autoregembed/{n}" for n in sources} <= names
    assert {p.relative_to(REPO).as_posix() for p in (REPO / "autoregembed").rglob("*.py")} <= names
    assert "autoregembed/py.typed" in names
    configs = {p.relative_to(REPO / "examples").as_posix() for p in (REPO / "examples" / "configs").rglob("*.yaml")}
    assert configs
    assert {f"autoregembed/{n}" for n in configs} <= names
    assert not any(n.endswith(".so") for n in names)


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    run("setup.py", "-q", "sdist", "-d", tmp_path, cwd=copy_sources(tmp_path))
    (archive,) = tmp_path.glob("autoregembed-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = [p for ending in ("py", "cpp", "h") for p in (REPO / "kernels").rglob(f"*.{ending}")]
    assert len(sources) > 10
    sources += (REPO / "examples" / "configs").rglob("*.yaml")
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", *(p.relative_to(REPO).as_posix() for p in sources)} <= names


BLOCK = """
import sys
for name in ("transformers", "triton", "datasets", "accelerate", "peft", "safetensors", "tokenizers", "scipy", "rich",
             "sentence_transformers", "jsonargparse", "yaml", "xxhash", "huggingface_hub"):
    sys.modules[name] = None
"""
ONLY_TORCH = f"""{BLOCK}
import torch, autoregembed
from autoregembed import alignment_loss, info_nce, linear_logprob
assert autoregembed.__file__.startswith(sys.argv[1]), autoregembed.__file__
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(5, 8, generator=generator, requires_grad=True)
weight, target = torch.randn(11, 8, generator=generator), torch.tensor([0, 3, 10, 5, 5])
found = linear_logprob(hidden, weight, target)
found.sum().backward()
expected = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None])[:, 0]
assert torch.allclose(found, expected, atol=1e-5)
assert hidden.grad.abs().max() > 0.1
scores = [torch.randn(3, generator=generator) for _ in range(3)]
assert alignment_loss(*scores, ref_margin="none").loss > 0
assert info_nce(hidden, hidden.detach() + 1) > 0
try:
    autoregembed.Encoder
except ModuleNotFoundError as error:
    assert "transformers" in str(error), error
else:
    raise AssertionError("the block does not work")
"""


def test_the_wheel_works_with_torch_alone(site, tmp_path):
    # site-packages/kernels beside it is Hugging Face's and not ours.
    beside = site / "kernels"
    beside.mkdir()
    try:
        (beside / "__init__.py").write_text("raise AssertionError('not ours to import')")
        run("-c", ONLY_TORCH, site, cwd=tmp_path, PYTHONPATH=str(site))
    finally:
        shutil.rmtree(beside)


def command(site, tmp_path, *arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    """The installed command where torch is the only package, NumPy included."""
    code = (
        f"{BLOCK}sys.modules['numpy'] = None\nimport importlib.metadata as metadata\n"
        # Everything but torch is missing for pip, too.
        "version = metadata.version\n"
        "def only_torch(name):\n    if name in ('torch', 'autoregembed'): return version(name)\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = only_torch\n"
        f"sys.argv = ['autoregembed', *{arguments!r}]\n"
        f"from autoregembed.__main__ import main\nassert main() == {status}"
    )
    result = run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert "Traceback" not in result.stderr
    assert "NumPy" not in result.stderr
    return result


def test_help_doctor_and_version_run_on_torch_alone(site, tmp_path):
    line = 'pip install "accelerate>='
    printed = command(site, tmp_path, "doctor").stdout
    assert "impl=torch" in printed
    assert line in printed
    printed = command(site, tmp_path, "--help").stdout
    assert "train CONFIG.yaml" in printed
    assert line in printed
    found = command(site, tmp_path, "--version")
    assert (found.stdout, found.stderr) == (f"autoregembed {__version__}\n", "")


@pytest.mark.parametrize("name", ["train", "bench", "init"])
def test_every_other_command_says_what_to_install(name, site, tmp_path):
    """The line installs the extra without touching torch; pip itself reads every requirement of it."""
    from packaging.requirements import Requirement

    line = next(x for x in command(site, tmp_path, name, status=2).stderr.splitlines() if "pip install" in x)
    found = {Requirement(r).name for r in shlex.split(line)[2:]}
    assert {"jsonargparse", "transformers", "pyyaml", "sentence-transformers"} <= found
    assert not {"torch", "pytest", "mkdocs-material"} & found


def test_a_checkout_works_with_torch_alone_and_does_not_shadow_hugging_faces_kernels(tmp_path):
    """In the repository's root `kernels/` is a namespace package at best, which a regular one beats anywhere."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("who = 'Hugging Face'")
    code = f"{ONLY_TORCH}\nimport kernels\nassert kernels.who == 'Hugging Face'"
    run("-c", code, REPO, cwd=REPO, PYTHONPATH=os.pathsep.join([str(REPO), str(tmp_path)]))
    assert not (REPO / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("tool", ["no cmake", "no compiler"])
def test_a_missing_tool_does_not_break_the_installation(tool, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    if tool == "no compiler":
        (programs / "cmake").write_text("#!/bin/sh\necho 'No CMAKE_CXX_COMPILER could be found.' >&2\nexit 1\n")
        (programs / "cmake").chmod(0o755)
    source = copy_sources(tmp_path)
    setup = ("setup.py", "build", "--build-base", tmp_path / "out")
    assert "the native module was not built" in run(*setup, cwd=source, PATH=str(programs)).stdout
    assert list((tmp_path / "out").rglob("autoregembed/__init__.py"))
    assert not list(tmp_path.rglob("*.so"))
    with pytest.raises(AssertionError, match="cmake"):
        run(*setup, cwd=source, PATH=str(programs), AUTOREGEMBED_NATIVE="1")
