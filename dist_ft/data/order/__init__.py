"""Which samples each step, rank and micro-batch sees.

Imports `data.store`.
"""
