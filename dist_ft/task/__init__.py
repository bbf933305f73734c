"""Training tasks, with one module per task.

May import `config`, `data`, `process` and `state`.
"""
