"""Files and folders of the cache: digests, atomic publication, free disk space.

Imports `config` and `errors`; no torch.
"""
