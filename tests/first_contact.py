"""All of `bench/gpu.sh first` on a bare machine: `pytest tests/first_contact.py`, nightly."""

from test_bench_gpu import QUICK, first_contact


def test_first_contact(tmp_path):
    assert first_contact(tmp_path) == QUICK
