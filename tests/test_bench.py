"""The benchmark suite: it runs, checks outputs before it times them, compares results and writes a report."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from autoregembed import ops
from autoregembed.bench import harness, results, suite, targets, workload
from autoregembed.bench.bench_linear_logprob import linear_logprob_case
from autoregembed.cli import main
from autoregembed.kernels.torch import linear_logprob as torch_kernel

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Compiled variants run eagerly: torch.compile takes tens of seconds a shape."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def run(tmp_path: Path, name: str, *arguments: str) -> tuple[int, dict]:
    """Exit status and results of a run of the command."""
    file = tmp_path / f"{name}.json"
    status = main(["bench", "--suite", "ops", "--device", "cpu", "--json", str(file), *arguments])
    return status, json.loads(file.read_text())


def test_quick_run_writes_results_and_a_self_contained_report(tmp_path, capsys):
    report = tmp_path / "report.html"
    status, found = run(tmp_path, "new", "--quick", "--report", str(report))
    assert status == 0
    assert "nothing follows from them" in " ".join(capsys.readouterr().out.split())
    assert found["versions"]["torch"] == torch.__version__
    assert found["measured"]["flops_per_second"]["float32"] > 1e8
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|", found["commit"])
    by_case: dict = {}
    for row in found["rows"]:
        by_case.setdefault(row["case"], {})[row["variant"]] = row
    gradient = by_case["linear_logprob gradient N=64 D=32 V=500 float32 cpu"]
    ours = gradient["autoregembed (torch)"]
    assert {"gemm_only", "eager", "compiled chunked", "liger"} <= gradient.keys()
    assert gradient["gemm_only"]["ratio_to_gemm_only"] == 1
    assert gradient["eager"]["speedup"] == 1
    assert ours["flops"] == 4 * 64 * 32 * 500
    assert 0 < ours["error"] < 1e-5
    assert ours["median_ms"] > 0
    assert gradient["liger"]["skipped"]
    for job in ("frozen", "trainable"):
        dpo = by_case[f"dpo {job} head S=4 L=16 D=32 V=500 float32 cpu"]
        assert 0 < dpo["autoregembed"]["error"] < 1e-5
        for name in ("trl", "trl, completions only", "trl selective_log_softmax"):
            assert dpo[name]["skipped"] in (None, "trl is not installed"), "a baseline that is called wrongly"
    text = report.read_text()
    assert "src=" not in text
    assert not re.search(r"""href=["'](?!#)""", text)
    assert text.count("<svg") >= 6
    for case in by_case:
        if not next(iter(by_case[case].values()))["curve"]:
            assert case in text
            assert case in text.split("<h2>")[0], "a case missing from the overview at the top"


def test_compare_catches_a_kernel_that_does_its_work_twice(monkeypatch):
    """The clock counts calls of the kernel, so the result does not depend on the load of the machine."""
    case = linear_logprob_case(32, 16, 100, "gradient", "cpu", torch.float32, only={"gemm_only", "eager"}, rounds=3)
    forward, calls = torch_kernel.forward, 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return forward(*arguments)

    def timed(call, device, cold):
        before = calls
        call()
        return 1.0 + 4.0 * (calls - before)

    def measure() -> dict:
        machine = harness.Machine("cpu", {"float32": 1e11}, 1e10)
        return {"rows": [asdict(row) for row in harness.run(case, machine, memory=False)]}

    monkeypatch.setattr(harness, "timed", timed)
    monkeypatch.setattr(torch_kernel, "forward", counted)
    old, quiet = measure(), Console(quiet=True)
    assert results.compare(old, measure(), console=quiet) == []
    monkeypatch.setattr(torch_kernel, "forward", lambda *arguments: (counted(*arguments), counted(*arguments))[1])
    slower = results.compare(old, measure(), console=quiet)
    assert any("autoregembed (torch): time × 1.80" in line for line in slower), slower
    faster = {"rows": [{**row, "ratio_to_gemm_only": 1.0} for row in old["rows"]]}
    assert results.compare(old, faster, console=quiet) == []
    with pytest.raises(ValueError, match="no case and variant in common"):
        results.compare(old, {"rows": [{**row, "case": "another"} for row in old["rows"]]}, console=quiet)


@pytest.fixture
def one_case(monkeypatch):
    case = partial(linear_logprob_case, 32, 16, 100, "gradient", "cpu", torch.float32, only={"gemm_only", "eager"})
    monkeypatch.setattr(suite, "cases", lambda *_: [case])
    measure = suite.measure_machine
    monkeypatch.setattr(suite, "measure_machine", lambda device, quick: measure(device, True))


def test_compare_decides_the_exit_status(tmp_path, one_case):
    status, found = run(tmp_path, "old", "--rounds", "1")
    for row in found["rows"]:
        for field in ("ratio_to_gemm_only", "speedup"):
            if row[field] and harness.is_ours(row["variant"]):
                row[field] *= 1e-6 if field == "ratio_to_gemm_only" else 1e6
    (tmp_path / "old.json").write_text(json.dumps(found))
    assert status == 0
    assert run(tmp_path, "new", "--rounds", "1", "--compare", str(tmp_path / "old.json"))[0] == 1
    (tmp_path / "broken.json").write_text('{"rows": 3}')
    assert main(["bench", "--compare", str(tmp_path / "broken.json")]) == 2


def test_quick_results_are_never_compared(tmp_path, one_case, capsys):
    run(tmp_path, "quick", "--quick")
    run(tmp_path, "full", "--rounds", "1")
    for new, old in (("--quick", "full"), ("--rounds=1", "quick"), ("--quick", "quick")):
        capsys.readouterr()
        assert main(["bench", "--device", "cpu", new, "--compare", str(tmp_path / f"{old}.json")]) == 2
        captured = capsys.readouterr()
        assert "ValueError: compare: got results of --quick" in captured.err
        assert "gemm_only" not in captured.out, "refused before the run"


BASELINE = """
import torch
def right(hidden, weight, target):
    return torch.log_softmax(hidden @ weight.T, 1).gather(1, target[:, None])[:, 0]
def wrong(hidden, weight, target):
    return right(hidden, weight, (target + 1) % len(weight))
def loss(query, passages):
    cosines = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(passages, dim=1).T
    return torch.nn.functional.cross_entropy(cosines / 0.05, torch.arange(len(query)))
text = "no function"
"""


def test_a_baseline_from_outside(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_kernels.py").write_text(BASELINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    measure = suite.measure_machine
    monkeypatch.setattr(suite, "measure_machine", lambda device, quick: measure(device, True))
    for op, shape, name in (
        ("linear_logprob", "12,8,50", "right"),
        ("linear_logprob", "12,8,50", "wrong"),
        ("info_nce", "6,9,8", "loss"),
    ):
        arguments = ["--baseline", f"my_kernels:{name}", "--op", op, "--shape", shape, "--dtype", "fp32"]
        status, found = run(tmp_path, "one", *arguments, "--rounds", "1")
        assert status == 0
        rows = {row["variant"]: row for row in found["rows"]}
        mine = rows[f"my_kernels:{name}"]
        assert list(mine["shape"].values()) == [int(x) for x in shape.split(",")]
        assert any(harness.is_ours(variant) for variant in rows)
        if name == "wrong":
            assert mine["skipped"].startswith("wrong result")
        else:
            assert mine["median_ms"] > 0
            assert mine["error"] < 1e-4
    for options, message in (
        (["my_kernels"], "baseline: got 'my_kernels', expected module:function"),
        (["my_kernels:nothing"], "baseline: got 'my_kernels:nothing', which cannot be imported"),
        (["my_kernels:text"], "baseline: got 'my_kernels:text', a str"),
        (["my_kernels:right", "--shape", "12,8"], "shape: got '12,8', expected N,D,V"),
        (
            ["my_kernels:right", "--shape", "12,8,9", "--op", "sum"],
            "op: got 'sum', expected linear_logprob or info_nce",
        ),
        (["my_kernels:right", "--shape", "12,8,9", "--dtype", "int8"], "dtype: got 'int8', expected bf16, fp16, fp32"),
    ):
        assert main(["bench", "--device", "cpu", "--baseline", *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_every_field_of_a_result_is_documented():
    page = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    page = page.partition("## Results of benchmarks")[2]
    named = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in page.splitlines() if line[:1] == "|")))
    machine = harness.Machine("cpu", {"float32": 1e11}, 1e10)
    top = {"format", "suite", "quick", "rows", *results.environment(machine)}
    assert named == top | set(harness.Row.__dataclass_fields__)


def test_a_case_without_its_inputs_is_skipped_whole():
    def prepare(_):
        raise harness.Unavailable("no text")

    case = linear_logprob_case(32, 16, 100, "gradient", "cpu", torch.float32)
    case.prepare = prepare
    rows = harness.run(case, harness.Machine("cpu", {"float32": 1e11}, 1e10))
    assert {row.skipped for row in rows} == {"no text"}
    assert all(row.median_ms is None for row in rows)


def test_an_unknown_suite_or_device_is_named(capsys):
    for option, value in (("--suite", "nonsense"), ("--device", "abacus")):
        assert main(["bench", option, value]) == 2
        assert f"{option[2:]}: got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("bug", ["gradient", "logprob", "unwritten"])
def test_a_wrong_kernel_is_never_timed(monkeypatch, bug):
    forward = torch_kernel.forward

    def wrong(*arguments):
        logprob, u = forward(*arguments)
        if bug == "gradient":
            u[-1] = 0
        elif bug == "logprob":
            logprob[0] += 0.01
        else:
            u = torch.empty_like(u)
        return logprob, u

    monkeypatch.setattr(torch_kernel, "forward", wrong)
    case = linear_logprob_case(64, 32, 500, "gradient", "cpu", torch.float32, only={"gemm_only"})
    with pytest.raises(AssertionError):
        harness.run(case, harness.Machine("cpu", {"float32": 1e11}, 1e10))


def test_unwritten_outputs_are_seen_as_nan():
    with harness.poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_baseline_that_fails_is_skipped_with_the_reason():
    def broken():
        raise RuntimeError("no such symbol")

    case = linear_logprob_case(32, 16, 100, "gradient", "cpu", torch.float32, only={"gemm_only", "eager"}, rounds=1)
    case.variants["baseline"] = harness.Variant(broken)
    case.variants["wrong"] = harness.Variant(lambda: lambda: (torch.zeros(32), torch.zeros(32, 16)))
    rows = {r.variant: r for r in harness.run(case, harness.Machine("cpu", {"float32": 1e11}, 1e10))}
    assert rows["baseline"].skipped == "failed: RuntimeError: no such symbol"
    assert rows["wrong"].skipped.startswith("wrong result")
    assert rows["eager"].median_ms > 0


def test_peak_memory_is_the_largest_number_of_bytes_alive():
    def call():
        a = torch.ones(1 << 20)  # 4 MiB, alive to the end
        for _ in range(5):
            a = a + torch.ones(1 << 20)  # one operand and one result at a time beside it
        return a

    assert harness.peak_memory(call, "cpu")[0] == 3 * (4 << 20)


def test_synthetic_inputs_are_as_peaked_as_a_language_model():
    inputs = workload.synthetic(256, 128, 8192)
    p = (inputs.hidden @ inputs.weight.T).softmax(1)
    entropy = torch.special.entr(p).sum(1)
    assert 2.5 < entropy.mean() < 3.7
    assert 0.02 < (p > 1e-6).float().mean() < 0.4
    assert 0.05 < p.gather(1, inputs.target[:, None]).mean() < 0.5


def test_triplets_of_a_file(tmp_path):
    rows = [{"query": f"q {i}", "pos": "p", "neg": "n"} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, describe = workload.triplets(3, tmp_path / "rows.jsonl")
    assert len(found) == 3
    assert all(r in rows for r in found)
    assert "rows.jsonl" in describe
    with pytest.raises(FileNotFoundError):
        workload.triplets(3, tmp_path / "none.jsonl")


def test_step_agrees_with_the_released_algorithm(tmp_path):
    rows = [{"query": "the cat sat " * (i + 1), "pos": "a mat", "neg": "old stone bridges"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = suite.bench("step", quick=True, device="cpu", triplets=str(tmp_path / "rows.jsonl"), rounds=1)
    ours = [r for r in found["rows"] if r["variant"] == "autoregembed"]
    assert [r["job"] for r in ours] == ["stage2", "stage1"]
    for row in ours:
        assert row["error"] < 1e-3
        assert row["tokens_per_second"] > 0
        assert {"encoder, forward", "decoder, backward", "head and loss", "optimiser"} <= row["details"].keys()
        assert all(v >= 0 for v in row["details"].values())


def test_pytest_benchmark_replays_the_interleaved_samples(tmp_path):
    file = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--quick", "--device", "cpu"]
    # pytest-benchmark measures nothing in what looks like a worker of pytest-xdist.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, f"--benchmark-json={file}", "bench", "-k", "alignment_loss and not conditional"],
        cwd=ROOT, capture_output=True, text=True, env=alone,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {b["extra_info"]["variant"]: b for b in json.loads(file.read_text())["benchmarks"]}
    assert {"autoregembed", "eager"} <= found.keys()
    for entry in found.values():
        assert entry["stats"]["median"] == pytest.approx(1e-3 * entry["extra_info"]["median_ms"], rel=1e-3)
        assert entry["group"].startswith("alignment_loss")


def test_every_backend_of_this_machine_is_measured():
    case = linear_logprob_case(32, 16, 100, "gradient", "cpu", torch.float32)
    able = [n for n, s in ops.available_impls("cpu").items() if s == "ok" and n not in ("reference", "triton")]
    assert {f"autoregembed ({name})" for name in able} <= case.variants.keys()


def test_targets_read_a_result():
    row = {
        "case": "linear_logprob gradient N=8192 D=4096 V=128256 bfloat16 cuda",
        "op": "linear_logprob",
        "job": "gradient",
        "shape": {"N": 8192, "D": 4096, "V": 128256},
        "curve": None,
    }
    ours = {**row, "variant": "autoregembed (triton)", "median_ms": 23.0, "ratio_to_gemm_only": 1.1, "peak_bytes": 7e8}
    baselines = [
        {**row, "variant": name, "median_ms": 31.0} for name in ("liger", "cut-cross-entropy", "compiled chunked")
    ]
    found = {"device": "cuda", "rows": [ours, *baselines]}
    assert [state for state, _, _ in targets.targets(found)] == ["PASS", "OPEN", "MISS"]
    found["rows"].append({**row, "variant": "torch linear_cross_entropy", "median_ms": 29.0})
    assert [state for state, _, _ in targets.targets(found)] == ["PASS", "MISS", "MISS"]
