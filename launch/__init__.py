"""The command line, local processes, and what stands around a run."""
