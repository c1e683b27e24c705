"""Benchmarks. Their source lives in the top-level `bench/` folder; an installed wheel carries it as this package.

From a checkout this package looks into `<repo>/bench`, as `autoregembed.kernels` does for `kernels/`.
"""

from pathlib import Path

_repo = Path(__file__).resolve().parents[2]
if (_repo / "CMakeLists.txt").is_file() and (_repo / "bench").is_dir():
    __path__.append(str(_repo / "bench"))
