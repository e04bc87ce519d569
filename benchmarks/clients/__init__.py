"""Other programs on our exports: `python -m benchmarks.clients`."""
