"""A training step of ours beside that of transformers: `python -m benchmarks.step`."""
