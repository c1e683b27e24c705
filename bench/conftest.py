"""The options of `pytest bench`."""

import torch


def pytest_addoption(parser):
    group = parser.getgroup("autoregembed")
    group.addoption("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
