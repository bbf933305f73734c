"""Commands that judge a run's model: evaluate, generate, predict, general abilities, forgetting.

Imports everything but `build` and `worker`.
"""
