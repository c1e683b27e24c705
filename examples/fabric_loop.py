"""Stage 2 with Lightning Fabric: alignment and InfoNCE on one forward pass.

python examples/fabric_loop.py [MODEL]    # or: fabric run examples/fabric_loop.py --devices=2
"""

import sys

import torch
from common import TRIPLETS, tiny
from lightning_fabric import Fabric

from autoregembed import Decoder, Encoder, alignment_loss, info_nce
from autoregembed.encoder import text_embedding


def main(name: str | None = None, steps: int = 20, learning_rate: float = 2e-3) -> list[float]:
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.launch()
    fabric.seed_everything(0)
    name = name or tiny()
    encoder, decoder = Encoder.from_pretrained(name), Decoder.from_pretrained(name, z_norm="match_rms")
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate)
    rows = [encoder.tokenize(row) for row in TRIPLETS]
    encoder, optimizer = fabric.setup(encoder, optimizer)
    encoder.train()
    decoder.to(fabric.device)
    losses = []
    for step in range(steps):
        batch = [rows[i] for i in torch.randperm(len(rows))[:4]]
        queries, positives, negatives = ([row[i] for row in batch] for i in range(3))
        n = len(batch)
        z = encoder(queries + positives)
        # (z_q, p), (z_p, p) and (z_q, n) in one packed pass
        a, b, c = decoder.logprob(z, positives * 2 + negatives, [*range(2 * n), *range(n)]).split(n)
        embedding = text_embedding(z.float())
        nce = info_nce(embedding[:n], embedding[n:])
        loss = 0.2 * alignment_loss(a, b, c, ref_margin="none").loss + nce
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        fabric.print(f"step {step + 1:>3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
