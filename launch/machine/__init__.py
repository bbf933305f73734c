"""The machine where a command runs: its environment, GPUs and ports. Imports nothing else of `launch`."""
