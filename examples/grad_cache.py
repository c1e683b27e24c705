"""A batch larger than memory, with negatives by likelihood: which passage does log p(passage | z_query) favour?

`token_budget` bounds the activations of encoder and of decoder; the gradient is that of one pass over the whole batch.
Every negative costs a decoder pass over its passage, so each query gets only HARDEST of them, chosen by cosine.

python examples/grad_cache.py [MODEL]
"""

import sys

import torch
from common import TRIPLETS, tiny

from autoregembed import Decoder, Encoder, generative_info_nce, info_nce
from autoregembed.encoder import text_embedding

HARDEST = 3
ENCODER_TOKENS, DECODER_TOKENS = 128, 64  # per pass; on a GPU, use tens of thousands


def main(name: str | None = None, steps: int = 12, learning_rate: float = 2e-3, device: str = "cpu") -> list[float]:
    torch.manual_seed(0)
    name = name or tiny()
    encoder, decoder = Encoder.from_pretrained(name), Decoder.from_pretrained(name, z_norm="match_rms")
    encoder.to(device).train()
    decoder.to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate)
    queries, positives, negatives = (encoder.tokenize(texts) for texts in zip(*TRIPLETS, strict=True))
    passages = positives + negatives
    n, p = len(queries), len(passages)
    num_tokens = torch.tensor([len(ids) + 1 for ids in passages], device=device)
    losses = []
    for step in range(steps):
        z = encoder(queries + passages, token_budget=ENCODER_TOKENS)
        embedding = text_embedding(z.float())
        cosine = (embedding[:n] @ embedding[n:].T).detach()
        positive = torch.eye(n, p, dtype=torch.bool, device=device)
        places = cosine.masked_fill(positive, -2).topk(HARDEST).indices
        chosen = positive.scatter(1, places, True)  # (B, P)
        query, passage = chosen.nonzero(as_tuple=True)
        flat = decoder.logprob(z, [passages[j] for j in passage], query, token_budget=DECODER_TOKENS)
        scores = flat.new_zeros(n, p).masked_scatter(chosen, flat)
        generative = generative_info_nce(scores, num_tokens=num_tokens, mask=chosen)
        loss = generative + info_nce(embedding[:n], embedding[n:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1:>3}  loss {losses[-1]:.3f}, of it generative {generative.item():.3f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
