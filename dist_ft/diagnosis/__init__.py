"""`dist-ft doctor`: what on this machine stands in the way of training.

Imports `process` and `errors`.
"""
