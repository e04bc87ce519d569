"""Recipes of low precision next to none: `python -m benchmarks.numerics`."""
