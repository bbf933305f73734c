"""Helpers for tests of several processes."""
