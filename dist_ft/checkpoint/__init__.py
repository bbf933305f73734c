"""Checkpoints: saved atomically, verified before loading, and resumable with any engine and world size.

May import `config`, `data`, `prepare`, `pretrained`, `process`, `state`, `storage` and `method.start`.
"""
