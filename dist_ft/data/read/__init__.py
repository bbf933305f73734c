"""Sources, rows and formats: raw rows turned into canonical rows. No torch.

Imports nothing else of `data`.
"""
