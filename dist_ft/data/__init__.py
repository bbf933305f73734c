"""Training and evaluation data, from source files to micro-batches: `read`, `render`, `store`, `order`.

Imports `config`, `storage`, `pretrained`, `process` and `state`.
"""
