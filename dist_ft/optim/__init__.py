"""Optimizers and learning-rate schedules.

May import `config`.
"""
