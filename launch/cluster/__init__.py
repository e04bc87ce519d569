"""Starting ranks: on this machine, by torchrun, Slurm or Ray, and keeping them alive."""
