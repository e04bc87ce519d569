"""Kinds of residual stream next to the plain sum."""
