"""The whole job on a GPU: `python -m benchmarks.gpu_job`."""
