"""Resolution, download and conversion of pretrained models, and facts read from their files without torch.

Imports `config`, `storage` and `state`.
"""
