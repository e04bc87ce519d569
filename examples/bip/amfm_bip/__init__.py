"""Bi-level pruning of whole groups on amfm's models."""
