"""Recurrence with a decay of each channel and state number, as Mamba (S6) uses it."""
