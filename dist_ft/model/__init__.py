"""The model itself: loading, anatomy, attention, quantization, mixtures of experts, FLOPs.

Imports `config`, `process` and `state`.
"""
