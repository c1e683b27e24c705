"""`autoregembed export`: an encoder as a folder for sentence-transformers, centred or whitened if wanted."""

from __future__ import annotations

from rich.console import Console

from autoregembed.text_files import read_texts


def export_model(
    model: str,
    output: str,
    center: str | None = None,
    whiten: str | None = None,
    column: str | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
) -> None:
    """Writes MODEL, the model/ of a run or an export, as a folder for sentence-transformers.

    Args:
        model: the model/ folder of a training run, an export, or any causal LM.
        output: a new or empty folder.
        center: unlabelled texts whose mean is subtracted from every embedding: one text per line, or a file of rows.
        whiten: as center, and every direction also gets the same variance. Needs more texts than dimensions.
        column: the column to read in a file of rows; by default text.
        max_length: tokens of one text, including instruction and compress tokens; by default the model's own.
        dtype: dtype of the exported weights: fp32, bf16 or fp16; by default as they are.
    """
    from autoregembed.encoder import Encoder
    from autoregembed.export import EXPORT_DTYPES
    from autoregembed.files import require_writable_folder

    if center is not None and whiten is not None:
        raise ValueError(f"whiten: got {whiten!r} together with center, expected one of them; whiten centres too")
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(EXPORT_DTYPES)}")
    source = center if whiten is None else whiten
    if column is not None and source is None:
        raise ValueError(f"column: got {column!r}, expected None without center or whiten")
    texts = None if source is None else read_texts(source, column)
    require_writable_folder(output, "output")
    encoder = Encoder.from_pretrained(model)
    if texts is not None:
        encoder.center(texts, whiten=whiten is not None, max_length=max_length)
    folder = encoder.save_pretrained(output, max_length=max_length, dtype=EXPORT_DTYPES.get(dtype or ""))
    fitted = "" if texts is None else f", {'centred' if whiten is None else 'whitened'} on {len(texts)} texts"
    Console().print(f"{folder}{fitted}", highlight=False, markup=False, soft_wrap=True)
