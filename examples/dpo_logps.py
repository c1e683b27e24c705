"""DPO's chosen_logps and rejected_logps from hidden states: no (batch, length, V) logits, and no scores for prompts.

The batch has the form of TRL's DataCollatorForPreference (chosen completions, then rejected), and the results equal
those of its trainer. Forward and backward cost two GEMMs with a frozen head (adapters on the body), four otherwise.

python examples/dpo_logps.py [MODEL]
"""

import copy
import sys

import torch
import torch.nn.functional as F
from common import TRIPLETS, tiny

from autoregembed import linear_logprob
from autoregembed.models import base_model, load_causal_lm


def logps(model, input_ids, attention_mask, completion_mask):  # each (2B, L)
    """(chosen_logps, rejected_logps), each (B,): sums over the completion's tokens, nats."""
    hidden = base_model(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    completion = completion_mask[:, 1:].bool()  # position t scores token t + 1
    head = model.get_output_embeddings()
    sums = linear_logprob(
        hidden[:, :-1][completion],  # (N, D), completion tokens only
        head.weight,
        input_ids[:, 1:][completion],
        bias=head.bias,
        softcap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
        cu_seqlens=F.pad(completion.sum(1).cumsum(0), (1, 0)),
    )
    return sums.chunk(2)


def main(name: str | None = None, steps: int = 10, beta: float = 0.1, learning_rate: float = 1e-3) -> list[float]:
    model, tokenizer, _ = load_causal_lm(name or tiny())
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    prompt, chosen, rejected = (tokenizer([row[i] for row in TRIPLETS])["input_ids"] for i in range(3))
    rows = [torch.tensor([*p, *c]) for p, c in zip(prompt * 2, chosen + rejected, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    length = torch.tensor([len(row) for row in rows])[:, None]
    position = torch.arange(input_ids.shape[1])
    attention_mask = (position < length).long()
    completion_mask = attention_mask * (position >= torch.tensor([[len(p)] for p in prompt * 2]))
    batch = (input_ids, attention_mask, completion_mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    with torch.no_grad():
        reference_chosen, reference_rejected = logps(reference, *batch)
    losses = []
    for step in range(steps):
        chosen_logps, rejected_logps = logps(model, *batch)
        margin = (chosen_logps - reference_chosen) - (rejected_logps - reference_rejected)
        loss = -F.logsigmoid(beta * margin).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1:>3}  loss {losses[-1]:.3f}  chosen above rejected {(margin > 0).float().mean():.2f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
