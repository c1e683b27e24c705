"""Targets of one z behind one prefix: the scores and gradients of a prefix each, for fewer tokens."""

import copy
import itertools
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoregembed import Decoder, attention
from autoregembed.models import base_model
from autoregembed.packing import pack
from autoregembed.prefixes import choose_passes, make_shared_microbatches, select, share_prefixes, spread
from autoregembed.testing import tiny_model

K = 3
MODELS = {
    "llama": ("llama", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                          "sliding_window": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral, sliding window": ("mistral", {"sliding_window": 5}),
    "gpt-neox": ("gpt_neox", {}),
    "gpt2, learned positions": ("gpt2", {}),
    "phi, head with a bias": ("phi", {}),
    "gpt-oss, sinks": ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4,
                                   "experts_implementation": "eager"}),
}  # fmt: skip


class Norm(nn.Module):
    """An RMS norm in the dtype of its input: those of Transformers round states and gradients to float32."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps
        self.offset = float("Gemma" in type(norm).__name__)

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + self.weight)


def model_of(name: str, **options):
    architecture, own = MODELS[name]
    model = tiny_model(architecture, dtype=torch.float64, **{**own, **options})
    for parent in [*model.modules()]:
        for child, module in parent.named_children():
            if "RMSNorm" in type(module).__name__:
                setattr(parent, child, Norm(module))
    return model


def decoders(name: str, **options) -> dict[bool, Decoder]:
    model = model_of(name)
    return {share: Decoder(copy.deepcopy(model), share_prefixes=share, **options) for share in (False, True)}


def texts(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in sizes]


def some_z(b, k=K, seed=0):
    return torch.randn(b, k, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(decoder, z, targets, owners, token_budget=None):
    """Scores, and the gradient of z of a loss that weighs each pair otherwise."""
    z = z.clone().requires_grad_()
    scores = decoder.logprob(z, targets, owners, token_budget)
    upstream = torch.linspace(-1.0, 2.0, len(targets), dtype=torch.float64) + scores.detach().tanh()
    return scores.detach(), torch.autograd.grad(scores @ upstream, z)[0]


class Tokens:
    """How many tokens the decoder's linear layers see."""

    def __init__(self, decoder: Decoder):
        self.count = defaultdict(int)
        for name, module in base_model(decoder.model).named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, args, out, name=name: self.add(name, out))

    def add(self, name, out):
        self.count[name] += out.numel() // out.shape[-1]

    def take(self) -> int:
        (n,) = set(self.count.values())  # every layer sees the same
        self.count.clear()
        return n


# ----------------------------------------------------------------------------------------------------------------------


PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=9)


@given(PAIRS, st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_every_place_of_the_pack_is_read_from_the_token_that_stands_there(pairs, prefix):
    owners = [owner for _, owner in pairs]
    sequences = [[-1 - owner] * prefix + [10 * i + j for j in range(n)] for i, (n, owner) in enumerate(pairs)]
    packed, shared = pack(sequences), share_prefixes([*map(len, sequences)], owners, prefix)
    if len(set(owners)) == len(owners):
        assert shared is None
        return
    run = packed.ids[shared.kept]
    assert len(run) == sum(n for n, _ in pairs) + prefix * len(set(owners))
    assert torch.equal(run[shared.source], packed.ids)
    assert torch.equal(packed.position_ids[shared.kept][shared.source], packed.position_ids)
    bounds = shared.cu_seqlens.tolist()
    for i, end in enumerate(packed.cu_seqlens[1:].tolist()):  # the last tokens of each sequence are its own
        own = packed.ids[end - (bounds[i + 1] - bounds[i]) : end]
        assert torch.equal(run[bounds[i] : bounds[i + 1]], own)
    assert bounds[-1] == len(run)


@given(PAIRS, st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_gradients_are_those_of_indexing(pairs, prefix):
    shared = share_prefixes([prefix + n for n, _ in pairs], [owner for _, owner in pairs], prefix)
    if shared is None:
        return
    x = torch.randn(len(shared.kept), 2, 3, dtype=torch.float64, requires_grad=True)
    whole = torch.randn(len(shared.source), 2, 3, dtype=torch.float64, requires_grad=True)
    for function, argument, index in ((spread, x, shared.source), (select, whole, shared.kept)):
        upstream = torch.randn(len(index), 2, 3, dtype=torch.float64)
        assert torch.equal(function(argument, shared), argument[index])
        (found,) = torch.autograd.grad((function(argument, shared) * upstream).sum(), argument)
        (wanted,) = torch.autograd.grad((argument[index] * upstream).sum(), argument)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda y: spread(y, shared).square(), x)


@given(PAIRS, st.integers(1, 4), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_parts_keep_to_the_budget_and_repeat_a_prefix_where_they_must(pairs, prefix, budget):
    lengths, owners = [prefix + n for n, _ in pairs], [owner for _, owner in pairs]
    parts = make_shared_microbatches(lengths, owners, prefix, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(pairs)))
    cost = lambda part: sum(lengths[i] - prefix for i in part) + prefix * len({owners[i] for i in part})  # noqa: E731
    for part in parts:
        assert cost(part) <= budget or len(part) == 1
    for owner in set(owners):
        own = [i for i in range(len(pairs)) if owners[i] == owner]
        if cost(own) <= budget:
            assert sum(any(i in part for i in own) for part in parts) == 1


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_a_prefix_each(name):
    bos = None if name in ("gpt-neox", "gpt2, learned positions") else 1
    targets, owners = texts(4, 7, 2, 4, 12, 1, 9, 4), [1, 0, 1, 1, 3, 0, 2, 1]
    found = {}
    for share, decoder in decoders(name, bos_token_id=bos, z_norm="match_rms").items():
        tokens = Tokens(decoder) if name != "gpt-oss, sinks" else None
        found[share] = gradient(decoder, some_z(4), targets, owners)
        if tokens is not None and tokens.count:  # GPT-2 has none of torch's linear layers
            assert tokens.take() == 43 + (4 if share else 8) * (K + (bos is not None))
    for shared, separate in zip(found[True], found[False], strict=True):
        assert separate.abs().max() > 1
        assert (shared - separate).abs().max() <= 1e-9 * separate.abs().max()


@pytest.mark.parametrize("k", [5, 16])
@pytest.mark.parametrize("m", [1, 3, 7])
def test_tokens_of_a_stage_2_step(k, m):
    decoder = Decoder(tiny_model(), bos_token_id=1)
    tokens = Tokens(decoder)
    b, length = 3, 11
    prefix = 1 + k
    positives, negatives = texts(*[length] * b), texts(*[length] * (b * m), seed=1)
    targets = [*positives, *positives, *negatives]
    owners = [*range(2 * b), *(i for i in range(b) for _ in range(m))]
    z = some_z(2 * b, k).float().requires_grad_()
    decoder.logprob(z, targets, owners).sum().backward()
    found = tokens.take()
    separate = len(targets) * (prefix + length)
    assert found == len(targets) * length + 2 * b * prefix
    saved = {(5, 1): 12, (5, 7): 27, (16, 7): 47}.get((k, m))
    if saved is not None:  # what the design counts on
        assert round(100 * (1 - found / separate)) == saved
    # Nobody shares a z: every pair has its own prefix.
    decoder.logprob(some_z(len(targets), k).float(), targets)
    assert tokens.take() == separate
    # Scores alone, cut: the sources stay whole where the budget holds one.
    with torch.no_grad():
        whole = decoder.logprob(z, targets, owners)
        tokens.take()
        cut = decoder.logprob(z, targets, owners, token_budget=(m + 1) * length + prefix)
    assert tokens.take() == found
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 18, 40, 1000])
@pytest.mark.parametrize("name", ["gemma2", "gpt-neox"])
def test_neither_scores_nor_gradients_depend_on_the_budget(name, budget):
    targets, owners = texts(4, 7, 2, 4, 12, 1, 9, 4), [1, 0, 1, 1, 3, 0, 0, 1]
    both = decoders(name)
    wanted = gradient(both[False], some_z(4), targets, owners)
    both[None] = Decoder(model_of(name))
    for share in (False, True, None):
        for found, exact in zip(gradient(both[share], some_z(4), targets, owners, budget), wanted, strict=True):
            assert (found - exact).abs().max() <= 1e-9 * exact.abs().max()


def test_several_passes_with_a_gradient_share_where_running_twice_costs_less():
    lengths, prefix = [6 + 11] * 8, 6
    one = [0] * 8
    assert choose_passes(lengths, one, prefix, 60, None, with_gradient=False)[1]
    assert not choose_passes(lengths, one, prefix, 60, None, with_gradient=True)[1]
    assert choose_passes(lengths, one, prefix, 60, True, with_gradient=True)[1]
    assert choose_passes(lengths, one, prefix, None, None, with_gradient=True)[1]
    assert choose_passes([17 + 11] * 8, one, 17, 110, None, with_gradient=True)[1]
    # Long targets: the copies for attention would cost more than the prefix.
    assert not choose_passes([6 + 400] * 8, one, prefix, None, None, with_gradient=False)[1]
    for share in (None, False):
        assert not choose_passes(lengths, [*range(8)], prefix, None, share, with_gradient=False)[1]


def test_a_pass_of_shared_prefixes_runs_again_in_the_backward():
    decoder = Decoder(model_of("llama"), share_prefixes=True)
    tokens = Tokens(decoder)
    gradient(decoder, some_z(2), texts(*[5] * 8), [0, 1] * 4, 4 * 5 + K)
    assert tokens.take() == 2 * (8 * 5 + 2 * K)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16, "factor": 16.0}  # fmt: skip


def test_rope_that_depends_on_the_text_shares_no_prefix():
    model = tiny_model(dtype=torch.float64, rope_parameters=LONGROPE)
    decoder = Decoder(copy.deepcopy(model))
    assert decoder.shares_prefixes is False
    targets, z = texts(2, 30, 5), some_z(1).expand(3, -1, -1)
    torch.testing.assert_close(decoder.logprob(z[:1], targets, [0, 0, 0]), decoder.logprob(z, targets))
    with pytest.raises(ValueError, match=r"^share_prefixes: got a LlamaForCausalLM whose rope depends on the length"):
        Decoder(model, share_prefixes=True)


def test_a_model_that_reads_a_pack_otherwise_is_found_and_refused():
    model = tiny_model("gpt_neox")
    rotary = model.gpt_neox.rotary_emb
    decoder = Decoder(copy.deepcopy(model))
    assert decoder.shares_prefixes is None

    def seams(module, args, kwargs, output):
        """Rotates all that follows a token which is not the next of its text."""
        position = kwargs["position_ids"]
        jumps = (position.diff() != 1) & (position[:, 1:] != 0)
        seen = F.pad(jumps.cumsum(-1), (1, 0))[..., None]
        return tuple(x * (1 + seen.clamp(max=1)) for x in output)

    rotary.register_forward_hook(seams, with_kwargs=True)
    with pytest.raises(ValueError, match=r"^share_prefixes: got a GPTNeoXForCausalLM whose targets behind one prefix"):
        Decoder(model, share_prefixes=True)
    decoder = Decoder(model)
    assert decoder.shares_prefixes is False
    targets, z = texts(2, 30, 5), some_z(1).float().expand(3, -1, -1)
    torch.testing.assert_close(decoder.logprob(z[:1], targets, [0, 0, 0]), decoder.logprob(z, targets))


# ----------------------------------------------------------------------------------------------------------------------
# What the kernels on a GPU are asked for, computed as their documentation has it


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window):
    """Attention of each sequence: query i of n sees the keys up to i + m − n of m, within a window (left, 0)."""
    out = []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        n, m = q1 - q0, k1 - k0
        assert n <= max_q
        assert m <= max_k
        distance = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
        seen = (distance >= 0) & ((distance <= window) if window >= 0 else True)
        heads = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        y = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=True)
        out.append(y.transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window", "gpt-neox"])
def test_varlen_kernels_get_longer_keys_than_queries(name, monkeypatch):
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # fmt: skip  # noqa: E501
        assert window_size[1] == 0
        calls.append((len(query), len(key)))
        return varlen(
            query, key, value, cu_seq_q.tolist(), cu_seq_k.tolist(), max_q, max_k, scale=scale, window=window_size[0]
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    targets, owners = texts(4, 7, 2, 4, 12, 1, 9, 4), [1, 0, 1, 1, 3, 0, 2, 1]
    both = decoders(name)
    wanted = gradient(both[False], some_z(4), targets, owners)
    both[True].model.set_attn_implementation(attention.VARLEN)
    found = gradient(both[True], some_z(4), targets, owners)
    assert set(calls) == {(43 + 4 * K, 43 + 8 * K)}
    for x, exact in zip(found, wanted, strict=True):
        assert (x - exact).abs().max() <= 1e-9 * exact.abs().max()
