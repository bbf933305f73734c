"""Tiny models and process groups for tests and benchmarks; nothing in the package imports it."""
