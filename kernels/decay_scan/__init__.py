"""Recurrence with a decaying state, as Mamba-2, lightning attention and RetNet use it."""
