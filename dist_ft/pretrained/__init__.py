"""Where a pretrained model comes from: resolved, downloaded, converted; and what its files say without torch.

Imports `config`, `storage` and `state`.
"""
