"""Preparation at size, killed and measured next to the bare tokenizer: `python -m benchmarks.preparation`."""
