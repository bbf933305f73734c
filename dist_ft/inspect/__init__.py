"""Output of `dist-ft plan` and `dist-ft data`: parameters, memory, tokenized rows and data ledgers.

May import every module except `build` and `worker`.
"""
