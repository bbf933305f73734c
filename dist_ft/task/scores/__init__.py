"""Metrics computed from the predictions of a whole split.

Imports `state`.
"""
