"""bench/gpu.sh: it needs torch, Triton and pytest alone, and a failure loses nothing but its own line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from autoregembed.bench import gpu

ROOT = Path(__file__).parents[1]
QUICK = {unit.name for unit in gpu.plan("first", True)}
SHAPE = " ".join(map(str, gpu.HEAD_QUICK[0]))

# Site packages of torch, Triton and pytest; nothing else that is installed here is found.
BARE = '''
import importlib.machinery, sys
ALLOWED = """torch torchgen functorch triton sympy mpmath networkx jinja2 markupsafe filelock fsspec typing_extensions
setuptools pkg_resources pytest _pytest py pluggy iniconfig packaging pygments {more}""".split()

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        place = str(spec and (spec.origin or spec.submodule_search_locations))
        return None if "site-packages" in place and name.partition(".")[0] not in ALLOWED else spec

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
'''


def run(*arguments: str, tree: Path = ROOT, path: Path | None = None, **environment: str):
    """Exit status and lines by unit, once the script has ended; `path` is a folder before all others on the path."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT", "WHEELS")}
    variables |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(path or ""),
        **environment,
    }
    done = subprocess.run(
        [str(tree / "bench" / "gpu.sh"), *arguments], capture_output=True, text=True, env=variables, timeout=300
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines, done.stderr
    assert lines[-1]["unit"] == "summary"
    assert lines[-1]["status"] == done.returncode
    return done.returncode, {line["unit"]: line for line in lines if line["state"] != "finding"}, lines


def copy_of_the_tree(folder: Path) -> Path:
    for name in ("autoregembed", "bench", "kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.so"))
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    return folder


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def first_contact(folder, *options):
    """`first` where torch, Triton and pytest alone are installed, and NumPy, which Triton's interpreter needs."""
    (folder / "sitecustomize.py").write_text(BARE.format(more="numpy"))
    out = folder / "out"
    status, found, lines = run("first", "--quick", "--limit", "280", *options, path=folder, OUT=str(out))
    assert status == 0, [line for line in lines if line["state"] == "failed"]
    assert (out / "gpu-first.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines]
    parts = [line["part"] for line in lines[:-1]]
    assert parts == sorted(parts, key=gpu.PARTS.index)
    assert found["device/rates"]["impl"] == "triton"
    done = [f"peers/linear_logprob {SHAPE} {peer}" for peer in ("autoregembed", "eager", "compiled chunked")]
    skipped = {name for name, line in found.items() if line["state"] == "skipped"}
    assert skipped <= {name for name in QUICK if name.startswith(("step/", "peers/"))} - set(done)
    absent = ("is not installed", "No module named", "has no chunked linear_cross_entropy")
    assert all(any(words in found[name]["reason"] for words in absent) for name in skipped)
    for name in done:
        assert found[name]["median_ms"] > 0
        assert 0 < found[name]["gradient_error"] < 1e-4
    return found.keys() - {"summary"}


def test_first_contact_where_torch_triton_and_pytest_alone_are_installed(tmp_path):
    """Without the tests of kernels, which this run has itself, and the peers that are torch's own."""
    left_out = ("tests/gpu", "linear_cross_entropy", "info_nce eager")
    units = [name for name in QUICK if not any(words in name for words in left_out)]
    assert first_contact(tmp_path, *(x for name in units for x in ("--only", name))) == set(units)


def test_without_numpy_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE.format(more=""))
    status, found, _ = run("first", "--quick", "--part", "device", "--part", "head", "--part", "ops", path=tmp_path)
    assert status == 0
    assert found["device/rates"]["impl"] == "torch"
    done = {name for name, line in found.items() if line["state"] == "ok"}
    assert {f"head/method={gpu.METHODS[0]} {SHAPE}", "head/score " + SHAPE, *(f"ops/{op}" for op in gpu.OPS)} <= done


def test_planted_failures_lose_their_own_lines(tmp_path):
    """Ops that raise, kill their process and hang, a wrong kernel, a failing test, and a peer that aborts."""
    tree = copy_of_the_tree(tmp_path / "tree")
    kernels, uncut = tree / "kernels" / "torch", "\n\n\ndef _forward("
    for op, body in (("info_nce", "raise RuntimeError('planted')"), ("splice", "__import__('os').abort()")):
        replace(kernels / f"{op}.py", "\ndef forward(", f"\ndef forward(*_):\n    {body}{uncut}")
    wrong = "logprob, u = _forward(*a)\n    return logprob, u.neg()"
    replace(kernels / "linear_logprob.py", "\ndef forward(", f"\ndef forward(*a):\n    {wrong}{uncut}")
    replace(
        tree / "bench" / "bench_segment_sum.py", "    job = Forw", "    __import__('time').sleep(1000)\n    job = Forw"
    )
    replace(tree / "bench" / "gpu.py", '{"first": 45,', '{"first": 12,')
    (tree / "tests" / "test_testing.py").write_text(
        "def test_planted():\n    assert 1 == 2\n\n\ndef test_sound():\n    pass\n"
    )
    peer = tmp_path / "path" / "cut_cross_entropy"
    peer.mkdir(parents=True)
    (peer / "__init__.py").write_text("import os\ndef linear_cross_entropy(*a, **k):\n    os.abort()\n")
    (peer.parent / "sitecustomize.py").write_text(BARE.format(more="cut_cross_entropy"))
    wanted = [f"head/method={gpu.METHODS[0]}", "ops/", f"{SHAPE} cut-cross-entropy", "compiled", "tests/testing"]
    only = [part for name in wanted for part in ("--only", name)]
    status, found, lines = run("first", "--quick", *only, tree=tree, path=peer.parent)
    failures = {
        name: line["failure"] for name, line in found.items() if line["state"] == "failed" and "failure" in line
    }
    assert failures.pop(f"head/method={gpu.METHODS[0]} {SHAPE}").startswith("AssertionError: error ")
    aborted = "its process ended by signal SIGABRT"
    assert failures == {
        "ops/info_nce": "RuntimeError: planted",
        "ops/splice": aborted,
        "ops/segment_sum": "took too long and was ended",
        f"peers/linear_logprob {SHAPE} cut-cross-entropy": aborted,
        "tests/testing": "pytest answered 1",
    }
    assert "planted" in found["ops/info_nce"]["at"]
    assert status == 2 + 4 + 16 + 32
    for name in ("device/rates", "ops/alignment_loss", "ops/pool_last_k"):
        assert found[name]["state"] == "ok"
    assert found[f"peers/linear_logprob {SHAPE} compiled chunked"]["state"] == "ok"
    planted = [line for line in lines if line["state"] == "finding"]
    assert ["test_planted" in line["test"] for line in planted] == [True]
    assert "assert 1 == 2" in planted[0]["failure"]
    assert found["tests/testing"]["passed"] == 1


def test_no_time_and_no_gpu_are_said(tmp_path):
    status, found, _ = run("first", "--quick", "--limit", "1")
    assert status == 0
    assert {line["state"] for name, line in found.items() if name != "summary"} <= {"left out", "skipped"}
    assert "device/rates" in found["summary"]["left out"]
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and not shutil.which("nvidia-smi"):
        status, found, _ = run("first", "--out", str(tmp_path / "x.jsonl"))
        assert status == 1
        assert "no GPU found" in found["device/rates"]["failure"]
        assert {line["state"] for line in found.values()} == {"failed", "left out", "skipped"}
        assert len(found) == len(gpu.plan("first", False)) + 1


def test_wheels_are_put_on_the_path_without_their_dependencies(tmp_path):
    """Also into a Python that is itself an environment, as this one is; a wheel that does not fit is named."""
    wheels, package = tmp_path / "wheels", tmp_path / "package" / "memeff"
    wheels.mkdir()
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    info = tmp_path / "package" / "memeff-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memeff\nVersion: 9.9\nRequires-Dist: torch>=99\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("memeff/__init__.py,,\nmemeff-9.9.dist-info/METADATA,,\n"
                                 "memeff-9.9.dist-info/WHEEL,,\nmemeff-9.9.dist-info/RECORD,,\n")  # fmt: skip
    shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path / "package")
    (tmp_path / "made.zip").rename(wheels / "memeff-9.9-py3-none-any.whl")
    (wheels / "other-1.0-cp27-cp27m-win32.whl").write_text("")
    status, found, _ = run("first", "--quick", "--part", "device", WHEELS=str(wheels))
    assert status == 0
    assert found["device/rates"]["versions"]["memeff"] == "9.9"
