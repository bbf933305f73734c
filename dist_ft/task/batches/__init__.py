"""Shared code of the tasks: collation of micro-batches, token losses, masking and answer spans.

May import `data` and `state`.
"""
