"""Stage 1, information compression, in plain PyTorch: trains z until the frozen decoder can write the text from it.

python examples/plain_pytorch.py [MODEL]
"""

import sys

import torch
from common import TRIPLETS, tiny

from autoregembed import Decoder, Encoder, compression_loss


def main(name: str | None = None, steps: int = 20, learning_rate: float = 3e-3, device: str = "cpu") -> list[float]:
    torch.manual_seed(0)
    name = name or tiny()
    encoder, decoder = Encoder.from_pretrained(name), Decoder.from_pretrained(name, z_norm="match_rms")
    encoder.to(device).train()
    decoder.to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate)
    texts = encoder.tokenize([text for row in TRIPLETS for text in row])
    losses = []
    for step in range(steps):
        batch = [texts[i] for i in torch.randperm(len(texts))[:8]]
        z = encoder(batch)  # (8, K, D): one packed pass, no padding
        logprob = decoder.logprob(z, batch)  # (8,) nats: log p(text | z), no logits in memory
        loss = compression_loss(logprob, decoder.num_tokens(batch))  # nats per token
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1:>3}  loss {losses[-1]:.3f} nats per token")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
