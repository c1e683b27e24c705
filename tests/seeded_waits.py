"""Does tests/test_no_wait.py notice? One wait for the device, put into each file of a step in turn.

    python tests/seeded_waits.py [substring of a file's name]

Prints one line a file and exits with the number of survivors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# A file, a line of it, and the wait that goes before that line.
WAITS = [
    ("autoregembed/encoder.py", "        return pool_last_k(hidden", "hidden.sum().item()"),
    ("autoregembed/encoder.py", "    return F.normalize(z.mean(1)", "float(z.sum())"),
    ("autoregembed/decoder.py", "        if self.logprob_reduction", "scores.tolist()"),
    ("autoregembed/decoder.py", "        work = torch.promote_types(z.dtype", "bool(z.isnan().any())"),
    ("autoregembed/passes.py", "            index = index_on(z.device, microbatch)", "z.sum().item()"),
    ("autoregembed/passes.py", "            index = index_on(z.device, places)", "z[places]"),
    ("autoregembed/passes.py", "            rows = z[index].detach", "torch.tensor([0, 1], device=z.device)"),
    ("autoregembed/prefixes.py", "    return SharedPrefixes(", "torch.arange(len(sizes)).to(device)"),
    ("autoregembed/prefixes.py", "        own = grad.index_select", "grad.sum().item()"),
    ("autoregembed/attention.py", "    window = kwargs.get", "cu_seqlens.tolist()"),
    ("autoregembed/attention.py", "    runs = (kwargs", "kwargs.pop(LENGTHS)"),
    ("autoregembed/attention.py", "    options = {} if layer_type is None", "position_ids.max().item()"),
    ("autoregembed/packing.py", "    return Packed(", "cu.to(device)"),
    ("autoregembed/objective.py", "    c = scores.new_zeros", "mask.to(scores.device)"),
    ("autoregembed/objective.py", "        query, others = embeddings.tensor_split", "embeddings.nonzero()"),
    ("autoregembed/embedding_losses.py", "    first, passage_ids = 0, None", "query.sum().item()"),
    ("autoregembed/cuda_graphs.py", "        found |= {", "loss.item()"),
    ("autoregembed/cuda_graphs.py", "            assert inputs.places is not None", "torch.ones(3).to(z.device)"),
    ("autoregembed/ops/linear_logprob.py", "    if ctx.with_gradient:", "grad.sum().item()"),
    ("autoregembed/ops/alignment_loss.py", '    return load_kernel("triton"', "int(query_positive.sum())"),
    ("autoregembed/ops/info_nce.py", "    kernel = load_kernel(impl", "query.sum().item()"),
    ("autoregembed/ops/splice.py", '    return load_kernel("triton", "splice").backward', "grad[grad > 0]"),
    ("autoregembed/ops/pool_last_k.py", '    return load_kernel("triton", "pool_last_k").forward', "hidden.cpu()"),
    ("autoregembed/ops/segment_sum.py", "    return _segment_sum(x", "cu_seqlens.max().item()"),
    ("autoregembed/ops/_checks.py", "    if x.shape[0] == 0:", "x.max().item()"),
    ("autoregembed/ops/_dispatch.py", "    return importlib", "torch.ones(1, device='meta').item()"),
    ("autoregembed/ops/conditional_alignment.py", "    parts = query_positive", "hidden.sum().item()"),
    ("autoregembed/ops/conditional_compression.py", "        return (logprob.sum", "logprob.sum().item()"),
    ("autoregembed/ops/score_distillation.py", "    wanted = query_gradient", "scores.sum().item()"),
    ("autoregembed/derivatives.py", "            return backward(ctx", "grads[0].sum().item()"),
    ("autoregembed/distributed.py", "    return x.full_tensor()", "x.sum().item()"),
    ("autoregembed/models.py", '    if hasattr(model, "get_base_model")', "next(model.parameters()).sum().item()"),
    ("autoregembed/config.py", "        return self.alignment_weight > 0 and self.ref_margin",
     "__import__('torch').ones(1, device='meta').item()"),
    ("autoregembed/modalities.py", "    return model.config.get_text_config()",
     "next(model.parameters()).sum().item()"),
    ("autoregembed/probe.py", "    if longest <= verified", "next(model.parameters()).sum().item()"),
    ("autoregembed/train.py", "        norm = log.pop", "found['grad_norm'].item()"),
    ("autoregembed/integrations/transformers.py", "        loss = world * terms", "max(terms, 1)"),
    ("kernels/torch/info_nce.py", "    return rows_per_chunk", "query.sum().item()"),
    ("kernels/torch/linear_logprob.py", "    budget = CHUNK_BYTES", "torch.ones(1, device=device).item()"),
    ("kernels/triton/conditional_alignment.py", "    scores = logprob.new_empty", "places[2].max().item()"),
    ("kernels/triton/alignment_loss.py", "    b, m = query_negatives", "query_negatives.max().item()"),
    ("kernels/triton/pool_last_k.py", "    outputs = b if", "hidden.sum().item()"),
    ("kernels/triton/score_distillation.py", "    q_scale = q_inverse", "query.sum().item()"),
    ("kernels/triton/segment_sum.py", "    out = x.new_empty", "cu_seqlens.max().item()"),
    ("kernels/triton/tiles.py", "    part = architecture", "torch.ones(1, device=device).item()"),
    ("kernels/triton/linear_logprob.py", "    n, d = u.shape", "grad.sum().item()"),
    ("kernels/triton/info_nce.py", "    query, passages, target = dense(query)", "target.max().item()"),
    ("kernels/triton/cosines.py", "    parts = _parts(p, n)", "z_y.sum().item()"),
    ("kernels/triton/splice.py", "    embedding = embedding if", "ids.max().item()"),
    ("kernels/triton/primitives.py", "    values, order = index.sort", "index.max().item()"),
]  # fmt: skip


def caught(file: str, line: str, wait: str) -> bool:
    """Whether the dry run fails with the wait in place (in a fork: this process stays as it is)."""
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        for name in ("autoregembed", "kernels", "bench"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        source = (Path(folder) / file).read_text(encoding="utf-8")
        if line not in source:
            raise SystemExit(f"the line is not in {file}: {line!r}")
        indent = " " * (len(line) - len(line.lstrip()))
        (Path(folder) / file).write_text(source.replace(line, f"{indent}{wait}\n{line}"), encoding="utf-8")
        child = os.fork()
        if child == 0:
            sys.path.insert(0, folder)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k", "not every_file"]
                code = pytest.main([*options, str(TESTS / "test_no_wait.py")])
            os._exit(int(code))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise SystemExit(f"{file}: pytest answered {code}")
    return code == 1


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers  # noqa: F401

    survivors = 0
    for wait in WAITS:
        if not sys.argv[1:] or sys.argv[1] in " ".join(wait):
            found = caught(*wait)
            survivors += not found
            print(f"{'caught' if found else 'SURVIVED':9} {wait[0]}: {wait[2]}", flush=True)
    print(f"{survivors} survived")
    return survivors


if __name__ == "__main__":
    raise SystemExit(main())
