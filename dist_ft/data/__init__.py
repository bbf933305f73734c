"""Training and evaluation data, from sources to micro-batches: `read`, `render`, `store`, `order`.

Imports `config`, `storage`, `pretrained`, `process` and `state`.
"""
