"""What kernels run on: the backend, its check at the first use, tuned tiles, the machine, Triton's interpreter."""
