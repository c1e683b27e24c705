"""`pytest bench --benchmark-json=out.json`: every variant of every case as one benchmark.

pytest-benchmark times one function at a time; here the variants of a case run interleaved, on a GPU by events. So each
benchmark replays the samples of `harness.run`, on a clock that advances by them.
"""

import functools
from dataclasses import asdict

import pytest

from autoregembed.bench import harness, suite

clock = [0.0]
machine = functools.cache(suite.measure_machine)


@functools.cache
def measured(make, device, quick):
    rounds = suite.QUICK_ROUNDS if quick else None
    return {row.variant: row for row in harness.run(make(), machine(device, quick), rounds=rounds)}


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    variants = ((make, case.name, name) for make in suite.cases("all", options.device, options.quick)
                for case in [make()] for name in case.variants)  # fmt: skip
    metafunc.parametrize(("make", "name"), [pytest.param(m, v, id=f"{c}: {v}") for m, c, v in variants])


@pytest.mark.benchmark(timer=lambda: clock[0])
def test_case(make, name, request, benchmark):
    row = measured(make, request.config.option.device, request.config.option.quick)[name]
    if row.skipped is not None:
        pytest.skip(row.skipped)
    samples = iter([*row.samples_ms, 0.0])  # pytest-benchmark makes one more call at the end

    def advance():
        clock[0] += 1e-3 * next(samples)

    benchmark.group = row.case
    benchmark.extra_info.update({k: v for k, v in asdict(row).items() if k != "samples_ms" and v not in (None, {}, "")})
    benchmark.pedantic(advance, rounds=len(row.samples_ms))
