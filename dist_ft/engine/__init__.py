"""Who owns parameters, gradients and updates: DDP, FSDP2, DeepSpeed ZeRO.

Imports `config`, `model.anatomy`, `process` and `state`.
"""
