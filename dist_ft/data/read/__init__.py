"""Data sources, rows and formats: read raw rows and convert them to canonical rows, without importing torch.

Imports no other subpackage of `data`.
"""
