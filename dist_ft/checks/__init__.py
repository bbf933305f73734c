"""Every rule that a composed configuration can break, checked before a worker starts.

Imports `config`, `data.read`, `pretrained` and `privacy.rules`; no torch.
"""
