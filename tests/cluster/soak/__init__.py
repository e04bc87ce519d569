"""A soak of the Slurm launcher on a real cluster: a fault every two minutes, then the run must be like one that nothing disturbed."""
