"""Hyperparameter search: the search space, the study in which Optuna keeps the trials, and how trials are run.

Each trial is a `dist-ft train` in its own folder. Optuna is imported by `study` only.
"""
