"""A part of the list in architectures.py: one architecture of each kind."""

import pytest
from architectures import ARCHITECTURES, DECODERS_REFUSED, ENCODERS_REFUSED, MULTIMODAL, check, check_multimodal

FEW = [
    "llama, tied", "llama, yarn", "phi3, longrope", "phimoe, longrope", "mistral", "qwen3", "gemma2, caps",
    "gemma3_text", "gemma3n_text", "gpt_oss", "gpt2", "opt, norm behind", "falcon, alibi", "gpt_neo",
    "granite, scales", "deepseek_v3", "mixtral", "modernbert-decoder", "phimoe", "llama4, chunks", "bloom", "mamba",
]  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_an_architecture_is_right_or_refused(name):
    check(name)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_model_of_several_modalities_is_right_or_refused(name):
    check_multimodal(name)


def test_what_is_listed_as_refused_is_in_the_list():
    assert ENCODERS_REFUSED <= DECODERS_REFUSED <= set(ARCHITECTURES)
    assert len(ARCHITECTURES) - len(DECODERS_REFUSED) > 110
