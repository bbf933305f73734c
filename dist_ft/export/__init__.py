"""The trained model as a Hugging Face folder: written, reloaded, compared, merged, described.

Imports `model`, `method`, `checkpoint`, `data` and the tables of `families`.
"""
