"""Conversion of canonical rows to token ids and labels: tokenizers, chat templates, assistant spans, label names.

Imports `data.read`.
"""
