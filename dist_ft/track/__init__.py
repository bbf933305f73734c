"""Metric trackers: the terminal, metrics.jsonl and Weights & Biases (W&B).

May import `config`, `process` and `state`.
"""
