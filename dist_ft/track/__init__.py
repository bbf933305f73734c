"""Where metrics go: the terminal, metrics.jsonl, W&B.

Imports `config`, `process` and `state`.
"""
