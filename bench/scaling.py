"""Memory and communication of a stage-2 step under FSDP2: computed from shapes, not measured.

python bench/scaling.py            # the tables of docs/explanation/scaling.md
python bench/scaling.py --start    # that of docs/howto/distributed.md
python bench/scaling.py --paper    # that of docs/howto/paper.md
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

GB = 1e9
BF16, FP32 = 2, 4
CHUNK = 512 << 20  # bytes of fp32 logits alive at a time in linear_logprob


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer with gated MLP and an untied LM head."""

    layers: int
    hidden: int  # D
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int  # V
    qkv_bias: bool = False

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = self.hidden * (2 * q + 2 * kv) + self.qkv_bias * (q + 2 * kv)
        return attention + 3 * self.hidden * self.mlp + 2 * self.hidden

    @property
    def body(self) -> int:
        """Parameters of all layers and the last norm."""
        return self.layers * self.layer + self.hidden

    @property
    def table(self) -> int:
        """Parameters of the embedding matrix; the LM head has as many."""
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        return self.body + 2 * self.table

    @property
    def kept_by_decoder(self) -> int:
        """Values per token that a layer with frozen weights keeps for its backward.

        Inputs of two norms; q, k, v and the output of attention; gate, up and silu(gate).
        """
        qkv = (self.heads + 2 * self.kv_heads) * self.head_size
        return 2 * self.hidden + qkv + self.heads * self.head_size + 3 * self.mlp

    @property
    def kept_by_layer(self) -> int:
        """The same with trainable weights, which also need the inputs of the linear layers."""
        return self.kept_by_decoder + 2 * self.hidden + self.heads * self.head_size + self.mlp


MODELS = {
    "7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),  # Qwen2.5-7B
    "70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),  # Llama-3.1-70B
}


def memory(m: Shape, world_size: int, tokens: int) -> dict[str, float]:
    """Bytes on each of `world_size` GPUs, by use; a pass of the encoder or decoder has `tokens` tokens."""
    trained, frozen = m.body + m.table, m.table  # the encoder never reads its head
    return {
        # fp32 weights, gradients and both moments of AdamW; fp32 head
        "encoder": (trained * 4 * FP32 + frozen * FP32) / world_size,
        "decoder": m.total * BF16 / world_size,
        # Two layers at a time, of encoder or decoder; the encoder's root group (embedding and LM head) with the
        # gradient of its embedding; one of the decoder's two tables.
        "gathered": (2 * m.layer + 3 * m.table + m.table) * BF16,
        # Encoder with gradient checkpointing: inputs of its layers and one layer in full.
        "encoder activations": tokens * (m.layers * m.hidden + m.kept_by_layer) * BF16,
        "decoder activations": tokens * m.layers * m.kept_by_decoder * BF16,
        "head": CHUNK + tokens * m.hidden * BF16,
    }


def communication(m: Shape, world_size: int, microbatches: int, rows: int, negatives: int) -> dict[str, float]:
    """Bytes that each GPU sends in one step, with ring collectives: (W − 1) / W of each sum.

    Encoder: weights gathered in forward, layers gathered again in backward, gradients reduce-scattered. InfoNCE over
    several micro-batches adds one forward. Decoder: layers in both directions, two tables. InfoNCE: passages and their
    gradients.
    """
    ring = (world_size - 1) / world_size
    again = microbatches > 1
    encoder = (1 + again) * m.total + m.body + (m.body + m.table)
    decoder = 2 * m.body + 2 * m.table
    passages = world_size * rows * (1 + negatives) * m.hidden
    return {
        "encoder": ring * microbatches * encoder * BF16,
        "decoder": ring * microbatches * decoder * BF16,
        "InfoNCE": ring * 2 * passages * FP32,
    }


def flops(m: Shape, tokens: int, microbatches: int) -> float:
    """Matrix FLOPs of one GPU in one step, without attention's own products.

    Per parameter and token: encoder 2 forward, 2 for recomputation in backward, 4 backward, 2 for InfoNCE over several
    micro-batches; decoder 2 forward, 2 backward; LM head 4.
    """
    return microbatches * tokens * ((8 + 2 * (microbatches > 1)) * m.body + 4 * m.body + 4 * m.table)


def host(m: Shape, processes: int) -> float:
    """Bytes of main memory on a node where each process reads the whole encoder and decoder in fp32: DDP."""
    return processes * 2 * m.total * FP32


def host_in_parts(m: Shape, on_gpu: bool) -> float:
    """Bytes of main memory on a node, at most, where each process reads its shards into a GPU, or into main memory.

    Before a weight is read, process 0 tries a model of two layers in fp32 and frees it. The shards, fp32 for the
    encoder and bf16 for the decoder, are read in blocks of 32 MB.
    """
    trial = (2 * m.layer + 2 * m.table) * FP32
    return trial if on_gpu else max(trial, m.total * (FP32 + BF16))


def start(processes: int = 8) -> str:
    """Markdown: main memory of weights to start on a node, without the libraries'."""
    lines = [
        "| model | every process reads all (DDP, and FSDP2 before) | FSDP2 in parts, shards on GPUs | in parts, shards "
        "in main memory |",
        "|---|---|---|---|",
    ]
    for name, m in MODELS.items():
        cells = [host(m, processes), host_in_parts(m, True), host_in_parts(m, False)]
        lines.append(f"| {name} | " + " | ".join(f"{x / GB:.0f} GB" for x in cells) + " |")
    return "\n".join(lines)


def tables(rows: int, negatives: int, budgets: dict[str, int], worlds: list[int]) -> str:
    lines = []
    for name, m in MODELS.items():
        tokens, microbatches = budgets[name], 4
        lines += [
            f"**{name}**: {m.total / 1e9:.2f}e9 parameters, {tokens} tokens per pass, {microbatches} passes per step, "
            f"{rows} rows per GPU",
            "",
            "| GPUs | encoder | decoder | gathered | activations | all, GB | sent per step, GB | "
            "of it by InfoNCE, GB | FLOP per byte sent |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for world in worlds:
            use, sent = memory(m, world, tokens), communication(m, world, microbatches, rows, negatives)
            activations = use["encoder activations"] + use["decoder activations"] + use["head"]
            fields = [use["encoder"], use["decoder"], use["gathered"], activations, sum(use.values())]
            cells = [f"{x / GB:.1f}" for x in fields]
            cells += [f"{sum(sent.values()) / GB:.1f}", f"{sent['InfoNCE'] / GB:.3f}"]
            cells.append(f"{flops(m, tokens, microbatches) / sum(sent.values()):.0f}")
            lines.append(f"| {world} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# The paper's setting. Tokens a row of stage 2: bench/results/study-cpu.json, NLI triplets by SmolLM2's tokenizer with a
# short instruction (cells infonce and alignment, 320 triplets). Those of stage 1, rows and rates are assumptions.
LLAMA_2_7B = Shape(32, 4096, 11008, 32, 32, 128, 32000)
PAPER = {"stage 1": (50_000, 32, 600, 105), "stage 2": (4 * 275_601, 128, 47.7, 45.9)}
FLOPS_PER_SECOND, BYTES_PER_SECOND = 400e12, 300e9  # of one GPU, assumed


def paper(world_size: int = 8, budget: int = 4096) -> str:
    """Markdown: memory and least hours of both stages; whichever of arithmetic and communication takes longer."""
    m = LLAMA_2_7B
    lines = [
        "| stage | rows | rows per step | tokens per row, encoder and decoder | memory per GPU, GB | "
        "hours, arithmetic | hours, communication |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, (rows, batch, encoder, decoder) in PAPER.items():
        passes = math.ceil(batch / world_size * max(encoder, decoder) / budget)
        work = rows * (encoder * 8 * m.body + decoder * (4 * m.body + 4 * m.table))
        sent = rows / batch * sum(communication(m, world_size, passes, 0, 0).values())
        hours = work / (world_size * FLOPS_PER_SECOND) / 3600, sent / BYTES_PER_SECOND / 3600
        use = sum(memory(m, world_size, budget).values()) / GB
        lines.append(
            f"| {stage} | {rows:,} | {batch} | {encoder:g} and {decoder:g} | {use:.0f} | {hours[0]:.1f} | "
            f"{hours[1]:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-7b", type=int, default=4096, help="tokens of one pass")
    parser.add_argument("--tokens-70b", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64, help="rows of a step on each GPU")
    parser.add_argument("--negatives", type=int, default=1, help="hard negatives per row")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64, 128, 512])
    parser.add_argument("--paper", action="store_true", help="the setting of the paper alone")
    parser.add_argument("--start", action="store_true", help="main memory to start alone")
    options = parser.parse_args()
    if options.paper or options.start:
        print(paper() if options.paper else start())
        return
    budgets = {"7B": options.tokens_7b, "70B": options.tokens_70b}
    print(tables(options.rows, options.negatives, budgets, options.gpus))


if __name__ == "__main__":
    main()
