"""Benchmarks: what `amfm bench` measures side by side."""
