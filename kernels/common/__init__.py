"""Helpers of kernels: chunks, tiles, gates, weight gradients, what the tensors of an operation may be."""
