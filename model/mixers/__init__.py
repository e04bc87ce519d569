"""Sequence mixers beyond Mamba2 and attention, found by their letter or name in the pattern."""
