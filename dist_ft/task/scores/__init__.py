"""Metrics that are computed from the predictions of a whole split.

May import `state`.
"""
