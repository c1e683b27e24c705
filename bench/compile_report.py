"""Compiles every launch of every kernel for parts that are not here, and prints what came of it: registers, shared
memory, spills, how evenly its programs fill an H100 and, of the head's kernels, the instructions for a logit.

    python -m bench.compile_report [--arch sm_90] [--kernel finish] [--json]

No GPU is needed: the ops' own launchers run on meta tensors, each launch is recorded, and Triton compiles it for the
part. What is compiled is therefore what production would launch, tile table included.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import sass

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call on meta tensors) for every kernel, dtype and option that changes the compiled code."""
    from autoregembed.kernels.triton import alignment_loss, info_nce, score_distillation, segment_sum
    from autoregembed.kernels.triton import linear_logprob as head

    def rows(d, v, dtype, *, bias=False, softcap=None, gradient=True, method=None):
        n = 2048
        y = meta(n, dtype=torch.int64)
        b = meta(v, dtype=dtype) if bias else None
        return lambda: head.forward(meta(n, d, dtype=dtype), meta(v, d, dtype=dtype), y, b, softcap, 1.0, -100,
                                    gradient, method)  # fmt: skip

    for dtype in (BF16, FP16, FP32, FP64):
        for d, v in ((576, 49152), (4096, 128256)):
            if dtype != BF16 and d == 4096:
                continue
            yield f"gradient {dtype} D={d}", rows(d, v, dtype)
            if dtype != FP64:
                yield f"score {dtype} D={d}", rows(d, v, dtype, gradient=False)
            for method in ("shifted", "cublas") if dtype == BF16 else ("shifted",) if dtype == FP32 else ():
                yield f"gradient {dtype} D={d} {method}", rows(d, v, dtype, method=method)
    for gradient, method in ((True, "cublas"), (True, "shifted"), (False, None)):
        yield (
            f"bias, softcap, ragged D, gradient={gradient} {method}",
            rows(636, 50257, BF16, bias=True, softcap=30.0, gradient=gradient, method=method),
        )
    yield (
        "trainable head",
        lambda: head.backward(
            meta(2048, dtype=FP32), meta(2048, 896), meta(32000, 896), meta(2048, dtype=torch.int64), None, None, 1.0,
            -100,
        ),
    )  # fmt: skip
    for dtype in (FP32, FP64):
        yield (
            f"segment_sum {dtype}",
            lambda dtype=dtype: segment_sum.forward(meta(2048, dtype=dtype), meta(65, dtype=torch.int32)),
        )
    for dtype in (BF16, FP32):
        yield (
            f"scale_rows {dtype}",
            lambda dtype=dtype: head.scale_rows(meta(2048, dtype=FP32), meta(2048, 896, dtype=dtype)),
        )

    yield "segment_sum backward", lambda: segment_sum.backward(meta(64, dtype=FP32), meta(65, dtype=torch.int32), 2048)
    for reference, negatives in (("add", "independent"), ("none", "joint")):
        for dtype, m in ((FP32, 7), (FP64, 1), (FP32, 300)):
            a, c = meta(512, dtype=dtype), meta(512, m, dtype=dtype)
            mask = meta(512, m, dtype=torch.bool) if m == 7 else None
            yield (
                f"alignment_loss {reference} {negatives} {dtype} M={m}",
                lambda a=a, c=c, mask=mask, r=reference, n=negatives: alignment_loss.forward(
                    a, a, c, a, c, mask, 0.1, 0.1, r, n
                ),
            )
    yield from pack_cases()
    for dtype in (BF16, FP32, FP64):
        for d, p in ((4096, 16384), (8192, 20000)):
            for gradient in (True, False):
                for ids in (None, meta(p, dtype=torch.int64)):
                    if d == 8192 and (ids is None or not gradient):
                        continue
                    q, passages, y = meta(4096, d, dtype=dtype), meta(p, d, dtype=dtype), meta(4096, dtype=torch.int64)
                    tau = meta(dtype=FP64 if dtype == FP64 else FP32)
                    for trained in (True, False) if gradient else (False,):  # the temperature
                        yield (
                            f"info_nce {dtype} D={d} ids={ids is not None} gradients={gradient}, {trained}",
                            lambda q=q, p=passages, y=y, i=ids, t=tau, g=gradient, h=trained: info_nce.forward(
                                q, p, y, i, t, g, g, h
                            ),
                        )
        if dtype in (BF16, FP32):
            every, pair = "query_to_doc,query_to_query,doc_to_query,doc_to_doc", "query_to_doc,doc_to_query"
            y, tau = meta(4096, dtype=torch.int64), meta(dtype=FP32)
            # Each option with some of the others: their whole product takes a minute of compilation for each part.
            for d, trained, *more in (
                (768, True, "query_to_doc", False, 0.1), (636, False, "query_to_doc", False, 0.1),
                (768, False, every, False, 0.1), (636, True, every, False, 0.1), (768, True, every, False, None),
                (768, False, pair, True, None), (636, True, pair, True, None),
            ):  # fmt: skip
                q, passages = meta(4096, d, dtype=dtype), meta(8196, d, dtype=dtype)
                yield (
                    f"info_nce {dtype} D={d} {more[0].count(',') + 1} margin={more[2]} {trained}",
                    lambda q=q, p=passages, y=y, m=more, tau=tau, t=trained: info_nce.forward(
                        q, p, y, None, tau, True, True, t, *m, "shifted"
                    ),
                )
        work = FP64 if dtype == FP64 else FP32
        for given in (True, False):
            q, passages, s, tau = (
                meta(2048, 896, dtype=dtype), meta(4096, 896, dtype=dtype), meta(2048, 4096, dtype=work),
                meta(dtype=work),
            )  # fmt: skip
            mask, y = (meta(2048, 4096, dtype=torch.bool), meta(2048, dtype=torch.int64)) if given else (None, None)
            yield (
                f"score_distillation {dtype} mask={given}",
                lambda q=q, p=passages, s=s, m=mask, y=y, t=tau, g=given: score_distillation.forward(
                    q, p, s, m, y, None, t, 3.0, 0.5, True, g, g, g
                ),
            )


def pack_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Those of `cases` that take a pack apart or put it together."""
    from autoregembed.kernels.triton import conditional_alignment, pool_last_k, splice

    cu, index = meta(65, dtype=torch.int32), meta(64, dtype=torch.int64)
    for dtype, mean in ((FP32, False), (FP32, True), (FP64, False)):
        x, places = meta(2048, dtype=dtype), (index, index, meta(64, 7, dtype=torch.int64))
        given = meta(64, dtype=dtype), meta(64, dtype=dtype), meta(64, 7, dtype=dtype)
        yield (
            f"conditional_alignment {dtype} mean={mean}",
            lambda x=x, p=places, m=mean, g=given: (
                conditional_alignment.part_scores(x, cu, p, m), conditional_alignment.row_gradients(g, cu, p, m, 2048)
            ),
        )  # fmt: skip
    for dtype in (BF16, FP32, FP64):
        for chosen in (index, None):
            x, z, ids = meta(4096, 896, dtype=dtype), meta(64, 5, 896, dtype=dtype), meta(4096, dtype=torch.int64)
            yield f"pool_last_k {dtype}", lambda x=x, i=chosen: pool_last_k.forward(x, cu, 5, i)
            yield f"pool_last_k backward {dtype}", lambda z=z, i=chosen: pool_last_k.backward(z, cu, i, 4096)
            yield f"splice {dtype}", lambda z=z, x=x, d=ids, i=chosen: splice.forward(z, x, d, cu, i, 1, 1.0)
            yield (
                f"splice backward {dtype}",
                lambda x=x, i=chosen, t=dtype: splice.backward(x, cu, i, 1, 64, 5, t),
            )


def target_of(arch: str):
    from triton.backends.compiler import GPUTarget

    return (
        GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )


def launches(arch: str) -> dict[tuple, tuple[str, Any, dict, float | None]]:
    """Distinct launches on a part: (kernel, signature, constants, options) to (case, source, compile options,
    fill)."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    from autoregembed.kernels.triton import primitives, tiles

    backend = make_backend(target_of(arch))
    found: dict[tuple, tuple[str, Any, dict, float | None]] = {}
    current = ""

    def record(kernel, programs, args, options):
        assert isinstance(kernel, triton.JITFunction), "set TRITON_INTERPRET=0 before Triton is imported"
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = binder(*args, **options)
        compile_options, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, rest
        )
        source = ASTSource(kernel, signature, constants, attributes)
        key = (kernel.__name__, *map(str, (signature, constants, attributes, compile_options)))
        found.setdefault(key, (current, source, compile_options.__dict__, fill(kernel, programs, args, options)))

    with tiles.pretend(arch), primitives.recording(record):
        for name, call in cases():
            current = name
            call()
    return found


def fill(kernel: Any, programs: int, args: tuple, options: dict[str, Any]) -> float | None:
    """Share of the last wave's end at which the programs of a persistent GEMM are busy: tiles over waves · programs."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    if kernel.__name__ not in ("_score", "_emit", "_emit_cosine"):
        return None
    row_blocks, tiles_v = -(-values["N"] // values["ROWS"]), -(-values["V"] // values["COLS"])
    units = row_blocks * values.get("splits", tiles_v)
    return round(units / (-(-units // programs) * programs), 3)


def spills_of(assembly: str) -> dict[str, int]:
    """What AMD's assembly says of itself."""
    names = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    number = {k: int(v) for k, v in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    return {
        "registers": number["vgpr_count"],
        "spills": number["vgpr_spill_count"] + number["private_segment_fixed_size"],
    }


def resources_of(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, from the cubin: local memory is stack that the register file lacks."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", text)))
    return {"registers": registers, "spills": max(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", text)))}


MATRIX = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")


def report(arch: str, kernels: list[str] | None = None) -> list[dict[str, Any]]:
    """A row for each launch, of all kernels or of those with one of these in their names."""
    import triton

    rows = []
    for case, source, options, filled in launches(arch).values():
        if kernels and not any(name in source.fn.__name__ for name in kernels):
            continue
        compiled = triton.compile(source, target=target_of(arch), options=options)
        text = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
        usage = spills_of(text) if arch.startswith("gfx") else resources_of(compiled.asm["cubin"])
        rows.append(
            {
                "arch": arch,
                "kernel": source.fn.__name__,
                "case": case,
                "warps": compiled.metadata.num_warps,
                "shared": compiled.metadata.shared,
                "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
                "matrix": next((name for name in MATRIX if name in text), ""),
                "dot": "tt.dot" in compiled.asm["ttir"],
                "sixteen_bits": any(kind in str(source.signature) for kind in ("*bf16", "*fp16", "<bf16", "<fp16")),
                "bulk_copy": "cp.async.bulk.tensor" in text,
                "fill": filled,
                **usage,
                **counts(source, compiled, arch),
            }
        )
    return rows


def counts(source: Any, compiled: Any, arch: str) -> dict[str, Any]:
    """The instructions for a logit (bench/sass.py), of 16-bit heads without a softcap."""
    name = source.fn.__name__
    constants = {source.fn.arg_names[place[0]]: value for place, value in source.constants.items()}
    if (
        arch.startswith("gfx")
        or name not in ("_score", "_emit", "_emit_cosine", "_epilogue")
        or constants.get("SOFTCAP")
    ):
        return {}
    cubin, warps = compiled.asm["cubin"], compiled.metadata.num_warps
    if name == "_epilogue":
        work = source.signature["z_ptr"]
        return {} if work == "*fp64" else {"sass": sass.epilogue_report(cubin, constants, warps)}
    if "32" in str(source.signature["rows" if name == "_emit_cosine" else "hidden"]):
        return {}
    return {"sass": sass.gemm_report(cubin, arch, constants, warps)}


def main() -> None:
    from autoregembed.kernels.triton import tiles

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=sorted(tiles.ARCHITECTURES))
    parser.add_argument("--kernel", action="append", help="kernels with this in their name alone")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = [row for arch in given.arch or tiles.ARCHITECTURES for row in report(arch, given.kernel)]
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'part':7} {'kernel':16} {'case':52} {'warps':>5} {'regs':>4} {'shared':>7} {'spills':>6}  matrix unit")
    for row in rows:
        print(
            f"{row['arch']:7} {row['kernel'][1:]:16} {row['case'][:52]:52} {row['warps']:5} {row['registers']:4} "
            f"{row['shared']:7} {row['spills']:6}  {row['matrix']}{' + TMA' if row['bulk_copy'] else ''}"
            f"{'' if row['fill'] is None else ', fill ' + str(row['fill'])}"
        )
    print()
    print("SASS: instructions, exponentials and barriers for a logit; clocks of a multiprocessor for a tile")
    print(f"{'part':7} {'kernel':9} {'case':52} {'all':>6} {'usual':>6} {'exp':>5} {'bar':>4} "
          f"{'issue':>6} {'exp':>6} product issue, tensor cores (a depth of 1,024)")  # fmt: skip
    for row in rows:
        if found := row.get("sass"):
            clocks = ("issue_clocks", "exponential_clocks", "product_issue_clocks", "tensor_clocks")
            print(
                f"{row['arch']:7} {row['kernel'][1:]:9} {row['case'][:52]:52} {found['all']:6.2f} "
                f"{found['usual']:6.2f} {found['exponentials']:5.2f} {found['barriers']:4} "
                + " ".join(f"{found[clock]:6}" for clock in clocks if clock in found)
            )


if __name__ == "__main__":
    main()
