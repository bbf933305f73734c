"""Who owns parameters, gradients and updates: DDP, FSDP2, DeepSpeed ZeRO.

Imports `config`, `model.anatomy`, `model.reach`, `process` and `state`.
"""
