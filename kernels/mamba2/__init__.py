"""Mamba2's mixer between its projections as one operation."""
