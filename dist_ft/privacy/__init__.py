"""Differential privacy: the mechanism, its rules, and the engines that clip and add noise.

Imports `config`, `data.order`, `engine` and `process`.
"""
