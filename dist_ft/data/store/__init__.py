"""Prepared splits on disk: identity in the cache, token tables, samples, the ledger.

Imports `data.read` and `data.render`.
"""
