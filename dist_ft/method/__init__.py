"""Which weights are trained: one module per method.

Imports `config`, `model` and `state`.
"""
