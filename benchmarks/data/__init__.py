"""Reading and preparing data: `python -m benchmarks.data`."""
