"""Mixtures of experts: the router policy, the balance and z losses, and adapters of fused experts.

Imports `model.anatomy` and `model.quantization`.
"""
