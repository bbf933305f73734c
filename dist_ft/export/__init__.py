"""Export of the trained model to a Hugging Face folder: writing, reloading, verifying, merging and the model card.

May import `model`, `method`, `checkpoint`, `data` and the tables of `families`.
"""
