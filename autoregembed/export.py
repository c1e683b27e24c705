"""A folder that plain `SentenceTransformer(path)` loads, without trusting any code.

The tail (instruction and compress tokens) is written into the tokenizer's post-processor, where truncation cannot reach
it. Pooling: WordWeights gives the compress tokens weight 1 and all others 0, Pooling takes the weighted mean, Normalize
makes it a unit vector; together they are normalize(mean_k z).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from autoregembed.attention import rope_limit
from autoregembed.files import CheckpointError, atomic_folder, write_json
from autoregembed.model_card import Card, model_card
from autoregembed.models import RECIPE, RECIPE_VERSION, base_model, is_plain

if TYPE_CHECKING:  # Encoder.save_pretrained calls export
    from autoregembed.encoder import Encoder


def merged(encoder: Encoder) -> Any:
    """A copy of the encoder's model with adapters merged and compress rows in its embedding matrix.

    Raises:
        ValueError: weights in 8 or 4 bits.
    """
    for name, parameter in encoder.model.named_parameters():
        if not is_plain(parameter) or not parameter.is_floating_point():
            raise ValueError(
                f"model: got quantised weights in {name}, expected plain ones, as merging would round them: put "
                "the adapter onto model.dequantize() (get_peft_model_state_dict, set_peft_model_state_dict)"
            )
    copied = copy.deepcopy(encoder, {id(encoder.tokenizer): encoder.tokenizer})
    copied.fold_compress_rows()
    model = copied.model.merge_and_unload() if hasattr(copied.model, "merge_and_unload") else copied.model
    return model


def _tokenizer(encoder: Encoder, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer whose post-processor writes `bos · text · suffix · compress tokens`.

    It is of the generic class: some models' own classes write a post-processor anew when they are loaded.
    """
    tokenizer = encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, expected a fast tokenizer")
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    head = [] if encoder.bos_token_id is None else [encoder.bos_token_id]
    tail = [*encoder.suffix_ids, *encoder.compress_token_ids]
    # A template item may stand for several ids; its strings are names only and need not be in the vocabulary.
    specials = [("<head>", head), ("<tail>", tail)]
    backend.post_processor = TemplateProcessing(
        single=f"{'<head> ' if head else ''}$A <tail>",
        pair=f"{'<head> ' if head else ''}$A $B <tail>",
        special_tokens=[{"id": n, "ids": ids, "tokens": [f"{n[:-1]}{i}>" for i in ids]} for n, ids in specials if ids],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=tokenizer.unk_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0),
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
    )


def _recipe(encoder: Encoder, max_length: int) -> dict[str, Any]:
    """`autoregembed.json`: what `Encoder.from_pretrained` and `Decoder.from_pretrained` need besides the model."""
    return {
        "version": RECIPE_VERSION,
        **encoder.recipe,
        "compress_token_ids": encoder.compress_token_ids,
        "instruction": encoder.instruction,
        "suffix_ids": encoder.suffix_ids,
        "bos_token_id": encoder.bos_token_id,
        "max_length": max_length,
        "lm_head": False,
    }


def export(
    encoder: Encoder,
    folder: str | Path,
    *,
    max_length: int | None = None,
    overwrite: bool = False,
    card: Card | None = None,
) -> Path:
    """Writes `folder`, whole or not at all, for `SentenceTransformer(folder)` and `Encoder.from_pretrained(folder)`.

    `autoregembed.json` lies beside the model: compress tokens, suffix, and the original model that the decoder is.

    Args:
        encoder: with its fast tokenizer; adapters are merged and compress rows folded in a copy of its model.
        folder: new or empty, unless `overwrite`.
        max_length: tokens of a text with instruction and compress tokens; by default the encoder's own.
        card: what README.md, the model card, says of the training.

    Raises:
        FileExistsError: `folder` is in use.
        CheckpointError: the tokenizer cannot be saved so that it gives the same ids.
        ValueError: a slow tokenizer, or a `max_length` that leaves no room for text, is above the model's positions, or
            above the length up to which its rope is the same for all texts.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as stock

    tokenizer = encoder.tokenizer
    max_length = encoder.fit_max_length(max_length)
    fixed = len(encoder.sequences([[]])[0])
    if max_length <= fixed:
        raise ValueError(f"max_length: got {max_length}, expected more than {fixed}, the tokens around a text")
    limit = rope_limit(encoder.model)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"max_length: got {max_length}, expected at most {limit}: sentence-transformers rotates all texts of a "
            "batch by the length of the longest (longrope, dynamic NTK), which makes no difference up to there"
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        model = base_model(merged(encoder)).eval()
        source = temporary / "source"
        model.save_pretrained(source)
        _tokenizer(encoder, max_length).save_pretrained(source)
        rows = model.get_input_embeddings().weight.shape[0]
        compress = {f"<{i}>": 1.0 for i in encoder.compress_token_ids}
        modules = [
            stock.Transformer(str(source), max_seq_length=max_length),
            stock.WordWeights([f"<{i}>" for i in range(rows)], compress, unknown_word_weight=0.0),
            stock.Pooling(model.config.get_text_config().hidden_size, "mean"),
            stock.Normalize(),
        ]
        text = f"{tokenizer.eos_token or ''} The export reads what training read. " * max_length
        found = modules[0].tokenizer(text, truncation=True)["input_ids"]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        expected = encoder.sequences([ids[: max_length - fixed]])[0]
        if found != expected:
            raise CheckpointError(f"tokenizer: got ids {found[:8]}… once saved, expected {expected[:8]}…")
        SentenceTransformer(modules=modules, device="cpu").save(str(temporary / "whole"), create_model_card=False)
        for path in source.iterdir():
            path.unlink()
        source.rmdir()
        for path in (temporary / "whole").iterdir():
            path.rename(temporary / path.name)
        (temporary / "whole").rmdir()
        text = model_card(
            card or Card(), name=Path(folder).name, width=model.config.get_text_config().hidden_size,
            max_length=max_length, num_compress_tokens=encoder.num_compress_tokens,
        )  # fmt: skip
        (temporary / "README.md").write_text(text, encoding="utf-8")
        write_json(temporary / RECIPE, _recipe(encoder, max_length))
    return Path(folder)
