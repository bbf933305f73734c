"""Distributed fine-tuning of language models: a run that exits 0 trained what you meant."""

import logging

__version__ = "0.1.0"

# On some CPUs it advises, whenever peft imports it, to fetch kernels that no run here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
