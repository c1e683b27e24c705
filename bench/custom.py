"""A kernel from outside beside ours: `autoregembed bench --baseline module:function --shape N,D,V`.

The function is imported with the current folder on the path and called as `OPS` says. It is checked against float64
like every baseline, so a wrong one is named and not timed.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .bench_info_nce import info_nce_case
from .bench_linear_logprob import linear_logprob_case
from .harness import GEMM_ONLY, Case, training_dtype

# By op: letters of the shape, and how the function is called.
OPS = {
    "linear_logprob": ("N,D,V", "function(hidden (N, D), weight (V, D), target (N,)) -> log-probabilities (N,)"),
    "info_nce": (
        "B,P,D",
        "function(query (B, D), passages (P, D)) -> loss () at 0.05; positive i is query i's",
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"baseline: got {name!r}, expected module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"baseline: got {name!r}, which cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"baseline: got {name!r}, a {type(found).__name__}, expected a function")
    return found


def sizes(op: str, shape: str | None) -> list[int]:
    """The numbers of "512,576,49152"."""
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected {' or '.join(OPS)}")
    letters = OPS[op][0]
    parts = (shape or "").split(",")
    if len(parts) != len(letters.split(",")) or not all(p.strip().isdecimal() and int(p) for p in parts):
        raise ValueError(f"shape: got {shape!r}, expected {letters}, such as 512,576,49152")
    return [int(p) for p in parts]


def case(baseline: str, op: str, shape: str | None, dtype: str | None, device: str) -> Callable[[], Case]:
    """The case of one op at one shape with our backends, eager, the bare GEMMs and the given function."""
    extra, numbers = {baseline: load(baseline)}, sizes(op, shape)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected {', '.join(DTYPES)}")
    chosen = training_dtype(device) if dtype is None else DTYPES[dtype]
    if op == "linear_logprob":
        n, d, v = numbers
        only = {GEMM_ONLY, "eager"}
        return partial(linear_logprob_case, n, d, v, "gradient", device, chosen, only=only, extra=extra)
    b, p, d = numbers
    if p < b:
        raise ValueError(f"shape: got B={b}, P={p}, expected at least one passage for each query")
    return partial(info_nce_case, b, d, device, passages=p, dtype=chosen, extra=extra)
