"""Models whose weights come later, or never: built from config.json, on the meta device."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., None])

_place: contextvars.ContextVar[Any] = contextvars.ContextVar("autoregembed_place_of_empty_weights", default=None)


@contextlib.contextmanager
def without_values(place: Any, layers: int | None = None) -> Iterator[None]:
    """Inside, models are built from their config inside the context manager `place`, and no value of one is read.

    What checks values (finite weights, packs against single texts) passes; whoever fills the weights calls it then.

    Args:
        place: torch.device("meta"), say; entered anew for every model.
        layers: how many of a model's layers are built; None: all.
    """
    token = _place.set((place, layers))
    try:
        yield
    finally:
        _place.reset(token)


def absent() -> bool:
    """Whether the weights of the models at hand have no values (yet)."""
    return _place.get() is not None


def reads_values(check: F) -> F:
    """A check of a model's values, made without gradients, and not at all where there are none."""

    @functools.wraps(check)
    def run(*args: Any, **kwargs: Any) -> None:
        if not absent():
            with torch.no_grad():
                check(*args, **kwargs)

    return run  # type: ignore[return-value]


def empty_model(loader: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """The causal LM (or base model) of `source` as its config alone describes it.

    Args:
        loader: AutoModelForCausalLM or AutoModel.
        options: `trust_remote_code` and `gguf_file`, as for `from_pretrained`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, **options)
    place, layers = _place.get()
    if layers is not None:
        _cut(config.get_text_config(), layers)
    with place:
        model = loader.from_config(config, dtype=dtype, trust_remote_code=options.get("trust_remote_code", False))
    return model.eval()


def _cut(config: Any, layers: int) -> None:
    """Leaves the first layers, and of every list with an entry a layer as many entries."""
    before, config.num_hidden_layers = config.num_hidden_layers, layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:layers])
