import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregembed import Decoder, Encoder, alignment_loss, info_nce
from autoregembed.adapters import add_lora
from autoregembed.bench import harness
from autoregembed.encoder import text_embedding
from autoregembed.models import base_model
from autoregembed.testing import tiny_model

K = 3
COMPRESS = [317, 318, 319]
SUFFIX = [7, 8]
MODELS = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                          "sliding_window": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral, sliding window": ("mistral", {"sliding_window": 4}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt2, learned positions": ("gpt2", {}),
    "phi, head with a bias": ("phi", {}),
    "cohere, logit scale": ("cohere", {"logit_scale": 0.25}),
    "granite, logits scaling": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
}  # fmt: skip
BOS = {"gpt-neox": None, "gpt2, learned positions": None, "qwen2": None}
# Transformers computes some norms, rotations and softmaxes in float32 even for float64 models.
TOLERANCE = {"gemma2": 2e-5}


def model_of(name: str, **options):
    architecture, own = MODELS[name]
    return tiny_model(architecture, dtype=torch.float64, **{**own, **options})


def encoder_of(name: str, **options) -> Encoder:
    fixed = {"compress_token_ids": COMPRESS, "suffix_ids": SUFFIX, "bos_token_id": BOS.get(name, 1)}
    return Encoder(model_of(name), **{**fixed, **options})


def texts(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in sizes]


def some_z(b, seed=0):
    return torch.randn(b, K, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_z(model, name, ids, suffix=SUFFIX):
    """The K last states of the plain model, which reads one text and nothing else."""
    head = [] if BOS.get(name, 1) is None else [1]
    row = torch.tensor([[*head, *ids, *suffix, *COMPRESS]])
    return base_model(model)(input_ids=row).last_hidden_state[0, -K:]


def plain_logprob(model, z, target, eos=2, bos=()):
    """Full logits of the plain model, one pair at a time."""
    embedding = model.get_input_embeddings()
    inputs = torch.cat([embedding(torch.tensor(bos, dtype=torch.int64)), z, embedding(torch.tensor(target))])
    logprob = model(inputs_embeds=inputs[None]).logits[0, len(bos) + K - 1 :].double().log_softmax(-1)
    return logprob.gather(1, torch.tensor([*target, eos])[:, None]).sum()


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_z_is_that_of_the_plain_model_run_on_each_text_alone(name):
    ids = texts(6, 2, 13, 2, 1)
    plain = model_of(name)
    expected = torch.stack([plain_z(plain, name, t) for t in ids])
    z = encoder_of(name)(ids)
    assert z.dtype == torch.float64
    close(z, expected, TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scores_are_those_of_full_logits(name):
    targets, z = texts(5, 1, 9, 5, seed=1), some_z(4)
    plain = model_of(name)
    expected = torch.stack([plain_logprob(plain, *pair) for pair in zip(z, targets, strict=True)])
    decoder = Decoder(model_of(name))
    scores = decoder.logprob(z, targets)
    assert scores.dtype == torch.float64
    close(scores, expected, TOLERANCE.get(name, 1e-10))
    assert decoder.num_tokens(targets) == 24


# RMS norms round gradients to float32 even in float64 models: here each pair's, there the sum of all pairs of one z.
@pytest.mark.parametrize(("share_prefixes", "rounding"), [(False, 1e-10), (True, 1e-6)])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_z_is_that_of_full_logits(name, share_prefixes, rounding):
    targets, z_index, upstream = texts(4, 7, 2, 4, seed=1), [1, 0, 1, 1], torch.tensor([1.0, -2.0, 0.5, 3.0])
    z = some_z(2).requires_grad_()
    plain = model_of(name).requires_grad_(False)
    loop = torch.stack([plain_logprob(plain, z[i], t) for i, t in zip(z_index, targets, strict=True)])
    (expected,) = torch.autograd.grad(loop @ upstream.double(), z)
    decoder = Decoder(model_of(name), share_prefixes=share_prefixes)
    (found,) = torch.autograd.grad(decoder.logprob(z, targets, z_index) @ upstream.double(), z)
    assert expected.abs().min(-1).values.max() > 0
    close(found, expected, TOLERANCE.get(name, rounding) * max(1.0, float(expected.abs().max())))
    assert all(not p.requires_grad and p.grad is None for p in decoder.parameters())


@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)))
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_neither_order_nor_batch_size_matters(order, cuts):
    ids, suffixes, targets = texts(3, 8, 3, 1, 12, 5), texts(1, 2, 3, 1, 2, 3, seed=4), texts(2, 2, 9, 1, 4, 7, seed=5)
    encoder, decoder = SHARED["encoder"], SHARED["decoder"]
    z = encoder(ids, suffixes)
    scores = decoder.logprob(z, targets)
    for part in torch.tensor(order).tensor_split(sorted(cuts)):
        places = part.tolist()
        again = encoder([ids[i] for i in places], [suffixes[i] for i in places])
        close(again, z[part])
        close(decoder.logprob(again, [targets[i] for i in places]), scores[part])
        close(decoder.logprob(z, [targets[i] for i in places], places), scores[part])


SHARED = {"encoder": encoder_of("mistral, sliding window"), "decoder": Decoder(model_of("gemma2"))}


@torch.no_grad()
def test_one_z_scored_against_many_targets_equals_each_alone():
    decoder, z, targets = Decoder(model_of("llama, tied")), some_z(2), texts(5, 5, 1, 8, 3, seed=2)
    z_index = torch.tensor([1, 1, 0, 1, 1])
    together = decoder.logprob(z, targets, z_index)
    alone = [decoder.logprob(z[i : i + 1], [t]) for i, t in zip(z_index.tolist(), targets, strict=True)]
    close(together, torch.cat(alone))
    assert decoder.logprob(z, [], []).shape == (0,)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_the_plain_model_on_either_side_gives_the_same_z(side):
    """The released code masks `ids != pad`, reads the last columns and so needs one side; here no side exists."""
    ids = texts(6, 2, 9)
    encoder, plain = encoder_of("llama, tied"), model_of("llama, tied")
    rows = encoder.sequences(ids)
    width = max(map(len, rows))
    z = encoder(ids)
    for row, found in zip(rows, z, strict=True):
        pad = width - len(row)
        front, back = (pad, 0) if side == "left" else (0, pad)
        inputs = torch.tensor([[2] * front + row + [2] * back])
        mask = torch.tensor([[0] * front + [1] * len(row) + [0] * back])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = base_model(plain)(input_ids=inputs, attention_mask=mask, position_ids=positions).last_hidden_state
        # Rotary positions are relative, computed in float32.
        close(found, hidden[0, width - back - K : width - back], 1e-6)


@torch.no_grad()
def test_texts_and_targets_that_hold_eos_bos_or_compress_ids_are_read_like_any_other():
    name = "llama, tied"
    ids = [[5, 2, 2, 6], [1, 318, 9, 319], [2]]
    plain = model_of(name)
    close(encoder_of(name)(ids), torch.stack([plain_z(plain, name, t) for t in ids]))
    z = some_z(3)
    expected = torch.stack([plain_logprob(plain, *pair) for pair in zip(z, ids, strict=True)])
    close(Decoder(model_of(name)).logprob(z, ids), expected)
    twin = encoder_of(name)([[5, 9, 2, 6]])
    assert (twin - encoder_of(name)(ids[:1])).abs().max() > 1e-3


@torch.no_grad()
def test_every_text_may_have_its_own_suffix():
    name = "llama, tied"
    ids, suffixes = texts(4, 2), [[9], [10, 11, 12]]
    plain = model_of(name)
    expected = torch.stack([plain_z(plain, name, *pair) for pair in zip(ids, suffixes, strict=True)])
    close(encoder_of(name)(ids, suffixes), expected)


# ----------------------------------------------------------------------------------------------------------------------
# z_norm


@pytest.mark.parametrize("name", ["llama, tied", "gemma3"])
def test_match_gives_z_the_rms_of_the_decoders_input_embeddings(name):
    decoder, z = Decoder(model_of(name), z_norm="match_rms"), 50 * some_z(4)
    read = model_of(name).get_input_embeddings()(torch.arange(320))
    found = decoder.rescale(z)
    close(found.square().mean(-1).sqrt(), read.square().mean().sqrt().expand(4, K), 1e-6)
    cosine = torch.nn.functional.cosine_similarity(found, z, dim=-1)
    close(cosine, torch.ones_like(cosine))
    assert torch.equal(Decoder(model_of(name)).rescale(z), z)


def test_match_has_the_right_gradient():
    name = "llama, tied"
    decoder, targets, z = Decoder(model_of(name), z_norm="match_rms"), texts(4, 2), (20 * some_z(2)).requires_grad_()
    rms = decoder.input_rms.double()
    plain = model_of(name).requires_grad_(False)
    scaled = z / z.square().mean(-1, keepdim=True).sqrt() * rms
    loop = torch.stack([plain_logprob(plain, *pair) for pair in zip(scaled, targets, strict=True)])
    (expected,) = torch.autograd.grad(loop.sum(), z)
    (found,) = torch.autograd.grad(decoder.logprob(z, targets).sum(), z)
    close(found, expected, 1e-9)
    along = (found * z).sum(-1).abs().max()
    assert along < 1e-7 * (found.norm() * z.norm()), "the length of z is immaterial"
    assert torch.autograd.gradcheck(decoder.rescale, (20 * some_z(1)).requires_grad_())


def test_match_survives_a_z_of_zeros():
    decoder, z = Decoder(model_of("llama, tied"), z_norm="match_rms"), torch.zeros(1, K, 32, dtype=torch.float64)
    score = decoder.logprob(z.requires_grad_(), texts(3))
    score.sum().backward()
    assert score.isfinite().all()
    assert z.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Other ways to train


@pytest.mark.parametrize("name", ["llama, tied", "gemma3", "gemma2"])
def test_own_compress_rows_give_the_same_z_and_fold_into_the_matrix(name):
    ids, tolerance = texts(4, 2, 7), TOLERANCE.get(name, 1e-10)
    encoder = encoder_of(name, own_compress_rows=True)
    close(encoder(ids).detach(), encoder_of(name)(ids).detach(), tolerance)
    with torch.no_grad():
        encoder.compress_rows += 0.3
    moved = encoder(ids)
    assert (moved - encoder_of(name)(ids)).abs().max() > 1e-2
    moved.sum().backward()
    assert encoder.compress_rows.grad.abs().min(1).values.max() > 0
    encoder.fold_compress_rows()
    folded = Encoder(encoder.model, compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=BOS.get(name, 1))
    close(folded(ids), moved, tolerance)


def test_own_compress_rows_have_the_gradient_of_the_rows_in_the_matrix():
    ids, upstream = texts(4, 2, 4), some_z(3)
    own, inside = encoder_of("gemma3", own_compress_rows=True), encoder_of("gemma3")
    (own(ids) * upstream).sum().backward()
    (inside(ids) * upstream).sum().backward()
    matrix = inside.model.get_input_embeddings().weight.grad
    close(own.compress_rows.grad, matrix[COMPRESS])
    assert matrix[COMPRESS].abs().max() > 1e-3


def test_a_peft_model_is_encoded_with_its_adapters():
    from peft import LoraConfig, get_peft_model

    ids = texts(4, 9)
    config = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices={"embed_tokens": COMPRESS})
    wrapped = get_peft_model(model_of("llama, tied"), config)
    encoder = Encoder(wrapped, compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=1)
    close(encoder(ids), encoder_of("llama, tied")(ids))
    with torch.no_grad():
        for _, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1
    adapted = encoder(ids)
    adapted.sum().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if n in trained)
    assert any("token_adapter" in n for n in trained)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    plain = torch.stack([plain_z(merged, "llama, tied", t) for t in ids])
    close(adapted, plain)
    assert (adapted - encoder_of("llama, tied")(ids)).abs().max() > 1e-2


def test_gradient_checkpointing_gives_equal_gradients():
    ids, upstream = texts(4, 9, 4), some_z(3)
    gradients = []
    for checkpointing in (False, True):
        encoder = encoder_of("llama, tied").train()
        if checkpointing:
            encoder.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (encoder(ids) * upstream).sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name in plain:
        close(recomputed[name], plain[name])
    assert min(g.abs().max() for g in plain.values()) > 1e-6


def test_bfloat16_runs_on_a_cpu_and_is_near():
    ids, targets = texts(6, 2, 9), texts(3, 7, 1, seed=1)
    encoder = Encoder(
        tiny_model("llama", dtype=torch.bfloat16), compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=1
    )
    decoder = Decoder(tiny_model("llama", dtype=torch.bfloat16), z_norm="match_rms")
    z = encoder(ids)
    assert z.dtype == torch.bfloat16
    scores = decoder.logprob(z, targets)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert encoder.model.get_input_embeddings().weight.grad.abs().max() > 0
    exact_model = tiny_model("llama", dtype=torch.bfloat16).double()
    exact = Encoder(exact_model, compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=1)(ids)
    assert (z - exact).norm() < 0.03 * exact.norm()


def test_the_base_model_without_a_head_will_do_for_the_encoder():
    ids, model = texts(4, 2), model_of("llama, untied")
    found = Encoder(model.model, compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=1)(ids)
    close(found, encoder_of("llama, untied")(ids))


# ----------------------------------------------------------------------------------------------------------------------
# Lengths


def test_lengths_default_to_what_the_model_has_positions_for():
    encoder = encoder_of("llama, tied")
    assert encoder.fit_max_length() == 256
    assert encoder.fit_max_length(256) == 256
    with pytest.raises(ValueError, match=r"^max_length: got 257, expected at most 256"):
        encoder.fit_max_length(257)
    decoder = Decoder(model_of("llama, tied"))
    assert decoder.fit_max_target_length(K) == 253
    with pytest.raises(ValueError, match=r"^max_target_length: got 254, expected at most 253"):
        decoder.fit_max_target_length(K, 254)
    long = Encoder(tiny_model(max_position_embeddings=4096), compress_token_ids=COMPRESS)
    assert long.fit_max_length() == 512
    assert long.fit_max_length(4096) == 4096


@torch.no_grad()
def test_the_longest_text_and_target_fit_and_one_more_token_does_not():
    encoder, decoder = encoder_of("gpt2, learned positions"), Decoder(model_of("gpt2, learned positions"))
    room = 256 - len(SUFFIX) - K
    assert encoder(texts(room, 2)).isfinite().all()
    with pytest.raises(ValueError, match=r"^ids: got a text of 257 tokens.*expected 256"):
        encoder(texts(2, room + 1))
    assert decoder.logprob(some_z(1), texts(decoder.fit_max_target_length(K))).isfinite().all()
    with pytest.raises(ValueError, match=r"^targets: got one of 257 positions.*expected 256"):
        decoder.logprob(some_z(2), texts(2, 254))


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("ids", "suffixes", "error", "message"),
    [
        ([], None, ValueError, "ids: got no text"),
        ([[5], []], None, ValueError, "ids: got an empty sequence at 1"),
        ([[5], [6, 320]], None, IndexError, r"ids: got id 320 in sequence 1, expected 0\.\.319"),
        ([[-1]], None, IndexError, "ids: got id -1"),
        ([[5], [6]], [[7]], ValueError, "suffix_ids: got 1, expected one for each of the 2 texts"),
        ([[5]], [[320]], IndexError, "suffix_ids: got id 320"),
    ],
)
def test_encoder_refuses(ids, suffixes, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        encoder_of("llama, tied")(ids, suffixes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compress_token_ids": [320]}, IndexError, "compress_token_ids: got id 320"),
        ({"compress_token_ids": []}, ValueError, "compress_token_ids: got an empty"),
        ({"compress_token_ids": [4, 4]}, ValueError, r"compress_token_ids: got \[4, 4\]"),
        ({"suffix_ids": [-3]}, IndexError, "suffix_ids: got id -3"),
        ({"bos_token_id": 999}, IndexError, "bos_token_id: got id 999"),
        ({"attention": "varlen"}, ValueError, "attention: got 'varlen'"),
    ],
)
def test_encoder_construction_refuses(options, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        encoder_of("llama, tied", **options)


@pytest.mark.parametrize(
    ("z", "targets", "z_index", "error", "message"),
    [
        (some_z(1)[0], [[5]], None, ValueError, r"z: got shape \(3, 32\), expected \(B, K, D\)"),
        (some_z(1)[..., :31], [[5]], None, ValueError, r"z: got shape \(1, 3, 31\).*D = 32"),
        (some_z(1)[:, :0], [[5]], None, ValueError, r"z: got shape \(1, 0, 32\)"),
        (some_z(1).long(), [[5]], None, TypeError, "z: got dtype torch.int64"),
        (some_z(1).to("meta"), [[5]], None, ValueError, "z: got device meta, expected the decoder's, cpu"),
        (some_z(2), [[5]], None, ValueError, "targets: got 1, expected one for each of 2 z"),
        (some_z(2), [[5], []], None, ValueError, "targets: got an empty sequence at 1"),
        (some_z(1), [[320]], None, IndexError, r"targets: got id 320 in sequence 0, expected 0\.\.319"),
        (some_z(1), [[-100]], None, IndexError, "targets: got id -100"),
        (some_z(1), [[5], [6]], [0], ValueError, "z_index: got 1, expected one for each of the 2 targets"),
        (some_z(1), [[5], [6]], [0, 1], IndexError, r"z_index: got 0\.\.1, expected 0\.\.0"),
        (some_z(1), [[5]], [-1], IndexError, "z_index: got -1"),
    ],
)
def test_decoder_refuses(z, targets, z_index, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        SHARED["decoder"].logprob(z, targets, z_index)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = model_of("llama, untied")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = value
    for build in (Decoder, lambda m: Encoder(m, compress_token_ids=COMPRESS)):
        with pytest.raises(ValueError, match=r"^model: got a non-finite value in lm_head\.weight"):
            build(model)


def test_decoder_construction_refuses():
    with pytest.raises(ValueError, match=r"^z_norm: got 'rms', expected \('none', 'match_rms'\)"):
        Decoder(model_of("llama, tied"), z_norm="rms")
    with pytest.raises(ValueError, match=r"^eos_token_id: got None"):
        Decoder(model_of("llama, tied", eos_token_id=None))
    with pytest.raises(IndexError, match=r"^eos_token_id: got id 320"):
        Decoder(model_of("llama, tied"), eos_token_id=320)
    assert Decoder(model_of("llama, tied", eos_token_id=[9, 2])).eos_token_id == 9


def test_heads_that_are_not_a_plain_projection_are_refused():
    model = model_of("llama, untied")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"^model: got an lm_head of type Sequential"):
        Decoder(model)
    model = model_of("llama, untied")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2 if output.shape[1] == 2 else output)
    calls = iter((1.0, 1.5))
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * next(calls))
    with pytest.raises(ValueError, match=r"^model: got logits that are not"):
        Decoder(model)


@torch.no_grad()
def test_the_mean_is_over_the_tokens_of_each_target_with_its_eos():
    z, targets = some_z(4), texts(5, 1, 9, 3)
    sums = Decoder(model_of("llama, tied")).logprob(z, targets)
    means = Decoder(model_of("llama, tied"), logprob_reduction="mean").logprob(z, targets)
    close(means, sums / torch.tensor([6, 2, 10, 4]))
    with pytest.raises(ValueError, match=r"^logprob_reduction: got 'max', expected \('sum', 'mean'\)"):
        Decoder(model_of("llama, tied"), logprob_reduction="max")


@torch.no_grad()
@pytest.mark.parametrize(("eos", "bos"), [(77, ()), (2, (1,)), (77, (5,))])
def test_eos_and_a_bos_before_z_may_be_chosen(eos, bos):
    z, targets, plain = some_z(3), texts(3, 5, 1), model_of("llama, tied")
    expected = torch.stack([plain_logprob(plain, *pair, eos, bos) for pair in zip(z, targets, strict=True)])
    decoder = Decoder(model_of("llama, tied"), eos_token_id=eos, bos_token_id=bos[0] if bos else None)
    close(decoder.logprob(z, targets), expected)
    assert decoder.fit_max_target_length(K) == 253 - len(bos)
    with pytest.raises(IndexError, match=r"^bos_token_id: got id 320"):
        Decoder(model_of("llama, tied"), bos_token_id=320)


# ----------------------------------------------------------------------------------------------------------------------
# Passes cut by a token budget


def stage2_loss(z, a, b, c):
    """Not a sum over texts or pairs in any of its terms."""
    e = text_embedding(z)
    aligned = alignment_loss(a, b, c, ref_margin="none", negatives="joint", temperature=0.7).loss
    return aligned + info_nce(e[:4], e[4:], temperature=0.2) + 1e-3 * torch.cat([a, b]).logsumexp(0)


def step(encoder, decoder, encoder_budget=None, decoder_budget=None):
    ids = texts(5, 9, 3, 12, 6, 2, 8, 4)  # 4 queries and their positives
    z = encoder(ids, [SUFFIX, [9]] * 4, encoder_budget)
    targets = [*ids[4:], *ids[4:], *texts(7, 1, 3, 2, seed=5)]
    scores = decoder.logprob(z, targets, [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 2, 3], decoder_budget)
    loss = stage2_loss(z, scores[:4], scores[4:8], scores[8:].view(4, 1))
    encoder.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


# Llama's norms round gradients to float32, with and without the upstream number.
@pytest.mark.parametrize(
    ("name", "tolerance"), [("llama, tied", 1e-6), ("gemma2", 2e-5), ("gpt2, learned positions", 1e-11)]
)
def test_the_gradient_does_not_depend_on_the_token_budgets(name, tolerance):
    encoder = encoder_of(name, own_compress_rows=True)
    decoder = Decoder(model_of(name), z_norm="match_rms", bos_token_id=BOS.get(name, 1))
    loss, wanted = step(encoder, decoder)
    assert max(g.abs().max() for g in wanted.values()) > 1e-3
    for budgets in [(25, 20), (1, None), (None, 1), (40, 1000)]:
        found_loss, found = step(encoder, decoder, *budgets)
        close(found_loss, loss, tolerance)
        assert found.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            close(found[parameter], gradient, tolerance)


def test_a_pass_that_runs_again_drops_the_same_units():
    ids = texts(5, 9, 3, 12)
    weight = torch.randn(4, K, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = model_of("llama, tied", attention_dropout=0.4)
    encoder = Encoder(model, compress_token_ids=COMPRESS, suffix_ids=SUFFIX).train()
    gradients = []
    for seed, budget in ((0, 17), (0, None), (1, None)):
        torch.manual_seed(seed)
        # Budget 17 makes these four passes, the longest first.
        z = encoder(ids, None, budget) if budget else torch.cat([encoder([ids[i]]) for i in (3, 1, 0, 2)])[[2, 1, 3, 0]]
        encoder.zero_grad()
        (z.square() * weight).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    close(gradients[0], gradients[1])
    assert (gradients[0] - gradients[2]).abs().max() > 1e-2, "nothing was dropped"


def test_the_decoder_runs_each_pass_once_and_the_encoder_twice():
    encoder, decoder = encoder_of("llama, tied"), Decoder(model_of("llama, tied"))
    passes = {"encoder": 0, "decoder": 0}
    for name, module in (("encoder", encoder), ("decoder", decoder)):

        def count(*_, name=name):
            passes[name] += 1

        base_model(module.model).register_forward_pre_hook(count)
    step(encoder, decoder, 1, 1)
    assert passes == {"encoder": 16, "decoder": 12}


def test_memory_is_that_of_one_pass_and_not_of_the_batch():
    encoder, decoder = encoder_of("llama, tied"), Decoder(model_of("llama, tied"))
    ids = texts(*[60] * 24)

    def peak(budget) -> int:
        def call():
            encoder.zero_grad()
            z = encoder(ids, None, budget)
            (decoder.logprob(z, ids, None, budget).logsumexp(0) + z.square().mean()).backward()

        call()
        return harness.peak_memory(call, "cpu")[0]

    assert peak(140) < peak(None) / 4


def test_scores_without_a_graph_are_cut_too():
    decoder, z, passes = Decoder(model_of("llama, tied")), some_z(3).requires_grad_(), []
    base_model(decoder.model).register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    ids = texts(5, 9, 3)
    wanted = decoder.logprob(z, ids)
    with torch.no_grad():
        without_grad = decoder.logprob(z, ids, token_budget=14)
    constant = decoder.logprob(z.detach(), ids, token_budget=14)
    assert len(passes) == 1 + 2 * 2
    for scores in (without_grad, constant):
        close(scores, wanted.detach())
        assert not scores.requires_grad


def test_a_budget_below_one_token_is_refused():
    with pytest.raises(ValueError, match=r"^token_budget: got 0, expected at least 1"):
        encoder_of("llama, tied")(texts(2), None, 0)
    with pytest.raises(ValueError, match=r"^token_budget: got -3, expected at least 1"):
        Decoder(model_of("llama, tied")).logprob(some_z(1), texts(2), None, -3)


# ----------------------------------------------------------------------------------------------------------------------
# Frozen, and nobody else's


def dropping(**options) -> torch.nn.Module:
    return tiny_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.5, resid_pdrop=0.5, **options
    )


@pytest.mark.parametrize(
    "ask",
    [
        lambda decoder: torch.nn.ModuleDict({"decoder": decoder}).train(),
        lambda decoder: decoder.train(),
        lambda decoder: decoder.model.train(),
    ],
    ids=["its owner", "the decoder", "the model"],
)
def test_a_decoder_never_drops_out(ask):
    decoder, z = Decoder(dropping()), torch.randn(1, K, 32)
    wanted = decoder.logprob(z, [[5, 6, 7]])
    ask(decoder)
    assert torch.equal(decoder.logprob(z, [[5, 6, 7]]), wanted)
    assert not any(m.training for m in decoder.model.modules())


def test_a_decoder_never_trains():
    decoder = Decoder(model_of("llama, tied"))
    torch.nn.ModuleList([decoder]).requires_grad_(True)
    z = some_z(2).requires_grad_()
    decoder.logprob(z, [[5, 6], [7]], token_budget=5).sum().backward()
    assert z.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


def test_one_model_in_two_roles_is_refused():
    model = model_of("llama, tied")
    encoder = Encoder(model, compress_token_ids=COMPRESS)
    with pytest.raises(ValueError, match=r"^model: got one that the Encoder has, expected another one for the Decoder"):
        Decoder(model)
    assert all(p.requires_grad for p in encoder.model.parameters()), "and nothing was frozen"
    Decoder(copy.deepcopy(model))
    decoder = Decoder(model_of("llama, tied"))
    with pytest.raises(ValueError, match=r"^model: got one that the Decoder has, expected another one for the Encoder"):
        Encoder(decoder.model.model, compress_token_ids=COMPRESS)
    model = encoder.model
    del encoder
    Decoder(model)  # the one who had it is gone
    model = model_of("llama, tied")
    first = Encoder(model, compress_token_ids=COMPRESS)
    Encoder(model, compress_token_ids=COMPRESS)  # and is gone at once, unlike the first
    with pytest.raises(ValueError, match=r"^model: got one that the Encoder has"):
        Decoder(first.model)


# ----------------------------------------------------------------------------------------------------------------------
# Models that cannot be right


def with_part(part, **to):
    model = tiny_model()
    model.get_submodule(part).to(**to)
    return model


def make_encoder(model):
    return Encoder(model, compress_token_ids=COMPRESS, suffix_ids=SUFFIX, bos_token_id=1)


@pytest.mark.parametrize("make", [make_encoder, Decoder])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: with_part("model.layers.1", device="meta"), r"no values of model\.layers\.1\..* in memory"),
        (
            lambda: with_part("model.layers.1", dtype=torch.bfloat16),
            r"float32 \(.*\) and bfloat16 \(.*model\.to\(dtype\)",
        ),
        (lambda: tiny_model("bert", is_decoder=False), r"depend on later tokens"),
    ],
    ids=["meta", "dtypes", "bidirectional"],
)
def test_a_model_that_cannot_be_right_is_refused_with_the_cause(make, model, message):
    with pytest.raises(ValueError, match=rf"^model: got .*{message}"):
        make(model())


@pytest.mark.parametrize("part", ["lm_head", "model.norm"])  # an encoder reads a norm in float32
def test_a_decoder_whose_head_is_of_another_dtype_is_refused_with_the_cause(part):
    model = tiny_model(dtype=torch.bfloat16)
    model.get_submodule(part).float()
    with pytest.raises(
        ValueError, match=r"^model: got \w+, whose head cannot be run .*, with weights of .* and .*expected"
    ):
        Decoder(model)


def test_a_decoder_that_needs_ids_beside_embeddings_is_refused_and_an_encoder_reads_them():
    options = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 0,
               "activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [64, 64], "laurel_rank": 4,
               "layer_types": ["full_attention"] * 2}  # fmt: skip
    model = tiny_model("gemma3n_text", **options)
    assert make_encoder(model)(texts(3)).shape == (1, K, 32)
    for make in (Decoder, lambda m: Encoder(m, compress_token_ids=COMPRESS, own_compress_rows=True)):
        with pytest.raises(ValueError, match=r"^model: got Gemma3nForCausalLM, which reads ids beside its embeddings"):
            make(tiny_model("gemma3n_text", **options))


@pytest.mark.parametrize("options", [{"targets": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_in_the_head_which_an_encoder_never_reads_is_refused(options):
    model = add_lora(model_of("llama, untied"), COMPRESS, rank=2, **options)
    with pytest.raises(ValueError, match=r"^model: got an adapter in base_model\.model\.lm_head, the head"):
        make_encoder(model)
    make_encoder(add_lora(model_of("llama, tied"), COMPRESS, rank=2))
