"""Configuration of a run: one module per group of `conf/`, `RunConfig`, and the `Plan` written to run.yaml.

Imports only `errors`; no torch.
"""
