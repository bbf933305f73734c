"""Weights packed in 4 or 8 bits, and the modules that compute with them.

Imports nothing else of `model`.
"""
