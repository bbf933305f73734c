"""Optimizers and learning-rate schedules.

Imports `config`.
"""
