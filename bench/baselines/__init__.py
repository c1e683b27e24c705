"""Implementations that ours are measured against."""
