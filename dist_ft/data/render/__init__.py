"""Canonical rows turned into token ids and labels: tokenizers, chat templates, assistant spans, label names.

Imports `data.read`.
"""
