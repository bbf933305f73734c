"""How the tasks lay out sequences and micro-batches, and their token losses.

Imports `data` and `state`.
"""
