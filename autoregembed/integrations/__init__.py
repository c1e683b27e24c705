"""Thin adapters to other training frameworks."""
