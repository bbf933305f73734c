"""Attention: which kernel computes it on this machine, and how the documents of one row stay apart.

Imports `errors`, `process` and, in the parent folder, `isolation` and `noise`.
"""
