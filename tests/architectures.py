"""Every causal LM for text in the installed Transformers, tiny and random: right in float64, or refused in words.

`pytest tests/architectures.py` runs the whole list, nightly; test_architectures.py runs a part of it in every run.
Right means: z of a pack is z of the plain model on each text alone, and scores are those of its full logits.
"""

import copy
import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from autoregembed import Decoder, Encoder
from autoregembed.modalities import reads_more_than_text, text_model
from autoregembed.models import base_model

K, COMPRESS, SUFFIX = 3, [317, 318, 319], [7, 8]
LENGTHS = (6, 2, 33, 2, 1, 14)  # across the windows, chunks and original lengths below
TOLERANCE = 2e-6  # relative: some norms, softmaxes and routers are in float32 whatever the model's dtype
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.2, "sliding_window": 4, "rotary_dim": 4,
    "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "d_model": 32, "n_heads": 4, "n_layers": 2,
    "ffn_dim": 64, "ffn_hidden_size": 64, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4,
    "encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "word_embed_proj_dim": 32,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "state_size": 4, "mamba_d_state": 4,
}  # fmt: skip
# What the sizes above do not make a valid config of. None: not set at all.
OPTIONS = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "cpmant": {"dim_ff": 64, "dim_head": 8, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "ctrl": {"dff": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "dots1": {"layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 4,
              "n_shared_experts": 1, "routed_scaling_factor": 1.0},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 320,
                     "activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [64, 64], "laurel_rank": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4, "num_heads": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 4},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": None, "d_inner": 64},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Of several parts (vision, audio, patches of bytes; some are in MULTIMODAL), or no config of its own.
EXCLUDED = {
    "blt", "cohere_compass_text", "dots3_note", "dots3_note_text", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4",
    "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "gemma4_unified_text", "git", "got_ocr2",
    "inkling2_loop_text", "inkling2_text", "llama4", "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody",
    "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen4_exp_text", "gemma4_text",
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16, "factor": 16.0}  # fmt: skip
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **SCALED}}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, llama3 rope": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", **SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "llama, longrope": ("llama", {"rope_parameters": LONGROPE}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phimoe, longrope": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}, "sliding_window": None,
         "original_max_position_embeddings": 16},
    ),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "gemma2, caps": ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
                                "final_logit_softcapping": 3.0}),
    "cohere, logit scale": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "granite, scales": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                                    "attention_multiplier": 0.3}),
    "gpt-neox, serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 16}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama4, chunks": ("llama4_text", {"attention_chunk_size": 8}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "deepseek_v32, sparse": ("deepseek_v32", {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}),
    "lfm2, attention only": ("lfm2", {"layer_types": ["full_attention"] * 2}),
    "granitemoehybrid, attention only": ("granitemoehybrid", {"layer_types": ["attention"] * 2}),
}  # fmt: skip
ARCHITECTURES = {
    **{name: (name, {}) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in EXCLUDED},
    **VARIANTS,
}
# Recurrent or convolutional, bidirectional, with ids beside embeddings, or with attention of their own.
ENCODERS_REFUSED = {
    "axk2", "bailing_hybrid", "bamba", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot",
    "blenderbot-small", "bloom", "camembert", "cpmant", "data2vec-text", "deepseek_v32", "deepseek_v32, sparse",
    "deepseek_v4", "doge", "electra", "ernie", "falcon_h1", "falcon_mamba", "glm_moe_dsa", "granitemoehybrid", "hy_v4",
    "inkling_text", "jamba", "kimi_linear", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "llama4, chunks", "mamba",
    "mamba2", "marian", "mbart", "megatron-bert", "minimax", "mpt", "mvp", "nemotron", "nemotron_h", "olmo_hybrid",
    "openai-gpt", "pegasus", "phimoe", "plbart", "prophetnet", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "recurrent_gemma", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv",
    "stablelm", "stablelm, parallel", "trocr", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xlstm",
    "xmod", "zamba", "zamba2", "zaya",
}  # fmt: skip
_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "embed_dim": 16,
                "out_hidden_size": 32, "num_position_embeddings": 16, "fullatt_block_indexes": [0],
                "deepstack_visual_indexes": [0]}  # fmt: skip
_QWEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
# Models that also read images: options of the text model and of the vision model.
MULTIMODAL = {
    "gemma3": ({}, _VISION),
    "gemma4": ({"global_head_dim": 8, "hidden_size_per_layer_input": 0}, {**_VISION, "head_dim": 8}),
    "gemma4, per-layer embeddings": (
        {"global_head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 320},
        {**_VISION, "head_dim": 8},
    ),
    "internvl": ({"model_type": "qwen2"}, _VISION),
    "llava": ({"model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"}),
    "mistral3": ({"model_type": "mistral"}, {**_VISION, "model_type": "pixtral"}),
    "qwen2_5_vl": (_QWEN, _QWEN_VISION),
    "qwen2_vl": (_QWEN, _QWEN_VISION),
    "qwen3_5, attention only": ({**_QWEN, "layer_types": ["full_attention"] * 2}, _QWEN_VISION),
    "qwen3_vl": (_QWEN, _QWEN_VISION),
}
NO_TEXT_MODEL = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl"}  # Transformers has no causal LM for their text part
DECODERS_REFUSED = {*ENCODERS_REFUSED, "dory", "gemma3n_text", "modernbert-decoder"}


@torch.no_grad()
def shaken(model):
    """With no weight left at the 0 or 1 that it began with."""
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny(name):
    """A seeded float64 model, every parameter (norms, biases, sinks too) away from where it starts."""
    model_type, options = ARCHITECTURES[name]
    default = CONFIG_MAPPING[model_type]()
    sizes = {field: value for field, value in SIZES.items() if hasattr(default, field)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kinds:  # each kind of layer once
        sizes["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    if "kv_lora_rank" in sizes:  # multi-head latent attention: as many keys as queries
        sizes["num_key_value_heads"] = 4
    options = {**OPTIONS.get(model_type, {}), **options}
    sizes |= options
    if "layer_types" in options:
        sizes["num_hidden_layers"] = len(options["layer_types"])
    while True:
        try:
            given = {k: v for k, v in sizes.items() if v is not None or k == "sliding_window"}
            config = AutoConfig.for_model(model_type, **given)
            break
        except AttributeError as error:  # a property, made of other fields
            found = re.search(r"property '(\w+)' .* has no setter", str(error))
            if found is None:
                raise
            del sizes["layer_types" if found[1] == "layers_block_type" else found[1]]
    config._experts_implementation = "eager"  # the grouped one has no float64
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=torch.float64).eval()
    return shaken(model)


def check_refusal(message):
    """It names the model or its part, the cause, and what would do instead."""
    assert re.match(r"(?s)model: got .*expected .", message), message
    assert "nan" not in message, message


def composite(name):
    """A seeded float64 model that also reads images."""
    text, vision = MULTIMODAL[name]
    default = CONFIG_MAPPING[name.split(",")[0]]()
    known = type(default.get_text_config())  # an instance raises for what differs by layer
    sizes = {field: value for field, value in SIZES.items() if hasattr(known, field)}
    config = type(default)(text_config={**sizes, **text}, vision_config=vision)
    for field, value in vars(config).items():  # ids of images and the like lie within the vocabulary
        if field.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= SIZES["vocab_size"]:
            setattr(config, field, 310)
    torch.manual_seed(0)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config, dtype=torch.float64).eval()
    return shaken(model)


def check(name):
    """An architecture for text alone."""
    plain = tiny(name)
    check_model(plain, plain, name in ENCODERS_REFUSED, name in DECODERS_REFUSED)


def check_multimodal(name):
    """Refused as it is; its text model is right by what the whole model makes of text."""
    whole = composite(name)
    for make in (lambda: Encoder(whole, compress_token_ids=COMPRESS), lambda: Decoder(whole)):
        with pytest.raises(ValueError, match=r"^model: got \w+, which reads more than text, expected its text part"):
            make()
    if name in NO_TEXT_MODEL:
        with pytest.raises(ValueError, match=r"^model: got \w+, which reads more than text, and whose \w+ is no"):
            text_model(whole)
        return
    text = text_model(copy.deepcopy(whole))
    assert len(list(text.parameters())) < len(list(whole.parameters()))
    assert not any(p.is_meta for p in (*text.parameters(), *text.buffers()))
    check_model(text, whole, False, "per-layer" in name)


def hidden_states(model, row):
    inner = model.model if reads_more_than_text(model) else base_model(model)
    return inner(input_ids=row, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def check_model(text, plain, encoder_refused, decoder_refused):
    """An encoder and a decoder of `text` against `plain` on each text alone."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS]
    width = plain.get_input_embeddings().weight.shape[1]
    z = torch.randn(len(texts), K, width, dtype=torch.float64, generator=generator)
    encoder = decoder = None
    try:
        encoder = Encoder(copy.deepcopy(text), compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=1)
    except ValueError as error:
        check_refusal(str(error))
    try:
        decoder = Decoder(copy.deepcopy(text), eos_token_id=2)
    except ValueError as error:
        check_refusal(str(error))
    assert (encoder is None) == encoder_refused
    assert (decoder is None) == decoder_refused
    if encoder is not None:
        for ids, found in zip(texts, encoder(texts), strict=True):
            alone = copy.deepcopy(plain)  # some ropes remember what they have read
            row = torch.tensor([[1, *ids, *SUFFIX, *COMPRESS]])
            expected = hidden_states(alone, row)[-K:]
            assert (found - expected).norm() < TOLERANCE * expected.norm()
    if decoder is not None:
        for pair, found in zip(zip(z, texts, strict=True), decoder.logprob(z, texts), strict=True):
            alone, (vectors, ids) = copy.deepcopy(plain), pair
            x = torch.cat([vectors, alone.get_input_embeddings()(torch.tensor(ids))])
            logits = alone(inputs_embeds=x[None], use_cache=False).logits[0, K - 1 :].double()
            expected = logits.log_softmax(-1).gather(1, torch.tensor([*ids, 2])[:, None]).sum()
            assert (found - expected).abs() < TOLERANCE * expected.abs()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_right_or_refused(name):
    check(name)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_model_of_several_modalities_is_right_or_refused(name):
    check_multimodal(name)
