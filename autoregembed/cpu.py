"""What a process sets before its first product on a CPU."""

from __future__ import annotations

import os

# A layer takes about a dozen, for its shapes in forward and backward; a pass takes those of one layer.
PRIMITIVES = 128


def bound_primitive_caches() -> None:
    """Keeps the memory of a process from growing with the number of different pack lengths.

    oneDNN, and torch's binding of it, each keep the code of a product for every shape: 1024 of them by default, about a
    megabyte each. torch takes oneDNN for bf16 where the processor multiplies it. Both read these variables at their
    first product; what the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PRIMITIVES))
