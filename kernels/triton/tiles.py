"""The one table of tile sizes, by (kernel, part, bits of the dtype, D). Nothing tunes itself at run time.

`bench/sweep_tiles.py` measures candidates on a GPU and prints lines for this table. No line has been measured yet:
they come from the compiler's report (`python -m bench.compile_report`): no spills, shared memory within the part's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

__all__ = ["ARCHITECTURES", "METHODS", "TABLE", "Tile", "architecture", "has_ptx", "method", "pretend", "tile"]


class Tile(NamedTuple):
    rows: int  # rows of a block
    cols: int  # columns of a block (vocabulary, or D where a kernel only moves rows)
    depth: int = 0  # step of the reduction
    warps: int = 4
    stages: int = 1
    tma: bool = False  # loads through tensor descriptors where shapes allow
    programs: int = 1  # persistent programs per multiprocessor
    registers: int = 0  # of a thread, NVIDIA: lets ptxas have them all, where it would spill for a second block

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


# Names of parts, with the shared memory of one block in bytes. sm_86 stands for 8.6, 8.9 and 12.x.
ARCHITECTURES = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

SMALL = 1024  # D up to here; 0 below stands for any D

TABLE: dict[tuple[str, str, int, int], Tile] = {
    # streaming scorer: hidden · Wᵀ into sums of exponentials
    ("score", "sm_80", 16, 0): Tile(128, 128, 32, 8, 3),
    ("score", "sm_86", 16, 0): Tile(128, 128, 32, 8, 3),
    ("score", "sm_90", 16, 0): Tile(128, 256, 64, 8, 4, tma=True),
    ("score", "sm_100", 16, 0): Tile(128, 128, 64, 8, 4, tma=True),
    ("score", "gfx942", 16, 0): Tile(128, 128, 64, 8, 2),
    ("score", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    ("score_general", "any", 16, 0): Tile(64, 128, 32, 8, 2),
    ("score_general", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    # first GEMM of a gradient: e and its sums
    ("emit", "sm_80", 16, 0): Tile(128, 128, 32, 8, 3),
    ("emit", "sm_86", 16, 0): Tile(128, 128, 32, 8, 3),
    ("emit", "sm_90", 16, 0): Tile(128, 256, 64, 8, 3, tma=True),
    ("emit", "sm_100", 16, 0): Tile(128, 128, 64, 8, 4, tma=True),
    ("emit", "gfx942", 16, 0): Tile(128, 128, 64, 8, 2),
    ("emit", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    ("emit_general", "any", 16, 0): Tile(64, 128, 32, 8, 2),
    ("emit_general", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    # the same of cosines, which have norms, ids and a second sum
    ("emit_cosine", "sm_80", 16, 0): Tile(128, 64, 32, 8, 3, registers=255),
    ("emit_cosine", "sm_86", 16, 0): Tile(128, 64, 32, 8, 3, registers=255),
    ("emit_cosine", "sm_90", 16, 0): Tile(256, 128, 64, 8, 3, tma=True),  # more columns: more norms and ids a thread
    ("emit_cosine", "sm_100", 16, 0): Tile(128, 64, 64, 8, 4, tma=True),
    ("emit_cosine", "gfx942", 16, 0): Tile(128, 64, 64, 8, 2),
    ("emit_cosine", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    ("emit_cosine_general", "any", 16, 0): Tile(64, 64, 32, 8, 2),
    ("emit_cosine_moments", "sm_80", 16, 0): Tile(128, 64, 32, 8, 3, registers=255),
    ("emit_cosine_moments", "sm_86", 16, 0): Tile(128, 64, 32, 8, 3, registers=255),
    ("emit_cosine_moments", "sm_90", 16, 0): Tile(128, 128, 64, 8, 4, tma=True),
    ("emit_cosine_moments", "sm_100", 16, 0): Tile(128, 64, 64, 8, 4, tma=True, registers=255),
    ("emit_cosine_moments", "gfx942", 16, 0): Tile(128, 64, 64, 8, 2),
    ("emit_cosine_moments", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    ("emit_cosine_moments_general", "sm_100", 16, 0): Tile(64, 64, 32, 8, 2, registers=255),
    ("emit_cosine_moments_general", "any", 16, 0): Tile(64, 64, 32, 8, 2),
    ("emit_cosine_moments_general", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    ("emit_cosine_general", "any", 32, 0): Tile(64, 64, 16, 8, 2),
    # sums to log-probabilities; its product is for rows whose target is improbable beyond bf16's range
    ("finish", "any", 16, 0): Tile(64, 64, 32, 4, 2, registers=255),
    ("finish", "sm_100", 16, 0): Tile(64, 32, 32, 4, 2, registers=255),
    ("finish", "any", 32, 0): Tile(64, 32, 16, 8, 2, registers=255),
    ("finish_general", "any", 16, 0): Tile(64, 64, 32, 8, 2, registers=255),
    ("finish_general", "any", 32, 0): Tile(64, 32, 16, 8, 2, registers=255),
    # logits to onehot − softmax, one program a row; by the dtype of the logits
    ("epilogue", "any", 16, 0): Tile(1, 8192, warps=16, registers=128),
    ("epilogue", "any", 32, 0): Tile(1, 8192, warps=8, programs=2, registers=128),
    ("epilogue", "any", 64, 0): Tile(1, 2048, warps=16, registers=128),
    ("epilogue", "gfx942", 32, 0): Tile(1, 8192, warps=8, programs=2),
    ("epilogue_softcap", "any", 16, 0): Tile(1, 4096, warps=16, registers=128),
    ("epilogue_softcap", "any", 32, 0): Tile(1, 4096, warps=16, registers=128),
    ("epilogue_softcap", "any", 64, 0): Tile(1, 2048, warps=16, registers=128),
    ("epilogue_cosine", "any", 16, 0): Tile(1, 4096, warps=8, programs=2, registers=128),
    ("epilogue_cosine", "any", 32, 0): Tile(1, 2048, warps=8, programs=2, registers=128),
    ("epilogue_cosine", "any", 64, 0): Tile(1, 2048, warps=16, registers=128),
    ("segment_sum", "any", 0, 0): Tile(1, 1024),
    ("row_gradients", "any", 0, 0): Tile(128, 16),  # rows, and parts at a time
    # rows moved or scaled: cols is the step along D
    ("rows", "any", 0, 0): Tile(2, 1024, registers=255),
    ("alignment_loss", "any", 0, 0): Tile(1024, 1, warps=8, registers=255),
    ("unit", "any", 0, 0): Tile(1, 1, warps=8),
    # score_distillation: rows of the block, and the step along a row
    ("distillation_rows", "any", 0, 0): Tile(1, 1024, warps=4),
    ("distillation_columns", "any", 0, 0): Tile(32, 32, warps=4),
    # The interpreter's tiles are small, so that small tensors have several and a ragged last one.
    **{
        (kernel, "interpret", bits, 0): sizes
        for bits in (16, 32, 64)
        for kernel, sizes in {
            "score": Tile(16, 64, 32, tma=True),
            "score_general": Tile(16, 64, 16),
            "emit": Tile(16, 64, 32, tma=True),
            "emit_general": Tile(16, 64, 16),
            "emit_cosine": Tile(16, 64, 32, tma=True),
            "emit_cosine_general": Tile(16, 64, 16),
            "emit_cosine_moments": Tile(16, 64, 32, tma=True),
            "emit_cosine_moments_general": Tile(16, 64, 16),
            "finish": Tile(16, 32, 16),
            "finish_general": Tile(16, 32, 16),
            "epilogue": Tile(1, 128),
            "epilogue_softcap": Tile(1, 64),
            "epilogue_cosine": Tile(1, 128),
        }.items()
    },
    ("segment_sum", "interpret", 0, 0): Tile(1, 16),
    ("row_gradients", "interpret", 0, 0): Tile(8, 4),
    ("rows", "interpret", 0, 0): Tile(4, 16),
    ("alignment_loss", "interpret", 0, 0): Tile(32, 1),
    ("unit", "interpret", 0, 0): Tile(1, 1),
    ("distillation_rows", "interpret", 0, 0): Tile(2, 8),
    ("distillation_columns", "interpret", 0, 0): Tile(4, 8),
}

# How the gradient of a frozen head is formed where it has been measured: "shifted" or "cublas" (linear_logprob.py).
METHODS: dict[tuple[str, int, int], str] = {}

_override: str | None = None


@contextlib.contextmanager
def pretend(part: str) -> Iterator[None]:
    """Inside, every device counts as `part`: how kernels are compiled for other parts (bench/compile_report.py)."""
    global _override
    _override = part
    try:
        yield
    finally:
        _override = None


def architecture(device: torch.device) -> str:
    """The table's name of a device's part."""
    if _override is not None:
        return _override
    if device.type != "cuda":
        return "interpret"
    if torch.version.hip:
        return "gfx942"  # 64 KiB of shared memory a block on every part
    major, minor = torch.cuda.get_device_capability(device)
    return _CAPABILITIES.get((major, minor)) or _CAPABILITIES.get((major, 0)) or "sm_86"


_CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_86",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (12, 0): "sm_86",
}


def _bits(dtype: torch.dtype | None) -> int:
    return 0 if dtype is None else dtype.itemsize * 8


def tile(kernel: str, device: torch.device, dtype: torch.dtype | None = None, d: int = 0) -> Tile:
    part = architecture(device)
    for name in (part, "any"):
        for bucket in (SMALL, 0) if 0 < d <= SMALL else (0,):
            found = TABLE.get((kernel, name, _bits(dtype), bucket))
            if found is not None:
                return found._replace(registers=0) if part.startswith("gfx") else found
    raise NotImplementedError(f"no tile for kernel {kernel!r} on {part!r} in {dtype}; see kernels/triton/tiles.py")


def has_ptx(device: torch.device) -> bool:
    """Whether kernels may hold lines of PTX: not in the interpreter, not on AMD."""
    return architecture(device).startswith("sm_")


def method(device: torch.device, dtype: torch.dtype, d: int) -> str:
    part = architecture(device)
    found = METHODS.get((part, _bits(dtype), SMALL if d <= SMALL else 0))
    return found or ("shifted" if dtype == torch.bfloat16 and not part.startswith("gfx") else "cublas")
