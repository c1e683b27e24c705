"""Packages are listed by hand: the top-level folder `kernels/` must not be installed under that name.

It would shadow Hugging Face's package `kernels`, which Transformers imports. Its subfolders are installed as
`autoregembed.kernels.*`.

The native module is built when CMake and a C++ compiler are there. AUTOREGEMBED_NATIVE=1 makes a failed build an error,
AUTOREGEMBED_NATIVE=0 skips it; otherwise a failure is one line and the installation goes on without it.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODE = os.environ.get("AUTOREGEMBED_NATIVE", "auto")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        try:
            configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
            output = [f"-DPython_EXECUTABLE={sys.executable}", f"-DAUTOREGEMBED_OUTPUT={target.parent}"]
            subprocess.run([*configure, *output, f"-DAUTOREGEMBED_FILE={target.name}"], check=True)
            subprocess.run(["cmake", "--build", str(build), "--config", "Release"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if MODE == "1":
                raise
            print(f"autoregembed: the native module was not built ({error}); everything else works without it")


setup(
    packages=[
        "autoregembed",
        "autoregembed.bench",
        "autoregembed.bench.peers",
        "autoregembed.integrations",
        "autoregembed.kernels",
        "autoregembed.kernels.torch",
    ],
    package_dir={
        "autoregembed.bench": "bench",
        "autoregembed.bench.peers": "bench/peers",
        "autoregembed.kernels.torch": "kernels/torch",
    },
    ext_modules=[] if MODE == "0" else [Extension("autoregembed._native", sources=[], optional=MODE != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
