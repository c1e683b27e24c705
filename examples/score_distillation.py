"""Score distillation in plain PyTorch: cosines learn from the likelihoods of a frozen stage-1 model, without labels.

python examples/score_distillation.py [STAGE-1 MODEL]
"""

import sys

import torch
from common import TRIPLETS, tiny
from datasets import Dataset
from rich.console import Console

from autoregembed import Decoder, Encoder, data, score_distillation
from autoregembed.encoder import text_embedding
from autoregembed.teacher_scores import block_scores

BLOCK = 6  # texts that are scored together and form a batch


def main(name: str | None = None, steps: int = 24, learning_rate: float = 1e-3, device: str = "cpu") -> list[float]:
    torch.manual_seed(0)
    name = name or tiny()
    encoder, decoder = Encoder.from_pretrained(name, device=device), Decoder.from_pretrained(name, device=device)
    texts = Dataset.from_list([{"text": text} for row in TRIPLETS for text in row])
    rows = data.text_rows(texts, encoder.prompt)
    # (4 blocks, 6, 6) nats: log p(text j | z of text i) by the encoder at the start, cached by `datasets`.
    blocks, scores = block_scores(encoder.eval(), decoder, encoder.tokenizer, rows, BLOCK, console=Console())
    unpaired = ~torch.eye(BLOCK, dtype=torch.bool, device=device)  # a text is not scored under its own z
    optimizer = torch.optim.AdamW(encoder.train().parameters(), lr=learning_rate)
    losses = []
    for step in range(steps):
        i = step % len(blocks)
        batch = rows.select(blocks[i]).to_list()
        z = encoder([row["query_ids"] for row in batch], [row["suffix_ids"] for row in batch])  # (6, K, D)
        e = text_embedding(z)
        loss = score_distillation(e, e, scores[i].to(device), mask=unpaired)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1:>3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
