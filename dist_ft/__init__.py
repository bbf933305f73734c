"""Distributed fine-tuning of language models: a run that exits 0 trained what you meant."""

__version__ = "0.1.0"
