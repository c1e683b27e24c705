"""Stage 2 with accelerate, in one process or several: alignment, with the stage-1 model's scores as reference.

accelerate launch examples/accelerate_loop.py [MODEL]    # MODEL: a causal LM, normally from stage 1
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import TRIPLETS, tiny

from autoregembed import Decoder, Encoder, alignment_loss


def scores(encoder, decoder, batch):
    """log p(positive | z_query), log p(positive | z_positive), log p(negative | z_query), each (B,)."""
    queries, positives, negatives = ([row[i] for row in batch] for i in range(3))
    z = encoder(queries + positives)
    n = len(batch)
    logprob = decoder.logprob(z, positives * 2 + negatives, [*range(2 * n), *range(n)])
    return logprob.split(n)


def main(name: str | None = None, steps: int = 24, learning_rate: float = 2e-3) -> list[float]:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    name = name or tiny()
    encoder, decoder = Encoder.from_pretrained(name), Decoder.from_pretrained(name, z_norm="match_rms")
    encoder.to(accelerator.device).eval()
    decoder.to(accelerator.device)
    rows = [(i, *encoder.tokenize(row)) for i, row in enumerate(TRIPLETS)]
    with torch.no_grad():
        r_a, _, r_c = scores(encoder, decoder, [row[1:] for row in rows])  # before the first step
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=list)
    encoder, optimizer, loader = accelerator.prepare(encoder.train(), optimizer, loader)
    losses: list[float] = []
    while len(losses) < steps:
        for batch in loader:
            with accelerator.accumulate(encoder):
                a, b, c = scores(encoder, decoder, [row[1:] for row in batch])
                places = [row[0] for row in batch]
                loss = alignment_loss(a, b, c, r_a[places], r_c[places], ref_margin="subtract").loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            accelerator.print(f"step {len(losses):>3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
