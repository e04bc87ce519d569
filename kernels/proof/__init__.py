"""Verification of kernels: compiled ahead of time, counted traffic, races, emulated rounding, timing."""
