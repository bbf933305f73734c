"""Commands that assess the model of a run: evaluation, generation, prediction, general abilities and forgetting.

May import every module except `build` and `worker`.
"""
