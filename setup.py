"""Packages are listed by hand: the top-level folder `kernels/` must not be installed under that name.

It would shadow Hugging Face's package `kernels`, which Transformers imports. Its subfolders are installed as
`autoregembed.kernels.*`.

The native module is built when CMake and a C++ compiler are there. AUTOREGEMBED_NATIVE=1 makes a failed build an error,
AUTOREGEMBED_NATIVE=0 skips it; otherwise the installation goes on without it, says so, and leaves the reason in
`autoregembed/_native.txt` for `autoregembed doctor`, since pip shows no output of a build that succeeds.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("AUTOREGEMBED_NATIVE", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"AUTOREGEMBED_NATIVE: got {MODE!r}, expected 0, 1 and auto")


class BuildFailed(Exception):
    pass


def _run(*command):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be run: {error.strerror}") from error
    print(done.stdout)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [i for i, line in enumerate(lines) if "error" in line.lower()] or [len(lines) - 1]
        raise BuildFailed(f"{' '.join(command[:2])} failed: {' '.join(lines[errors[0] : errors[0] + 3])[:400]}")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        reports = [target.with_name("_native.txt")]
        if getattr(self, "editable_mode", False):
            reports.append(ROOT / "autoregembed" / "_native.txt")
        for report in reports:
            report.unlink(missing_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        output = [f"-DAUTOREGEMBED_OUTPUT={target.parent}", f"-DAUTOREGEMBED_FILE={target.name}"]
        python = f"-DPython_EXECUTABLE={sys.executable}"
        try:
            _run("cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", python, *output)
            _run("cmake", "--build", str(build), "--config", "Release", "--parallel", str(os.cpu_count() or 1))
        except BuildFailed as error:
            if MODE == "1":
                raise SystemExit(f"AUTOREGEMBED_NATIVE=1, but the native module was not built: {error}") from error
            print(f"autoregembed: the native module was not built ({error}); everything else works without it")
            for report in reports:
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text(f"not built: {error}\n", encoding="utf-8")


setup(
    packages=[
        "autoregembed",
        "autoregembed.bench",
        "autoregembed.bench.baselines",
        "autoregembed.configs",
        "autoregembed.integrations",
        "autoregembed.kernels",
        "autoregembed.kernels.native",
        "autoregembed.kernels.torch",
        "autoregembed.kernels.triton",
        "autoregembed.ops",
    ],
    package_dir={
        "autoregembed.bench": "bench",
        "autoregembed.bench.baselines": "bench/baselines",
        "autoregembed.configs": "examples/configs",  # what `autoregembed init` copies
        "autoregembed.kernels.native": "kernels/native",
        "autoregembed.kernels.torch": "kernels/torch",
        "autoregembed.kernels.triton": "kernels/triton",
    },
    package_data={"autoregembed": ["py.typed"], "autoregembed.configs": ["*/*.yaml"]},
    ext_modules=[] if MODE == "0" else [Extension("autoregembed._native", sources=[], optional=MODE != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
