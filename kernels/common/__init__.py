"""Helpers of kernels: chunks, tiles, gates, partial sums, strides, what a shape may be."""
