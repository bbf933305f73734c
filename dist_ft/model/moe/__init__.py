"""Mixtures of experts: the router policy, and the balance and z losses.

Imports `model.anatomy`.
"""
