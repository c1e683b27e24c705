"""The meta device as a GPU without values: what a step launches, copies and waits for there."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoregembed.kernels.triton import primitives, tiles

INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class _Lists(TorchFunctionMode):
    """Python's own sequences that become tensors on the device, or index one: no dispatch mode sees that copy."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            if out.device.type == "meta" and out.ndim and not isinstance(args[0], torch.Tensor):
                self.found.append(f"{func.__name__} of {tuple(out.shape)} from the host")
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type == "meta":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += [f"{func.__name__} by a list of {len(x)}" for x in index if isinstance(x, (list, range))]
        return out


class BlockingCopies(TorchDispatchMode):
    """Copies of values from the host, of more than one number, that wait until the device has them."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._lists = _Lists(self.found)

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        source: Any = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and isinstance(source, torch.Tensor):
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if source.device.type == "cpu" and out.device.type == "meta" and source.ndim and waits:
                self.found.append(f"{func} of {tuple(source.shape)}")
        if func in INDEXING and source.device.type == "meta":  # the index is copied inside
            index = [x for x in args[1] if x is not None and x.device.type == "cpu" and x.ndim]
            self.found += [f"{func} by {tuple(x.shape)} on the host" for x in index]
        return out


@pytest.fixture
def device():
    """The meta device as a GPU: the ops take the Triton backend and run their bodies; launches are recorded."""
    definitions = torch._library.custom_ops.OPDEFS
    # Checks of values are nodes of their own: Triton's kernels check on the device.
    bodies = [body for name, body in definitions.items() if name.startswith("autoregembed::") and "require" not in name]
    assert len(bodies) >= 14
    launched = []
    with contextlib.ExitStack() as stack:
        for body in bodies:
            stack.enter_context(mock.patch.object(body, "_abstract_fn", body._init_fn))
        stack.enter_context(mock.patch("autoregembed.ops._dispatch._state_of_triton", return_value="ok"))
        # Autocast does not know the meta device.
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))
        stack.enter_context(mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()))
        stack.enter_context(tiles.pretend("sm_90"))
        stack.enter_context(primitives.recording(lambda kernel, *_: launched.append(kernel.__name__)))
        yield launched
