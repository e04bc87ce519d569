"""A training step of ours vs. that of transformers: `python -m benchmarks.step`."""
