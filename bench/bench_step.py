"""A training step of both stages on SmolLM2-135M: ours beside the released algorithm, same model, same texts.

Both sides run forward and backward alone, in fp32 (bf16 on a GPU). All parameters of the encoder are trainable and z is
not normalised. A micro-batch has `micro` rows, since activations and logits of 64 rows take more than 25 GB in the
released algorithm. It pads rows of stage 2 to the longest of the whole batch, as its collator does, and rows of stage 1
to the longest of the micro-batch. `details` splits our step by place and adds the optimiser's update.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoregembed import Decoder, Encoder
from autoregembed.config import Stage2Options
from autoregembed.models import base_model
from autoregembed.objective import stage1_loss, stage2_loss
from autoregembed.passes import checkpoint_options

from . import workload
from .baselines.released import Released
from .harness import OURS, Case, Variant, is_gpu, synchronise, training_dtype

BETA = TEMPERATURE = 0.1
OPTIONS = Stage2Options(beta=BETA, temperature=TEMPERATURE)
COMPRESS = 5
SELECTIVE = f"{OURS}, selective checkpointing"


class Setup:
    """The encoder and decoder of both sides. The encoders share their weights, hence their gradients."""

    def __init__(self, device: str, model: Any, tokenizer: Any, rows: list[dict], describe: str, k: int = COMPRESS):
        self.device, self.model, self.rows, self.describe = device, model, rows, describe
        frozen = copy.deepcopy(model)
        # Packed attention is a setting of a model, so each side has its own modules over the same parameters.
        self.decoder = Decoder.from_model(frozen, tokenizer)
        self.encoder = Encoder.from_model(model, tokenizer, num_compress_tokens=k)
        self.released = Released(
            _twin(base_model(model)), _twin(frozen), eos_token_id=self.decoder.eos_token_id,
            compress_token_ids=self.encoder.compress_token_ids, bos_token_id=self.encoder.bos_token_id,
        )  # fmt: skip
        checkpointed = _twin(model).train()
        checkpointed.activation_checkpointing_enable(checkpoint_options("selective"))
        self.selective = (
            Encoder(
                checkpointed, compress_token_ids=self.encoder.compress_token_ids,
                bos_token_id=self.encoder.bos_token_id,
            ),
            Decoder.from_model(_twin(frozen), tokenizer, gradient_checkpointing="selective"),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        negatives = len(rows[0]["target_ids"]) - 1
        self.reference = (
            (-40 - 20 * torch.rand(len(rows), generator=generator)).to(device),
            (-60 - 20 * torch.rand(len(rows), negatives, generator=generator)).to(device),
        )

    def microbatches(self, size: int) -> list[slice]:
        return [slice(i, i + size) for i in range(0, len(self.rows), size)]

    @property
    def num_query_tokens(self) -> int:
        """With every query's eos."""
        return sum(len(r["query_ids"]) + 1 for r in self.rows)

    def witness(self) -> Tensor:
        """The gradient of one encoder parameter."""
        gradient = base_model(self.model).layers[0].mlp.down_proj.weight.grad
        assert gradient is not None
        return gradient.clone()


def nli(device: str, quick: bool, rows: int, triplets: str | None) -> Setup:
    """SmolLM2-135M, or a tiny random model for a quick run, and NLI triplets."""
    texts, describe = workload.triplets(rows, triplets)
    dtype = training_dtype(device)
    if quick:
        from autoregembed.testing import tiny_model, tiny_tokenizer

        tokenizer: Any = tiny_tokenizer(r["query"] for r in texts)
        model = tiny_model(vocab_size=512, dtype=dtype, max_position_embeddings=1024).to(device)
    else:
        model, tokenizer = workload.smollm2(dtype, device)
    return Setup(device, model, tokenizer, workload.tokenise(texts, tokenizer), describe)


CURVE = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
           "num_attention_heads": 9, "num_key_value_heads": 3}  # fmt: skip


def uniform(device: str, rows: int, k: int, m: int, length: int, sizes: dict[str, int] | None = None) -> Setup:
    """A random Llama and random texts of `length` tokens: 4 layers, D = 256, V = 8192 for curves."""
    from autoregembed.testing import tiny_model, tiny_tokenizer

    sizes = sizes or CURVE
    options: dict[str, Any] = {"max_position_embeddings": 4096, "initializer_range": 0.02, **sizes}
    model = tiny_model(dtype=training_dtype(device), **options)
    generator = torch.Generator().manual_seed(0)

    def text() -> list[int]:
        return torch.randint(400, sizes["vocab_size"], (length,), generator=generator).tolist()

    made = [
        {"query_ids": text(), "positive_ids": text(), "suffix_ids": [5], "target_ids": [text() for _ in range(1 + m)]}
        for _ in range(rows)
    ]
    describe = f"random {sizes['num_hidden_layers']}-layer Llama, D={sizes['hidden_size']}, V={sizes['vocab_size']}"
    return Setup(device, model.to(device), tiny_tokenizer(), made, describe, k)


def _twin(model: Any) -> Any:
    """A copy of the modules over the same parameters, with Transformers' own attention."""
    memo = {id(p): p for p in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    twin.set_attn_implementation("sdpa")
    return twin


class Marks:
    """Seconds by place of one step, from hooks on tensors at the borders of encoder, decoder and LM head."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        synchronise(self.device)
        self.last = time.perf_counter()

    def __call__(self, place: str) -> None:
        before = self.last
        self.start()
        self.seconds[place] = self.seconds.get(place, 0.0) + self.last - before

    def on_decoder_output(self, _module: Any, _inputs: Any, output: Any) -> None:
        """A forward hook of the decoder's base model."""
        self("decoder, forward")
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda g: self("head and loss"))


def ours(
    setup: Setup, stage: int, micro: int, marks: Marks | None = None, selective: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss of the step, and the gradient of one encoder parameter; the caller drops the gradients."""
    encoder, decoder = setup.selective if selective else (setup.encoder, setup.decoder)
    total = torch.zeros((), device=setup.device)
    hook = base_model(decoder.model).register_forward_hook(marks.on_decoder_output) if marks else None
    for part in setup.microbatches(micro):
        rows = setup.rows[part]
        if marks:
            marks.start()
        suffixes = [r["suffix_ids"] for r in rows]
        queries = [r["query_ids"] for r in rows]
        positives = [r["positive_ids"] for r in rows]
        z = encoder(queries, suffixes) if stage == 1 else encoder(queries + positives, suffixes * 2)
        if marks:
            marks("encoder, forward")
            z.register_hook(lambda g: marks("decoder, backward"))
        if stage == 1:
            loss = stage1_loss(decoder, z, queries, num_tokens=setup.num_query_tokens)
        else:
            r_a, r_c = (r[part] for r in setup.reference)
            out = stage2_loss(OPTIONS, decoder, z, rows, ref_logps=(r_a, r_c))
            assert out.alignment is not None
            loss = out.alignment * (len(rows) / len(setup.rows))
        loss.backward()
        if marks:
            marks("encoder, backward")
        total += loss.detach()
    if hook is not None:
        hook.remove()
    return total, setup.witness()


def released(setup: Setup, stage: int, micro: int) -> tuple[Tensor, Tensor]:
    """`ours` by the released algorithm. In stage 1 the target of a query is the query itself."""
    total = torch.zeros((), device=setup.device)
    for part in setup.microbatches(micro):
        rows = setup.rows[part]
        if stage == 1:
            texts = [{**r, "text_ids": r["query_ids"], "target_ids": r["query_ids"]} for r in rows]
            weight = sum(len(r["query_ids"]) + 1 for r in rows) / setup.num_query_tokens
            loss = setup.released.compression_loss(texts) * weight
        else:
            r_a, r_c = (r[part] for r in setup.reference)
            loss = setup.released.alignment_loss(rows, r_a, r_c, beta=BETA, temperature=TEMPERATURE, batch=setup.rows)
            loss = loss * (len(rows) / len(setup.rows))
        loss.backward()
        total += loss.detach()
    return total, setup.witness()


def breakdown(setup: Setup, stage: int, micro: int) -> dict[str, float]:
    """Milliseconds by place of our step, and of the AdamW update after it: medians of three steps."""
    optimiser = torch.optim.AdamW([p for p in setup.encoder.parameters() if p.requires_grad], lr=0.0)
    runs = []
    for _ in range(3):
        marks = Marks(setup.device)
        ours(setup, stage, micro, marks)
        marks.start()
        optimiser.step()
        marks("optimiser")
        setup.model.zero_grad(set_to_none=True)
        runs.append(marks.seconds)
    return {place: 1e3 * sorted(r[place] for r in runs)[1] for place in runs[0]}


def _work(setup: Setup, stage: int) -> tuple[float, float]:
    """FLOPs of one step without recomputation and padding, and bytes of weights and gradients."""
    layers = sum(p.numel() for n, p in base_model(setup.model).named_parameters() if "embed" not in n)
    head = setup.model.get_output_embeddings().weight.numel()
    k = setup.encoder.num_compress_tokens
    encode = decode = supervised = 0
    for r in setup.rows:
        (around,) = setup.encoder.sequences([[]], [r["suffix_ids"]])
        if stage == 1:
            texts, targets = [r["query_ids"]], [r["query_ids"]]
        else:
            texts = [r["query_ids"], r["positive_ids"]]
            targets = [r["target_ids"][0], *r["target_ids"]]
        encode += sum(len(t) + len(around) for t in texts)
        decode += sum(len(t) + k for t in targets)
        supervised += sum(len(t) + 1 for t in targets)
    # Encoder: forward, gradient of inputs and of weights; frozen decoder: no weight gradient; head: two GEMMs.
    flops = 2.0 * layers * (3 * encode + 2 * decode) + 2.0 * 2 * supervised * head
    size = setup.model.get_input_embeddings().weight.element_size()
    return flops, float(size * (4 * layers + 2 * head + layers))


def step_case(
    setup: Callable[[], Setup],
    stage: int,
    device: str,
    shape: dict[str, int],
    *,
    rounds: int = 5,
    curve: str | None = None,
) -> Case:
    """One stage; `setup()` loads the model at first use. `shape` has at least B and micro."""
    dtype, micro = training_dtype(device), shape["micro"]
    first: list[tuple[Tensor, Tensor]] = []

    def prepare(case: Case) -> None:
        made = setup()
        first.clear()
        case.inputs = made.describe
        case.flops, case.bytes = _work(made, stage)
        case.tokens = sum(len(r["query_ids"]) + (len(r["positive_ids"]) if stage == 2 else 0) for r in made.rows)

    def check(name: str, outputs: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Both sides agree: the loss to 1e-4, the gradient to 4e-3 of its largest entry; in bf16 a hundred times that.

        The fp32 gradient of either side is 1.3e-3 from float64 here, since z is not normalised.
        """
        loss, gradient = (o.double().cpu() for o in outputs)
        assert bool(gradient.isfinite().all()), "a NaN in the gradient"
        first.append((loss, gradient))
        factor = 1 if dtype == torch.float32 else 100
        error = float((loss - first[0][0]).abs() / first[0][0].abs())
        assert error <= 1e-4 * factor, f"loss {float(loss):.6f}, released {float(first[0][0]):.6f}"
        difference = float((gradient - first[0][1]).abs().max() / first[0][1].abs().max())
        assert difference <= 4e-3 * factor, f"gradient off by {difference:.1e} of its largest entry"
        return max(error, difference), difference

    def call(step: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        out = step(setup(), stage, micro)
        setup().model.zero_grad(set_to_none=True)  # the peak of a call then counts all gradients
        return out

    variants = {
        "released": Variant(lambda: partial(call, released), note="padded, from its description"),
        OURS: Variant(lambda: partial(call, ours)),
        SELECTIVE: Variant(lambda: partial(call, partial(ours, selective=True)), note="both models"),
    }
    return Case(
        suite="step", op="step", job=f"stage{stage}", shape=shape, dtype=dtype, variants=variants,
        flops=0.0, bytes=0.0, prepare=prepare, check=check, relative_to="released", rounds=rounds, device=device,
        curve=curve, details={} if curve else {OURS: lambda: breakdown(setup(), stage, micro)},
    )  # fmt: skip


def _random(device: str, quick: bool) -> tuple[Callable[[], Setup], int, int]:
    """Random weights of SmolLM2's shape and texts of NLI's lengths, which need no package; B and the length."""
    b, length = (2, 6) if quick else (64, 24)
    sizes = {**CURVE, "vocab_size": 512, "num_hidden_layers": 1} if quick else SMOLLM2
    return partial(uniform, device, b, COMPRESS, 1, length, sizes), b, length


def whole_step(stage: int, device: str, quick: bool, graphed: bool) -> Callable[[], Tensor]:
    """Forward, backward, clipping and AdamW's update of the loop, as a call that returns the loss; the batch is padded
    and its shape repeats where the step is a CUDA graph."""
    from accelerate import Accelerator

    from autoregembed.config import Config
    from autoregembed.cuda_graphs import captured
    from autoregembed.objective import Objective

    setup = _random(device, quick)[0]()
    rows = [{**r, "row": i, "passage_suffix_ids": [r["suffix_ids"]] * 2} for i, r in enumerate(setup.rows)]
    if stage == 1:
        rows = [{**r, "text_ids": r["query_ids"], "target_ids": r["query_ids"]} for r in rows]
    config = Config(stage=1 if stage == 1 else 2, model="", train_data="", output_dir="")
    accelerator = Accelerator(cpu=not is_gpu(device))
    trained = [p for p in setup.encoder.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    encoder, optimizer = accelerator.prepare(setup.encoder, adamw)
    r_a, r_c = (r.cpu() for r in setup.reference)
    objective: Any = Objective(config, encoder, setup.decoder, accelerator, (r_a, r_c) if stage == 2 else None)
    if graphed:
        objective, optimizer = captured(objective, optimizer)

    def call() -> Tensor:
        loss = objective(rows)["loss"]
        objective.clip()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return call


def random_case(stage: int, device: str, quick: bool) -> Case:
    """A step on random weights."""
    setup, b, length = _random(device, quick)
    setup = functools.cache(setup)
    return step_case(setup, stage, device, {"B": b, "micro": b, "K": COMPRESS, "M": 1, "L": length})


def cases(device: str, quick: bool = False, rows: int | None = None, triplets: str | None = None) -> Iterator[Callable]:
    gpu = is_gpu(device)
    b = rows or (4 if quick else 64 if gpu else 6)
    micro = min(b, 2 if quick else b if gpu else 16)
    setup = functools.cache(partial(nli, device, quick, b, triplets))
    shape = {"B": b, "micro": micro, "K": COMPRESS, "M": 1}
    for stage in (2, 1):
        yield partial(step_case, setup, stage, device, shape, rounds=11 if gpu else 3)
    if quick:
        return
    b = 8 if gpu else 4
    points = [("K", k, 1, 32) for k in (1, 4, 16)] + [("M", 4, m, 32) for m in (1, 3, 7)]
    points += [("L", 4, 1, length) for length in (32, 128, 512, *([2048] if gpu else []))]
    for letter, k, m, length in points:
        shape = {"B": b, "micro": b, "K": k, "M": m, "L": length}
        setup = functools.cache(partial(uniform, device, b, k, m, length))
        yield partial(step_case, setup, 2, device, shape, rounds=3, curve=letter)
