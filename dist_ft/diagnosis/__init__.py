"""`dist-ft doctor`: checks of what this machine needs for training.

Imports `process` and `errors`.
"""
