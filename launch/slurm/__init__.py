"""Jobs of a SLURM cluster: the batch script of a plan, and its submission."""
