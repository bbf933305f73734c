"""What is learned: one module per task.

Imports `config`, `data`, `process` and `state`.
"""
