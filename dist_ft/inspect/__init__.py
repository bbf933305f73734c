"""What `dist-ft plan` and `dist-ft data` show: parameters, memory, rows as tokens, ledgers.

Imports everything but `build` and `worker`.
"""
