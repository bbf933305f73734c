"""Prepared splits on disk: cache keys, token tables, samples and ledgers.

Imports `data.read` and `data.render`.
"""
