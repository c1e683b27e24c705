"""A folder that plain `SentenceTransformer(path)` loads, without trusting any code.

The tail (instruction and compress tokens) is written into the tokenizer's post-processor, where truncation cannot reach
it. With one compress token, pooling takes the last token, which vLLM and TEI read as sentence-transformers does. With
more, WordWeights gives the compress tokens weight 1 and all others 0 and Pooling takes the weighted mean. vLLM and TEI
ignore weights of tokens, so that such a folder is written for them to refuse. Normalize makes a unit vector of it. A
centring is a Dense and a second Normalize behind it; such a folder is written for them to refuse too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from autoregembed.attention import rope_limit
from autoregembed.centering import Centering
from autoregembed.files import CheckpointError, atomic_folder, write_json
from autoregembed.model_card import Card, model_card
from autoregembed.models import RECIPE, RECIPE_VERSION, base_model, is_plain
from autoregembed.prompt import require_fast

if TYPE_CHECKING:  # Encoder.save_pretrained calls export
    from autoregembed.encoder import Encoder


# Attributes of config.json that Transformers and sentence-transformers keep and do not read. vLLM takes the
# second for a quantization and stops at one that it does not know, also after other libraries have saved the model.
COMPRESS_TOKENS = "compress_token_ids"
REFUSED = "compression_config"
REFUSAL = {"quant_method": "mean-of-compress-tokens-needs-sentence-transformers"}

CENTRED = {"quant_method": "centred-embeddings-need-sentence-transformers"}

EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merged(encoder: Encoder) -> Any:
    """A copy of the encoder's model on the CPU, with adapters merged and compress rows in its embedding matrix.

    Raises:
        ValueError: weights in 8 or 4 bits.
    """
    adapted = hasattr(encoder.model, "merge_and_unload")
    for name, parameter in encoder.model.named_parameters():
        if not is_plain(parameter) or not parameter.is_floating_point():
            raise ValueError(
                f"model: got quantised weights in {name}, expected plain ones, as merging would round them: put "
                "the adapter onto model.dequantize() (get_peft_model_state_dict, set_peft_model_state_dict)"
            )
    # On the CPU, and in fp32 where the base is in 16 bits: merging would round what the adapters have learnt.
    memo: dict[int, Any] = {id(encoder.tokenizer): encoder.tokenizer}
    for parameter in encoder.parameters():
        whole = torch.promote_types(parameter.dtype, torch.float32) if adapted else parameter.dtype
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", whole, copy=True), parameter.requires_grad)
    copied = copy.deepcopy(encoder, memo).cpu()
    if adapted:
        copied.model = copied.model.merge_and_unload()
    copied.fold_compress_rows()
    model = copied.model
    name_compress_tokens(model.config, None, None)
    return model


def name_compress_tokens(config: Any, ids: list[int] | None, centering: Centering | None) -> None:
    """Writes into a model's config which tokens are compressed ones, and what servers refuse; None: neither."""
    for name in (COMPRESS_TOKENS, REFUSED):  # of an earlier export
        vars(config).pop(name, None)
    if ids is not None:
        setattr(config, COMPRESS_TOKENS, ids)
        if len(ids) > 1 or centering is not None:
            setattr(config, REFUSED, REFUSAL if len(ids) > 1 else CENTRED)


def _tokenizer(encoder: Encoder, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer whose post-processor writes `bos · text · suffix · compress tokens`.

    It is of the generic class: some models' own classes write a post-processor anew when they are loaded.
    """
    tokenizer = encoder.tokenizer
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


def _recipe(encoder: Encoder, max_length: int, centering: Centering | None) -> dict[str, Any]:
    """`autoregembed.json`: what `Encoder.from_pretrained` and `Decoder.from_pretrained` need besides the model."""
    recipe = {name: value for name, value in encoder.recipe.items() if name != "centering"}
    return {
        "version": RECIPE_VERSION,
        **recipe,
        "compress_token_ids": encoder.compress_token_ids,
        "instruction": encoder.instruction,
        "suffix_ids": encoder.suffix_ids,
        "prompts": encoder.prompts,
        "bos_token_id": encoder.bos_token_id,
        "max_length": max_length,
        "lm_head": False,
        "adapter": None,  # it is in model/ alone
        **({} if centering is None else {"centering": centering.record}),
    }


def _pooling(model: Any, ids: list[int], centering: Centering | None) -> list[Any]:
    """The stock modules behind the transformer: normalize(mean over the tokens `ids`), which end every text."""
    from sentence_transformers.sentence_transformer import modules as stock

    width = model.config.get_text_config().hidden_size
    behind = [stock.Normalize()]
    if centering is not None:
        given = {"init_weight": centering.weight.clone(), "init_bias": centering.bias.clone()}
        behind += [stock.Dense(width, width, activation_function=torch.nn.Identity(), **given), stock.Normalize()]
    if len(ids) == 1:
        return [stock.Pooling(width, "lasttoken"), *behind]
    rows = model.get_input_embeddings().weight.shape[0]
    # One character a row of the vocabulary: names would make a megabyte of it, and of every printed model.
    vocabulary = "".join("1" if row in ids else "0" for row in range(rows))
    weights = stock.WordWeights(vocabulary, {"1": 1.0}, unknown_word_weight=0.0)
    return [weights, stock.Pooling(width, "mean"), *behind]


def _for_servers(folder: Path, max_length: int) -> None:
    """Rewrites what sentence-transformers has saved in the spelling that vLLM and TEI read, and it reads as well.

    Sources: vllm/transformers_utils/config.py (get_pooling_config, get_sentence_transformer_tokenizer_config);
    text-embeddings-inference, router/src/lib.rs (PoolConfig, STConfig), backends/src/lib.rs (ModuleType).
    """
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    alone = len(modules) == 3
    for module in modules:
        kind = module["type"].rsplit(".", 1)[1]
        module["type"] = f"sentence_transformers.models.{kind}"
        if kind == "Pooling" and module["path"] != "1_Pooling":
            (folder / module["path"]).rename(folder / "1_Pooling")
            module["path"] = "1_Pooling"
    write_json(folder / "modules.json", modules)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    # sentence-transformers reads `pooling_mode`; TEI the flags, and it refuses a folder where none is set.
    flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": alone}
    write_json(folder / "1_Pooling" / "config.json", {**pooling, **flags})
    settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    lengths = {"max_seq_length": max_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", {**settings, **lengths})


def _require_same(exported: Any, expected: torch.Tensor, texts: Sequence[str], dtypes: set[torch.dtype]) -> None:
    """Compares what the saved modules compute with what the encoder does, within the rounding of the coarser dtype."""
    found = exported.encode(list(texts), convert_to_tensor=True, show_progress_bar=False).float().cpu()
    distance = float((found - expected).norm(dim=-1).max())
    bound = 1e-3 + 32 * max(torch.finfo(dtype).eps for dtype in dtypes)
    if not distance <= bound:
        raise CheckpointError(
            f"folder: got embeddings at a distance of {distance:.1e} from the encoder's, expected at most {bound:.1e}"
        )


def export(
    encoder: Encoder,
    folder: str | Path,
    *,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: Card | None = None,
    centering: Centering | None = None,
) -> Path:
    """Writes `folder`, whole or not at all, for `SentenceTransformer(folder)` and `Encoder.from_pretrained(folder)`.

    `autoregembed.json` in the folder records compress tokens, suffix, and the original model, which is the decoder.
    Before the folder gets its name, it must embed two texts as the encoder does.

    Args:
        encoder: an encoder with a fast tokenizer; adapters are merged and compress rows folded in a copy of its model.
        folder: new or empty, unless `overwrite`.
        max_length: tokens of a text, including instruction and compress tokens; by default the encoder's own.
        dtype: dtype of the weights: float32, bfloat16 or float16; by default the encoder's own.
        card: what the model card, README.md, says about the training.
        centering: what follows the pooling; None: nothing, even if the encoder is centred.

    Raises:
        FileExistsError: `folder` is in use.
        CheckpointError: the saved tokenizer would give other ids, or the folder other embeddings.
        ValueError: a slow tokenizer; a `max_length` that leaves no room for text, is above the model's positions, or
            above the length up to which the rotary embedding is the same for all texts; a `dtype` that is none of the
            three or that a weight overflows; weights other than float32 together with centring.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as stock

    folder = Path(folder).expanduser()
    tokenizer = encoder.tokenizer
    require_fast(tokenizer)
    if dtype is not None and dtype not in EXPORT_DTYPES.values():
        raise ValueError(f"dtype: got {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
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
    given = dtype or encoder.model.get_input_embeddings().weight.dtype
    if centering is not None and given != torch.float32:
        raise ValueError(
            f"dtype: got {given} with a centring, expected torch.float32: sentence-transformers has the Dense layer in "
            "float32, which reads no other dtype"
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        whole = merged(encoder).eval().to("cpu")
        texts = ["The export reads what training read.", f"{tokenizer.eos_token or ''} It is checked. " * max_length]
        alone = type(encoder)(
            whole, compress_token_ids=encoder.compress_token_ids, suffix_ids=encoder.suffix_ids, tokenizer=tokenizer,
            bos_token_id=encoder.bos_token_id, max_length=max_length, attention="sdpa",
        )  # fmt: skip
        expected = alone.encode(texts) if centering is None else centering(alone.encode(texts))
        model = base_model(whole)
        dtypes = {model.get_input_embeddings().weight.dtype, dtype or torch.float32}
        if dtype is not None:
            _cast(model, dtype)
        ids = encoder.compress_token_ids
        name_compress_tokens(model.config, ids, centering)
        source = temporary / "source"
        model.save_pretrained(source)
        _tokenizer(encoder, max_length).save_pretrained(source)
        first = stock.Transformer(str(source), max_seq_length=max_length)
        sequences = alone.sequences(alone.tokenize(texts))
        found = first.tokenizer(texts, truncation=True)["input_ids"]
        if found != sequences:
            raise CheckpointError(f"tokenizer: got ids {found[0][:8]}… once saved, expected {sequences[0][:8]}…")
        exported = SentenceTransformer(
            modules=[first, *_pooling(model, ids, centering)], device="cpu", prompts=encoder.prompts or None
        )
        exported.save(str(temporary / "whole"), create_model_card=False)
        width = model.config.get_text_config().hidden_size
        del whole, alone, model, first, exported  # what is read again need not lie beside two copies
        for path in source.iterdir():
            path.unlink()
        source.rmdir()
        for path in (temporary / "whole").iterdir():
            path.rename(temporary / path.name)
        (temporary / "whole").rmdir()
        _for_servers(temporary, max_length)
        _require_same(SentenceTransformer(str(temporary), device="cpu"), expected, texts, dtypes)
        text = model_card(
            card or Card(), name=Path(folder).name, width=width,
            max_length=max_length, num_compress_tokens=encoder.num_compress_tokens, centred=centering is not None,
        )  # fmt: skip
        (temporary / "README.md").write_text(text, encoding="utf-8")
        write_json(temporary / RECIPE, _recipe(encoder, max_length, centering))
    return Path(folder)


def _cast(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    for name, parameter in model.named_parameters():
        require_representable(name, parameter, dtype)


def require_representable(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`; ValueError where a weight overflows it."""
    value = value.to(dtype)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"dtype: got {dtype}, which {name} overflows, expected torch.bfloat16 or torch.float32")
    return value
