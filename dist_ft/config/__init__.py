"""The configuration of a run: one module per group of `conf/`, `RunConfig`, and the `Plan` written to run.yaml.

Imports `errors` only; no torch.
"""
