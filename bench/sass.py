"""Instructions that a compiled kernel spends on a logit, counted in its machine code (NVIDIA).

A kernel's parts are read off its control flow. The product is the innermost loop with matrix instructions. The epilogue
is what surrounds it: of the loop with the exponentials, everything that is neither the product nor another loop, or,
where the compiler has fused the two loops, the branch with the exponentials. A branch without any, longer than the
logits of a thread, is the one that only the tile of a row's target takes: `usual` leaves it out, `all` does not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

MATRIX = ("HGMMA", "HMMA", "UTCHMMA")
FLOPS_A_CLOCK = {"sm_80": 2048, "sm_86": 1024, "sm_90": 4096, "sm_100": 8192}  # of a multiprocessor, dense, 16 bits
EXPONENTIALS_A_CLOCK = 16
INSTRUCTIONS_A_CLOCK = 4  # of a warp


class Code(NamedTuple):
    names: list[str]  # of each instruction, without predicates and suffixes
    successors: list[list[int]]  # of each instruction; a branch's target is the last

    def tally(self, span: set[int]) -> Counter[str]:
        return Counter(self.names[i] for i in span)

    def loops(self) -> list[set[int]]:
        """The natural loops, the smallest first."""
        found: dict[int, set[int]] = {}
        before: list[list[int]] = [[] for _ in self.names]
        for i, following in enumerate(self.successors):
            for j in following:
                before[j].append(i)
        for end, following in enumerate(self.successors):
            for start in following:
                if start <= end and end not in _reached(self.successors, 0, start):  # start dominates end
                    found[start] = found.get(start, {start}) | _reached(before, end, start)
        return sorted(found.values(), key=len)

    def skipped(self) -> list[set[int]]:
        """What each conditional branch skips, the smallest first."""
        spans = [
            set(range(i + 1, following[1]))
            for i, following in enumerate(self.successors)
            if len(following) == 2 and following[1] > i
        ]
        return sorted(spans, key=len)


def _reached(edges: list[list[int]], start: int, barred: int) -> set[int]:
    """What can be reached from `start` without passing `barred`."""
    seen = set() if start == barred else {start}
    waiting = list(seen)
    while waiting:
        for j in edges[waiting.pop()]:
            if j not in seen and j != barred:
                seen.add(j)
                waiting.append(j)
    return seen


def disassemble(cubin: bytes) -> Code:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> Code:
    """nvdisasm's listing: labels, and lines such as `/*0990*/ @!P0 BRA `(.L_x_3) ;`."""
    labels: dict[str, int] = {}
    found: list[tuple[str, bool, str]] = []  # name, whether under a predicate, label of a branch
    for line in text.splitlines():
        if mark := re.match(r"\s*(\.L\w+):", line):
            labels[mark[1]] = len(found)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)(.*?);", line):
            target = re.search(r"\((\.L\w+)\)", code[3]) if code[2] == "BRA" else None
            found.append((code[2], code[1] is not None or "P" in code[3].split("`")[0], target[1] if target else ""))
    successors = []
    for i, (name, conditional, goal) in enumerate(found):
        leaves = name in ("EXIT", "RET", "BRA") and not conditional
        following = [] if leaves or i + 1 == len(found) else [i + 1]
        successors.append([*following, labels[goal]] if goal and labels[goal] < len(found) else following)
    return Code([name for name, *_ in found], successors)


def parts(code: Code, logits: int) -> dict[str, set[int]]:
    """The spans `product` and `epilogue` of a kernel whose threads hold `logits` of a tile each; `rare` is of both."""
    loops, skips = code.loops(), code.skipped()

    def holds(span: set[int], *names: str) -> int:
        return sum(code.tally(span)[name] for name in names)

    outer = next((loop for loop in loops if holds(loop, "MUFU") >= logits), set())
    fused = next((s for s in skips if s <= outer and holds(s, "MUFU") >= logits and not holds(s, *MATRIX)), None)
    if not any(holds(loop, *MATRIX) and loop < outer for loop in loops) and fused and holds(outer, *MATRIX):
        epilogue, product = fused, outer - fused
    else:
        inner = [loop for loop in loops if loop < outer and not holds(loop, "MUFU")]
        product = next((loop for loop in inner if holds(loop, *MATRIX)), set())
        epilogue = outer.difference(*inner)
    rare: set[int] = set()
    for skip in skips:
        if skip < epilogue and len(skip) > logits and not holds(skip, "MUFU", *MATRIX):
            rare |= skip
    return {"product": product, "epilogue": epilogue, "rare": rare}


def gemm_report(cubin: bytes, part: str, constants: dict[str, Any], warps: int) -> dict[str, float]:
    """Of a GEMM with exponentials: instructions and barriers, and clocks of a multiprocessor for one tile, by its three
    limits: issue, exponentials and, for each 1,024 of depth, the tensor cores."""
    code = disassemble(cubin)
    tile = constants["ROWS"] * constants["COLS"]
    logits = tile // (32 * warps)
    spans = parts(code, logits)
    epilogue, usual = spans["epilogue"], spans["epilogue"] - spans["rare"]
    steps = 1024 / constants["DEPTH"]
    return {
        "all": round(len(epilogue) / logits, 2),
        "usual": round(len(usual) / logits, 2),
        "exponentials": round(code.tally(usual)["MUFU"] / logits, 2),
        "barriers": code.tally(usual)["BAR"],
        "product": len(spans["product"]),
        "issue_clocks": len(usual) * warps // INSTRUCTIONS_A_CLOCK,
        "exponential_clocks": code.tally(usual)["MUFU"] * 32 * warps // EXPONENTIALS_A_CLOCK,
        "product_issue_clocks": round(len(spans["product"]) * steps * warps / INSTRUCTIONS_A_CLOCK),
        "tensor_clocks": round(2 * tile * 1024 / FLOPS_A_CLOCK[part]),
    }


def epilogue_report(cubin: bytes, constants: dict[str, Any], warps: int) -> dict[str, float]:
    """Of `_epilogue`: its two passes along a row are the innermost loops that do arithmetic on a block."""
    code = disassemble(cubin)
    logits = constants["BLOCK"] // (32 * warps)
    loops = code.loops()
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    arithmetic = ("FMUL", "FFMA", "FADD", "HMUL2", "DMUL", "DFMA")
    passes = [loop for loop in innermost if sum(code.tally(loop)[name] for name in arithmetic) >= logits]
    counted = sum(map(len, passes))
    return {
        "all": round(counted / logits, 2),
        "usual": round(counted / logits, 2),
        "passes": len(passes),
        "exponentials": round(sum(code.tally(loop)["MUFU"] for loop in passes) / logits, 2),
        "barriers": sum(code.tally(loop)["BAR"] for loop in passes),
    }
