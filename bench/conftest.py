"""`pytest bench` runs the suites under pytest-benchmark: a case is measured once, each of its variants is a test."""

import sys

import pytest
import torch

RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("autoregembed")
    group.addoption("--quick", action="store_true", help="tiny sizes: whether everything runs")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    if "variant" in metafunc.fixturenames:
        options = metafunc.config.option
        made = [(make, make()) for make in metafunc.module.cases(options.device, options.quick)]
        parameters = [pytest.param((make, name), id=f"{c.name}: {name}") for make, c in made for name in c.variants]
        metafunc.parametrize("variant", parameters, indirect=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if "variant" in item.fixturenames:
            clock = sys.modules[item.module.replay.__module__].clock
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def variant(request):
    """The measured row of one variant; the first of a case to be asked for measures them all."""
    make, name = request.param
    options = request.config.option
    harness = sys.modules[request.module.replay.__module__]
    results = request.config.stash.setdefault(RESULTS, {})
    if "machine" not in results:
        harness.settle_process()
        dtypes = [torch.float32] if options.device == "cpu" else [torch.bfloat16, torch.float32]
        results["machine"] = harness.Machine.measure(options.device, dtypes, options.quick)
    if make not in results:
        results[make] = {row.variant: row for row in harness.run(make(), results["machine"])}
    return results[make][name]
