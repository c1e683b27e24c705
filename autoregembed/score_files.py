"""Files of log-probabilities that belong to certain data, a model and a tokenizer, and say so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoregembed.files import CheckpointError, atomic_file, tensor_fingerprint
from autoregembed.tables import require_cache


class ScoresMismatch(CheckpointError):
    """Scores on disk belong to other data, another model or another tokenizer."""


def cached_path(kind: str, fingerprint: Mapping[str, str]) -> Path:
    """Where scores of a fingerprint are kept: in the cache of `datasets`."""
    short = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:16]
    return require_cache() / "autoregembed" / f"{kind}-{short}.safetensors"


def save_scores(path: Path, scores: Mapping[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    """Writes tensors with the fingerprint of what they depend on, and a checksum."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scores = {name: x.contiguous() for name, x in scores.items()}
    with atomic_file(path) as temporary:
        save_file(scores, temporary, metadata={**fingerprint, "checksum": tensor_fingerprint(scores)})


def load_scores(
    path: Path, fingerprint: Mapping[str, str], names: Iterable[str], what: str = "scores"
) -> dict[str, Tensor]:
    """Reads what `save_scores` wrote; `what` names it in errors.

    Raises:
        ScoresMismatch: the scores belong to something else; both fingerprints are shown.
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            checksum = found.pop("checksum", None)
            if found != fingerprint:
                raise ScoresMismatch(
                    f"{what}: got scores of {found} in {str(path)!r}, expected those of {fingerprint}; delete the file "
                    "to recompute them"
                )
            scores = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{what}: got a damaged file {str(path)!r}: {error}") from error
    if tensor_fingerprint(scores) != checksum:
        raise CheckpointError(f"{what}: got a damaged file {str(path)!r}: its scores have another checksum")
    return scores
