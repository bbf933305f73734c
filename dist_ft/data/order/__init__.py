"""Sample order: which samples each step, rank and micro-batch contains.

Imports `data.store`.
"""
