"""The native CPU head against its floor, eager PyTorch and the best torch formulations.

All contenders run in one process, interleaved; the table has medians and ratios. Bars: forward + backward at most 1.12
of the two bare GEMMs and 2.3 times faster than eager; the epilogue at least 4 times faster than the best torch
formulation and at 60% or more of the bandwidth that an in-place product or a copy of the same logits reaches: on a
block as the head uses it, in cache, and on rows of all V logits, in memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from autoregembed.kernels.native import linear_logprob as native
from autoregembed.kernels.torch import linear_logprob as torch_route

SHAPES = ((1536, 576, 49152), (512, 2048, 128256))


def measure(contenders: dict[str, Callable], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, one warm-up before, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeat + 1):
        for name, function in contenders.items():
            start = clock()
            function()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def head(n: int, d: int, v: int, repeat: int, clock: Callable[[], float], blocks: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(n, d), torch.randn(v, d) * (3 / d**0.5), torch.randint(v, (n,))
    z, u, g = torch.empty(n, v), torch.empty(n, d), torch.randn(n)

    def gemms():
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=u)

    def eager():
        h = hidden.detach().requires_grad_()
        logits = F.linear(h, weight)
        (logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1)).backward(g)

    def log_softmax():
        h = hidden.detach().requires_grad_()
        F.log_softmax(h @ weight.T, 1).gather(1, target[:, None]).squeeze(1).backward(g)

    def cross_entropy():
        h = hidden.detach().requires_grad_()
        F.cross_entropy(F.linear(h, weight), target, reduction="none").backward(g)

    def fused(route, shape):
        def run():
            if shape:
                torch_route.block_shape = lambda *_: shape
            _, gradient = route.forward(hidden, weight, target, None, None, 1.0, -100, True)
            torch_route.block_shape = usual
            return gradient * g[:, None]

        return run

    usual = torch_route.block_shape
    default = usual(hidden.device, n, v, d, 4)
    contenders = {"two bare GEMMs": gemms, "eager log_softmax": log_softmax, "eager logsumexp": eager}
    contenders["eager cross_entropy"] = cross_entropy
    contenders |= {f"native, blocks {r} x {c}": fused(native, (r, c)) for r, c in blocks}
    contenders |= {f"native, {default[0]} x {default[1]}": fused(native, None), "torch route": fused(torch_route, None)}
    times = measure(contenders, repeat, clock)
    floor, peer = times["two bare GEMMs"], times["eager log_softmax"]
    print(f"\nhead, forward + backward, fp32, N={n} D={d} V={v}")
    for name, seconds in times.items():
        ratios = f"{seconds / floor:5.2f} of GEMMs  eager log_softmax / this {peer / seconds:5.2f}"
        print(f"  {name:28} {seconds * 1e3:9.1f} ms  {ratios}")


def epilogue(rows: int, v: int, repeat: int, clock: Callable[[], float]) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(rows, v) * 3, torch.randint(v, (rows,))
    z = logits.clone()

    def log_softmax():
        logprob = torch.log_softmax(z, 1)
        picked = logprob.gather(1, target[:, None])
        e = logprob.exp_().neg_()
        e.scatter_add_(1, target[:, None], torch.ones(rows, 1))
        return picked

    def softmax_in_place():
        picked = z.gather(1, target[:, None]) - z.logsumexp(1, keepdim=True)
        torch.softmax(z, 1, out=z)
        z.scatter_add_(1, target[:, None], -torch.ones(rows, 1))
        return picked

    def cross_entropy():
        x = z.detach().requires_grad_()
        F.cross_entropy(x, target, reduction="sum").backward()

    def torch_block():
        torch_route.softmax_block(z, target, torch_route.State.start(rows, z.device), None, None, 1.0, torch.float32)

    torch_forms = {
        "log_softmax, exp, scatter": log_softmax,
        "logsumexp, softmax in place": softmax_in_place,
        "autograd of cross_entropy": cross_entropy,
        "torch route": torch_block,
    }
    copy = torch.empty_like(z)
    floors = {"copy": lambda: copy.copy_(z), "in-place product": lambda: z.mul_(1.0)}
    kernels = {f"native {level}": level for level in native.extension.levels()}

    def at(level):
        def run():
            native.extension.set_level(level)
            native.softmax_block(z, target, torch_route.State.start(rows, z.device), None, None, 1.0, torch.float32)

        return run

    times: dict[str, list[float]] = {}
    contenders = {**floors, **torch_forms, **{name: at(level) for name, level in kernels.items()}}
    for turn in range(repeat + 1):
        for name, function in contenders.items():
            z.copy_(logits)
            start = clock()
            function()
            if turn:
                times.setdefault(name, []).append(clock() - start)
    native.extension.set_level(native.extension.levels()[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = max(2 * z.nbytes / medians[name] for name in floors)
    best = min(medians[name] for name in torch_forms)
    print(f"\nepilogue alone, fp32, R={rows} V={v}: {bandwidth / 1e9:.1f} GB/s measured")
    for name, seconds in medians.items():
        share = 2 * z.nbytes / seconds / bandwidth
        print(
            f"  {name:28} {seconds * 1e3:9.2f} ms  {share:5.0%} of bandwidth  best torch / this {best / seconds:5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", nargs="*", default=[], metavar="ROWSxCOLUMNS", help="other blocks, to tune")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for one thread on a busy machine")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help=f"which of {SHAPES}")
    parser.add_argument("--only", choices=("head", "epilogue"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {options.threads} threads, {native.extension.build_info()}, {clock.__name__}")
    blocks = [(int(rows), int(columns)) for rows, columns in (block.split("x") for block in options.blocks)]
    for n, d, v in (SHAPES[i] for i in options.shapes):
        if options.only != "head":
            for rows, columns in (torch_route.block_shape(torch.device("cpu"), n, v, d, 4), ((16 << 20) // v, v)):
                epilogue(rows, columns, max(options.repeat, 9), clock)
        if options.only != "epilogue":
            head(n, d, v, options.repeat, clock, blocks)


if __name__ == "__main__":
    main()
