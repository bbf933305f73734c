"""Checkpoints: saved atomically, verified before loading, and resumable with any engine and world size.

May import `config`, `process`, `state` and `method.start`.
"""
