"""Benchmarks, installed as `autoregembed.bench`; `autoregembed bench` runs them."""
