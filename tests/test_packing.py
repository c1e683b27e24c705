import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed.attention import attention_backends, run_packed
from autoregembed.models import base_model
from autoregembed.packing import check_ids, pack
from autoregembed.probe import use_packed_attention, verify_length
from autoregembed.testing import tiny_model

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(lengths)
@settings(max_examples=30, deadline=None)
def test_pack_sorts_by_length_and_says_where_everything_went(sizes):
    sequences = [[10 * i + j for j in range(n)] for i, n in enumerate(sizes)]
    packed = pack(sequences)
    order, rank, cu = packed.sort_index.tolist(), packed.unsort_index.tolist(), packed.cu_seqlens.tolist()
    assert packed.cu_seqlens.dtype == torch.int32
    assert sorted(order) == list(range(len(sizes)))
    assert [order[r] for r in rank] == list(range(len(sizes)))
    found = [packed.ids[cu[r] : cu[r + 1]].tolist() for r in rank]
    assert found == sequences
    assert packed.position_ids.tolist() == [j for i in order for j in range(sizes[i])]
    assert [sizes[i] for i in order] == sorted(sizes)
    assert packed.max_length == max(sizes)
    assert cu[-1] == sum(sizes) == len(packed.ids)
    equal = [(sizes[i], i) for i in order]
    assert equal == sorted(equal), "equal lengths keep the caller's order"


@pytest.mark.parametrize(("sequences", "message"), [([], "got none"), ([[1], []], "empty one at 1")])
def test_pack_refuses_what_has_no_tokens(sequences, message):
    with pytest.raises(ValueError, match=rf"^sequences: .*{message}"):
        pack(sequences)


def test_check_ids_names_the_place():
    with pytest.raises(IndexError, match=r"^mine: got id 7 in sequence 1, expected 0\.\.6"):
        check_ids("mine", [[0, 6], [7]], 7)
    with pytest.raises(IndexError, match="got id -1 in sequence 0"):
        check_ids("mine", [[-1, 9]], 7)
    with pytest.raises(ValueError, match="empty sequence at 1"):
        check_ids("mine", [[1], []], 7)


ATTENTIONS = {
    "grouped-query": ("llama", {}),
    "sliding window": ("mistral", {"sliding_window": 4}),
    "softcap": ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 3, "layer_types": ["full_attention"] * 2}),
    "softcap, sliding window": ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 3}),
}


def attention_model(name):
    architecture, options = ATTENTIONS[name]
    if architecture == "gemma2":
        options = {"query_pre_attn_scalar": 8, **options}
    return tiny_model(architecture, dtype=torch.float64, **options)


def texts(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in sizes]


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_a_pack_gives_what_each_text_gives_alone(name):
    model = attention_model(name)
    sequences = texts(7, 3, 12, 3, 1, 7)
    alone = [base_model(model)(input_ids=torch.tensor([s])).last_hidden_state[0] for s in sequences]
    assert use_packed_attention(model) == "sdpa"
    packed = pack(sequences)
    hidden = run_packed(base_model(model), packed, input_ids=packed.ids[None])
    # Transformers' eager softmax, which models with a softcap take, is in float32 even for float64 models.
    tolerance = 1e-5 if "softcap" in name else 1e-10
    for rank, expected in zip(packed.unsort_index.tolist(), alone, strict=True):
        rows = slice(int(packed.cu_seqlens[rank]), int(packed.cu_seqlens[rank + 1]))
        torch.testing.assert_close(hidden[rows], expected, rtol=0, atol=tolerance)


def test_the_window_and_the_softcap_of_these_models_matter():
    packed = pack(texts(12))
    outputs = []
    for architecture, options in [*ATTENTIONS.values(), ("mistral", {"sliding_window": None}), ("gemma2", {})]:
        model = tiny_model(architecture, dtype=torch.float64, **options)
        use_packed_attention(model)
        with torch.no_grad():
            outputs.append(run_packed(base_model(model), packed, input_ids=packed.ids[None]))
    _, windowed, capped, capped_windowed, unwindowed, uncapped = outputs
    for a, b in ((windowed, unwindowed), (capped, capped_windowed), (capped_windowed, uncapped)):
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_unpacked_calls_of_the_model_stay_right(name):
    # float32: in float64 Transformers' eager attention gives NaN for rows that see nothing but padding.
    before = attention_model(name).float()
    after = copy.deepcopy(before)
    use_packed_attention(after)
    ids = torch.tensor(texts(9, 9))
    right = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    for mask in (None, right, right.flip(1)):
        a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (before, after))
        rows = torch.ones_like(right).bool() if mask is None else mask.bool()
        torch.testing.assert_close(b[rows], a[rows], rtol=0, atol=2e-5)
    options = {"attention_mask": right.flip(1), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(before.generate(ids, **options), after.generate(ids, **options))


def test_gradients_flow_through_the_pack_as_through_each_text_alone():
    model = attention_model("softcap, sliding window")
    sequences = texts(5, 9, 5)
    upstream = torch.randn(19, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    packed = pack(sequences)
    use_packed_attention(model)
    (run_packed(base_model(model), packed, input_ids=packed.ids[None]) * upstream).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = attention_model("softcap, sliding window")
    for i, s in enumerate(sequences):
        rank = int(packed.unsort_index[i])
        rows = upstream[packed.cu_seqlens[rank] : packed.cu_seqlens[rank + 1]]
        (base_model(alone)(input_ids=torch.tensor([s])).last_hidden_state[0] * rows).sum().backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max())


def test_an_explicit_backend_that_cannot_run_says_why():
    model = tiny_model()
    for backend in ("varlen", "flash_attention_2"):
        with pytest.raises(ValueError, match=rf"^attention: got '{backend}'.*needs CUDA and 16 bits"):
            use_packed_attention(model, backend)
    with pytest.raises(ValueError, match=r"^attention: got 'spda', expected 'auto', .*'sdpa'"):
        use_packed_attention(model, "spda")
    assert model.config._attn_implementation == "sdpa"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"got cpu and torch\.bfloat16"):
        use_packed_attention(model, "varlen")
    backends = attention_backends(torch.device("cuda"), torch.float32)
    assert backends["sdpa"] == "ok"
    assert "torch.float32" in backends["varlen"]


REFUSED = (
    r"^model: got \w+, (whose hidden states (in a pack are not|depend on later)"
    r"|which cannot read a pack of texts .*cu_seq_lens_q).*expected one with causal attention"
)


def test_the_rounding_of_autocast_is_no_leak_between_texts_and_a_leak_is_one_still():
    with torch.autocast("cpu", torch.bfloat16):
        assert use_packed_attention(tiny_model(initializer_range=0.3)) == "sdpa"
        with pytest.raises(ValueError, match=REFUSED):
            use_packed_attention(tiny_model("stablelm"))


@pytest.mark.parametrize("architecture", ["bloom", "mpt", "stablelm", "nemotron", "bert"])
def test_models_that_would_mix_the_texts_of_a_pack_are_refused_and_left_as_they_were(architecture):
    model = tiny_model(architecture)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=REFUSED):
        use_packed_attention(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"layers of type \['Conv1d', 'Lfm2ShortConv', 'conv'\]"),
        ("mamba", {}, "layers of type .*MambaMixer"),
        ("falcon_h1", {}, "layers of type"),
    ],
)
def test_recurrent_and_convolutional_layers_are_refused(architecture, options, message):
    with pytest.raises(ValueError, match=rf"^model: got .*{message}"):
        use_packed_attention(tiny_model(architecture, **options))


@torch.no_grad()
def test_attention_sinks_count_in_packed_and_in_plain_calls():
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
    plain, model = (tiny_model("gpt_oss", **options) for _ in range(2))
    for lm in (plain, model):
        for layer in lm.model.layers:
            layer.self_attn.sinks += 2
    assert use_packed_attention(model) == "sdpa"
    ids = torch.tensor(texts(9, 9))
    wanted = base_model(plain)(input_ids=ids).last_hidden_state
    packed = pack(ids.tolist())
    for found in (base_model(model)(input_ids=ids).last_hidden_state,
                  run_packed(base_model(model), packed, input_ids=packed.ids[None]).unflatten(0, (2, 9))):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [5.0] * 4,
            "original_max_position_embeddings": 16, "factor": 16.0}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": LONGROPE},
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
        {"architecture": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4,
         "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                             "full_attention": LONGROPE}},
    ],
    ids=["longrope", "dynamic", "a rope for each type of layer"],
)  # fmt: skip
@torch.no_grad()
def test_a_text_is_rotated_by_its_own_length(options):
    plain = tiny_model(dtype=torch.float64, **{"architecture": "llama", **options})
    sequences = texts(3, 40, 16, 17, 25, 3, 40)
    alone = [base_model(copy.deepcopy(plain))(input_ids=torch.tensor([s])).last_hidden_state[0] for s in sequences]
    other = base_model(copy.deepcopy(plain))(input_ids=torch.tensor([sequences[0] * 7])).last_hidden_state[0, :3]
    assert (other - alone[0]).abs().max() > 1e-3, "a longer text does rotate its first tokens otherwise"
    use_packed_attention(plain)
    model = copy.deepcopy(plain)
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [0], [1, 0], [3, 4]):  # what was read before does not matter either
        packed = pack([sequences[i] for i in chosen])
        hidden = run_packed(base_model(model), packed, input_ids=packed.ids[None])
        for rank, i in zip(packed.unsort_index.tolist(), chosen, strict=True):
            rows = slice(int(packed.cu_seqlens[rank]), int(packed.cu_seqlens[rank + 1]))
            torch.testing.assert_close(hidden[rows], alone[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["bloom", "openai-gpt", "stablelm", "bert"])
@pytest.mark.parametrize(
    ("dtype", "size"),  # float16 cannot hold what attention adds at 1e-5
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 0.02)],
)
def test_a_leak_is_found_however_small_the_weights_are(architecture, dtype, size):
    with pytest.raises(ValueError, match=REFUSED):
        use_packed_attention(tiny_model(architecture, initializer_range=size, dtype=dtype))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0])
def test_no_leak_is_seen_where_none_is(architecture, dtype, size):
    assert use_packed_attention(tiny_model(architecture, initializer_range=size, dtype=dtype)) == "sdpa"


def forget_the_window(model):
    """Its masks know of the window, its attention is not told."""
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    return model


def test_a_window_that_attention_is_not_told_of_is_found_where_texts_reach_it():
    options = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    make = lambda: forget_the_window(tiny_model("gemma3_text", **options))  # noqa: E731
    message = r"^model: got Gemma3ForCausalLM, whose .* in texts longer than 16 tokens .*texts of at most 16$"
    with pytest.raises(ValueError, match=message):
        use_packed_attention(make())
    model = make()
    use_packed_attention(model, length=16)
    assert verify_length(model, 16, 8) == 16
    with pytest.raises(ValueError, match=message):
        verify_length(model, 17, 16)
    with pytest.raises(ValueError, match=r"^max_length: got a text of 40 tokens for a sharded model.*at most 16"):
        verify_length(model, 40, 16, sharded=True)
    right = tiny_model("gemma3_text", **options)
    use_packed_attention(right, length=16)
    assert verify_length(right, 40, 16) == 40


def test_models_in_training_mode_stay_in_it():
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    use_packed_attention(model)
    assert model.training
    assert model.transformer.h[1].mlp.training
    assert not model.transformer.h[0].training
