"""Trials: an operation at sizes at which its kernels are held against float64, on a card or in the interpreter."""
