"""The CPU backends of linear_logprob beside the bare GEMMs, eager PyTorch and the best torch formulations.

    python bench/bench_linear_logprob_cpu.py --threads 2 --repeat 7

Targets: forward + backward take at most 1.12 of the two bare GEMMs and are 2.3 times faster than eager. The epilogue,
the step between the GEMMs, is at least 4 times faster than the best torch formulation. On rows of all V logits, in
memory, it reaches at least 60% of the bandwidth of an in-place product or a copy of the same logits; on a block as the
op uses it, in cache, arithmetic bounds it. Where the processor has a matrix unit for bf16 (AMX), the head in bf16 takes
at most 0.6 of the two fp32 GEMMs.

Unlike `autoregembed bench`, this command leaves glibc's allocator as it is, so eager pays page faults for its logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from autoregembed.bench.harness import GEMM_ONLY, OURS, Case, ForwardBackward, Inputs, Machine, Variant, gemm_only, run
from autoregembed.bench.results import table
from autoregembed.kernels.native import linear_logprob as cpp
from autoregembed.kernels.torch import linear_logprob as portable
from autoregembed.reference import linear_logprob as specification

SHAPES = ((1536, 576, 49152), (512, 2048, 128256))
Blocks = tuple[int, int]  # rows and columns


def _log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax(hidden @ weight.T, 1).gather(1, target[:, None]).squeeze(1)


def _logsumexp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)


def _cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight), target, reduction="none")


@contextmanager
def _block_shape(blocks: Blocks | None):
    usual = portable.block_shape
    if blocks is not None:
        portable.block_shape = lambda *_: blocks
    try:
        yield
    finally:
        portable.block_shape = usual


def linear_logprob_case(n: int, d: int, v: int, rounds: int, blocks: list[Blocks], dtype: torch.dtype) -> Case:
    """`dtype` is that of the operands; the bare GEMMs are in fp32 whatever it is."""

    def make() -> Inputs:
        torch.manual_seed(0)
        hidden, weight, target = torch.randn(n, d), torch.randn(v, d) * (3 / d**0.5), torch.randint(v, (n,))
        return Inputs([hidden.to(dtype)], (weight.to(dtype), target), torch.randn(n))

    def fused(backend, blocks: Blocks | None) -> Variant:
        def build() -> Callable[[], tuple[Tensor, Tensor]]:
            (hidden,), (weight, target), upstream = job.inputs()

            def call() -> tuple[Tensor, Tensor]:
                with _block_shape(blocks):
                    logprob, u = backend.forward(hidden, weight, target, None, None, 1.0, -100, True)
                return logprob, u * upstream[:, None]

            return call

        return Variant(build)

    def operands() -> tuple[Tensor, Tensor]:
        leaves, constants, _ = job.inputs()
        return leaves[0].float(), constants[0].float()

    job = ForwardBackward(make, specification, 1e-4 if dtype == torch.float32 else 2e-2)
    eager = {"log_softmax": _log_softmax, "logsumexp": _logsumexp, "cross_entropy": _cross_entropy}
    variants = {GEMM_ONLY: gemm_only(operands, 2)}
    variants |= {f"eager {name}": job.variant(lambda f=f: f) for name, f in eager.items()}
    variants |= {f"{OURS} (cpp), blocks {r} x {c}": fused(cpp, (r, c)) for r, c in blocks}
    variants |= {f"{OURS} (cpp)": fused(cpp, None), f"{OURS} (torch)": fused(portable, None)}
    rows, columns = portable.block_shape(torch.device("cpu"), n, v, d, 4)
    return Case(
        op="linear_logprob", shape={"N": n, "D": d, "V": v}, inputs=f"Gaussian {dtype}, blocks {rows} x {columns}",
        variants=variants, flops=4.0 * n * v * d, bytes=8.0 * (v * d + n * d), check=job.check,
        relative_to="eager log_softmax", rounds=rounds, device="cpu",
    )  # fmt: skip


def epilogue_case(rows: int, v: int, rounds: int, cold: bool) -> Case:
    """All variants use the same logits z, which those in place overwrite; the values stay finite."""
    torch.manual_seed(0)
    z, target = torch.randn(rows, v) * 3, torch.randint(v, (rows,))
    copy, ones = torch.empty_like(z), torch.ones(rows, 1)

    def log_softmax() -> Tensor:
        logprob = torch.log_softmax(z, 1)
        picked = logprob.gather(1, target[:, None])
        logprob.exp_().neg_().scatter_add_(1, target[:, None], ones)
        return picked

    def softmax_in_place() -> Tensor:
        picked = z.gather(1, target[:, None]) - z.logsumexp(1, keepdim=True)
        torch.softmax(z, 1, out=z)
        z.scatter_add_(1, target[:, None], -ones)
        return picked

    def cross_entropy() -> None:
        F.cross_entropy(z.detach().requires_grad_(), target, reduction="sum").backward()

    def block(step: portable.SoftmaxBlock, level: str | None = None) -> Callable[[], object]:
        def call() -> None:
            if level:
                cpp.extension.set_level(level)
            step(z, target, portable.State.start(rows, z.device), None, None, 1.0, torch.float32)

        return call

    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: copy.copy_(z),
        "in-place product": lambda: z.mul_(1.0),
        "log_softmax, exp, scatter": log_softmax,
        "logsumexp, softmax in place": softmax_in_place,
        "autograd of cross_entropy": cross_entropy,
        f"{OURS} (torch)": block(portable.softmax_block),
        **{f"{OURS} (cpp, {level})": block(cpp.softmax_block, level) for level in cpp.extension.levels()},
    }
    return Case(
        op="epilogue", job="forward", shape={"R": rows, "V": v}, inputs="in memory" if cold else "in cache",
        variants={name: Variant(lambda f=f: f) for name, f in calls.items()},
        flops=0.0, bytes=2.0 * z.nbytes, relative_to="copy", rounds=rounds, device="cpu", cold=cold,
    )  # fmt: skip


def product_case(rows: int, columns: int, d: int, rounds: int) -> Case:
    """A block of logits from bf16 operands; torch's own bf16 product rounds them, so it is no peer but a bound."""
    torch.manual_seed(0)
    h, w = torch.randn(rows, d).bfloat16(), torch.randn(columns, d).bfloat16()
    h32, w32, z, z16 = h.float(), w.float(), torch.empty(rows, columns), torch.empty(rows, columns).bfloat16()

    calls: dict[str, Callable[[], object]] = {
        GEMM_ONLY: lambda: torch.mm(h32, w32.t(), out=z),
        "widened, then in fp32": lambda: torch.mm(h.float(), w.float().t(), out=z),
        "bf16 into bf16": lambda: torch.mm(h, w.t(), out=z16),
        f"{OURS} (cpp)": lambda: cpp.Logits(h)(w, z),
    }
    return Case(
        op="product of bf16", job="forward", shape={"R": rows, "C": columns, "D": d}, inputs="in cache",
        variants={name: Variant(lambda f=f: f) for name, f in calls.items()},
        flops=2.0 * rows * columns * d, bytes=2.0 * d * (rows + columns) + z.nbytes,
        relative_to="widened, then in fp32", rounds=rounds, device="cpu",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", nargs="*", default=[], metavar="ROWSxCOLUMNS", help="other blocks, to tune")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help=f"which of {SHAPES}")
    parser.add_argument("--only", choices=("linear_logprob", "epilogue", "product"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    console = Console()
    console.print(f"torch {torch.__version__}, {options.threads} threads, cpp{cpp.describe()}")
    machine = Machine.measure("cpu", [torch.float32])
    blocks = [(int(rows), int(columns)) for rows, columns in (block.split("x") for block in options.blocks)]
    for n, d, v in (SHAPES[i] for i in options.shapes):
        cases = []
        r, c = portable.block_shape(torch.device("cpu"), n, v, d, 4)
        if options.only in (None, "epilogue"):
            cases += [epilogue_case(r, c, max(options.repeat, 9), cold=False)]
            cases += [epilogue_case((16 << 20) // v, v, max(options.repeat, 9), cold=True)]
        if options.only in (None, "product") and cpp.PRODUCT_OF_BF16:
            cases += [product_case(r, c, d, options.repeat)]
        if options.only in (None, "linear_logprob"):
            dtypes = [torch.float32, *([torch.bfloat16] if cpp.MULTIPLIES_BF16 else [])]
            cases += [linear_logprob_case(n, d, v, options.repeat, blocks, dtype) for dtype in dtypes]
        for case in cases:
            for line in table([asdict(row) for row in run(case, machine, memory=False)]):
                console.print(line)
            cpp.extension.set_level(cpp.extension.levels()[0])


if __name__ == "__main__":
    main()
