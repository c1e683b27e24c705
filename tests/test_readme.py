"""The README's examples run as they stand."""

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_drop_in_gives_the_numbers_and_gradients_that_it_replaces():
    before, after = (example for example in EXAMPLES if "hidden" in example)
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4]
    names = {
        "torch": torch,
        "lengths": lengths,
        "cu_seqlens": torch.tensor([0, 3, 4, 8]),
        "weight": torch.randn(50, 16, generator=generator),
        "target": torch.randint(50, (8,), generator=generator),
    }
    hidden = torch.randn(8, 16, generator=generator)
    results = []
    for code in (before, after):
        scope = {**names, "hidden": hidden.clone().requires_grad_()}
        exec(code, scope)
        (scope["score"] * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        results.append((scope["score"].detach(), scope["hidden"].grad))
    for old, new in zip(*results, strict=True):
        assert old.abs().max() > 1
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_the_step_on_any_causal_lm(model_folder):
    (code,) = (example for example in EXAMPLES if "alignment_loss" in example)
    scope = {"NAME": model_folder}
    exec(code, scope)
    assert isinstance(scope["model"], type(AutoModelForCausalLM.from_pretrained(model_folder)))
    assert 0 < scope["loss"].item() < 10
    gradient = scope["model"].get_input_embeddings().weight.grad
    assert gradient[scope["first"] :].abs().min() > 0, "every compress token is trained"
    assert all(p.grad is None for p in scope["decoder"].parameters())
