"""Compute kernels. Their source lives in the top-level `kernels/` folder.

An installed wheel carries them as subpackages of this one. From a plain checkout this package looks into
`<repo>/kernels` as well; `<repo>/CMakeLists.txt` tells a checkout from site-packages, where a sibling folder
`kernels` would be Hugging Face's package of that name.
"""

from pathlib import Path

_repo = Path(__file__).resolve().parents[2]
if (_repo / "CMakeLists.txt").is_file() and (_repo / "kernels").is_dir():
    __path__.append(str(_repo / "kernels"))
