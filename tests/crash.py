"""Runs that save at every step, against `kill -9`, failing disks and flipped bits.

    python tests/crash.py                           # in full: 1,000 trials with kills, every fault, 1,000 damages
    python tests/crash.py --trials 8 --faults 12 --full-disks 3 --damages 200

After every accident each checkpoint in sight must verify, and the run that resumes must end in the bits of one that
nothing befell: parameters, optimiser, generators, log, exported model. Exits with 1 and keeps the folder otherwise.

Trials are forked from a process that has imported everything and computed nothing, so none of them waits for imports
and none inherits threads.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import datasets
import peft  # noqa: F401
import sentence_transformers.sentence_transformer.modules  # noqa: F401
import torch
import transformers.modeling_utils
from conftest import sentence, write_jsonl
from rich.console import Console
from safetensors import SafetensorError

from autoregembed import checkpoint, models
from autoregembed.config import Config
from autoregembed.testing import tiny_model, tiny_tokenizer
from autoregembed.train import train

STEPS = 6
COMMON = {
    "max_steps": STEPS,
    "batch_size": 4,
    "precision": "fp32",
    "save_steps": 1,
    "resume_from_checkpoint": True,
    "learning_rate": 1e-3,
}


def prepare(folder: Path) -> None:
    tokenizer = tiny_tokenizer([sentence(i, 12) for i in range(50)])
    model = tiny_model(vocab_size=len(tokenizer), attention_dropout=0.1)  # steps draw random numbers
    models.save_model(folder / "lm", model, tokenizer, {})
    (folder / "lm" / models.RECIPE).unlink()
    texts = [sentence(i, 4 + i % 7) for i in range(60)]
    write_jsonl(folder / "one.jsonl", [{"context": t, "output": t} for t in texts])
    triplets = [{"query": texts[i], "pos": texts[i + 1], "neg": texts[i + 2 : i + 3 + i % 2]} for i in range(20)]
    write_jsonl(folder / "two.jsonl", triplets)
    pairs = [{"sentence1": texts[i], "sentence2": texts[i + 1], "score": i % 5} for i in range(8)]
    write_jsonl(folder / "sts.jsonl", pairs)


def config(folder: Path, stage: int, out: Path) -> Config:
    """Stage 1 with every parameter; stage 2 with adapters, cut steps, evaluation and the best model kept."""
    fields = {"stage": stage, "model": str(folder / "lm"), "output_dir": str(out), **COMMON}
    if stage == 1:
        return Config(**fields, train_data=str(folder / "one.jsonl"))
    return Config(
        **fields, train_data=str(folder / "two.jsonl"), lora_rank=2, contrastive_weight=0.5, hard_negatives=True,
        token_budget=90, eval_data=str(folder / "sts.jsonl"), eval_steps=2, save_best=True,
    )  # fmt: skip


def bits(out: Path) -> dict[str, str]:
    """Hashes of all that a run leaves but times, memory and places."""
    names = ["model/model.safetensors", "export/model.safetensors"]
    names += [f"checkpoints/step-{STEPS:08d}/{n}.safetensors" for n in ("trainable", "optimizer", "rng")]
    names += ["adapter/adapter_model.safetensors"]
    found = {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in names if (out / n).exists()}
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in log:
        del row["tokens_per_second"], row["memory_gb"]
    summary = json.loads((out / "summary.json").read_text())
    for name in ("train_seconds", "model", "export"):
        summary.pop(name, None)
    return {**found, "log": repr(log), "summary": repr(summary)}


def start(function, *arguments) -> int:
    """Forks; the child exits with 0, or with 3 for an OSError, 4 for anything else."""
    child = os.fork()
    if child:
        return child
    status = 4
    try:
        function(*arguments)
        status = 0
    except OSError as error:
        status = 3
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, stage: int, out: Path) -> None:
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    train(config(folder, stage, out), Console(quiet=True))


def check_whole(out: Path) -> int:
    """The newest step saved; AssertionError where anything in sight is not whole."""
    states = sorted((out / "checkpoints").glob("step-*"))
    for state in states:
        assert checkpoint.verify(state) is None, f"{state}: {checkpoint.verify(state)}"
    for line in (out / "summary.json", out / "config.json"):
        if line.exists():
            json.loads(line.read_text())
    for name, files in {"model": ("config.json", models.RECIPE), "export": ("modules.json", "config.json")}.items():
        if (out / name).exists():
            for file in (*files, "model.safetensors", "tokenizer.json"):
                assert (out / name / file).stat().st_size > 0
    return int(states[-1].name[5:]) if states else 0


def check_same(out: Path, wanted: dict[str, str]) -> None:
    found = bits(out)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    different = [name for name in wanted if wanted[name] != found[name]]
    assert not different, f"{different}: {[(wanted[n], found[n]) for n in different if n in ('log', 'summary')]}"
    left = [p.name for p in (*out.glob(".*"), *out.glob("checkpoints/.*"))]
    assert not left, f"left over: {left}"
    assert len(list(out.glob("checkpoints/step-*"))) == 2, list(out.glob("checkpoints/*"))


def kills(folder: Path, trials: int, wanted: dict, seconds: dict, draw: random.Random) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    for trial in range(trials):
        stage, out = 1 + trial % 2, folder / f"kill-{trial}"
        for _ in range(1 if draw.random() < 0.6 else draw.randint(2, 4)):
            child = start(run, folder, stage, out)
            time.sleep(draw.uniform(0, 1.05 * seconds[stage]))
            os.kill(child, signal.SIGKILL)
            counts["kills"] += end(child) == -signal.SIGKILL
            counts[f"resumed from step {check_whole(out)}"] += 1
        status = end(start(run, folder, stage, out))
        assert status == 0, f"the resumed run ended with {status}"
        check_same(out, wanted[stage])
        shutil.rmtree(out)
        counts["trials"] += 1
        if counts["trials"] % 100 == 0:
            print(json.dumps(counts), flush=True)
    return counts


class Fault:
    """Lets the n-th write, flush or rename of a run fail: that one alone (EIO), or from there on (ENOSPC)."""

    def __init__(self, out: Path, place: int, number: int):
        self.out, self.place, self.number, self.seen = str(out), place, number, 0
        for owner, name in (
            (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (checkpoint, "save_file"),
            (transformers.modeling_utils, "safe_save_file"),
        ):  # fmt: skip
            setattr(owner, name, self.wrap(getattr(owner, name), name))
        import builtins
        import io

        builtins.open = io.open = self.wrap(open, "open")

    def wrap(self, function, name: str):
        def wrapped(*args, **kwargs):
            mine = name == "fsync" or any(str(a).startswith(self.out) for a in args[:2] if isinstance(a, str | Path))
            if name == "open" and mine:
                mine = any(letter in str(kwargs.get("mode", args[1] if len(args) > 1 else "r")) for letter in "wax+")
            if mine:
                self.seen += 1
                if self.seen == self.place or (self.seen > self.place and self.number == errno.ENOSPC):
                    text = os.strerror(self.number)
                    raise SafetensorError(f"I/O error: {text}") if "save" in name else OSError(self.number, text)
            return function(*args, **kwargs)

        return wrapped


def run_with_fault(folder: Path, stage: int, out: Path, place: int, number: int) -> None:
    fault = Fault(out, place, number)
    try:
        run(folder, stage, out)
    finally:
        os.write(os.open(folder / "seen", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), str(fault.seen).encode())


def faults(folder: Path, limit: int | None, wanted: dict) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    for stage in (1, 2):
        out = folder / "fault"
        assert end(start(run_with_fault, folder, stage, out, 10**9, errno.EIO)) == 0
        check_same(out, wanted[stage])
        shutil.rmtree(out)
        total = int((folder / "seen").read_text())
        counts["places where a write can fail"] += total
        chosen = [(p, n) for p in range(1, total + 1) for n in (errno.EIO, errno.ENOSPC)]
        step = 1 if limit is None else 2 * len(chosen) // limit | 1  # odd: errors alternate
        for place, number in chosen[::step]:
            status = end(start(run_with_fault, folder, stage, out, place, number))
            name = errno.errorcode[number]
            # 0: a call whose failure does no harm, such as making a folder that is there.
            assert status in (0, 3), f"stage {stage}, {name} at call {place}: status {status}, expected an OSError"
            if status == 0:
                check_same(out, wanted[stage])
                counts["harmless"] += 1
            if out.exists():
                check_whole(out)
                left = [p for p in out.rglob(".*") if number == errno.EIO]
                assert not left, f"stage {stage}, {name} at call {place}: left over {left}"
            assert end(start(run, folder, stage, out)) == 0
            check_same(out, wanted[stage])
            shutil.rmtree(out)
            counts[f"{name} injected"] += 1
    return counts


def limited(folder: Path, stage: int, out: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run(folder, stage, out)


def full_disks(folder: Path, count: int, wanted: dict, draw: random.Random) -> collections.Counter:
    """Real writes that fail in the middle: beyond a file size limit, and on a full tmpfs where we may mount one."""
    counts: collections.Counter = collections.Counter()
    largest = max(p.stat().st_size for p in (folder / "whole-1").rglob("*.safetensors"))
    for _ in range(count):
        stage, out = draw.randint(1, 2), folder / "limited"
        status = end(start(limited, folder, stage, out, draw.randrange(1 << 14, largest // 2)))
        assert status == 3, f"file size limit: status {status}, expected an OSError"
        check_whole(out)
        assert end(start(run, folder, stage, out)) == 0
        check_same(out, wanted[stage])
        shutil.rmtree(out)
        counts["file size limits"] += 1
    libc, mount = ctypes.CDLL(None), folder / "disk"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(mount)]
    alone = os.geteuid() == 0 and sys.platform == "linux" and libc.unshare(0x00020000) == 0  # CLONE_NEWNS
    private = alone and subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    if not private or subprocess.run(options, capture_output=True, check=False).returncode:
        counts["full tmpfs: needs root on Linux"] = 1
        return counts
    used = sum(p.stat().st_size for p in (folder / "whole-1").rglob("*") if p.is_file())
    for _ in range(count):
        stage, out = draw.randint(1, 2), mount / "out"
        resize = ["mount", "-o", f"remount,size={draw.randrange(1 << 14, int(0.6 * used))}", str(mount)]
        subprocess.run(resize, check=True)
        status = end(start(run, folder, stage, out))
        assert status == 3, f"full disk: status {status}, expected an OSError"
        check_whole(out)
        subprocess.run(["mount", "-o", "remount,size=64M", str(mount)], check=True)
        assert end(start(run, folder, stage, out)) == 0
        check_same(out, wanted[stage])
        shutil.rmtree(out)
        counts["full tmpfs"] += 1
    return counts


def damages(folder: Path, count: int, draw: random.Random) -> collections.Counter:
    """Bits flipped, ends cut or added, files lost, added, exchanged or of another step: each is refused."""
    counts: collections.Counter = collections.Counter()
    states = folder / "states"
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    content: dict[int, dict[str, bytes]] = {}
    for step in (1, 2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = checkpoint.save_checkpoint(states / f"step-{step:08d}", model, optimizer, step, {})
        content[step] = {p.name: p.read_bytes() for p in state.iterdir()}
    newest, before = states / "step-00000002", states / "step-00000001"
    names = sorted(content[2])
    manifest = [("flip", "manifest.json", bit) for bit in range(8 * len(content[2]["manifest.json"]))]
    kinds = ["flip"] * 8 + ["cut"] * 4 + ["longer", "lost", "added", "exchanged", "older", "link"]
    drawn = [(draw.choice(kinds), draw.choice(names), draw.randrange(1 << 30)) for _ in range(count)]
    for kind, name, number in (*drawn, *manifest):
        old, path = content[2][name], newest / name
        if kind == "flip":
            place = number % (8 * len(old))
            new = bytearray(old)
            new[place // 8] ^= 1 << place % 8
            path.write_bytes(new)
        elif kind == "cut":
            path.write_bytes(old[: number % len(old)])
        elif kind == "longer":
            path.write_bytes(old + bytes([number % 256]))
        elif kind == "lost":
            path.unlink()
        elif kind == "added":
            (newest / f"{name}.{number}").write_bytes(old)
        elif kind == "exchanged":
            path.write_bytes(content[2][names[names.index(name) - 1]])
        elif kind == "older":
            path.write_bytes(content[1][name] if content[1][name] != old else b"")
        else:
            path.unlink()
            path.symlink_to(before / name)
        found, skipped = checkpoint.latest_checkpoint(states)
        assert found == before, f"{kind} {name} {number}: accepted"
        assert len(skipped) == 1
        shutil.rmtree(newest)
        newest.mkdir()
        for n, data in content[2].items():
            (newest / n).write_bytes(data)
        counts[kind] += 1
    assert checkpoint.latest_checkpoint(states) == (newest, [])
    return collections.Counter({"damages refused": counts.total(), **counts})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="runs that are killed at random moments")
    parser.add_argument("--faults", type=int, help="failing calls; by default every one, in both stages")
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    # A kill loses nothing that was written, so memory will do for a disk.
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    print(f"seed {options.seed}, {folder}", flush=True)
    draw, begin = random.Random(options.seed), time.monotonic()
    assert end(start(prepare, folder)) == 0
    wanted, seconds = {}, {}
    for stage in (1, 2):
        for _ in range(2):  # twice: the second finds tokenised rows and reference scores, as a resumed run does
            shutil.rmtree(folder / f"whole-{stage}", ignore_errors=True)
            first = time.monotonic()
            assert end(start(run, folder, stage, folder / f"whole-{stage}")) == 0, (folder / "log.txt").read_text()
            seconds[stage] = time.monotonic() - first
        wanted[stage] = bits(folder / f"whole-{stage}")
        check_same(folder / f"whole-{stage}", wanted[stage])
    try:
        for accident in (
            lambda: kills(folder, options.trials, wanted, seconds, draw),
            lambda: faults(folder, options.faults, wanted),
            lambda: full_disks(folder, options.full_disks, wanted, draw),
            lambda: damages(folder, options.damages, draw),
        ):
            print(json.dumps(dict(sorted(accident().items()))), flush=True)
    except AssertionError as error:
        traceback.print_exc()
        print(f"FAILED: {error}; see {folder}")
        return 1
    print(f"all runs ended in the same bits, {time.monotonic() - begin:.0f} s")
    subprocess.run(["umount", str(folder / "disk")], capture_output=True, check=False)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
