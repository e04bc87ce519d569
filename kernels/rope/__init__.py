"""Rotary positions, with the normalization of queries and keys."""
