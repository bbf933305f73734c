"""Checkpoints: written as transactions, verified on reading, resumed under any engine and world size.

Imports `config`, `process`, `state` and `method.start`.
"""
