"""`amfm bench kernels`."""
