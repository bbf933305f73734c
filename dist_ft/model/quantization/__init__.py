"""Weights packed in 4 or 8 bits, the modules that compute with them, and folders that are stored quantized.

Imports nothing else of `model`.
"""
