"""Checks of a composed configuration that run before a worker is started.

Imports `config`, `data.read`, `pretrained` and `privacy.rules`; no torch.
"""
