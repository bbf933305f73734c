"""Which weights learn: one module per method.

Imports `config`, `model` and `state`.
"""
