"""Monarch Mixer's sequence mixer as a block of amfm."""
