"""Readers of the formats of data files."""
