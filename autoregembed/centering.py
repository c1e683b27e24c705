"""Embeddings about the mean of some texts, or whitened by them: normalize(W e + b), a stock `Dense` in an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from autoregembed.files import CheckpointError

_LEAST_VARIANCE = 1e-6  # of the largest: below it a direction is noise of rounding, which whitening would enlarge


@dataclass(frozen=True)
class Centering:
    """An affine map of embeddings of norm 1, normalised again behind it.

    Args:
        kind: "center" subtracts the mean; "whiten" then gives every direction the same variance.
        texts: how many it was fitted on.
        weight: (D, D) float32.
        bias: (D,) float32.
    """

    kind: str
    texts: int
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, embeddings: Tensor, *, whiten: bool = False) -> Centering:
        """Of (n, D) embeddings of norm 1, as `Encoder.encode` gives them without one.

        Raises:
            ValueError: fewer than two different texts, or no more texts than D to whiten with.
        """
        e = embeddings.double()
        n, d = e.shape
        least = d + 1 if whiten else 2
        if n < least:
            what = "one for each of the D dimensions and one more, to whiten" if whiten else "two texts"
            raise ValueError(f"texts: got {n}, expected at least {least}: {what}")
        mean = e.mean(0)
        values, vectors = torch.linalg.eigh((e - mean).T @ (e - mean) / n)
        if float(values[-1]) < 1e-12:
            raise ValueError(f"texts: got {n} with the same embedding, expected different texts")
        weight = torch.eye(d, dtype=torch.float64)
        if whiten:  # turned back, so that the dimensions stay what they are
            kept = values > _LEAST_VARIANCE * values[-1]
            weight = (vectors[:, kept] * values[kept].rsqrt()) @ vectors[:, kept].T
        return cls("whiten" if whiten else "center", n, weight.float(), -(weight @ mean).float())

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(n, D) of norm 1 to (n, D) of norm 1."""
        return F.normalize(F.linear(embeddings, self.weight.to(embeddings), self.bias.to(embeddings)), dim=-1)

    @property
    def record(self) -> dict[str, Any]:
        """What `autoregembed.json` says of it; the numbers are those of the Dense."""
        return {"kind": self.kind, "texts": self.texts}


def read_centering(source: str, recipe: Mapping[str, Any]) -> Centering | None:
    """The centring of an export, from its Dense; None of a folder without any.

    Raises:
        CheckpointError: the recipe names one, and the folder does not have it.
    """
    record = recipe.get("centering")
    if not record:
        return None
    try:
        modules = json.loads(Path(str(cached_file(source, "modules.json"))).read_text(encoding="utf-8"))
        (path,) = (module["path"] for module in modules if module["type"].endswith(".Dense"))
        found = load_file(str(cached_file(source, f"{path}/model.safetensors")))
        weight, bias = found["linear.weight"].float(), found["linear.bias"].float()
        if weight.shape != (len(bias), len(bias)) or record["kind"] not in ("center", "whiten"):
            raise ValueError(f"a {record['kind']!r} of {tuple(weight.shape)} and {tuple(bias.shape)}")
        return Centering(record["kind"], int(record["texts"]), weight, bias)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"model: got {source!r}, whose recipe names a centring, expected its Dense layer beside it: {error}"
        ) from error
